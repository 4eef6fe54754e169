"""`adapt` against merged weights, over JAX's constructs. Programs are plain jax.numpy."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hyperadapt_jax as ha
from hyperadapt_jax.interpreter import jax_versions
from tests.core.oracle import bits, check_adapt, draw, error, loss, random_scales

pytestmark = pytest.mark.usefixtures("optimized")

X = draw(1, 5, 8)
BTD = draw(2, 2, 5, 8)
SQUARE = {"w": draw(3, 8, 8)}
STACK = {"w": draw(4, 4, 8, 8)}
IN_OUT = [("w", "in out")]
STACKED = [("w", "stack in out")]


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, and the weights that may be materialized in it (none, unless it says so)."""

    fn: Any
    params: Any
    targets: Any
    args: tuple
    materialized: tuple = ()
    exact: bool = True
    differentiable: bool = True


def layer(x, w):
    return jnp.tanh(x @ w), None


def carried(i, state):
    x, params = state
    return jnp.tanh(x @ params["w"][i]), params


def not_hoisted(state):
    """A while loop whose carried weights pass through a barrier untouched."""
    i, x, w = state
    return i + 1, jnp.tanh(x @ w), w


@jax.custom_jvp
def doubled_slope(x, w):
    return x @ w


@doubled_slope.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2 * (dx @ w + x @ dw)


@jax.custom_vjp
def straight_through(x, w):
    return jnp.round(4 * x) @ w / 4


straight_through.defvjp(
    lambda x, w: (straight_through(x, w), (x, w)),
    lambda saved, g: (g @ saved[1].T, 3 * saved[0].T @ g),
)


def score(params, x):
    """The gradient of an energy: the weight is used forward and, inside grad, transposed."""
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ params["w"]) ** 2))(x)


def rms(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def qkv(params, x):
    q, k, v = jnp.split(x @ params["w"], 3, -1)
    return q * jnp.tanh(k) + v


def conv(params, x, **kwargs):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=numbers, **kwargs
    )


def conv_with(**kwargs):
    return lambda params, x: conv(params, x, **kwargs)


