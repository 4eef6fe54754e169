"""The scale vectors: their container, their start at the identity, and their algebra.

A weight ``W`` becomes ``diag(1 + row) W diag(1 + col)`` in the paper's (outputs x inputs) layout
(HyperAdapt, arXiv 2509.18629: ``row`` is its ``a - 1`` and ``col`` its ``b - 1``). Vectors are
stored as the difference from one, in float32: a bfloat16 vector at one steps by 2**-7 and never
moves under a usual learning rate, and weight decay on a difference pulls toward the identity, not
toward zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlog1py, xlogy

from hyperadapt_jax import paths

ROLES = ("in", "out", "stack", "-")
SIDES = {"row": ("stack", "out"), "col": ("stack", "in")}


def side_axes(axes: str, side: str) -> tuple[int, ...]:
    """The weight axes that the ``row`` or ``col`` vector of a weight with these roles spans.

    Empty where the roles name no ``out`` (for row) or no ``in`` (for col): a one-sided weight.

    >>> side_axes("stack in out", "row"), side_axes("stack in out", "col")
    ((0, 2), (0, 1))
    >>> side_axes("- out", "col")
    ()
    """
    roles = axes.split()
    if SIDES[side][1] not in roles:
        return ()
    return tuple(i for i, role in enumerate(roles) if role in SIDES[side])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleVectors:
    """The two vectors of one weight, each stored as ``scale - 1``.

    Attributes:
      row: output side, float32, the shape of the weight's stack and out axes; None if one-sided.
      col: input side, float32, the shape of the weight's stack and in axes; None if one-sided.
      axes: one role per axis of the weight: ``in``, ``out``, ``stack`` or ``-`` (static).
    """

    row: Any
    col: Any
    axes: str = dataclasses.field(metadata={"static": True})

    def factors(self) -> list[tuple[tuple[int, ...], Any]]:
        """The vectors that are there, each with the weight axes it spans."""
        pairs = [(side_axes(self.axes, "row"), self.row), (side_axes(self.axes, "col"), self.col)]
        return [(axes, delta) for axes, delta in pairs if delta is not None]


Scales = dict[str, ScaleVectors]


def widen(dtype: Any) -> Any:
    """The dtype in which a scale multiplies: float32 for anything narrower, else its own."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def along(delta: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """``1 + delta`` with size-one axes added, to broadcast against an array of ``ndim`` axes."""
    return jnp.expand_dims(1 + delta, [i for i in range(ndim) if i not in axes])


def check(scales: Scales, weights: Mapping[str, Any]) -> None:
    """Refuses an adapter that does not fit the weights it would scale.

    Args:
      scales: the adapter.
      weights: the parameter tree's arrays by path, as ``paths.arrays`` returns.

    Raises:
      ValueError: a path that is not there, roles that do not fit the number of axes, or a vector
        that is missing, not called for, or of another shape than the weight's axes.
    """
    for path, vectors in scales.items():
        if path not in weights:
            raise ValueError(
                f"the adapter scales {path}, which is none of the {len(weights)} arrays;"
                f" {paths.nearest(path, weights)}"
            )
        shape, axes = np.shape(weights[path]), vectors.axes
        if len(shape) != len(axes.split()):
            raise ValueError(
                f"{path} has {len(shape)} axes, shape {shape}, and the adapter gives roles for"
                f" {len(axes.split())}: {axes!r}"
            )
        for side in SIDES:
            delta = getattr(vectors, side)
            has = None if delta is None else np.shape(delta)
            needs = tuple(shape[i] for i in side_axes(axes, side)) or None
            if has != needs:
                raise ValueError(
                    f"{path}: {side} has shape {has}, and a weight of shape {shape} with roles"
                    f" {axes!r} needs {needs}: the adapter was made for another model"
                )


def init(plan: Any) -> Scales:
    """Scale vectors for a plan: all zero, so the adapted model equals the base, bit for bit.

    Args:
      plan: what ``hyperadapt_jax.plan`` returned.

    Returns:
      ``{path: ScaleVectors}`` in float32, whatever the dtype of the base; where a weight carries a
      ``NamedSharding``, its vectors carry the part of it that belongs to their axes.

    >>> import hyperadapt_jax as ha
    >>> params = {"dense": {"kernel": jnp.ones((3, 5), jnp.bfloat16)}}
    >>> scales = ha.init(ha.plan(params, ha.Target("dense/kernel", "in out")))
    >>> scales["dense/kernel"].row.shape, scales["dense/kernel"].col.shape
    ((5,), (3,))
    """

    def zeros(shape, sharding):
        return None if shape is None else jnp.zeros(shape, jnp.float32, device=sharding)

    return {
        weight.path: ScaleVectors(
            zeros(weight.row_shape, weight.row_sharding),
            zeros(weight.col_shape, weight.col_sharding),
            weight.axes,
        )
        for weight in plan.weights
    }


def count(scales: Scales) -> int:
    """How many numbers train: the sum of all vectors' sizes.

    >>> count({"w": ScaleVectors(jnp.zeros(5), jnp.zeros(3), "in out")})
    8
    """
    return sum(np.prod(np.shape(leaf), dtype=int).item() for leaf in jax.tree.leaves(scales))


def compose(first: Scales, second: Scales) -> Scales:
    """The adapter that does both: scales multiply, ``(1 + a)(1 + b)``. The order does not matter.

    A weight or a side that only one of the two adapts is taken from that one.

    Raises:
      ValueError: the two disagree on the axis roles or the shapes of a weight.

    >>> a = {"w": ScaleVectors(jnp.array([1.0]), None, "- out")}
    >>> compose(a, a)["w"].row
    Array([3.], dtype=float32)
    """
    return _zip(first, second, lambda x, y: x + y + x * y, keep_lonely=True)


def invert(scales: Scales, tol: float = 1e-6) -> Scales:
    """The adapter that undoes this one: scales ``1 / (1 + delta)``.

    Args:
      scales: the adapter.
      tol: a scale whose magnitude is at most this has no usable inverse.

    Raises:
      ValueError: a scale lies within ``tol`` of zero (not checked on traced values).

    >>> invert({"w": ScaleVectors(jnp.array([1.0]), None, "- out")})["w"].row
    Array([-0.5], dtype=float32)
    """
    check_invertible(scales, tol)
    return jax.tree.map(lambda delta: -delta / (1 + delta), scales)


def check_invertible(scales: Scales, tol: float) -> None:
    """Raises ValueError, naming weight, side and index, where a scale lies within tol of zero."""
    for path, side, delta in concrete(scales):
        small = np.abs(1 + delta)
        if small.size and small.min() <= tol:
            where = np.unravel_index(small.argmin(), small.shape)
            raise ValueError(
                f"{path}: {side}{list(map(int, where))} scales by {small.min():.2g}, too near zero"
                f" to invert (tol={tol:g}): what it scaled cannot be recovered; keep the base model"
            )


def average(
    adapters: Sequence[Scales],
    weights: Sequence[float] | None = None,
    signs: Literal["error", "linear"] = "error",
) -> Scales:
    """The weighted mean of adapters in log space: ``prod |1 + delta_i| ** w_i``, sign kept.

    Scales multiply, so their natural mean is geometric. It needs equal signs: learned scales do
    turn negative, and where adapters disagree on a sign ``signs`` says what happens.

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
        raise ValueError("average needs at least one adapter")
    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"give {len(adapters)} weights that sum to one, not {weights}")
    return _mean(adapters, weights, signs)


