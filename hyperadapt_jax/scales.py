"""The arrays that adapt a weight: their container, their axes, and what checks and reads them.

A weight ``W`` becomes ``diag(1 + row) (W + up down) diag(1 + col)`` in the paper's
(outputs x inputs) layout. The two scale vectors alone are HyperAdapt (arXiv 2509.18629: ``row`` is
its ``a - 1`` and ``col`` its ``b - 1``), the low-rank term alone is LoRA (arXiv 2106.09685:
``down`` is its ``A`` and ``up`` its ``B``, the factor ``alpha / r`` in it).

Vectors are stored as the difference from one, in float32: a bfloat16 vector at one steps by 2**-7
and never moves under a usual learning rate, and weight decay on a difference pulls toward the
identity, not toward zero.
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
ARRAYS = (*SIDES, "down", "up")


def side_axes(axes: str, side: str) -> tuple[int, ...]:
    """Returns the weight axes that one of a weight's :data:`ARRAYS` spans.

    For row and col, those of the side; empty where the roles name no ``out`` (for row) or no ``in``
    (for col): a one-sided weight. Of a low-rank term, ``up`` spans the outputs, and ``down`` all
    that is left: a convolution's window belongs to its inputs. Without an ``out``, ``down`` spans
    the ``in`` axes, and ``up`` the rest.

    >>> side_axes("stack in out", "row"), side_axes("stack in out", "col")
    ((0, 2), (0, 1))
    >>> side_axes("- out", "col")
    ()
    >>> side_axes("- - in out", "down"), side_axes("- - in out", "up")
    ((0, 1, 2), (3,))
    """
    roles = axes.split()
    if side in SIDES:
        spanned = SIDES[side] if SIDES[side][1] in roles else ()
    else:
        outputs = ("out",) if "out" in roles else ("-",)
        inputs = ("in", "-") if "out" in roles else ("in",)
        spanned = ("stack", *(outputs if side == "up" else inputs))
    return tuple(i for i, role in enumerate(roles) if role in spanned)


def stack_axes(axes: str) -> tuple[int, ...]:
    """Returns the weight axes whose slices have arrays of their own.

    >>> stack_axes("stack in out")
    (0,)
    """
    return tuple(i for i, role in enumerate(axes.split()) if role == "stack")


def side_shape(
    shape: Sequence[int], axes: str, side: str, rank: int | None = None
) -> tuple[int, ...] | None:
    """Returns the shape of one of a weight's :data:`ARRAYS`; None for a side without a vector.

    >>> side_shape((4, 3, 5), "stack in out", "row"), side_shape((3, 5), "- out", "col")
    ((4, 5), None)
    >>> side_shape((4, 3, 5), "stack in out", "down", rank=2)
    (4, 3, 2)
    """
    spanned = tuple(shape[i] for i in side_axes(axes, side))
    if side in SIDES:
        return spanned or None
    return None if rank is None else (*spanned, rank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleVectors:
    """The arrays that adapt one weight, float32; each may be None.

    Attributes:
      row: output-side scale minus one, the shape of the weight's stack and out axes.
      col: input-side scale minus one, the shape of the weight's stack and in axes.
      axes: one role per axis of the weight: ``in``, ``out``, ``stack`` or ``-`` (static).
      down: input side of a low-rank term, the shape of the weight's axes without out, then r.
      up: output side of it, the shape of the weight's stack and out axes, then r.
      keys: data of random keys for dropout on what ``down`` sees, the shape of the weight's stack
        axes, then the key's; only while training.
      dropout: the share of inputs that ``down`` does not see (static).
    """

    row: Any
    col: Any
    axes: str = dataclasses.field(metadata={"static": True})
    down: Any = None
    up: Any = None
    keys: Any = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __repr__(self) -> str:
        named = [f"row={self.row!r}", f"col={self.col!r}", f"axes={self.axes!r}"]
        more = {n: getattr(self, n) for n in ("down", "up", "keys")}
        named += [f"{name}={array!r}" for name, array in more.items() if array is not None]
        return f"ScaleVectors({', '.join(named)})"

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that are not None, by their names in :data:`ARRAYS`."""
        found = {name: getattr(self, name) for name in ARRAYS}
        return {name: array for name, array in found.items() if array is not None}

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
      ValueError: a path that is missing, roles that do not fit the number of axes, or an array
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
        rank = None if vectors.down is None else (np.shape(vectors.down) or (0,))[-1]
        for name in ARRAYS:
            array = getattr(vectors, name)
            has = None if array is None else np.shape(array)
            needs = side_shape(shape, axes, name, rank)
            if has != needs and not (has is None and name in SIDES and rank is not None):
                raise ValueError(
                    f"{path}: {name} has shape {has}, but a weight of shape {shape} with roles"
                    f" {axes!r} needs {needs}"
                )


