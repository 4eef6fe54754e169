"""`adapt` on quantized weights: what is scaled is the weight that a function makes of its codes."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import hyperadapt_jax as ha
from tests.core.oracle import draw, error, loss, random_scales

IN, OUT, GROUPS = 8, 6, 2
X = draw(1, 5, IN)
UNSIGNED = jax.random.randint(jax.random.key(2), (IN, OUT), 0, 256).astype(jnp.uint8)
SIGNED = jax.random.randint(jax.random.key(3), (IN, OUT), -128, 128).astype(jnp.int8)
NIBBLES = jax.random.randint(jax.random.key(4), (IN, OUT), 0, 16).astype(jnp.uint8)
STEP = 0.01 + jnp.abs(draw(5, OUT)) / 100
ZERO = jnp.array([120, 131, 128, 99, 140, 127], jnp.uint8)
GROUP_STEP = 0.01 + jnp.abs(draw(6, GROUPS, 1, OUT)) / 100
GROUP_ZERO = jnp.arange(GROUPS * OUT, dtype=jnp.float32).reshape(GROUPS, 1, OUT)
BOOK = draw(7, 16)
ORDER = jnp.array([5, 3, 0, 1, 7, 6, 2, 4])


def floating(c):
    return c.astype(jnp.float32)


def grouped(dequantize):
    return lambda c: dequantize(c.reshape(GROUPS, IN // GROUPS, OUT)).reshape(IN, OUT)


def signed_nibble(c):
    c = c.astype(jnp.int32)
    return floating(jnp.where(c > 7, c - 16, c)) * STEP


def unpacked(parts):
    """Codes along a new axis 1, joined with the packed axis before it."""
    return parts.reshape(-1, *parts.shape[2:])


def by_shifts(c, bits):
    shifts = bits * jnp.arange(c.dtype.itemsize * 8 // bits, dtype=c.dtype)
    return unpacked((c[:, None] >> shifts[:, None]) & (2**bits - 1))


# name: the codes, and the weight that they stand for
DEQUANTIZE = {
    "symmetric": (SIGNED, lambda c: floating(c) * STEP),
    "zero point, as float": (UNSIGNED, lambda c: (floating(c) - floating(ZERO)) * STEP),
    "zero point, as int": (
        UNSIGNED,
        lambda c: floating(c.astype(jnp.int32) - ZERO.astype(jnp.int32)) * STEP,
    ),
    "zero point, wrapping": (UNSIGNED, lambda c: floating((c - 128).astype(jnp.int8)) * STEP),
    "zero point, from the other side": (UNSIGNED, lambda c: -(floating(ZERO) - c) * STEP),
    "zero point, added": (UNSIGNED, lambda c: floating(c) * STEP + (-STEP * ZERO)),
    "zero point, after the step": (UNSIGNED, lambda c: STEP * c - STEP * ZERO),
    "zero point, divided": (UNSIGNED, lambda c: (floating(c) - 120.5) / (30 / STEP) + 0.25),
    "zero point, groups": (UNSIGNED, grouped(lambda c: (c - GROUP_ZERO) * GROUP_STEP)),
    "zero point, two levels": (
        UNSIGNED,
        grouped(lambda c: (floating(c) - 16 * floating(ZERO // 16)) * GROUP_STEP - STEP),
    ),
    "code book": (NIBBLES, lambda c: BOOK[c] * STEP),
    "code book, signed codes": (NIBBLES.astype(jnp.int8) - 8, lambda c: BOOK[c] * STEP),
    "code book, taken": (NIBBLES, lambda c: jnp.take(BOOK, c.astype(jnp.int32), mode="clip")),
    "code book, groups": (
        NIBBLES,
        grouped(lambda c: jnp.take_along_axis(draw(7, GROUPS, 16, 1), c.astype(int), 1)),
    ),
    "code book of vectors": (
        NIBBLES[: IN // 2],
        lambda c: unpacked(jnp.swapaxes(draw(8, 16, 2)[c], 1, 2)),
    ),
    "code book, one hot": (NIBBLES, lambda c: jax.nn.one_hot(c, 16) @ BOOK),
    "signs by comparison": (NIBBLES, signed_nibble),
    "signs by shifts": (
        NIBBLES, lambda c: floating((c << 4).astype(jnp.int8) >> 4) * STEP
    ),
    "float4 by its bits": (
        NIBBLES,
        lambda c: jnp.where(c & 8, -1.0, 1.0) * jnp.exp2(floating((c >> 1) & 3)) * (2 + (c & 1)),
    ),
    "packed in bytes": (UNSIGNED[: IN // 2], lambda c: (floating(by_shifts(c, 4)) - 8) * STEP),
    "packed in words": (
        jax.random.randint(jax.random.key(9), (IN // 8, OUT), -(2**31), 2**31 - 1, jnp.int32),
        lambda c: (floating(by_shifts(c, 4)) - floating(ZERO)) * STEP,
    ),
    "packed, of a narrower type": (
        UNSIGNED[: IN // 2],
        lambda c: floating(unpacked(jnp.swapaxes(lax.bitcast_convert_type(c, jnp.int4), 1, 2))),
    ),
    "packed, by halves": (
        UNSIGNED[: IN // 2],
        lambda c: (floating(unpacked(jnp.stack([c & 15, c // 16], 1))) - 8) * STEP,
    ),
    "unpacked as floats": (
        UNSIGNED[: IN // 2],
        lambda c: unpacked(jnp.stack([jnp.floor(c / 16), c - 16 * (c // 16)], 1)) - 7.5,
    ),
    "in another order": (
        UNSIGNED, lambda c: STEP * c[ORDER].astype(jnp.float32) - (STEP * ZERO)[None][0 * ORDER]
    ),
    "copied, named": (SIGNED, lambda c: floating(checkpoint_name(jnp.copy(c), "codes")) * STEP),
    "constrained": (SIGNED, lambda c: floating(lax.with_sharding_constraint(c, sharding())) * STEP),
    "wider, negated": (SIGNED, lambda c: floating(-c.astype(jnp.int32)) * STEP),
    "in bfloat16": (SIGNED, lambda c: (c.astype(jnp.bfloat16) - 3) / 128),
}  # fmt: skip


def sharding():
    auto = (jax.sharding.AxisType.Auto,)
    return NamedSharding(jax.make_mesh((1,), ("d",), axis_types=auto), P("d"))


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_equals_the_scaled_dequantized_weight(name):
    codes, dequantize = DEQUANTIZE[name]
    params = {"codes": codes}
    target = ha.Target("codes", "in out", quantized=True)
    scales = random_scales(ha.init(ha.plan(params, target)))
    forward = ha.adapt(lambda p, x: x @ floating(dequantize(p["codes"])) / 64)

    def oracle(params, scales, x):
        weight, vectors = floating(dequantize(params["codes"])), scales["codes"]
        # A code that holds several numbers scales them all.
        col = jnp.repeat(1 + vectors.col, IN // len(codes))[:, None]
        col = col[ORDER] if name == "in another order" else col
        return x @ (weight * col * (1 + vectors.row)) / 64

    def value_and_grad(fn):
        return jax.jit(jax.value_and_grad(lambda *args: loss(fn(*args)), (1, 2), allow_int=True))

    inputs = (params, scales, X)
    assert error(value_and_grad(forward)(*inputs), value_and_grad(oracle)(*inputs)) < 1e-5
    assert ha.explain(forward, *inputs).on_activations == ("codes",)


def test_a_refusal_of_codes_says_what_they_meet_and_what_to_do():
    scales = ha.init(ha.plan({"codes": SIGNED}, ha.Target("codes", "in out", quantized=True)))
    with pytest.raises(ha.MaterializedError, match="codes: integer codes .* `sort` .*dequantize"):
        ha.adapt(lambda p, x: x @ jnp.sort(p["codes"], 0))({"codes": SIGNED}, scales, X)


def test_an_embedding_may_meet_a_quantized_layer():
    """Its rows are activations: they are scaled, and not the codes."""
    table = draw(11, 9, IN)
    params = {"table": table, "codes": SIGNED}
    tokens = jnp.array([3, 0, 8, 3])

    def fn(params, tokens):
        rows = params["table"][tokens] * 2
        product = lax.dot_general(
            rows, params["codes"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return product * STEP

    plan = ha.plan(params, ("table", "in out"), ha.Target("codes", "in out", quantized=True))
    scales = random_scales(ha.init(plan))
    merged = ha.merge({**params, "codes": floating(SIGNED)}, scales)
    forward = ha.adapt(fn, materialize="error")
    assert error(forward(params, scales, tokens), fn(merged, tokens)) < 1e-5


def test_a_quantized_embedding_takes_off_its_zero_points_and_not_what_is_added():
    """Looked-up codes less their zero points are scaled; positions, added to them, are not."""
    params = {
        "codes": UNSIGNED,
        "zero": ZERO,
        "rows": jnp.abs(draw(12, IN)),
        "at": draw(13, 3, OUT),
    }
    tokens = jnp.array([2, 7, 2])

    def fn(params, tokens, scale=1):
        rows = floating(params["codes"][tokens]) - floating(params["zero"])
        return jnp.tanh(scale * rows * params["rows"][tokens][:, None] / 50 + params["at"])

    scales = random_scales(ha.init(ha.plan(params, ha.Target("codes", "in out", quantized=True))))
    vectors = scales["codes"]
    want = fn(params, tokens, (1 + vectors.col)[tokens][:, None] * (1 + vectors.row))
    got = ha.adapt(fn, materialize="error")(params, scales, tokens)
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6), (1,), (1, 1)])
@pytest.mark.parametrize("to", ["as it is", "column", "row", "slices", "total"])
def test_codes_of_one_row_or_column_have_zero_points_too(shape, to):
    """They are no larger than a vector, and no activations for that."""
    params = {"codes": jnp.arange(1, 1 + max(shape), dtype=jnp.int8).reshape(shape)}

    def weight(codes):
        codes = {
            "as it is": lambda: codes,
            "column": lambda: codes.reshape(-1, 1),
            "row": lambda: codes.reshape(1, -1),
            "slices": lambda: lax.dynamic_slice(codes, [0] * codes.ndim, codes.shape),
            "total": lambda: codes[None].sum(0),
        }[to]()
        return 0.1 * floating(codes) - 0.25

    roles = " ".join("in" for _ in shape)
    target = ha.Target("codes", roles, quantized=True)
    scales = jax.tree.map(lambda delta: delta + 0.3, ha.init(ha.plan(params, target)))

    def fn(params, x):
        return jnp.tanh(x * weight(params["codes"]))

    want = jnp.tanh(3.0 * 1.3 * weight(params["codes"]))
    assert error(ha.adapt(fn, materialize="allow")(params, scales, jnp.float32(3)), want) < 1e-5


@pytest.mark.parametrize("nest", [jax.checkpoint, jax.jit, "cond", "scan"])
def test_a_zero_point_is_known_inside_of_inner_functions(nest):
    params = {
        "codes": jnp.stack([UNSIGNED, UNSIGNED.T.reshape(IN, OUT)]),
        "zero": jnp.stack([ZERO, ZERO]),
    }

    def layer(x, codes, zero):
        return x @ (STEP * codes - floating(zero) * STEP) / 9

    def fn(params, x):
        if nest == "scan":
            body = lambda c, p: (c + layer(x, p["codes"], p["zero"]), None)  # noqa: E731
            return lax.scan(body, jnp.zeros((5, OUT)), params)[0]
        args = (x, params["codes"][0], params["zero"][0])
        return lax.cond(x[0, 0] < 9, layer, layer, *args) if nest == "cond" else nest(layer)(*args)

    target = ha.Target("codes", "stack in out", quantized=True)
    scales = random_scales(ha.init(ha.plan(params, target)))
    weights = (floating(params["codes"]) - floating(params["zero"])[:, None]) * STEP
    weights = ha.merge({"codes": weights}, scales)["codes"]
    want = X @ (weights.sum(0) if nest == "scan" else weights[0]) / 9
    assert error(ha.adapt(fn, materialize="error")(params, scales, X), want) < 1e-5


def test_what_is_added_to_activations_or_made_of_the_weight_is_no_zero_point():
    """A product with activations is no weight any more; a mean of the weight is no zero point."""

    def fn(params, x):
        w = floating(params["codes"]) * STEP
        gated = jnp.tanh(x[:, :, None] * w + 1.0).sum(1)
        return gated + x @ (w - jnp.mean(w, 0))

    def oracle(w, x):
        return jnp.tanh(x[:, :, None] * w + 1.0).sum(1) + x @ (w - jnp.mean(w, 0))

    params = {"codes": SIGNED}
    scales = random_scales(ha.init(ha.plan(params, ha.Target("codes", "in out", quantized=True))))
    want = oracle(ha.merge({"codes": floating(SIGNED) * STEP}, scales)["codes"], X)
    assert error(ha.adapt(fn, materialize="allow")(params, scales, X), want) < 1e-5


def test_codes_shared_by_weights_of_their_own_are_scaled_apart():
    """A residual quantization: two sets of codes, each with vectors, make one weight."""
    params = {"first": SIGNED, "second": NIBBLES}

    def fn(params, x):
        return x @ (floating(params["first"]) * STEP + (floating(params["second"]) - 8) * STEP / 9)

    scales = random_scales(ha.init(ha.plan(params, ha.Target(".*", "in out", quantized=True))))
    weights = {"first": floating(SIGNED) * STEP, "second": (floating(NIBBLES) - 8) * STEP / 9}
    want = X @ sum(ha.merge(weights, scales).values())
    assert error(ha.adapt(fn, materialize="allow")(params, scales, X), want) < 1e-5


def test_a_floating_weight_has_no_zero_point():
    """What is added to one stays as it is: only codes wait for their weight."""
    params = {"w": floating(SIGNED)}

    def fn(params, x):
        return x @ (params["w"] - 3.0) + x @ (params["w"] + 2 * params["w"])

    scales = random_scales(ha.init(ha.plan(params, ("w", "in out"))))
    want = fn(ha.merge(params, scales), X)
    assert error(ha.adapt(fn, materialize="allow")(params, scales, X), want) < 1e-5
