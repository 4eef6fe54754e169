"""The plan of a step on a mesh: what its program takes and does, by closed forms and by a run."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from hyperadapt_jax import models, paths
from train import base, methods
from train.__main__ import main
from train.data.batches import Batches
from train.errors import InputError
from train.options import AdapterOptions, ModelOptions, OptimizerOptions, RunOptions
from train.parallel import program
from train.parallel.chips import CHIPS, seconds
from train.parallel.mesh import AXES, activations_of, make_layout
from train.tasks.instructions import Instructions
from train.trainer import ahead, loop
from train.trainer.ahead import StepOptions, compile_step, held_bytes, tpu_memory
from train.trainer.optimizer import make_optimizer
from train.trainer.step import describe, start
from train.trainer.suggest import USABLE, suggest

CONFIGS = Path(__file__).resolve().parents[1] / "fixtures/configs"
L, D, F, V, N, K, H, T = 3, 64, 160, 512, 8, 4, 8, 32  # layers, width, hidden, vocabulary, heads
RAW = dict(
    model_type="llama", vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
    num_attention_heads=N, num_key_value_heads=K, max_position_embeddings=64,
    tie_word_embeddings=False,
)  # fmt: skip
BERT = dict(
    model_type="bert", vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
    num_attention_heads=N, max_position_embeddings=64, type_vocab_size=2, pad_token_id=0,
)  # fmt: skip
LAYER = D * (N * H + 2 * K * H) + N * H * D + 3 * D * F  # weights of a layer's products
EIGHT = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(RAW))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "config.json").write_text(json.dumps(BERT))
    return folder


@functools.cache
def facts(model: Path, mesh: tuple[int, ...] = (1, 1, 1), *, remat="full", adapter=(), **options):
    """What the step of 16 rows takes and does, compiled for the devices of this very process."""
    given = dict(batch_size=16, max_length=T, loss_chunk=0) | options
    return compile_step(
        StepOptions(
            model=ModelOptions(model=str(model), remat=remat),
            adapter=AdapterOptions(**dict(adapter)),
            shape=mesh,
            **given,
        )
    )


@pytest.mark.parametrize("name, count, trainable", [
    ("roberta-large", 355_359_744, 442_368),
    ("llama-3-8b", 8_030_261_248, 2_621_440),
    ("llama-3-70b", 70_553_706_496, 12_943_360),
    ("qwen2.5-7b", 7_615_616_512, 2_523_136),
    ("phi-4", 14_659_507_200, 3_481_600),
])  # fmt: skip
def test_the_configurations_are_the_models(name, count, trainable):
    described = base.load_abstract(ModelOptions(model=str(CONFIGS / name)))
    assert sum(leaf.size for leaf in jax.tree.leaves(described.params)) == count
    assert methods.tune(described, AdapterOptions()).count == trainable


# ------------------------------------------------------------------------------- bytes of a device


@EIGHT
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_device_holds_its_shards_and_12_bytes_of_each_number_that_trains(llama, mesh):
    found = facts(llama, mesh)
    fsdp, tensor = mesh[1:]
    matrices = 4 * (L * LAYER + 2 * V * D) // (fsdp * tensor)
    norms = 4 * (2 * L * D + D)
    assert found.frozen == matrices + norms
    # On tensor, a vector lies as the axis of its weight; else it is whole.
    divided = N * H + 2 * K * H + 2 * F + N * H + F  # q, k, v, gate, up; o's and down's inputs
    whole = 5 * D + 2 * D
    numbers = L * (divided // tensor + whole)
    assert found.trainable == 4 * numbers
    counts = 4 * (2 + 2)  # the step, the steps that were not finite, the key
    adam = found.optimizer - 2 * found.trainable - counts
    assert 0 < adam < 100  # the optimizer's own counts
    assert found.batch == 16 * (T * (4 + 1 + 4) + 4) // (mesh[0] * fsdp)
    # A decoder reads neither the key nor the weight of a row.
    assert 0 <= found.held + found.batch - found.memory.given <= 8 + 4 * 16
    assert found.total == sum(found.memory) and found.memory.temporary > found.trainable


@EIGHT
@pytest.mark.parametrize("method", ["hyperadapt", "lora", "vera", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_described_is_what_a_run_starts_with(llama, tmp_path, method, optimizer):
    """Shapes, dtypes and shardings of the state and of the frozen weights."""
    model = models.create(models.read_config(llama / "config.json"))
    options = ModelOptions(model=str(models.export(tmp_path / "model", model, progress=False)))
    layout = make_layout("data=2,fsdp=2,tensor=2")
    shapes, arrays = (
        methods.tune(found, AdapterOptions(method=method))
        for found in (
            base.load_abstract(options, layout=layout),
            base.load(options, layout=layout, quiet=True),
        )
    )
    chosen = OptimizerOptions(optimizer=optimizer)
    matrices = models.matrices(model.config)
    state, real = (
        make(tuning, make_optimizer(chosen, tuning, 10, matrices), *seed)
        for make, tuning, seed in ((describe, shapes, ()), (start, arrays, (0,)))
    )
    assert jax.tree.structure((state, shapes.frozen)) == jax.tree.structure((real, arrays.frozen))
    pairs = zip(
        jax.tree.leaves((state, shapes.frozen)),
        jax.tree.leaves((real, arrays.frozen)),
        strict=True,
    )
    for shape, array in pairs:
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


# ------------------------------------------------------------------------------ work of a device


def products(rows: int, *, again: bool) -> int:
    """FLOPs of the products of a step: forward, forward again, and the gradient to the inputs."""
    tokens, passes = rows * T, 3 if again else 2
    layer = passes * 2 * LAYER * tokens
    # Scores, and what they weigh; backward, a product for each of their two operands.
    attention = (passes + 1) * 2 * 2 * rows * N * T * T * H
    return L * (layer + attention) + 2 * 2 * D * V * tokens


def test_products_are_those_of_the_model_however_the_batch_is_split(llama):
    whole, parts = (facts(llama, accumulate=n).work for n in (1, 2))
    # XLA drops what nothing reads.
    assert whole.flops == pytest.approx(products(16, again=True), rel=0.03)
    assert parts.flops == pytest.approx(whole.flops, rel=1e-6) and not parts.unbounded


@EIGHT
def test_devices_share_the_products_and_none_gets_more_than_the_weights_thrice(llama):
    """Scaling: a fixed batch on more and more devices."""
    one = facts(llama)
    for mesh in ((1, 2, 1), (1, 8, 1), (2, 4, 1), (1, 1, 4)):
        found = facts(llama, mesh)
        assert found.work.flops * math.prod(mesh) == pytest.approx(one.work.flops, rel=1e-3), mesh
        kinds = found.work.collectives
        if mesh[1] > 1:
            assert kinds["all-gather"].bytes <= 3 * one.frozen
            assert kinds["all-reduce"].bytes <= found.trainable + 64
        else:
            # Of each layer, what o and down give, forward, again and backward 7 of the products'
            # other sides, less what is not computed again; then the embedding and the loss.
            rows = 4 * 16 * T * D
            assert kinds["all-reduce"].bytes <= (9 * L + 2.1) * rows


def test_without_recomputation_products_are_4_times_the_weights_and_tokens(llama):
    found = facts(llama, remat="none").work
    assert found.flops == pytest.approx(products(16, again=False), rel=0.03)
    weights, tokens = L * LAYER + V * D, 16 * T
    assert 1 < found.flops / (4 * weights * tokens) < 1.4  # the rest is attention


@EIGHT
@pytest.mark.parametrize("chunk", [0, 16])
def test_on_fsdp_the_weights_are_gathered_twice_and_vectors_reduced(llama, chunk):
    found = facts(llama, (1, 8, 1), loss_chunk=chunk).work.collectives
    weights, head = 4 * L * LAYER, 4 * D * V
    # Layers forward and backward, which are loops; outside of them the head once for both, or for
    # all chunks of each: a chunk has fewer tokens than the head has rows, and yet it is not them.
    gathered = found["all-gather"]
    assert gathered.bytes == 2 * weights + (2 if chunk else 1) * head + 4 * V * D
    assert gathered.received == pytest.approx(gathered.bytes * 7 / 8)
    numbers = methods.tune(base.load_abstract(ModelOptions(model=str(llama))), AdapterOptions())
    # Their gradients, the loss and its weight, and norms and whether all is finite.
    reduced = found["all-reduce"].bytes
    assert 4 * numbers.count <= reduced <= 4 * numbers.count + 64
    assert set(found) == {"all-gather", "all-reduce"}


@EIGHT
def test_on_data_alone_nothing_but_vectors_is_reduced(llama):
    found = facts(llama, (8, 1, 1)).work.collectives
    assert set(found) == {"all-reduce"}
    numbers = methods.tune(base.load_abstract(ModelOptions(model=str(llama))), AdapterOptions())
    assert 4 * numbers.count <= found["all-reduce"].bytes <= 4 * numbers.count + 64
    assert found["all-reduce"].received == pytest.approx(2 * 7 / 8 * found["all-reduce"].bytes)


HLO = """\
HloModule a, entry_computation_layout={()->f32[]}, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (in: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %in = (s32[], /*index=1*/bf16[4,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%in), index=0
  %w = bf16[4,8]{1,0} get-tuple-element(%in), index=1
  %all = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%w), replica_groups=[2,4]<=[8], \
dimensions={0}
  %whole = bf16[16,8]{1,0} all-gather-done(%all)
  %dot = f32[16,4]{1,0} dot(%whole, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %sent = (bf16[4,8], bf16[4,8], u32[], u32[]) collective-permute-start(%w), \
source_target_pairs={{0,1},{1,0}}
  %got = bf16[4,8]{1,0} collective-permute-done(%sent)
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%n, %got)
}

