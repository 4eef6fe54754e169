"""Reading and writing Hugging Face folders, against the safetensors library and numpy."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import huggingface_hub
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hyperadapt_jax import models
from hyperadapt_jax.models.checkpoint import hub, reading, writing
from hyperadapt_jax.models.checkpoint.table import CheckpointError, Tensor
from hyperadapt_jax.models.registry import family_of
from hyperadapt_jax.paths import flatten

P = PartitionSpec
SHAPES = {
    "embed": (9, 8),
    "layers/up/kernel": (3, 8, 16),
    "layers/up/bias": (3, 16),
    "norm": (8,),
    "scale": (),
}
TABLE = (
    Tensor("model.embed.weight", "embed", aliases=("embed.weight",)),
    Tensor("model.layers.{layer}.up.weight", "layers/up/kernel", True, aliases=("{layer}.up",)),
    Tensor("model.layers.{layer}.up.bias", "layers/up/bias"),
    Tensor("model.norm.weight", "norm"),
    Tensor("model.scale", "scale"),
)
HEAD = (*TABLE, Tensor("head.weight", "head", transpose=True, optional=True))


def tree_of(dtype="float32", **more):
    """The shapes of the parameters as a nested dict."""
    tree: dict = {}
    for path, shape in {**SHAPES, **more}.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jax.ShapeDtypeStruct(shape, dtype)
    return tree


def stored(dtype="float32", seed=0):
    """The checkpoint's tensors, in its own names and layouts."""
    rng = np.random.default_rng(seed)
    result = {
        "model.embed.weight": rng.normal(size=(9, 8)),
        "model.norm.weight": rng.normal(size=8),
    }
    for layer in range(3):
        result[f"model.layers.{layer}.up.weight"] = rng.normal(size=(16, 8))
        result[f"model.layers.{layer}.up.bias"] = rng.normal(size=16)
    result["model.scale"] = np.array(rng.normal())
    return {name: np.asarray(value, jnp.dtype(dtype)) for name, value in result.items()}


def expected(tensors):
    """The parameters that a checkpoint's tensors make, by path."""
    layers = [
        (tensors[f"model.layers.{i}.up.weight"].T, tensors[f"model.layers.{i}.up.bias"])
        for i in range(3)
    ]
    return {
        "embed": tensors["model.embed.weight"],
        "layers/up/kernel": np.stack([np.asarray(kernel, "float64") for kernel, _ in layers]),
        "layers/up/bias": np.stack([np.asarray(bias, "float64") for _, bias in layers]),
        "norm": tensors["model.norm.weight"],
        "scale": tensors["model.scale"],
    }


def write(folder, tensors, shards=1, config=None):
    """Writes a checkpoint with the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
        save_file(part, folder / f"part-{i}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def leaves(tree):
    paths, values, _ = flatten(tree)
    return dict(zip(paths, values, strict=True))


def assert_equal(tree, reference, dtype="float32"):
    found = leaves(tree)
    assert found.keys() == reference.keys()
    for path, value in found.items():
        assert value.dtype == jnp.dtype(dtype), path
        want = np.asarray(reference[path], "float64").astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(value), want, err_msg=path, strict=True)


@pytest.fixture(params=["host", "device"])
def route(request, monkeypatch):
    """Assembly in many blocks: on the host, as for a CPU, and on the device, as elsewhere."""
    monkeypatch.setattr(reading, "_BLOCK", 100)
    if request.param == "device":
        monkeypatch.setattr(reading, "_SMALL", -1)
        monkeypatch.setattr(reading, "on_host", lambda devices: False)
    return request.param


@pytest.fixture
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


# ------------------------------------------------------------------------------------------- load


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_hold_what_the_files_hold(tmp_path, route, shards, dtype):
    tensors = stored(dtype)
    tree, report = reading.load(write(tmp_path, tensors, shards), TABLE, tree_of(dtype))
    assert_equal(tree, expected(tensors), dtype)
    assert sorted(report.loaded) == sorted(SHAPES)
    assert report.initialized == report.ignored == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_tensor_is_read_in_its_own_dtype(tmp_path, route, dtype):
    tensors = stored()
    own = dict(zip(tensors, ["float64", "bfloat16", "float16", "float32"] * 3, strict=False))
    tensors = {name: value.astype(jnp.dtype(own[name])) for name, value in tensors.items()}
    tree, _ = reading.load(write(tmp_path, tensors, 2), TABLE, tree_of(dtype))
    reference = {path: np.asarray(x, "float32") for path, x in expected(tensors).items()}
    assert_equal(tree, reference, dtype)


def test_parameters_may_differ_in_dtype(tmp_path, route):
    abstract = {**tree_of("bfloat16"), "norm": jax.ShapeDtypeStruct((8,), "float32")}
    tensors = stored()
    tree, _ = reading.load(write(tmp_path, tensors), TABLE, abstract)
    assert tree["norm"].dtype == jnp.float32 and tree["embed"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(tree["norm"], tensors["model.norm.weight"])


def test_a_tensor_may_go_by_another_name(tmp_path):
    tensors = stored()
    renamed = {k.removeprefix("model.") if "embed" in k else k: v for k, v in tensors.items()}
    tree, _ = reading.load(write(tmp_path, renamed), TABLE, tree_of())
    assert_equal(tree, expected(tensors))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tensor_may_stand_under_two_names_if_they_agree(tmp_path, route, dtype):
    tensors = stored()
    copy = tensors["model.layers.1.up.weight"].astype(dtype)
    copy[3, 4] = np.nan if dtype == "float32" else copy[3, 4]
    both = {**tensors, "1.up": copy, "model.layers.1.up.weight": copy.astype("float32")}
    tree, report = reading.load(write(tmp_path, both, 2), TABLE, tree_of())
    assert_equal(tree, expected(both))
    assert report.ignored == ("1.up",)
    both["1.up"] = copy + (np.arange(8) == 7) * np.float32(1e-3)  # in the last column alone
    message = r"up/kernel is there under several names.*model\.layers\.1\.up\.weight in .*1\.up in"
    with pytest.raises(CheckpointError, match=message):
        reading.load(write(tmp_path, both, 2), TABLE, tree_of())
    both["1.up"] = copy[:3]
    with pytest.raises(CheckpointError, match=message):
        reading.load(write(tmp_path, both, 2), TABLE, tree_of())


def test_optional_tensors_are_read_or_initialized_and_reported(tmp_path):
    tensors = stored()
    abstract = tree_of(head=(8, 2))
    asked = []

    def initial(path):
        asked.append(path)
        return jnp.full((8, 2), 7.0)

    tree, report = reading.load(write(tmp_path, tensors), HEAD, abstract, initial=initial)
    assert asked == ["head"] and report.initialized == ("head",) and "head" not in report.loaded
    np.testing.assert_array_equal(tree["head"], np.full((8, 2), 7.0))

    head = np.arange(16, dtype=np.float32).reshape(2, 8)
    write(tmp_path, {**tensors, "head.weight": head})
    tree, report = reading.load(tmp_path, HEAD, abstract, initial=initial)
    assert asked == ["head"] and report.initialized == ()
    np.testing.assert_array_equal(tree["head"], head.T)


def test_single_parameters_are_those_of_a_whole_load(tmp_path, monkeypatch):
    """Each of them in a dtype of its own, and each file's header read once for all of them."""
    folder = write(tmp_path, stored("bfloat16"), shards=2)
    whole = leaves(reading.load(folder, TABLE, tree_of(), progress=False)[0])
    headers = []
    read = reading._read_headers
    monkeypatch.setattr(reading, "_read_headers", lambda f: headers.append(f) or read(f))
    checkpoint = models.Checkpoint(folder)
    for row in TABLE:
        for dtype in ("float32", "bfloat16"):
            one = checkpoint.read(row, jax.ShapeDtypeStruct(SHAPES[row.path], dtype))
            assert one.dtype == dtype
            np.testing.assert_array_equal(one, whole[row.path])
    assert headers == [folder]


