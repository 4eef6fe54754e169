"""Adapters on disk: what goes in comes out, bit for bit, or an error says why not."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import hyperadapt_jax as ha
from hyperadapt_jax import adapter as adapter_module
from hyperadapt_jax import saving
from hyperadapt_jax.adapter import CONFIG, TENSORS, AdapterError
from hyperadapt_jax.saving import load, save

ROOT = Path(__file__).resolve().parents[2]
BASE_CONFIG = {"hidden_size": 3, "rope_scaling": None, "torch_dtype": "bfloat16"}


def base(dtype=jnp.float32):
    return {
        "layers": {"q": jnp.ones((2, 3, 5), dtype), "norm": jnp.ones((2, 3), dtype)},
        "out": jnp.ones((4, 2, 3), dtype),
        "head": jnp.ones((3, 7), dtype),
        "step": jnp.zeros((), jnp.int32),
    }


def noisy(scales, seed=0):
    """Scales as after a training: some large, some negative, none at zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda d: jnp.asarray(rng.normal(size=d.shape), jnp.float32), scales)


def trained(params):
    """Stacked, multi-axis and one-sided vectors."""
    targets = [("layers/q", "stack in out"), ("out", "out - in")]
    plan = ha.plan(params, *targets)
    left = ha.plan(params, ("head", "- out"))
    return noisy({**ha.init(plan), **ha.init(left)})


def same(first, second):
    assert first.keys() == second.keys()
    for path in first:
        assert first[path].axes == second[path].axes
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter in it, its base and its scales."""
    params = base()
    scales = trained(params)
    save(tmp_path / "adapter", scales, params, base_model="ones", base_config=BASE_CONFIG)
    return tmp_path / "adapter", params, scales


def edit_config(folder, change, checksum=True):
    """Changes the configuration as another program might, with a checksum that is right."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    if checksum:
        config.pop("checksum", None)
        config["checksum"] = saving._digest(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder, change):
    """Changes the tensors, with every checksum right."""
    tensors = change(safetensors.numpy.load_file(folder / TENSORS))
    put_tensors(folder, safetensors.numpy.save(tensors))


def put_tensors(folder, data):
    (folder / TENSORS).write_bytes(data)
    edit_config(folder, lambda c: c.update(tensors_sha256=hashlib.sha256(data).hexdigest()))


# Round trips


def test_round_trip_restores_every_bit(saved):
    folder, params, scales = saved
    adapter = load(folder, params, base_config=BASE_CONFIG)
    same(adapter.scales, scales)
    assert adapter.scales["head"].col is None and adapter.scales["out"].row.shape == (4,)
    assert adapter.base_model == "ones" and adapter.full == {} and adapter.metadata == {}
    assert sorted(entry.name for entry in folder.iterdir()) == [CONFIG, TENSORS]
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["adapter"]


def test_load_needs_no_numbers_of_the_base_and_no_base_for_the_algebra(saved):
    folder, params, scales = saved
    same(load(folder, jax.eval_shape(lambda: params)).scales, scales)
    same(load(folder, None).scales, scales)


def test_a_base_in_another_dtype_is_the_same_base(saved):
    folder, _, scales = saved
    config = {"hidden_size": 3, "dtype": "float32", "transformers_version": "5"}
    same(load(folder, base(jnp.bfloat16), base_config=config).scales, scales)


def test_a_base_whose_text_ends_elsewhere_is_the_same_base(tmp_path, saved, monkeypatch):
    _, params, scales = saved
    given, other = ({"hidden_size": 3, "eos_token_id": ends} for ends in (2, [2, 9]))
    save(tmp_path / "new", scales, params, base_config=given)
    monkeypatch.setattr(adapter_module, "_LOADING", {"dtype"})  # as it was written at first
    save(tmp_path / "old", scales, params, base_config=given)
    monkeypatch.undo()
    assert "eos_token_id" in json.loads((tmp_path / "old" / CONFIG).read_text())["base_config"]
    for folder in ("new", "old"):
        same(load(tmp_path / folder, params, base_config=other).scales, scales)


def test_counters_and_random_keys_are_no_part_of_the_base(saved):
    folder, params, scales = saved
    params = {**params, "rng": jax.random.key(0), "step": jnp.zeros(3, jnp.uint32)}
    same(load(folder, params).scales, scales)


