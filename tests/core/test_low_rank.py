"""The low-rank term: what the tests of every construct do not show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hyperadapt_jax as ha
from hyperadapt_jax.methods import LoRA, tune
from tests.core.oracle import draw, error, random_scales

X = draw(1, 5, 8)


def adapter(params, *targets, rank=2, sides=("row", "col")):
    plan = ha.plan(params, *targets).with_low_rank(rank, sides)
    return random_scales(ha.init(plan, jax.random.key(0)))


def dense(vectors):
    """The weight's term and scales, written out for kernels (inputs x outputs)."""
    term = jnp.einsum("...ir,...or->...io", vectors.down, vectors.up)
    row = 1.0 if vectors.row is None else 1 + vectors.row[..., None, :]
    col = 1.0 if vectors.col is None else 1 + vectors.col[..., :, None]
    return term, row * col


def test_it_is_the_sum_of_products_that_it_is_said_to_be():
    """``(W + up down) * scales``, by ``adapt``, by ``merge`` and written out; and unmerged."""
    params = {"w": draw(2, 8, 6)}
    scales = adapter(params, ("w", "in out"))
    term, factor = dense(scales["w"])
    wanted = (params["w"] + term) * factor
    merged = ha.merge(params, scales)
    np.testing.assert_allclose(merged["w"], wanted, rtol=1e-6)
    got = ha.adapt(lambda p, x: x @ p["w"], materialize="error")(params, scales, X)
    np.testing.assert_allclose(got, X @ wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ha.unmerge(merged, scales)["w"], params["w"], atol=1e-6)


def test_merging_into_bfloat16_rounds_once_and_reports_it():
    params = {"w": draw(2, 3, 8, 6).astype(jnp.bfloat16)}
    scales = adapter(params, ("w", "stack in out"))
    merged, report = ha.merge(params, scales, report=True)
    term, factor = dense(scales["w"])
    exact = (np.asarray(params["w"], np.float64) + term) * factor
    np.testing.assert_array_equal(merged["w"], exact.astype(jnp.bfloat16))
    [found] = report.weights
    update = np.linalg.norm(exact - np.asarray(params["w"], np.float64))
    rounding = np.linalg.norm(np.asarray(merged["w"], np.float64) - exact)
    assert found.update == pytest.approx(update, rel=1e-5)
    assert found.error == pytest.approx(rounding, rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [lambda w: -w, lambda w: w * 0.5, lambda w: w / 4.0, lambda w: -(w.T * 3.0).T / 2.0],
    ids=["negated", "halved", "divided", "several"],
)
def test_a_number_times_the_weight_is_a_number_times_the_term(change):
    params = {"w": draw(2, 8, 6)}
    scales = adapter(params, ("w", "in out"))
    fn = lambda p, x: x @ change(p["w"])  # noqa: E731
    got = ha.adapt(fn, materialize="error")(params, scales, X)
    np.testing.assert_allclose(got, fn(ha.merge(params, scales), X), rtol=1e-5, atol=1e-6)


def test_adapters_under_vmap_share_one_weight():
    params = {"w": draw(2, 8, 6)}
    one = [adapter(params, ("w", "in out")), adapter(params, ("w", "in out"), sides=())]
    one[1] = dataclasses.replace(one[1]["w"], row=jnp.ones(6), col=jnp.zeros(8))
    one[0] = one[0]["w"]
    stacked = {"w": jax.tree.map(lambda *xs: jnp.stack(xs), *one)}
    forward = ha.adapt(lambda p, x: jnp.tanh(x @ p["w"]), materialize="error")
    got = jax.vmap(forward, in_axes=(None, 0, None))(params, stacked, X)
    wanted = [forward(params, {"w": vectors}, X) for vectors in one]
    np.testing.assert_allclose(got, jnp.stack(wanted), rtol=1e-5, atol=1e-6)
    jaxpr = jax.make_jaxpr(jax.vmap(forward, in_axes=(None, 0, None)))(params, stacked, X)
    sizes = [v.aval.size for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
    assert 2 * params["w"].size not in sizes  # no weight of each adapter's own


def test_of_a_quantized_weight_it_is_added_to_what_the_codes_stand_for():
    codes = jax.random.randint(jax.random.key(0), (3, 8, 6), -100, 100, jnp.int8)
    params = {"w": codes, "step": jnp.abs(draw(3, 3, 1, 6)) / 50, "zero": draw(4, 3, 1, 1)}
    plan = ha.plan(params, ha.Target("w", "stack in out", quantized=True)).with_low_rank(2)
    scales = random_scales(ha.init(plan, jax.random.key(0)))

    def fn(p, x):
        def layer(x, p):
            kernel = p["w"].astype(jnp.float32) * p["step"] - p["zero"] * p["step"]
            return jnp.pad(jnp.tanh(x @ kernel), ((0, 0), (0, 2))), None

        return lax.scan(layer, x, p)[0]

    values = (params["w"].astype(jnp.float32) - params["zero"]) * params["step"]
    merged = ha.merge({"w": values}, scales)["w"]
    wanted = fn({"w": merged, "step": jnp.ones((3, 1, 6)), "zero": jnp.zeros((3, 1, 1))}, X)
    got = ha.adapt(fn, materialize="error")(params, scales, X)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: lax.dot(x, p["w"], preferred_element_type=jnp.float32) * p["step"],
        lambda p, x: x @ (lax.bitcast_convert_type(p["w"], jnp.uint8).astype(x.dtype) * p["step"]),
    ],
    ids=["codes multiplied before they are dequantized", "bits read as other codes"],
)
def test_where_codes_leave_no_place_to_add_it_is_an_error(fn):
    params = {"w": jnp.ones((8, 6), jnp.int8), "step": jnp.ones(6)}
    plan = ha.plan(params, ha.Target("w", "in out", quantized=True)).with_low_rank(2)
    scales = ha.init(plan, jax.random.key(0))
    with pytest.raises(ha.MaterializedError, match="integer codes cannot be"):
        ha.adapt(fn)(params, scales, X)


