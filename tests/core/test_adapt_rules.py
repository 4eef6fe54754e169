"""The primitives of mixtures of experts, of joined and pruned weights, of lookups, of kernels."""

import dataclasses
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hyperadapt_jax as ha
from tests.core.oracle import bits, check_adapt, draw, error, random_scales

X = draw(1, 5, 8)
BATCHES = draw(2, 2, 5, 8)
IMAGE = draw(5, 2, 6, 5, 8)
EXPERTS = {"w": draw(3, 4, 8, 6)}
SIZES = jnp.array([2, 0, 1, 1])  # an empty group, and a row that belongs to none
SIZES_OF_BATCHES = jnp.array([[2, 0, 1, 1], [0, 5, 0, 0]])
PAIR = {"w": draw(6, 8, 6), "v": draw(7, 8, 6)}
WEIGHT = {"w": PAIR["w"]}
KERNELS = {"w": draw(8, 2, 3, 2, 8, 4)}
MASK = jnp.arange(48).reshape(8, 6) % 3 > 0
ZEROS = jnp.zeros((8, 6))
IN_OUT = [("w", "in out")]
BOTH = [("w|v", "in out")]
STACKED = [("w", "stack in out")]


@dataclasses.dataclass(frozen=True)
class Case:
    fn: Any
    params: Any
    targets: Any
    args: tuple = (X,)
    materialized: tuple = ()
    differentiable: bool = True


def ragged(dot, rows, groups, sizes=SIZES):
    numbers = lax.RaggedDotDimensionNumbers(dot, rows, groups)
    return lambda p, x: lax.ragged_dot_general(x, p["w"], sizes, numbers)