def transposed_conv(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_transpose(x, params["w"], (2, 2), "SAME", dimension_numbers=numbers)


def saved_dots(params, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return lax.scan(jax.checkpoint(layer, policy=policy), x, params["w"])[0]


def named(params, x):
    from jax.ad_checkpoint import checkpoint_name

    policy = jax.checkpoint_policies.save_only_these_names("hidden")
    body = jax.checkpoint(
        lambda x: jnp.tanh(checkpoint_name(x @ params["w"], "hidden") @ params["w"]), policy=policy
    )
    return body(x)


def nested_scan(params, x):
    def outer(x, w):
        return lax.scan(lambda c, _: (jnp.tanh(c @ w), c.sum()), x, None, length=2)

    x, sums = lax.scan(outer, x, params["w"], reverse=True)
    return x, sums


def per_row(x, w):
    return jnp.einsum("bi,bio->bo", x, w)


def conditioned(use):
    """One class's weight made into one for each example of a batch, and then used."""
    return lambda p, x: use(x, p["w"] * CONDITIONS)


def summed_layers(x, ws):
    return lax.scan(lambda total, w: (total + x @ w, None), jnp.zeros((5, 4)), ws)[0]


ONE_CLASS = {"w": draw(6, 1, 8, 4)}
CONDITIONS = draw(7, 5, 8, 4)
PICKED = jnp.array([4, 0, 1, 3, 3])
IMAGE = draw(5, 2, 6, 5, 8)
CASES = {
    "matmul": Case(lambda p, x: x @ p["w"], SQUARE, IN_OUT, (X,)),
    "one row": Case(lambda p, x: x @ p["w"], {"w": draw(6, 8, 1)}, IN_OUT, (X,), ()),
    "one column": Case(lambda p, x: x[:, :1] @ p["w"], {"w": draw(6, 1, 7)}, IN_OUT, (X,), ()),
    "empty batch": Case(lambda p, x: x[:0] @ p["w"], SQUARE, IN_OUT, (X,)),
    "vector input": Case(lambda p, x: x[0] @ p["w"], SQUARE, IN_OUT, (X,)),
    "row alone": Case(lambda p, x: x @ p["w"], SQUARE, [("w", "- out")], (X,)),
    "col alone": Case(lambda p, x: x @ p["w"], SQUARE, [("w", "in -")], (X,)),
    "out x in": Case(lambda p, x: p["w"] @ x.T, {"w": draw(6, 3, 8)}, [("w", "out in")], (X,)),
    "transposed": Case(lambda p, x: x @ p["w"].T.T.T, SQUARE, [("w", "out in")], (X,)),
    "reused": Case(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T + x @ p["w"], SQUARE, IN_OUT, (X,)),
    "bias": Case(
        lambda p, x: x @ p["w"] + p["b"], {"w": draw(6, 8, 3), "b": draw(7, 3)}, IN_OUT, (X,)
    ),
    "two weights": Case(
        lambda p, x: jax.nn.silu(x @ p["w"]) * (x @ p["v"]),
        {"w": draw(6, 8, 3), "v": draw(7, 8, 3)},
        [("w|v", "in out")],
        (X,),
    ),
    "query projection": Case(
        lambda p, x: jnp.einsum("btd,dnh->bnth", x, p["w"]),
        {"w": draw(6, 8, 3, 4)},
        [("w", "in out out")],
        (BTD,),
    ),
    "output projection": Case(
        lambda p, x: jnp.einsum("bnh,nhd->bd", x.reshape(-1, 2, 4), p["w"]),
        {"w": draw(6, 2, 4, 3)},
        [("w", "in in out")],
        (X,),
    ),
    "experts, own inputs": Case(
        lambda p, x: jnp.einsum("ecd,edf->ecf", x.reshape(2, 5, 8), p["w"]),
        {"w": draw(6, 2, 8, 3)},
        STACKED,
        (BTD,),
    ),
    "experts, one input": Case(
        lambda p, x: jnp.einsum("btd,edf->btef", x, p["w"]),
        {"w": draw(6, 3, 8, 4)},
        STACKED,
        (BTD,),
        exact=False,  # the experts' axis becomes a batch axis: another order of summation
    ),
    "three operands": Case(
        lambda p, x: jnp.einsum("ab,bc,cd->da", x, p["w"], p["v"]),
        {"w": draw(6, 8, 3), "v": draw(7, 3, 8)},
        [("w|v", "in out")],
        (X,),
    ),
    "weight times weight": Case(
        lambda p, x: x @ (p["w"] @ p["w"]), SQUARE, IN_OUT, (X,), materialized=("w",)
    ),
    "dot_general with batch": Case(
        lambda p, x: lax.dot_general(p["w"], x, (((2,), (2,)), ((0,), (0,)))),
        {"w": draw(6, 2, 3, 8)},
        [("w", "stack out in")],
        (BTD,),
    ),
    "preferred type": Case(
        lambda p, x: lax.dot_general(
            x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        ),
        SQUARE,
        IN_OUT,
        (X,),
    ),
    "reshape": Case(
        lambda p, x: x @ p["w"].reshape(8, 12), {"w": draw(6, 8, 3, 4)}, [("w", "in out out")], (X,)
    ),
    "reshape that splits": Case(
        lambda p, x: jnp.einsum("td,dnh->tnh", x, p["w"].reshape(8, 2, 1, 3)[:, :, 0]),
        {"w": draw(6, 8, 6)},
        IN_OUT,
        (X,),
    ),
    "reshape beside axes of one": Case(
        lambda p, x: x @ p["w"].reshape(8, 1, 3)[:, 0].reshape(1, 8, 1, 3)[0, :, 0],
        {"w": draw(6, 1, 8, 3, 1)},
        [("w", "out in out stack")],
        (X,),
    ),
    "reshape that mixes": Case(
        lambda p, x: x.reshape(-1)[:16] @ p["w"].reshape(16, 4),
        SQUARE,
        IN_OUT,
        (X,),
        materialized=("w",),
    ),
    "slices": Case(lambda p, x: x[:, :6:2] @ p["w"][1:7:2, ::-1][:, 2:] + 0, SQUARE, IN_OUT, (X,)),
    "fused qkv": Case(qkv, {"w": draw(6, 8, 9)}, IN_OUT, (X,)),
    "split weight": Case(
        lambda p, x: sum(x @ w for w in jnp.split(p["w"], 2, 1)), SQUARE, IN_OUT, (X,)
    ),
    "a row times a column": Case(
        lambda p, x: x * p["w"], {"w": draw(6, 1, 2)}, IN_OUT, (X[:, :1],)
    ),
    "one number times a column": Case(
        lambda p, x: jnp.tanh(x * p["w"]), {"w": draw(6, 1, 1)}, IN_OUT, (X[:, :1],)
    ),
    "broadcast": Case(lambda p, x: x @ jnp.broadcast_to(p["w"], (2, 8, 8)), SQUARE, IN_OUT, (BTD,)),
    "stop gradient": Case(lambda p, x: x @ lax.stop_gradient(p["w"]), SQUARE, IN_OUT, (X,)),
    "barrier": Case(
        lambda p, x: jnp.matmul(*lax.optimization_barrier((x, p["w"]))), SQUARE, IN_OUT, (X,)
    ),
    "negated, divided": Case(lambda p, x: x @ (-p["w"] / 3.0), SQUARE, IN_OUT, (X,)),
    "tied embedding": Case(
        lambda p, t: jnp.tanh(p["w"][t]) @ p["w"].T,
        {"w": draw(6, 9, 4)},
        IN_OUT,
        (jnp.array([[1, 8]]),),
    ),
    "take with fill": Case(
        lambda p, t: jnp.take(p["w"], t, axis=1, mode="fill", fill_value=0),
        {"w": draw(6, 9, 4)},
        IN_OUT,
        (jnp.array([3, 7, -1]),),
    ),
    "more rows than the table": Case(
        lambda p, t: jnp.tanh(p["w"][t]),
        {"w": draw(6, 2, 4)},
        IN_OUT,
        (jnp.array([0, 1, 1]),),
        materialized=("w",),
    ),
    "embedding, norm, dense": Case(
        lambda p, t: rms(p["w"][t]) @ p["v"] + p["w"][t] @ p["u"],
        {"w": draw(6, 9, 4), "v": draw(7, 4, 8), "u": draw(8, 4, 8)},
        [("w|v", "in out")],
        (jnp.array([[1, 8, 3]]),),
        exact=False,  # compiled, the norm's sum + x * x is rounded once; not with a factor between
    ),
    "embedding, convolution": Case(
        lambda p, t: conv({"w": p["v"]}, p["w"][t]),
        {"w": draw(6, 19, 4), "v": draw(7, 2, 2, 4, 8)},
        [("w", "in out"), ("v", "- - in out")],
        (jnp.array([[[1, 8, 3], [11, 3, 5]]]),),
    ),
    "expert by index": Case(
        lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][jnp.array([0, 3, 3, 1, 2])]),
        STACK,
        STACKED,
        (X,),
    ),
    "cosine of a weight": Case(
        lambda p, x: x @ jnp.cos(p["w"]), SQUARE, IN_OUT, (X,), materialized=("w",)
    ),
    "norm scale": Case(lambda p, x: x * p["w"], {"w": draw(6, 8)}, [("w", "out")], (X,)),
    "convolution": Case(conv, {"w": draw(6, 3, 2, 8, 4)}, [("w", "- - in out")], (IMAGE,)),
    "grouped convolution": Case(
        conv_with(feature_group_count=2),
        {"w": draw(6, 3, 3, 4, 6)},
        [("w", "- - in out")],
        (IMAGE,),
    ),
    "depthwise convolution": Case(
        conv_with(feature_group_count=8, rhs_dilation=(2, 1)),
        {"w": draw(6, 3, 3, 1, 8)},
        [("w", "- - in out")],
        (IMAGE,),
    ),
    "transposed convolution": Case(
        transposed_conv, {"w": draw(6, 2, 2, 8, 3)}, [("w", "- - in out")], (IMAGE,)
    ),
    "convolution over spatial in": Case(
        conv, {"w": draw(6, 3, 2, 8, 4)}, [("w", "in - in out")], (IMAGE,), materialized=("w",)
    ),
    "reshaped depthwise kernel": Case(
        lambda p, x: conv({"w": p["w"].reshape(3, 3, 1, 8)}, x, feature_group_count=8),
        {"w": draw(6, 3, 3, 8, 1)},
        [("w", "- - in out")],
        (IMAGE,),
    ),
    "conditioned, indexed": Case(
        conditioned(lambda x, w: per_row(x, w[PICKED])), ONE_CLASS, STACKED, (X,)
    ),
    "conditioned, taken with fill": Case(
        conditioned(lambda x, w: per_row(x, jnp.take(w, PICKED, 0, mode="fill", fill_value=0))),
        ONE_CLASS,
        STACKED,
        (X,),
    ),
    "conditioned, divided": Case(
        lambda p, x: per_row(x, (p["w"] / (CONDITIONS + 4))[PICKED]), ONE_CLASS, STACKED, (X,)
    ),
    "conditioned, sliced and split": Case(
        conditioned(lambda x, w: x @ w[2] + sum(x @ part[0] for part in jnp.split(w, 5))),
        ONE_CLASS,
        STACKED,
        (X,),
    ),
    "conditioned, sliced where the program runs": Case(
        conditioned(lambda x, w: x @ lax.dynamic_index_in_dim(w, jnp.argmax(x[0]) % 5, 0, False)),
        ONE_CLASS,
        STACKED,
        (X,),
    ),
    "conditioned, scanned": Case(conditioned(summed_layers), ONE_CLASS, STACKED, (X,)),
    "conditioned, mapped": Case(
        conditioned(lambda x, w: lax.map(lambda w: x @ w, w)), ONE_CLASS, STACKED, (X,)
    ),
    "conditioned, vmapped": Case(
        conditioned(lambda x, w: jax.vmap(jnp.dot)(x, w)), ONE_CLASS, STACKED, (X,)
    ),
    "conditioned by one slice": Case(
        lambda p, x: x @ (p["w"][2:3] * CONDITIONS[0, :, 0][:, None])[::-1],
        {"w": draw(6, 4, 6)},
        IN_OUT,
        (X,),
    ),
    "conditioned by one row looked up": Case(
        lambda p, i, x: x @ (p["w"][i] * CONDITIONS[0, :, :1])[1:5].T,
        {"w": draw(6, 9, 8)},
        IN_OUT,
        (jnp.array([7]), X),
    ),
    "one entry": Case(lambda p, x: p["w"][2, 5] * x, SQUARE, IN_OUT, (X,)),
    "scan over one layer": Case(
        lambda p, x: lax.scan(layer, x, p["w"])[0], {"w": draw(4, 1, 8, 8)}, STACKED, (X,)
    ),
    "jit inside": Case(lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x), SQUARE, IN_OUT, (X,)),
    "remat": Case(
        lambda p, x: jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]) @ p["w"])(x),
        SQUARE,
        IN_OUT,
        (X,),
    ),
    "remat, saved names": Case(named, SQUARE, IN_OUT, (X,)),
    "scan over layers": Case(lambda p, x: lax.scan(layer, x, p["w"])[0], STACK, STACKED, (X,)),
    "scan over layers, shared vectors": Case(
        lambda p, x: lax.scan(layer, x, p["w"])[0], STACK, [("w", "- in out")], (X,)
    ),
    "scan over layers, unrolled": Case(
        lambda p, x: lax.scan(layer, x, p["w"], unroll=2)[0], STACK, STACKED, (X,)
    ),
    "scan over remat, saved dots": Case(saved_dots, STACK, STACKED, (X,)),
    "scan, weight constant": Case(
        lambda p, x: lax.scan(lambda c, _: layer(c, p["w"]), x, None, length=3)[0],
        SQUARE,
        IN_OUT,
        (X,),
    ),
    "nested scans": Case(nested_scan, STACK, STACKED, (X,)),
    "fori over a carried stack": Case(
        lambda p, x: lax.fori_loop(0, 4, carried, (x, p))[0], STACK, STACKED, (X,)
    ),
    "while, carried weight": Case(
        lambda p, x: lax.while_loop(lambda s: s[0] < 3, not_hoisted, (0, x, p["w"]))[1],
        SQUARE,
        IN_OUT,
        (X,),
        differentiable=False,
    ),
    "while, constant weight in the condition": Case(
        lambda p, x: lax.while_loop(
            lambda x: jnp.sum((x @ p["w"]) ** 2) > 1e-2, lambda x: 0.3 * x @ p["w"], x
        ),
        SQUARE,
        IN_OUT,
        (X,),
        differentiable=False,
    ),
    "while, weight that changes": Case(
        lambda p, x: lax.fori_loop(0, 3, lambda i, s: (s[0] @ s[1], 2 * s[1]), (x, p["w"]))[0],
        SQUARE,
        IN_OUT,
        (X,),
        materialized=("w",),
    ),
    "map by index": Case(
        lambda p, x: lax.map(lambda i: x @ p["w"][i], jnp.arange(4)), STACK, STACKED, (X,)
    ),
    "cond": Case(
        lambda p, x: lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x @ p["w"].T, x),
        SQUARE,
        IN_OUT,
        (X,),
    ),
    "switch": Case(
        lambda p, i, x: lax.switch(i, [lambda x, j=j: x @ p["w"][j] for j in range(4)], x),
        STACK,
        STACKED,
        (jnp.array(2), X),
    ),
    "cond that picks a weight": Case(
        lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: 2 * p["w"]),
        SQUARE,
        IN_OUT,
        (X,),
        materialized=("w",),
    ),
    "vmap inside": Case(
        lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"][:2], x), STACK, STACKED, (BTD,)
    ),
    "vmap inside, one input": Case(
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), STACK, STACKED, (X,), exact=False
    ),
    "grad inside": Case(score, SQUARE, IN_OUT, (X,)),
    "custom_jvp": Case(
        lambda p, x: doubled_slope(x, p["w"]), SQUARE, IN_OUT, (X,), materialized=("w",)
    ),
    "custom_vjp": Case(
        lambda p, x: straight_through(x, p["w"]), SQUARE, IN_OUT, (X,), materialized=("w",)
    ),
    "custom_jvp beside": Case(lambda p, x: jax.nn.relu(x @ p["w"]), SQUARE, IN_OUT, (X,)),
    "returned": Case(lambda p, x: p["w"], SQUARE, IN_OUT, (X,), materialized=("w",)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_merged_weights(name):
    case = CASES[name]
    found = check_adapt(
        case.fn,
        case.params,
        case.targets,
        *case.args,
        exact=case.exact,
        differentiable=case.differentiable,
        # An array times a low-rank term is of no low rank.
        low_rank="materialized" if name.startswith("conditioned, ") else "as the vectors",
    )
    assert found.materialized == case.materialized
    assert not found.unused
    if not case.materialized:
        assert found.on_activations == tuple(ha.init(ha.plan(case.params, *case.targets)))


def make(name, seed=7):
    case = CASES[name]
    scales = random_scales(ha.init(ha.plan(case.params, *case.targets)), seed)
    return case, ha.adapt(case.fn), scales


DIFFERENTIABLE = [
    "reused",
    "scan over remat, saved dots",
    "switch",
    "convolution",
    "tied embedding",
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_and_reverse_mode_agree_with_the_oracle(name):
    case, forward, scales = make(name)
    direction = random_scales(scales, seed=8)

    def ours(scales):
        return forward(case.params, scales, *case.args)

    def oracle(scales):
        return case.fn(ha.merge(case.params, scales), *case.args)

    assert (
        error(jax.jvp(ours, (scales,), (direction,)), jax.jvp(oracle, (scales,), (direction,)))
        < 1e-5
    )
    out, pull = jax.vjp(ours, scales)
    _, pull_oracle = jax.vjp(oracle, scales)
    assert error(pull(jnp.cos(out)), pull_oracle(jnp.cos(out))) < 1e-5


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_over_adapters_equals_one_by_one(name):
    case, forward, _ = make(name)
    adapters = [make(name, seed)[2] for seed in range(8)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)

    def value_and_grad(scales):
        return jax.value_and_grad(lambda s: loss(forward(case.params, s, *case.args)))(scales)

    together = jax.jit(jax.vmap(value_and_grad))(stacked)
    one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(value_and_grad), adapters))
    assert error(together, one_by_one) < 1e-5


