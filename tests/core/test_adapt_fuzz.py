"""`adapt` on random programs: axes of size one, mixed dtypes, lookups, joins, nests, codes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import hyperadapt_jax as ha
from tests.core.oracle import draw, loss, random_scales

SIZES = st.sampled_from([1, 1, 2, 3, 4])
ROLES = st.sampled_from(["in", "out", "stack", "-"])


def array(data, *shape, positive=False):
    x = draw(data.draw(st.integers(0, 9)), *shape)
    return 1 + jnp.abs(x) if positive else x


def axis_of(data, w):
    return data.draw(st.integers(0, w.ndim - 1))


# Steps that a weight may take: each draws what it needs, and returns a function of the weight.
# Those of CODES and LAYOUT move numbers and change none.


def transpose(data, w):
    order = data.draw(st.permutations(range(w.ndim)))
    return lambda w: jnp.transpose(w, order)


def merge_axes(data, w):
    i = data.draw(st.integers(0, max(w.ndim - 2, 0)))
    return lambda w: w.reshape(*w.shape[:i], -1, *w.shape[i + 2 :])


def split_axis(data, w):
    i = axis_of(data, w)
    a = data.draw(st.sampled_from([n for n in range(1, w.shape[i] + 1) if w.shape[i] % n == 0]))
    return lambda w: w.reshape(*w.shape[:i], a, w.shape[i] // a, *w.shape[i + 1 :])


def expand(data, w):
    i = data.draw(st.integers(0, w.ndim))
    return lambda w: jnp.expand_dims(w, i)


def squeeze(data, w):
    return lambda w: jnp.squeeze(w, [i for i, n in enumerate(w.shape) if n == 1][: w.ndim - 1])


def cut(data, w):
    i = axis_of(data, w)
    start = data.draw(st.integers(0, w.shape[i] - 1))
    stop = data.draw(st.integers(start + 1, w.shape[i]))
    return lambda w: lax.slice_in_dim(w, start, stop, axis=i)


def cut_where_it_runs(data, w):
    i = axis_of(data, w)
    size, at = data.draw(st.integers(1, w.shape[i])), data.draw(st.integers(0, w.shape[i]))
    return lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(at), size, axis=i)


def one_of(data, w):
    i = axis_of(data, w)
    at = data.draw(st.integers(0, w.shape[i] - 1))
    return lambda w: jnp.moveaxis(w, i, 0)[at] if w.ndim > 1 else w


def halves(data, w):
    i = axis_of(data, w)
    return lambda w: sum(jnp.split(w, w.shape[i], i)[1:], jnp.split(w, w.shape[i], i)[0])


def flip(data, w):
    i = axis_of(data, w)
    return lambda w: jnp.flip(w, i)


def repeat(data, w):
    i = axis_of(data, w)
    shape = list(w.shape)
    shape[i] = data.draw(st.integers(1, 3)) if shape[i] == 1 else shape[i]
    return lambda w: jnp.broadcast_to(w, shape)


def look_up(data, w):
    i = axis_of(data, w)
    index = jnp.array(data.draw(st.lists(st.integers(0, w.shape[i] - 1), min_size=1, max_size=4)))
    mode = data.draw(st.sampled_from(["clip", "fill", None]))
    return lambda w: jnp.take(w, index, axis=i, mode=mode)


def look_up_pairs(data, w):
    if w.ndim < 2:
        return look_up(data, w)
    pairs = [jnp.array([data.draw(st.integers(0, n - 1)) for _ in "ab"]) for n in w.shape[:2]]
    return lambda w: w[tuple(pairs)]


def look_up_one_by_one(data, w):
    index = jnp.array(data.draw(st.lists(st.integers(0, w.shape[0] - 1), min_size=1, max_size=3)))
    return lambda w: jax.vmap(lambda i: w[i])(index)


def join(data, w):
    i = axis_of(data, w)
    return lambda w: jnp.concatenate([w, jnp.flip(w, i)], i)


def stack(data, w):
    i = data.draw(st.integers(0, w.ndim))
    return lambda w: jnp.stack([w, w], i)


def named(data, w):
    return lambda w: checkpoint_name(jnp.copy(w), "w")


CODES = [transpose, merge_axes, split_axis, expand, squeeze, cut, cut_where_it_runs, one_of, flip]
CODES += [repeat, look_up, look_up_pairs, stack, named]
LAYOUT = [*CODES, look_up_one_by_one, join]


def times(data, w):
    """By an array that may be longer where the weight's size is one, as conditions are."""
    shape = [data.draw(st.sampled_from([1, n, 3 if n == 1 else n])) for n in w.shape]
    other = array(data, *shape, positive=True)
    if data.draw(st.booleans()):
        return lambda w: w * other.astype(w.dtype)
    return lambda w: w / other.astype(w.dtype)


