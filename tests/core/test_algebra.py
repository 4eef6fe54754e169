"""The algebra of adapters, against the same formulas in float64 on the merged factors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hyperadapt_jax as ha
from hyperadapt_jax.scales import ScaleVectors
from tests.core.trees import AXES, adapter, dense, weights

EPS = float(jnp.finfo(jnp.float32).eps)

# Compiled, for speed; that they are the same without is tested below.
compose, invert, canonical = map(jax.jit, (ha.compose, ha.invert, ha.canonical))
interpolate = jax.jit(ha.interpolate)
average = jax.jit(ha.average, static_argnums=1)

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1e-5, 0.01, 0.7])  # from just off the identity to far from it
every = st.builds(adapter, seeds, sizes, st.booleans())
# What works number by number needs no more than these.
FEW = ("stacked", "row only")


def few(seed=0, size=0.5, negative=True):
    """The part of ``adapter()`` that scales the weights FEW."""
    return {name: vectors for name, vectors in adapter(seed, size, negative).items() if name in FEW}


adapters = st.builds(few, seeds, sizes, st.booleans())
positive = st.builds(few, seeds, sizes, st.just(False))


def each(*adapters):
    """The adapters' deltas side by side, in float64, vector by vector."""
    deltas = ([np.asarray(d, np.float64) for d in jax.tree.leaves(a)] for a in adapters)
    return zip(*deltas, strict=True)


def assert_close(got, want, *terms, ulps=8):
    """|got - want| within some ulps of the largest term that went into it."""
    bound = ulps * EPS * np.max([np.abs(t) for t in (want, *terms)], axis=0)
    assert (np.abs(got - want) <= bound).all(), np.max(np.abs(got - want) / (bound + 1e-300))


def assert_same(first, second, ulps=64):
    """Two adapters whose scales are equal but for rounding."""
    for x, y in each(first, second):
        assert_close(1 + x, 1 + y, np.ones_like(x), ulps=ulps)


def assert_same_weights(first, second, ulps=64):
    for name, (_, shape) in AXES.items():
        x, y = dense(first[name], len(shape)), dense(second[name], len(shape))
        assert_close(x, y, np.ones_like(x), ulps=ulps)


# compose, invert


@given(adapters, adapters)
def test_compose_multiplies_and_commutes(first, second):
    both, swapped = compose(first, second), compose(second, first)
    assert jax.tree.structure(both) == jax.tree.structure(first)
    for x, y, got, other in each(first, second, both, swapped):
        assert_close(got, x + y + x * y, x, y, x * y)
        assert (got == other).all()
    for name in FEW:
        factors = [dense(scales[name], len(AXES[name][1])) for scales in (first, second, both)]
        np.testing.assert_allclose(factors[0] * factors[1], factors[2], rtol=1e-4)


@given(adapters, adapters, adapters)
def test_compose_associates(a, b, c):
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    for x, y, z, one, other in each(a, b, c, left, right):
        terms = (1 + np.abs(x)) * (1 + np.abs(y)) * (1 + np.abs(z)) - 1
        assert_close(one, other, terms)


@given(adapters)
def test_invert_undoes(scales):
    inverse = invert(scales)
    for delta, got in each(scales, inverse):
        assert_close(got, -delta / (1 + delta), delta / (1 + delta) ** 2)
    for delta, got in each(scales, compose(scales, inverse)):
        assert_close(got, np.zeros_like(got), delta, (delta / (1 + delta)) * (1 + np.abs(delta)))
    assert_same(invert(inverse), scales, ulps=2000)


def test_merged_with_the_inverse_the_weight_is_the_bases():
    base, scales = weights(), adapter()
    restored = ha.merge(ha.merge(base, scales), ha.invert(scales))
    for name in AXES:
        np.testing.assert_allclose(restored[name], base[name], rtol=5e-6)