%large (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %q = f32[16,1]{1,0} bitcast(%p)
  %square = f32[16,16]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %r = f32[16]{0} slice(%square), slice={[0:1], [0:16]}
}

%small (s: f32[16]) -> f32[16] {
  ROOT %s = f32[16]{0} parameter(0)
}

ENTRY %main (w: bf16[4,8], v: f32[16], c: pred[]) -> f32[] {
  %w.1 = bf16[4,8]{1,0} parameter(0)
  %v = f32[16]{0} parameter(1)
  %c = pred[] parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,8]{1,0}) tuple(%zero, %w.1)
  %loop = (s32[], bf16[4,8]{1,0}) while(%start), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %either = f32[16]{0} conditional(%c, %v, %v), branch_computations={%small, %large}
  %both = (f32[16]{0}, f32[]) all-reduce(%either, %zero), \
replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %more = f32[16]{0} all-reduce(%v), \
replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add
  %everywhere = f32[16]{0} all-reduce(%v), replica_groups={}, to_apply=%add
  %sub = f32[16]{0} all-reduce(%v), replica_groups=mesh['a'=8] {'a':(1)4}, to_apply=%add
  %part = f32[4]{0} reduce-scatter(%v), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %done = f32[] constant(0)
}

%cond (t: (s32[], bf16[4,8])) -> pred[] {
  ROOT %t = pred[] constant(true)
}
"""


def test_a_programs_text_is_read_as_it_runs():
    """Loops by their trips, asynchronous forms, the larger branch, groups in each spelling."""
    found = program.work(HLO)
    inner, outer = 2 * 16 * 4 * 8, 2 * 16 * 16
    assert found.flops == 5 * inner + outer
    assert found.traffic == 5 * (16 * 8 * 2 + 4 * 8 * 2 + 16 * 4 * 4) + 2 * 16 * 4 + 16 * 16 * 4
    assert found.collectives == {
        "all-gather": (5, 5 * 256, 5 * 256 * 3 / 4),
        "all-reduce": (4, 68 + 3 * 64, 2 * (68 * 3 / 4 + 64 / 2 + 64 * 7 / 8 + 64 * 3 / 4)),
        "reduce-scatter": (1, 16, 16 * 3),
        "collective-permute": (5, 5 * 64, 5 * 64),
    }
    assert program.work(HLO.replace("known_trip_count", "unknown")).unbounded == 1


# ------------------------------------------------------------------------------ a run's own bytes


@EIGHT
@pytest.mark.parametrize("mesh", ["data=1", "fsdp=8"])
def test_a_run_takes_what_was_planned(tmp_path, mesh, capsys):
    """The command's plan, next to the largest step of a run of as many rows and tokens."""
    model = models.create(models.config_from_dict(RAW))
    folder = models.export(tmp_path / "model", model, progress=False)
    rng = np.random.default_rng(0)
    rows = [{"tokens": (x := rng.integers(1, V, T + 1))[:-1], "labels": x[1:]} for _ in range(32)]
    loaded = base.load(ModelOptions(model=str(folder)), layout=make_layout(mesh), quiet=True)
    tuning, task = methods.tune(loaded, AdapterOptions()), Instructions(data="")
    job = loop.Job(
        name="planned",
        base=loaded,
        tuning=tuning,
        loss=task.loss(tuning),
        batches=Batches(rows, 16, lengths=[T], filled=activations_of(loaded.fn).filled, divisor=2),
        evaluate=lambda trainable: {"loss": 0.0},
        criterion=lambda metrics: 0.0,
    )
    run = RunOptions(folder=tmp_path, steps=1, batch_size=16, accumulate=2, quiet=True)
    (tmp_path / "run").mkdir()
    result = loop.fit(job, tmp_path / "run", optimizer=OptimizerOptions(), run=run)
    options = ["--mesh", mesh, "--batch-size", "16", "--max-length", str(T), "--accumulate", "2"]
    file = tmp_path / "plan.json"
    assert (
        main(["plan", "--model", str(folder), *options, "--no-suggest", "--json", str(file)]) == 0
    )
    planned = json.loads(file.read_text())
    assert planned["bytes"]["total"] == pytest.approx(result.spent.step_bytes, rel=0.1)
    shown = capsys.readouterr().out
    assert f"{planned['bytes']['total'] / 1e9:,.3f}" in shown and "TPU v5e" in shown
    assert planned["mesh"] == {
        name: 8 if f"{name}=" in mesh and "8" in mesh else 1 for name in AXES
    }