def test_a_single_parameter_that_is_not_there_is_an_error(tmp_path):
    checkpoint = models.Checkpoint(write(tmp_path, stored()))
    like = jax.ShapeDtypeStruct((8, 4), "float32")
    with pytest.raises(CheckpointError, match=r"lacks head\.weight"):
        checkpoint.read(HEAD[-1], like)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.3\.up\.bias"):
        checkpoint.read(TABLE[2], jax.ShapeDtypeStruct((4, 16), "float32"))
    with pytest.raises(CheckpointError, match=r"has shape \(9, 8\).* \(8, 4\)"):
        checkpoint.read(TABLE[0], like)


def test_an_initial_value_is_checked_and_must_be_given(tmp_path):
    write(tmp_path, stored())
    abstract = tree_of(head=(8, 2))
    with pytest.raises(CheckpointError, match="lacks head.*no initial value"):
        reading.load(tmp_path, HEAD, abstract)
    with pytest.raises(ValueError, match=r"head: \(3,\), expected \(8, 2\)"):
        reading.load(tmp_path, HEAD, abstract, initial=lambda path: jnp.ones(3))


def test_a_stack_is_never_initialized_in_part(tmp_path):
    table = (*TABLE, Tensor("gate.{layer}", "gate", optional=True))
    write(tmp_path, {**stored(), "gate.1": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"lacks gate\.0, gate\.2"):
        reading.load(tmp_path, table, tree_of(gate=(3, 4)), initial=lambda path: jnp.ones((3, 4)))


def test_names_to_ignore_are_reported(tmp_path):
    write(tmp_path, {**stored(), "model.position_ids": np.arange(5)})
    _, report = reading.load(tmp_path, TABLE, tree_of(), ignored=[r"model\.position_ids"])
    assert report.ignored == ("model.position_ids",)


def test_a_parameter_may_be_renewed_whatever_the_checkpoint_holds(tmp_path):
    write(tmp_path, {**stored(), "head.weight": np.ones((5, 8), np.float32)})
    tree, report = reading.load(
        tmp_path,
        HEAD,
        tree_of(head=(8, 2)),
        renewed=["head"],
        initial=lambda path: jnp.full((8, 2), 7.0),
    )
    np.testing.assert_array_equal(tree["head"], np.full((8, 2), 7.0))
    assert report.initialized == ("head",) and report.ignored == ("head.weight",)
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \(5, 8\)"):
        reading.load(tmp_path, HEAD, tree_of(head=(8, 2)))


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (64, 5), (1, 70), (97, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_matrix_is_transposed_by_strips(shape, dtype):
    bits = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    matrix = bits.view(dtype)[..., 0]  # every bit pattern, NaN included
    for part in (matrix, matrix[: shape[0] // 2 + 1, shape[1] // 2 :]):
        result = reading.transposed(part)
        assert result.dtype == part.dtype and result.flags.c_contiguous
        assert result.shape == part.shape[::-1]
        assert result.tobytes() == part.T.tobytes()


# --------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("ambient", [False, True])
def test_each_device_gets_its_slices(tmp_path, route, mesh, kind, ambient):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    tensors = stored("bfloat16")
    rules = [
        ("layers/.*/kernel", P(None, "data", "model")),
        ("layers/.*/bias", P(None, ("model", "data"))),
        ("embed", P(None, "model")),
        (".*", P()),
    ]
    write(tmp_path, tensors, 2)
    with jax.set_mesh(mesh if ambient else Mesh(np.empty((), object), ())):
        tree, _ = reading.load(tmp_path, TABLE, tree_of(), mesh=mesh, rules=rules)
        assert_equal(tree, expected(tensors))
        kernel = tree["layers"]["up"]["kernel"]
        assert kernel.sharding.spec == P(None, "data", "model") and kernel.sharding.mesh == mesh
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 4, 4)}
        assert {shard.data.shape for shard in tree["norm"].addressable_shards} == {(8,)}
        assert jax.jit(lambda x: x.sum())(kernel).sharding.mesh.size in (1, 8)


def test_the_stack_of_layers_may_be_sharded(tmp_path, route, mesh):
    tensors = {f"w.{i}": np.full((3, 5), i, np.float32) for i in range(4)}
    abstract = {"w": jax.ShapeDtypeStruct((4, 5, 3), "float32")}
    rules = [("w", P("data", None, None))]
    write(tmp_path, tensors)
    table = [Tensor("w.{layer}", "w", transpose=True)]
    tree, _ = reading.load(tmp_path, table, abstract, mesh=mesh, rules=rules)
    assert {shard.data.shape for shard in tree["w"].addressable_shards} == {(2, 5, 3)}
    assert_equal(tree, {"w": np.stack([tensors[f"w.{i}"].T for i in range(4)])})


def test_initial_values_are_sharded_too(tmp_path, mesh):
    write(tmp_path, stored())
    tree, _ = reading.load(
        tmp_path,
        HEAD,
        tree_of(head=(8, 2)),
        initial=lambda path: jnp.ones((8, 2)),
        mesh=mesh,
        rules=[("head", P("model")), (".*", P())],
    )
    assert tree["head"].sharding.spec == P("model")


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("(", P())], "'\\(' is no regular expression"),
        ([("embed", P())], "no sharding rule matches .*end the rules with"),
        ([("embed", P("model", None)), (".*", P())], r"does not fit embed \(9, 8\)"),
        ([(".*", P("tensor"))], "does not fit .*tensor"),
        ([("norm", P(None, "model")), (".*", P())], "does not fit norm"),
    ],
)
def test_rules_that_do_not_fit_are_errors(tmp_path, mesh, rules, message):
    write(tmp_path, stored())
    with pytest.raises(ValueError, match=message):
        reading.load(tmp_path, TABLE, tree_of(), mesh=mesh, rules=rules)