def interpolate(
    first: Scales, second: Scales, t: float, signs: Literal["error", "linear"] = "error"
) -> Scales:
    """The point at ``t`` on the log-space path from one adapter (t=0) to another (t=1).

    The weighted :func:`average` with weights ``1 - t`` and ``t``. Outside [0, 1], t extrapolates;
    it may be traced.

    >>> a, b = ({"w": ScaleVectors(jnp.array([d]), None, "- out")} for d in (0.0, 3.0))
    >>> interpolate(a, b, 0.5)["w"].row
    Array([1.], dtype=float32)
    """
    return _mean([first, second], [1 - t, t], signs)


def canonical(scales: Scales) -> Scales:
    """The same adapter in its canonical gauge, so that two can be compared number by number.

    ``(c (1 + row), (1 + col) / c)`` gives the same weight for every ``c``: one number per matrix
    (per stack slice) is free. Here ``c`` makes the root mean squares of the two sides equal, and
    makes the mean of ``col`` positive. One-sided weights have no such freedom, and a slice with a
    side that is zero throughout is left as it is.

    >>> s = {"w": ScaleVectors(jnp.array([7.0, 7.0]), jnp.array([1.0, 1.0]), "in out")}
    >>> canonical(s)["w"].row, canonical(s)["w"].col
    (Array([3., 3.], dtype=float32), Array([3., 3.], dtype=float32))
    """

    def gauge(vectors: ScaleVectors) -> ScaleVectors:
        if vectors.row is None or vectors.col is None:
            return vectors
        row, col = 1 + vectors.row, 1 + vectors.col
        over_row, over_col = (_own_axes(vectors.axes, side) for side in ("row", "col"))
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

    return {path: gauge(vectors) for path, vectors in scales.items()}