# --------------------------------------------------------------------------- what is made of them


def test_a_chips_time_is_bounded_by_what_takes_longest():
    h100 = next(chip for chip in CHIPS if chip.name == "H100")
    gathered = program.Collective(1, 10**9, 9e11)
    work = program.Work(flops=989.5e12, traffic=3.35e11, collectives={"all-gather": gathered})
    found = seconds(work, h100, devices=8)
    assert (found.compute, found.memory, found.links) == pytest.approx((1.0, 0.1, 2.0))
    assert (found.limit, found.overlapped, found.serial) == ("links", 2.0, pytest.approx(3.1))
    beyond = seconds(work, h100, devices=16)
    assert beyond.links is None and beyond.limit == "compute" and beyond.overlapped == 1.0


def search(sizes, batch_size=8, **given):
    """What is suggested where bytes follow a formula, and the formula."""

    def total(options: StepOptions) -> float:
        _, fsdp, tensor = options.shape
        rows = options.batch_size // fsdp // options.accumulate
        row = {"dots": 0.8e9, "full": 0.2e9}[options.model.remat] / tensor
        return held(options) + (1e9 if fsdp > 1 else 0) / tensor + rows * row

    def held(options: StepOptions) -> float:
        return 16e9 / math.prod(options.shape)

    def call(fn, options):
        if fn is held_bytes:
            return held(options)
        asked.append(options)
        return types.SimpleNamespace(total=int(total(options)), held=held(options))

    asked: list[StepOptions] = []
    step = StepOptions(model=ModelOptions(model="a"), batch_size=batch_size)
    return list(suggest(step, call, sizes=sizes, **given)), total, asked


