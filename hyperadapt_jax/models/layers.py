"""Layers shared by the encoder and the decoder: projections, norms, rotary positions, attention.

A module's parameters may have leading stack axes (one slice per layer); inside the scan over the
layers the same module sees them without.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

if TYPE_CHECKING:
    from hyperadapt_jax.models.decoder.config import Rope

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

# What the backward pass finds stored: "none" keeps all intermediates, "dots" the products with
# weights, "full" the residual stream between layers alone.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda f: f,
    "dots": functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        prevent_cse=False,
    ),
    "full": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False
    ),
}

_INIT_STDDEV = 0.02


class Linear(nnx.Module):
    """``x @ kernel + bias``, with the kernel stored ``(in, out)``.

    Args:
      inputs: size of the contracted axis.
      outputs: size of the new axis.
      stack: leading axes of the parameters.
      bias: whether to add one.
      param_dtype: dtype of the parameters.
      rngs: source of the initial values.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stack: tuple[int, ...] = (),
        bias: bool = True,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shape = (*stack, inputs, outputs)
        draw = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param((_INIT_STDDEV * draw).astype(param_dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((*stack, outputs), param_dtype))

    def __call__(self, x: Array, *, precise: bool = False) -> Array:
        """Project ``x: [..., in]``; with ``precise`` the product is left in float32."""
        dtype = jnp.float32 if precise else x.dtype
        kernel = self.kernel[...].astype(x.dtype)
        y = jnp.dot(x, kernel, preferred_element_type=dtype)
        if hasattr(self, "bias"):
            y = y + self.bias[...].astype(dtype)
        return y


class Embedding(nnx.Module):
    """A table of vectors ``embedding: [rows, width]``."""

    def __init__(self, rows: int, width: int, *, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (rows, width), jnp.float32)
        self.embedding = nnx.Param((_INIT_STDDEV * draw).astype(param_dtype))

    def __call__(self, ids: Array, dtype: jnp.dtype) -> Array:
        """Rows of the table, ``[..., width]``; a number outside it gives NaN, not a wrong row."""
        table = jnp.asarray(self.embedding[...])
        rows = table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows.astype(dtype)

    def attend(self, x: Array) -> Array:
        """Products of ``x: [..., width]`` with every row in float32, ``[..., rows]``."""
        return jnp.einsum(
            "...d,vd->...v",
            x,
            self.embedding[...].astype(x.dtype),
            preferred_element_type=jnp.float32,
        )


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + epsilon) * scale``, computed in float32 (arXiv 1910.07467)."""

    def __init__(
        self, width: int, epsilon: float, *, stack: tuple[int, ...] = (), param_dtype: jnp.dtype
    ):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*stack, width), param_dtype))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias``, computed in float32."""

    def __init__(
        self, width: int, epsilon: float, *, stack: tuple[int, ...] = (), param_dtype: jnp.dtype
    ):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*stack, width), param_dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, width), param_dtype))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def rope_tables(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines of the rotary angles.

    Args:
      rope: base and scaling of the frequencies. ``dynamic`` and ``longrope`` choose theirs by the
        tokens that the longest sequence has so far, which its last position tells.
      head_dim: H.
      positions: place of each token in its sequence, ``[B, T]``.

    Returns:
      ``(cos, sin)``, each ``[B, T, R / 2]`` in float32, where R is the rotated part of H.

    Sources: arXiv 2104.09864 (rotary positions), 2306.15595 (linear), 2309.00071 (yarn), 2402.13753
    (longrope); the ``llama3`` and ``dynamic`` rules are those of transformers'
    ``modeling_rope_utils``.
    """
    rotated = int(head_dim * rope.fraction)
    exponents = np.arange(0, rotated, 2, dtype=np.float64) / rotated
    wavelengths = rope.theta**exponents  # tokens per radian
    length = jnp.max(positions, initial=0) + 1
    if rope.kind == "linear":
        frequencies = jnp.asarray(1.0 / (rope.factor * wavelengths), jnp.float32)
    elif rope.kind == "llama3":
        frequencies = jnp.asarray(_llama3(rope, 1.0 / wavelengths), jnp.float32)
    elif rope.kind == "yarn":
        frequencies = jnp.asarray(_yarn(rope, 1.0 / wavelengths), jnp.float32)
    elif rope.kind == "dynamic":
        excess = jnp.maximum(length.astype(jnp.float32) / rope.original_length, 1.0)
        stretch = (rope.factor * excess - (rope.factor - 1.0)) ** (rotated / (rotated - 2))
        frequencies = 1.0 / (rope.theta * stretch) ** jnp.asarray(exponents, jnp.float32)
    elif rope.kind == "longrope":
        short, long = np.asarray(rope.short_factors), np.asarray(rope.long_factors)
        frequencies = jnp.where(
            length > rope.original_length,
            jnp.asarray(1.0 / (long * wavelengths), jnp.float32),
            jnp.asarray(1.0 / (short * wavelengths), jnp.float32),
        )
    else:
        frequencies = jnp.asarray(1.0 / wavelengths, jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return rope.amplitude * jnp.cos(angles), rope.amplitude * jnp.sin(angles)


def _llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Stretch long wavelengths, keep short ones, and go smoothly from one to the other."""
    turns = rope.original_length * frequencies / (2 * math.pi)  # in the length of pre-training
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / rope.factor


def _yarn(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Stretch long wavelengths, keep short ones, and go from one to the other by dimension."""
    rotated = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        wavelength = rope.original_length / (2 * math.pi * turns)
        return rotated * math.log(wavelength) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.high_frequency_factor)), 0)
    high = min(math.ceil(dimension(rope.low_frequency_factor)), rotated - 1)
    stretched = np.clip((np.arange(rotated // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return stretched * frequencies / rope.factor + (1.0 - stretched) * frequencies


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the first R dimensions of each head of ``x: [B, T, N, H]`` by the given angles."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def attend(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """`jax.nn.dot_product_attention`, also in float16 on a CPU.

    There XLA has no product of float16 that sums in float32, so the whole is computed in that.

    Args:
      query: ``[B, T, N, H]``.
      key: ``[B, S, K, H]``.
      value: ``[B, S, K, H]``.
      **options: as `jax.nn.dot_product_attention` takes them.

    Returns:
      ``[B, T, N, H]``.
    """
    attention = functools.partial(jax.nn.dot_product_attention, **options)
    if query.dtype != jnp.float16 or options.get("implementation") == "cudnn":
        return attention(query, key, value)

    def widened(*operands: Array) -> Array:
        return attention(*(x.astype(jnp.float32) for x in operands)).astype(query.dtype)

    return jax.lax.platform_dependent(query, key, value, cpu=widened, default=attention)


def check_attention(implementation: str | None, dtype: jnp.dtype, head_dim: int) -> None:
    """Refuse an attention that this machine cannot compute, before anything is loaded or compiled.

    Args:
      implementation: as `jax.nn.dot_product_attention` takes it.
      dtype: of the computation.
      head_dim: H.

    Raises:
      ValueError: there is no cuDNN, or its flash kernels are not for this dtype or head.
    """
    heads = jax.ShapeDtypeStruct((1, 2, 1, head_dim), dtype)
    attention = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )
    try:
        jax.eval_shape(attention, heads, heads, heads)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"attention={implementation!r} does not work here with {dtype} and heads of"
            f" {head_dim}: {reason}"
        ) from error


def check_range(name: str, numbers: Array, size: int) -> None:
    """Refuse numbers outside a table, where they are known: not under ``jit``.

    Args:
      name: what to call them in an error.
      numbers: integers of any shape.
      size: rows of the table.

    Raises:
      ValueError: a number is negative, or ``size`` or more.
    """
    if isinstance(numbers, jax.core.Tracer) or not getattr(numbers, "is_fully_addressable", True):
        return
    numbers = np.asarray(numbers)
    outside = numbers[(numbers < 0) | (numbers >= size)]
    if outside.size:
        raise ValueError(f"{name}: {outside[0]} is outside the table, which has {size} rows")


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Zero each entry with probability ``rate`` and scale up the rest; without a key, ``x``."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def dropout_attention(
    query: Array, key: Array, value: Array, mask: Array | None, rate: float, rng: Array
) -> Array:
    """Attention with dropout on its weights, which `jax.nn.dot_product_attention` has not.

    Args:
      query: ``[B, T, N, H]``.
      key: ``[B, S, N, H]``.
      value: ``[B, S, N, H]``.
      mask: True where a query may see a key, broadcastable to ``[B, N, T, S]``, or None.
      rate: probability of dropping a weight.
      rng: key of the draw.

    Returns:
      ``[B, T, N, H]``.
    """
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, 0.5 * jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), rate, rng).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)