@pytest.mark.parametrize("name", ["matmul", "scan over remat, saved dots", "convolution"])
def test_adapting_an_adapted_function_applies_both(name):
    case, forward, first = make(name)
    _, _, second = make(name, seed=9)
    both = ha.adapt(forward, materialize="error")
    got = jax.jit(both)(case.params, second, first, *case.args)
    want = jax.jit(forward)(case.params, ha.compose(first, second), *case.args)
    assert error(got, want) < 1e-5


def test_shards_of_size_one_are_gathered_with_their_vectors():
    """Each device holds one row of the weight, and so one number of its vector."""
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(params, x):
        def inner(w, x):
            own = w[0] * lax.axis_index("d")  # of size one before it is gathered, too
            return x @ lax.all_gather(w, "d", tiled=True) + lax.psum(own, "d")

        specs = (spec("d"), spec())
        return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=spec(), check_vma=False)(
            params["w"], x
        )

    params = {"w": draw(6, 8, 3)}
    scales = random_scales(ha.init(ha.plan(params, *IN_OUT)))
    forward = jax.jit(ha.adapt(fn, materialize="error"))
    assert error(forward(params, scales, X), fn(ha.merge(params, scales), X)) < 1e-5


def test_runs_operation_by_operation_outside_jit():
    case, forward, scales = make("scan over layers")
    eager, jitted = (f(case.params, scales, *case.args) for f in (forward, jax.jit(forward)))
    assert error(eager, jitted) < 1e-5
    zeros = jax.tree.map(jnp.zeros_like, scales)
    base = case.fn(case.params, *case.args)
    assert bits(forward(case.params, zeros, *case.args)) == bits(base)


