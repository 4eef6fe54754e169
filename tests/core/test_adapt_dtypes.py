"""`adapt` in mixed dtypes: a scale is not rounded where the program itself does not round."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import hyperadapt_jax as ha
from tests.core.oracle import bits, draw, error, loss

pytestmark = pytest.mark.usefixtures("optimized")

F32, BF16, F16, INT8 = jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
X, W = draw(1, 5, 48), draw(2, 48, 6)
IMAGE, KERNEL = draw(3, 1, 4, 4, 16), draw(4, 2, 2, 16, 6)


def dot(x, w, result):
    numbers = (((1,), (0,)), ((), ()))
    return lax.dot_general(x, w, numbers, preferred_element_type=result)


def conv(x, w, result):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, preferred_element_type=result
    )


def experts(x, w, result):
    """A vector over contracted and free axes: the input is repeated."""
    return jnp.einsum("td,edf->tef", x, w.reshape(2, 24, 6), preferred_element_type=result)


def cast(x, dtype):
    return jnp.round(40 * x).astype(dtype) if dtype == INT8 else x.astype(dtype)


# An operation, the dtypes of its input, its weight and its result, and how close it comes.
MIXES = [
    (dot, BF16, F32, F32, 1e-6),
    (dot, F16, F32, F32, 1e-6),
    (dot, F32, BF16, F32, 1e-6),
    (dot, BF16, BF16, F32, 1e-5),
    (dot, F16, F16, F32, 1e-6),
    (dot, BF16, INT8, F32, 1e-5),
    (dot, BF16, E4M3, F32, 1e-5),
    (dot, E4M3, E4M3, F32, 1e-6),
    (dot, E4M3, E5M2, F32, 1e-6),
    (dot, E5M2, BF16, F32, 1e-6),
    (dot, INT8, INT8, F32, 1e-6),
    (dot, INT8, BF16, F32, 1e-6),
    (dot, E4M3, E4M3, BF16, 1e-2),
    (dot, BF16, F32, BF16, 1e-2),
    (dot, BF16, BF16, BF16, 1e-2),
    (experts, BF16, BF16, F32, 1e-5),
    (conv, BF16, BF16, F32, 1e-5),
    (conv, E4M3, E4M3, F32, 1e-6),
]


@pytest.mark.parametrize(("op", "x", "w", "result", "tolerance"), MIXES)
def test_a_scale_is_as_precise_as_the_result(op, x, w, result, tolerance):
    data, axes = ((IMAGE, KERNEL), "- - in out") if op is conv else ((X, W), "in out")
    shape = (2, 24, 6) if op is experts else data[1].shape
    params, x = (
        {"w": cast(data[1], w).reshape(shape)},
        cast(data[0][:, : 24 if op is experts else None], x),
    )
    axes = "stack in out" if op is experts else axes
    target = ha.Target("w", axes, quantized=w == INT8)
    zeros = ha.init(ha.plan(params, target))
    # A thousandth, of which bfloat16 keeps nothing.
    scales = jax.tree.map(
        lambda d: d + 1e-3 * jnp.arange(1.0, d.size + 1).reshape(d.shape) / d.size, zeros
    )
    forward = ha.adapt(lambda p, x: op(x, p["w"], result), materialize="error")

    def oracle(scales):
        dense = ha.merge({"w": params["w"].astype(F32)}, scales)["w"]
        return op(x.astype(F32), dense, F32).astype(result)

    def measured(fn):
        return jax.jit(jax.value_and_grad(lambda s: loss(fn(s))))

    got = forward(params, scales, x)
    assert got.dtype == result and error(got, oracle(scales)) < tolerance
    (_, grads), (_, wanted) = (
        measured(f)(scales) for f in (lambda s: forward(params, s, x), oracle)
    )
    assert error(grads, wanted) < 2e-2
    jitted = jax.jit(lambda p, x: op(x, p["w"], result))
    for base, ours in ((jitted, jax.jit(forward)), (forward.fn, forward)):
        assert bits(ours(params, zeros, x)) == bits(base(params, x))


@pytest.mark.parametrize("dtype", [E4M3, E5M2, F16])
def test_an_activation_at_its_dtypes_maximum_does_not_overflow(dtype):
    """Quantization by the largest number puts one there in every row."""
    x = (jnp.array([[1.0, -0.5, 0.25]]) * float(jnp.finfo(dtype).max)).astype(dtype)
    params = {"w": jnp.eye(3, 4, dtype=dtype)}
    zeros = ha.init(ha.plan(params, ("w", "in -")))
    scales = jax.tree.map(lambda d: d + 0.05, zeros)
    got = ha.adapt(lambda p, x: dot(x, p["w"], F32))(params, scales, x)
    assert error(got, 1.05 * x.astype(F32) @ params["w"].astype(F32)) < 1e-4


def test_looked_up_rows_are_scaled_in_the_dtype_of_their_product():
    params = {"table": draw(5, 9, 8, dtype=BF16), "w": draw(6, 8, 3)}
    scales = jax.tree.map(lambda d: d + 1e-3, ha.init(ha.plan(params, ("table", "in out"))))
    forward = ha.adapt(lambda p, t: p["table"][t] @ p["w"], materialize="error")
    rows = params["table"][:4].astype(F32) * 1.001**2
    assert error(forward(params, scales, jnp.arange(4)), rows @ params["w"]) < 1e-6


@pytest.mark.parametrize("shape", [(8, 1), (8,)])
def test_a_weight_no_larger_than_its_vector_is_scaled_where_it_is_used(shape):
    """It is not rounded to its own dtype first."""
    params = {"w": draw(7, *shape, dtype=BF16)}
    scales = jax.tree.map(
        lambda d: d + 1e-3, ha.init(ha.plan(params, ("w", "in out"[: 4 * len(shape) - 1])))
    )
    forward = ha.adapt(lambda p, x: x[:, :8] @ p["w"].astype(F32), materialize="error")
    want = X[:, :8] @ (params["w"].astype(F32) * 1.001 ** len(scales["w"].factors()))
    assert error(forward(params, scales, X), want) < 1e-6


def test_zero_deltas_leave_the_roundings_that_the_program_states():
    """XLA may drop the base's own rounding under jit; the adapted program keeps it."""
    params = {"w": W.astype(BF16)}
    zeros = ha.init(ha.plan(params, ("w", "in out")))

    def fn(params, x):
        return (x @ params["w"]).astype(F32)

    want = fn(params, X.astype(BF16))
    for forward in (ha.adapt(fn), jax.jit(ha.adapt(fn))):
        assert bits(forward(params, zeros, X.astype(BF16))) == bits(want)
