"""Merging, against the products in float64; and what its one rounding costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hyperadapt_jax as ha
from hyperadapt_jax import paths
from hyperadapt_jax.scales import ScaleVectors
from tests.core.trees import AXES, TREES, adapter, dense, weights


def random(scales, size, seed=0):
    """The same vectors, normal with a standard deviation of size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda d: jnp.asarray(size * rng.normal(size=d.shape), jnp.float32), scales)


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


# merge


@pytest.mark.parametrize("name", TREES)
def test_every_container(name):
    make, weight, axes, bias = TREES[name]
    params = make()
    scales = random(ha.init(ha.plan(params, (weight, axes))), 0.5)
    merged = ha.merge(params, scales)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    before, after = paths.flatten(params)[1], dict(zip(*paths.flatten(merged)[:2], strict=True))
    factor = dense(scales[weight], 2)
    np.testing.assert_allclose(after[weight], paths.arrays(params)[weight] * factor, rtol=1e-6)
    assert after[bias] is paths.arrays(params)[bias]
    untouched = [old is new for old, new in zip(before, after.values(), strict=True)]
    assert untouched.count(False) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_one_rounding_of_a_float32_product(dtype):
    base, scales = weights(dtype=dtype), adapter()
    merged = ha.merge(base, scales)
    for name, (_, shape) in AXES.items():
        # The same in numpy, whose float32 products are rounded as IEEE 754 has it: bit by bit.
        product = np.asarray(base[name]).astype(np.float32)
        for axes, delta in scales[name].factors():
            missing = [i for i in range(len(shape)) if i not in axes]
            product = product * np.expand_dims(1 + np.asarray(delta), missing)
        np.testing.assert_array_equal(bits(merged[name]), bits(product.astype(dtype)))
        exact = np.asarray(base[name], np.float64) * dense(scales[name], len(shape))
        # Half a unit in the last place; four such where the product itself has no wider dtype.
        tolerance = float(jnp.finfo(dtype).eps) * (2 if dtype == jnp.float32 else 0.501)
        np.testing.assert_allclose(np.asarray(merged[name], np.float64), exact, rtol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
def test_zero_deltas_leave_every_bit(dtype):
    base = weights(dtype=dtype)
    zero = jax.tree.map(np.zeros_like, adapter())
    for merged in (ha.merge(base, zero), ha.unmerge(base, zero)):
        for name in AXES:
            assert merged[name].dtype == dtype
            np.testing.assert_array_equal(bits(merged[name]), bits(base[name]))


def test_under_transformations():
    base, scales = weights(dtype=jnp.bfloat16), adapter()
    want = ha.merge(base, scales)
    jitted = jax.jit(ha.merge)(base, scales)
    for name in AXES:
        np.testing.assert_array_equal(bits(jitted[name]), bits(want[name]))
    shapes = jax.eval_shape(ha.merge, base, scales)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (shapes, want))[0] == {
        name: (shape, jnp.bfloat16) for name, (_, shape) in AXES.items()
    }
    few = {name: scales[name] for name in ("stacked", "row only", "heads in")}
    stack = jax.tree.map(lambda x: np.stack([x, 2 * x, 0 * x]), few)
    many = jax.vmap(ha.merge, (None, 0))(base, stack)
    for k, factor in enumerate((1, 2, 0)):
        one = ha.merge(base, jax.tree.map(lambda x, factor=factor: factor * x, few))
        for name in few:
            np.testing.assert_array_equal(bits(many[name][k]), bits(one[name]))


def test_gradients_are_the_closed_form():
    w, g = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 5)), jnp.float32) for i in (0, 1))
    scales = {"w": ScaleVectors(jnp.linspace(-0.5, 1, 5), jnp.linspace(2, -2, 3), "in out")}
    loss = lambda scales: jnp.vdot(g, ha.merge({"w": w}, scales)["w"])  # noqa: E731
    got = jax.grad(loss)(scales)["w"]
    np.testing.assert_allclose(got.row, (1 + scales["w"].col) @ (g * w), rtol=1e-5)
    np.testing.assert_allclose(got.col, (g * w) @ (1 + scales["w"].row), rtol=1e-5)