def experts(p, x):
    """Two of four experts for each token, sorted by expert, as mixtures of experts compute it."""
    weights, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=4)
    y = lax.ragged_dot(jax.nn.silu(lax.ragged_dot(x[order // 2], p["up"], sizes)), p["down"], sizes)
    y = jnp.zeros_like(y).at[order].set(y).reshape(-1, 2, 8)
    return jnp.sum(y * weights[..., None], axis=1)


BATCHED_SIZES = ragged((((2,), (2,)), ((0,), (1,))), [1], [0], SIZES_OF_BATCHES)
BATCHED_EXPERTS = {"w": draw(3, 4, 2, 8, 6)}

RAGGED = {
    "": Case(lambda p, x: lax.ragged_dot(x, p["w"], SIZES), EXPERTS, STACKED),
    "shared vectors": Case(
        lambda p, x: lax.ragged_dot(x, p["w"], SIZES), EXPERTS, [("w", "- in out")]
    ),
    "groups last": Case(
        ragged((((1,), (1,)), ((), ())), [0], [2]),
        {"w": draw(3, 6, 8, 4)},
        [("w", "out in stack")],
    ),
    "batch, its own groupings": Case(
        BATCHED_SIZES, BATCHED_EXPERTS, [("w", "stack stack in out")], (BATCHES,)
    ),
    "batch, vectors of the groups": Case(
        BATCHED_SIZES, BATCHED_EXPERTS, [("w", "stack - in out")], (BATCHES,)
    ),
    "rows before the ragged ones": Case(
        ragged((((2,), (1,)), ((), ())), [1], [0], SIZES_OF_BATCHES), EXPERTS, STACKED, (BATCHES,)
    ),
    "vmap": Case(
        lambda p, x: jax.vmap(lax.ragged_dot)(x, p["w"], SIZES_OF_BATCHES),
        {"w": draw(3, 2, 4, 8, 6)},
        [("w", "stack stack in out")],
        (BATCHES,),
    ),
    "grad inside": Case(
        lambda p, x: jax.grad(lambda x: jnp.sum(lax.ragged_dot(x, p["w"], SIZES) ** 2))(x),
        EXPERTS,
        STACKED,
    ),
    "contracted rows": Case(
        ragged((((0,), (0,)), ((), ())), [0], []),
        {"w": draw(3, 5, 6)},
        IN_OUT,
        differentiable=False,  # in JAX itself
    ),
    "batched rows": Case(
        ragged((((2,), (1,)), ((0,), (0,))), [0], [], jnp.array([1, 1])),
        {"w": draw(3, 2, 8, 6)},
        STACKED,
        (BATCHES,),
        differentiable=False,
    ),
    "weight on the left": Case(
        lambda p, x: lax.ragged_dot(p["w"], jnp.stack([x.T] * 4), SIZES),
        {"w": draw(3, 6, 8)},
        [("w", "out -")],
    ),
    "of looked-up rows": Case(
        lambda p, x: lax.ragged_dot(p["e"][jnp.arange(5)], p["w"], SIZES),
        {"e": draw(2, 9, 8), **EXPERTS},
        [("w", "stack in out"), ("e", "in out")],
    ),
    "mixture of experts": Case(
        experts,
        {"router": draw(1, 8, 4), "up": draw(2, 4, 8, 6), "down": draw(3, 4, 6, 8)},
        [("up|down", "stack in out"), ("router", "in out")],
    ),
}

JOINED = {
    "out axes": Case(
        lambda p, x: x @ jnp.concatenate([p["w"], np.zeros((8, 2), p["w"].dtype), p["v"]], 1),
        PAIR,
        [("w|v", "- out")],
    ),
    "in axes": Case(
        lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([p["w"], p["v"]]),
        PAIR,
        [("w|v", "in -")],
    ),
    "with itself": Case(lambda p, x: x @ jnp.concatenate([p["w"], 2 * p["w"]], 1), WEIGHT, IN_OUT),
    "two whole weights": Case(
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1), PAIR, BOTH, materialized=("v", "w")
    ),
    "stacks": Case(
        lambda p, x: jnp.einsum("td,edf->etf", x, jnp.concatenate([p["w"], p["v"][None]])),
        {"w": draw(6, 2, 8, 6), "v": draw(7, 8, 6)},
        [("w", "stack in out"), ("v", "in out")],
    ),
    "stack": Case(
        lambda p, x: lax.scan(
            lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, jnp.stack([p["w"], p["v"]])
        )[0],
        PAIR,
        BOTH,
    ),
    "stack, last axis": Case(
        lambda p, x: jnp.einsum("td,dfe->etf", x, jnp.stack([p["w"], p["v"]], -1)),
        PAIR,
        BOTH,
    ),
    "looked-up rows": Case(
        lambda p, x: jnp.concatenate([p["w"][jnp.arange(5)], x[:, :6]]), WEIGHT, IN_OUT
    ),
    "padded": Case(lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))), WEIGHT, IN_OUT),
    "padded, cut, spread": Case(
        lambda p, x: x @ lax.pad(p["w"], jnp.zeros((), x.dtype), ((0, 0, 0), (-1, 3, 2))),
        WEIGHT,
        IN_OUT,
    ),
    "padded with ones": Case(
        lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2)), constant_values=1),
        WEIGHT,
        IN_OUT,
        materialized=("w",),
    ),
    "pruned": Case(lambda p, x: x @ jnp.where(MASK, p["w"], 0), WEIGHT, IN_OUT),
    "pruned by an argument": Case(
        lambda p, x, mask: x @ jnp.where(mask, jnp.zeros_like(p["w"]), p["w"]),
        WEIGHT,
        IN_OUT,
        (X, MASK),
    ),
    "pruned by zeros of NumPy": Case(
        lambda p, x: x @ jnp.where(MASK, p["w"], np.zeros((8, 6), p["w"].dtype)), WEIGHT, IN_OUT
    ),
    "pruned by zeros of JAX": Case(lambda p, x: x @ jnp.where(MASK, p["w"], ZEROS), WEIGHT, IN_OUT),
    "pruned inside a checkpoint": Case(
        lambda p, x: jax.checkpoint(lambda x, w: x @ jnp.tril(w))(x, p["w"]), WEIGHT, IN_OUT
    ),
    "pruned to ones": Case(
        lambda p, x: x @ jnp.where(MASK, p["w"], 1), WEIGHT, IN_OUT, materialized=("w",)
    ),
    "triangular stack": Case(
        lambda p, x: jnp.einsum("td,edf->etf", x, jax.vmap(jnp.triu)(p["w"])),
        {"w": draw(6, 2, 8, 6)},
        STACKED,
    ),
    "chosen sign": Case(
        lambda p, x: x @ jnp.where(jnp.sum(x) > 0, p["w"], -p["w"]), WEIGHT, IN_OUT
    ),
    "chosen weight": Case(
        lambda p, x: x @ jnp.where(jnp.sum(x) > 0, p["w"], p["v"]),
        PAIR,
        BOTH,
        materialized=("v", "w"),
    ),
    "zeros written": Case(
        lambda p, x, i: x @ p["w"].at[:, i].set(0), WEIGHT, IN_OUT, (X, jnp.array([3, 1]))
    ),
    "ones written": Case(lambda p, x: x @ p["w"].at[2].set(1), WEIGHT, IN_OUT, materialized=("w",)),
    "summed": Case(
        lambda p, x: x @ jnp.sum(p["w"], (0, 2)), {"w": draw(6, 2, 8, 3, 6)}, [("w", "- in - out")]
    ),
}

