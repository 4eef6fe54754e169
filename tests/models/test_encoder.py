"""Encoders: dropout, masks, packing, heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.models import layers
from hyperadapt_jax.models.encoder import model
from tests.models import cases

ENCODERS = (
    "bert",
    "bert-classifier",
    "roberta",
    "roberta-classifier",
    "xlm-roberta-regression",
    "distilbert",
    "distilbert-classifier",
)


def make(name: str, **options):
    config = models.config_from_dict(cases.CASES[name].config)
    fn, _ = models.functional(models.abstract(config, **options))
    fn = cases.jit(fn)
    return config, fn, cases.random_params(config)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_each_family_returns(name: str) -> None:
    config, fn, params = make(name)
    shapes = jax.eval_shape(fn, params, jax.ShapeDtypeStruct((3, 7), jnp.int32))
    assert shapes.sequence.shape == (3, 7, 16)
    classifier = config.num_labels is not None
    assert (shapes.logits is not None) == classifier
    pooled = config.family == "bert" or not (classifier or config.family == "distilbert")
    assert (shapes.pooled is not None) == pooled
    if classifier:
        assert shapes.logits.shape == (3, config.num_labels)


@pytest.mark.parametrize("name", ["bert-classifier", "roberta-classifier", "distilbert-classifier"])
def test_dropout_follows_its_key(name: str) -> None:
    config, fn, params = make(name)
    tokens = cases.batch(config, "none")["tokens"]
    one, same, other = (fn(params, tokens, rng=jax.random.key(seed)).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    still = fn(params, tokens).logits
    np.testing.assert_array_equal(still, fn(params, tokens).logits)
    assert np.abs(one - still).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert-classifier", [0.1, 0.1, 0.1, 0.3]),
        ("roberta-classifier", [0.1, 0.1, 0.1, 0.3, 0.3]),
        ("distilbert-classifier", [0.1, 0.0, 0.1, 0.3]),
    ],
)
def test_each_family_drops_where_its_reference_does(
    name: str, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the embedding, on the outputs of attention and of the MLP, in the head."""
    config = models.config_from_dict(cases.CASES[name].config)
    config = dataclasses.replace(config, dropout=0.1, attention_dropout=0.0, head_dropout=0.3)
    rates = []

    def record(x, rate, rng):
        rates.append(rate)
        return layers.dropout(x, rate, rng)

    monkeypatch.setattr(model, "dropout", record)
    fn, params = models.functional(models.abstract(config))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    jax.eval_shape(lambda p, t: fn(p, t, rng=jax.random.key(0)), params, tokens)
    assert rates == expected


@pytest.mark.parametrize("name", ENCODERS)
def test_every_target_is_scaled_on_activations_in_training(name: str) -> None:
    config, _, params = make(name)
    scales = cases.random_scales(config, params)
    fn, _ = models.functional(models.abstract(config, remat="full"))
    tokens = cases.batch(config, "none")["tokens"]
    explanation = ha.explain(ha.adapt(fn), params, scales, tokens, rng=jax.random.key(0))
    assert set(explanation.on_activations) == set(scales)
    assert explanation.materialized == explanation.unused == ()


def test_dropout_keeps_the_mean_and_the_share() -> None:
    x = jnp.ones((200, 200))
    y = layers.dropout(x, 0.1, jax.random.key(0))
    assert abs(float((y == 0).mean()) - 0.1) < 0.005
    assert abs(float(y.mean()) - 1.0) < 0.01
    assert layers.dropout(x, 0.1, None) is x


