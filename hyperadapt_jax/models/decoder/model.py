"""Causal language models of the Llama shape: Llama, Mistral, Qwen2, Qwen3, Phi-3 and Phi-4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from hyperadapt_jax.models.decoder.config import DecoderConfig
from hyperadapt_jax.models.layers import (
    ACTIVATIONS,
    REMAT,
    UNSHARDED,
    ActivationSharding,
    Embedding,
    Linear,
    RMSNorm,
    attend,
    check_range,
    check_tokens,
)
from hyperadapt_jax.models.rope import apply_rope, rope_tables

Array = jax.Array

# The cache's keys and values, ``[L, B, S, K, H]`` each, or None without a cache.
KV = TypeVar("KV", tuple[Array, Array], None)

BLOCK = 128  # queries that meet a cache at once: the memory of their scores is linear in the keys


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far.

    Attributes:
      keys: ``[L, B, S, K, H]``, or None before the first call.
      values: ``[L, B, S, K, H]``, or None before the first call.
      valid: whether a slot holds a token and not padding, ``[B, S]``.
      length: slots in use, a scalar.
      good_until: tokens of the longest sequence up to which keys and values hold, a scalar: beyond
        it every layer rotates by other frequencies, and all tokens have to be given again, to an
        empty cache. None where they hold forever.
    """

    keys: Array | None
    values: Array | None
    valid: Array
    length: Array
    good_until: Array | None = None