EMBEDDING = eqx.nn.Embedding(9, 4, key=jax.random.key(0))
TABLE = {"w": draw(6, 9, 4)}
TOKENS = jnp.array([[1, 8, 3], [0, 0, 2]])
STACK = {"w": draw(4, 5, 8, 6)}
CHOSEN = jnp.array([0, 4, 3, 1, 2])

LOOKED_UP = {
    "equinox": Case(lambda p, t: jax.vmap(p)(t), EMBEDDING, [("weight", "in out")], (TOKENS[0],)),
    "vmap twice": Case(
        lambda p, t: jax.vmap(jax.vmap(lambda i: jnp.tanh(p["w"][i])))(t) @ p["w"].T,
        TABLE,
        IN_OUT,
        (TOKENS,),
    ),
    "experts by dynamic index": Case(
        lambda p, x: jax.vmap(lambda x, i: x @ lax.dynamic_index_in_dim(p["w"], i, 0, False))(
            x, CHOSEN
        ),
        STACK,
        STACKED,
    ),
    "windows": Case(
        lambda p, x: jax.vmap(lambda x, i: x @ lax.dynamic_slice_in_dim(p["w"][1], i, 3, 1))(
            x, CHOSEN
        ),
        STACK,
        STACKED,
    ),
    "windows of inputs": Case(
        lambda p, x: jax.vmap(lambda x, i: x[:3] @ lax.dynamic_slice_in_dim(p["w"][1], i, 3))(
            x, 2 * CHOSEN
        ),
        STACK,
        STACKED,
    ),
    "table of each": Case(
        lambda p, x: jax.vmap(lambda x, w, i: x * w[i])(x[:, :6], p["w"], CHOSEN), STACK, STACKED
    ),
    "table of each, shared vectors": Case(
        lambda p, x: jax.vmap(lambda x, w, i: x * w[i])(x[:, :6], p["w"], CHOSEN),
        STACK,
        [("w", "- in out")],
    ),
    "two axes": Case(
        lambda p, x: x[:3, :6] * p["w"][jnp.array([1, 2, 4]), jnp.array([0, 3, 7])], STACK, STACKED
    ),
    "two axes apart": Case(
        lambda p, x: x[:3] * p["w"][jnp.array([1, 2, 4]), :, jnp.array([0, 3, 5])], STACK, STACKED
    ),
    "batch of one": Case(lambda p, t: p["w"][t], TABLE, IN_OUT, (TOKENS[0, :1],)),
    "one row": Case(lambda p, t: p["w"][t] + 1, TABLE, IN_OUT, (TOKENS[0, 0],)),
    "one known row": Case(lambda p, x: p["w"][3] + x[0, :4], TABLE, IN_OUT),
    **{
        f"take, {mode}": Case(
            lambda p, t, mode=mode: jnp.take(p["w"], t, axis=0, mode=mode, fill_value=0),
            TABLE,
            IN_OUT,
            (jnp.array([0, -1, 8, 20, -30]),),
        )
        for mode in ("fill", "clip", "wrap")
    },
    "take, filled with fives": Case(
        lambda p, t: jnp.take(p["w"], t, axis=0, mode="fill", fill_value=5),
        TABLE,
        IN_OUT,
        (jnp.array([0, 20]),),
        materialized=("w",),
    ),
}