def test_rules_need_a_mesh(tmp_path):
    write(tmp_path, stored())
    with pytest.raises(ValueError, match="pass mesh="):
        reading.load(tmp_path, TABLE, tree_of(), rules=[(".*", P())])


# ----------------------------------------------------------------------------------------- memory

MEMORY = """
import json, sys
import jax, jax.numpy as jnp
from hyperadapt_jax.models.checkpoint import reading, writing
from hyperadapt_jax.models.checkpoint.table import Tensor

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def peak(fn):
    start = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM, the peak of the resident size
    result = fn()
    return result, status("VmHWM") - start

source, copy, rows, shapes = json.loads(sys.argv[1])
table = [Tensor(**row) for row in rows]
abstract = {path: jax.ShapeDtypeStruct(shape, "bfloat16") for path, shape in shapes.items()}
jax.block_until_ready(jax.jit(lambda x: x.T + 1)(jnp.ones((8, 9))))  # starts the runtime
(tree, _), loading = peak(lambda: reading.load(source, table, abstract))
model = sum(x.nbytes for x in jax.tree.leaves(tree))
_, exporting = peak(lambda: writing.export(copy, table, tree, config={}))
print(json.dumps({"loading": loading - model, "exporting": exporting}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_host_memory_stays_within_the_largest_tensor(tmp_path):
    """On the CPU the parameters themselves are host memory too: what is left is the loader's."""
    layers, width, hidden, words = 8, 1024, 4096, 16384
    shapes = {
        "embed": (words, width),
        "up": (layers, width, hidden),
        "down": (layers, hidden, width),
    }
    table = [
        Tensor("embed", "embed"),
        Tensor("{layer}.up", "up", transpose=True),
        Tensor("{layer}.down", "down", transpose=True),
    ]
    abstract = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()}
    writing.export(
        tmp_path / "in",
        table,
        abstract,
        config={},
        leaf=lambda path: jnp.ones(shapes[path]),
        max_shard_size="100MB",
    )
    files = [file.stat().st_size for file in (tmp_path / "in").glob("*.safetensors")]
    assert len(files) > 3
    arguments = [
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        [dataclasses.asdict(row) for row in table],
        shapes,
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    largest = 4 * words * width
    constant = 96 * 2**20  # blocks, and what the runtime takes to compile
    assert sum(files) > 2 * (largest + constant)
    assert used["loading"] < largest + constant, used
    assert used["exporting"] < largest + constant, used


# ----------------------------------------------------------------------------------------- errors


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def reindex(folder, **changes):
    index = index_of(folder)
    for name, file in changes.items():
        index["weight_map"][name.replace("__", ".")] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_missing(folder):
    tensors = load_file(folder / "part-0.safetensors")
    tensors.pop("model.embed.weight")
    save_file(tensors, folder / "part-0.safetensors")
    return r"part-0\.safetensors lacks model\.embed\.weight, which .*index\.json places there"


def break_unlisted(folder):
    tensors = load_file(folder / "part-0.safetensors")
    save_file({**tensors, "new": np.ones(2)}, folder / "part-0.safetensors")
    return r"part-0\.safetensors holds new, which .*index\.json does not place there"


def break_duplicate(folder):
    for i in range(2):
        file = folder / f"part-{i}.safetensors"
        save_file({**load_file(file), "model.norm.weight": np.ones(8, np.float32)}, file)
    return r"part-\d\.safetensors (holds|and) .*model\.norm\.weight|model\.norm\.weight.*part-\d"


def break_truncated(folder):
    file = folder / "part-1.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    return r"part-1\.safetensors cannot be read: .*"


def break_empty(folder):
    (folder / "part-1.safetensors").write_bytes(b"")
    return r"part-1\.safetensors cannot be read: .*"


def break_pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
    (folder / "part-1.safetensors").write_text(text)
    return r"part-1\.safetensors cannot be read: it is a Git LFS pointer; run `git lfs pull`"


def break_gone(folder):
    (folder / "part-1.safetensors").unlink()
    return r"part-1\.safetensors, which .*index\.json names, is missing"


def break_folder(folder):
    (folder / "part-1.safetensors").unlink()
    (folder / "part-1.safetensors").mkdir()
    return r"part-1\.safetensors, which .*index\.json names, is missing"


def break_json(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')
    return r"index\.json is not valid JSON: .*line 1"


def break_text(folder):
    (folder / "model.safetensors.index.json").write_bytes(b"\xff\xfe\x00")
    return r"index\.json is not valid JSON"


def break_list(folder):
    (folder / "model.safetensors.index.json").write_text("[]")
    return r"index\.json: expected a JSON object, found list"


def break_map(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    return r"index\.json: 'weight_map' must map tensor names to files"


def break_twice(folder):
    text = '{"weight_map": {"a": "part-0.safetensors", "a": "part-1.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(text)
    return r"index\.json is not valid JSON: a stands there twice"


def break_up(folder):
    save_file(stored(), folder.parent / "x.safetensors")
    reindex(folder, model__embed__weight="../x.safetensors")
    return r"index\.json names '\.\./x\.safetensors', which is no file inside the folder"


def break_absolute(folder):
    save_file(stored(), folder.parent / "x.safetensors")
    reindex(folder, model__embed__weight=str(folder.parent / "x.safetensors"))
    return r"index\.json names '/.*x\.safetensors', which is no file inside the folder"


def break_backslash(folder):
    reindex(folder, model__embed__weight="..\\x.safetensors")
    return r"which is no file inside the folder"


def break_link(folder):
    target = folder.parent / "x.safetensors"
    (folder / "part-1.safetensors").rename(target)
    (folder / "part-1.safetensors").symlink_to(target)
    return r"index\.json names 'part-1\.safetensors', a link that leads outside the folder"


def break_loop(folder):
    (folder / "part-1.safetensors").unlink()
    (folder / "part-1.safetensors").symlink_to(folder / "part-1.safetensors")
    return r"part-1\.safetensors"


def break_null(folder):
    reindex(folder, model__embed__weight="a\0.safetensors")
    return r"index\.json names 'a\\x00\.safetensors', which is no name of a file"


def break_long(folder):
    reindex(folder, model__embed__weight="y" * 300 + ".safetensors")
    return r"y+\.safetensors"


def break_deep(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map":' * 100_000)
    return r"index\.json is not valid JSON: .*recursion"


def break_suffix(folder):
    reindex(folder, model__embed__weight="pytorch_model.bin")
    return r"index\.json names 'pytorch_model\.bin': only safetensors are read"


def break_no_index(folder):
    (folder / "model.safetensors.index.json").unlink()
    return r"holds neither model\.safetensors nor model\.safetensors\.index\.json$"


def break_pickle(folder):
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return r"holds neither .*; pytorch_model\.bin could run code .*: convert it once"


def rewrite(folder, **changes):
    tensors = {**stored(), **{name.replace("__", "."): x for name, x in changes.items()}}
    write(folder, {name: x for name, x in tensors.items() if x is not None}, 2)


def break_absent(folder):
    rewrite(folder, model__norm__weight=None)
    return r"lacks model\.norm\.weight\. Does config\.json belong to these weights"


def break_extra(folder):
    rewrite(folder, model__layers__3__up__bias=np.ones(16, np.float32))
    return r"no place for: model\.layers\.3\.up\.bias \(16,\) in part-\d\.safetensors"


def break_shape(folder):
    rewrite(folder, model__layers__1__up__weight=np.ones((8, 16), np.float32))
    return (
        r"part-\d\.safetensors: model\.layers\.1\.up\.weight has shape \(8, 16\), "
        r".* asks for \(16, 8\)"
    )


def break_rank(folder):
    rewrite(folder, model__norm__weight=np.ones((8, 1), np.float32))
    return r"part-\d\.safetensors: model\.norm\.weight has shape \(8, 1\), .* asks for \(8,\)"


def break_dtype(folder):
    rewrite(folder, model__layers__1__up__weight=np.ones((16, 8), np.int8))
    return r"part-\d\.safetensors: model\.layers\.1\.up\.weight has dtype I8; .*unquantized"


BREAKS = [value for name, value in globals().items() if name.startswith("break_")]


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda f: f.__name__.removeprefix("break_"))
def test_a_broken_folder_is_an_error_that_says_what_and_where(tmp_path, breaks):
    folder = write(tmp_path / "model", stored(), 2)
    reading.load(folder, TABLE, tree_of())
    message = breaks(folder)
    with pytest.raises(CheckpointError, match=message):
        reading.load(folder, TABLE, tree_of())


def test_every_cut_of_a_file_is_an_error(tmp_path):
    folder = write(tmp_path, stored())
    whole = (folder / "model.safetensors").read_bytes()
    for length in {*range(0, len(whole), 97), *range(12), len(whole) - 1}:
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
            reading.load(folder, TABLE, tree_of())


@pytest.mark.parametrize(
    "table, message",
    [
        (TABLE[:-1], "lacks the parameters scale"),
        ((*TABLE, Tensor("x", "other")), "fills other, which the model lacks"),
        ((*TABLE, Tensor("x", "norm")), "fills norm more than once"),
        ((*TABLE[:-1], Tensor("x.{layer}", "scale")), r"scale \(\) cannot be stacked"),
        ((*TABLE[:-1], Tensor("x", "scale", transpose=True)), "scale .* transposed"),
        ((*TABLE[:-1], Tensor("x", "scale", aliases=("{layer}.x",))), "alias of 'x' disagrees"),
        ((*TABLE[:-1], Tensor("model.norm.weight", "scale")), r"model\.norm\.weight in two rows"),
        ((*TABLE[:-1], Tensor("x", "scale", axes="norm")), r"scale \(\) has no axes 'norm'"),
    ],
)
def test_a_table_that_is_not_the_models_is_an_error(tmp_path, table, message):
    write(tmp_path, stored())
    with pytest.raises(ValueError, match=message):
        reading.load(tmp_path, table, tree_of())


# ---------------------------------------------------------------------------------------- folders


def test_a_local_folder_comes_first(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./here", "a/b/c", "", "../up", "a b", "~nobody-here/x"]
)
def test_a_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="cannot be a repository|no such user"):
        hub.resolve(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="give the folder that holds config.json"):
        hub.resolve(tmp_path / "model.safetensors")


def test_offline_and_not_found_are_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="'org/none'.*at revision 'v1'.*HF_HUB_OFFLINE"):
        hub.resolve("org/none", revision="v1", cache_dir=tmp_path)


def test_the_hub_is_asked_for_weights_and_texts_alone(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("org/name", revision="main", cache_dir=tmp_path) == tmp_path
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("org/name", "main", tmp_path)
    names = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "model.safetensors.index.json",
        "sentencepiece.bpe.model",
        "vocab.txt",
        "merges.txt",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "additional_chat_templates/tool_use.jinja",
        "hf_quant_config.json",
        "pytorch_model.bin",
        "modeling_x.py",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "openvino/tokenizer.model",
        "2_Dense/pytorch_model.bin",
        "2_Dense/module.py",
        "1_Pooling/deeper/config.json",
        "tf_model.h5",
        "model.pt",
        "tokenizer_x.py",
    ]
    wanted = huggingface_hub.utils.filter_repo_objects(
        names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(wanted) == names[:12]


def test_a_snapshot_of_the_hubs_cache_links_to_its_store(tmp_path):
    """As the cache lays it out: snapshots of links into a store of the repository beside them."""
    commit = "0" * 40
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / commit
    tensors = stored()
    write(snapshot, tensors)
    (repository / "blobs").mkdir()
    for file in snapshot.iterdir():
        blob = repository / "blobs" / file.name
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / file.name)
    tree, _ = reading.load(snapshot, TABLE, tree_of())
    assert_equal(tree, expected(tensors))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="a link that leads outside"):
        reading.load(snapshot, TABLE, tree_of())


