"""The algebra of adapters: their scales multiply, invert and average exactly.

Every function takes adapters, ``{path: ScaleVectors}``, and returns a new one. All are traceable.
Low-rank terms have no such algebra: an adapter with one raises ValueError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlog1py, xlogy

from hyperadapt_jax.scales import (
    SIDES,
    Scales,
    ScaleVectors,
    combined_delta,
    known_values,
    side_axes,
)


def compose(first: Scales, second: Scales) -> Scales:
    """Returns the product of two adapters, ``(1 + a)(1 + b)``, in either order.

    A weight or a side that only one of the two adapts is taken from that one.

    Raises:
      ValueError: the two disagree on the axis roles or the shapes of a weight.

    >>> a = {"w": ScaleVectors(jnp.array([1.0]), None, "- out")}
    >>> compose(a, a)["w"].row
    Array([3.], dtype=float32)
    """
    _check_diagonal(first, second)
    both = {**first, **second}
    for path, a in first.items():
        if (b := second.get(path)) is None:
            continue
        axes = _common_roles(path, a, b)
        pairs = [(getattr(a, side), getattr(b, side)) for side in SIDES]
        row, col = [
            y if x is None else x if y is None else combined_delta([x, y]) for x, y in pairs
        ]
        both[path] = ScaleVectors(row, col, axes)
    return both


def invert(scales: Scales, tol: float = 1e-6) -> Scales:
    """Returns the adapter that undoes this one: scales ``1 / (1 + delta)``.

    Raises:
      ValueError: a scale lies within ``tol`` of zero (not checked on traced values).

    >>> invert({"w": ScaleVectors(jnp.array([1.0]), None, "- out")})["w"].row
    Array([-0.5], dtype=float32)
    """
    _check_diagonal(scales)
    check_invertible(scales, tol)
    return jax.tree.map(lambda delta: -delta / (1 + delta), scales)


def check_invertible(scales: Scales, tol: float) -> None:
    """Raises ValueError, naming weight, side and index, where a scale lies within tol of zero."""
    for (path, side), delta in known_values(scales).items():
        size = np.abs(1 + delta)
        if (size <= tol).any():
            where = np.argwhere(size == size.min())[0].tolist()
            raise ValueError(
                f"{path}: {side}{where} scales by {size.min():.2g}, too near zero to invert"
                f" (tol={tol:g}): what it scaled cannot be recovered; keep the base model"
            )


def average(
    adapters: Sequence[Scales],
    weights: Sequence[float] | None = None,
    signs: Literal["error", "linear"] = "error",
) -> Scales:
    """Returns the weighted mean of adapters in log space: ``prod |1 + delta_i| ** w_i``, sign kept.

    Scales multiply, so their natural mean is geometric. It needs equal signs, and learned scales
    do turn negative.

    Args:
      adapters: adapters of the same weights, sides and shapes.
      weights: one per adapter, summing to one; equal where None.
      signs: ``"error"`` refuses entries whose signs differ; ``"linear"`` takes the weighted
        arithmetic mean of those entries alone.

    Raises:
      ValueError: no adapters, weights that do not sum to one, adapters of different weights or
        shapes, or (not checked on traced values) signs that differ under ``signs="error"``.

    >>> a, b = ({"w": ScaleVectors(jnp.array([d]), None, "- out")} for d in (0.0, 3.0))
    >>> average([a, b])["w"].row
    Array([1.], dtype=float32)
    """
    if not adapters:
        raise ValueError("adapters: is empty; give at least one")
    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights: is {weights}; give {len(adapters)} that sum to one")
    return _mean(adapters, weights, signs)


def interpolate(
    first: Scales, second: Scales, t: float, signs: Literal["error", "linear"] = "error"
) -> Scales:
    """Returns the point at ``t`` on the log-space path from one adapter (t=0) to another (t=1).

    The :func:`average` with weights ``1 - t`` and ``t``, which may be traced, or outside [0, 1].

    >>> a, b = ({"w": ScaleVectors(jnp.array([d]), None, "- out")} for d in (0.0, 3.0))
    >>> interpolate(a, b, 0.5)["w"].row
    Array([1.], dtype=float32)
    """
    return _mean([first, second], [1 - t, t], signs)


def canonical(scales: Scales) -> Scales:
    """Returns the adapter in its canonical gauge, so that two can be compared entry by entry.

    ``(c (1 + row), (1 + col) / c)`` gives the same weight for every ``c``: one degree of freedom
    per matrix (per stack slice). Here ``c`` makes the root mean squares of the two sides equal and
    the mean of ``col`` positive. One-sided weights have no such freedom, and a slice of which one
    side is all zero is left as it is.

    >>> s = {"w": ScaleVectors(jnp.array([7.0, 7.0]), jnp.array([1.0, 1.0]), "in out")}
    >>> canonical(s)["w"].row, canonical(s)["w"].col
    (Array([3., 3.], dtype=float32), Array([3., 3.], dtype=float32))
    """

    def gauge(vectors: ScaleVectors) -> ScaleVectors:
        if vectors.row is None or vectors.col is None:
            return vectors
        row, col, roles = 1 + vectors.row, 1 + vectors.col, vectors.axes.split()
        over_row, over_col = (  # a vector's own axes, but for those of the stack
            tuple(i for i, k in enumerate(side_axes(vectors.axes, side)) if roles[k] != "stack")
            for side in SIDES
        )
        rms_row = jnp.sqrt(jnp.mean(row**2, over_row))
        rms_col = jnp.sqrt(jnp.mean(col**2, over_col))
        usable = (rms_row > 0) & (rms_col > 0)
        c = jnp.sqrt(jnp.where(usable, rms_col, 1) / jnp.where(usable, rms_row, 1))
        c = jnp.where(jnp.mean(col, over_col) < 0, -c, c)
        return dataclasses.replace(
            vectors,
            row=row * jnp.expand_dims(c, over_row) - 1,
            col=col / jnp.expand_dims(c, over_col) - 1,
        )

    _check_diagonal(scales)
    return {path: gauge(vectors) for path, vectors in scales.items()}


def _check_diagonal(*adapters: Scales) -> None:
    for scales in adapters:
        for path, vectors in scales.items():
            if vectors.down is not None:
                raise ValueError(
                    f"{path}: has a low-rank term, which neither multiplies nor averages with"
                    " another; merge the adapters into weights instead"
                )


def _mean(adapters: Sequence[Scales], weights: Sequence[Any], signs: str) -> Scales:
    if signs not in ("error", "linear"):
        raise ValueError(f'signs must be "error" or "linear", not {signs!r}')
    _check_diagonal(*adapters)
    first = adapters[0]
    for other in adapters[1:]:
        if unshared := first.keys() ^ other.keys():
            raise ValueError(f"{min(unshared)}: adapted by one adapter and not by the other")
        for path in first:
            _common_roles(path, first[path], other[path], exact=True)
    if signs == "error":
        _check_signs(adapters)

    def mean(*deltas: jax.Array) -> jax.Array:
        pairs = list(zip(weights, deltas, strict=True))
        # log1p and expm1 keep full precision where a scale is close to one; at weight zero, the
        # product counts a scale of zero as zero, not as undefined.
        log = sum(
            jnp.where(jnp.abs(d) < 0.5, xlog1py(w, jnp.clip(d, -0.5)), xlogy(w, jnp.abs(1 + d)))
            for w, d in pairs
        )
        linear = sum(w * d for w, d in pairs)
        stacked = jnp.stack(deltas)
        mirrored = jnp.where(jnp.all(stacked <= -1, axis=0), -jnp.exp(log) - 1, linear)
        return jnp.where(jnp.all(stacked >= -1, axis=0), jnp.expm1(log), mirrored)

    return jax.tree.map(mean, *adapters)


def _check_signs(adapters: Sequence[Scales]) -> None:
    known = [known_values(scales) for scales in adapters]
    for path, side in known[0]:
        scales = [1 + deltas[path, side] for deltas in known if (path, side) in deltas]
        clash = np.any([s > 0 for s in scales], axis=0) & np.any([s < 0 for s in scales], axis=0)
        if clash.any():
            raise ValueError(
                f"{path}: {clash.sum()} of {clash.size} {side} scales differ in sign between the"
                ' adapters, and a mean in log space needs equal signs; signs="linear" takes the'
                " arithmetic mean of those entries"
            )


def _common_roles(path: str, a: ScaleVectors, b: ScaleVectors, exact: bool = False) -> str:
    """Returns the union of a weight's axis roles in two adapters; raises where they conflict."""
    pairs = list(zip(a.axes.split(), b.axes.split(), strict=False))
    union = " ".join(y if x == "-" else x for x, y in pairs)
    # Of a square weight, the one's in axis may be the other's unscaled one: never the same vector.
    spanned = [(side_axes(v.axes, s), side_axes(union, s)) for v in (a, b) for s in SIDES]
    if not (
        len(a.axes.split()) == len(b.axes.split())
        and all(x == y or "-" in (x, y) for x, y in pairs)
        and all(axes in ((), whole) for axes, whole in spanned)
        and (a.axes == b.axes or not exact)
    ):
        raise ValueError(f"{path}: axis roles differ: {a.axes!r} and {b.axes!r}")
    for side in SIDES:
        shapes = [np.shape(d) for v in (a, b) if (d := getattr(v, side)) is not None]
        if len(set(shapes)) > 1:
            raise ValueError(f"{path}: {side} shapes differ: {shapes[0]}, {shapes[1]}")
    return union