def conv(x, w, **kwargs):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, **kwargs)


def each(p, x, **kwargs):
    return jax.vmap(lambda w, x: conv(x[None], w, **kwargs))(p["w"], x)


KERNEL = {"w": KERNELS["w"][0]}
CONVOLVED = {
    "batch groups": Case(
        lambda p, x: conv(x, p["w"], batch_group_count=2), KERNEL, [("w", "- - in out")], (IMAGE,)
    ),
    "looked-up rows": Case(
        lambda p, x: conv(p["e"][jnp.arange(60)].reshape(IMAGE.shape), p["w"]),
        {"e": draw(2, 70, 8), **KERNEL},
        [("w", "- - in out"), ("e", "in out")],
    ),
    "kernels, one input": Case(
        lambda p, x: jax.vmap(lambda w: conv(x, w))(p["w"]),
        KERNELS,
        [("w", "stack - - - out")],
        (IMAGE,),
    ),
    "kernels, own inputs": Case(each, KERNELS, [("w", "stack - - in out")], (IMAGE,)),
    "kernels, own inputs, shared vectors": Case(each, KERNELS, [("w", "- - - in out")], (IMAGE,)),
    "kernels of groups": Case(
        lambda p, x: each(p, x, feature_group_count=2),
        {"w": draw(8, 2, 3, 2, 4, 6)},
        [("w", "stack - - in out")],
        (IMAGE,),
    ),
    "kernels of channels": Case(
        lambda p, x: each(p, x, feature_group_count=8),
        {"w": draw(8, 2, 3, 2, 1, 8)},
        [("w", "stack - - in out")],
        (IMAGE,),
    ),
    "channels reshaped": Case(
        lambda p, x: conv(x, p["w"].reshape(3, 2, 1, 8), feature_group_count=8),
        {"w": draw(8, 3, 2, 8)},
        [("w", "- - in")],
        (IMAGE,),
    ),
}

# One of each rule is compared bit for bit too, at zero deltas.
EXACT = (
    ["ragged dot: ", "ragged dot: batch, its own groupings", "joined: out axes"]
    + ["joined: padded, cut, spread", "joined: pruned", "joined: zeros written", "joined: summed"]
    + ["looked up: equinox", "looked up: windows", "looked up: table of each", "looked up: one row"]
    + ["convolved: batch groups", "convolved: kernels of groups"]
)

GROUPS = {"ragged dot": RAGGED, "joined": JOINED, "looked up": LOOKED_UP, "convolved": CONVOLVED}
CASES = {f"{g}: {n}": case for g, cases in GROUPS.items() for n, case in cases.items()}


# Where vectors pass and no low-rank term does: a mask times one, or a product of each group's rows
# with others, is of no low rank.
DENSE = re.compile(
    r"ragged dot: (contracted rows|batched rows|weight on the left)"
    r"|joined: (pruned(?! to ones).*|triangular stack|chosen sign|zeros written)"
    r"|convolved: (batch groups|kernels.*)"
)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_merged_weights(name):
    case = CASES[name]
    found = check_adapt(
        case.fn,
        case.params,
        case.targets,
        *case.args,
        exact=name in EXACT,
        differentiable=case.differentiable,
        low_rank="materialized" if DENSE.fullmatch(name) else "as the vectors",
    )
    assert found.materialized == case.materialized
    assert not found.unused


CODES = {"w": jax.random.randint(jax.random.key(0), (4, 8, 6), -100, 100, jnp.int8)}
ROWS = jnp.array([0, 2, 1, 3, 4, 5, 7, 5])
ON_CODES = {
    "ragged dot": lambda w: lax.ragged_dot(X, w, SIZES),
    "take": lambda w: X @ jnp.take(w, ROWS, axis=1).astype(jnp.float32)[1],
    "take, clip": lambda w: X @ jnp.take(w[1], ROWS, axis=1, mode="clip").astype(jnp.float32),
    "index": lambda w: jnp.einsum("td,tdf->tf", X, w[CHOSEN % 4].astype(jnp.float32)),
    "concatenate": lambda w: X @ jnp.concatenate([w[0], w[2]], 1).astype(jnp.float32),
    "stack": lambda w: jnp.einsum("td,edf->tef", X, jnp.stack([w[0], w[2]]).astype(jnp.float32)),
    "pad": lambda w: X @ jnp.pad(w[1], ((0, 0), (1, 2))).astype(jnp.float32),
    "pruned": lambda w: X @ jnp.where(MASK, w[1], 0).astype(jnp.float32),
}