def test_numpy_weights_and_wide_ones():
    scales = {"w": ScaleVectors(np.array([0.5, -0.5], np.float32), None, "- out")}
    narrow = ha.merge({"w": np.ones((2, 2), jnp.bfloat16)}, scales)["w"]
    assert isinstance(narrow, jax.Array) and narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, [[1.5, 0.5]] * 2)
    product, report = ha.merge({"w": jnp.full((2, 2), 1j, jnp.complex64)}, scales, report=True)
    np.testing.assert_array_equal(product["w"], [[1.5j, 0.5j]] * 2)
    assert (report.weights[0].update, report.weights[0].error) == (1.0, 0.0)


def test_the_bias_and_the_inputs_are_left_alone():
    params = {"q": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
    scales = random(ha.init(ha.plan(params, (["kernel"], "in out"))), 1.0)
    before = jax.tree.map(np.array, (params, scales))
    ha.merge(params, scales)
    jax.tree.map(np.testing.assert_array_equal, before, (params, scales))
    np.testing.assert_array_equal(ha.merge(params, scales)["q"]["bias"], np.ones(5))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("placed", [True, False])
def test_shardings_are_kept(kind, placed):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(getattr(AxisType, kind),) * 2)
    specs = {"stacked": P(None, "data", "model"), "heads": P(("data", "model"), None, None)}
    axes = {"stacked": "stack in out", "heads": "in out out"}
    rng = np.random.default_rng(0)
    host = {name: rng.normal(size=(8, 4, 8)).astype(np.float32) for name in specs}
    params = {
        name: jax.device_put(host[name], NamedSharding(mesh, spec)) for name, spec in specs.items()
    }
    # Vectors that are placed like the weights, or are still on the host, as when just loaded.
    scales = ha.init(ha.plan(params if placed else host, *(([n], a) for n, a in axes.items())))
    scales = jax.tree.map(lambda d: d + 1, scales)
    scales = scales if placed else jax.tree.map(np.asarray, scales)
    for merged in (ha.merge(params, scales), jax.jit(ha.merge)(params, scales)):
        for name in specs:
            np.testing.assert_array_equal(merged[name], host[name] * 4)
            same = merged[name].sharding.is_equivalent_to(params[name].sharding, ndim=3)
            assert same, merged[name].sharding
    restored = ha.unmerge(ha.merge(params, scales), scales)
    assert all(restored[name].sharding == params[name].sharding for name in specs)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_weight_is_not_sharded_by_its_vectors(kind):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(getattr(AxisType, kind),))
    params = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P()))}
    row = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("model")))
    merged = ha.merge(params, {"w": ScaleVectors(row, None, "- out")})
    assert merged["w"].sharding.is_fully_replicated
    np.testing.assert_array_equal(merged["w"], np.full((8, 8), 2.0))


# unmerge


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unmerge_divides_back(dtype):
    base, scales = weights(dtype=dtype), adapter()
    restored = ha.unmerge(ha.merge(base, scales), scales)
    for name in AXES:
        assert restored[name].dtype == dtype
        tolerance = 2 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            restored[name].astype(np.float32), base[name].astype(np.float32), rtol=tolerance
        )


def test_unmerge_of_large_scales_keeps_the_digits():
    """Dividing: an inverse stored as 1 / scale - 1 would lose four of the seven digits here."""
    scales = {"w": ScaleVectors(jnp.array([3333.0]), jnp.array([777.0]), "in out")}
    base = {"w": jnp.array([[1.2345678]])}
    restored = ha.unmerge(ha.merge(base, scales), scales)
    np.testing.assert_allclose(restored["w"], base["w"], rtol=5e-7)


