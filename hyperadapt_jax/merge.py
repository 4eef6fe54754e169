"""Merging: the adapter multiplied into the weights, and divided out again.

Merged, a model runs with no adapter at all. A narrow dtype pays for it: a bfloat16 weight keeps 8
significant bits, and rounding the product can cost a good part of a small update. So the product is
made in float32 and rounded once, the loss can be reported, and the base is worth keeping.
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

from hyperadapt_jax import paths
from hyperadapt_jax.algebra import check_invertible
from hyperadapt_jax.scales import (
    Scales,
    ScaleVectors,
    broadcast_scale,
    check,
    compute_dtype,
    iter_stack,
    low_rank_product,
)
from hyperadapt_jax.tables import table


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The rounding error of one merged weight, as Frobenius norms, computed in float64.

    Attributes:
      path: the weight's path.
      dtype: the dtype to which the product was rounded.
      update: norm of the exact update, ``(W + up down) * (1 + row) * (1 + col) - W``.
      error: norm of the merged weight minus the exact product.
    """

    path: str
    dtype: str
    update: float
    error: float

    @property
    def relative(self) -> float:
        """The error's share of the update; zero where the weight is exact."""
        if not self.error:
            return 0.0
        return self.error / self.update if self.update else math.inf


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The rounding error of every merged weight; it prints as a table."""

    weights: tuple[Rounding, ...]

    def __str__(self) -> str:
        numbers = [[f"{x:.3g}" for x in (w.update, w.error, w.relative)] for w in self.weights]
        rows = [[w.path, w.dtype, *row] for w, row in zip(self.weights, numbers, strict=True)]
        header = ["weight", "dtype", "update", "error", "error/update"]
        return table(header, rows, right="update error error/update")


def merge(params: Any, scales: Scales, *, dtype: Any = None, report: bool = False) -> Any:
    """Returns the parameters with the adapter in them: ``(W + up down) * (1 + row) * (1 + col)``.

    It is computed in float32, or in a wider dtype of weight or result, and rounded once.
    All other leaves, biases among them, are passed on as they are, and each weight keeps its
    sharding. Traceable, where no report is asked for.

    Args:
      params: the frozen parameters, any pytree of arrays.
      scales: the adapter, ``{path: ScaleVectors}``.
      dtype: a floating dtype for the merged weights; each weight's own where None.
      report: whether to measure the rounding error, in float64 on the host.

    Returns:
      A tree like ``params``; with ``report``, that and a :class:`MergeReport`.

    Raises:
      ValueError: the adapter does not fit the parameters (the error names the path), a weight or
        ``dtype`` is integer, or a report is asked for where this process does not hold the values.

    >>> params = {"w": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    >>> scales = {"w": ScaleVectors(jnp.array([0.0, 1.0, 2.0]), jnp.array([0.0, -0.5]), "in out")}
    >>> merge(params, scales)["w"]
    Array([[1. , 2. , 3. ],
           [0.5, 1. , 1.5]], dtype=float32)
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"dtype: is {jnp.dtype(dtype)}; give a floating one")
    old = _weights(params, scales)
    if report and not all(map(_known, jax.tree.leaves([old, scales]))):
        raise ValueError(
            "report: needs the values of all weights; ask for it outside of jit, in a process that"
            " holds all shards"
        )
    new = {path: _converted(_adapted, w, scales[path], dtype) for path, w in old.items()}
    merged = paths.replace(params, new)
    if not report:
        return merged
    return merged, MergeReport(tuple(_rounding(p, old[p], new[p], scales[p]) for p in old))


def unmerge(merged: Any, scales: Scales, tol: float = 1e-6) -> Any:
    """Returns the base parameters of merged ones: ``W / (1 + row) / (1 + col) - up down``.

    Computed in float32 and rounded once, like :func:`merge`. What merging rounded away stays lost:
    in bfloat16 about one entry in a hundred differs from the base in its last bit.

    Raises:
      ValueError: as :func:`merge`, or a scale within ``tol`` of zero (not checked where traced).

    >>> params = {"w": jnp.ones((2, 3))}
    >>> scales = {"w": ScaleVectors(jnp.array([0.0, 1.0, 2.0]), None, "- out")}
    >>> bool((unmerge(merge(params, scales), scales)["w"] == params["w"]).all())
    True
    """
    old = _weights(merged, scales)
    check_invertible(scales, tol)
    new = {path: _converted(_restored, weight, scales[path]) for path, weight in old.items()}
    return paths.replace(merged, new)


def _weights(params: Any, scales: Scales) -> dict[str, Any]:
    """The adapted weights by path, in the tree's order, once the adapter is known to fit them."""
    arrays = paths.arrays(params)
    check(scales, arrays)
    weights = {path: leaf for path, leaf in arrays.items() if path in scales}
    for path, leaf in weights.items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"{path}: has dtype {leaf.dtype}; integer codes cannot hold a scaled weight: keep"
                " the adapter next to the quantized base, or merge before quantizing"
            )
    return weights


def _converted(
    op: Callable[..., jax.Array], weight: Any, vectors: ScaleVectors, dtype: Any = None
) -> jax.Array:
    dtype = jnp.dtype(weight.dtype if dtype is None else dtype)
    result = _rounded_once(op, dtype, weight, vectors)
    sharding = paths.named_sharding(weight)
    return result if sharding is None else jax.device_put(result, sharding)


@functools.partial(jax.jit, static_argnums=(0, 1))  # one fused pass, no float32 temporaries
def _rounded_once(
    op: Callable[..., jax.Array], dtype: Any, weight: Any, vectors: ScaleVectors
) -> jax.Array:
    wide = jnp.promote_types(compute_dtype(weight.dtype), compute_dtype(dtype))
    return op(weight.astype(wide), vectors).astype(dtype)


def _adapted(weight: jax.Array, vectors: ScaleVectors) -> jax.Array:
    if vectors.down is not None:
        weight = weight + low_rank_product(vectors)
    for axes, delta in vectors.factors():
        weight = weight * broadcast_scale(delta.astype(weight.dtype), axes, weight.ndim)
    return weight


def _restored(weight: jax.Array, vectors: ScaleVectors) -> jax.Array:
    for axes, delta in vectors.factors():
        weight = weight / broadcast_scale(delta.astype(weight.dtype), axes, weight.ndim)
    return weight if vectors.down is None else weight - low_rank_product(vectors)


def _known(array: Any) -> bool:
    """Whether this process knows all of an array's values."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def _rounding(path: str, weight: Any, merged: Any, vectors: ScaleVectors) -> Rounding:
    wide = jnp.promote_types(weight.dtype, np.float64)
    update = error = 0.0
    for part, (base, rounded) in iter_stack(vectors, np.asarray(weight), np.asarray(merged)):
        base = base.astype(wide)
        step = part.update(base)
        update = math.hypot(update, np.linalg.norm(step))
        error = math.hypot(error, np.linalg.norm(rounded.astype(wide) - (base + step)))
    return Rounding(path, merged.dtype.name, update, error)
