"""Layers shared by the encoder and the decoder: projections, norms, attention, dropout.

A module's parameters may have leading stack axes (one slice per layer); inside the scan over the
layers the same module sees them without.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


@dataclasses.dataclass(frozen=True)
class ActivationSharding:
    """How a model's activations are spread over a mesh of devices; by default not at all.

    The weights' own shardings do not tell it: where one mesh axis divides both the rows of a batch
    and a side of the weights (FSDP), XLA would as well gather the rows as the weights.

    Attributes:
      mesh: the devices; None for activations that lie as XLA sees fit.
      rows: mesh axes that divide the rows of a batch.
      heads: mesh axes that divide the heads in a cache of keys and values.

    >>> ActivationSharding().filled(6)
    6
    >>> kinds = (jax.sharding.AxisType.Auto,) * 2
    >>> mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=kinds)
    >>> x = ActivationSharding(mesh, ("data",), ("tensor",)).stream(jnp.ones((2, 3, 4)))
    >>> x.sharding.spec == PartitionSpec("data")
    True
    """

    mesh: Mesh | None = None
    rows: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def filled(self, count: int) -> int:
        """The number of rows that so many are filled up to, so that the mesh divides them."""
        parts = self._parts(self.rows)
        return -(-count // parts) * parts

    def stream(self, x: Array) -> Array:
        """``x: [B, ...]``, divided by its rows."""
        return self._constrained(x, self.rows)

    def tokens(self, x: Array) -> Array:
        """``x: [B T, ...]``, divided by its rows along the first axis, else as XLA sees fit."""
        if self.mesh is None or x.shape[0] % self._parts(self.rows):
            return x
        others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        sharding = NamedSharding(self.mesh, PartitionSpec(self.rows or None, *others))
        return jax.lax.with_sharding_constraint(x, sharding)

    def table(self, rows: Array) -> Array:
        """An embedding's table ``[V, D]``, whole along D, so that a lookup gives whole vectors."""
        if self.mesh is None:
            return rows
        sharding = NamedSharding(self.mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))
        return jax.lax.with_sharding_constraint(rows, sharding)

    def cache(self, kv: Array) -> Array:
        """A cache's keys or values ``[L, B, S, K, H]``, divided by rows and heads."""
        return self._constrained(kv, (), self.rows, (), self.heads)

    def _constrained(self, x: Array, *axes: tuple[str, ...]) -> Array:
        """An array spread so; whole along an axis that the mesh does not divide."""
        if self.mesh is None:
            return x
        spec = [
            names if names and not size % self._parts(names) else None
            for size, names in zip(x.shape, axes, strict=False)
        ]
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
        return jax.lax.with_sharding_constraint(x, sharding)

    def _parts(self, axes: tuple[str, ...]) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in axes)


UNSHARDED = ActivationSharding()


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
        """Projects ``x: [..., in]``; with ``precise`` the product is left in float32."""
        dtype = jnp.float32 if precise else x.dtype
        kernel = self.kernel[...].astype(x.dtype)
        y = jnp.dot(x, kernel, preferred_element_type=dtype)
        if hasattr(self, "bias"):
            y = y + self.bias[...].astype(dtype)
        return y


class Embedding(nnx.Module):
    """A table of vectors ``embedding: [V, D]``."""

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        activations: ActivationSharding = UNSHARDED,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.activations = activations
        draw = jax.random.normal(rngs.params(), (num_embeddings, features), jnp.float32)
        self.embedding = nnx.Param((_INIT_STDDEV * draw).astype(param_dtype))

    def __call__(self, ids: Array, dtype: jnp.dtype) -> Array:
        """Rows of the table, ``[..., D]``; a number outside it gives NaN, not a wrong row."""
        table = self.activations.table(jnp.asarray(self.embedding[...]))
        rows = table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows.astype(dtype)

    def attend(self, x: Array) -> Array:
        """Products of ``x: [..., D]`` with every row in float32, ``[..., V]``."""
        return jnp.einsum(
            "...d,vd->...v",
            x,
            self.embedding[...].astype(x.dtype),
            preferred_element_type=jnp.float32,
        )


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + epsilon) * scale``, computed in float32 (arXiv 1910.07467)."""

    def __init__(
        self,
        num_features: int,
        epsilon: float,
        *,
        stack: tuple[int, ...] = (),
        param_dtype: jnp.dtype,
    ):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*stack, num_features), param_dtype))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias``, computed in float32."""

    def __init__(
        self,
        num_features: int,
        epsilon: float,
        *,
        stack: tuple[int, ...] = (),
        param_dtype: jnp.dtype,
    ):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*stack, num_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, num_features), param_dtype))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


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
    """Refuses an attention that this machine cannot compute, before anything is loaded or compiled.

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


def check_tokens(tokens: Array, **places: Array | None) -> None:
    """Refuses what is no batch of tokens, and what is not told of each token.

    Args:
      tokens: token ids, ``[B, T]`` integers.
      **places: by name, arrays ``[B, T]`` or None.

    Raises:
      ValueError: shapes do not fit, or tokens are no integers.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens: expected integers [B, T], found {tokens.dtype} {tokens.shape}")
    for name, array in places.items():
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name}: expected {tokens.shape} as tokens, found {array.shape}")


def check_range(name: str, numbers: Array | np.ndarray, size: int) -> None:
    """Refuses numbers outside a table, where they are known: not under ``jit``.

    Args:
      name: what to call them in an error.
      numbers: integers of any shape.
      size: rows of the table.

    Raises:
      ValueError: a number is negative, or ``size`` or more.
    """
    if isinstance(numbers, jax.core.Tracer) or not getattr(numbers, "is_fully_addressable", True):
        return
    known = np.asarray(numbers)
    outside = known[(known < 0) | (known >= size)]
    if outside.size:
        raise ValueError(f"{name}: {outside[0]} is outside the table, which has {size} rows")


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Zeroes each entry with probability ``rate`` and scales up the rest; without a key, ``x``."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def dropout_attention(
    query: Array, key: Array, value: Array, mask: Array | None, rate: float, rng: Array
) -> Array:
    """Attention with dropout on its weights, which `jax.nn.dot_product_attention` lacks.

    Flax's own computes scores and softmax in the dtype of the queries; here both are float32.

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
