"""Mistakes that other libraries let pass in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperadapt_jax as ha


@pytest.mark.parametrize("pattern", [r".*/(q_proj|v_proj)/kernel", ["q_proj/kernel"], "q/kernel"])
def test_trap_a_regex_that_matches_nothing_is_an_error(pattern):
    """A silent mismatch would train nothing, or everything."""
    params = {"layers": {name: {"kernel": jnp.ones((2, 3, 5))} for name in "qv"}}
    with pytest.raises(ha.PlanError, match="none of the 2 arrays; nearest: .*layers/q/kernel"):
        ha.plan(params, ha.Target(pattern, "stack in out"))
    # A target that matches beside it does not hide it, nor do shapes in place of arrays.
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ha.PlanError, match="none of the 2 arrays"):
        ha.plan(shapes, (".*/v/kernel", "stack in out"), (pattern, "stack in out"))


def test_trap_scanned_layers_are_adapted_layer_by_layer_and_not_copied():
    """A scanned stack keeps one slice of vectors a layer, and its adapter costs an adapter's size.

    Adapters of whole weights either fail on the stacked axis or copy the stack for each step.
    """
    length, width = 6, 256
    params = {"layers": {"kernel": jax.random.normal(jax.random.key(0), (length, width, width))}}
    params = jax.tree.map(lambda w: w / width**0.5, params)
    x = jax.random.normal(jax.random.key(1), (4, width))

    def fn(params, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(body, x, params["layers"]["kernel"])[0]

    scales = ha.init(ha.plan(params, ("layers/kernel", "stack in out")))
    scales = jax.tree.map(lambda d: d + jnp.arange(1.0, length + 1)[:, None] / 10, scales)
    forward = ha.adapt(fn, materialize="error")
    want = x
    for layer in range(length):  # vectors of its own for each layer, applied by hand
        by = 1 + (layer + 1) / 10
        want = jnp.tanh((want * by) @ params["layers"]["kernel"][layer] * by)
    np.testing.assert_allclose(forward(params, scales, x), want, rtol=1e-4, atol=1e-5)

    def temporary(loss, *args):
        grad = jax.jit(jax.value_and_grad(loss, argnums=1))
        return grad.lower(*args).compile().memory_analysis().temp_size_in_bytes

    ours = temporary(lambda p, s, x: forward(p, s, x).sum(), params, scales, x)
    base = temporary(lambda p, x: fn(p, x).sum(), params, x)
    adapter = sum(leaf.nbytes for leaf in jax.tree.leaves(scales))
    weight = width * width * 4
    assert ours - base <= 6 * adapter < weight
