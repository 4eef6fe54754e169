"""Methods: what each trains, that it begins as the base, and that its labels fit its trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax.methods import METHODS, Full, Head, HyperAdapt, restore, tune


def model(dtype=jnp.float32):
    """A stack of two layers with biases, a norm, and a head; odd sizes, and one of size one."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)  # noqa: E731
    params = {
        "layers": {"kernel": draw(2, 3, 3), "bias": draw(2, 3)},
        "down": {"kernel": draw(3, 1)},
        "norm": {"scale": draw(3)},
        "head": {"kernel": draw(1, 5), "bias": draw(5)},
    }

    def fn(params, x):
        def layer(x, p):
            return jnp.tanh(x @ p["kernel"] + p["bias"]), None

        x = jax.lax.scan(layer, x, params["layers"])[0] * params["norm"]["scale"]
        return x @ params["down"]["kernel"] @ params["head"]["kernel"] + params["head"]["bias"]

    plan = ha.plan(params, ("layers/kernel", "stack in out"), ("down/kernel", "in out"))
    return fn, params, plan, draw(4, 3)


def tuning(name, dtype=jnp.float32, **options):
    fn, params, plan, x = model(dtype)
    key = jax.random.key(3)
    return tune(METHODS[name], fn, params, plan, head="head/.*", key=key, **options), fn, params, x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_begins_as_the_base(name, dtype):
    """The same outputs bit for bit, all that trains in float32, and all of the rest frozen."""
    tuned, fn, params, x = tuning(name, dtype)
    np.testing.assert_array_equal(tuned.forward(tuned.trainable, tuned.frozen, x), fn(params, x))
    trains = jax.tree.leaves(tuned.trainable)
    assert trains and {leaf.dtype for leaf in trains} == {jnp.dtype("float32")}
    assert tuned.count == sum(leaf.size for leaf in trains)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    full = sum(leaf.size for leaf in tuned.trainable["full"].values())
    assert sum(leaf.size for leaf in jax.tree.leaves(tuned.frozen)) == total - full


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_set_up_on_shapes_alone(name):
    fn, params, plan, _ = model()
    tuned, described = (
        tune(METHODS[name], fn, given, plan, head="head/.*", key=jax.random.key(0))
        for given in (params, jax.eval_shape(lambda: params))
    )
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(t.trainable)] for t in (described, tuned)]
    assert kinds[0] == kinds[1]
    assert described.labels == tuned.labels
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(described.trainable))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_by_its_labels(name):
    """A step of an optimizer for each label moves every array that has a gradient, and the loss."""
    tuned, _, _, x = tuning(name)
    rates = {label: optax.sgd(1e-2) for label in set(jax.tree.leaves(tuned.labels))}
    optimizer = optax.partition(rates, tuned.labels)
    loss = lambda t: jnp.mean((tuned.forward(t, tuned.frozen, x) - 1.0) ** 2)  # noqa: E731
    before, grads = jax.value_and_grad(loss)(tuned.trainable)
    updates, _ = optimizer.update(grads, optimizer.init(tuned.trainable), tuned.trainable)
    first = [jax.tree_util.GetAttrKey(name) for name in ("down", "d")]
    for keys, grad in jax.tree_util.tree_leaves_with_path(grads):
        # The first side of a product whose other side is zero has no gradient yet.
        assert (jnp.abs(grad).max() > 0) == (keys[-1] not in first)
    for update, grad in zip(*map(jax.tree.leaves, (updates, grads)), strict=True):
        np.testing.assert_allclose(update, -1e-2 * grad, rtol=1e-6)
    assert loss(optax.apply_updates(tuned.trainable, updates)) < before


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_trained_is_an_adapter(name, tmp_path):
    """Saved, loaded and applied, or merged, it gives what it gave."""
    tuned, fn, params, x = tuning(name)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, tuned.trainable)
    wanted = tuned.forward(moved, tuned.frozen, x)
    ha.save(tmp_path / "adapter", ha.Adapter(*tuned.adapter(moved)), params)
    applied, scales = ha.load(tmp_path / "adapter").apply(params)
    np.testing.assert_allclose(ha.adapt(fn)(applied, scales, x), wanted, rtol=1e-5)
    np.testing.assert_allclose(fn(ha.merge(applied, scales), x), wanted, rtol=1e-4)
    again = restore(fn, params, ha.load(tmp_path / "adapter"))
    np.testing.assert_allclose(again.forward(again.trainable, again.frozen, x), wanted, rtol=1e-5)


def test_what_each_method_trains():
    """Sides, heads and everything; with `full`, more of it."""
    counts = {
        "hyperadapt": 16,
        "row": 7,
        "col": 9,
        "bitfit": 6 + 5,
        "full": 18 + 6 + 3 + 3 + 10,
        "head": 10,
        "hyperadapt-lora": 16 + 8 * 16,
        "lora": 8 * 16,
        "dora": 8 * 16 + 7,
        "vera": 3 * 256 + 7,
        "ia3": 16,
        "hira": 16,
    }
    assert counts.keys() == METHODS.keys()
    for name, count in counts.items():
        assert tuning(name)[0].count == count
    assert tuning("row", full="norm/.*")[0].trainable["full"].keys() == {"norm/scale"}
    assert tuning("bitfit")[0].trainable["full"].keys() == {"layers/bias", "head/bias"}
    assert tuning("head", full=["norm/scale"])[0].count == 13
    assert tuning("hyperadapt")[0].labels["scales"]["down/kernel"].row == "row"
    assert Full() == METHODS["full"] and Head() != Full() and HyperAdapt("row") == METHODS["row"]


def test_what_cannot_be_meant_is_refused():
    fn, params, plan, _ = model()
    with pytest.raises(ha.PlanError, match="leave nothing to scale with sides='col'"):
        tune(HyperAdapt("col"), fn, params, ha.plan(params, ("down/kernel", "- out")))
    with pytest.raises(ha.PlanError, match="is scaled, so it cannot also train fully"):
        tune(HyperAdapt(), fn, params, plan, full="down/kernel")
    with pytest.raises(ha.PlanError, match="sides must be"):
        tune(HyperAdapt("left"), fn, params, plan)