@pytest.mark.parametrize("name", ON_CODES)
def test_integer_codes_pass(name):
    fn = ON_CODES[name]
    zeros = ha.init(ha.plan(CODES, ha.Target("w", "stack in out", quantized=True)))
    forward = ha.adapt(lambda p: fn(p["w"]), materialize="allow")
    scales = random_scales(zeros)
    dense = ha.merge({"w": CODES["w"].astype(jnp.float32)}, scales)
    assert error(jax.jit(forward)(CODES, scales), fn(dense["w"])) < 1e-5
    if name not in ("concatenate", "stack"):  # there XLA sums in another order
        assert bits(jax.jit(forward)(CODES, zeros)) == bits(jax.jit(fn)(CODES["w"]))


@pytest.mark.parametrize("result", [jnp.int32, jnp.float32])
def test_integer_images_meet_integer_kernels(result):
    """The in side scales no integer: it is refused, unless the result has room for its scale."""
    codes, images = CODES["w"].reshape(4, 3, 8, 2), jnp.round(20 * IMAGE).astype(jnp.int8)

    def fn(w, x):
        return 0.01 * conv(x, w, preferred_element_type=result).astype(jnp.float32)

    for axes, fits in (("- - in out", result == jnp.float32), ("- - - out", True)):
        target = ha.Target("w", axes, quantized=True)
        scales = random_scales(ha.init(ha.plan({"w": codes}, target)))
        forward = ha.adapt(lambda p, x: fn(p["w"], x), materialize="allow")
        if not fits:
            with pytest.raises(ha.MaterializedError, match="integer codes.*conv_general_dilated"):
                forward({"w": codes}, scales, images)
            continue
        dense = ha.merge({"w": codes.astype(jnp.float32)}, scales)["w"]
        want = 0.01 * conv(images.astype(jnp.float32), dense)
        assert error(forward({"w": codes}, scales, images), want) < 1e-5


def test_zeros_are_known_outside_jit_too():
    scales = random_scales(ha.init(ha.plan(WEIGHT, *IN_OUT)))
    forward = ha.adapt(CASES["joined: pruned"].fn, materialize="error")
    want = X @ jnp.where(MASK, ha.merge(WEIGHT, scales)["w"], 0)
    assert error(forward(WEIGHT, scales, X), want) < 1e-5
    with jax.checking_leaks():
        jax.jit(forward)(WEIGHT, scales, X)


def cost(fn, *args):
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


COSTS = {
    "ragged dot": Case(
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([10, 0, 20, 4, 6, 8, 16, 0])),
        {"w": draw(1, 8, 32, 64)},
        STACKED,
        (draw(2, 64, 32),),
    ),
    "lookup": Case(
        lambda p, t: jax.vmap(lambda i: p["w"][i])(t),
        {"w": draw(1, 5000, 16)},
        IN_OUT,
        (jnp.arange(16),),
    ),
    "kernels": Case(
        each, {"w": draw(1, 2, 3, 3, 16, 16)}, [("w", "stack - - in out")], (draw(2, 2, 8, 8, 16),)
    ),
}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", COSTS)
def test_a_step_costs_less_than_with_merged_weights(name):
    case = COSTS[name]
    scales = random_scales(ha.init(ha.plan(case.params, *case.targets)))
    forward = ha.adapt(case.fn, materialize="error")

    def step(fn):
        return jax.value_and_grad(lambda scales: jnp.sum(fn(scales) ** 2))

    ours = cost(step(lambda s: forward(case.params, s, *case.args)), scales)
    merged = cost(step(lambda s: case.fn(ha.merge(case.params, s), *case.args)), scales)
    assert ours[0] < merged[0] and ours[1] < merged[1]
