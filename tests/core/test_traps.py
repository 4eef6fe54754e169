"""Mistakes that other libraries let pass in silence."""

import jax
import jax.numpy as jnp
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