def test_suggestions_are_the_fewest_devices_that_fit():
    found, total, compiled = search([100, 20, 12, 4, 3, 1.3, 0.05])
    assert [
        (each.options.shape, each.options.model.remat, each.options.accumulate)
        for each in found[:-1]
    ] == [
        ((1, 1, 1), "dots", 1),  # 16 + 8 * 0.8 of 90 GB
        ((1, 1, 1), "dots", 4),  # 16 + 2 * 0.8 of 18
        ((1, 2, 1), "full", 1),  # 8 + 1 + 4 * 0.2 of 10.8
        ((1, 8, 1), "full", 1),  # 2 + 1 + 0.2 of 3.6
        ((1, 1, 8), "full", 1),  # 2 + 8 * 0.025 of 2.7, where (1, 8, 1) takes 3.2
        ((1, 2, 8), "full", 4),  # 1 + 0.125 + 0.025 of 1.17
    ]
    assert found[-1].options is None
    for each in found[:-1]:
        assert each.compiled and each.total == int(total(each.options)) <= USABLE * each.size * 1e9
        fewer = [
            StepOptions(
                model=ModelOptions(model="a", remat=remat), batch_size=8, shape=(1, n, 1),
                accumulate=parts,
            )
            for n in (1, 2, 4, 8)
            for remat in ("dots", "full")
            for parts in (1, 2, 4, 8)
            if n < each.options.devices and n * parts <= 8
        ]  # fmt: skip
        assert all(total(way) > USABLE * each.size * 1e9 for way in fewer)
    assert len(compiled) == len(set(compiled))
    # Without the time to compile each, the same are found.
    quick, _, few = search([100, 20, 12], seconds=-1.0)
    assert [each.options for each in quick] == [each.options for each in found[:3]]
    assert not quick[1].compiled and len(few) < len(compiled)