def test_the_config_says_what_is_adapted(saved):
    folder, _, scales = saved
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "HYPERADAPT" and config["format_version"] == 1
    assert config["base_model_name_or_path"] == "ones"
    assert config["base_config"] == {"hidden_size": 3}
    assert config["targets"]["layers/q"] == {"axes": "stack in out", "shape": [2, 3, 5]}
    assert config["base_weights"]["layers/norm"] == [2, 3]
    assert '"shape": [2, 3, 5]' in (folder / CONFIG).read_text()
    names = set(safetensors.numpy.load_file(folder / TENSORS))
    assert names == {"layers/q.row", "layers/q.col", "out.row", "out.col", "head.row"}


def test_the_fingerprint_is_that_of_the_base_alone(tmp_path):
    params, wide = base(), base() | {"other": jnp.ones(1)}

    def fingerprint(name, params, scales, **options):
        save(tmp_path / name, scales, params, **options)
        return json.loads((tmp_path / name / CONFIG).read_text())["base_fingerprint"]

    scales = trained(params)
    first = fingerprint("a", params, scales)
    assert first == fingerprint("b", base(jnp.bfloat16), noisy(scales, seed=1))
    assert first != fingerprint("c", wide, scales)
    assert first != fingerprint("d", params, scales, base_config={"depth": 2})


def linen_params():
    return nn.Dense(5).init(jax.random.key(0), jnp.ones((1, 3)))


def nnx_params():
    return nnx.state(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))


def equinox_params():
    return eqx.nn.MLP(3, 5, 4, 1, key=jax.random.key(0))


@pytest.mark.parametrize(
    "make, target",
    [
        (linen_params, ("params/kernel", "in out")),
        (nnx_params, ("kernel", "in out")),
        (equinox_params, ("layers/.*/weight", "out in")),
    ],
)
def test_round_trip_over_each_kind_of_tree(tmp_path, make, target):
    params = make()
    scales = noisy(ha.init(ha.plan(params, target)))
    save(tmp_path / "adapter", scales, params)
    same(load(tmp_path / "adapter", make()).scales, scales)


def test_a_fully_trained_head_travels_along(tmp_path):
    params = base(jnp.bfloat16)
    scales = noisy(ha.init(ha.plan(params, ("layers/q", "stack in out"))))
    trainable, frozen = ha.trainable.split(params, scales, full="head")
    trainable["full"]["head"] += 1e-3
    for name, tree in [("frozen", frozen), ("whole", params)]:
        save(tmp_path / name, scales, tree, full=trainable["full"])
        adapter = load(tmp_path / name, params)
        assert list(adapter.full) == ["head"] and adapter.full["head"].dtype == jnp.float32
        np.testing.assert_array_equal(adapter.full["head"], trainable["full"]["head"])
        same(adapter.scales, scales)


def test_a_scalar_and_an_empty_adapter_travel_too(tmp_path):
    params = {"temperature": jnp.float32(2), "w": jnp.ones((1, 1))}
    save(tmp_path / "a", {}, params, full={"temperature": jnp.float32(3)})
    adapter = load(tmp_path / "a", params)
    assert adapter.scales == {} and adapter.full["temperature"] == 3
    assert adapter.full["temperature"].shape == ()


def test_metadata_comes_back(tmp_path, saved):
    _, params, scales = saved
    metadata = {"steps": 3, "lr": 1e-3, "task": "é \n [\n 1\n ]"}
    save(tmp_path / "b", scales, params, metadata=metadata)
    assert load(tmp_path / "b", params).metadata == metadata


def test_a_dataclass_will_do_as_base_config(tmp_path, saved):
    _, params, scales = saved

    @dataclasses.dataclass(frozen=True)
    class Config:
        hidden_size: int = 3
        dtype: object = jnp.bfloat16
        rope_scaling: dict | None = None

    save(tmp_path / "b", scales, params, base_config=Config())
    load(tmp_path / "b", params, base_config={"hidden_size": 3})
    with pytest.raises(AdapterError, match="hidden_size: 3 in the adapter's, 4 in yours"):
        load(tmp_path / "b", params, base_config=Config(hidden_size=4))