def test_unmerge_refuses_a_scale_near_zero():
    scales = {"w": ScaleVectors(jnp.array([0.0, -1 + 1e-7]), None, "- out")}
    merged = {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"w: row\[1\] scales by 1.2e-07, too near zero"):
        ha.unmerge(merged, scales)
    np.testing.assert_allclose(ha.unmerge(merged, scales, tol=1e-8)["w"][:, 0], 1)
    assert jax.jit(ha.unmerge)(merged, scales)["w"].shape == (3, 2)  # traced: not checked


# The figures of bfloat16


@functools.cache
def one_percent():
    """A bfloat16 matrix and an adapter whose deltas have a standard deviation of 1 %."""
    w = np.random.default_rng(0).normal(size=(512, 384)).astype(jnp.bfloat16)
    params = {"w": jnp.asarray(w)}
    return params, random(ha.init(ha.plan(params, ("w", "in out"))), 0.01)


def exact(params, scales):
    w = np.asarray(params["w"], np.float64)
    product = w * dense(scales["w"], 2)
    return product, np.linalg.norm(product - w)


def test_merged_bfloat16_costs_one_rounding_not_two():
    params, scales = one_percent()
    product, update = exact(params, scales)
    merged, report = ha.merge(params, scales, report=True)
    error = np.linalg.norm(np.asarray(merged["w"], np.float64) - product)
    assert 0.11 < error / update < 0.13
    nearest = np.linalg.norm(product.astype(jnp.bfloat16).astype(np.float64) - product)
    assert error <= 1.001 * nearest  # no bfloat16 matrix is closer
    (weight,) = report.weights
    assert weight.relative == pytest.approx(error / update, rel=1e-9)
    # What two multiplications in bfloat16 would cost.
    row, col = ((1 + d).astype(jnp.bfloat16) for d in (scales["w"].row, scales["w"].col))
    twice = np.asarray((params["w"] * row) * col[:, None], np.float64)
    assert np.linalg.norm(twice - product) / update > 1.9 * error / update


