"""Bidirectional encoders of the BERT shape: BERT, RoBERTa, XLM-RoBERTa and DistilBERT."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hyperadapt_jax.models.encoder.config import EncoderConfig
from hyperadapt_jax.models.layers import (
    ACTIVATIONS,
    REMAT,
    UNSHARDED,
    ActivationSharding,
    Embedding,
    LayerNorm,
    Linear,
    attend,
    check_range,
    check_tokens,
    dropout,
    dropout_attention,
)

Array = jax.Array


class EncoderOutput(NamedTuple):
    """The outputs of an encoder.

    Attributes:
      sequence: a vector per token, ``[B, T, D]``.
      pooled: a vector per row from its first token, ``[B, D]``, or None without a pooler.
      logits: the head's outputs in float32, ``[B, C]``, or None without a head.
    """

    sequence: Array
    pooled: Array | None
    logits: Array | None


class Embeddings(nnx.Module):
    """The sum of word, position and, if there are any, token-type vectors, normalized."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        activations: ActivationSharding,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.config = config
        shared: dict[str, Any] = {
            "activations": activations,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.words = Embedding(config.vocab_size, config.embed_dim, **shared)
        self.positions = Embedding(config.num_positions, config.embed_dim, **shared)
        if config.num_token_types:
            self.types = Embedding(config.num_token_types, config.embed_dim, **shared)
        self.norm = LayerNorm(config.embed_dim, config.norm_epsilon, param_dtype=param_dtype)

    def __call__(
        self, tokens: Array, token_types: Array | None, positions: Array | None, dtype: jnp.dtype
    ) -> Array:
        if positions is None:
            positions = self._count(tokens)
        x = self.words(tokens, dtype)
        if self.config.num_token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + self.types(types, dtype)
        return self.norm(x + self.positions(positions, dtype))

    def _count(self, tokens: Array) -> Array:
        """Rows of the position table: from zero, or from the first one with padding before it."""
        first = self.config.first_position
        if first == 0:
            return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        real = (tokens != self.config.pad_token).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + first - 1


class Layer(nnx.Module):
    """One layer: ``norm(x + attention(x))``, then ``norm(x + mlp(x))``."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        stack: tuple[int, ...],
        attention: str | None,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.attention = attention
        shared: dict[str, Any] = {"stack": stack, "param_dtype": param_dtype}
        width, hidden = config.embed_dim, config.mlp_dim
        self.q = Linear(width, width, rngs=rngs, **shared)
        self.k = Linear(width, width, rngs=rngs, **shared)
        self.v = Linear(width, width, rngs=rngs, **shared)
        self.o = Linear(width, width, rngs=rngs, **shared)
        self.attn_norm = LayerNorm(width, config.norm_epsilon, **shared)
        self.up = Linear(width, hidden, rngs=rngs, **shared)
        self.down = Linear(hidden, width, rngs=rngs, **shared)
        self.mlp_norm = LayerNorm(width, config.norm_epsilon, **shared)

    def __call__(self, x: Array, mask: Array | None, rng: Array | None) -> Array:
        """Applies the layer to ``x: [B, T, D]``; ``mask: [B, 1, 1, T]`` is True at tokens."""
        config = self.config
        for_weights, for_attention, for_mlp = (
            (None,) * 3 if rng is None else jax.random.split(rng, 3)
        )
        q, k, v = (
            y.reshape(*y.shape[:2], config.num_heads, config.head_dim)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        if for_weights is None or config.attention_dropout == 0.0:
            y = attend(q, k, v, mask=mask, implementation=self.attention)
        else:
            y = dropout_attention(q, k, v, mask, config.attention_dropout, for_weights)
        y = self.o(y.reshape(x.shape))
        rate = config.dropout if config.out_dropout is None else config.out_dropout
        x = self.attn_norm(x + dropout(y, rate, for_attention))
        y = self.down(ACTIVATIONS[config.activation](self.up(x)))
        return self.mlp_norm(x + dropout(y, config.dropout, for_mlp))


class Classifier(nnx.Module):
    """The head: a projection of the pooler's output, or of a hidden layer of its own."""

    def __init__(
        self, config: EncoderConfig, outputs: int, *, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.config = config
        shared: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        if config.head != "pooled":
            self.dense = Linear(config.embed_dim, config.embed_dim, **shared)
        self.out = Linear(config.embed_dim, outputs, **shared)

    def __call__(self, x: Array, rng: Array | None) -> Array:
        before, between = (None, None) if rng is None else jax.random.split(rng)
        rate, head = self.config.head_dropout, self.config.head
        if head == "relu":
            x = dropout(jax.nn.relu(self.dense(x)), rate, between)
        else:
            x = dropout(x, rate, before)
        if head == "tanh":
            x = dropout(jnp.tanh(self.dense(x)), rate, between)
        return self.out(x, precise=True)


class Encoder(nnx.Module):
    """A bidirectional encoder, with a classification or regression head if its config has labels.

    Call it under ``jax.jit`` (or take `functional` of it): op by op, its scan is traced anew each
    time.

    Args:
      config: the architecture.
      dtype: dtype of the computation; logits are float32 always.
      param_dtype: dtype of the parameters; ``dtype`` if not given.
      remat: what the backward pass finds stored, by name: ``none``, ``dots`` or ``full``.
      attention: implementation of `jax.nn.dot_product_attention`: None for its own choice,
        ``xla``, or ``cudnn`` for the flash kernels of an NVIDIA GPU (bfloat16 or float16).
      activations: how activations are spread over a mesh of devices.
      rngs: source of the initial parameters, stream ``params``.

    Raises:
      ValueError: ``remat`` is no known policy.
    """

    def __init__(
        self,
        config: EncoderConfig,
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
            "param_dtype": jnp.dtype(dtype if param_dtype is None else param_dtype),
            "rngs": rngs,
        }
        self.embed = Embeddings(config, activations=activations, **shared)
        self.layers = Layer(config, stack=(config.num_layers,), attention=attention, **shared)
        if config.pooler:
            self.pooler = Linear(config.embed_dim, config.embed_dim, **shared)
        if config.num_labels is not None:
            self.classifier = Classifier(config, config.num_labels, **shared)

    def __call__(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        token_types: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        rng: Array | None = None,
    ) -> EncoderOutput:
        """Encodes a batch.

        Args:
          tokens: token ids, ``[B, T]`` integers.
          mask: True at tokens, False at padding, ``[B, T]``; all True if not given.
          token_types: which part a token belongs to, ``[B, T]``; zero if not given. Not every
            family tells them apart.
          positions: rows of the position table, ``[B, T]``; counted as the family does if not
            given.
          segment_ids: number of the sequence that a token belongs to, ``[B, T]``, where several
            are packed in one row (give ``positions`` then); a token sees its own alone.
          rng: key of the dropout, for training; without one there is none.

        Returns:
          The hidden states, and what the pooler and the head make of them.

        Raises:
          ValueError: shapes do not fit, there are no token types, the row is longer than the
            position table, or (outside ``jit``) a number is outside its table; under ``jit`` such a
            number gives NaN.
        """
        config = self.config
        check_tokens(
            tokens,
            mask=mask,
            token_types=token_types,
            positions=positions,
            segment_ids=segment_ids,
        )
        room = config.max_length
        if positions is None and tokens.shape[1] > room:
            raise ValueError(f"tokens: {tokens.shape[1]} in a row, the position table holds {room}")
        check_range("tokens", tokens, config.vocab_size)
        if positions is not None:
            check_range("positions", positions, config.num_positions)
        if token_types is not None:
            if not config.num_token_types:
                raise ValueError("token_types: this model has none; leave them out")
            check_range("token_types", token_types, config.num_token_types)
        for_embed, for_layers, for_head = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        x = self.embed(tokens, token_types, positions, self.dtype)
        x = dropout(x, config.dropout, for_embed)
        x = self._run(x, _visible(mask, segment_ids), for_layers)
        pooled = jnp.tanh(self.pooler(x[:, 0])) if config.pooler else None
        logits = None
        if config.num_labels is not None:
            logits = self.classifier(x[:, 0] if pooled is None else pooled, for_head)
        return EncoderOutput(x, pooled, logits)

    def _run(self, x: Array, mask: Array | None, rng: Array | None) -> Array:
        """Scans the layers over the stream ``x: [B, T, D]``."""
        graph, params = nnx.split(self.layers)

        def layer(x: Array, slices: Any) -> tuple[Array, None]:
            params, rng = slices
            x = nnx.merge(graph, params)(x, mask, rng)
            return self.activations.stream(x), None

        rngs = None if rng is None else jax.random.split(rng, self.config.num_layers)
        x = self.activations.stream(x)
        return jax.lax.scan(REMAT[self.remat](layer), x, (params, rngs))[0]


def _visible(mask: Array | None, segment_ids: Array | None) -> Array | None:
    """The attention mask, broadcastable to ``[B, N, T, T]``; None where all tokens see all."""
    visible = None if mask is None else mask.astype(bool)[:, None, None, :]
    if segment_ids is not None:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        visible = same if visible is None else visible & same
    return visible