DIGEST = "0123456789abcdef" * 4
STORES = {
    "the hub's cache, linked from a folder of one's own": "hub/models--a--b/blobs/{i}",
    "git-annex": ".git/annex/objects/x7/9K/SHA256E-s{i}--d/SHA256E-s{i}--d.json",
    "DVC": ".dvc/cache/files/md5/a{i}/" + DIGEST[:30],
    "Git LFS": ".git/lfs/objects/0{i}/23/" + DIGEST,
    "another model's folder": "scratch/base/{name}",
}


@pytest.mark.parametrize("where", STORES.values(), ids=STORES)
@pytest.mark.parametrize("relative", [True, False])
def test_links_that_tools_make_are_followed_and_copied_by_content(tmp_path, where, relative):
    folder, tensors = tmp_path / "models" / "mine", stored()
    write(folder, tensors, 2, {"a": 1})
    (folder / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "1_Pooling/config.json"):
        (folder / name).write_text(f'{{"this": "{name}"}}')
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for i, file in enumerate(files):
        target = tmp_path / where.format(i=i, name=file.relative_to(folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
        file.symlink_to(os.path.relpath(target, file.parent) if relative else target)
    tree, _ = reading.load(folder, TABLE, tree_of())
    assert_equal(tree, expected(tensors))
    assert hub.read_json(folder, "config.json") == {"a": 1}
    out = writing.export(tmp_path / "out", TABLE, tree, config={}, source=folder)
    assert not any(file.is_symlink() for file in out.rglob("*"))
    for name in ("tokenizer.json", "1_Pooling/config.json"):
        assert hub.read_json(out, name) == {"this": name}


@pytest.mark.parametrize(
    "name, target",
    [
        ("tokenizer.json", "home/.ssh/id_rsa"),
        ("vocab.txt", "home/.cache/token"),
        ("tokenizer.json", f"home/.aws/sso/cache/{DIGEST[:40]}.json"),
        ("1_Pooling", "home/.docker"),  # holds a config.json, as it is called there too
        ("LICENSE", "home/notes"),
    ],
)
def test_a_link_passes_off_no_other_file_as_a_models(tmp_path, name, target):
    source = write(tmp_path / "in", stored())
    secret = tmp_path / target
    if name == "1_Pooling":
        secret = secret / "config.json"
    secret.parent.mkdir(parents=True)
    secret.write_text('{"secret": 1}')
    (source / name).symlink_to(tmp_path / target)
    tree, _ = reading.load(source, TABLE, tree_of())
    with pytest.raises(CheckpointError, match="a link that leads outside"):
        writing.export(tmp_path / "out", TABLE, tree, config={}, source=source)
    assert {file.name for file in tmp_path.iterdir()} == {"in", "home"}


# --------------------------------------------------------------------------------------- progress


class Terminal:
    """Standard error as a terminal would be, for what is written to it."""

    encoding = "utf-8"

    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("tty, progress, shown", [(1, True, 1), (0, True, 0), (1, False, 0)])
def test_a_bar_shows_on_a_terminal_alone(tmp_path, monkeypatch, capsys, tty, progress, shown):
    write(tmp_path, stored())
    monkeypatch.setattr(reading, "_DELAY", 0.0)
    terminal = Terminal(bool(tty))
    monkeypatch.setattr(sys, "stderr", terminal)
    tree, _ = reading.load(tmp_path, TABLE, tree_of(), progress=progress)
    assert ("loading" in terminal.text and "100%" in terminal.text) == bool(shown)
    writing.export(tmp_path / "out", TABLE, tree, config={}, progress=progress)
    assert ("exporting" in terminal.text) == bool(shown)
    assert capsys.readouterr().out == ""


def test_a_short_load_shows_no_bar(tmp_path, monkeypatch):
    write(tmp_path, stored())
    terminal = Terminal(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    reading.load(tmp_path, TABLE, tree_of())
    assert terminal.text.strip("\r\n ") == ""


# ----------------------------------------------------------------------------------------- export


def read_all(folder):
    result = {}
    for file in sorted(folder.glob("*.safetensors")):
        result |= load_file(file)
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("limit", ["5GB", 1000])
def test_a_round_trip_keeps_every_bit(tmp_path, dtype, limit):
    tensors = stored(dtype)
    tree, _ = reading.load(write(tmp_path / "in", tensors), TABLE, tree_of(dtype))
    out = writing.export(tmp_path / "out", TABLE, tree, config={"a": 1}, max_shard_size=limit)
    again = read_all(out)
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name, strict=True)
    assert json.loads((out / "config.json").read_text()) == {"a": 1, "torch_dtype": dtype}
    files = sorted(file.name for file in out.glob("*.safetensors"))
    if limit == "5GB":
        assert (
            files == ["model.safetensors"] and not (out / "model.safetensors.index.json").exists()
        )
    else:
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 1
        assert all((out / file).stat().st_size <= limit for file in files)
        index = index_of(out)
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
        for name, file in index["weight_map"].items():
            with safe_open(out / file, "numpy") as reader:
                assert name in reader.keys() and reader.metadata() == {"format": "pt"}  # noqa: SIM118
    reloaded, _ = reading.load(out, TABLE, tree_of(dtype))
    assert_equal(reloaded, expected(tensors), dtype)


def test_mixed_dtypes_are_kept_and_aligned(tmp_path):
    tree = {"a": jnp.ones(3, "bfloat16"), "b": jnp.ones(2, "float32"), "c": jnp.ones(1, "float16")}
    table = [Tensor(name, name) for name in tree]
    writing.export(tmp_path / "out", table, tree, config={"dtype": "float64"})
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: x.dtype.name for name, x in again.items()} == {
        name: x.dtype.name for name, x in tree.items()
    }
    assert hub.read_json(tmp_path / "out", "config.json") == {"dtype": "float32"}
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(header[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % again[name].itemsize == 0


def test_all_may_be_stored_in_one_dtype(tmp_path):
    tensors = stored()
    tree, _ = reading.load(write(tmp_path / "in", tensors), TABLE, tree_of())
    writing.export(tmp_path / "out", TABLE, tree, config={}, dtype="bfloat16")
    again = read_all(tmp_path / "out")
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value.astype(jnp.bfloat16), strict=True)
    assert hub.read_json(tmp_path / "out", "config.json") == {"torch_dtype": "bfloat16"}
    with pytest.raises(ValueError, match="dtype=int8 of .*: expected one of float64, float32"):
        writing.export(tmp_path / "no", TABLE, tree, config={}, dtype="int8")


def test_a_wider_dtype_than_the_devices_have_is_stored(tmp_path):
    tensors = stored()
    tree, _ = reading.load(write(tmp_path / "in", tensors), TABLE, tree_of())
    writing.export(tmp_path / "out", TABLE, tree, config={}, dtype="float64")
    for name, value in read_all(tmp_path / "out").items():
        np.testing.assert_array_equal(value, tensors[name].astype("float64"), strict=True)


def test_weights_are_floating_point(tmp_path):
    write(tmp_path, stored())
    with pytest.raises(ValueError, match="has dtype int8: weights are floating-point"):
        reading.load(tmp_path, TABLE, tree_of("int8"))


def test_a_folder_may_be_a_link(tmp_path):
    tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree_of())
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    writing.export(tmp_path / "link", TABLE, tree, config={})
    assert {file.name for file in tmp_path.iterdir()} == {"real", "link"}
    assert (tmp_path / "real" / "model.safetensors").exists()


def test_layers_stay_together_and_in_order(tmp_path):
    tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree_of())
    writing.export(tmp_path / "out", TABLE, tree, config={}, max_shard_size=1100)
    assert list(index_of(tmp_path / "out")["weight_map"]) == [
        "model.embed.weight",
        *(f"model.layers.{i}.up.{part}" for i in range(3) for part in ("weight", "bias")),
        "model.norm.weight",
        "model.scale",
    ]