def test_arguments_that_are_no_arrays_reach_the_function_as_they_are():
    def fn(params, x, activation, *, train, rate=0.5, names=("a", None)):
        assert train is True and names == ("a", None) and rate == 0.25
        return activation(x @ params["w"]) * rate

    scales = ha.init(ha.plan(SQUARE, *IN_OUT))
    got = ha.adapt(fn)(SQUARE, scales, X, jnp.tanh, train=True, rate=0.25)
    assert bits(got) == bits(fn(SQUARE, X, jnp.tanh, train=True, rate=0.25))


def test_adapting_a_function_twice_compiles_it_once():
    traces = []

    def fn(params, x):
        traces.append(x)
        return x @ params["w"]

    scales = ha.init(ha.plan(SQUARE, *IN_OUT))
    run = jax.jit(lambda f, *args: f(*args), static_argnums=0)
    for _ in range(2):
        run(ha.adapt(fn), SQUARE, scales, X)
    assert len(traces) == 1 and ha.adapt(fn) == ha.adapt(fn)
    assert ha.adapt(fn) != ha.adapt(fn, materialize="allow")
    assert ha.adapt(fn).__name__ == "adapt(fn)"


def test_layers_that_are_alike_are_traced_once():
    """As in the base, an unrolled stack of one checkpointed block holds one jaxpr, used by each."""
    block = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))

    def fn(params, x):
        for w in params:
            x = block(x, w)
        return x

    params = [draw(i, 8, 8) for i in range(6)]
    scales = ha.init(ha.plan(params, (".", "in out")))

    def bodies(jaxpr):
        eqns = [e for e in jaxpr.eqns if jax_versions.name_of(e) == "remat2"]
        return len(eqns), len({id(jax_versions.remat_params(e)[0]) for e in eqns})

    assert bodies(jax.make_jaxpr(fn)(params, X)) == (6, 1)
    assert bodies(jax.make_jaxpr(ha.adapt(fn))(params, scales, X)) == (6, 1)
    found = ha.explain(ha.adapt(fn), params, scales, X)
    assert found.on_activations == tuple("012345")
    with pytest.warns(ha.MaterializedWarning, match="6 of 6 adapted weights"):
        cosine = jax.checkpoint(lambda x, w: x @ jnp.cos(w))
        ha.adapt(lambda params, x: [cosine(x, w) for w in params])(params, scales, X)


