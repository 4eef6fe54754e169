"""The value type: a frozen array and the factors that wait to scale it."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from hyperadapt_jax.scales import broadcast_scale, compute_dtype

Factors = Sequence[tuple[tuple[int, ...], Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """``value * prod(1 + delta)``, with the product not carried out.

    A factor spans no axis of size one, so that such an axis may be broadcast; it may span none.

    Attributes:
      value: an array of any shape.
      deltas: for each factor, an array with the shape of the axes that it spans.
      axes: for each factor, the axes of ``value`` that it spans, ascending (static).
      origin: the paths of the weights it comes from; empty where no one asks, so that layers alike
        are of one type, and traced once (static).
      product: it is no weight any more but a product with one, waiting to be scaled (static).
      codes: it is a quantized weight that is not yet, or may not yet be, dequantized: what is
        scaled is not this value but the weight that the function makes of it (static).
    """

    value: Any
    deltas: tuple[Any, ...]
    axes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    origin: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    product: bool = dataclasses.field(default=False, metadata={"static": True})
    codes: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(
        cls,
        value: Any,
        factors: Factors,
        origin: tuple[str, ...],
        product: bool = False,
        codes: bool | None = None,
    ) -> Scaled:
        """Builds one from (axes, delta) pairs, whose axes may come in any order.

        Integers are codes if nothing else is said.
        """
        axes, deltas = [], []
        for spans, delta in factors:
            if single := [i for i, axis in enumerate(spans) if value.shape[axis] == 1]:
                delta = lax.squeeze(delta, single)
                spans = tuple(axis for axis in spans if value.shape[axis] != 1)
            order = sorted(range(len(spans)), key=lambda i: spans[i])
            axes.append(tuple(spans[i] for i in order))
            in_order = order == list(range(len(order)))
            deltas.append(delta if in_order else lax.transpose(delta, order))
        codes = not is_inexact(value) if codes is None else codes
        return cls(value, tuple(deltas), tuple(axes), origin, product, codes)

    @property
    def is_vector(self) -> bool:
        """A weight no larger than a vector of its own: multiplying it out costs nothing."""
        vector = any(delta.size == self.value.size for delta in self.deltas)
        return vector and not self.product and is_inexact(self.value)

    @property
    def factors(self) -> Factors:
        return list(zip(self.axes, self.deltas, strict=True))


Value: TypeAlias = jax.Array | Scaled
Operands: TypeAlias = Sequence[Value]
Results: TypeAlias = list[Value] | None


class Facts:
    """What is known of arrays, by identity, each for as long as it lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Callable[[], Any], dict[str, Any]]] = {}

    def note(self, x: Any, **facts: Any) -> None:
        """Adds facts about an array."""
        if known := self._of(x):
            known.update(facts)
            return
        ref: Callable[[], Any]
        try:
            ref = weakref.ref(x)
        except TypeError:  # a scalar of Python or NumPy
            ref = functools.partial(_identity, x)
        self._known[id(x)] = ref, facts

    def get(self, x: Any, fact: str, default: Any = None) -> Any:
        """A fact about an array, if it is known."""
        return self._of(x).get(fact, default)

    def _of(self, x: Any) -> dict[str, Any]:
        ref, facts = self._known.get(id(x), (None, {}))
        return facts if ref is not None and ref() is x else {}


def _identity(x: Any) -> Any:
    return x


def scale(x: jax.Array, factors: Factors, dtype: Any = None) -> jax.Array:
    """``x * prod(1 + delta)``, multiplied in float32 or wider and rounded once.

    The result has x's dtype, or the one given.
    """
    dtype = x.dtype if dtype is None else dtype
    wide = compute_dtype(dtype)

    def product(x: jax.Array, *deltas: jax.Array) -> jax.Array:
        y = x.astype(wide)
        for (axes, _), delta in zip(factors, deltas, strict=True):
            y = y * broadcast_scale(delta.astype(wide), axes, x.ndim)
        return y.astype(dtype)

    # A narrow operand is kept for the backward pass as it is, not as a copy in float32.
    if x.dtype != wide:
        product = jax.checkpoint(product, prevent_cse=False)
    return product(x, *(delta for _, delta in factors))


def is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Scaled) else x


def factors_of(x: Any) -> Factors:
    return x.factors if isinstance(x, Scaled) else ()


def origin_of(*operands: Value) -> tuple[str, ...]:
    origins = [x.origin for x in operands if isinstance(x, Scaled)]
    return tuple(dict.fromkeys(path for origin in origins for path in origin))


def moved(x: Scaled, value: Any, factors: Factors, product: bool = False) -> Scaled:
    """The same weight after a step that changes no number; it may be an activation from there."""
    return Scaled.of(value, factors, x.origin, x.product or product, x.codes)


def vector_like(shape: Sequence[int]) -> bool:
    """What is no larger than a vector is as cheap to scale as an activation."""
    return sum(size > 1 for size in shape) < 2


def same_factors(x: Scaled, y: Scaled) -> bool:
    return x.axes == y.axes and all(a is b for a, b in zip(x.deltas, y.deltas, strict=True))
