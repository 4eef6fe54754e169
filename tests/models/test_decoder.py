"""Decoders: masks, packing, the cache, dtypes, rematerialization and compile time."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperadapt_jax import models
from hyperadapt_jax.models.decoder import model as decoder
from hyperadapt_jax.models.layers import check_attention
from tests.models import cases


def make(name: str, **options):
    config = models.config_from_dict(cases.CASES[name].config)
    fn, _ = models.functional(models.abstract(config, **options))
    return config, fn, cases.random_params(config)


@pytest.mark.parametrize("blocks", ["one block", "blocks"])
@pytest.mark.parametrize("name", [n for n in cases.DECODERS if n != "llama-dynamic"])
def test_a_cache_changes_no_logits(name: str, blocks: str, monkeypatch) -> None:
    config, fn, params = make(name)
    inputs = cases.batch(config, "left")
    tokens, mask = jnp.asarray(inputs["tokens"]), jnp.asarray(inputs["mask"])
    if blocks == "blocks":
        monkeypatch.setattr(decoder, "BLOCK", 4)
    run = cases.jit(lambda *args, **kwargs: fn(*args, **kwargs))  # traced anew: no BLOCK is kept
    full = run(params, tokens, mask=mask)
    cache = models.init_cache(*tokens.shape)
    head = 6
    logits, cache = run(params, tokens[:, :head], mask=mask[:, :head], cache=cache)
    assert logits.shape == (len(tokens), 1, config.vocab_size)
    np.testing.assert_allclose(logits[:, 0], full[:, head - 1], atol=2e-5)
    logits, cache = run(params, tokens[:, head:-1], cache=cache)
    np.testing.assert_allclose(logits[:, 0], full[:, -2], atol=2e-5)
    logits, cache = run(params, tokens[:, -1:], cache=cache)
    np.testing.assert_allclose(logits[:, 0], full[:, -1], atol=2e-5)
    assert cache.length == tokens.shape[1]
    assert cache.keys.shape[:4] == (config.num_layers, *tokens.shape, config.num_kv_heads)


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_hidden_states_and_the_head_are_steps_of_their_own(name: str) -> None:
    config, fn, params = make(name)
    inputs = cases.batch(config, "right")
    tokens, mask = jnp.asarray(inputs["tokens"]), jnp.asarray(inputs["mask"])

    def by_steps(model: models.Decoder, tokens: jax.Array, **places: jax.Array) -> jax.Array:
        return model.logits(model.hidden(tokens, **places))

    whole = cases.jit(lambda *args, **kwargs: fn(*args, **kwargs))(params, tokens, mask=mask)
    found = cases.jit(lambda *args, **kwargs: fn(*args, method=by_steps, **kwargs))
    np.testing.assert_array_equal(found(params, tokens, mask=mask), whole)
    hidden = jax.eval_shape(lambda p, t: fn(p, t, method=models.Decoder.hidden), params, tokens)
    assert hidden.shape == (*tokens.shape, config.embed_dim)
    with pytest.raises(ValueError, match=r"mask: expected .* as tokens"):
        fn(params, tokens, mask=mask[:, 1:], method=models.Decoder.hidden)


def test_the_memory_of_a_long_prompt_is_linear() -> None:
    config, fn, params = make("llama2")

    def prefill(params, tokens):
        return fn(params, tokens, cache=models.init_cache(1, 2 * tokens.shape[1]))

    def scratch(length: int) -> int:
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = cases.jit(prefill).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(4096) < 2.5 * scratch(2048) < 4 * config.num_heads * 2048**2


@pytest.mark.parametrize("name", ["phi4-mini-short", "llama-dynamic"])
def test_padding_does_not_stretch_the_frequencies(name: str) -> None:
    config, fn, params = make(name)
    tokens = cases.batch(config, "none")["tokens"]
    wide = np.pad(tokens, ((0, 0), (0, 32)))
    mask = np.arange(wide.shape[1]) < tokens.shape[1]
    mask = np.broadcast_to(mask, wide.shape)
    run = cases.jit(fn)
    plain = run(params, tokens)
    for options in ({"mask": mask}, {"positions": mask.cumsum(1) - 1}):
        np.testing.assert_allclose(run(params, wide, **options)[:, :11], plain, atol=2e-5)
    assert np.abs(run(params, wide)[:, :11] - plain).max() > 1e-3


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2-sliding"])
def test_packed_sequences_do_not_see_each_other(name: str) -> None:
    config, fn, params = make(name)
    rng = np.random.default_rng(1)
    a, b = (rng.integers(3, config.vocab_size, (1, n)) for n in (7, 5))
    packed = np.concatenate([a, b, np.zeros((1, 2), int)], axis=1)
    segments = np.asarray([[1] * 7 + [2] * 5 + [0] * 2])
    run = cases.jit(fn)
    together = run(params, packed, segment_ids=segments, mask=segments > 0)
    np.testing.assert_allclose(together[:, :7], run(params, a), atol=2e-5)
    np.testing.assert_allclose(together[:, 7:12], run(params, b), atol=2e-5)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2-sliding", "phi3"])
def test_padding_changes_no_logits(name: str) -> None:
    config, fn, params = make(name)
    tokens = cases.batch(config, "none")["tokens"]
    run = cases.jit(fn)
    plain = run(params, tokens)
    everything = run(params, tokens, mask=np.ones_like(tokens, bool))
    np.testing.assert_allclose(everything, plain, atol=2e-5)
    for widths, part in (((3, 0), slice(3, None)), ((0, 4), slice(0, 11))):
        wide = np.pad(tokens, ((0, 0), widths), constant_values=5)
        mask = np.pad(np.ones_like(tokens, bool), ((0, 0), widths))
        padded = run(params, wide, mask=mask)
        np.testing.assert_allclose(padded[:, part], plain, atol=2e-5)
        assert np.isfinite(padded).all()
    unmasked = run(params, np.pad(tokens, ((0, 0), (0, 4))))
    np.testing.assert_allclose(unmasked[:, :11], plain, atol=2e-5)


def test_a_window_hides_what_is_further_back() -> None:
    config, fn, params = make("mistral")
    one = dataclasses.replace(config, num_layers=1, windows=(4,))
    fn, _ = models.functional(models.abstract(one))
    params = cases.random_params(one)
    tokens = cases.batch(config, "none")["tokens"]
    other = tokens.copy()
    other[:, 2] = (other[:, 2] + 1) % config.vocab_size
    run = cases.jit(fn)
    difference = np.abs(run(params, tokens) - run(params, other)).max(axis=(0, 2))
    changed = difference > 1e-6
    assert changed.tolist() == [False] * 2 + [True] * 4 + [False] * 5


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_changes_no_gradient(remat: str) -> None:
    config, plain, params = make("qwen2")
    fn, _ = models.functional(models.abstract(config, remat=remat))
    tokens = cases.batch(config, "none")["tokens"]

    def gradient(fn):
        return cases.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, tokens)))))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient(fn), gradient(plain)
    )
    jaxpr = str(jax.make_jaxpr(fn)(params, tokens))
    assert "remat" in jaxpr or "checkpoint" in jaxpr


def test_computation_and_parameters_have_dtypes_of_their_own() -> None:
    config = models.config_from_dict(cases.CASES["qwen3"].config)
    tokens = cases.batch(config, "none")["tokens"]
    for options, stored in (
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "param_dtype": "float32"}, "float32"),
        ({"dtype": "float32", "param_dtype": "bfloat16"}, "bfloat16"),
    ):
        fn, params = models.functional(models.abstract(config, **options))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {stored}
        assert jax.eval_shape(fn, params, tokens).dtype == jnp.float32
        cache = models.init_cache(*tokens.shape)
        _, cache = jax.eval_shape(lambda p, c, fn=fn: fn(p, tokens, cache=c), params, cache)
        assert cache.keys.dtype == options["dtype"]
        products = [
            eqn.invars[0].aval.dtype.name
            for eqn in jax.make_jaxpr(fn)(params, tokens).jaxpr.eqns
            if eqn.primitive.name == "dot_general"
        ]
        assert products == [options["dtype"]]


def test_bfloat16_stays_near_float32() -> None:
    config, fn, params = make("llama3")
    half, _ = models.functional(models.abstract(config, dtype="bfloat16"))
    tokens = cases.batch(config, "none")["tokens"]
    exact, rough = cases.jit(fn)(params, tokens), cases.jit(half)(params, tokens)
    assert np.abs(exact - rough).mean() < 0.02 * np.abs(exact).mean()


def test_a_model_is_split_and_made_again() -> None:
    config, fn, params = make("phi3")
    tokens = cases.batch(config, "none")["tokens"]
    model = models.from_params(config, params)
    again, again_params = models.functional(model)
    assert again == fn and hash(again) == hash(fn)
    run = cases.jit(lambda params: fn(params, tokens))
    np.testing.assert_array_equal(cases.jit(lambda: model(tokens))(), run(params))
    assert again_params["layers"]["qkv"]["kernel"] is params["layers"]["qkv"]["kernel"]
    assert models.functional(models.abstract(config, remat="full"))[0] != fn
    with pytest.raises(ValueError, match="norm/scale: missing"):
        models.from_params(config, {k: v for k, v in params.items() if k != "norm"})
    with pytest.raises(ValueError, match="norm/scale: expected"):
        models.from_params(config, params | {"norm": {"scale": np.ones(3)}})


def test_the_table_covers_every_parameter_once() -> None:
    for case in cases.CASES.values():
        config = models.config_from_dict(case.config)
        _, params = models.functional(models.abstract(config))
        paths = ["/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(params)]
        assert sorted(paths) == sorted(tensor.path for tensor in models.tensors(config))


@pytest.mark.parametrize("outside", [23, 99, -1, -23])
def test_a_token_outside_the_vocabulary_is_refused_or_gives_nan(outside: int) -> None:
    _, fn, params = make("llama2")
    tokens = np.asarray([[3, outside], [3, 4]])
    logits = cases.jit(fn)(params, tokens)
    assert np.isnan(logits[0]).any(axis=-1).tolist() == [True, True]
    assert np.isfinite(logits[1]).all()
    for known in (tokens, jnp.asarray(tokens)):
        with pytest.raises(ValueError, match=f"tokens: {outside} is outside.*23 rows"):
            fn(params, known)
        with pytest.raises(ValueError, match=f"tokens: {outside} is outside.*23 rows"):
            fn(params, known, cache=models.init_cache(2, 4))


def test_float16_is_computed_on_a_cpu() -> None:
    config, fn, params = make("llama3")
    half, _ = models.functional(models.abstract(config, dtype="float16"))
    tokens = cases.batch(config, "none")["tokens"]
    exact = cases.jit(fn)(params, tokens)
    options = ({}, {"mask": np.ones_like(tokens, bool)}, {"cache": models.init_cache(2, 16)})
    for option in options:
        rough = cases.jit(half)(params, tokens, **option)
        rough = rough[0] if "cache" in option else rough
        wanted = exact[:, -rough.shape[1] :]
        assert np.abs(wanted - rough).mean() < 0.005 * np.abs(wanted).mean()
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(half(p, tokens))))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(cases.jit(gradient)(params)))


@pytest.mark.parametrize("name", ["llama-dynamic", "phi4-mini-short", "qwen2-sliding"])
def test_64_bit_types_change_nothing(name: str) -> None:
    config, fn, params = make(name)
    tokens = cases.batch(config, "none")["tokens"]
    plain = cases.jit(fn)(params, tokens)
    text = models.generate(fn, params, prompts=tokens.tolist(), max_new_tokens=7)
    with jax.enable_x64(True):
        logits = cases.jit(fn)(params, tokens)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, plain, atol=2e-5)
        assert models.generate(fn, params, prompts=tokens.tolist(), max_new_tokens=7) == text


def test_an_attention_that_cannot_be_computed_here_is_refused() -> None:
    check_attention(None, jnp.dtype("float32"), 8)
    check_attention("xla", jnp.dtype("bfloat16"), 8)
    with pytest.raises(ValueError, match="attention='flash' does not work.*float32.*heads of 8"):
        check_attention("flash", jnp.dtype("float32"), 8)
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match=r"attention='cudnn' does not work here.*cuDNN[^\n]*$"):
            check_attention("cudnn", jnp.dtype("bfloat16"), 64)


def test_wrong_calls_are_refused() -> None:
    config, fn, params = make("llama2")
    tokens = jnp.ones((2, 5), int)
    with pytest.raises(ValueError, match="remat='some'.*none, dots, full"):
        models.create(config, remat="some")
    with pytest.raises(ValueError, match="tokens: expected integers"):
        fn(params, tokens[0])
    with pytest.raises(ValueError, match="tokens: expected integers.*float32"):
        fn(params, tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"mask: expected \(2, 5\)"):
        fn(params, tokens, mask=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match=r"cache: \(2, 4\) slots"):
        fn(params, tokens, cache=models.init_cache(2, 4))
    with pytest.raises(ValueError, match="segment_ids: packed"):
        fn(params, tokens, segment_ids=tokens, cache=models.init_cache(2, 9))


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth() -> None:
    base = models.config_from_dict(cases.CASES["llama3"].config)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def seconds(layers: int) -> float:
        config = dataclasses.replace(base, num_layers=layers, windows=(None,) * layers)
        fn, params = models.functional(models.abstract(config, remat="dots"))
        gradient = jax.grad(lambda p, t: jnp.sum(fn(p, t)))
        start = time.process_time()
        jax.jit(gradient).lower(params, tokens).compile()
        return time.process_time() - start

    seconds(2)  # what is loaded once
    # The fastest of a few: the machine has other work too.
    shallow, deep = (min(seconds(layers) for _ in range(2)) for layers in (4, 32))
    assert deep < 1.3 * shallow