def test_attention_with_dropout_is_attention_on_average() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 5, 2, 4)), jnp.float32) for _ in range(3))
    mask = jnp.asarray(rng.random((2, 1, 1, 5)) < 0.7).at[..., 0].set(True)
    exact = jax.nn.dot_product_attention(q, k, v, mask=mask)
    none = layers.dropout_attention(q, k, v, mask, 0.0, jax.random.key(0))
    np.testing.assert_allclose(none, exact, atol=1e-6)
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda key: layers.dropout_attention(q, k, v, mask, 0.2, key))
    many = cases.jit(draw)(keys)
    np.testing.assert_allclose(many.mean(0), exact, atol=0.05)
    assert float(many.std(0).max()) > 0.1


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_padding_changes_no_output(name: str) -> None:
    config, fn, params = make(name)
    tokens = cases.batch(config, "none")["tokens"]
    wide = np.pad(tokens, ((0, 0), (0, 4)), constant_values=config.pad_token)
    plain = fn(params, tokens)
    padded = fn(params, wide, mask=np.pad(np.ones_like(tokens, bool), ((0, 0), (0, 4))))
    np.testing.assert_allclose(padded.sequence[:, :11], plain.sequence, atol=2e-5)
    np.testing.assert_allclose(padded.pooled, plain.pooled, atol=2e-5)
    # A row of padding alone has no meaning, but it must not poison a sum with NaN.
    empty = fn(params, wide, mask=np.zeros_like(wide, bool))
    assert np.isfinite(empty.sequence).all()


def test_packed_sequences_do_not_see_each_other() -> None:
    config, fn, params = make("bert")
    rng = np.random.default_rng(1)
    a, b = (rng.integers(3, config.vocab_size, (1, n)) for n in (6, 4))
    packed = fn(
        params,
        np.concatenate([a, b], axis=1),
        segment_ids=np.asarray([[1] * 6 + [2] * 4]),
        positions=np.asarray([[*range(6), *range(4)]]),
    )
    np.testing.assert_allclose(packed.sequence[:, :6], fn(params, a).sequence, atol=2e-5)
    np.testing.assert_allclose(packed.sequence[:, 6:], fn(params, b).sequence, atol=2e-5)


def test_token_types_count() -> None:
    config, fn, params = make("bert")
    tokens = cases.batch(config, "none")["tokens"]
    types = np.zeros_like(tokens)
    np.testing.assert_array_equal(
        fn(params, tokens).sequence, fn(params, tokens, token_types=types).sequence
    )
    types[:, 5:] = 1
    assert np.abs(fn(params, tokens).pooled - fn(params, tokens, token_types=types).pooled).max()


def test_token_types_that_a_model_lacks_are_refused() -> None:
    config, fn, params = make("distilbert")
    tokens = cases.batch(config, "none")["tokens"]
    with pytest.raises(ValueError, match="token_types: this model has none"):
        fn(params, tokens, token_types=np.zeros_like(tokens))


def test_a_row_longer_than_the_position_table_is_refused() -> None:
    for name, room in (("bert", 20), ("roberta", 18)):
        _, fn, params = make(name)
        jax.eval_shape(fn, params, jnp.full((1, room), 3))
        with pytest.raises(ValueError, match=f"{room + 1} in a row.*holds {room}"):
            fn(params, jnp.full((1, room + 1), 3))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_numbers_outside_their_tables_are_refused_or_give_nan(name: str) -> None:
    config, run, params = make(name)
    fn, _ = models.functional(models.abstract(config))
    tokens = cases.batch(config, "none")["tokens"]
    for field, rows in (("tokens", 23), ("positions", 20), ("token_types", 2)):
        for outside in (rows, -1):
            numbers = np.zeros_like(tokens)
            numbers[0, 3] = outside
            given = {"tokens": tokens, field: numbers}
            with pytest.raises(ValueError, match=f"{field}: {outside} is outside.*{rows} rows"):
                fn(params, given.pop("tokens"), **given)
            sequence = run(params, **({"tokens": tokens} | {field: numbers})).sequence
            assert np.isnan(sequence[0]).any() and np.isfinite(sequence[1]).all()


def test_bfloat16_gives_float32_logits() -> None:
    config, fn, params = make("roberta-classifier", dtype="bfloat16", remat="dots")
    tokens = cases.batch(config, "none")["tokens"]
    out = fn(params, tokens)
    assert (out.sequence.dtype, out.logits.dtype) == (jnp.bfloat16, jnp.float32)
    exact = make("roberta-classifier")[1](params, tokens).logits
    assert np.abs(out.logits - exact).max() < 0.1 * np.abs(exact).max()
