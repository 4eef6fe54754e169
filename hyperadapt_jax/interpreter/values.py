"""The value type: a frozen array, and what waits to be multiplied with it or added to it."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from hyperadapt_jax.scales import broadcast_scale, compute_dtype, low_rank_sum

Factors = Sequence[tuple[tuple[int, ...], Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """``sum over r of down[..., r] * up[..., r]``, each on some axes of an array.

    Attributes:
      down: the shape of the axes that it spans, then r.
      up: likewise.
      keys: data of random keys, for dropout: the shape of the axes that it spans, then the key's.
        None without dropout.
      down_axes, up_axes, keys_axes: the axes of the array that each spans, ascending (static).
      dropout: the share of an operand's entries that the term does not see (static).
    """

    down: Any
    up: Any
    keys: Any
    down_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    up_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    keys_axes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def rank(self) -> int:
        return self.down.shape[-1]

    @property
    def factors(self) -> Factors:
        """Its arrays, those that it has, each with the axes that all but its last axis span."""
        pairs = [(self.down_axes, self.down), (self.up_axes, self.up), (self.keys_axes, self.keys)]
        return pairs[: 2 if self.keys is None else 3]

    def rebuilt(self, factors: Factors) -> LowRank:
        """The same term with other arrays on other axes, given as :attr:`factors` gives them."""
        axes, arrays = zip(*factors, strict=True)
        names = ("down", "up", "keys")[: len(arrays)]
        changed = dict(zip(names, arrays, strict=True))
        changed |= {f"{name}_axes": tuple(a) for name, a in zip(names, axes, strict=True)}
        return dataclasses.replace(self, **changed)

    def moved(
        self, move: Callable[[tuple[int, ...], Any], tuple[Any, Any] | None]
    ) -> LowRank | None:
        """The term after a step that moves vectors: each array moves as vectors on its axes do.

        Args:
          move: gives of axes and a vector on them the new ones; None where it cannot pass.

        Returns:
          The term; None where an array cannot pass.
        """
        factors = []
        for axes, array in self.factors:
            spans: list[Any] = []

            def one(vector: Any, axes: tuple[int, ...] = axes, spans: list[Any] = spans) -> Any:
                found = move(axes, vector)
                spans[:] = [None if found is None else tuple(found[0])]
                return None if found is None else found[1]

            vectors = jax.vmap(one, in_axes=-1, out_axes=-1)(array)
            if spans[0] is None:
                return None
            factors.append((spans[0], vectors))
        return self.rebuilt(factors)

    def times(self, number: Any) -> LowRank:
        """The term, multiplied by one number."""
        return dataclasses.replace(self, up=self.up * jnp.asarray(number, self.up.dtype))

    def dense(self, ndim: int) -> jax.Array:
        """The whole term, with size-one axes where it is the same all along an axis."""
        return low_rank_sum(self.down, self.down_axes, self.up, self.up_axes, ndim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """``(value + low_rank) * prod(1 + delta)``, with nothing carried out.

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
      low_rank: a term to add; of codes, to the weight that they stand for. None for none.
    """

    value: Any
    deltas: tuple[Any, ...]
    axes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    origin: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    product: bool = dataclasses.field(default=False, metadata={"static": True})
    codes: bool = dataclasses.field(default=False, metadata={"static": True})
    low_rank: LowRank | None = None

    @classmethod
    def of(
        cls,
        value: Any,
        factors: Factors,
        origin: tuple[str, ...],
        product: bool = False,
        codes: bool | None = None,
        low_rank: LowRank | None = None,
    ) -> Scaled:
        """Builds one from (axes, delta) pairs, whose axes may come in any order.

        Integers are codes if nothing else is said.
        """
        ordered = [_in_order(value.shape, *factor) for factor in factors]
        if low_rank is not None:
            low_rank = low_rank.rebuilt([_in_order(value.shape, *f) for f in low_rank.factors])
        axes, deltas = zip(*ordered, strict=True) if ordered else ((), ())
        codes = not is_inexact(value) if codes is None else codes
        return cls(value, tuple(deltas), tuple(axes), origin, product, codes, low_rank)

    @property
    def is_vector(self) -> bool:
        """A weight no larger than a vector of its own: multiplying it out costs nothing."""
        sizes = [delta.size for delta in self.deltas]
        if self.low_rank is not None:
            sizes += [x.size // self.low_rank.rank for x in (self.low_rank.down, self.low_rank.up)]
        return self.value.size in sizes and not self.product and is_inexact(self.value)

    @property
    def factors(self) -> Factors:
        return list(zip(self.axes, self.deltas, strict=True))


def _in_order(shape: Sequence[int], spans: Sequence[int], array: Any) -> tuple[tuple, Any]:
    """A factor with its axes ascending and none of size one; what it has behind them stays."""
    if single := [i for i, axis in enumerate(spans) if shape[axis] == 1]:
        array = lax.squeeze(array, single)
        spans = tuple(axis for axis in spans if shape[axis] != 1)
    order = sorted(range(len(spans)), key=lambda i: spans[i])
    if order != list(range(len(order))):
        array = lax.transpose(array, [*order, *range(len(order), array.ndim)])
    return tuple(spans[i] for i in order), array


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


def scale(
    x: jax.Array, factors: Factors, dtype: Any = None, added: jax.Array | None = None
) -> jax.Array:
    """``(x + added) * prod(1 + delta)``, in float32 or wider and rounded once.

    The result has x's dtype, or the one given.
    """
    dtype = x.dtype if dtype is None else dtype
    wide = compute_dtype(dtype)

    def product(x: jax.Array, added: jax.Array | None, *deltas: jax.Array) -> jax.Array:
        y = x.astype(wide)
        if added is not None:
            y = y + added.astype(wide)
        for (axes, _), delta in zip(factors, deltas, strict=True):
            y = y * broadcast_scale(delta.astype(wide), axes, x.ndim)
        return y.astype(dtype)

    # A narrow operand is kept for the backward pass as it is, not as a copy in float32.
    if x.dtype != wide and factors:
        product = jax.checkpoint(product, prevent_cse=False)
    return product(x, added, *(delta for _, delta in factors))


def multiplied_out(x: Scaled, dtype: Any = None) -> jax.Array:
    """What a Scaled stands for, as an array of its value's dtype, or of the one given."""
    added = None if x.low_rank is None else x.low_rank.dense(x.value.ndim)
    return scale(x.value, x.factors, dtype, added)