def init_cache(batch: int, slots: int) -> Cache:
    """An empty cache; the model allocates keys and values in its own dtype at the first call.

    Args:
      batch: B.
      slots: tokens it can hold for each row, S, padding included.

    >>> cache = init_cache(2, 16)
    >>> cache.valid.shape, int(cache.length), cache.keys is None
    ((2, 16), 0, True)
    """
    return Cache(
        keys=None,
        values=None,
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


class _Tokens(NamedTuple):
    """What an attention mask is made of."""

    order: Array  # [T], place in the row
    groups: tuple[Array, ...]  # [B, T] each: a token sees those that equal it in all of them


class _AttentionInputs(NamedTuple):
    """What attention needs in every layer: rotary tables and the parts of its mask."""

    cos: Array
    sin: Array
    tokens: tuple[_Tokens, _Tokens] | None = None  # queries, keys; None where causal alone
    write_at: Array | int = 0  # slot of the first new token
    fresh: bool = False  # the cache was empty: the new keys are all there are


class Layer(nnx.Module):
    """One layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        stack: tuple[int, ...],
        attention: str | None,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.attention = attention
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shared: dict[str, Any] = {"stack": stack, "param_dtype": param_dtype}

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias=bias, rngs=rngs, **shared)

        self.attn_norm = RMSNorm(config.embed_dim, config.norm_epsilon, **shared)
        if config.fused:
            self.qkv = linear(config.embed_dim, queries + 2 * keys, config.qkv_bias)
        else:
            self.q = linear(config.embed_dim, queries, config.qkv_bias)
            self.k = linear(config.embed_dim, keys, config.qkv_bias)
            self.v = linear(config.embed_dim, keys, config.qkv_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_epsilon, **shared)
            self.k_norm = RMSNorm(config.head_dim, config.norm_epsilon, **shared)
        self.o = linear(queries, config.embed_dim, config.out_bias)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_epsilon, **shared)
        if config.fused:
            self.gate_up = linear(config.embed_dim, 2 * config.mlp_dim, config.mlp_bias)
        else:
            self.gate = linear(config.embed_dim, config.mlp_dim, config.mlp_bias)
            self.up = linear(config.embed_dim, config.mlp_dim, config.mlp_bias)
        self.down = linear(config.mlp_dim, config.embed_dim, config.mlp_bias)

    def __call__(
        self,
        x: Array,
        context: _AttentionInputs,
        window: Array | int | None,
        index: Array,
        kv: KV,
    ) -> tuple[Array, KV]:
        """Applies the layer.

        Args:
          x: ``[B, T, D]``.
          context: rotary tables and masks, equal for all layers.
          window: tokens back that this layer sees, itself included; None for all.
          index: number of this layer, by which it finds its place in ``kv``.
          kv: the cache's keys and values, ``[L, B, S, K, H]`` each, or None.

        Returns:
          ``x`` and ``kv`` after this layer.
        """
        config = self.config
        q, k, v = self._heads(self.attn_norm(x))
        q = apply_rope(q, context.cos, context.sin)
        k = apply_rope(k, context.cos, context.sin)
        if kv is not None:
            zero = jnp.zeros((), jnp.int32)
            at = (index, zero, context.write_at, zero, zero)
            keys = jax.lax.dynamic_update_slice(kv[0], k[None], at)
            values = jax.lax.dynamic_update_slice(kv[1], v[None], at)
            kv = keys, values
            if not context.fresh:
                k, v = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in kv)
        # Flash kernels have nothing to save where one query meets a cache.
        alone = kv is not None and q.shape[1] == 1
        implementation = None if alone else self.attention
        if context.tokens is None:
            local = None if window is None else (window - 1, 0)
            y = attend(
                q, k, v, is_causal=True, local_window_size=local, implementation=implementation
            )
        else:
            queries, seen = context.tokens

            def attention(q: Array, queries: _Tokens) -> Array:
                mask = _visible(queries, seen, window)
                return attend(q, k, v, mask=mask, implementation=implementation)

            y = attention(q, queries) if kv is None else _in_blocks(attention, q, queries)
        x = x + self.o(y.reshape(*y.shape[:2], -1))
        y = self.mlp_norm(x)
        if config.fused:
            gate, up = jnp.split(self.gate_up(y), 2, axis=-1)
        else:
            gate, up = self.gate(y), self.up(y)
        return x + self.down(ACTIVATIONS[config.activation](gate) * up), kv

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``."""
        config = self.config
        if config.fused:
            queries, keys = (
                config.num_heads * config.head_dim,
                config.num_kv_heads * config.head_dim,
            )
            q, k, v = jnp.split(self.qkv(x), (queries, queries + keys), axis=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in (q, k, v))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class Decoder(nnx.Module):
    """A causal language model: ``model(tokens)`` gives the next token's logits at every position.

    Call it under ``jax.jit`` (or take `functional` of it): op by op, its scan is traced anew each
    time.

    Args:
      config: the architecture.
      dtype: dtype of the computation; logits are float32 always.
      param_dtype: dtype of the parameters; ``dtype`` if not given.
      remat: what the backward pass finds stored, by name: ``none``, ``dots`` or ``full``.
      attention: implementation of `jax.nn.dot_product_attention`, but for single tokens that meet
        a cache: None for its own choice, ``xla``, or ``cudnn`` for the flash kernels of an NVIDIA
        GPU (bfloat16 or float16).
      activations: how activations are spread over a mesh of devices.
      rngs: source of the initial parameters, stream ``params``.

    Raises:
      ValueError: ``remat`` is no known policy.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jnp.dtype | str = "float32",
        param_dtype: jnp.dtype | str | None = None,
        remat: str = "none",
        attention: str | None = None,
        activations: ActivationSharding = UNSHARDED,
        rngs: nnx.Rngs,
    ):
        if remat not in REMAT:
            raise ValueError(f"remat={remat!r}: expected one of {', '.join(REMAT)}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.activations = activations
        shared: dict[str, Any] = {
            "param_dtype": jnp.dtype(dtype if param_dtype is None else param_dtype)
        }
        self.embed = Embedding(
            config.vocab_size, config.embed_dim, activations=activations, rngs=rngs, **shared
        )
        self.layers = Layer(
            config, stack=(config.num_layers,), attention=attention, rngs=rngs, **shared
        )
        self.norm = RMSNorm(config.embed_dim, config.norm_epsilon, **shared)
        if not config.tie_embeddings:
            self.head = Linear(config.embed_dim, config.vocab_size, bias=False, rngs=rngs, **shared)

    def __call__(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """Logits of the token after each one.

        Args:
          tokens: token ids, ``[B, T]`` integers.
          mask: True at tokens, False at padding, ``[B, T]``. Padding on the right alone needs
            none, since a token sees only those before it, but where the rotary frequencies depend
            on the length (``dynamic``, ``longrope``): there it would count.
          segment_ids: number of the sequence that a token belongs to, ``[B, T]``, where several
            are packed in one row; a token sees its own alone.
          positions: place of each token in its sequence, ``[B, T]``; counted from ``mask`` and
            ``segment_ids`` if not given.
          cache: keys and values of the tokens before these, from `init_cache` or an earlier call.

        Returns:
          Logits ``[B, T, V]`` in float32; with a cache, those of the last place alone,
          ``[B, 1, V]``, and the cache with these tokens added.

        Raises:
          ValueError: shapes do not fit, packed segments meet a cache, or (outside ``jit``) a token
            is outside the vocabulary; under ``jit`` its row's logits are NaN.
        """
        if cache is None:
            places = {"mask": mask, "segment_ids": segment_ids, "positions": positions}
            return self.logits(self.hidden(tokens, **places))
        self._check(tokens, mask=mask, segment_ids=segment_ids, positions=positions)
        if segment_ids is not None:
            raise ValueError("segment_ids: packed sequences cannot be continued from a cache")
        if cache.valid.shape[0] != tokens.shape[0] or cache.valid.shape[1] < tokens.shape[1]:
            raise ValueError(f"cache: {cache.valid.shape} slots do not hold tokens {tokens.shape}")
        cache, kv, context = self._extend(tokens, mask, positions, cache)
        x, (keys, values) = self._run(self.embed(tokens, self.dtype), context, kv)
        return self.logits(self.norm(x[:, -1:])), cache._replace(keys=keys, values=values)

    def hidden(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        positions: Array | None = None,
    ) -> Array:
        """Hidden states after the last norm, ``[B, T, D]``: what :meth:`logits` is a product of.

        Arguments and errors are those of a call without a cache.
        """
        self._check(tokens, mask=mask, segment_ids=segment_ids, positions=positions)
        context = self._training_context(tokens, mask, segment_ids, positions)
        x, _ = self._run(self.embed(tokens, self.dtype), context, None)
        return self.norm(x)

    def logits(self, x: Array) -> Array:
        """Logits of hidden states ``x: [..., D]`` in float32, ``[..., V]``: the head alone."""
        return self.embed.attend(x) if self.config.tie_embeddings else self.head(x, precise=True)

    def _check(self, tokens: Array, **places: Array | None) -> None:
        check_tokens(tokens, **places)
        check_range("tokens", tokens, self.config.vocab_size)

    def _run(self, x: Array, context: _AttentionInputs, kv: KV) -> tuple[Array, KV]:
        """Scans the layers over the stream ``x: [B, T, D]``."""
        graph, params = nnx.split(self.layers)
        windows = self.config.windows
        shared = windows[0] if len(set(windows)) == 1 else None
        mixed = None
        if len(set(windows)) > 1:
            unlimited = jnp.iinfo(jnp.int32).max
            mixed = jnp.asarray([unlimited if w is None else w for w in windows], jnp.int32)

        def layer(carry: tuple[Array, KV], slices: Any) -> tuple[tuple[Array, KV], None]:
            x, kv = carry
            params, index, window = slices
            window = shared if window is None else window
            x, kv = nnx.merge(graph, params)(x, context, window, index, kv)
            return (self.activations.stream(x), kv), None

        numbers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        x = self.activations.stream(x)
        carry, _ = jax.lax.scan(REMAT[self.remat](layer), (x, kv), (params, numbers, mixed))
        return carry

    def _training_context(
        self,
        tokens: Array,
        mask: Array | None,
        segment_ids: Array | None,
        positions: Array | None,
    ) -> _AttentionInputs:
        batch, length = tokens.shape
        index = jnp.arange(length, dtype=jnp.int32)
        if positions is None:
            positions = _positions(index, mask, segment_ids, batch)
        tables = rope_tables(self.config.rope, self.config.head_dim, positions)
        if mask is None and segment_ids is None and len(set(self.config.windows)) == 1:
            return _AttentionInputs(*tables)
        # Padding sees padding, so that no row of the softmax is empty.
        groups = (segment_ids, None if mask is None else mask.astype(bool))
        seen = _Tokens(index, tuple(group for group in groups if group is not None))
        return _AttentionInputs(*tables, tokens=(seen, seen))

    def _extend(
        self, tokens: Array, mask: Array | None, positions: Array | None, cache: Cache
    ) -> tuple[Cache, tuple[Array, Array], _AttentionInputs]:
        config = self.config
        batch, length = tokens.shape
        slots = cache.valid.shape[1]
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        if positions is None:
            before = jnp.sum(cache.valid, axis=1, dtype=jnp.int32)[:, None]
            positions = before + jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, mask, cache.length, axis=1)
        queries = _Tokens(cache.length + jnp.arange(length, dtype=jnp.int32), (mask,))
        keys, values = cache.keys, cache.values
        fresh = keys is None or values is None
        seen = queries if fresh else _Tokens(jnp.arange(slots, dtype=jnp.int32), (valid,))
        context = _AttentionInputs(
            *rope_tables(config.rope, config.head_dim, positions),
            tokens=(queries, seen),
            write_at=cache.length,
            fresh=fresh,
        )
        if keys is None or values is None:
            shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
            keys = values = self.activations.cache(jnp.zeros(shape, self.dtype))
            if config.rope.recomputes:
                original = jnp.asarray(config.rope.original_length, jnp.int32)
                cache = cache._replace(good_until=original)
        cache = cache._replace(valid=valid, length=cache.length + length)
        return cache, (keys, values), context


def _visible(queries: _Tokens, keys: _Tokens, window: Array | int | None) -> Array:
    """The attention mask: True where a query sees a key, ``[B or 1, 1, T, S]``."""
    distance = queries.order[:, None] - keys.order
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    visible = visible[None, None]
    for theirs, group in zip(queries.groups, keys.groups, strict=True):
        visible = visible & (theirs[:, None, :, None] == group[:, None, None, :])
    return visible


def _in_blocks(attention: Callable[[Array, _Tokens], Array], q: Array, queries: _Tokens) -> Array:
    """Attention of ``q: [B, T, N, H]``, a block of queries after another, ``[B, T, N, H]``."""
    batch, length = q.shape[:2]
    if length <= BLOCK:
        return attention(q, queries)
    blocks = -(-length // BLOCK)

    def split(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(0, (blocks * BLOCK - length) * (i == axis)) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], blocks, BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    groups = tuple(split(group, 1) for group in queries.groups)
    xs = split(q, 1), _Tokens(split(queries.order, 0), groups)
    y = jax.lax.map(lambda block: attention(*block), xs)
    return jnp.moveaxis(y, 0, 1).reshape(batch, blocks * BLOCK, *q.shape[2:])[:, :length]


def _positions(index: Array, mask: Array | None, segment_ids: Array | None, batch: int) -> Array:
    """Places counted from the start of each sequence, ``[B, T]``."""
    if segment_ids is not None:
        first = jnp.ones((batch, 1), bool)
        starts = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
        return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    if mask is not None:
        return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.broadcast_to(index, (batch, index.shape[0]))