@pytest.mark.parametrize("explicit", [False, True])
def test_sharded_vectors_are_gathered_and_placed_by_the_weights(tmp_path, explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    place = NamedSharding(mesh, PartitionSpec(None, "data", "model"))
    params = {"w": jax.device_put(jnp.ones((3, 4, 8)), place)}
    zeros = ha.init(ha.plan(params, ("w", "stack in out")))
    scales = jax.tree.map(lambda d, to: jax.device_put(d, to.sharding), noisy(zeros), zeros)
    assert scales["w"].row.sharding.spec == PartitionSpec(None, "model")
    save(tmp_path / "adapter", scales, params, full={"b": params["w"]})
    back = load(tmp_path / "adapter", {**params, "b": params["w"]})
    same(back.scales, scales)
    assert back.scales["w"].row.sharding == scales["w"].row.sharding
    assert back.scales["w"].col.sharding == scales["w"].col.sharding
    assert back.full["b"].sharding == place
    alone = load(tmp_path / "adapter", None).scales
    same(alone, scales)


# Saving: what is refused


def test_save_refuses_a_folder_that_is_not_empty(saved):
    folder, params, scales = saved
    with pytest.raises(AdapterError, match="not empty; choose another folder"):
        save(folder, noisy(scales, 1), params)
    same(load(folder, params).scales, scales)


def test_save_takes_an_empty_folder_and_makes_missing_parents(tmp_path, saved):
    _, params, scales = saved
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/c"):
        save(tmp_path / name, scales, params)
        same(load(str(tmp_path / name), params).scales, scales)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        save(tmp_path / "file", scales, params)


def one(row=(0.0,) * 5, col=(0.0,) * 3, axes="in out"):
    array = [None if side is None else jnp.array(side, jnp.float32) for side in (row, col)]
    return {"w": ha.ScaleVectors(*array, axes)}


BAD_SCALES = {
    "nan": (one(row=(0, 0, float("nan"), 0, 0)), r"w\.row\[2\]: is nan"),
    "infinite": (one(col=(0, 0, -float("inf"))), r"w\.col\[2\]: is -inf"),
    "wrong shape": (one(row=(0,) * 4), r"w\.row: has shape \(4,\), not \(5,\)"),
    "stacked adapters": (jax.tree.map(lambda d: jnp.stack([d, d]), one()), r"shape \(2, 5\)"),
    "wrong dtype": (jax.tree.map(lambda d: d.astype(jnp.bfloat16), one()), "bfloat16, not float32"),
    "missing side": (one(row=None), r"w\.row: is missing"),
    "extra side": (one(axes="- out"), r"w\.col: is unexpected"),
    "axes": (one(axes="in out out"), r"w: has shape \[3, 5\], but the axis roles 'in out out'"),
    "unknown role": (one(axes="in up"), "w: unknown axis role 'up'"),
    "path": ({"v": one()["w"]}, "v: is missing from the base; nearest: w"),
}


@pytest.mark.parametrize("scales, message", BAD_SCALES.values(), ids=BAD_SCALES)
def test_save_refuses_scales_that_do_not_fit(tmp_path, scales, message):
    with pytest.raises(AdapterError, match=message):
        save(tmp_path / "adapter", scales, {"w": jnp.ones((3, 5))})
    assert list(tmp_path.iterdir()) == []


BAD_OPTIONS = {
    "scaled and full": ({"full": {"w": jnp.ones((3, 5))}}, "w: is scaled and fully trained"),
    "full shape": (
        {"full": {"b": jnp.ones(4)}},
        r"b: has shape \[4\] in full, but \[5\]",
    ),
    "full dtype": ({"full": {"b": jnp.ones(5, jnp.bfloat16)}}, "b.full: has dtype bfloat16"),
    "metadata": ({"metadata": {"best": jnp.ones(1)}}, r"metadata\['best'\] cannot be written"),
    "not a number": ({"metadata": {"loss": float("nan")}}, r"metadata\['loss'\]"),
    "config field": ({"base_config": {"act": jnp.tanh}}, r"base_config\['act'\]"),
    "config type": ({"base_config": "llama"}, "base_config: is a str; give a mapping"),
}


@pytest.mark.parametrize("options, message", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_save_refuses_what_it_cannot_keep(tmp_path, options, message):
    with pytest.raises(AdapterError, match=message):
        save(tmp_path / "adapter", one(), {"w": jnp.ones((3, 5)), "b": jnp.ones(5)}, **options)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_traced_vector(tmp_path):
    @jax.jit
    def step(scales):
        save(tmp_path / "adapter", scales, {"w": jnp.ones((3, 5))})
        return scales

    with pytest.raises(AdapterError, match="w: row: is traced; save outside of jit"):
        step(one())


def test_save_says_how_to_gather_what_several_processes_hold(tmp_path):
    script = """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.experimental.multihost_utils import process_allgather
        from jax.sharding import NamedSharding, PartitionSpec
        import hyperadapt_jax as ha
        from hyperadapt_jax.adapter import AdapterError
        from hyperadapt_jax.saving import load, save

        folder, address, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
        jax.distributed.initialize(address, num_processes=2, process_id=rank)
        mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        place = NamedSharding(mesh, PartitionSpec(None, "model"))
        params = {"w": jax.device_put(np.ones((3, 4), np.float32), place)}
        scales = ha.init(ha.plan(params, ("w", "in out")))
        scales = jax.jit(lambda s: jax.tree.map(lambda d: d + jnp.arange(d.size), s))(scales)
        try:
            save(folder, scales, params)
        except AdapterError as error:
            print(error)
        whole = process_allgather(scales, tiled=True)
        if rank == 0:
            save(folder, whole, params)
        process_allgather(np.zeros(1))
        back = load(folder, params).scales["w"]
        assert back.row.sharding.spec == PartitionSpec("model"), back.row.sharding
        assert back.row.addressable_shards[0].data.tolist() == [2.0 * rank, 2.0 * rank + 1]
        assert back.col.tolist() == [0, 1, 2]
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(script),
                tmp_path / "adapter",
                address,
                str(rank),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )
        for rank in range(2)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "w: row: is spread over several processes" in out and "process_allgather" in out


def test_a_crash_at_any_point_leaves_a_whole_adapter_or_none(tmp_path):
    """A child dies at each call to the system in turn; the parent then reads what is left."""
    script = """
        import os, sys
        from pathlib import Path
        import numpy as np
        import hyperadapt_jax as ha
        from hyperadapt_jax.saving import load, save

        params = {"w": np.ones((3, 5), np.float32)}

        def put(folder, value):
            row = np.full(5, value, np.float32)
            save(folder, {"w": ha.ScaleVectors(row, None, "- out")}, params)

        def get(folder):
            (value,) = {*load(folder, params).scales["w"].row.tolist()}
            return value

        def die_after(count, *names):
            def counted(real):
                def call(*args, **kwargs):
                    nonlocal count
                    count -= 1
                    return os._exit(9) if count < 0 else real(*args, **kwargs)
                return call
            for name in names:
                setattr(os, name, counted(getattr(os, name)))

        for count in range(8):
            folder = Path(sys.argv[1]) / f"{count}" / "adapter"
            folder.parent.mkdir()
            if os.fork() == 0:
                die_after(count, "fsync", "rename", "mkdir", "rmdir")
                put(folder, 2)
                os._exit(0)
            died = os.waitstatus_to_exitcode(os.wait()[1]) == 9
            print(died, get(folder) if folder.exists() else None)
            if not folder.exists():
                put(folder, 3)
                assert get(folder) == 3
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    seen = done.stdout.splitlines()
    assert len(seen) == 8
    assert set(seen) == {"True None", "True 2.0", "False 2.0"}


def test_an_error_while_writing_leaves_nothing(tmp_path, saved, monkeypatch):
    _, params, scales = saved

    def rename(source, target):
        raise OSError("disk gone")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="disk gone"):
        save(tmp_path / "new", scales, params)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


# Loading: another base


def test_load_names_the_weights_in_which_the_base_differs(saved):
    folder, params, _ = saved
    wider = {**params, "head": jnp.ones((3, 8))}
    with pytest.raises(AdapterError, match=r"head: \[3, 7\] in the adapter's, \[3, 8\] in yours"):
        load(folder, wider)
    fewer = {key: params[key] for key in params if key != "out"}
    with pytest.raises(AdapterError, match=r"out: \[4, 2, 3\] in the adapter's, absent in yours"):
        load(folder, fewer)
    more = {**params, "more": [jnp.ones(1)] * 9}
    with pytest.raises(AdapterError, match=r"more/0: absent in .*, \[1\] in yours;.*and 4 more"):
        load(folder, more)


def test_load_names_the_fields_in_which_the_configuration_differs(saved):
    folder, params, _ = saved
    given = {"hidden_size": 3, "rope_scaling": {"factor": 8.0}}
    with pytest.raises(AdapterError, match=r"base_config: .*rope_scaling: absent .*'factor': 8.0"):
        load(folder, params, base_config=given)


def test_load_cannot_compare_a_configuration_that_was_not_saved(tmp_path, saved):
    _, params, scales = saved
    save(tmp_path / "b", scales, params)
    with pytest.raises(AdapterError, match="base_config: was not saved"):
        load(tmp_path / "b", params, base_config=BASE_CONFIG)


# Loading: files that are not what was saved


def test_load_needs_both_files(saved):
    folder, params, _ = saved
    with pytest.raises(AdapterError, match="nowhere: there is no such folder"):
        load(folder / "nowhere", params)
    for name in (TENSORS, CONFIG):
        (folder / name).unlink()
        with pytest.raises(AdapterError, match=f"holds no file {name}"):
            load(folder, params)
        (folder / name).mkdir()
        with pytest.raises(AdapterError, match=f"holds no file {name}"):
            load(folder, params)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_load_follows_no_link_out_of_the_folder(saved, name):
    folder, params, _ = saved
    outside = (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to(outside)
    with pytest.raises(AdapterError, match="is a link to .*outside, outside the folder"):
        load(folder, params)
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(AdapterError, match=name):
        load(folder, params)


def test_load_refuses_a_truncated_or_altered_file_of_numbers(saved):
    folder, params, _ = saved
    data = (folder / TENSORS).read_bytes()
    for changed in (data[:-4], data[:20], b"", data[:-1] + b"\x01", data + b"\0"):
        (folder / TENSORS).write_bytes(changed)
        with pytest.raises(AdapterError, match="truncated or altered"):
            load(folder, params)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"a": 1}', "[" * 100_000, "\xff"])
def test_load_refuses_a_configuration_that_is_none(saved, text):
    folder, params, _ = saved
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=f"{CONFIG}:? (is no JSON|says peft_type None)"):
        load(folder, params)