def test_compose_keeps_what_only_one_adapts():
    whole = adapter()
    first = {name: whole[name] for name in ("plain", "stacked")}
    second = {name: whole[name] for name in ("stacked", "row only")}
    both = ha.compose(first, second)
    assert set(both) == {"plain", "stacked", "row only"}
    assert both["plain"] is first["plain"] and both["row only"] is second["row only"]
    np.testing.assert_allclose(1 + both["stacked"].row, (1 + whole["stacked"].row) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("roles", "whole"),
    [
        (("- out", "in -"), "in out"),
        (("stack - out", "stack in -"), "stack in out"),
        (("- - - out", "- - in -"), "- - in out"),
        (("- out", "in out"), "in out"),
    ],
)
def test_one_sided_adapters_compose_to_a_two_sided_one(roles, whole):
    base = {"w": jnp.asarray(weights()["convolution"])}
    base["w"] = base["w"][(0,) * (4 - len(whole.split()))]
    first, second = (
        jax.tree.map(lambda d: d + 0.5, ha.init(ha.plan(base, ("w", axes)))) for axes in roles
    )
    both = ha.compose(first, second)
    assert both["w"].axes == whole
    one_by_one = ha.merge(ha.merge(base, first), second)
    np.testing.assert_allclose(ha.merge(base, both)["w"], one_by_one["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("in out", "out in"),
        ("in -", "- in"),  # the in axis of one is not the in axis of the other
        ("in out", "- in"),
        ("in out", "stack out"),
        ("- out", "stack -"),
        ("- out", "in - -"),
    ],
)
def test_adapters_of_other_axes_do_not_compose(first, second):
    def ones(axes):
        shape = (2,) * len(axes.split())
        plan = ha.plan({"w": jnp.ones(shape)}, ("w", axes))
        return ha.init(plan)

    second = second if {"in", "out"} & set(second.split()) else second.replace("-", "out")
    with pytest.raises(ValueError, match=f"w: axis roles differ: '{first}' and '{second}'"):
        ha.compose(ones(first), ones(second))


def test_adapters_of_other_shapes_do_not_compose():
    a = {"w": ScaleVectors(jnp.zeros(3), None, "- out")}
    b = {"w": ScaleVectors(jnp.zeros(1), None, "- out")}  # would broadcast
    with pytest.raises(ValueError, match=r"w: row shapes differ: \(3,\), \(1,\)"):
        ha.compose(a, b)


@pytest.mark.parametrize("near", [-1.0, -1 + 5e-7, -1 - 5e-7])
def test_a_scale_near_zero_has_no_inverse(near):
    scales = few()
    scales["stacked"].col[1, 2] = near
    with pytest.raises(ValueError, match=r"stacked: col\[1, 2\] scales by .*, too near zero"):
        ha.invert(scales)
    if near != -1:
        assert np.isfinite(ha.invert(scales, tol=1e-7)["stacked"].col).all()
    with pytest.raises(ValueError, match=r"scales by .* \(tol=0.9\)"):
        ha.invert(few(), tol=0.9)


# average, interpolate


def assert_mean(got, weights, deltas):
    """got is the geometric mean, with the first one's sign, to some ulps of what went into it."""
    magnitude = np.prod([np.abs(1 + d) ** w for w, d in zip(weights, deltas, strict=True)], axis=0)
    # Close to the identity, the digits of the deltas are kept, not only those of the scales.
    largest = np.max(np.abs(deltas), axis=0)
    terms = np.where(largest < 0.5, largest, 1 + magnitude)
    assert_close(got, np.sign(1 + deltas[0]) * magnitude - 1, largest, terms, ulps=16)


@given(adapters)
def test_the_average_of_equals_is_that_adapter(scales):
    for got in (average([scales]), average([scales] * 3), average([scales] * 2, (0.25, 0.75))):
        for x, z in each(scales, got):
            assert_mean(z, [1], [x])


@given(positive, positive, st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5]))
def test_interpolation_is_geometric(first, second, t):
    for x, y, z in each(first, second, interpolate(first, second, t)):
        assert_mean(z, [1 - t, t], [x, y])


