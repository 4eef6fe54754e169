"""Generation: the cache, unequal prompts, stopping, sampling, and one compilation per shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.models.generate import _bucket, _draw, _pad_left
from tests.models import cases

PROMPTS = [[5, 6, 7, 8, 9], [4], [11, 3, 12]]


def make(name: str):
    config = models.config_from_dict(cases.CASES[name].config)
    fn, _ = models.functional(models.abstract(config))
    return config, fn, cases.random_params(config)


def without_cache(fn, params, prompt: list[int], new: int) -> list[int]:
    """Greedy text by a whole forward pass per token; padding on the right keeps one shape."""
    run = cases.jit(fn)
    row = list(prompt)
    for _ in range(new):
        tokens = np.zeros((1, len(prompt) + new), np.int32)
        tokens[0, : len(row)] = row
        mask = np.arange(tokens.shape[1]) < len(row)
        row.append(int(run(params, tokens, mask=mask[None])[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


def test_a_row_whose_logits_are_not_finite_ends_there_and_is_marked():
    """By -1; rows beside it go on as they are alone, and minus infinity only forbids a token."""

    def fn(forbidden, tokens, mask=None, cache=None):
        new = jnp.zeros((*tokens.shape, 8)).at[..., 7].set(1.0) + jax.nn.one_hot(tokens + 1, 8) * 2
        new = jnp.where((tokens == 5)[..., None], jnp.nan, new)  # after 5, nothing is known
        new = jnp.where((tokens == 3)[..., None], jnp.full(8, -jnp.inf), new)
        return new + forbidden, cache

    def answers(*rows, **options):
        none = jnp.zeros(8).at[6].set(-jnp.inf)
        return models.generate(fn, none, prompts=rows, max_new_tokens=4, **options)

    assert answers([4], [0], [5], [6]) == [[5, -1], [1, 2, 3, -1], [-1], [7, 7, 7, 7]]
    assert answers([4, 5], temperature=1.0, top_k=1) == [[-1]]
    overflowing = jnp.zeros(8).at[2].set(jnp.inf)
    assert models.generate(fn, overflowing, prompts=[[0]], max_new_tokens=4) == [[-1]]


@pytest.mark.parametrize("name", [n for n in cases.DECODERS if n != "llama-dynamic"])
def test_greedy_text_with_a_cache_equals_that_without(name: str) -> None:
    _, fn, params = make(name)
    rows = models.generate(fn, params, prompts=PROMPTS, max_new_tokens=9)
    assert [len(row) for row in rows] == [9, 9, 9]
    # The longest prompt and the shortest, so that padding is covered.
    for row, prompt in list(zip(rows, PROMPTS, strict=True))[:2]:
        assert row == without_cache(fn, params, prompt, 9)


@pytest.mark.parametrize("length", [7, 16, 18])  # below the first frequencies' limit, at it, beyond
def test_a_longrope_text_depends_on_the_tokens_there_are(length: int) -> None:
    config, fn, params = make("phi4-mini-short")
    assert config.rope.original_length == 16
    prompt = [3 + i % 20 for i in range(length)]
    expected = without_cache(fn, params, prompt, 13)
    for new in (3, 13, 16):
        (row,) = models.generate(fn, params, prompts=[prompt], max_new_tokens=new)
        assert row[:13] == expected[:new]
    stop = expected[10]
    (row,) = models.generate(fn, params, prompts=[prompt], max_new_tokens=16, stop_tokens=[stop])
    assert row == expected[: expected.index(stop) + 1]


def test_an_adapted_longrope_text_goes_on_beyond_the_first_frequencies() -> None:
    config, fn, params = make("phi4-mini-short")
    scales = cases.random_scales(config, params)
    adapted, merged = (
        models.generate(*model, prompts=PROMPTS, max_new_tokens=15)
        for model in (
            (ha.adapt(fn, materialize="error"), params, scales),
            (fn, ha.merge(params, scales)),
        )
    )
    assert adapted == merged


def test_a_dynamic_text_does_not_depend_on_the_most_new_tokens() -> None:
    _, fn, params = make("llama-dynamic")
    few, many = (
        models.generate(fn, params, prompts=PROMPTS, max_new_tokens=new) for new in (5, 16)
    )
    assert few == [row[:5] for row in many]


@pytest.mark.parametrize("name", ["llama3", "qwen2", "phi3"])
def test_an_adapted_function_continues_as_merged_weights_do(name: str) -> None:
    config, fn, params = make(name)
    scales = cases.random_scales(config, params)
    forward = ha.adapt(fn, materialize="error")
    base, adapted, merged = (
        models.generate(*model, prompts=PROMPTS, max_new_tokens=12)
        for model in ((fn, params), (forward, params, scales), (fn, ha.merge(params, scales)))
    )
    assert adapted == merged != base


@pytest.mark.parametrize("name", cases.DECODERS)
def test_every_target_is_scaled_on_activations_in_training_and_in_the_loop(name: str) -> None:
    config, fn, params = make(name)
    scales = cases.random_scales(config, params)
    tokens, mask = _pad_left(PROMPTS)
    whole = ha.adapt(
        lambda params, tokens, mask: models.decode(fn, (params,), tokens, mask, slots=4)
    )
    forward = ha.adapt(fn)
    trained = ha.adapt(models.functional(models.abstract(config, remat="dots"))[0])
    for explanation in (
        ha.explain(trained, params, scales, tokens),
        ha.explain(whole, params, scales, tokens, mask),
        ha.explain(forward, params, scales, tokens, mask=mask),
        ha.explain(forward, params, scales, tokens, cache=models.init_cache(*tokens.shape)),
    ):
        assert set(explanation.on_activations) == set(scales)
        assert explanation.materialized == explanation.unused == ()


def test_a_whole_generation_is_adapted_as_one_function() -> None:
    config, fn, params = make("llama3")
    scales = cases.random_scales(config, params)
    tokens, mask = _pad_left(PROMPTS)

    def whole(params, tokens, mask):
        return models.decode(fn, (params,), tokens, mask, slots=6)

    adapted = cases.jit(ha.adapt(whole, materialize="error"))(params, scales, tokens, mask)
    merged = cases.jit(whole)(ha.merge(params, scales), tokens, mask)
    jax.tree.map(np.testing.assert_array_equal, adapted, merged)


class Script:
    """A decoder that says given rows, whatever it is told, and counts its traces and steps."""

    def __init__(self, rows):
        self.rows = np.asarray(rows)
        self.traces = 0
        self.steps = []

    def __call__(self, params, tokens, mask=None, cache=None):
        self.traces += 1
        new = cache.length + tokens.shape[1]
        first = 16  # the prompts' bucket
        at = jnp.clip(new - first, 0, self.rows.shape[1] - 1)
        jax.debug.callback(lambda at: self.steps.append(int(at)), at)
        logits = 9.0 * jax.nn.one_hot(jnp.asarray(self.rows)[:, at], 13)[:, None]
        return logits, cache._replace(length=new)


def test_a_row_ends_at_its_stop_token_and_the_loop_with_the_last_row() -> None:
    script = Script([[1, 2, 9, 4, 5, 6], [1, 2, 3, 4, 8, 6], [9, 1, 1, 1, 1, 1]])
    rows = models.generate(script, {}, prompts=PROMPTS, max_new_tokens=6, stop_tokens=(9, 8))
    jax.effects_barrier()
    assert rows == [[1, 2, 9], [1, 2, 3, 4, 8], [9]]
    assert sorted(script.steps) == [0, 1, 2, 3, 4]


def test_without_a_stop_token_every_row_has_its_number() -> None:
    script = Script([[1, 2, 3, 4, 5, 6]] * 3)
    assert models.generate(script, {}, prompts=PROMPTS, max_new_tokens=4) == [[1, 2, 3, 4]] * 3
    assert models.generate(script, {}, prompts=PROMPTS, max_new_tokens=1) == [[1]] * 3
    assert models.generate(script, {}, prompts=[], max_new_tokens=1) == []


def test_calls_of_one_bucket_share_a_program() -> None:
    script = Script([[1, 2, 3, 4, 5, 6]] * 3)
    models.generate(script, {}, prompts=PROMPTS, max_new_tokens=4)
    traces = script.traces
    models.generate(script, {}, prompts=[[1] * 16, [2], [3]], max_new_tokens=9, stop_tokens=())
    assert script.traces == traces
    models.generate(script, {}, prompts=[[1] * 17, [2], [3]], max_new_tokens=9)
    assert script.traces > traces


@pytest.mark.parametrize("length", [1, 16, 17, 20, 21, 33, 64, 65, 1000, 4097])
def test_a_bucket_holds_its_length_and_wastes_little(length: int) -> None:
    bucket = _bucket(length)
    assert length <= bucket <= max(16, length * 1.25)
    assert _bucket(bucket) == bucket


def test_sampling_of_one_token_is_greedy() -> None:
    _, fn, params = make("llama2")
    greedy, one, little = (
        models.generate(fn, params, prompts=PROMPTS, max_new_tokens=8, **options)
        for options in ({}, {"temperature": 2.0, "top_k": 1}, {"temperature": 2.0, "top_p": 1e-6})
    )
    assert greedy == one == little
    for temperature in (1e-30, 1e-60):
        cold = models.generate(
            fn, params, prompts=PROMPTS, max_new_tokens=8, temperature=temperature
        )
        assert cold == greedy


def test_sampling_depends_on_its_seed_alone() -> None:
    _, fn, params = make("llama2")
    a, b, c = (
        models.generate(fn, params, prompts=PROMPTS, max_new_tokens=8, temperature=3.0, seed=seed)
        for seed in (0, 0, 1)
    )
    assert a == b != c


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (models.Sampling(), [0.4, 0.3, 0.2, 0.1]),
        (models.Sampling(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (models.Sampling(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
        (models.Sampling(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        (models.Sampling(top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (models.Sampling(top_k=9, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        (models.Sampling(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (models.Sampling(temperature=0.5, top_k=3, top_p=0.8), [16 / 25, 9 / 25, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(sampling, expected) -> None:
    # Tokens in mixed order, so that a draw has to be mapped back from the sorted ones.
    order, rows = np.asarray([2, 0, 3, 1]), 4000
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))[np.argsort(order)]
    draws = _draw(jnp.tile(logits, (rows, 1)), sampling, jax.random.key(0))
    with jax.enable_x64(True):
        assert jax.eval_shape(_draw, logits[None], sampling, jax.random.key(0)).dtype == jnp.int32
    shares = np.bincount(np.asarray(draws), minlength=4)[order] / rows
    np.testing.assert_allclose(shares, expected, atol=0.03)
    assert (shares[np.asarray(expected) == 0] == 0).all()


@pytest.mark.parametrize(
    ("sampling", "sorts"),
    [
        (models.Sampling(), False),
        (models.Sampling(top_k=3), False),
        (models.Sampling(top_k=3, top_p=0.5), False),
        (models.Sampling(top_p=0.5), True),
    ],
)
def test_the_vocabulary_is_sorted_for_top_p_alone(sampling, sorts) -> None:
    logits = jax.ShapeDtypeStruct((2, 50), jnp.float32)
    jaxpr = jax.make_jaxpr(_draw)(logits, sampling, jax.random.key(0))
    assert ("sort[" in str(jaxpr)) == sorts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], [2, 13]]}, r"prompts\[1\]: 13 is outside.*13 rows"),
        ({"prompts": [[-1]]}, r"prompts\[0\]: -1 is outside"),
        ({"prompts": [[2**40]]}, r"prompts\[0\]: 1099511627776 is outside"),
        ({"prompts": [[1.5]]}, r"prompts\[0\]: expected token ids, found float64"),
        ({"prompts": ["ab"]}, r"prompts\[0\]: expected token ids"),
        ({"prompts": [[[1]]]}, r"prompts\[0\]: expected token ids.*\(1, 1\)"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"top_k": 1.5, "temperature": 1.0}, "top_k=1.5"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
    ],
)
def test_wrong_options_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        models.generate(Script([[1]]), {}, **({"prompts": [[1]], "max_new_tokens": 2} | options))
