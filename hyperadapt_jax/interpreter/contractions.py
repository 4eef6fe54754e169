"""How a scaled weight passes through each primitive: one small rule per primitive.

A rule gets the equation and its operands, of which at least one is a :class:`Scaled`, and returns
the results; or it returns None where no vector can pass, and then the weight is materialised.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hyperadapt_jax.interpreter import jax_versions
from hyperadapt_jax.scales import along, widen
from hyperadapt_jax.sharding import vector_spec

Factors = Sequence[tuple[tuple[int, ...], Any]]


class Names(tuple):
    """Paths of weights that never differ from others, so that layers alike are traced once."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names)

    def __hash__(self) -> int:
        return 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """``value * prod(1 + delta)``, with the product not carried out.

    A factor spans no axis of size one, so that such an axis may be broadcast; it may span none.

    Attributes:
      value: an array of any shape.
      deltas: for each factor, an array with the shape of the axes that it spans.
      axes: for each factor, the axes of ``value`` that it spans, ascending (static).
      origin: the paths of the weights it comes from (static).
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
        codes = not _inexact(value) if codes is None else codes
        return cls(value, tuple(deltas), tuple(axes), origin, product, codes)

    @property
    def is_vector(self) -> bool:
        """A weight no larger than a vector of its own: multiplying it out costs nothing."""
        vector = any(delta.size == self.value.size for delta in self.deltas)
        return vector and not self.product and _inexact(self.value)

    @property
    def factors(self) -> Factors:
        return list(zip(self.axes, self.deltas, strict=True))


class Facts:
    """What is known of traced arrays, each for as long as it lives."""

    def __init__(self) -> None:
        self._facts: dict[int, tuple[weakref.ref, Any]] = {}

    def note(self, x: Any, fact: Any) -> None:
        self._facts[id(x)] = weakref.ref(x), fact

    def of(self, x: Any, default: Any = None) -> Any:
        ref, fact = self._facts.get(id(x), (None, None))
        return fact if ref is not None and ref() is x else default


def scale(x: jax.Array, factors: Factors, dtype: Any = None) -> jax.Array:
    """``x * prod(1 + delta)``, multiplied in float32 or wider and rounded once.

    The result has x's dtype, or the one given.
    """
    dtype = x.dtype if dtype is None else dtype
    wide = widen(dtype)

    def product(x, *deltas):
        y = x.astype(wide)
        for (axes, _), delta in zip(factors, deltas, strict=True):
            y = y * along(delta.astype(wide), axes, x.ndim)
        return y.astype(dtype)

    # A narrow operand is kept for the backward pass as it is, not as a copy in float32.
    if x.dtype != wide:
        product = jax.checkpoint(product, prevent_cse=False)
    return product(x, *(delta for _, delta in factors))


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Scaled) else x


def factors_of(x: Any) -> Factors:
    return x.factors if isinstance(x, Scaled) else ()


def origin_of(*operands: Any) -> tuple[str, ...]:
    origins = [x.origin for x in operands if isinstance(x, Scaled)]
    return type(origins[0])(dict.fromkeys(path for origin in origins for path in origin))


# Contractions: vectors move from the weight to the activations, and here they are applied.


def dot_general(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A vector on free or batch axes scales the result, one on contracted axes the other operand.

    Where a vector spans contracted and free axes (experts that all see one input), its free axes
    become batch axes of the product: the other operand is repeated along them, and scaled. What is
    a product already, such as looked-up rows, is an activation: its own vectors scale it.
    """
    operands, result = _settled(ctx, eqn, operands), eqn.outvars[0].aval
    contract, batch = eqn.params["dimension_numbers"]
    values = [value_of(x) for x in operands]
    names = [[("free", side, axis) for axis in range(v.ndim)] for side, v in enumerate(values)]
    for kind, pairs in (("contract", contract), ("batch", batch)):
        for i, axes in enumerate(zip(*pairs, strict=True)):
            for side, axis in enumerate(axes):
                names[side][axis] = (kind, i)
    size = dict(zip(names[0] + names[1], values[0].shape + values[1].shape, strict=True))
    free = [[n for n in names[side] if n[0] == "free"] for side in (0, 1)]
    out = [("batch", i) for i in range(len(batch[0]))] + free[0] + free[1]

    after, before, repeated = [], ([], []), []
    for side, operand in enumerate(operands):
        stay, go = [], []
        for axes, delta in factors_of(operand):
            spans = [names[side][axis] for axis in axes]
            (stay if all(name in out for name in spans) else go).append((spans, delta))
        along = [n for n in free[side] if any(n in spans for spans, _ in go)]
        if (stay or go) and not operand.product and _inexact(operand.value):
            repeats = math.prod(size[n] for n in along)
            products = math.prod(size.values())
            if why := _dearer(values, side, result, products, repeats, len(stay), len(go)):
                [operands[side]] = [values[side]] = ctx.plain(eqn, [operand], why)
                continue
        after += [(tuple(map(out.index, spans)), delta) for spans, delta in stay]
        before[1 - side].extend(go)
        repeated += along
    if not _inexact(result) and any(before[side] and not _inexact(values[side]) for side in (0, 1)):
        return None
    if repeated and eqn.params.get("out_sharding") is not None:
        return None

    parts: list[list[Any]] = []
    for side in (0, 1):
        missing = [n for n in repeated if n[1] != side]
        if missing:
            shape = (*(size[n] for n in missing), *values[side].shape)
            values[side] = jnp.broadcast_to(values[side], shape)
            names[side] = missing + names[side]
        if before[side]:
            ctx.applied(eqn, operands[1 - side], onto=operands[side])
        onto = [(tuple(map(names[side].index, spans)), delta) for spans, delta in before[side]]
        ordered = Scaled.of(values[side], onto, ())
        parts.append(_parts(eqn, side, ordered.value, ordered.factors))

    changed = {}
    if repeated:

        def places(kind):
            found = [n for n in names[0] if n in names[1] and (n[0] == "contract") == kind]
            return tuple(tuple(names[side].index(n) for n in found) for side in (0, 1)), found

        new_contract, _ = places(True)
        new_batch, shared = places(False)
        new_out = shared + [n for ns in names for n in ns if n[0] == "free" and n not in shared]
        changed["dimension_numbers"] = (new_contract, new_batch)
    y = _contract(eqn, parts, **changed)
    if repeated:
        y = lax.transpose(y, [new_out.index(n) for n in out])
    return [_scale_result(ctx, eqn, operands, y, after)]


