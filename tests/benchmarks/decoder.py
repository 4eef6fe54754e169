"""A decoder block stack in plain ``jnp``, to measure adapters on: no framework, nothing hidden."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
# What every method here adapts: all seven linears of every layer, stacked over layers.
TARGET = (rf"layers/({'|'.join(LINEARS)})/kernel", "stack in out")
UNROLLED_TARGET = (rf"layers/\d+/({'|'.join(LINEARS)})/kernel", "in out")

POLICIES: dict[str, Callable | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Shapes of the stack: pre-norm blocks of causal attention with RoPE and a SwiGLU MLP.

    Attributes:
      layers, width, heads, kv_heads, head_dim, hidden: the usual counts and widths.
      batch, length: the input is [batch, length, width].
      dtype: of the weights and of the activations.
      remat: what a block keeps for the backward pass: everything (``"none"``), the results of its
        matrix products (``"dots"``) or nothing but its input (``"full"``).
      scan: one block scanned over stacked weights, or a Python loop over a list of weights.
      attention: the implementation that ``jax.nn.dot_product_attention`` is asked for.
    """

    layers: int = 4
    width: int = 512
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    hidden: int = 1408
    batch: int = 4
    length: int = 256
    dtype: str = "float32"
    remat: Literal["none", "dots", "full"] = "dots"
    scan: bool = True
    attention: Literal["xla", "cudnn"] | None = None


SMALL = Decoder()
# The shapes of one Llama-3-8B layer.
LLAMA_8B = Decoder(
    layers=2,
    width=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=14336,
    batch=1,
    length=4096,
    dtype="bfloat16",
)
SIZES = {"small": SMALL, "llama-8b": LLAMA_8B}


def shapes(config: Decoder) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear of one block."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    width, hidden = config.width, config.hidden
    return {
        "q": (width, q),
        "k": (width, kv),
        "v": (width, kv),
        "o": (q, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }


def init(key: jax.Array, config: Decoder) -> dict[str, Any]:
    """Random weights: ``{"layers": ..., "norm": [D]}``, layers stacked or, unrolled, in a list."""

    def block(key):
        keys = dict(zip(LINEARS, jax.random.split(key, len(LINEARS)), strict=True))
        kernels = {
            name: {
                "kernel": (jax.random.normal(keys[name], shape) * shape[0] ** -0.5).astype(dtype)
            }
            for name, shape in shapes(config).items()
        }
        ones = jnp.ones(config.width, dtype)
        return kernels | {"attention_norm": ones, "mlp_norm": ones}

    dtype = jnp.dtype(config.dtype)
    keys = jax.random.split(key, config.layers)
    layers = jax.vmap(block)(keys) if config.scan else [block(key) for key in keys]
    return {"layers": layers, "norm": jnp.ones(config.width, dtype)}


def inputs(key: jax.Array, config: Decoder) -> jax.Array:
    """Random activations to feed the stack: [B, T, D]."""
    return jax.random.normal(key, (config.batch, config.length, config.width), config.dtype)


def linear(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """``x @ kernel``: [..., in] to [..., out]."""
    return x @ weights["kernel"]


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale


def rope(x: jax.Array, theta: float = 500_000.0) -> jax.Array:
    """Rotary positions on x: [B, T, N, H], halves rotated against each other."""
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), theta ** (-jnp.arange(half) / half))  # [T, H/2]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def block(weights: Any, x: jax.Array, config: Decoder, linear: Callable = linear) -> jax.Array:
    """One pre-norm block, x: [B, T, D]. ``linear(weights, x)`` is how a method hooks its own in."""
    heads = lambda y, n: y.reshape(*y.shape[:2], n, config.head_dim)  # noqa: E731
    h = rms_norm(x, weights["attention_norm"])
    q = rope(heads(linear(weights["q"], h), config.heads))
    k = rope(heads(linear(weights["k"], h), config.kv_heads))
    v = heads(linear(weights["v"], h), config.kv_heads)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=config.attention)
    x = x + linear(weights["o"], mixed.reshape(*x.shape[:2], -1))
    h = rms_norm(x, weights["mlp_norm"])
    h = jax.nn.silu(linear(weights["gate"], h)) * linear(weights["up"], h)
    return x + linear(weights["down"], h)


def forward(params: Any, x: jax.Array, config: Decoder, linear: Callable = linear) -> jax.Array:
    """The stack and its last norm: [B, T, D] to [B, T, D]."""
    step = lambda x, weights: block(weights, x, config, linear)  # noqa: E731
    if config.remat != "none":
        # Under scan the loop itself keeps the two passes apart.
        step = jax.checkpoint(step, policy=POLICIES[config.remat], prevent_cse=not config.scan)
    if config.scan:
        x, _ = jax.lax.scan(lambda x, weights: (step(x, weights), None), x, params["layers"])
    else:
        for weights in params["layers"]:
            x = step(x, weights)
    return rms_norm(x, params["norm"])