def concrete(scales: Scales) -> list[tuple[str, str, np.ndarray]]:
    """(path, side, values) of every vector whose values are known: tracers are left out."""
    return [
        (path, side, np.asarray(delta))
        for path, vectors in scales.items()
        for side in ("row", "col")
        if (delta := getattr(vectors, side)) is not None and not isinstance(delta, jax.core.Tracer)
    ]


def _own_axes(axes: str, side: str) -> tuple[int, ...]:
    """The axes of a vector itself that are not stack axes."""
    roles = axes.split()
    return tuple(i for i, axis in enumerate(side_axes(axes, side)) if roles[axis] != "stack")


def _mean(adapters: Sequence[Scales], weights: Sequence[Any], signs: str) -> Scales:
    if signs not in ("error", "linear"):
        raise ValueError(f'signs must be "error" or "linear", not {signs!r}')
    for other in adapters[1:]:
        _zip(adapters[0], other, lambda x, y: None, keep_lonely=False)
    if signs == "error":
        _check_signs(adapters)

    def mean(*deltas):
        pairs = list(zip(weights, deltas, strict=True))
        # log1p and expm1 keep full precision where a scale is close to one; at weight zero, the
        # product counts a scale of zero as zero, not as undefined.
        log = sum(
            jnp.where(jnp.abs(d) < 0.5, xlog1py(w, jnp.clip(d, -0.5)), xlogy(w, jnp.abs(1 + d)))
            for w, d in pairs
        )
        deltas = jnp.stack(deltas)
        all_positive = jnp.all(deltas >= -1, axis=0)
        all_negative = jnp.all(deltas <= -1, axis=0)
        linear = sum(w * d for w, d in pairs)
        mirrored = jnp.where(all_negative, -jnp.exp(log) - 1, linear)
        return jnp.where(all_positive, jnp.expm1(log), mirrored)

    return jax.tree.map(mean, *adapters)


def _check_signs(adapters: Sequence[Scales]) -> None:
    known = [{(path, side): delta for path, side, delta in concrete(a)} for a in adapters]
    for key in known[0]:
        scales = [1 + k[key] for k in known if key in k]
        clash = np.any([s > 0 for s in scales], axis=0) & np.any([s < 0 for s in scales], axis=0)
        if clash.any():
            raise ValueError(
                f"{key[0]}: {clash.sum()} of {clash.size} {key[1]} scales differ in sign between"
                ' the adapters, and a mean in log space needs equal signs; signs="linear" takes'
                " the arithmetic mean of those entries"
            )


def _zip(first: Mapping, second: Mapping, combine: Any, keep_lonely: bool) -> Scales:
    """Combines two adapters vector by vector; a lonely vector is kept, or refused."""
    out = {}
    for path in {**first, **second}:
        pair = [a[path] for a in (first, second) if path in a]
        if len(pair) == 1:
            if not keep_lonely:
                raise ValueError(f"{path}: adapted by one adapter and not by the other")
            out[path] = pair[0]
            continue
        roles = _common_roles(path, pair[0].axes, pair[1].axes, keep_lonely)
        sides = {}
        for side in ("row", "col"):
            x, y = (getattr(vectors, side) for vectors in pair)
            if x is not None and y is not None:
                if np.shape(x) != np.shape(y):
                    raise ValueError(f"{path}: {side} shapes differ: {np.shape(x)}, {np.shape(y)}")
                sides[side] = combine(x, y)
            else:
                sides[side] = y if x is None else x
        out[path] = ScaleVectors(**sides, axes=roles)
    return out


def _common_roles(path: str, first: str, second: str, allow_one_sided: bool) -> str:
    """The union of two weights' axis roles, where ``-`` on one yields to the other."""
    pairs = list(zip(first.split(), second.split(), strict=False))
    fits = len(first.split()) == len(second.split()) and all(
        a == b or (allow_one_sided and "-" in (a, b) and "stack" not in (a, b)) for a, b in pairs
    )
    # Of a square weight, the one's in axis may be the other's unscaled one: never the same vector.
    for side in SIDES:
        here, there = side_axes(first, side), side_axes(second, side)
        fits &= here == there or () in (here, there)
    if not fits:
        raise ValueError(f"{path}: axis roles differ: {first!r} and {second!r}")
    return " ".join(b if a == "-" else a for a, b in pairs)