@pytest.mark.parametrize("held, stored", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_merged_into_another_dtype_is_rounded_once(held, stored):
    params, scales = one_percent()
    params = {"w": params["w"].astype(held), "bias": jnp.ones(3)}
    product, update = exact(params, scales)
    merged, report = ha.merge(params, scales, dtype=stored, report=True)
    wide = params["w"].astype(jnp.float32)
    assert (merged["w"] == ha.merge({"w": wide}, scales)["w"].astype(stored)).all()
    assert merged["w"].dtype == stored and merged["bias"] is params["bias"]
    (weight,) = report.weights
    error = np.linalg.norm(np.asarray(merged["w"], np.float64) - product)
    assert weight.dtype == stored and weight.relative == pytest.approx(error / update, rel=1e-9)
    with pytest.raises(ValueError, match="dtype: is int8; give a floating one"):
        ha.merge(params, scales, dtype=jnp.int8)


def test_unmerged_bfloat16_is_the_base_but_for_one_entry_in_a_hundred():
    params, scales = one_percent()
    restored = ha.unmerge(ha.merge(params, scales), scales)
    share = (bits(restored["w"]) == bits(params["w"])).mean()
    assert 0.985 < share < 1
    worst = np.abs(bits(restored["w"]).astype(int) - bits(params["w"]).astype(int)).max()
    assert worst == 1  # the last bit


# The report


def test_a_report_in_float64():
    base, scales = weights(dtype=jnp.bfloat16), adapter()
    merged, report = ha.merge(base, scales, report=True)
    assert [weight.path for weight in report.weights] == sorted(AXES)
    for weight in report.weights:
        w = np.asarray(base[weight.path], np.float64)
        product = w * dense(scales[weight.path], w.ndim)
        error = np.asarray(merged[weight.path], np.float64) - product
        assert weight.dtype == "bfloat16"
        assert weight.update == pytest.approx(np.linalg.norm(product - w), rel=1e-12)
        assert weight.error == pytest.approx(np.linalg.norm(error), rel=1e-12)
        assert weight.relative == pytest.approx(weight.error / weight.update) and weight.error > 0
    wide = ha.merge(weights(), scales, report=True)[1]
    assert all(0 < weight.relative < 1e-6 for weight in wide.weights)


def test_a_printed_report():
    params = {"a": {"w": jnp.ones((2, 2), jnp.bfloat16)}, "b": jnp.ones((1, 2))}
    scales = {
        "b": ScaleVectors(jnp.zeros(2), jnp.zeros(1), "in out"),
        "a/w": ScaleVectors(jnp.array([1.0, 2.0**-9]), None, "- out"),
    }
    merged, report = ha.merge(params, scales, report=True)
    # 1 + 2**-9 is rounded to 1: an error of 2**-9 in two entries, of an update of 1 in two others.
    np.testing.assert_array_equal(merged["a"]["w"], [[2, 1]] * 2)
    assert str(report) == (
        "weight  dtype     update    error  error/update\n"
        "a/w     bfloat16    1.41  0.00276       0.00195\n"
        "b       float32        0        0             0"
    )


def test_a_report_shows_overflow():
    params = {"w": jnp.full((1, 2), 60000, jnp.float16)}
    scales = {"w": ScaleVectors(jnp.array([1.0, 0.0]), None, "- out")}
    report = ha.merge(params, scales, report=True)[1]
    assert report.weights[0].relative == np.inf and str(report).endswith(" inf")


def test_a_report_shows_the_rounding_of_a_base_that_is_not_updated():
    params, scales = {"w": jnp.array([[1.001]])}, {"w": ScaleVectors(jnp.zeros(1), None, "- out")}
    report = ha.merge(params, scales, dtype=jnp.bfloat16, report=True)[1]
    assert report.weights[0].update == 0 and str(report).endswith(" inf")


def test_a_report_needs_values():
    with pytest.raises(
        ValueError, match="report: needs the values of all weights; ask .* outside of jit"
    ):
        jax.jit(lambda p, s: ha.merge(p, s, report=True))(weights(), adapter())


# What is refused


@pytest.mark.parametrize("operation", [ha.merge, ha.unmerge])
def test_an_adapter_that_does_not_fit(operation):
    params = {"layers": {"q": jnp.ones((3, 5)), "k": jnp.ones((3, 5))}, "activation": jax.nn.gelu}
    vectors = ScaleVectors(jnp.zeros(5), jnp.zeros(3), "in out")
    with pytest.raises(
        ValueError, match="layers/qq: is scaled by the adapter, but is none of .*: layers/q, "
    ):
        operation(params, {"layers/k": vectors, "layers/qq": vectors})
    with pytest.raises(
        ValueError, match="activation: is scaled by the adapter, but is none of the 2 arrays"
    ):
        operation(params, {"activation": vectors})
    turned = ScaleVectors(vectors.col, vectors.row, "in out")
    with pytest.raises(ValueError, match=r"layers/q: row has shape \(3,\), .* needs \(5,\)"):
        operation(params, {"layers/q": turned})
    with pytest.raises(ValueError, match="layers/q: has 2 axes, .* roles for 3: 'stack in out'"):
        operation(params, {"layers/q": ScaleVectors(None, None, "stack in out")})


@pytest.mark.parametrize("operation", [ha.merge, ha.unmerge])
def test_a_quantized_weight_cannot_be_merged(operation):
    params = {"q": {"codes": jnp.ones((3, 5), jnp.int8), "scale": jnp.ones(5)}}
    scales = ha.init(ha.plan(params, ha.Target(".*/codes", "in out", quantized=True)))
    with pytest.raises(ValueError, match="q/codes: has dtype int8; .* keep the adapter next to"):
        operation(params, scales)