@pytest.fixture
def next_checkpoint():
    """The version of ``jax.checkpoint`` that JAX 0.12 announces: another primitive."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("jax_remat3 is not complete before JAX 0.12")
    before = jax.config.jax_remat3
    jax.config.update("jax_remat3", True)
    yield
    jax.config.update("jax_remat3", before)


@pytest.mark.parametrize("policy", [None, "dots_saveable", "names"])
def test_the_next_checkpoint_keeps_what_its_policy_says(next_checkpoint, policy):
    from jax.ad_checkpoint import checkpoint_name

    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names("h") if policy == "names" else policy
    policy = getattr(policies, policy) if isinstance(policy, str) else policy
    params = {"w": draw(1, 8, 6), "v": draw(2, 6, 7)}

    def fn(params, x):
        def body(x):
            return jnp.tanh(checkpoint_name(jnp.tanh(x @ params["w"]), "h") @ params["v"])

        return jax.checkpoint(body, policy=policy)(x)

    found = check_adapt(fn, params, [(".", "in out")], X)
    assert not found.materialized

    def saved(fn, over):
        shapes = [r.shape for r in jax.tree.leaves(jax.vjp(fn, over)[1])]
        return sorted(s for s in shapes if s[:1] == X.shape[:1])  # of the activations

    scales = random_scales(ha.init(ha.plan(params, (".", "in out"))))
    ours = saved(lambda scales: ha.adapt(fn)(params, scales, X), scales)
    assert ours == saved(lambda params: fn(params, X), params)


def test_the_next_derivative_rules_are_kept():
    """Under JAX's next flags too, a custom derivative rule gets the multiplied-out weight."""
    flags = ("jax_custom_vjp3", "jax_custom_jvp3")
    if not all(hasattr(jax.config, flag) for flag in flags):
        pytest.skip("this JAX does not have them")
    try:
        for flag in flags:
            jax.config.update(flag, True)
        for name in ("custom_jvp", "custom_vjp"):
            case = CASES[name]
            found = check_adapt(case.fn, case.params, case.targets, *case.args)
            assert found.materialized == case.materialized
            assert f"{name}_call" in str(found) and "its custom derivative rule" in str(found)
    finally:
        for flag in flags:
            jax.config.update(flag, False)


