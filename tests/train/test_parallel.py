"""Runs on meshes of eight CPU devices: the same numbers as on one, and what lies where."""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from hyperadapt_jax import models, paths
from train import base, methods
from train.__main__ import main
from train.data.batches import Batches
from train.data.examples import Examples
from train.errors import InputError
from train.metrics.generation import GenerationEval
from train.options import AdapterOptions, DeviceOptions, ModelOptions, OptimizerOptions, RunOptions
from train.parallel.mesh import AXES, Layout, activations_of, make_layout, make_mesh, put_rows
from train.run.log import METRICS, read_metrics
from train.tasks.classify import Classify
from train.tasks.instructions import Instructions
from train.trainer import loop, losses
from train.trainer.optimizer import learning_rates, make_optimizer
from train.trainer.step import make_step, start

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

MESHES = {
    "8,1,1": "data=8",
    "1,8,1": "fsdp=-1",
    "1,1,8": "tensor=8",
    "2,2,2": "data=2,fsdp=2,tensor=2",
    "1,4,2": "fsdp=4,tensor=-1",
}
ON_EACH = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
ONE = "data=1"
TINY = Path(__file__).resolve().parents[2] / "train/tasks/arithmetic/tiny"
LAYERS, WIDTH, HIDDEN, VOCAB, STEPS = 2, 32, 48, 64, 4
SHARED = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
    num_attention_heads=8, max_position_embeddings=32,
)  # fmt: skip
LLAMA = dict(model_type="llama", num_key_value_heads=4, tie_word_embeddings=False, **SHARED)
BERT = dict(  # with dropout in one place, each of which takes long to compile
    model_type="bert", type_vocab_size=2, pad_token_id=0, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, classifier_dropout=0.1, **SHARED,
)  # fmt: skip


def export(folder: Path, raw: dict) -> Path:
    """The folder of a random model whose outputs are far from uniform."""
    model = models.create(models.config_from_dict(raw), seed=1)
    _, params = models.functional(model)
    wide = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
    return models.export(folder, model, wide, progress=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("llama") / "model", LLAMA)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("bert") / "model", BERT)


def examples(count: int, seed: int, *, labels: bool) -> list[dict]:
    """Rows of several lengths, with the next tokens or one of two classes to learn."""
    rng, rows = np.random.default_rng(seed), []
    for size in rng.integers(3, 14, count):
        tokens = rng.integers(1, VOCAB, size + 1)
        more = {"labels": tokens[1:]} if labels else {"label": int(tokens[0]) % 2}
        rows.append({"tokens": tokens[:-1], **more})
    return rows


def loaded(model: Path, mesh: str, labels: int | None = None, rules=(), **adapter):
    """The model on a mesh, and what trains on it."""
    layout = make_layout(mesh, rules)
    found = base.load(ModelOptions(model=str(model)), labels, layout, quiet=True)
    return found, methods.tune(found, AdapterOptions(**adapter))


def job(model: Path, mesh: str, batches: type[Batches] = Batches, **adapter) -> loop.Job:
    """A task with packed or padded rows, and 11 held-out ones that are measured 4 at once."""
    decoder = "llama" in str(model)
    found, tuning = loaded(model, mesh, None if decoder else 2, **adapter)
    filled = activations_of(found.fn).filled
    held_out = Examples(examples(11, 1, labels=decoder), 0, 0)
    if decoder:
        task = Instructions(data="", eval_batch_size=4, questions=1)
        evaluate = task.measure(tuning, held_out, questions(found))
    else:
        task = Classify(data="", eval_batch_size=4, classes=("a", "b"))
        evaluate = task.measure(tuning, held_out)
    rows = batches(
        examples(40, 0, labels=decoder),
        6,
        lengths=[16],
        pack=16 if decoder else None,
        divisor=2,
        epochs=9,
        filled=filled,
    )
    return loop.Job(
        name=task.name,
        base=found,
        tuning=tuning,
        loss=task.loss(tuning),
        batches=rows,
        evaluate=evaluate,
        criterion=task.criterion,
    )


def questions(found: base.Base, count: int = 0) -> GenerationEval:
    """Prompts of several lengths, as the tokens themselves tell what is answered."""
    return GenerationEval(
        prompts=[row["tokens"] for row in examples(count, 2, labels=True)],
        references=[""] * count,
        decode=lambda tokens: " ".join(map(str, tokens)),
        stop_tokens=[0],
        max_new_tokens=6,
        longest=16,
        batch_size=4,
        filled=activations_of(found.fn).filled,
    )


OPTIMIZER = OptimizerOptions(lr=1e-2, head_lr=1e-3)


