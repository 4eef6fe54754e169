"""`adapt` on random programs: shapes, axis roles, contractions, nests of transformations."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given, settings
from jax import lax

from tests.core.oracle import check_adapt, draw

pytestmark = pytest.mark.usefixtures("optimized")

CHEAPER = ("scaling would repeat", "too few products")
SIZES = st.sampled_from([1, 2, 3, 5])


@st.composite
def contractions(draw_from):
    """An einsum of an input with a weight: letters drawn into batch, contracted and free axes."""
    letters = iter("abcdefghij")
    groups = {
        kind: [next(letters) for _ in range(draw_from(st.integers(low, high)))]
        for kind, low, high in [
            ("batch", 0, 1),
            ("in", 1, 2),
            ("x", 0, 2),
            ("out", 0, 2),
            ("free", 0, 1),
        ]
    }
    sizes = {letter: draw_from(SIZES) for group in groups.values() for letter in group}
    weight = draw_from(
        st.permutations(groups["batch"] + groups["in"] + groups["out"] + groups["free"])
    )
    inputs = draw_from(st.permutations(groups["batch"] + groups["in"] + groups["x"]))
    outputs = draw_from(
        st.permutations(groups["batch"] + groups["x"] + groups["out"] + groups["free"])
    )
    role = {
        **dict.fromkeys(groups["batch"], draw_from(st.sampled_from(["stack", "-", "out"]))),
        **dict.fromkeys(groups["in"], "in"),
        **dict.fromkeys(groups["out"], "out"),
        # A free axis of any role: "stack" makes a vector span contracted and free axes together.
        **dict.fromkeys(groups["free"], draw_from(st.sampled_from(["stack", "-", "out", "in"]))),
    }
    equation = f"{''.join(inputs)},{''.join(weight)}->{''.join(outputs)}"
    shapes = [tuple(sizes[letter] for letter in operand) for operand in (inputs, weight)]
    return equation, shapes, " ".join(role[letter] for letter in weight)


@settings(max_examples=10)
@given(contractions())
def test_any_contraction(drawn):
    equation, (x_shape, w_shape), axes = drawn
    params = {"w": draw(1, *w_shape)}
    found = check_adapt(
        lambda params, x: jnp.einsum(equation, x, params["w"]),
        params,
        [("w", axes)],
        draw(2, *x_shape),
        exact=False,
        tolerance=1e-4,  # a gradient of one number may be a sum of canceling ones
    )
    # With axes as short as these, multiplying the weight out may cost less.
    assert all(u.reason.startswith(CHEAPER) for u in found.uses if u.how == "materialized")


def wrap_jit(body, depth):
    return jax.jit(body)


def wrap_remat(body, depth):
    return jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


def wrap_scan(body, depth):
    return lambda x, w: lax.scan(lambda c, _: (body(c, w), None), x, None, length=depth)[0]


def wrap_fori(body, depth):
    return lambda x, w: lax.fori_loop(0, depth, lambda i, s: (body(s[0], s[1]), s[1]), (x, w))[0]


def wrap_cond(body, depth):
    return lambda x, w: lax.cond(jnp.sum(x) > depth, body, lambda x, w: x + body(x, w), x, w)


def wrap_vmap(body, depth):
    return lambda x, w: jax.vmap(lambda row: body(row[None], w)[0])(x)


def wrap_reuse(body, depth):
    return lambda x, w: jnp.tanh(body(x, w)) - body(x, w.T).T.T


WRAPPERS = [wrap_jit, wrap_remat, wrap_scan, wrap_fori, wrap_cond, wrap_vmap, wrap_reuse]


@settings(max_examples=10)
@given(
    nest=st.lists(st.sampled_from(WRAPPERS), min_size=1, max_size=4),
    depth=st.integers(1, 3),
    n=st.sampled_from([1, 3, 4]),
    stacked=st.booleans(),
    axes=st.sampled_from(["in out", "- out", "in -", "out in"]),
)
def test_any_nest(nest, depth, n, stacked, axes):
    """A layer inside a random nest of transformations, scanned over stacked weights or not."""
    # vmap of a cond selects between copies of its operands, one weight an example: JAX itself
    # materializes there.
    assume(not (wrap_cond in nest and wrap_vmap in nest[nest.index(wrap_cond) :]))

    def body(x, w):
        return jnp.tanh(x @ w) + 0.1 * x

    for wrap in nest:
        body = wrap(body, depth)
    params = {"w": draw(1, 2, n, n) if stacked else draw(1, n, n)}

    def fn(params, x):
        if stacked:
            return lax.scan(lambda c, w: (body(c, w), None), x, params["w"])[0]
        return body(x, params["w"])

    roles = f"stack {axes}" if stacked else axes
    # A scale of one changes no bit, but it does change what XLA fuses, and so, in programs as
    # small as these, which of its own approximations of tanh XLA picks.
    # tanh(y) - y, of a weight of one number, cancels all but the last digits.
    tolerance = 1e-4 if n == 1 else 1e-5
    found = check_adapt(fn, params, [("w", roles)], draw(2, 2, n), exact=False, tolerance=tolerance)
    assert not found.materialized


def test_any_reshape_regroups_the_same_numbers():
    from hyperadapt_jax.interpreter.layout import _regroup

    @settings(max_examples=200)
    @given(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=4), st.data())
    def check(old, data):
        new, left = [], 1
        for size in old:
            left *= size
        while left > 1:
            size = data.draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0]))
            new.append(size)
            left //= size
        for _ in range(data.draw(st.integers(0, 2))):
            new.insert(data.draw(st.integers(0, len(new))), 1)
        groups = _regroup(old, new)
        for axes, side in ((0, old), (1, new)):
            assert [axis for group in groups for axis in group[axes]] == list(range(len(side)))
        for before, after in groups:
            sizes = [1, 1]
            for side, axes, shape in ((0, before, old), (1, after, new)):
                for axis in axes:
                    sizes[side] *= shape[axis]
            assert sizes[0] == sizes[1]

    check()