def test_results_keep_their_structure():
    forward = ha.adapt(lambda p, x: {"y": x @ p["w"], "aux": (x, None, np.float32(2))})
    out = forward(SQUARE, ha.init(ha.plan(SQUARE, *IN_OUT)), X)
    assert out["aux"][1] is None and out["y"].shape == (5, 8) and out["aux"][2] == 2


def test_narrow_vectors_multiply_in_float32():
    """A bfloat16 activation is scaled in float32 and rounded once."""
    x = draw(1, 4, 8, dtype=jnp.bfloat16)
    params = {"w": jnp.eye(8, dtype=jnp.bfloat16)}
    scales = random_scales(ha.init(ha.plan(params, ("w", "in -"))))
    want = (x.astype(jnp.float32) * (1 + scales["w"].col)).astype(jnp.bfloat16)
    got = ha.adapt(lambda p, x: x @ p["w"])(params, scales, x)
    assert got.dtype == jnp.bfloat16 and bits(got) == bits(want)


def test_a_bfloat16_operand_is_kept_for_the_backward_pass_as_it_is():
    params = {"w": draw(2, 8, 8, dtype=jnp.bfloat16)}
    x = draw(1, 64, 8, dtype=jnp.bfloat16)
    scales = random_scales(ha.init(ha.plan(params, *IN_OUT)))
    forward = ha.adapt(lambda p, x: x @ p["w"])
    _, pull = jax.vjp(lambda s: forward(params, s, x), scales)
    wide = [r for r in jax.tree.leaves(pull) if r.dtype == jnp.float32 and r.size >= x.size]
    assert not wide


