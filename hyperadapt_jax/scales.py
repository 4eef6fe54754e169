"""The scale vectors: their container, their axes, and what checks and reads them.

A weight ``W`` becomes ``diag(1 + row) W diag(1 + col)`` in the paper's (outputs x inputs) layout
(HyperAdapt, arXiv 2509.18629: ``row`` is its ``a - 1`` and ``col`` its ``b - 1``). Vectors are
stored as the difference from one, in float32: a bfloat16 vector at one steps by 2**-7 and never
moves under a usual learning rate, and weight decay on a difference pulls toward the identity, not
toward zero.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperadapt_jax import paths

ROLES = ("in", "out", "stack", "-")
SIDES = {"row": ("stack", "out"), "col": ("stack", "in")}


def side_axes(axes: str, side: str) -> tuple[int, ...]:
    """Returns the weight axes that the ``row`` or ``col`` vector of a weight spans.

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


def side_shape(shape: Sequence[int], axes: str, side: str) -> tuple[int, ...] | None:
    """Returns the shape of a weight's ``row`` or ``col`` vector; None for a side without one.

    >>> side_shape((4, 3, 5), "stack in out", "row"), side_shape((3, 5), "- out", "col")
    ((4, 5), None)
    """
    return tuple(shape[i] for i in side_axes(axes, side)) or None


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
        """Returns the vectors that are not None, each with the weight axes that it spans."""
        pairs = [(side_axes(self.axes, "row"), self.row), (side_axes(self.axes, "col"), self.col)]
        return [(axes, delta) for axes, delta in pairs if delta is not None]


Scales = dict[str, ScaleVectors]


def compute_dtype(dtype: Any) -> Any:
    """Returns the dtype in which a scale multiplies: the given one, at least float32."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def broadcast_scale(delta: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """Returns ``1 + delta`` with size-one axes, to broadcast against an array of ``ndim`` axes."""
    return jnp.expand_dims(1 + delta, [i for i in range(ndim) if i not in axes])


def check(scales: Scales, weights: Mapping[str, Any]) -> None:
    """Checks that an adapter fits the weights that it would scale, given as arrays by path.

    Raises:
      ValueError: a path that is missing, roles that do not fit the number of axes, or a vector
        that is missing, not called for, or of another shape than the weight's axes.
    """
    for path, vectors in scales.items():
        if path not in weights:
            raise ValueError(
                f"{path}: is scaled by the adapter, but is none of the {len(weights)} arrays;"
                f" {paths.suggest(path, weights)}"
            )
        shape, axes = np.shape(weights[path]), vectors.axes
        if len(shape) != (count := len(axes.split())):
            raise ValueError(
                f"{path}: has {len(shape)} axes, shape {shape}, but roles for {count}: {axes!r}"
            )
        for side in SIDES:
            delta = getattr(vectors, side)
            has = None if delta is None else np.shape(delta)
            needs = side_shape(shape, axes, side)
            if has != needs:
                raise ValueError(
                    f"{path}: {side} has shape {has}, but a weight of shape {shape} with roles"
                    f" {axes!r} needs {needs}"
                )


def count(scales: Scales) -> int:
    """Returns the number of trainable parameters: the sum of all vectors' sizes.

    >>> count({"w": ScaleVectors(jnp.zeros(5), jnp.zeros(3), "in out")})
    8
    """
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(scales))


def known_values(scales: Scales) -> dict[tuple[str, str], np.ndarray]:
    """Returns the concrete vectors by (path, side); tracers are left out."""
    return {
        (path, side): np.asarray(delta)
        for path, vectors in scales.items()
        for side in SIDES
        if (delta := getattr(vectors, side)) is not None and not isinstance(delta, jax.core.Tracer)
    }


def iter_stack(vectors: ScaleVectors, *arrays: np.ndarray) -> Iterator[tuple[tuple, list, list]]:
    """Yields for each slice of a weight's stack its index, float64 deltas and slices of the arrays.

    The deltas broadcast against the slices. One slice at a time, since float64 copies of a whole
    stack of layers would be large.
    """
    roles = vectors.axes.split()
    stack = [i for i, role in enumerate(roles) if role == "stack"]
    deltas = [
        np.expand_dims(np.asarray(delta, np.float64), sorted({*range(len(roles))} - {*axes}))
        for axes, delta in vectors.factors()
    ]
    first = range(len(stack))
    moved = [[np.moveaxis(x, stack, first) for x in group] for group in (deltas, arrays)]
    for index in np.ndindex(moved[1][0].shape[: len(stack)]):
        slices = [[x[index] for x in group] for group in moved]
        yield index, slices[0], slices[1]


def combined_delta(deltas: Sequence[Any]) -> Any:
    """Returns the relative change that all deltas make together: ``prod(1 + delta) - 1``."""
    # Not as 1 + x times 1 + y: that would cancel.
    return functools.reduce(lambda x, y: x + y + x * y, deltas)
