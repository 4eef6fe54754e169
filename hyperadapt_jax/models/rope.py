"""Rotary positions: what a configuration says of them, and the rotation itself."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: its base and how its frequencies are scaled.

    Attributes:
      theta: base of the frequencies.
      kind: ``default``, ``linear``, ``dynamic``, ``llama3``, ``yarn`` or ``longrope``.
      fraction: part of each head that is rotated, in (0, 1].
      factor: how far the context is stretched (all kinds but the first).
      original_length: context length of pre-training, in tokens (``dynamic``, ``llama3``,
        ``yarn``, ``longrope``).
      low_frequency_factor: ``llama3``, ``yarn``: wavelengths above ``original_length / this`` are
        stretched.
      high_frequency_factor: ``llama3``, ``yarn``: wavelengths below ``original_length / this`` are
        kept.
      short_factors: ``longrope``: divisors of the frequencies up to ``original_length``.
      long_factors: ``longrope``: divisors of the frequencies beyond it.
      amplitude: ``yarn``, ``longrope``: factor on the sines and cosines.
      recomputes: ``longrope``: text is generated as Phi does it, where all tokens are recomputed
        by the other frequencies at the first one beyond ``original_length``.
    """

    theta: float = 10000.0
    kind: str = "default"
    fraction: float = 1.0
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    amplitude: float = 1.0
    recomputes: bool = False


def rope_tables(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines of the rotary angles.

    Args:
      rope: base and scaling of the frequencies. ``dynamic`` and ``longrope`` choose theirs by the
        tokens that the longest sequence has so far, as its last position says.
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
    """Stretches long wavelengths, keeps short ones, and interpolates smoothly in between."""
    turns = rope.original_length * frequencies / (2 * math.pi)  # in the length of pre-training
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / rope.factor


def _yarn(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Stretches long wavelengths, keeps short ones, and interpolates by dimension in between."""
    rotated = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        wavelength = rope.original_length / (2 * math.pi * turns)
        return rotated * math.log(wavelength) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.high_frequency_factor)), 0)
    high = min(math.ceil(dimension(rope.low_frequency_factor)), rotated - 1)
    stretched = np.clip((np.arange(rotated // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return stretched * frequencies / rope.factor + (1.0 - stretched) * frequencies


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the first R dimensions of each head of ``x: [B, T, N, H]`` by the given angles."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