@pytest.mark.parametrize("ambient", [False, True])
def test_sharded_parameters_are_exported_whole(tmp_path, mesh, ambient):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    tensors = stored()
    rules = [
        ("layers/.*/kernel", P(None, "data", "model")),
        ("layers/.*", P(None, "model")),
        ("norm", P(("data", "model"))),
        (".*", P()),
    ]
    write(tmp_path / "in", tensors)
    with jax.set_mesh(mesh if ambient else Mesh(np.empty((), object), ())):
        tree, _ = reading.load(tmp_path / "in", TABLE, tree_of(), mesh=mesh, rules=rules)
        writing.export(tmp_path / "out", TABLE, tree, config={})
    for name, value in read_all(tmp_path / "out").items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name, strict=True)


def test_a_sharded_stack_is_exported_whole(tmp_path, mesh):
    value = np.arange(4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3)
    tree = {"w": jax.device_put(value, jax.NamedSharding(mesh, P("data")))}
    writing.export(tmp_path / "out", [Tensor("w.{layer}", "w", transpose=True)], tree, config={})
    again = read_all(tmp_path / "out")
    for layer in range(4):
        np.testing.assert_array_equal(again[f"w.{layer}"], value[layer].T, strict=True)


def test_one_parameter_at_a_time_is_asked_for(tmp_path):
    tensors = stored()
    reference = expected(tensors)
    alive, asked = [], []

    def leaf(path):
        assert all(ref() is None for ref in alive), "an earlier parameter is still held"
        asked.append(path)
        value = jnp.asarray(reference[path], "float32")
        alive.append(weakref.ref(value))
        return value

    out = writing.export(tmp_path / "out", TABLE, tree_of(), config={}, leaf=leaf)
    assert sorted(asked) == sorted(SHAPES)
    for name, value in read_all(out).items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