def negated(data, w):
    return lambda w: -w


def pad(data, w):
    return lambda w: jnp.pad(w, 1)


def masked(data, w):
    mask = array(data, *w.shape) > 0
    return lambda w: jnp.where(mask, w, 0)


def join_with_another(data, w):
    i = axis_of(data, w)
    other = array(data, *w.shape)
    return lambda w: jnp.concatenate([other.astype(w.dtype), w], i)


def sine(data, w):
    return lambda w: jnp.sin(w)


def wider(data, w):
    return lambda w: w.astype(jnp.float32)


def barrier(data, w):
    return lambda w: lax.optimization_barrier(w)


NUMBERS = [times, times, negated, halves, pad, masked, join_with_another, sine, wider, barrier]


# Uses of a weight, with an input: at last it is contracted, or added up, or both.


def product(data, w, x_dtype):
    i = axis_of(data, w)
    x = array(data, 3, w.shape[i]).astype(x_dtype)
    result = data.draw(st.sampled_from([None, jnp.float32]))
    return x, lambda x, w: lax.dot_general(
        x, w, (((1,), (i,)), ((), ())), preferred_element_type=result
    )


def shared_product(data, w, x_dtype):
    """Some of the weight's axes are the input's too, contracted or not."""
    letters = "abcdef"[: w.ndim]
    kinds = [data.draw(st.sampled_from(["contract", "batch", "free"])) for _ in letters]
    mine = "".join(c for c, kind in zip(letters, kinds, strict=True) if kind != "free") + "z"
    out = "z" + "".join(c for c, kind in zip(letters, kinds, strict=True) if kind != "contract")
    size = dict(zip(letters, w.shape, strict=True), z=2)
    x = array(data, *(size[c] for c in mine)).astype(x_dtype)
    return x, lambda x, w: jnp.einsum(f"{mine},{letters}->{out}", x, w)


def scanned(data, w, x_dtype):
    """A loop over the first axis, as over layers."""
    x = array(data, *w.shape[1:]).astype(x_dtype)
    return x, lambda x, w: lax.scan(lambda c, w: (c, jnp.sum(x * w)), 0.0, w)[1]


def mapped(data, w, x_dtype):
    x = array(data, w.shape[-1]).astype(x_dtype)
    return x, lambda x, w: lax.map(lambda w: jnp.inner(w, x), w if w.ndim > 1 else w[None])


def elementwise(data, w, x_dtype):
    x = array(data, 2, *w.shape).astype(x_dtype)
    return x, lambda x, w: jnp.tanh(x * w)


USES = [product, product, shared_product, shared_product, scanned, mapped, elementwise]


def bare(use):
    return use


def cond(use):
    return lambda x, w: lax.cond(jnp.sum(x) > 0, use, lambda x, w: 2 * use(x, w), x, w)


def loop(use):
    return lambda x, w: lax.scan(lambda c, _: (c, use(x, w)), 0, None, length=2)[1]


def batched(use):
    return lambda x, w: jax.vmap(lambda s: use(x * s, w))(jnp.arange(1, 3, dtype=x.dtype))


NESTS = [bare, bare, jax.jit, jax.checkpoint, cond, loop, batched]

# How codes become a weight: by numbers that have no axes, so that every layout commutes with them.
DEQUANTIZE = [
    lambda c: c.astype(jnp.float32) * 0.1,
    lambda c: (c.astype(jnp.float32) - 3) * 0.1,
    lambda c: (c.astype(jnp.int32) - 3).astype(jnp.float32) / 8,
    lambda c: jnp.float32(0.1) * c - 0.25,
    lambda c: jnp.sin(jnp.arange(16.0))[c & 15],
    lambda c: jnp.where(c & 1, -0.5, 1.5) * jnp.exp2((c & 3).astype(jnp.float32)),
    lambda c: ((c >> 1) & 7).astype(jnp.float32) - 3.5,
    lambda c: jnp.where(c > 7, c - 8, c).astype(jnp.float32),
]