def count(scales: Scales) -> int:
    """Returns the number of parameters in an adapter: the sum of all arrays' sizes.

    >>> count({"w": ScaleVectors(jnp.zeros(5), jnp.zeros(3), "in out")})
    8
    """
    return sum(math.prod(np.shape(x)) for v in scales.values() for x in v.arrays.values())


def known_values(scales: Scales) -> dict[tuple[str, str], np.ndarray]:
    """Returns the concrete vectors by (path, side); tracers and low-rank terms are left out."""
    return {
        (path, side): np.asarray(delta)
        for path, vectors in scales.items()
        for side in SIDES
        if (delta := getattr(vectors, side)) is not None and not isinstance(delta, jax.core.Tracer)
    }


def low_rank_product(vectors: ScaleVectors) -> Any:
    """Returns the low-rank term of a weight as an array that broadcasts to it, in float32.

    >>> vectors = ScaleVectors(None, None, "in out", jnp.ones((3, 2)), jnp.ones((5, 2)))
    >>> low_rank_product(vectors).shape
    (3, 5)
    """
    spans = [side_axes(vectors.axes, name) for name in ("down", "up")]
    return low_rank_sum(vectors.down, spans[0], vectors.up, spans[1], len(vectors.axes.split()))


def low_rank_sum(
    down: Any, down_axes: Sequence[int], up: Any, up_axes: Sequence[int], ndim: int
) -> jax.Array:
    """Returns the sum over r of ``down[..., r] * up[..., r]``, each on some axes of an array.

    Args:
      down, up: the shape of the axes that each spans, then r.
      down_axes, up_axes: those axes.
      ndim: how many axes the array has; it has size one along those that neither spans.
    """
    spans = sorted({*down_axes, *up_axes})
    product = jnp.einsum(down, [*down_axes, ndim], up, [*up_axes, ndim], spans, precision="highest")
    return jnp.expand_dims(product, [i for i in range(ndim) if i not in spans])


@dataclasses.dataclass(frozen=True)
class StackSlice:
    """What adapts one slice of a weight's stack, in float64.

    Attributes:
      index: which slice.
      deltas: the scale vectors, which broadcast against it.
      low_rank: down and up, which multiply to its low-rank term; empty where there is none.
    """

    index: tuple[int, ...]
    deltas: list[np.ndarray]
    low_rank: list[np.ndarray]

    def update(self, base: np.ndarray) -> np.ndarray:
        """Returns what is added to a slice of the frozen weight: ``W' - W``."""
        change = combined_delta(self.deltas) if self.deltas else 0.0
        step = base * change
        if self.low_rank:
            down, up = self.low_rank
            step = step + np.einsum("...r,...r->...", down, up) * (1 + change)
        return step


def iter_stack(
    vectors: ScaleVectors, *arrays: np.ndarray
) -> Iterator[tuple[StackSlice, list[np.ndarray]]]:
    """Yields for each slice of a weight's stack what adapts it, and slices of the arrays.

    One slice at a time, since float64 copies of a whole stack of layers would be large.
    """
    ndim, stack = len(vectors.axes.split()), stack_axes(vectors.axes)

    def leading(x: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """On all axes of the weight, those of the stack first."""
        missing = [i for i in range(ndim) if i not in axes]
        return np.moveaxis(np.expand_dims(x, missing), stack, range(len(stack)))

    arrays = tuple(np.moveaxis(x, stack, range(len(stack))) for x in arrays)
    known = {name: np.asarray(x) for name, x in vectors.arrays.items()}
    moved = {name: leading(x, side_axes(vectors.axes, name)) for name, x in known.items()}
    for index in np.ndindex(arrays[0].shape[: len(stack)]):
        parts = {name: np.asarray(x[index], np.float64) for name, x in moved.items()}
        deltas = [parts[side] for side in SIDES if side in parts]
        low_rank = [parts[name] for name in ("down", "up") if name in parts]
        yield StackSlice(index, deltas, low_rank), [x[index] for x in arrays]


def combined_delta(deltas: Sequence[Any]) -> Any:
    """Returns the relative change that all deltas make together: ``prod(1 + delta) - 1``."""
    # Not as 1 + x times 1 + y: that would cancel.
    return functools.reduce(lambda x, y: x + y + x * y, deltas)