@functools.cache
def step_of(model: Path, mesh: str, **adapter):
    """The compiled step of a task, the task, and what the step is given first."""
    task = job(model, mesh, **adapter)
    chain, rates = (f(OPTIMIZER, task.tuning, STEPS) for f in (make_optimizer, learning_rates))
    where, state = activations_of(task.tuning.fn), start(task.tuning, chain, 0)
    step = make_step(task.loss, chain, rates, accumulate=2, activations=where, state=state)
    batch = put_rows(task.batches[0], where)
    return step.lower(state, task.tuning.frozen, batch).compile(), task, state, batch


@functools.cache
def trained(model: Path, mesh: str):
    """Losses and gradient norms of some steps, the metrics then, and the vectors."""
    step, task, state, _ = step_of(model, mesh)
    state, where, learned = jax.tree.map(jnp.copy, state), activations_of(task.base.fn), []
    for number in range(STEPS):
        batch = put_rows(task.batches[number], where)
        state, metrics = step(state, task.tuning.frozen, batch)
        learned.append((metrics["loss"], metrics["grad_norm"]))
    found = jax.device_get((learned, state.trainable))
    return (*found, task.evaluate(state.trainable))


def close(one, other) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), one, other)


@ON_EACH
@pytest.mark.parametrize("which", ["llama", "bert"])
def test_a_run_on_a_mesh_is_one_on_a_device(which, mesh, request):
    """Packed and padded rows, accumulated, filled up, and held-out ones that end unevenly."""
    model = request.getfixturevalue(which)
    close(trained(model, mesh), trained(model, ONE))


def test_a_checkpoint_goes_on_on_another_mesh(llama, tmp_path):
    """Stopped on one mesh and resumed on another: the same as never stopped, on one device."""

    class Stopping(Batches):
        def __getitem__(self, number):
            if number == 2 and not options["resume"]:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(number)

    def fit(mesh):
        return loop.fit(
            job(llama, mesh, Stopping), tmp_path, optimizer=OPTIMIZER, run=RunOptions(**options)
        )

    options = dict(folder=tmp_path, steps=STEPS, accumulate=2, batch_size=6, quiet=True)
    options["resume"] = False
    with pytest.raises(loop.Interrupted, match=r"saved after step [123] of 4"):
        fit(MESHES["2,2,2"])
    options["resume"] = True
    fit(MESHES["1,8,1"])
    rows = read_metrics(tmp_path / METRICS)
    steps, _, metrics = trained(llama, ONE)
    close([(row["loss"], row["grad_norm"]) for row in rows if "loss" in row], steps)
    close({name: rows[-1][f"eval/{name}"] for name in metrics}, metrics)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "tensor=8"])
def test_answers_on_a_mesh_are_those_of_one_device(llama, mesh):
    """Prompts that no batch divides; the cache is divided by rows, and by heads where they can."""
    answers = []
    for where in (ONE, mesh):
        found, tuning = loaded(llama, where)
        moved = jax.tree.map(lambda x: x + 0.1, tuning.trainable)
        answers.append(questions(found, 5).generations(tuning.forward, moved, tuning.frozen))
    assert answers[0] == answers[1] and len(set(answers[0])) > 1
    where = activations_of(tuning.fn)
    tokens = np.ones((where.filled(3), 4), np.int32)

    @jax.jit
    def cached(params):
        return found.fn(params, tokens, cache=models.init_cache(len(tokens), 8))[1]

    keys = cached(found.params).keys
    parts = (1, 4, 1, 2, 1) if "data" in mesh else (1, 1, 1, 1, 1)
    assert keys.sharding.shard_shape(keys.shape) == tuple(map(int.__floordiv__, keys.shape, parts))


# ---------------------------------------------------------------------------------- what lies where