# What of a folder belongs to the model, and what does not.
KEPT = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "vocab.bpe",
    "merges.txt", "bpe.codes", "dict.txt", "encoder.json", "sentencepiece.bpe.model",
    "spiece.model", "source.spm", "qwen.tiktoken", "tekken.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/tool_use.jinja", "generation_config.json",
    "preprocessor_config.json", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "sentence_xlm-roberta_config.json", "1_Pooling/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors", "LICENSE", "LICENSE.txt", "NOTICE",
]  # fmt: skip
LEFT = [
    "README.md", "modeling_x.py", "tokenizer_x.py", "a.bin", "training_args.bin", "optimizer.pt",
    "trainer_state.json", "adapter_config.json", "eval_results.json", "hf_quant_config.json",
    "quantize_config.json", "flax_model.msgpack", ".gitattributes", ".cache/x.json",
    "onnx/model.onnx", "onnx/tokenizer.json", "2_Dense/module.py", "adapter/tokenizer.json",
    "additional_chat_templates/run.py", "1_Pooling.json", "model.safetensors.index.json.bak",
]  # fmt: skip


def test_the_sources_tokenizer_and_names_are_kept(tmp_path):
    tensors = {k.removeprefix("model.") if "embed" in k else k: v for k, v in stored().items()}
    source = write(tmp_path / "in", tensors)
    for name in (*KEPT, *LEFT):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "tokenizer").mkdir()
    tree, _ = reading.load(source, TABLE, tree_of())
    for _ in range(2):  # and over what it wrote, folders included
        out = writing.export(
            tmp_path / "out", TABLE, tree, config={}, source=source, overwrite=True
        )
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert files == {*KEPT, "config.json", "model.safetensors"}
    assert all((out / name).read_text() == name for name in KEPT)
    assert read_all(out).keys() == tensors.keys()