def _dearer(
    values: Sequence[Any],
    side: int,
    result: Any,
    products: int,
    repeats: int,
    after: int,
    before: int,
) -> str:
    """Why a step costs less with the weight of one side multiplied out; empty where it does not.

    Scaling activations takes a few operations for each of their numbers: about 4 of an operand, 6
    of a result, with the gradients. What multiplying out takes is the weight's own gradient, as
    many operations as the contraction: far more, unless an axis of it is tiny. In memory, it is
    the repeated operand that can be far too large.
    """
    weight, other = values[side].size, values[1 - side].size
    scaled = repeats * other
    if repeats > 1 and scaled > weight + other + result.size:
        return (
            f"scaling would repeat an operand of {other:,} numbers {repeats:,} times,"
            f" to more than weight, operand and result together"
        )
    if 6 * after * result.size + 4 * before * scaled > 2 * products + 4 * (after + before) * weight:
        return "too few products are made with it here: scaling the activations would cost more"
    return ""


def _settled(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """A contraction's operands; those that are products already are activations, and are scaled."""
    settled = list(operands)
    for side, x in enumerate(operands):
        inexact = _inexact(value_of(x)) or _inexact(eqn.outvars[0].aval)
        if isinstance(x, Scaled) and x.product and inexact:
            ctx.applied(eqn, x)
            settled[side] = scale(x.value, x.factors, _operand_dtype(eqn, side))
    return settled


def _operand_dtype(eqn: Any, side: int) -> Any:
    """The dtype in which one operand of a contraction is scaled: its own, or a wider result's.

    Types below 16 bits have no room for a scale, and integers none at all.
    """
    own, result = eqn.invars[side].aval.dtype, eqn.outvars[0].aval.dtype
    if jnp.issubdtype(own, jnp.complexfloating):
        return own
    types = [t for t in (own, result) if jnp.issubdtype(t, jnp.inexact)]
    return jnp.finfo(max([*types, jnp.bfloat16], key=lambda t: jnp.finfo(t).bits)).dtype


def _parts(eqn: Any, side: int, x: Any, factors: Factors) -> list[Any]:
    """One operand of a contraction, scaled; as several that add up where it is scaled wider.

    A product in 16 bits with a wider result stays one, as fast and, at zero deltas, as exact to the
    last bit: what its operand's dtype does not hold of a scaled number is a second operand.
    """
    own, dtype = eqn.invars[side].aval.dtype, _operand_dtype(eqn, side)
    if not factors and x.dtype == own:
        return [x]
    x = scale(x, factors, dtype)
    other = eqn.invars[1 - side].aval.dtype
    bits = [jnp.finfo(t).bits if jnp.issubdtype(t, jnp.inexact) else 0 for t in (own, other)]
    if dtype == own or bits[0] < max(16, bits[1]):
        return [x]
    info = jnp.finfo(own)
    # A cast there and back would be optimized away.
    high = lax.reduce_precision(jnp.clip(x, info.min, info.max), info.nexp, info.nmant)
    return [high.astype(own), (x - high).astype(own)]


def _contract(eqn: Any, parts: Sequence[Sequence[Any]], *others: Any, **changed: Any) -> Any:
    """A contraction of two operands, each a sum of parts, of any dtypes."""
    dtypes = [x.aval.dtype for x in eqn.invars[:2]]
    if [p[0].dtype for p in parts] != dtypes:
        changed["preferred_element_type"] = eqn.outvars[0].aval.dtype
        if not isinstance(eqn.params["precision"], (tuple, lax.Precision)):
            changed["precision"] = None  # an algorithm for the dtypes that there were
    ys = [jax_versions.bind(eqn, a, b, *others, **changed)[0] for a, b in itertools.product(*parts)]
    return functools.reduce(jnp.add, ys)


def ragged_dot_general(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A dot whose rows come in groups, each with its own slice of the right side (experts).

    A vector over the groups becomes one per row, by the row's group. Then it goes as in any dot:
    a vector whose axes the result has scales the result, any other the other operand.
    """
    group_sizes, result = operands[2], eqn.outvars[0].aval
    sides = _settled(ctx, eqn, operands[:2])
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = ragged.dot_dimension_numbers
    values = [value_of(x) for x in sides]
    names = [[("free", side, axis) for axis in range(v.ndim)] for side, v in enumerate(values)]
    for kind, pairs in (("contract", contract), ("batch", batch)):
        for i, axes in enumerate(zip(*pairs, strict=True)):
            for side, axis in enumerate(axes):
                names[side][axis] = (kind, i)
    for axis in ragged.rhs_group_dimensions:
        names[1][axis] = ("group",)
    [rows] = (names[0][axis] for axis in ragged.lhs_ragged_dimensions)
    out = [("batch", i) for i in range(len(batch[0]))]
    out += [n for n in names[0] + names[1] if n[0] == "free"]
    if rows[0] == "contract":
        out = [("group",), *out]

    after, before = [], ([], [])
    for side, operand in enumerate(sides):
        for axes, delta in factors_of(operand):
            spans = [names[side][axis] for axis in axes]
            if ("group",) in spans:
                outer = [n for n in out if n in names[0]]
                outer = outer[: outer.index(rows)] if group_sizes.ndim > 1 else []
                count = values[0].shape[names[0].index(rows)]
                spans, delta = _by_row(spans, delta, group_sizes, [*outer, rows], count)
            if all(name in out for name in spans):
                after.append((tuple(map(out.index, spans)), delta))
            elif all(name in names[1 - side] for name in spans):
                before[1 - side].append((tuple(map(names[1 - side].index, spans)), delta))
            else:
                return None
    if not _inexact(result) and any(before[i] and not _inexact(values[i]) for i in (0, 1)):
        return None
    parts: list[list[Any]] = []
    for side in (0, 1):
        if before[side]:
            ctx.applied(eqn, sides[1 - side], onto=sides[side])
        ordered = Scaled.of(values[side], before[side], ())
        parts.append(_parts(eqn, side, ordered.value, ordered.factors))
    y = _contract(eqn, parts, group_sizes)
    return [_scale_result(ctx, eqn, sides, y, after)]


def _by_row(
    spans: list[Any], delta: Any, group_sizes: Any, rows: list[Any], count: int
) -> tuple[list[Any], Any]:
    """A vector over groups as one over the rows that they consist of.

    Args:
      spans: names of the vector's axes, among them ``("group",)``.
      delta: the vector.
      group_sizes: [..., groups], how many rows each group has.
      rows: names of the axes that the rows lie on: those of ``...``, then the ragged one.
      count: how many rows there are; those that belong to no group are scaled by one.
    """
    ends = jnp.cumsum(group_sizes, axis=-1)[..., None, :]
    groups = jnp.sum(ends <= jnp.arange(count, dtype=ends.dtype)[:, None], axis=-1)
    shared = [n for n in spans if n in rows]
    index = [groups]
    for name in shared:
        axis = rows.index(name)
        index.append(lax.broadcasted_iota(groups.dtype, groups.shape, axis))
    left = [n for n in spans if n not in rows and n != ("group",)]
    delta = lax.transpose(delta, [spans.index(n) for n in [("group",), *shared, *left]])
    return [*rows, *left], delta.at[tuple(index)].get(mode="fill", fill_value=0)


def conv_general_dilated(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """The kernel's out vector scales the result's features, its in vector the input's features."""
    lhs, rhs = operands = _settled(ctx, eqn, operands)
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis, in_axis = numbers.rhs_spec[:2]
    if isinstance(lhs, Scaled):
        return None
    after, before = [], []
    for axes, delta in factors_of(rhs):
        if axes in ((), (out_axis,)):
            after.append((tuple(numbers.out_spec[1] for _ in axes), delta))
        elif axes == (in_axis,):
            before.append(((numbers.lhs_spec[1],), jnp.tile(delta, groups)))
        elif set(axes) == {in_axis, out_axis}:
            # Each group's own input features, as where a function of one kernel is mapped over
            # many: the factor must be the same for all output features of a group.
            size, place = rhs.value.shape[out_axis] // groups, axes.index(out_axis)
            if ctx.facts.of(delta, {}).get(place, 1) % size:
                return None
            delta = lax.slice_in_dim(delta, 0, None, size, place)
            delta = delta if place == 0 else delta.T
            before.append(((numbers.lhs_spec[1],), delta.reshape(-1)))
        else:
            return None
    if before and not _inexact(eqn.outvars[0].aval) and not _inexact(lhs):
        return None
    if before:
        ctx.applied(eqn, rhs)
    kernel, inputs = value_of(rhs), _parts(eqn, 0, lhs, before)
    # Unlike a product of matrices, a convolution takes operands of one dtype.
    y = _contract(eqn, [inputs, [kernel.astype(inputs[0].dtype)]])
    return [_scale_result(ctx, eqn, operands, y, after)]


def gather(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Rows or windows picked by index: the vectors are gathered as their table is.

    A vector over axes that are kept whole stays as it is, one over batching axes moves with them,
    and any other is gathered by its own columns of the indices. Looked-up rows are activations.
    """
    table, indices = operands
    if isinstance(indices, Scaled) or not (table.codes or _fills_with_nothing(eqn)):
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    # Which axis of the indices belongs to an axis of the table.
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    batching = dict(pairs)
    gone = {*batching, *numbers.collapsed_slice_dims}
    kept = [axis for axis in range(table.value.ndim) if axis not in gone]
    # Rows in an order that is a parameter too are a weight still.
    is_rows = _is_vector([sizes[axis] for axis in kept]) and not ctx.is_frozen(indices)
    size = eqn.outvars[0].aval.size
    if is_rows and size > table.value.size and _inexact(table.value) and not table.product:
        why = "what is looked up is larger than the whole table"
        return jax_versions.bind(eqn, *ctx.plain(eqn, [table], why), indices)
    [y] = jax_versions.bind(eqn, table.value, indices)
    rows = [axis for axis in range(y.ndim) if axis not in numbers.offset_dims]
    to = dict(zip(kept, numbers.offset_dims, strict=True))
    to |= {axis: rows[i] for axis, i in batching.items()}
    whole = {a for a, n in enumerate(table.value.shape) if sizes[a] == n or a in batching}
    factors = []
    for axes, delta in table.factors:
        if whole.issuperset(axes):
            spans = tuple(to[axis] for axis in axes if axis in to)
            delta = lax.squeeze(delta, [i for i, axis in enumerate(axes) if axis not in to])
        else:
            windows = [axis for axis in axes if axis in kept]
            spans = (*rows, *(to[axis] for axis in windows))
            delta = _gather_vector(eqn, axes, delta, indices, windows, batching)
        factors.append((spans, delta))
    return [_moved(table, y, factors, product=is_rows)]


def _fills_with_nothing(eqn: Any) -> bool:
    """Whether what lies outside the table is filled with zero, NaN or, in codes, a mark."""
    fill = eqn.params["fill_value"]
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP or fill is None:
        return True
    inexact = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)
    return not inexact or fill == 0 or bool(np.isnan(fill))


def _gather_vector(
    eqn: Any,
    axes: Sequence[int],
    delta: Any,
    indices: Any,
    windows: Sequence[int],
    batching: dict[int, int],
) -> Any:
    """The gather of a table, of a vector over some of its axes: rows first, then the windows."""
    numbers = eqn.params["dimension_numbers"]
    columns = [i for i, axis in enumerate(numbers.start_index_map) if axis in axes]
    if len(columns) < indices.shape[-1]:
        indices = indices[..., np.array(columns, int)]
    shared = [axis for axis in axes if axis in batching]
    picked = [axis for axis in axes if axis not in windows and axis not in shared]
    first = indices.ndim - 1
    own = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(first, first + len(windows))),
        collapsed_slice_dims=tuple(map(axes.index, picked)),
        start_index_map=tuple(axes.index(numbers.start_index_map[i]) for i in columns),
        operand_batching_dims=tuple(map(axes.index, shared)),
        start_indices_batching_dims=tuple(batching[axis] for axis in shared),
    )
    sizes = [eqn.params["slice_sizes"][axis] for axis in axes]
    # Outside the table the scale is one.
    return lax.gather(delta, indices, own, sizes, mode=eqn.params["mode"], fill_value=0)


def _scale_result(ctx: Any, eqn: Any, operands: Sequence[Any], y: Any, factors: Factors) -> Any:
    if not factors:
        return y
    scaled = Scaled.of(y, factors, origin_of(*operands), product=True, codes=False)
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return scaled  # codes multiplied as integers: the scale waits for the dequantisation
    return ctx.plain(eqn, [scaled])[0]


# Layout: the value passes, and the vectors move with their axes.


def _moved(x: Scaled, value: Any, factors: Factors, product: bool = False) -> Scaled:
    """The same weight after a step that changes no number; it may be an activation from there."""
    return Scaled.of(value, factors, x.origin, x.product or product, x.codes)


def _is_vector(shape: Sequence[int]) -> bool:
    """What is no larger than a vector is as cheap to scale as an activation."""
    return sum(size > 1 for size in shape) < 2


def _layout(move: Callable[[Any, Any, Scaled], Factors | None]) -> Callable:
    """A rule for one scaled operand, one result, and factors that ``move`` carries to its axes."""

    def rule(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
        scaled, *others = operands
        if not isinstance(scaled, Scaled) or any(isinstance(x, Scaled) for x in others):
            return None
        factors = move(eqn, others, scaled)
        if factors is None:
            return None
        [y] = jax_versions.bind(eqn, scaled.value, *others)
        return [_moved(scaled, y, factors, product=_is_vector(y.shape))]

    return rule


def _keep(eqn: Any, others: Any, x: Scaled) -> Factors | None:
    """Where every number stays what it is: integers in a type that holds all of theirs."""
    old, new = x.value.dtype, eqn.outvars[0].aval.dtype
    held = jnp.issubdtype(new, jnp.inexact) or jnp.promote_types(old, new) == new
    return x.factors if held else None


def div(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """By what is not scaled: the vectors wait."""
    scaled, divisor = operands
    if isinstance(divisor, Scaled) or not _inexact(scaled.value):
        return None
    [y] = jax_versions.bind(eqn, scaled.value, divisor)
    codes = _still_codes(ctx, operands)
    return [Scaled.of(y, scaled.factors, scaled.origin, scaled.product, codes)]


def _stop_gradient(eqn: Any, others: Any, x: Scaled) -> Factors:
    return [(axes, lax.stop_gradient(delta)) for axes, delta in x.factors]


def _reshard(eqn: Any, others: Any, x: Scaled) -> Factors:
    spec = eqn.params["dst_sharding"].spec
    return [(axes, jax.sharding.reshard(d, vector_spec(spec, axes))) for axes, d in x.factors]


def _transpose(eqn: Any, others: Any, x: Scaled) -> Factors:
    to = {axis: i for i, axis in enumerate(eqn.params["permutation"])}
    return [(tuple(to[axis] for axis in axes), delta) for axes, delta in x.factors]


def _squeeze(eqn: Any, others: Any, x: Scaled) -> Factors:
    gone = {axis % x.value.ndim for axis in eqn.params["dimensions"]}
    left = [axis for axis in range(x.value.ndim) if axis not in gone]
    return [(tuple(map(left.index, axes)), delta) for axes, delta in x.factors]


def _broadcast_in_dim(eqn: Any, others: Any, x: Scaled) -> Factors:
    to = eqn.params["broadcast_dimensions"]
    return [(tuple(to[axis] for axis in axes), delta) for axes, delta in x.factors]


def _reshape(ctx: Any, eqn: Any, others: Any, x: Scaled) -> Factors | None:
    """Axes that split or join: a factor is repeated over the axes that join its own."""
    order = eqn.params["dimensions"] or range(x.value.ndim)
    old, new = [x.value.shape[axis] for axis in order], eqn.params["new_sizes"]
    groups = _regroup(old, new)
    if groups is None:
        return None
    factors = []
    moved = Scaled.of(
        jax.ShapeDtypeStruct(tuple(old), x.value.dtype),
        [(tuple(map(order.index, axes)), delta) for axes, delta in x.factors],
        x.origin,
    )
    for axes, delta in moved.factors:
        touched = [(before, after) for before, after in groups if set(before) & set(axes)]
        wide = [axis for before, _ in touched for axis in before]
        spans = tuple(axis for _, after in touched for axis in after)
        if wide != list(axes):
            shape = tuple(old[axis] for axis in wide)
            if delta.size < math.prod(shape) == math.prod(old) and not x.codes:
                return None  # as large as the weight itself
            missing = [i for i, axis in enumerate(wide) if axis not in axes]
            delta = jnp.broadcast_to(jnp.expand_dims(delta, missing), shape)
        delta = lax.reshape(delta, tuple(new[axis] for axis in spans))
        if wide != list(axes):
            ctx.facts.note(delta, _runs(touched, axes, old, spans))
        factors.append((spans, delta))
    return factors


def _runs(
    touched: Sequence[tuple[list[int], list[int]]],
    axes: Sequence[int],
    old: Sequence[int],
    spans: Sequence[int],
) -> dict[int, int]:
    """Of a factor repeated over axes that join its own: where it comes in runs of equal numbers.

    Returns:
      For axes of the factor, the length of the runs.
    """
    runs = {}
    for before, after in touched:
        first = [axis for axis in before if axis in axes]
        if len(after) == 1 and first == before[: len(first)]:
            runs[spans.index(after[0])] = math.prod(old[axis] for axis in before[len(first) :])
    return runs


def reshape(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    return _layout(partial(_reshape, ctx))(ctx, eqn, operands)


def _regroup(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Pairs the smallest runs of old and new axes that hold the same numbers.

    >>> _regroup((2, 3, 4), (6, 2, 2))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    if 0 in old:
        return None
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after, a, b = [], [], 1, 1
        while not before and not after or a != b:
            if i < len(old) and (a < b or not before or j == len(new)):
                before, a, i = [*before, i], a * old[i], i + 1
            else:
                after, b, j = [*after, j], b * new[j], j + 1
        groups.append((before, after))
    return groups


def _slice(eqn: Any, others: Any, x: Scaled) -> Factors:
    starts, limits, strides = (
        eqn.params[key] for key in ("start_indices", "limit_indices", "strides")
    )
    return [
        (
            axes,
            lax.slice(
                delta,
                [starts[a] for a in axes],
                [limits[a] for a in axes],
                strides and [strides[a] for a in axes],
            ),
        )
        for axes, delta in x.factors
    ]


def _dynamic_slice(eqn: Any, others: Any, x: Scaled) -> Factors:
    sizes = eqn.params["slice_sizes"]
    return [
        (axes, lax.dynamic_slice(d, [others[a] for a in axes], [sizes[a] for a in axes]))
        for axes, d in x.factors
    ]


def _reduce_sum(eqn: Any, others: Any, x: Scaled) -> Factors | None:
    """A sum over axes that no vector spans."""
    gone = eqn.params["axes"]
    if any(axis in gone for axes in x.axes for axis in axes):
        return None
    left = [axis for axis in range(x.value.ndim) if axis not in gone]
    return [(tuple(map(left.index, axes)), delta) for axes, delta in x.factors]


def _ppermute(eqn: Any, others: Any, x: Scaled) -> Factors:
    """Each device's weight goes to another, and its vectors with it."""
    return [(axes, jax_versions.bind(eqn, delta)[0]) for axes, delta in x.factors]


def _rev(eqn: Any, others: Any, x: Scaled) -> Factors:
    flipped = eqn.params["dimensions"]
    return [
        (axes, lax.rev(d, [i for i, a in enumerate(axes) if a in flipped])) for axes, d in x.factors
    ]


def _all_gather(eqn: Any, others: Any, x: Scaled) -> Factors | None:
    axis = eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        return None
    factors = []
    for axes, delta in x.factors:
        if axis not in axes and x.value.shape[axis] == 1:  # each device may have one of its own
            place = sum(a < axis for a in axes)
            axes, delta = (*axes[:place], axis, *axes[place:]), jnp.expand_dims(delta, place)
        if axis in axes:
            [delta] = jax_versions.bind(eqn, delta, all_gather_dimension=axes.index(axis))
        factors.append((axes, delta))
    return factors


def split(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """One weight cut in several along an axis: each piece takes its part of the vectors."""
    [x] = operands
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    cuts = np.cumsum(sizes)[:-1].tolist()
    pieces = [
        jnp.split(d, cuts, axes.index(axis)) if axis in axes else [d] * len(sizes)
        for axes, d in x.factors
    ]
    return [
        Scaled.of(v, list(zip(x.axes, deltas, strict=True)), x.origin, x.product, x.codes)
        for v, *deltas in zip(jax_versions.bind(eqn, x.value), *pieces, strict=True)
    ]


def concatenate(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Arrays joined along an axis, old or new (``stack``): so are their vectors.

    What is scaled by nothing is scaled by one. A vector that does not span the joined axis stays
    as it is where all operands share it, and is repeated along it where they differ.
    """
    operands = [
        ctx.plain(eqn, [x])[0] if isinstance(x, Scaled) and x.product and _inexact(x.value) else x
        for x in operands
    ]
    [y] = jax_versions.bind(eqn, *map(value_of, operands))
    scaled = [x for x in operands if isinstance(x, Scaled)]
    if not scaled:
        return [y]
    new = jax_versions.name_of(eqn) == "stack"
    joined = eqn.params["axis" if new else "dimension"]
    sizes = [1 if new else value_of(x).shape[joined] for x in operands]

    def moved(axes):
        return tuple(axis + (new and axis >= joined) for axis in axes)

    first = operands[0] if len(scaled) == len(operands) else None
    shared = [
        (axes, delta)
        for axes, delta in factors_of(first)
        if (new or joined not in axes)
        and all(any(a == axes and d is delta for a, d in x.factors) for x in scaled)
    ]
    factors = [(moved(axes), delta) for axes, delta in shared]

    # For each set of axes, what each operand has there: a column of this table is a new vector.
    columns: dict[tuple[tuple[int, ...], int], dict[int, Any]] = {}
    repeated = set()
    for i, x in enumerate(operands):
        seen: list[tuple[int, ...]] = []
        for axes, delta in factors_of(x):
            if any(a == axes and d is delta for a, d in shared):
                continue
            spans = tuple(sorted({*moved(axes), joined}))
            if new or joined not in axes:
                delta = jnp.expand_dims(delta, spans.index(joined))
                repeated |= {spans} if sizes[i] > 1 else set()
            shape = [sizes[i] if axis == joined else y.shape[axis] for axis in spans]
            columns.setdefault((spans, seen.count(spans)), {})[i] = jnp.broadcast_to(delta, shape)
            seen.append(spans)
    for (spans, _), column in columns.items():
        shape = [y.shape[axis] for axis in spans]
        inexact = jnp.issubdtype(y.dtype, jnp.inexact)
        if inexact and spans in repeated and 2 * math.prod(shape) > y.size:
            return None  # about as large as the weights themselves
        along_it = spans.index(joined)
        dtype = jnp.result_type(*column.values())
        parts = []
        for i, size in enumerate(sizes):
            shape[along_it] = size
            parts.append(column[i].astype(dtype) if i in column else jnp.zeros(shape, dtype))
        factors.append((spans, lax.concatenate(parts, along_it)))
    product, codes = (any(getattr(x, flag) for x in scaled) for flag in ("product", "codes"))
    return [Scaled.of(y, factors, origin_of(*scaled), product, codes)]


def pad(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """What is padded with zeros may be scaled by anything: by one."""
    x, padding = operands
    config = eqn.params["padding_config"]
    grows = any(low > 0 or high > 0 or interior for low, high, interior in config)
    if not isinstance(x, Scaled) or grows and not ctx.is_zero(padding):
        return None
    [y] = jax_versions.bind(eqn, x.value, padding)
    factors = [
        (axes, lax.pad(d, jnp.zeros((), d.dtype), [config[axis] for axis in axes]))
        for axes, d in x.factors
    ]
    return [_moved(x, y, factors)]


def select_n(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A choice between arrays that the same vectors scale, as they do zeros (a pruned weight)."""
    which, *cases = operands
    scaled = [x for x in cases if isinstance(x, Scaled)]
    alike = all(_same_factors(x, scaled[0]) for x in scaled)
    others = [x for x in cases if not isinstance(x, Scaled)]
    if isinstance(which, Scaled) or not alike or not all(map(ctx.is_zero, others)):
        return None
    [y] = jax_versions.bind(eqn, which, *map(value_of, cases))
    return [dataclasses.replace(_moved(scaled[0], y, scaled[0].factors), origin=origin_of(*scaled))]


def overwrite(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Zeros written into a weight, as into a padding token's row of a table."""
    x, *others = operands
    at = 1 if jax_versions.name_of(eqn) == "scatter" else 0  # the indices come first there
    if any(isinstance(o, Scaled) for o in others) or not ctx.is_zero(others[at]):
        return None
    [y] = jax_versions.bind(eqn, x.value, *others)
    return [_moved(x, y, x.factors)]


def each(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Primitives that hand every operand through, as a barrier does."""
    values = jax_versions.bind(eqn, *map(value_of, operands))
    return [
        dataclasses.replace(x, value=v) if isinstance(x, Scaled) else v
        for v, x in zip(values, operands, strict=True)
    ]


def mul(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Products of scaled and plain arrays, as in dequantization: the vectors wait."""
    size = eqn.outvars[0].aval.size
    small = [isinstance(x, Scaled) and x.is_vector and x.value.size < size for x in operands]
    if any(small):
        operands = [
            ctx.plain(eqn, [x])[0] if s else x for x, s in zip(operands, small, strict=True)
        ]
    if not any(isinstance(x, Scaled) for x in operands):
        return jax_versions.bind(eqn, *operands)
    [y] = jax_versions.bind(eqn, *map(value_of, operands))
    factors = [pair for x in operands for pair in factors_of(x)]
    scaled = [x for x in operands if isinstance(x, Scaled)]
    product = any(x.product for x in scaled)
    return [Scaled.of(y, factors, origin_of(*scaled), product, _still_codes(ctx, operands))]


# Dequantization: the vectors wait for the weight that codes stand for.


def _affine(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Sums of what has one scale; and a zero point, or what a step makes of it, taken off codes."""
    [first, *others] = [x for x in operands if isinstance(x, Scaled)]
    if others:
        [second] = others
        alike = (first.product, first.codes) == (second.product, second.codes)
        return _waiting(eqn, operands, first) if alike and _same_factors(first, second) else None
    return _waiting(eqn, operands, first) if _decodes(ctx, operands) else None


def _decodes(ctx: Any, operands: Sequence[Any]) -> bool:
    """Codes, with nothing but frozen arrays; or looked-up codes, whose zero points may be too."""
    rest = [x for x in operands if not isinstance(x, Scaled)]
    scaled = [x for x in operands if isinstance(x, Scaled)]
    return all(x.codes for x in scaled) and (scaled[0].product or all(ctx.known(rest)))


def _still_codes(ctx: Any, operands: Sequence[Any]) -> bool:
    """Codes multiplied by a step may have a zero point to come, but not if they are looked up."""
    looked_up = any(isinstance(x, Scaled) and x.product and _inexact(x.value) for x in operands)
    return not looked_up and _decodes(ctx, operands)


def decode(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Codes that are unpacked, shifted, compared, looked up: what is scaled is what they become.

    A scale of a code is a scale of everything that is decoded from it, so the vectors keep to the
    axes of the codes. None where this is no step of a decoding.
    """
    codes = [x for x in operands if isinstance(x, Scaled)]
    first, name = codes[0], jax_versions.name_of(eqn)
    if not _decodes(ctx, operands) or not all(_same_factors(x, first) for x in codes):
        return None
    if name == "mul" and len(codes) == 2 and codes[0].value is not codes[1].value:
        return _waiting(eqn, operands, first)  # as of a sign and a magnitude; else it is a square
    if name in _ON_CODES or name in _ON_INTEGERS and not any(_inexact(x.value) for x in codes):
        return _waiting(eqn, operands, first)
    if name == "gather" and len(codes) == 1 and operands[1] is first:
        rows = [i for i in range(eqn.outvars[0].aval.ndim)]
        rows = [i for i in rows if i not in eqn.params["dimension_numbers"].offset_dims]
        if any(axis >= len(rows) for axes in first.axes for axis in axes):
            return None
        return _waiting(eqn, operands, first, rows)
    if name == "bitcast_convert_type":
        ndim = eqn.outvars[0].aval.ndim  # an axis of parts at the end, or one less
        if any(axis >= ndim for axes in first.axes for axis in axes):
            return None
        return _waiting(eqn, operands, first)
    if name in ("stack", "concatenate") and len(codes) == len(operands):
        along = eqn.params["axis" if name == "stack" else "dimension"]
        axes = list(range(first.value.ndim))
        if name == "stack":
            axes = [i + (i >= along) for i in axes]
        elif any(along in spans for spans in first.axes):
            return None
        return _waiting(eqn, operands, first, axes)
    return None


# Steps of a decoding, on any codes; and those that floating weights take too, on integers alone.
_ON_CODES = frozenset(
    "eq ne lt le gt ge select_n floor ceil round sign exp exp2 pow erf_inv tanh".split()
)
_ON_INTEGERS = frozenset(
    "convert_element_type add sub mul div rem neg abs max min clamp integer_pow and or xor not"
    " shift_left shift_right_logical shift_right_arithmetic population_count clz".split()
)


def _waiting(
    eqn: Any, operands: Sequence[Any], like: Scaled, to: Sequence[int] | None = None
) -> list[Any]:
    """Runs an equation on the values, and hands their vectors on, to other axes where given."""
    [y] = jax_versions.bind(eqn, *map(value_of, operands))
    axes = like.axes if to is None else [tuple(to[axis] for axis in spans) for spans in like.axes]
    factors = list(zip(axes, like.deltas, strict=True))
    return [Scaled.of(y, factors, origin_of(*operands), like.product, like.codes)]


def _same_factors(x: Scaled, y: Scaled) -> bool:
    return x.axes == y.axes and all(a is b for a, b in zip(x.deltas, y.deltas, strict=True))


# Primitives with inner jaxprs: they are entered, through JAX's own transformations.


def jit(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    before, after = jax_versions.jit_shardings(eqn.params)
    operands = [_constrain(ctx, x, s) for x, s in zip(operands, before, strict=True)]
    results = ctx.run(eqn.params["jaxpr"], operands)
    return [_constrain(ctx, y, s) for y, s in zip(results, after, strict=True)]


def _constrain(ctx: Any, x: Any, sharding: Any) -> Any:
    """A weight is constrained, and its vectors stay where they are."""
    if sharding is None:
        return x
    if isinstance(x, Scaled):
        return dataclasses.replace(x, value=lax.with_sharding_constraint(x.value, sharding))
    constrained = lax.with_sharding_constraint(x, sharding)
    return ctx.still(ctx.known([x]), [constrained])[0]


def remat(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """``jax.checkpoint``, with its policy."""
    closed, how = jax_versions.remat_params(eqn)
    known = ctx.known(operands)
    key = (id(closed), *how.values(), known)
    if key not in ctx.bodies:
        inner = partial(ctx.run, closed)
        ctx.bodies[key] = jax.checkpoint(lambda *xs: inner(ctx.still(known, xs)), **how)
    body = ctx.bodies[key]
    jaxpr, _ = jax_versions.open_jaxpr(closed)
    handed_on = dict(zip(jaxpr.invars, operands, strict=True))
    results = zip(jaxpr.outvars, body(*operands), strict=True)
    return [handed_on.get(atom, y) if atom in jaxpr.invars else y for atom, y in results]


def cond(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    if eqn.params.get("branches_platforms") is not None or isinstance(operands[0], Scaled):
        return None
    known = ctx.known(operands[1:])
    branches = [
        lambda *xs, branch=branch: ctx.plain(eqn, ctx.run(branch, ctx.still(known, xs)))
        for branch in eqn.params["branches"]
    ]
    return lax.switch(operands[0], branches, *operands[1:])


def scan(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Weights come in as constants, as carried constants or as scanned operands.

    A scanned weight's vectors are scanned along where they span the scanned axis. A weight that the
    body hands out slice by slice, as NNX does, is the scanned weight itself.
    """
    params = eqn.params
    n_consts, n_carry = jax_versions.scan_counts(params)
    consts, carry, xs = _split(operands, n_consts, n_carry)
    loop = _Loop(ctx, eqn, params["jaxpr"], n_consts, carry)
    scanned, rebuild = zip(*map(_scan_operand, xs), strict=True) if xs else ((), ())
    handed_out, known = {}, ctx.known(xs)

    def body(carry, slices):
        slices = [make(part) for make, part in zip(rebuild, slices, strict=True)]
        ctx.still(known, slices)
        results = ctx.run(params["jaxpr"], [*consts, *loop.full(carry), *slices])
        ys = results[n_carry:]
        for i, y in enumerate(ys):
            for x, piece in zip(xs, slices, strict=True):
                if isinstance(y, Scaled) and y is piece:
                    handed_out[i], ys[i] = x, None
        return loop.thin(results[:n_carry]), ctx.plain(eqn, ys)

    last, ys = lax.scan(
        body,
        loop.start,
        scanned,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*loop.full(last), *(handed_out.get(i, y) for i, y in enumerate(ys))]


def while_loop(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = _split(operands, n_cond, n_body)
    loop = _Loop(ctx, eqn, params["body_jaxpr"], n_body, carry)

    def cond(carry):
        return ctx.run(params["cond_jaxpr"], [*cond_consts, *loop.full(carry)])[0]

    def body(carry):
        inputs = [*body_consts, *loop.full(carry)]
        return loop.thin(ctx.run(params["body_jaxpr"], inputs))

    return loop.full(lax.while_loop(cond, body, loop.start))


def shard_map(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Each vector is split over the mesh as the axes of its weight are."""
    params = eqn.params
    specs = tuple(
        dataclasses.replace(x, value=spec, deltas=tuple(vector_spec(spec, a) for a in x.axes))
        if isinstance(x, Scaled)
        else spec
        for x, spec in zip(operands, params["in_specs"], strict=True)
    )
    known = ctx.known(operands)

    def inner(*xs):
        return tuple(ctx.plain(eqn, ctx.run(params["jaxpr"], ctx.still(known, [*map(_shard, xs)]))))

    body = jax.shard_map(
        inner,
        mesh=params["mesh"],
        in_specs=specs,
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(body(*operands))


def _shard(x: Any) -> Any:
    """A device's part of a weight, which may be of size one along an axis."""
    if not isinstance(x, Scaled):
        return x
    return Scaled.of(x.value, x.factors, x.origin, x.product, x.codes)


def _split(operands: Sequence[Any], *counts: int) -> list[list[Any]]:
    cuts = np.cumsum((0, *counts)).tolist()
    return [list(operands[a:b]) for a, b in zip(cuts, [*cuts[1:], None], strict=True)]


def _scan_operand(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What of a scanned operand is sliced by the loop, and how a slice is made whole again."""
    if not isinstance(x, Scaled):
        return x, lambda part: part
    sliced = [bool(axes) and axes[0] == 0 for axes in x.axes]
    axes = tuple(tuple(a - 1 for a in spans if a != 0) for spans in x.axes)

    def make(part):
        value, rows = part[0], iter(part[1:])
        deltas = (next(rows) if s else d for s, d in zip(sliced, x.deltas, strict=True))
        return Scaled(value, tuple(deltas), axes, x.origin, x.product, x.codes)

    return [x.value, *(d for s, d in zip(sliced, x.deltas, strict=True) if s)], make


class _Loop:
    """A loop's carry, less the weights that it hands on unchanged: those are constants."""

    def __init__(self, ctx: Any, eqn: Any, body: Any, n_consts: int, carry: Sequence[Any]):
        jaxpr, _ = jax_versions.open_jaxpr(body)
        invars = jaxpr.invars[n_consts : n_consts + len(carry)]
        same = [a is b for a, b in zip(invars, jaxpr.outvars, strict=False)]
        self.ctx, self.eqn, self.carry = ctx, eqn, carry
        self.fixed = [isinstance(x, Scaled) and s for x, s in zip(carry, same, strict=True)]
        self.start = self.thin(carry)

    def thin(self, carry: Sequence[Any]) -> list[Any]:
        moving = [x for x, fixed in zip(carry, self.fixed, strict=True) if not fixed]
        return self.ctx.plain(self.eqn, moving)

    def full(self, carry: Sequence[Any]) -> list[Any]:
        moving = iter(carry)
        return [x if f else next(moving) for x, f in zip(self.carry, self.fixed, strict=True)]


Rule = Callable[[Any, Any, Sequence[Any]], list[Any] | None]

# Zeros in, zeros out.
KEEPS_ZEROS = {"broadcast_in_dim", "convert_element_type", "copy", "copy_p", "pvary", "pcast"}
KEEPS_ZEROS |= {"reshape", "squeeze", "transpose", "slice", "neg", "sharding_constraint"}

RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
    "mul": mul,
    "split": split,
    "concatenate": concatenate,
    "stack": concatenate,
    "pad": pad,
    "select_n": select_n,
    "scatter": overwrite,
    "dynamic_update_slice": overwrite,
    "optimization_barrier": each,
    "device_put": each,
    **dict.fromkeys(
        ["convert_element_type", "copy", "copy_p", "reduce_precision", "pvary", "pcast", "name"]
        + ["neg", "sharding_constraint"],
        _layout(_keep),
    ),
    "div": div,
    **dict.fromkeys(["add", "sub", "add_any"], _affine),
    "stop_gradient": _layout(_stop_gradient),
    "reshard": _layout(_reshard),
    "transpose": _layout(_transpose),
    "squeeze": _layout(_squeeze),
    "broadcast_in_dim": _layout(_broadcast_in_dim),
    "reshape": reshape,
    "slice": _layout(_slice),
    "dynamic_slice": _layout(_dynamic_slice),
    "rev": _layout(_rev),
    "reduce_sum": _layout(_reduce_sum),
    "ppermute": _layout(_ppermute),
    "all_gather": _layout(_all_gather),
    "all_gather_invariant": _layout(_all_gather),
    "jit": jit,
    "remat2": remat,
    "cond": cond,
    "scan": scan,
    "while": while_loop,
    "shard_map": shard_map,
}


def apply(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Runs an equation of which some operands are Scaled by its rule; None if there is none."""
    results = None
    if any(isinstance(x, Scaled) and x.codes for x in operands):
        results = decode(ctx, eqn, operands)
    rule = RULES.get(jax_versions.name_of(eqn))
    return rule(ctx, eqn, operands) if results is None and rule else results