def test_load_refuses_an_altered_configuration(saved):
    folder, params, _ = saved
    for axes in ("stack out in", "stack in -"):
        edit_config(folder, lambda c, a=axes: c["targets"]["layers/q"].update(axes=a), False)
        with pytest.raises(AdapterError, match="altered after it was saved"):
            load(folder, params)


def test_load_refuses_a_newer_format(saved):
    folder, params, _ = saved
    edit_config(folder, lambda c: c.update(format_version=3, library_version="9.1", targets=[]))
    with pytest.raises(AdapterError, match="format_version 3.*reads 2; upgrade it to 9.1"):
        load(folder, params)
    for version in (0, -1, None, "1", 1.5):
        edit_config(folder, lambda c, v=version: c.update(format_version=v))
        with pytest.raises(AdapterError, match="altered"):
            load(folder, params)


def test_an_adapter_of_peft_needs_the_names_of_the_checkpoint(saved):
    folder, params, _ = saved
    edit_config(folder, lambda c: c.update(peft_type="LORA"))
    with pytest.raises(AdapterError, match="'LORA', not 'HYPERADAPT'.*tensors=models.tensors"):
        load(folder, params)


def test_low_rank_terms_are_saved_as_a_format_of_their_own(tmp_path):
    """Read back bit for bit; an adapter without one is written as it was before there were any."""
    params = {"w": jnp.ones((2, 3, 5)), "v": jnp.ones((3, 1))}
    plan = ha.plan(params, ("w", "stack in out"), ("v", "in out"))
    for sides in ((), ("row",), ("row", "col")):
        scales = ha.init(plan.with_low_rank(2, sides), jax.random.key(0))
        assert ha.count(scales) == plan.with_low_rank(2, sides).count
        save(tmp_path / f"low-{len(sides)}", scales, params)
        found = load(tmp_path / f"low-{len(sides)}", params).scales
        assert jax.tree.structure(found) == jax.tree.structure(scales)
        jax.tree.map(np.testing.assert_array_equal, found, scales)
    config = json.loads((tmp_path / "low-1" / CONFIG).read_text())
    assert config["format_version"] == 2
    assert config["targets"]["v"]["arrays"] == ["row", "down", "up"]
    save(tmp_path / "vectors", ha.init(plan), params)
    config = json.loads((tmp_path / "vectors" / CONFIG).read_text())
    assert config["format_version"] == 1 and "arrays" not in config["targets"]["v"]
    edit_config(tmp_path / "low-0", lambda c: c["targets"]["v"].update(arrays=["down", "side"]))
    with pytest.raises(AdapterError, match="v: has arrays of an unknown kind: 'side'"):
        load(tmp_path / "low-0", params)
    edit_config(tmp_path / "low-2", lambda c: c["targets"]["v"].update(rank=3))
    with pytest.raises(AdapterError, match=r"v.down: has shape \(3, 2\), not \(3, 3\)"):
        load(tmp_path / "low-2", params)


