"""The scale vectors: where they start, how many there are, and what does not fit a weight."""

import jax
import jax.numpy as jnp
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax.scales import ScaleVectors, check
from tests.core.trees import AXES, adapter, weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_init_is_the_identity_in_float32(dtype):
    base = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), weights())
    scales = ha.init(ha.plan(base, *(([name], axes) for name, (axes, _) in AXES.items())))
    assert list(scales) == sorted(AXES)
    for delta in jax.tree.leaves(scales):
        assert delta.dtype == jnp.float32 and not delta.any()


def test_count():
    scales = adapter()
    assert ha.count(scales) == sum(delta.size for delta in jax.tree.leaves(scales)) == 135
    shapes = jax.eval_shape(lambda s: s, scales)
    assert ha.count(shapes) == 135 and ha.count({}) == 0


def test_axes_are_static():
    leaves, treedef = jax.tree.flatten(adapter())
    assert len(leaves) == 2 * len(AXES) - 3
    assert jax.tree.unflatten(treedef, leaves)["heads in"].axes == "in in out"
    (path, _), *_ = jax.tree_util.tree_flatten_with_path(adapter())[0]
    assert jax.tree_util.keystr(path, simple=True, separator="/") == "col only/col"


# check


def vectors(row, col, axes):
    shape = [None if size is None else jnp.zeros(size) for size in (row, col)]
    return {"layers/q": ScaleVectors(*shape, axes)}


def test_check_accepts_what_fits():
    check(adapter(), weights())
    check(*jax.eval_shape(lambda *trees: trees, adapter(), weights()))
    check({}, {})


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        (
            {"layers/query": ScaleVectors(jnp.zeros(5), None, "- out")},
            r"layers/query: is scaled by .* none of the 2 arrays; nearest: layers/(q|k), layers/",
        ),
        (vectors((4, 5), (4, 3), "stack in out"), r"2 axes, shape \(3, 5\).* 3: 'stack in out'"),
        (vectors(3, 5, "in out"), r"layers/q: row has shape \(3,\), .*\(3, 5\) .* needs \(5,\)"),
        (vectors(5, 1, "in out"), r"layers/q: col has shape \(1,\), .*\(3, 5\) .* needs \(3,\)"),
        (vectors(5, (), "in out"), r"layers/q: col has shape \(\), .* needs \(3,\)"),
        (vectors(5, None, "in out"), r"layers/q: col has shape None, .* needs \(3,\)"),
        (vectors(5, 3, "- out"), r"layers/q: col has shape \(3,\), .* needs None"),
        (vectors(5, (), "- out"), r"layers/q: col has shape \(\), .* needs None"),
    ],
)
def test_check_names_what_does_not_fit(scales, says):
    weights = {"layers/q": jnp.ones((3, 5)), "layers/k": jnp.ones((3, 5))}
    with pytest.raises(ValueError, match=says):
        check(scales, weights)