def test_vectors_pass_a_dequantization():
    """The codes are the parameter, `codes.astype(x.dtype) * scale` the weight."""
    codes = jnp.arange(-32, 32, dtype=jnp.int8).reshape(8, 8)
    steps = jnp.abs(draw(8, 1, 8)) / 16

    def weight(params):
        return params["codes"].astype(jnp.float32) * params["steps"]

    params = {"codes": codes, "steps": steps}
    scales = random_scales(ha.init(ha.plan(params, ha.Target("codes", "in out", quantized=True))))
    forward = ha.adapt(lambda p, x: x @ weight(p), materialize="error")
    vectors = scales["codes"]
    dense = weight(params) * (1 + vectors.row) * (1 + vectors.col)[:, None]
    assert error(jax.jit(forward)(params, scales, X), X @ dense) < 1e-5
    grads = jax.grad(lambda s: loss(forward(params, s, X)))(scales)
    merged = {"w": weight(params)}
    oracle = jax.grad(lambda s: loss(X @ ha.merge(merged, s)["w"]))({"w": vectors})
    assert error(grads["codes"], oracle["w"]) < 1e-5


def test_integer_products_wait_for_the_dequantization():
    """int8 x int8 -> int32: the row vector is applied once the sum is made floating."""
    codes = jnp.arange(-32, 32, dtype=jnp.int8).reshape(8, 8)
    x = (jnp.arange(40) % 7 - 3).astype(jnp.int8).reshape(5, 8)

    def fn(params, x):
        total = lax.dot_general(
            x, params["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )
        return total.astype(jnp.float32) * 0.01

    params = {"w": codes}
    row = random_scales(ha.init(ha.plan(params, ha.Target("w", "- out", quantized=True))))
    want = fn(params, x) * (1 + row["w"].row)
    assert error(ha.adapt(fn, materialize="error")(params, row, x), want) < 1e-6
    both = ha.init(ha.plan(params, ha.Target("w", "in out", quantized=True)))
    with pytest.raises(ha.MaterializedError, match="w: integer codes cannot be scaled at `dot_gen"):
        ha.adapt(fn)(params, both, x)


def test_materialize_says_what_where_and_why():
    def fn(params, x):
        return x @ jnp.cos(params["w"])

    scales = ha.init(ha.plan(SQUARE, *IN_OUT))
    with pytest.warns(ha.MaterializedWarning) as caught:
        ha.adapt(fn)(SQUARE, scales, X)
    message = str(caught[0].message)
    for part in ("1 of 1 adapted", "w  ", "cos", "test_adapt.py:", "no vector passes through"):
        assert part in message
    assert caught[0].filename == __file__
    with pytest.raises(ha.MaterializedError, match="cos"):
        ha.adapt(fn, materialize="error")(SQUARE, scales, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ha.adapt(fn, materialize="allow")(SQUARE, scales, X)


# An einsum, its sizes, the weight's roles, and whether scaling the activations costs less.
COSTS = {
    "tensor train": ("brjk,rjl->bkl", dict(b=64, r=16, j=8, k=16, l=16), "in out out", False),
    "heads as inputs": ("bd,dnh->bnh", dict(b=256, d=64, n=8, h=8), "in in out", False),
    "narrow experts": ("td,edf->tef", dict(t=512, d=64, e=8, f=16), "stack in out", False),
    "one product a result": ("bij,ij->bij", dict(b=64, i=16, j=16), "in out", False),
    "two inputs": ("td,df->tf", dict(t=1024, d=2, f=64), "in out", False),
    "two outputs": ("td,df->tf", dict(t=1024, d=64, f=2), "in out", False),
    "dense": ("td,df->tf", dict(t=256, d=64, f=64), "in out", True),
    "few tokens, two outputs": ("td,df->tf", dict(t=8, d=64, f=2), "in out", True),
    "wide experts": ("td,edf->tef", dict(t=64, d=32, e=4, f=64), "stack in out", True),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_weight_is_multiplied_out_only_where_that_costs_less(name):
    equation, sizes, roles, scaled = COSTS[name]
    operands = equation.split("->")[0].split(",")
    x, w = (jax.ShapeDtypeStruct([sizes[c] for c in o], jnp.float32) for o in operands)
    scales = jax.eval_shape(lambda: ha.init(ha.plan({"w": w}, ("w", roles))))

    def fn(params, x):
        return jnp.einsum(equation, x, params["w"])

    def cost(forward):
        step = jax.value_and_grad(lambda s, p, x: jnp.sum(jnp.sin(forward(p, s, x))), (0, 2))
        compiled = jax.jit(step).lower(scales, {"w": w}, x).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    forward = ha.adapt(fn, materialize="allow")
    ours = cost(forward)
    merged = cost(lambda params, scales, x: fn(ha.merge(params, scales), x))
    found = ha.explain(forward, {"w": w}, scales, x)
    if scaled:
        assert found.on_activations == ("w",) and ours[0] < merged[0]
    else:
        assert found.materialized == ("w",) and all(u.reason for u in found.uses)
        assert ours[0] <= 1.02 * merged[0] and ours[1] <= 1.02 * merged[1]
        with pytest.raises(ha.MaterializedError, match="scaling"):
            jax.eval_shape(ha.adapt(fn, materialize="error"), {"w": w}, scales, x)


def test_explain_works_on_shapes_alone_and_names_what_is_not_used():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (SQUARE, X))
    params = {**shapes[0], "v": jax.ShapeDtypeStruct((3, 3), jnp.float32)}
    scales = jax.eval_shape(lambda: ha.init(ha.plan(params, ("w|v", "in out"))))
    found = ha.explain(ha.adapt(lambda p, x: x @ p["w"]), params, scales, shapes[1])
    assert found.on_activations == ("w",) and found.unused == ("v",) and not found.materialized
    assert "dot_general" in str(found) and "test_adapt.py" in str(found)


def test_errors_at_the_border():
    with pytest.raises(ValueError, match='materialize must be "allow", "warn" or "error"'):
        ha.adapt(lambda p: p, materialize="never")
    with pytest.raises(TypeError, match="adapt takes a function"):
        ha.adapt({"w": 1})
    forward = ha.adapt(lambda p, x: x @ p["w"])
    scales = ha.init(ha.plan(SQUARE, *IN_OUT))
    with pytest.raises(TypeError, match="explain takes what adapt"):
        ha.explain(jax.jit(forward), SQUARE, scales, X)
    with pytest.raises(ValueError, match="w: is scaled by the adapter, .* nearest: v"):
        forward({"v": SQUARE["w"]}, scales, X)
    with pytest.raises(ValueError, match=r"row has shape \(8,\)"):
        forward({"w": draw(1, 8, 3)}, scales, X)