BAD_TENSORS = {
    "missing": (lambda t: {k: t[k] for k in t if k != "out.col"}, r"out\.col: is missing.*\(3,\)"),
    "extra": (lambda t: {**t, "head.col": np.zeros(3, np.float32)}, r"head\.col: is unexpected"),
    "shape": (lambda t: {**t, "out.col": np.zeros(4, np.float32)}, r"shape \(4,\), not \(3,\)"),
    "dtype": (lambda t: {**t, "out.col": np.zeros(3, np.float16)}, "dtype float16, not float32"),
    "nan": (lambda t: {**t, "out.col": np.full(3, np.nan, np.float32)}, r"out\.col\[0\]: is nan"),
    "inf": (lambda t: {**t, "out.col": np.full(3, np.inf, np.float32)}, r"out\.col\[0\]: is inf"),
}


@pytest.mark.parametrize("change, message", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_load_refuses_vectors_that_do_not_fit(saved, change, message):
    folder, params, _ = saved
    edit_tensors(folder, change)
    with pytest.raises(AdapterError, match=message):
        load(folder, params)
    with pytest.raises(AdapterError, match=message):
        load(folder, None)


def test_load_refuses_well_signed_nonsense(saved):
    """What a program that computes the checksums right could still get wrong."""
    folder, params, _ = saved
    text, data = (folder / CONFIG).read_text(), (folder / TENSORS).read_bytes()
    for changed in (b"", data[:30], data.replace(b"F32", b"BF16"), data.replace(b"F32", b"XYZ")):
        put_tensors(folder, changed)
        with pytest.raises(AdapterError, match="malformed"):
            load(folder, params)
    (folder / TENSORS).write_bytes(data)
    for value in (None, [], {}, "x", 3, {"layers/q": 5}, {"layers/q": {"axes": 3, "shape": [1]}}):
        for field in ("targets", "base_weights", "full"):
            (folder / CONFIG).write_text(text)
            edit_config(folder, lambda c, f=field, v=value: c.update({f: v}))
            if (field, value) not in [("full", {})]:
                with pytest.raises(AdapterError):
                    load(folder, params)
    for axes, message in [("in", "axis roles 'in'"), ("in up", "role 'up'"), ("- -", "no 'in'")]:
        (folder / CONFIG).write_text(text)
        edit_config(folder, lambda c, a=axes: c["targets"]["out"].update(axes=a))
        with pytest.raises(AdapterError, match=f"out.*{message}"):
            load(folder, params)


# Whatever happens to the files, the numbers are the right ones or there is an AdapterError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "adapter"
    params = base()
    scales = trained({key: params[key] for key in params})
    del scales["head"]
    head = {"head": params["head"]}
    save(folder, scales, params, full=head, base_config=BASE_CONFIG, metadata={"steps": 3})
    return folder, params, scales


def right_or_refused(folder, params, scales):
    try:
        adapter = load(folder, params)
    except AdapterError as error:
        assert str(error)
        return False
    same(adapter.scales, scales)
    np.testing.assert_array_equal(adapter.full["head"], params["head"])
    return True


@given(st.sampled_from([CONFIG, TENSORS]), st.data())
def test_fuzz_bytes(tmp_path_factory, pristine, name, data):
    source, params, scales = pristine
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    shutil.copytree(source, folder)
    raw = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    (folder / name).write_bytes(raw[:cut])
    untouched = raw[:cut] == (source / name).read_bytes()
    assert right_or_refused(folder, params, scales) >= untouched


def places(value, at=()):
    """The place of every value inside a JSON tree."""
    inner = {dict: dict.items, list: enumerate}.get(type(value), lambda _: ())(value)
    for key, child in inner:
        yield (*at, key)
        yield from places(child, (*at, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@given(drop=st.booleans(), checksum=st.booleans(), value=JSON, data=st.data())
def test_fuzz_configuration(tmp_path_factory, pristine, drop, checksum, value, data):
    """Fields dropped or replaced at any depth, by an accident or by a program that signs them."""
    source, params, scales = pristine
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    shutil.copytree(source, folder)

    def change(config):
        *above, key = data.draw(st.sampled_from(list(places(config))))
        parent = functools.reduce(lambda inner, step: inner[step], above, config)
        parent[key] = value
        if drop:
            del parent[key]

    edit_config(folder, change, checksum)
    right_or_refused(folder, params, scales)


# --------------------------------------------------------------------------------- Adapter objects


def test_an_adapter_is_saved_loaded_and_applied_as_one(tmp_path):
    """With what trained fully, in the model's dtype; equal to the merged weights by hand."""
    params = {"body": jnp.full((2, 3), 2.0, jnp.bfloat16), "head": jnp.ones(3, jnp.bfloat16)}
    scales = noisy(ha.init(ha.plan(params, ha.Target("body", "in out"))))
    adapter = ha.Adapter(scales, {"head": jnp.arange(3.0)}, "base", {"width": 3}, {"steps": 1})
    ha.save(tmp_path / "a", adapter, params)
    again = ha.load(tmp_path / "a")
    kept = again.base_model, again.base_config, again.metadata
    assert kept == ("base", {"width": 3}, {"steps": 1})
    assert again.base_weights == {"body": [2, 3]}
    for found in (adapter, again):
        applied, vectors = found.apply(params)
        assert applied["body"] is params["body"]
        assert applied["head"].dtype == jnp.bfloat16
        assert applied["head"].tolist() == [0.0, 1.0, 2.0]
        same(vectors, scales)


def test_an_adapter_refuses_another_base(tmp_path):
    """What was never saved compares what it knows: its weights, and what trained fully."""
    params = {"body": jnp.ones((2, 3)), "head": jnp.ones(3)}
    scales = ha.init(ha.plan(params, ha.Target("body", "in out")))
    adapter = ha.Adapter(scales, {"head": jnp.arange(3.0)}, base_config={"width": 3})
    ha.save(tmp_path / "a", adapter, params)
    for found in (adapter, ha.load(tmp_path / "a")):
        found.check(params, {"width": 3, "dtype": "bfloat16"})
        with pytest.raises(AdapterError, match="width: 3 in the adapter's, 4 in yours"):
            found.check(base_config={"width": 4})
        with pytest.raises(AdapterError, match=r"head: \[3\] in the adapter's, absent"):
            found.apply({"body": params["body"]})
        with pytest.raises(AdapterError, match=r"head: \[3\] in the adapter's, \[4\] in yours"):
            found.apply(params | {"head": jnp.ones(4)})
        with pytest.raises(AdapterError, match="the base.* does not match.*body"):
            found.apply(params | {"body": jnp.ones((3, 3))})
    with pytest.raises(AdapterError, match="base_config: was not saved"):
        ha.Adapter(scales).check(base_config={"width": 3})
    with pytest.raises(AdapterError, match="holds full, base_model"):
        ha.save(tmp_path / "b", adapter, params, metadata={"steps": 2})
    assert not (tmp_path / "b").exists()