@given(positive, positive)
def test_interpolation_ends_at_its_ends(first, second):
    for t, end in ((0, first), (1, second), (0.0, first), (1.0, second)):
        for x, z in each(end, interpolate(first, second, t)):
            assert_mean(z, [1], [x])


@given(adapters, seeds, sizes)
def test_equal_negative_signs_are_kept(first, seed, size):
    second = compose(first, few(seed, size, negative=False))
    third = compose(first, few(seed + 1, size, negative=False))
    for deltas in each(first, second, third, average([first, second, third], (0.5, 0.3, 0.2))):
        assert_mean(deltas[-1], [0.5, 0.3, 0.2], deltas[:-1])


def column(*values):
    return {"w": ScaleVectors(jnp.asarray(values, jnp.float32), None, "- out")}


def test_signs_that_differ_need_a_policy():
    first, second = column(0.5, 1.0, -3.0, 0.0), column(-1.5, 3.0, -3.0, -2.0)
    says = 'w: 2 of 4 row scales differ in sign .* signs="linear" takes'
    with pytest.raises(ValueError, match=says):
        ha.average([first, second])
    with pytest.raises(ValueError, match=says):
        ha.interpolate(first, second, 0.5)
    for got in (
        ha.average([first, second], signs="linear"),
        ha.interpolate(first, second, 0.5, signs="linear"),
    ):
        # Only the entries whose signs differ, 1.5 and -0.5, 1 and -1, take the arithmetic mean.
        scales = 1 + np.asarray(got["w"].row)
        np.testing.assert_allclose(scales, [0.5, 8**0.5, -2.0, 0.0], atol=1e-6)
    with pytest.raises(ValueError, match='"error" or "linear", not "?\'drop'):
        ha.average([first, second], signs="drop")


def test_a_zero_scale_is_of_either_sign():
    zero, two = column(-1.0, -1.0, -1.0), column(1.0, -3.0, -1.0)
    np.testing.assert_array_equal(ha.average([zero, two])["w"].row, [-1, -1, -1])
    np.testing.assert_allclose(ha.interpolate(zero, two, 1)["w"].row, [1, -3, -1], atol=1e-6)
    np.testing.assert_array_equal(ha.interpolate(zero, two, 0)["w"].row, [-1, -1, -1])


def test_what_cannot_be_averaged():
    a = column(0.0)
    with pytest.raises(ValueError, match="adapters: is empty; give at least one"):
        ha.average([])
    with pytest.raises(ValueError, match="weights: is .*; give 2 that sum to one"):
        ha.average([a, a], [0.5, 0.6])
    with pytest.raises(ValueError, match="weights: is .*; give 2 that sum to one"):
        ha.average([a, a], [1.0])
    with pytest.raises(ValueError, match="v: adapted by one adapter and not by the other"):
        ha.average([a, {**a, "v": a["w"]}])
    with pytest.raises(ValueError, match="w: axis roles differ: '- out' and 'in -'"):
        ha.average([a, {"w": ScaleVectors(None, jnp.zeros(1), "in -")}])
    with pytest.raises(ValueError, match=r"w: row shapes differ: \(1,\), \(2,\)"):
        ha.average([a, column(0.0, 0.0)])


# canonical


def sides(name, vectors):
    """The scales of both sides in float64, as [slices of the stack, numbers of a slice]."""
    for delta, side in ((vectors.row, "out"), (vectors.col, "in")):
        roles = [role for role in AXES[name][0].split() if role in (side, "stack")]
        order = sorted(range(len(roles)), key=lambda i: roles[i] != "stack")
        scale = 1 + np.asarray(delta, np.float64).transpose(order)
        yield scale.reshape(math.prod(scale.shape[: roles.count("stack")]), -1)


TWO_SIDED = [name for name, (axes, _) in AXES.items() if {"in", "out"} <= set(axes.split())]