def test_scales_have_an_algebra_and_low_rank_terms_have_none():
    scales = adapter({"w": draw(2, 8, 6)}, ("w", "in out"))
    refused = [
        lambda: ha.compose(scales, scales),
        lambda: ha.invert(scales),
        lambda: ha.average([scales, scales]),
        lambda: ha.interpolate(scales, scales, 0.5),
        lambda: ha.canonical(scales),
    ]
    for call in refused:
        with pytest.raises(ValueError, match="w: has a low-rank term"):
            call()


def test_arrays_that_do_not_fit_are_refused():
    params = {"w": draw(2, 8, 6)}
    scales = adapter(params, ("w", "in out"))
    forward = ha.adapt(lambda p, x: x @ p["w"])
    for changed, message in [
        (dict(up=None), r"up has shape None.*needs \(6, 2\)"),
        (dict(up=jnp.zeros((6, 3))), r"up has shape \(6, 3\).*needs \(6, 2\)"),
        (dict(down=jnp.zeros((6, 2))), r"down has shape \(6, 2\).*needs \(8, 2\)"),
        (dict(down=None), r"up has shape \(6, 2\).*needs None"),
        (dict(down=None, up=None, col=None), r"col has shape None.*needs \(8,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            forward(params, {"w": dataclasses.replace(scales["w"], **changed)}, X)


def test_a_plan_says_what_it_will_train():
    plan = ha.plan({"w": jnp.ones((3, 8, 6))}, ("w", "stack in out")).with_low_rank(2)
    table = str(plan)
    assert "down" in table and "3x8x2" in table and "84 trainable" in table and "row" not in table
    assert ha.count(ha.init(plan, jax.random.key(0))) == plan.count == 84
    with pytest.raises(ha.PlanError, match="key: is needed"):
        ha.init(plan)
    with pytest.raises(ha.PlanError, match="rank: is 0"):
        plan.with_low_rank(0)


def test_it_starts_as_loras_authors_draw_it():
    """``down`` is uniform within one over the root of the inputs, of each slice; ``up`` is zero."""
    plan = ha.plan({"w": jnp.ones((3, 400, 5))}, ("w", "stack in out")).with_low_rank(8)
    vectors = ha.init(plan, jax.random.key(0))["w"]
    assert not vectors.up.any()
    assert 0.99 / 20 < jnp.abs(vectors.down).max() <= 1 / 20
    assert jnp.std(vectors.down) == pytest.approx(1 / 20 / np.sqrt(3), rel=0.03)
    assert error(vectors.down[0], vectors.down[1]) > 0.5


# Dropout

LAYERS = {"w": draw(2, 3, 8, 8), "v": draw(3, 8, 6)}
ROLES = [("w", "stack in out"), ("v", "in out")]


def deep(params, x):
    """Layers that are scanned under remat, as a decoder's are, and a head."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    return lax.scan(jax.checkpoint(layer), x, params["w"])[0] @ params["v"]


def tuning(rate):
    method = LoRA(rank=2, alpha=6.0, dropout=rate)
    tuned = tune(method, deep, LAYERS, ha.plan(LAYERS, *ROLES), key=jax.random.key(0))
    moved = random_scales(tuned.trainable["scales"], size=0.5)
    return tuned, {**tuned.trainable, "scales": moved}


def test_dropout_hides_inputs_from_the_term_alone():
    """Equal to a plain LoRA of the same masks: one for each layer, kept for the backward pass."""
    tuned, trained = tuning(0.4)
    key = jax.random.key(5)
    keyed = tuned.method.dropped(tuned.method.scales(trained["scales"], LAYERS), key)

    def plain(scales, x):
        def linear(x, w, vectors, data):
            kept = jax.random.bernoulli(jax.random.wrap_key_data(data), 0.6, x.shape)
            return x @ w + 3.0 * (jnp.where(kept, x / 0.6, 0) @ vectors.down @ vectors.up.T)

        for i in range(3):
            vectors = jax.tree.map(lambda a, i=i: a[i], scales["w"])
            x = jnp.tanh(linear(x, LAYERS["w"][i], vectors, keyed["w"].keys[i]))
        return linear(x, LAYERS["v"], scales["v"], keyed["v"].keys)

    assert len({tuple(np.ravel(k)) for k in (*keyed["w"].keys, keyed["v"].keys)}) == 4
    loss = lambda fn: lambda scales, x: jnp.sum(jnp.sin(fn(scales, x)))  # noqa: E731
    ours = lambda scales, x: tuned.training(key).forward({"scales": scales, "full": {}}, LAYERS, x)  # noqa: E731
    got, wanted = (
        jax.jit(jax.value_and_grad(loss(fn), (0, 1)))(trained["scales"], X) for fn in (ours, plain)
    )
    assert error(got, wanted) < 1e-5


def test_dropout_is_for_training_alone():
    tuned, trained = tuning(0.4)
    without, same = tuning(0.0)
    evaluated = tuned.forward(trained, tuned.frozen, X)
    np.testing.assert_array_equal(evaluated, without.forward(same, without.frozen, X))
    key = jax.random.key(1)
    np.testing.assert_array_equal(without.training(key).forward(same, LAYERS, X), evaluated)
    assert error(tuned.training(key).forward(trained, LAYERS, X), evaluated) > 0.01
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout: is"):
            LoRA(dropout=rate)