def collectives(program) -> collections.Counter:
    """Every array that the program's collectives return: (kind, shape), counted."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found: collections.Counter = collections.Counter()
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program.as_text()):
        for dims in re.findall(r"\w+\[([\d,]*)\]", result):
            found[kind, tuple(map(int, filter(None, dims.split(","))))] += 1
    return found


@pytest.mark.parametrize("mesh", [MESHES["2,2,2"], MESHES["1,8,1"]], ids=["2,2,2", "1,8,1"])
def test_vectors_add_reductions_of_vectors_alone(llama, mesh):
    """Next to a step that trains the first norm of each layer, which passes the whole model."""
    norms = dict(method="bitfit", full="layers/attn_norm/scale")
    plain, adapted = (collectives(step_of(llama, mesh, **each)[0]) for each in (norms, {}))
    most = LAYERS * max(HIDDEN, WIDTH)
    large = [
        {k: n for k, n in found.items() if math.prod(k[1]) > most} for found in (plain, adapted)
    ]
    assert large[0] == large[1] and large[0]
    assert {kind for kind, _ in adapted - plain} <= {"all-reduce", "reduce-scatter"}


@ON_EACH
def test_each_device_holds_its_part(llama, mesh):
    """Weights by fsdp and tensor, vectors by tensor alone."""
    found, tuning = loaded(llama, mesh)
    sizes = make_layout(mesh).mesh.shape
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    for name, shape in {
        "layers/up/kernel": (LAYERS, WIDTH // fsdp, HIDDEN // tensor),
        "layers/q/kernel": (LAYERS, WIDTH // fsdp, WIDTH // tensor),
        "layers/k/kernel": (LAYERS, WIDTH // fsdp, WIDTH // 2 // (1 if tensor == 8 else tensor)),
        "layers/down/kernel": (LAYERS, HIDDEN // tensor, WIDTH // fsdp),
        "embed/embedding": (VOCAB // tensor, WIDTH // fsdp),
        "head/kernel": (WIDTH // fsdp, VOCAB // tensor),
        "norm/scale": (WIDTH,),
    }.items():
        leaf = paths.arrays(found.params)[name]
        assert {shard.data.shape for shard in leaf.addressable_shards} == {shape}, name
    vectors = tuning.trainable["scales"]["layers/up/kernel"]
    assert vectors.row.sharding.shard_shape(vectors.row.shape) == (LAYERS, HIDDEN // tensor)
    assert vectors.col.sharding.is_fully_replicated


def test_rules_change_what_divides_what(llama):
    rules = ("vocab=tensor,fsdp", "embed=", "layers=data")
    params = loaded(llama, "data=2,fsdp=2,tensor=2", rules=rules)[0].params
    for name, shape in {
        "layers/up/kernel": (LAYERS // 2, WIDTH, HIDDEN // 2),
        "embed/embedding": (VOCAB // 4, WIDTH),
        "head/kernel": (WIDTH, VOCAB // 4),
    }.items():
        leaf = paths.arrays(params)[name]
        assert leaf.sharding.shard_shape(leaf.shape) == shape


def held(tree, device) -> int:
    """Bytes of a tree's arrays on a device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def test_what_trains_is_16_bytes_on_each_device_that_holds_it(llama):
    """Itself, two moments and its gradient; the step is given the state and gives it back."""
    program, task, state, batch = step_of(llama, MESHES["2,2,2"])
    numbers = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 1]
    for device in jax.devices():
        assert held(numbers, device) == 3 * held(state.trainable, device)
    device = jax.devices()[0]
    found = program.memory_analysis()
    given = held((state, task.tuning.frozen, batch), device)
    # A decoder without dropout does not read the key, nor all fields of the batch.
    assert given - 64 - held(batch, device) <= found.argument_size_in_bytes <= given
    assert found.alias_size_in_bytes >= held(numbers, device)

    def gradient(trainable, frozen, batch):
        return jax.grad(lambda t: task.loss(t, frozen, batch, jax.random.key(0))[0])(trainable)

    given = state.trainable, task.tuning.frozen, batch
    grads = jax.jit(gradient).lower(*given).compile().memory_analysis()
    tuple_of_pointers = 8 * len(jax.tree.leaves(state.trainable))
    assert grads.output_size_in_bytes - held(state.trainable, device) in (0, tuple_of_pointers)


def test_shardings_may_be_part_of_the_types(llama):
    """On a mesh of Explicit axes; inside, the model computes as on one of Auto axes."""
    batch = Batches(examples(8, 0, labels=True), 8, lengths=[16])[0]

    def gradient(tuning):
        total, key = losses.next_token(tuning), jax.random.key(0)
        return lambda t, frozen: jax.value_and_grad(lambda t: total(t, frozen, batch, key)[0])(t)

    mesh = make_mesh((2, 2, 2), AxisType.Explicit)
    spread = base.load(ModelOptions(model=str(llama)), layout=Layout(mesh), quiet=True)
    tuning, alone = methods.tune(spread, AdapterOptions()), loaded(llama, ONE)[1]
    row = tuning.trainable["scales"]["layers/up/kernel"].row
    assert jax.typeof(row).sharding.spec == PartitionSpec(None, "tensor")
    out = PartitionSpec(), jax.tree.map(lambda x: x.sharding.spec, tuning.trainable)
    typed = jax.sharding.auto_axes(gradient(tuning), axes=AXES, out_sharding=out)
    with jax.set_mesh(mesh):
        found = jax.jit(typed)(tuning.trainable, tuning.frozen)
    assert found[1]["scales"]["layers/up/kernel"].row.sharding == row.sharding
    close(jax.device_get(found), jax.jit(gradient(alone))(alone.trainable, alone.frozen))


