"""Paths: one grammar for every container, and the patterns that select by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperadapt_jax import paths
from tests.core.trees import TREES, Attention, layer, linen


@pytest.mark.parametrize("name", TREES)
def test_every_container_has_the_same_grammar(name):
    make, weight, _, bias = TREES[name]
    tree = make()
    arrays = paths.arrays(tree)
    assert sorted(arrays[weight].shape) == [3, 5] and arrays[bias].shape == (5,)
    assert len(jax.tree.leaves(arrays)) == sum(map(paths.is_array, jax.tree.leaves(tree)))
    assert not any("." in path or "[" in path or path.endswith("value") for path in arrays)


@pytest.mark.parametrize("name", TREES)
def test_replace_keeps_the_container(name):
    make, weight, _, bias = TREES[name]
    tree = make()
    new = paths.replace(tree, {weight: jnp.zeros((3, 5))})
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert not paths.arrays(new)[weight].any()
    assert paths.arrays(new)[bias] is paths.arrays(tree)[bias]


def test_a_box_is_no_part_of_the_path():
    boxed, logical = TREES["linen, boxed"][0](), TREES["linen, logically boxed"][0]()
    assert paths.flatten(boxed)[0] == paths.flatten(logical)[0] == paths.flatten(linen())[0]
    assert boxed["params"]["q"]["kernel"].names == (None, "model")  # it was in a box


def test_a_field_called_value_is_no_box():
    fields = Attention(*(jnp.full(3, float(i)) for i in range(3)))
    assert paths.flatten({"attention": fields})[0] == [
        "attention/query",
        "attention/key",
        "attention/value",
    ]
    deep = {"attention": Attention(jnp.ones(3), None, {"kernel": jnp.ones(3)})}
    assert paths.flatten(deep)[0] == ["attention/query", "attention/value/kernel"]
    assert paths.flatten({"a": {"value": 1}})[0] == ["a/value"]  # a key, not an attribute


def test_keys_that_make_equal_paths_are_an_error():
    with pytest.raises(
        ValueError, match="a/b: two leaves of the tree have this path; rename a key"
    ):
        paths.flatten({"a/b": 1, "a": {"b": 2}})


def test_what_counts_as_an_array():
    for leaf in (jnp.ones(3), np.ones(3), jax.ShapeDtypeStruct((3,), jnp.bfloat16), jnp.ones(())):
        assert paths.is_array(leaf)
    for leaf in (1.0, np.float32(1), jax.nn.gelu, "kernel", object()):
        assert not paths.is_array(leaf)
    jax.eval_shape(lambda x: jnp.zeros(()) if paths.is_array(x) else 1 / 0, jnp.ones(3))


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        (r".*/kernel", ["a/q/kernel", "a/qq/kernel"]),
        (r".*q/kernel", ["a/q/kernel", "a/qq/kernel"]),
        (r"a/(q|v)/.*", ["a/q/kernel", "a/q/bias"]),
        (r"kernel", []),  # a full match, not a search
        (["kernel"], ["a/q/kernel", "a/qq/kernel"]),
        (["q/kernel"], ["a/q/kernel"]),  # whole keys: not qq
        (["a/q/kernel", "bias"], ["a/q/kernel", "a/q/bias"]),  # a whole path is its own suffix
        ([".*/kernel"], []),  # a suffix is no regular expression
    ],
)
def test_patterns(pattern, matched):
    known = ["a/q/kernel", "a/q/bias", "a/qq/kernel"]
    assert list(filter(paths.matcher(pattern), known)) == matched


@pytest.mark.parametrize(("pattern", "says"), [("", "empty pattern"), ([], "empty pattern")])
def test_an_empty_pattern_is_an_error(pattern, says):
    with pytest.raises(ValueError, match=says):
        paths.matcher(pattern)


def test_a_broken_regular_expression_is_an_error():
    with pytest.raises(ValueError, match=r"'\(q' is no regular expression: missing \)"):
        paths.matcher("(q")


def test_nearest_names_the_likeliest_first():
    tree = {"encoder": {f"layer_{i}": {"q": layer(), "mlp": layer()} for i in range(4)}}
    known = paths.flatten(tree)[0]
    line = paths.suggest(r".*/layer_2/q/kernels", known)
    assert line.startswith("nearest: encoder/layer_2/q/kernel, ")
    assert line.count(",") == 4
    assert paths.suggest(["mlp/biases"], known, count=1).endswith("/mlp/bias")
    # A key in common says more than letters in common.
    deep = "transformer/encoder/blocks/mlp/up/kernel"
    assert paths.suggest("up/weights", ["weight", deep], count=1) == f"nearest: {deep}"
    assert paths.suggest("q", []) == "the tree holds no arrays"