def test_what_an_export_cannot_keep_is_said(tmp_path):
    source = write(tmp_path / "in", stored())
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text("{}")
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    tree, _ = reading.load(source, TABLE, tree_of())
    with pytest.warns(UserWarning, match=r"2_Dense/pytorch_model\.bin could run code"):
        out = writing.export(tmp_path / "out", TABLE, tree, config={}, source=source)
    assert [file.name for file in (out / "2_Dense").iterdir()] == ["config.json"]
    (source / "2_Dense" / "model.safetensors").write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writing.export(out, TABLE, tree, config={}, source=source, overwrite=True)
    assert (out / "2_Dense" / "model.safetensors").read_bytes() == b"x"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tensors_of_the_source_are_carried_along(tmp_path, dtype):
    head = np.random.default_rng(1).normal(size=(3, 8)).astype("float16")
    bias = head[0].astype("float32" if dtype else "bfloat16")
    extra = {"cls.weight": head, "cls.bias": bias, "cls.not": head}
    source = write(tmp_path / "in", {**stored(), **extra}, 2)
    tree, _ = reading.load(source, TABLE, tree_of(), ignored=["cls.*"])
    out = writing.export(
        tmp_path / "out",
        TABLE,
        tree,
        config={},
        source=source,
        carried=["cls.weight", "cls.bias"],
        dtype=dtype,
        max_shard_size=1000,
    )
    again = read_all(out)
    assert again.keys() == {*stored(), "cls.weight", "cls.bias"}
    for name in ("cls.weight", "cls.bias"):
        want = extra[name].astype(jnp.dtype(dtype)) if dtype else extra[name]
        np.testing.assert_array_equal(again[name], want, strict=True)


def test_a_new_head_brings_the_usual_names(tmp_path):
    tensors = {k.removeprefix("model.") if "embed" in k else k: v for k, v in stored().items()}
    source = write(tmp_path / "in", tensors)
    abstract = tree_of(head=(8, 2))
    tree, _ = reading.load(source, HEAD, abstract, initial=lambda path: jnp.ones((8, 2)))
    out = writing.export(tmp_path / "out", HEAD, tree, config={}, source=source)
    assert read_all(out).keys() == {*stored(), "head.weight"}


