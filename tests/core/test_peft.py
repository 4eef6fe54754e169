"""PEFT's files without PEFT: what is written is read again, and what cannot be meant is refused.

`tests/parity/test_peft.py` loads them with PEFT itself.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import hyperadapt_jax as ha
from hyperadapt_jax import paths
from hyperadapt_jax.adapter import CONFIG, TENSORS, AdapterError
from hyperadapt_jax.models import Tensor
from tests.core.oracle import draw, random_scales

L = 3
PARAMS = {
    "up": {"kernel": draw(1, L, 4, 6), "bias": draw(2, L, 6)},
    "out": {"kernel": draw(3, 6, 1)},
    "classifier": {"kernel": draw(4, 6, 2), "bias": draw(5, 2)},
    "conv": {"kernel": draw(6, 3, 4, 6)},
}
TABLE = [
    Tensor("model.layers.{layer}.up.weight", "up/kernel", transpose=True),
    Tensor("model.layers.{layer}.up.bias", "up/bias"),
    Tensor("model.out.weight", "out/kernel", transpose=True),
    Tensor("classifier.weight", "classifier/kernel", transpose=True),
    Tensor("classifier.bias", "classifier/bias"),
    Tensor("model.conv.weight", "conv/kernel"),
]
ROLES = {"up/kernel": "stack in out", "out/kernel": "in out"}


def adapter(roles=ROLES, rank=None, sides=("row", "col"), full=()):
    plan = ha.plan(PARAMS, *roles.items())
    plan = plan if rank is None else plan.with_low_rank(rank, sides)
    scales = random_scales(ha.init(plan, jax.random.key(0)))
    arrays = paths.arrays(PARAMS)
    return ha.Adapter(scales, {path: arrays[path] + 1 for path in full}, base_model="org/base")


ADAPTERS = {
    "vectors": adapter(),
    "row alone": adapter({"up/kernel": "stack - out", "out/kernel": "- out"}),
    "col alone": adapter({"up/kernel": "stack in -", "out/kernel": "in -"}),
    "low rank": adapter(rank=2, sides=()),
    "low rank and row": adapter(rank=2, sides=("row",)),
    "a trained head": adapter(full=["classifier/kernel", "classifier/bias"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_written_is_read_again(name, tmp_path):
    """The same updates; a side that was not trained is zero where PEFT has no place for none."""
    saved, folder = ADAPTERS[name], tmp_path / "adapter"
    task = "SEQ_CLS" if saved.full else "CAUSAL_LM"
    ha.peft.save(folder, saved, PARAMS, TABLE, task_type=task)
    found = ha.load(folder, PARAMS, tensors=TABLE)
    assert found.base_model == "org/base"
    for (wanted, scales), (got, again) in [(saved.apply(PARAMS), found.apply(PARAMS))]:
        one, two = ha.merge(wanted, scales), ha.merge(got, again)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6), one, two)
    config = json.loads((folder / CONFIG).read_text())
    assert config["task_type"] == task and config["modules_to_save"] == (
        ["classifier"] if saved.full else None
    )
    assert config["target_modules"] == [*(f"model.layers.{i}.up" for i in range(L)), "model.out"]


def test_scale_vectors_are_hira_without_cancellation(tmp_path):
    """``B A = (1 + row) col + row``: deltas far below the spacing of floats at one survive."""
    scales = {"out/kernel": ha.ScaleVectors(jnp.array([1e-9]), jnp.full(6, 3e-9), "in out")}
    ha.peft.save(tmp_path / "a", ha.Adapter(scales), PARAMS, TABLE)
    tensors = safetensors.numpy.load_file(tmp_path / "a" / TENSORS)
    a, b = (tensors[f"base_model.model.model.out.hira_{side}"] for side in "AB")
    np.testing.assert_allclose(b.astype(np.float64) @ a, np.full((1, 6), 4e-9), rtol=1e-5)
    found = ha.peft.load(tmp_path / "a", PARAMS, TABLE).scales["out/kernel"]
    np.testing.assert_array_equal(found.row, scales["out/kernel"].row)


CONV = ha.init(ha.plan(PARAMS, ("conv/kernel", "- in out")))
NOT_WRITTEN = {
    "both sides and a term": (adapter(rank=2), "up/kernel: has a low-rank term and an input-side"),
    "two kinds": (
        ha.Adapter({**ADAPTERS["low rank"].scales, "out/kernel": adapter().scales["out/kernel"]}),
        "out/kernel: has scale vectors alone, and up/kernel has a low-rank term",
    ),
    "a convolution": (ha.Adapter(CONV), "conv/kernel: is no matrix of a linear layer"),
    "nothing adapted": (ha.Adapter({}, {"up/bias": PARAMS["up"]["bias"]}), "adapts no weight"),
    "half a module": (adapter(full=["classifier/bias"]), "classifier/kernel: is frozen, and"),
    "an unknown task": (adapter(), "task_type: is 'CHAT'"),
}


@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_what_peft_has_no_adapter_for_is_refused(name, tmp_path):
    refused, message = NOT_WRITTEN[name]
    task = "CHAT" if name == "an unknown task" else "SEQ_CLS"
    with pytest.raises(AdapterError, match=message):
        ha.peft.save(tmp_path / "adapter", refused, PARAMS, TABLE, task_type=task)
    assert not (tmp_path / "adapter").exists()


def test_magnitudes_need_the_weights_and_nothing_else_does(tmp_path):
    shapes = jax.eval_shape(lambda: PARAMS)
    ha.peft.save(tmp_path / "low", ADAPTERS["low rank"], shapes, TABLE)
    with pytest.raises(AdapterError, match="its values are needed for DoRA's magnitudes"):
        ha.peft.save(tmp_path / "dora", ADAPTERS["low rank and row"], shapes, TABLE)
    ha.peft.save(tmp_path / "dora", ADAPTERS["low rank and row"], PARAMS, TABLE)
    with pytest.raises(AdapterError, match="up/kernel: its values are needed"):
        ha.peft.load(tmp_path / "dora", shapes, TABLE)


def test_ranks_may_differ_from_layer_to_layer(tmp_path):
    """As a rank_pattern of PEFT has it: the smaller one is filled up with zeros."""
    ha.peft.save(tmp_path / "a", ADAPTERS["low rank"], PARAMS, TABLE)
    file = tmp_path / "a" / TENSORS
    tensors = safetensors.numpy.load_file(file)
    key = "base_model.model.model.layers.1.up.lora_{}.weight"
    tensors[key.format("A")] = tensors[key.format("A")][:1]
    tensors[key.format("B")] = np.ascontiguousarray(tensors[key.format("B")][:, :1])
    safetensors.numpy.save_file(tensors, file)
    edit(tmp_path / "a", alpha_pattern={"layers.1.up": 3}, rank_pattern={"layers.1.up": 1})
    found = ha.peft.load(tmp_path / "a", PARAMS, TABLE).scales["up/kernel"]
    whole = ADAPTERS["low rank"].scales["up/kernel"]
    assert found.down.shape == whole.down.shape and not found.down[1, :, 1].any()
    np.testing.assert_allclose(found.up[1, :, 0], 3 * whole.up[1, :, 0], rtol=1e-6)
    np.testing.assert_allclose(found.up[0], whole.up[0], rtol=1e-6)


def edit(folder, **changed):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changed))


def drop(folder, part):
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    kept = {key: value for key, value in tensors.items() if part not in key}
    assert len(kept) < len(tensors)
    safetensors.numpy.save_file(kept, folder / TENSORS)


def rename(folder, old, new):
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    changed = {key.replace(old, new): value for key, value in tensors.items()}
    safetensors.numpy.save_file(changed, folder / TENSORS)


def overwrite(folder, part, value):
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    changed = {k: np.full_like(v, value) if part in k else v for k, v in tensors.items()}
    safetensors.numpy.save_file(changed, folder / TENSORS)


NOT_READ = {
    "another kind": ("low rank", lambda f: edit(f, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "an option": ("low rank", lambda f: edit(f, lora_bias=True), "lora_bias is True: what that"),
    "biases": ("low rank", lambda f: edit(f, bias="all"), "bias is 'all': what that changes"),
    "one factor": ("low rank", lambda f: drop(f, "0.up.lora_B"), r"0\.up\.lora_B.weight: is miss"),
    "magnitudes": ("low rank and row", lambda f: drop(f, "2.up.lora_mag"), "vector: is missing"),
    "another base": ("low rank", lambda f: rename(f, ".up.", ".wide."), "wide: is no linear layer"),
    "a tensor": ("vectors", lambda f: rename(f, "0.up.hira_A", "0.up.other"), "is unexpected"),
    "HiRA of its own": ("vectors", lambda f: overwrite(f, "out.hira_A", 0.5), "of another shape"),
    "not finite": ("low rank", lambda f: overwrite(f, "out.lora_A", np.nan), "is nan"),
    "a truncated file": (
        "vectors",
        lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-4]),
        "is malformed",
    ),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_understood_is_refused(name, tmp_path):
    kind, change, message = NOT_READ[name]
    ha.peft.save(tmp_path / "adapter", ADAPTERS[kind], PARAMS, TABLE)
    change(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=message):
        ha.load(tmp_path / "adapter", PARAMS, tensors=TABLE)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    ha.peft.save(tmp_path / "adapter", ADAPTERS["low rank"], PARAMS, TABLE)
    other = {**PARAMS, "up": {"kernel": draw(1, L, 5, 6), "bias": draw(2, L, 6)}}
    with pytest.raises(AdapterError, match=r"up/kernel: down has shape \(4, 2\), not \(5, 2\)"):
        ha.load(tmp_path / "adapter", other, tensors=TABLE)


def test_arrays_lie_where_their_weights_do(tmp_path):
    """As `load` places an adapter of its own files."""
    mesh = jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, None, "m")
    sharded = jax.device_put(PARAMS["up"]["kernel"], jax.sharding.NamedSharding(mesh, spec))
    params = {**PARAMS, "up": {**PARAMS["up"], "kernel": sharded}}
    ha.peft.save(tmp_path / "adapter", ADAPTERS["low rank"], PARAMS, TABLE)
    found = ha.load(tmp_path / "adapter", params, tensors=TABLE).scales["up/kernel"]
    assert found.up.sharding.spec == jax.sharding.PartitionSpec(None, "m")