@dataclasses.dataclass(frozen=True)
class Program:
    """A weight on its way to its use. With ``whole``, it starts as the weight, not as its codes."""

    weight: Any
    roles: str
    quantized: bool
    dequantize: Callable
    before: list[Callable]  # steps that codes take
    after: list[Callable]
    use: Callable
    x: Any
    text: tuple[str, ...]  # what was drawn, for a person

    def run(self, w, x, whole=False):
        for step in self.before:
            w = step(w)
        if not whole:
            w = self.dequantize(w)
        for step in self.after:
            w = step(w)
        return self.use(x, w)


@st.composite
def programs(draw_from):
    data = draw_from(st.data())
    shape = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    roles = [data.draw(ROLES) for _ in shape]
    if not {"in", "out"} & {*roles}:
        roles[data.draw(st.integers(0, len(roles) - 1))] = "out"
    dtype = data.draw(st.sampled_from([jnp.float32] * 3 + [jnp.bfloat16, jnp.int8, jnp.uint8]))
    quantized = jnp.issubdtype(dtype, jnp.integer)
    key = jax.random.key(data.draw(st.integers(0, 9)))
    if quantized:
        weight = jax.random.randint(key, shape, 0, 16).astype(dtype)
    else:
        weight = (1 + jax.random.normal(key, shape)).astype(dtype)
    dequantize = data.draw(st.sampled_from(DEQUANTIZE)) if quantized else lambda w: w

    w, before, after, text = weight, [], [], []

    def drawn(choices):
        choice = data.draw(st.sampled_from(choices))
        text.append(f"{choice.__name__} of {w.shape} {w.dtype}")
        return choice

    for _ in range(data.draw(st.integers(0, 2)) if quantized else 0):
        before.append(drawn(CODES)(data, w))
        w = jax.eval_shape(before[-1], w)
    w = jax.eval_shape(dequantize, w)
    for _ in range(data.draw(st.integers(0, 4))):
        if w.ndim and w.ndim < 5 and w.size < 500:
            after.append(drawn(LAYOUT + NUMBERS)(data, w))
            w = jax.eval_shape(after[-1], w)
    x_dtype = jnp.float32 if w.dtype == jnp.float32 else jnp.bfloat16
    x_dtype = data.draw(st.sampled_from([x_dtype, x_dtype, jnp.float32, jnp.bfloat16]))
    x, use = drawn(USES)(data, w, x_dtype)
    use = drawn(NESTS)(use)
    roles = " ".join(roles)
    return Program(weight, roles, quantized, dequantize, before, after, use, x, tuple(text))


def distance(got, want):
    """As one vector, since a number that is a sum of canceling ones is relative to these."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in want]
    got, want = (np.concatenate([np.ravel(a).astype(float) for a in xs]) for xs in (got, want))
    assert np.isfinite(want).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-3)


def check(program):
    params = {"w": program.weight}
    target = ha.Target("w", program.roles, quantized=program.quantized)
    scales = random_scales(ha.init(ha.plan(params, target)))
    forward = ha.adapt(lambda params, x: program.run(params["w"], x), materialize="allow")

    def oracle(params, scales, x):
        w = program.dequantize(params["w"]) if program.quantized else params["w"]
        wide = ha.merge({"w": w.astype(jnp.float32)}, scales)["w"]
        return program.run(wide.astype(w.dtype), x, whole=True)

    def measured(fn):
        def value_and_out(scales, params, x):
            out = fn(params, scales, x)
            return loss(out), out

        return jax.jit(jax.grad(value_and_out, (0, 2), has_aux=True))

    got, want = (measured(fn)(scales, params, program.x) for fn in (forward, oracle))
    narrow = jnp.bfloat16 in (program.weight.dtype, program.x.dtype)
    errors = distance(got[1], want[1]), distance(got[0], want[0])
    assert errors[0] < (3e-2 if narrow else 1e-5), errors
    assert errors[1] < (0.3 if narrow else 1e-4), errors  # of sums that nearly cancel


@settings(max_examples=25)
@given(programs())
def test_any_program(program):
    check(program)