def unchanged(folder, before):
    return {
        str(f.relative_to(folder)): f.is_file() and f.read_bytes() for f in folder.rglob("*")
    } == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_export_leaves_nothing_behind(tmp_path, overwrite):
    tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree_of())
    home = tmp_path / "home"
    if overwrite:
        writing.export(home / "out", TABLE, tree, config={"old": True})
    home.mkdir(exist_ok=True)
    before = {str(f.relative_to(home)): f.is_file() and f.read_bytes() for f in home.rglob("*")}

    def leaf(path):
        if path == "norm":
            raise RuntimeError("no norm")
        return jnp.zeros(SHAPES[path])

    with pytest.raises(RuntimeError, match="no norm"):
        writing.export(home / "out", TABLE, tree, config={}, leaf=leaf, overwrite=overwrite)
    assert unchanged(home, before)
    with pytest.raises(ValueError, match=r"embed has shape \(2,\), expected \(9, 8\)"):
        writing.export(
            home / "out",
            TABLE,
            tree,
            config={},
            leaf=lambda path: jnp.zeros(2),
            overwrite=overwrite,
        )
    assert unchanged(home, before)


def test_only_an_empty_folder_is_filled_unless_told_so(tmp_path):
    tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree_of())
    (tmp_path / "out").mkdir()
    writing.export(tmp_path / "out", TABLE, tree, config={"run": 1})
    (tmp_path / "out" / "stale").write_text("")
    with pytest.raises(FileExistsError, match="not empty: .*overwrite=True"):
        writing.export(tmp_path / "out", TABLE, tree, config={"run": 2})
    assert hub.read_json(tmp_path / "out", "config.json")["run"] == 1
    writing.export(tmp_path / "out", TABLE, tree, config={"run": 3}, overwrite=True)
    assert hub.read_json(tmp_path / "out", "config.json")["run"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale").exists()
    for mine in (tmp_path, tmp_path / "out"):
        (tmp_path / "out" / "folder").mkdir(exist_ok=True)
        with pytest.raises(FileExistsError, match="remove it yourself"):
            writing.export(mine, TABLE, tree, config={}, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        writing.export(tmp_path / "file", TABLE, tree, config={}, overwrite=True)


def test_a_model_may_be_written_over_its_own_source(tmp_path):
    tensors = stored()
    write(tmp_path / "model", tensors)
    (tmp_path / "model" / "vocab.txt").write_text("words")
    tree, _ = reading.load(tmp_path / "model", TABLE, tree_of())
    tree = jax.tree.map(lambda x: 2 * x, tree)
    writing.export(
        tmp_path / "model", TABLE, tree, config={}, source=tmp_path / "model", overwrite=True
    )
    for name, value in read_all(tmp_path / "model").items():
        np.testing.assert_array_equal(value, 2 * tensors[name])
    assert (tmp_path / "model" / "vocab.txt").read_text() == "words"


def test_a_tokenizer_from_outside_the_source_is_refused(tmp_path):
    source = write(tmp_path / "in", stored())
    (tmp_path / "secret").write_text("")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    tree, _ = reading.load(source, TABLE, tree_of())
    with pytest.raises(CheckpointError, match="'tokenizer.json', a link that leads outside"):
        writing.export(tmp_path / "out", TABLE, tree, config={}, source=source)
    assert {file.name for file in tmp_path.iterdir()} == {"in", "secret"}


@pytest.mark.parametrize(
    "size, value", [("5GB", 5e9), ("200 MiB", 200 * 2**20), (7, 7), ("3kb", 3e3)]
)
def test_sizes_are_read_as_the_hub_writes_them(size, value):
    assert writing._size(size) == value


@pytest.mark.parametrize("size", ["", "5XB", 0, -1, "1.5GB", None])
def test_other_sizes_are_errors(tmp_path, size):
    tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree_of())
    with pytest.raises(ValueError, match="max_shard_size=.*such as '5GB'"):
        writing.export(tmp_path / "out", TABLE, tree, config={}, max_shard_size=size)


def test_a_tensor_larger_than_a_file_may_be_is_an_error(tmp_path):
    tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree_of())
    with pytest.raises(ValueError, match=r"max_shard_size=900: .*weight alone takes \d+ bytes"):
        writing.export(tmp_path / "out", TABLE, tree, config={}, max_shard_size=900)
    assert not (tmp_path / "out").exists()


@hypothesis.given(
    st.lists(st.sampled_from([0, 1, 3, 64, 500, 700]), min_size=1, max_size=12),
    st.integers(2000, 6000),
    st.text(st.characters(categories=["L", "N"]), max_size=9),
)
def test_files_keep_their_limit_whatever_the_tensors(tmp_path_factory, sizes, limit, prefix):
    tree = {f"p{i}": jnp.arange(size, dtype="bfloat16") for i, size in enumerate(sizes)}
    table = [Tensor(f"{prefix}.{path}", path) for path in tree]
    out = tmp_path_factory.mktemp("export") / "out"
    writing.export(out, table, tree, config={}, max_shard_size=limit)
    assert all(file.stat().st_size <= limit for file in out.glob("*.safetensors"))
    again, _ = reading.load(out, table, tree)
    for path, value in tree.items():
        np.testing.assert_array_equal(again[path], value)


# ----------------------------------------------------------------------------------- real weights


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "stories260K"])
def test_real_folders_make_a_round_trip(shared, tmp_path, name):
    source = shared / "weights" / name
    if not source.is_dir():
        pytest.skip(f"needs {source}")
    config = models.read_config(source)
    family = family_of(config)
    table = family.tensors(config)
    _, abstract = models.functional(models.abstract(config))
    tree, report = reading.load(source, table, abstract, ignored=family.ignored(config))
    assert report.initialized == ()
    out = writing.export(
        tmp_path / "out",
        table,
        tree,
        config=hub.read_json(source, "config.json"),
        source=source,
        max_shard_size="60MB",
    )
    original = load_file(source / "model.safetensors")
    again = read_all(out)
    assert again.keys() == original.keys() - set(report.ignored)
    for key, value in again.items():
        np.testing.assert_array_equal(value, original[key], err_msg=key, strict=True)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