@EIGHT
def test_an_estimate_is_near_the_program_that_it_is_of(llama):
    asked = StepOptions(
        model=ModelOptions(model=str(llama)), batch_size=8, max_length=T, loss_chunk=0
    )
    room = 1.1 * facts(llama, (1, 2, 1), batch_size=8, accumulate=1).total
    (found,) = suggest(
        asked, lambda fn, *args: fn(*args), sizes=[room / 1e9 / USABLE], seconds=-1.0
    )
    assert found.total == pytest.approx(compile_step(found.options).total, rel=0.1)


@EIGHT
def test_an_encoders_step_has_its_new_head(bert):
    found = facts(bert, (1, 2, 1), labels=3)
    head = D * 3 + 3
    assert found.trainable > 4 * head
    assert found.batch == 16 * (T * (4 + 1) + 4 + 4) // 2


@pytest.mark.parametrize("args, reason", [
    (["--mesh", "fsdp=-1"], "there is no rest of them: give fsdp a number"),
    (["--mesh", "fsdp=4096"], "give no more than 1024 devices"),
    (["--mesh", "rows=2"], "'rows' is no axis"),
    (["--mesh", "tensor=7", "--max-length", "32"], "--mesh: tensor=7 divides nothing of this"),
    (["--mesh", "fsdp=2", "--rules", "embd=tensor"], "'embd' is no axis of an array"),
    (["--batch-size", "0"], "--batch-size 0: give a number from 1"),
    (["--batch-size", "6", "--accumulate", "4"], "cannot be computed in 4 equal parts"),
    (["--batch-size", "6", "--max-length", "65"], "--max-length 65: the model takes 64 tokens"),
    (["--batch-size", "6", "--loss-chunk", "-1"], "--loss-chunk -1: give a number of tokens"),
    (["--json", "some.json"], "--json: is for a step: give --batch-size or --mesh too"),
    (["--accumulate", "2"], "--accumulate: is for a step"),
    (["--mesh", "fsdp=2", "--attention", "cudnn"], "--attention cudnn: compiles on its GPU alone"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused(llama, capsys, args, reason):
    assert main(["plan", "--model", str(llama), "--no-suggest", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line


@EIGHT
def test_the_compiler_of_a_slice_tells_the_memory(llama, monkeypatch):
    """Here, where there is none, with CPU devices in place of the slice's."""
    options = StepOptions(
        model=ModelOptions(model=str(llama)), shape=(1, 4, 1), batch_size=4, max_length=T
    )
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(InputError, match="--topology v5e:2x4: .* It needs libtpu"):
            tpu_memory(options, "v5e:2x4")
    topology = types.SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(ahead.topologies, "get_topology_desc", lambda name, platform: topology)
    assert tpu_memory(options, "v5e:2x4") == compile_step(options).memory
    with pytest.raises(InputError, match="has 8 devices, and --mesh takes 16"):
        tpu_memory(dataclasses.replace(options, shape=(1, 16, 1)), "v5e:2x4")


def test_an_encoder_without_a_head_has_no_step(bert, capsys):
    assert main(["plan", "--model", str(bert), "--batch-size", "8", "--max-length", "32"]) == 2
    assert "--labels: an encoder's step needs a head" in capsys.readouterr().err


def test_paths_of_shapes_and_arrays_agree(llama):
    """On shapes without shardings, what is frozen is what it was."""
    described = base.load_abstract(ModelOptions(model=str(llama)))
    frozen = paths.arrays(methods.tune(described, AdapterOptions()).frozen)
    assert {p: (x.shape, x.dtype) for p, x in frozen.items()} == {
        p: (x.shape, x.dtype) for p, x in paths.arrays(described.params).items()
    }