@given(every)
def test_canonical_is_the_same_adapter(scales):
    same = canonical(scales)
    assert_same_weights(same, scales, ulps=500)
    for name in TWO_SIDED:
        row, col = sides(name, same[name])
        np.testing.assert_allclose((row**2).mean(-1), (col**2).mean(-1), rtol=1e-4)
        assert (col.mean(-1) > -1e-6).all()
    for name in AXES.keys() - set(TWO_SIDED):
        jax.tree.map(np.testing.assert_array_equal, same[name], scales[name])


@given(every, st.sampled_from([-3.0, -1.0, 0.2, 5.0]))
def test_canonical_does_not_depend_on_the_gauge(scales, c):
    # A factor for each slice of a stack, in the shape that broadcasts against both sides.
    stacks = {
        "stacked": np.array([[c], [2.0]]),
        "stacked last": np.array([[c, 2.0]]),
        "experts in layers": c * np.arange(1.0, 7.0).reshape(2, 3, 1),
    }
    other = dict(scales)
    for name in TWO_SIDED:
        factor, vectors = stacks.get(name, c), scales[name]
        row, col = (1 + vectors.row) * factor - 1, (1 + vectors.col) / factor - 1
        row, col = row.astype(np.float32), col.astype(np.float32)
        other[name] = ScaleVectors(row, col, vectors.axes)
    assert_same_weights(other, scales, ulps=2000)
    other, same = canonical(other), canonical(scales)
    for name in TWO_SIDED:
        # Where the mean of a side is next to zero, rounding decides which sign is the canonical.
        if np.abs(list(sides(name, same[name]))[1].mean(-1)).min() > 1e-3:
            assert_same(other[name], same[name], ulps=2000)


def test_one_large_negative_scale_does_not_turn_all_signs():
    scales = {"w": ScaleVectors(jnp.zeros(4), jnp.array([0.0, 0.1, 0.0, -2.5]), "in out")}
    got = ha.canonical(scales)["w"]
    assert (got.row > -1).all() and (got.col > -1).tolist() == [True, True, True, False]


def test_canonical_leaves_a_side_of_zeros():
    row, col = jnp.full((2, 3), -1.0), jnp.array([[0.0, 1.0], [0.0, -4.0]])
    got = ha.canonical({"w": ScaleVectors(row, col, "stack in out")})["w"]
    np.testing.assert_array_equal(got.row, row)
    np.testing.assert_array_equal(1 + got.col, [[1, 2], [-1, 3]])  # but for the sign


# Under the transformations

OPERATIONS = {
    "compose": ha.compose,
    "invert": lambda a, b: ha.invert(a),
    "average": lambda a, b: ha.average([a, b], [0.25, 0.75], signs="linear"),
    "interpolate": lambda a, b: ha.interpolate(a, b, 0.5, signs="linear"),
    "canonical": lambda a, b: ha.canonical(a),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_jit_and_vmap(name):
    operation = OPERATIONS[name]
    pairs = [(few(seed), few(seed + 10)) for seed in range(3)]
    one_by_one = [jax.jit(operation)(*pair) for pair in pairs]
    assert_same(operation(*pairs[0]), one_by_one[0])
    mapped = jax.jit(jax.vmap(operation))(*jax.tree.map(lambda *xs: np.stack(xs), *pairs))
    assert_same(mapped, jax.tree.map(lambda *xs: np.stack(xs), *one_by_one))
    for delta in jax.tree.leaves((one_by_one, mapped)):
        assert delta.dtype == jnp.float32


def test_interpolation_traces_over_t():
    first, second = few(0, negative=False), few(1, negative=False)
    along = jax.jit(lambda t: jax.jvp(lambda t: ha.interpolate(first, second, t), (t,), (1.0,)))
    points, slopes = jax.vmap(along)(jnp.array([0.0, 0.5, 1.0]))
    for x, y, z, slope in each(first, second, points, slopes):
        for i, t in enumerate([0.0, 0.5, 1.0]):
            assert_mean(z[i], [1 - t, t], [x, y])
            want = (np.log1p(y) - np.log1p(x)) * (1 + z[i])
            np.testing.assert_allclose(slope[i], want, rtol=1e-5, atol=1e-6)