def test_a_batch_is_filled_up_in_each_part():
    rows = [{"tokens": [n]} for n in range(1, 11)]
    batches = Batches(
        rows, 6, lengths=[1], shuffle=False, divisor=2, filled=lambda n: -(-n // 4) * 4
    )
    assert batches.batch_size == 6 and len(batches) == 2
    first, last = (batch["tokens"][:, 0].tolist() for batch in (batches[0], batches[1]))
    assert first == [1, 2, 3, 0, 4, 5, 6, 0] and last == [7, 8, 9, 0, 10, 0, 0, 0]
    assert batches[1]["weight"].tolist() == [1, 1, 1, 0, 1, 0, 0, 0]
    assert batches.example_ids(0).tolist() == [0, 1, 2, -1, 3, 4, 5, -1]


def test_the_fingerprint_is_that_of_one_device(llama):
    one, spread = (base.fingerprint(loaded(llama, m)[0].params) for m in (ONE, MESHES["2,2,2"]))
    assert one == spread


# ------------------------------------------------------------------------------------------ options


def test_the_default_is_all_devices_on_fsdp(monkeypatch):
    assert make_layout(None) is None  # as these tests' environment says
    monkeypatch.delenv("HYPERADAPT_MESH")
    assert dict(make_layout(None).mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("fsdp=16", "--mesh fsdp=16: it takes 16 devices, and there are 8"),
        ("fsdp=-1,tensor=3", "it takes a multiple of 3 devices, and there are 8"),
        ("fsdp=-1,data=-1", "one axis alone can be the rest"),
        ("fsdp=2,fsdp=2", "fsdp comes twice"),
        ("fsdp=0", "give fsdp a number from 1 on"),
        ("fsdp", "give fsdp a number from 1 on"),
        ("model=2", "'model' is no axis: give some of data, fsdp, tensor"),
        ("context=2", "no axis divides a row's tokens"),
        ("", "'' is no axis"),
    ],
)
def test_a_mesh_that_cannot_be_meant_is_one_line(mesh, message):
    with pytest.raises(InputError, match=re.escape(message)):
        DeviceOptions(mesh=mesh).layout()


@pytest.mark.parametrize(
    "rule, message",
    [
        ("vocab", "give WORD=AXES"),
        ("width=tensor", "'width' is no axis of an array"),
        ("vocab=model", "'model' is no axis of a mesh"),
        ("vocab=tensor,tensor", "comes twice"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_one_line(rule, message):
    with pytest.raises(InputError, match=re.escape(message)):
        DeviceOptions(rules=(rule,))


def test_a_run_from_the_command_line_and_its_evaluation_elsewhere(tmp_path, capsys):
    """Trained, resumed, measured and merged on meshes; what is not divided is told."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in (10, 20, 30) for b in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sft", "--model", str(TINY), "--data", str(tmp_path / "rows.jsonl"), "--steps", "2",
             "--prompt", "{question}", "--folder", str(tmp_path / "run"), "--eval-rows", "5",
             "--questions", "0", "--max-length", "16", "--batch-size", "6",
             "--lr", "1e-3"]  # fmt: skip
    assert main([*words, "--mesh", "fsdp=4,tensor=2"]) == 0
    shown = capsys.readouterr().out
    assert "mesh: fsdp=4,tensor=2, 8 of 8 devices" in shown
    assert "tensor=2 does not divide vocab (201)" in shown
    assert "each 6 rows are filled up to 8" in shown
    assert "| mesh | fsdp=4,tensor=2" in (tmp_path / "run/report.md").read_text()
    assert main([*words, "--resume", "--mesh", "data=2"]) == 0
    measured = tmp_path / "metrics.json"
    evaluate = ["evaluate", "--folder", str(tmp_path / "run"), "--metrics", str(measured)]
    assert main([*evaluate, "--mesh", "data=2"]) == 0
    best = json.loads((tmp_path / "run/result.json").read_text())["best"]
    assert json.loads(measured.read_text()) == pytest.approx(best, abs=1e-5)
    export = ["export", "--adapter", str(tmp_path / "run"), "--dtype", "bfloat16", "--folder"]
    for mesh in (ONE, "fsdp=4,tensor=2"):
        assert main([*export, str(tmp_path / mesh), "--mesh", mesh]) == 0
    one, spread = (tmp_path / mesh / "model.safetensors" for mesh in (ONE, "fsdp=4,tensor=2"))
    assert one.read_bytes() == spread.read_bytes()
    capsys.readouterr()
    assert main([*evaluate, "--mesh", "tensor=5"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error == (
        "error: --mesh: tensor=5 divides nothing of this model: vocab 201, heads 4, kv_heads 4, mlp"
        " 384"
    )