def is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Scaled) else x


def factors_of(x: Any) -> Factors:
    return x.factors if isinstance(x, Scaled) else ()


def origin_of(*operands: Value) -> tuple[str, ...]:
    origins = [x.origin for x in operands if isinstance(x, Scaled)]
    return tuple(dict.fromkeys(path for origin in origins for path in origin))


def low_rank_of(x: Any) -> LowRank | None:
    return x.low_rank if isinstance(x, Scaled) else None


def moved(
    x: Scaled,
    value: Any,
    factors: Factors,
    product: bool = False,
    low_rank: LowRank | None = None,
) -> Scaled:
    """The same weight after a step that changes no number; it may be an activation from there."""
    return Scaled.of(value, factors, x.origin, x.product or product, x.codes, low_rank)


def vector_like(shape: Sequence[int]) -> bool:
    """What is no larger than a vector is as cheap to scale as an activation."""
    return sum(size > 1 for size in shape) < 2


def same_factors(x: Scaled, y: Scaled) -> bool:
    """Whether the same arrays wait for both, on the same axes."""
    pairs = [*x.factors, *(x.low_rank.factors if x.low_rank else ())]
    others = [*y.factors, *(y.low_rank.factors if y.low_rank else ())]
    return (
        len(x.deltas) == len(y.deltas)
        and len(pairs) == len(others)
        and all(a == b and s is t for (a, s), (b, t) in zip(pairs, others, strict=True))
    )
