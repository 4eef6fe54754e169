"""Contractions: factors move from the weight to the activations, and here they are applied."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from hyperadapt_jax.interpreter import jax_versions
from hyperadapt_jax.interpreter.interpreter import BOTH, Interpreter
from hyperadapt_jax.interpreter.values import (
    Factors,
    LowRank,
    Operands,
    Results,
    Scaled,
    Value,
    factors_of,
    is_inexact,
    low_rank_of,
    moved,
    multiplied_out,
    origin_of,
    scale,
    value_of,
    vector_like,
)

# What an axis of a contraction is called: ("contract", i) or ("batch", i), the same on both sides;
# ("free", side, axis); or GROUP, that of the groups of a ragged dot, or RANK, of a low-rank term.
Name: TypeAlias = tuple[Any, ...]
RANK: Name = ("rank",)
GROUP: Name = ("group",)
Names: TypeAlias = Sequence[Sequence[Name]]  # of every axis of both operands
NamedFactors: TypeAlias = list[tuple[Sequence[Name], jax.Array]]


def dot_general(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """A vector on free or batch axes scales the result, one on contracted axes the other operand.

    Where a vector spans contracted and free axes (experts that all see one input), its free axes
    become batch axes of the product: the other operand is repeated along them, and scaled. What is
    a product already, such as looked-up rows, is an activation: its own vectors scale it. A
    low-rank term adds a product of its own to the result, before vectors scale that.
    """
    operands, result = _settled(interpreter, eqn, operands), jax_versions.result_of(eqn)
    if any(map(low_rank_of, operands)) and all(isinstance(x, Scaled) for x in operands):
        [operands[1]] = interpreter.materialize(eqn, operands[1:], BOTH)
    names = _name_axes(operands, eqn.params["dimension_numbers"])
    out, sizes = _result_axes(names), _sizes(operands, names)
    products = math.prod(sizes.values())

    after: NamedFactors = []
    before: tuple[NamedFactors, NamedFactors] = [], []  # of each operand
    repeated: list[Name] = []
    for side, operand in enumerate(operands):
        factors = _named(names[side], factors_of(operand))
        stay = [(spans, delta) for spans, delta in factors if set(spans) <= set(out)]
        go = [(spans, delta) for spans, delta in factors if not set(spans) <= set(out)]
        free = [name for name in names[side] if name[0] == "free"]
        shared = [name for name in free if any(name in spans for spans, _ in go)]
        pending = isinstance(operand, Scaled) and not operand.product
        if factors and pending and is_inexact(value_of(operand)):
            repeats = math.prod(sizes[name] for name in shared)
            if why := _dearer(operands, side, result, products, repeats, len(stay), len(go)):
                [operands[side]] = interpreter.materialize(eqn, [operand], why)
                continue
        after += stay
        before[1 - side].extend(go)
        repeated += shared
    if _integers_meet(result, operands, before) or _codes_meet(operands):
        return None
    if repeated and eqn.params.get("out_sharding") is not None:
        return None
    return [_apply(interpreter, eqn, operands, names, before, after, out, repeated)]


def _name_axes(operands: Operands, numbers: Any) -> list[list[Name]]:
    """Names every axis of two operands, out of a dot's (contracted, batch) dimension numbers."""
    names: list[list[Name]] = [
        [("free", side, axis) for axis in range(value_of(x).ndim)]
        for side, x in enumerate(operands)
    ]
    for kind, pairs in zip(("contract", "batch"), numbers, strict=True):
        for i, axes in enumerate(zip(*pairs, strict=True)):
            for side, axis in enumerate(axes):
                names[side][axis] = (kind, i)
    return names


def _result_axes(names: Names) -> list[Name]:
    """The result's axes: those of the batch, then those that are free on either side."""
    batch = sorted(name for name in names[0] if name[0] == "batch")
    return batch + [name for side in names for name in side if name[0] == "free"]


def _sizes(operands: Operands, names: Names) -> dict[Name, int]:
    return {
        name: size
        for x, side in zip(operands, names, strict=True)
        for name, size in zip(side, value_of(x).shape, strict=True)
    }


def _named(names: Sequence[Name], factors: Factors) -> NamedFactors:
    return [([names[axis] for axis in axes], delta) for axes, delta in factors]


def _placed(names: Sequence[Name], factors: NamedFactors) -> Factors:
    return [(tuple(map(names.index, spans)), delta) for spans, delta in factors]


def _codes_meet(operands: Operands) -> bool:
    """Whether a low-rank term would have to be added to codes, not to what they stand for."""
    return any(low_rank_of(x) and not is_inexact(value_of(x)) for x in operands)


def _integers_meet(result: Any, operands: Operands, before: Sequence[NamedFactors]) -> bool:
    """Whether integers would have to be scaled, for an integer result."""
    scaled = [value_of(x) for x, factors in zip(operands, before, strict=True) if factors]
    return not is_inexact(result) and not all(map(is_inexact, scaled))


def _apply(
    interpreter: Interpreter,
    eqn: JaxprEqn,
    operands: Operands,
    names: Names,
    before: Sequence[NamedFactors],
    after: NamedFactors,
    out: Sequence[Name],
    repeated: Sequence[Name] = (),
    *others: jax.Array,
) -> Value:
    """Contracts two operands, with their factors multiplied in before or after.

    Args:
      interpreter: where the uses are recorded.
      eqn: the contraction.
      operands: its two operands.
      names: what their axes are called.
      before: for each operand, the factors that scale it: the other one's.
      after: the factors that scale the result.
      out: what the result's axes are called.
      repeated: free axes that become batch axes: the operand that lacks one is repeated along it.
      others: operands that follow the two.
    """
    sizes, changed = _sizes(operands, names), {}
    values = [value_of(x) for x in operands]
    for side in (0, 1):
        if before[side]:
            interpreter.record(eqn, operands[1 - side], onto=operands[side])
    if repeated:
        missing = [[name for name in repeated if name[1] != side] for side in (0, 1)]
        values = [
            jnp.broadcast_to(x, (*(sizes[name] for name in new), *x.shape)) if new else x
            for x, new in zip(values, missing, strict=True)
        ]
        names = [[*new, *old] for new, old in zip(missing, names, strict=True)]
        changed["dimension_numbers"], new_out = _dimension_numbers(names)
    for side in (0, 1):
        x = Scaled.of(values[side], _placed(names[side], before[side]), ())
        values[side] = _scaled_operand(eqn, side, x.value, x.factors)
    parts = [_parts(eqn, side, x) for side, x in enumerate(values)]
    y = _contract(eqn, parts, *others, **changed)
    if repeated:
        y = lax.transpose(y, [new_out.index(name) for name in out])
    added = None
    for side in (0, 1):
        if (term := low_rank_of(operands[side])) is not None:
            other = Named(_dropped(values[1 - side], term), names[1 - side])
            added = _low_rank(eqn, other, term, names[side], out, *others)
    return _scale_result(interpreter, eqn, operands, y, _placed(out, after), added)


def _dimension_numbers(names: Names) -> tuple[Any, list[Name]]:
    """Dimension numbers for two operands by their axes' names, and the result's axes: the batch's,
    then the free ones of either side."""
    left, right = names
    shared = [name for name in left if name in right]
    contract = [name for name in shared if name[0] in ("contract", "rank")]
    batch = [name for name in shared if name not in contract]
    free = [n for side in names for n in side if n not in shared]
    numbers = tuple(
        tuple(tuple(map(side.index, group)) for side in names) for group in (contract, batch)
    )
    return numbers, batch + free


def _dearer(
    operands: Operands,
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

    Args:
      operands: the two of the contraction.
      side: which of them is the weight.
      result: the contraction's.
      products: how many multiplications it takes.
      repeats: how many times the other operand would be repeated.
      after: how many vectors would scale the result.
      before: how many would scale the other operand.
    """
    weight, other = value_of(operands[side]).size, value_of(operands[1 - side]).size
    scaled = repeats * other
    if repeats > 1 and scaled > weight + other + result.size:
        return (
            f"scaling would repeat an operand of {other:,} numbers {repeats:,} times,"
            f" to more than weight, operand and result together"
        )
    if 6 * after * result.size + 4 * before * scaled > 2 * products + 4 * (after + before) * weight:
        return "too few products are made with it here: scaling the activations would cost more"
    return ""


def _settled(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> list[Value]:
    """A contraction's operands; those that are products already are activations, and are scaled."""
    settled = list(operands)
    for side, x in enumerate(operands):
        inexact = is_inexact(value_of(x)) or is_inexact(jax_versions.result_of(eqn))
        if isinstance(x, Scaled) and x.product and inexact:
            interpreter.record(eqn, x)
            settled[side] = multiplied_out(x, _operand_dtype(eqn, side))
    return settled


def _operand_dtype(eqn: JaxprEqn, side: int) -> Any:
    """The dtype in which one operand of a contraction is scaled: its own, or a wider result's.

    Types below 16 bits have no room for a scale, and integers none at all.
    """
    own, result = jax_versions.operand_of(eqn, side).dtype, jax_versions.result_of(eqn).dtype
    if jnp.issubdtype(own, jnp.complexfloating):
        return own
    types = [t for t in (own, result) if jnp.issubdtype(t, jnp.inexact)]
    return jnp.finfo(max([*types, jnp.bfloat16], key=lambda t: jnp.finfo(t).bits)).dtype


def _scaled_operand(eqn: JaxprEqn, side: int, x: jax.Array, factors: Factors) -> jax.Array:
    """One operand of a contraction, multiplied by the other one's factors."""
    if not factors and x.dtype == jax_versions.operand_of(eqn, side).dtype:
        return x
    return scale(x, factors, _operand_dtype(eqn, side))


def _parts(eqn: JaxprEqn, side: int, x: jax.Array) -> list[jax.Array]:
    """One operand of a contraction; as several that add up where it was scaled wider.

    A product in 16 bits with a wider result stays one, as fast and, at zero deltas, as exact to the
    last bit: what its operand's dtype does not hold of a scaled number is a second operand.
    """
    own, dtype = jax_versions.operand_of(eqn, side).dtype, _operand_dtype(eqn, side)
    if x.dtype == own:
        return [x]
    other = jax_versions.operand_of(eqn, 1 - side).dtype
    bits = [jnp.finfo(t).bits if jnp.issubdtype(t, jnp.inexact) else 0 for t in (own, other)]
    if dtype == own or bits[0] < max(16, bits[1]):
        return [x]
    info = jnp.finfo(own)
    # A cast there and back would be optimized away.
    high = lax.reduce_precision(jnp.clip(x, info.min, info.max), info.nexp, info.nmant)
    return [high.astype(own), (x - high).astype(own)]


def _contract(
    eqn: JaxprEqn, parts: Sequence[Sequence[jax.Array]], *others: jax.Array, **changed: Any
) -> jax.Array:
    """A contraction of two operands, each a sum of parts, of any dtypes."""
    dtypes = [jax_versions.operand_of(eqn, side).dtype for side in (0, 1)]
    if [p[0].dtype for p in parts] != dtypes:
        changed["preferred_element_type"] = jax_versions.result_of(eqn).dtype
        changed["precision"] = _precision(eqn)
    ys = [jax_versions.bind(eqn, a, b, *others, **changed)[0] for a, b in itertools.product(*parts)]
    return functools.reduce(jnp.add, ys)


def ragged_dot_general(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """A dot whose rows come in groups, each with its own slice of the right side (experts).

    A vector over the groups becomes one per row, by the row's group. Then it goes as in any dot:
    a vector whose axes the result has scales the result, any other the other operand.
    """
    *operands, group_sizes = operands
    if isinstance(group_sizes, Scaled):
        return None
    operands, result = _settled(interpreter, eqn, operands), jax_versions.result_of(eqn)
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    names = _name_axes(operands, ragged.dot_dimension_numbers)
    for axis in ragged.rhs_group_dimensions:
        names[1][axis] = GROUP
    [rows] = (names[0][axis] for axis in ragged.lhs_ragged_dimensions)
    out = _result_axes(names)
    if rows[0] == "contract":
        out = [GROUP, *out]
    outer = out[: out.index(rows)] if group_sizes.ndim > 1 and rows in out else []
    outer = [name for name in outer if name in names[0]]
    count = _sizes(operands, names)[rows]

    after: NamedFactors = []
    before: tuple[NamedFactors, NamedFactors] = [], []  # of each operand
    for side, operand in enumerate(operands):
        for spans, delta in _named(names[side], factors_of(operand)):
            if GROUP in spans:
                spans, delta = _by_row(spans, delta, group_sizes, [*outer, rows], count)
            if set(spans) <= set(out):
                after.append((spans, delta))
            elif set(spans) <= set(names[1 - side]):
                before[1 - side].append((spans, delta))
            else:
                return None
    if _integers_meet(result, operands, before) or _codes_meet(operands):
        return None
    # A low-rank term: of the rows' own matrices alone, whose two sides are such matrices too.
    if any(map(low_rank_of, operands)) and (isinstance(operands[0], Scaled) or rows[0] != "free"):
        return None
    return [_apply(interpreter, eqn, operands, names, before, after, out, (), group_sizes)]


def _by_row(
    spans: Sequence[Name],
    delta: jax.Array,
    group_sizes: jax.Array,
    rows: Sequence[Name],
    count: int,
) -> tuple[list[Name], jax.Array]:
    """A vector over groups as one over the rows that they consist of.

    Args:
      spans: names of the vector's axes, among them ``GROUP``.
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
    left = [n for n in spans if n not in rows and n != GROUP]
    delta = lax.transpose(delta, [spans.index(n) for n in [GROUP, *shared, *left]])
    return [*rows, *left], delta.at[tuple(index)].get(mode="fill", fill_value=0)


def conv_general_dilated(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """The kernel's out vector scales the result's features, its in vector the input's features."""
    lhs, rhs = operands = _settled(interpreter, eqn, operands)
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis, in_axis = numbers.rhs_spec[:2]
    if isinstance(lhs, Scaled) or _codes_meet(operands):
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
            size, place = value_of(rhs).shape[out_axis] // groups, axes.index(out_axis)
            if interpreter.facts.get(delta, "runs", {}).get(place, 1) % size:
                return None
            delta = lax.slice_in_dim(delta, 0, None, size, place)
            delta = delta if place == 0 else delta.T
            before.append(((numbers.lhs_spec[1],), delta.reshape(-1)))
        else:
            return None
    if before and not is_inexact(jax_versions.result_of(eqn)) and not is_inexact(lhs):
        return None
    if before:
        interpreter.record(eqn, rhs)
    placed = Scaled.of(lhs, before, ())
    x, added = _scaled_operand(eqn, 0, lhs, placed.factors), None
    if (term := low_rank_of(rhs)) is not None:
        added = _low_rank_features(eqn, _dropped(x, term), term, value_of(rhs).shape)
        if added is None:
            return None
    inputs = _parts(eqn, 0, x)
    # Unlike a product of matrices, a convolution takes operands of one dtype.
    y = _contract(eqn, [inputs, [value_of(rhs).astype(inputs[0].dtype)]])
    return [_scale_result(interpreter, eqn, operands, y, after, added)]


def _low_rank_features(
    eqn: JaxprEqn, x: jax.Array, term: LowRank, kernel: Sequence[int]
) -> jax.Array | None:
    """What a kernel's low-rank term adds: a convolution to r features, then a product with them.

    Each group of features has a convolution of its own, with the same kernel of the term. None
    where no side of the term spans the out axis alone.

    Args:
      eqn: the convolution.
      x: its input.
      term: of the kernel.
      kernel: its shape.
    """
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis, feature = numbers.rhs_spec[0], numbers.out_spec[1]
    sides = sorted(term.factors[:2], key=lambda side: out_axis in side[0])
    (axes, first), (out_axes, last) = sides
    if eqn.params["batch_group_count"] != 1 or out_axis in axes or {*out_axes} - {out_axis}:
        return None
    missing = [axis for axis in range(len(kernel)) if axis not in (*axes, out_axis)]
    first = jnp.moveaxis(jnp.expand_dims(first, [i for i, _ in enumerate(missing)]), -1, 0)
    first = jnp.moveaxis(first, range(first.ndim), [out_axis, *missing, *axes])
    shape = [term.rank if axis == out_axis else n for axis, n in enumerate(kernel)]
    first = jnp.broadcast_to(first, shape)
    first = jnp.concatenate([first] * groups, out_axis)
    [y] = jax_versions.bind(eqn, x, first.astype(x.dtype), preferred_element_type=None)
    y = jnp.moveaxis(y, feature, -1)
    y = y.reshape(*y.shape[:-1], groups, term.rank)
    last = jnp.broadcast_to(last, (kernel[out_axis], term.rank)).reshape(groups, -1, term.rank)
    y = jnp.einsum("...gr,gor->...go", y, last.astype(y.dtype), precision=_precision(eqn))
    return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, feature)


def gather(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """Rows or windows picked by index: the vectors are gathered as their table is.

    A vector over axes that are kept whole stays as it is, one over batching axes moves with them,
    and any other is gathered by its own columns of the indices. Looked-up rows are activations.
    """
    table, indices = operands
    if not isinstance(table, Scaled) or isinstance(indices, Scaled):
        return None
    if not (table.codes or _fills_with_nothing(eqn)):
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    # Which axis of the indices belongs to an axis of the table.
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    batching = dict(pairs)
    gone = {*batching, *numbers.collapsed_slice_dims}
    kept = [axis for axis in range(table.value.ndim) if axis not in gone]
    [is_order] = interpreter.are_frozen([indices])
    # Rows in an order that is a parameter too are a weight still.
    is_rows = vector_like([sizes[axis] for axis in kept]) and not is_order
    size = jax_versions.result_of(eqn).size
    if is_rows and size > table.value.size and is_inexact(table.value) and not table.product:
        why = "what is looked up is larger than the whole table"
        return jax_versions.bind(eqn, *interpreter.materialize(eqn, [table], why), indices)
    [y] = jax_versions.bind(eqn, table.value, indices)
    rows = [axis for axis in range(y.ndim) if axis not in numbers.offset_dims]
    to = dict(zip(kept, numbers.offset_dims, strict=True))
    to |= {axis: rows[i] for axis, i in batching.items()}
    whole = {a for a, n in enumerate(table.value.shape) if sizes[a] == n or a in batching}

    def picked(axes: tuple[int, ...], delta: jax.Array) -> tuple[tuple[int, ...], jax.Array]:
        if whole.issuperset(axes):
            spans = tuple(to[axis] for axis in axes if axis in to)
            return spans, lax.squeeze(delta, [i for i, axis in enumerate(axes) if axis not in to])
        windows = [axis for axis in axes if axis in kept]
        delta = _gather_vector(eqn, axes, delta, indices, windows, batching)
        return (*rows, *(to[axis] for axis in windows)), delta

    term = table.low_rank
    if term is not None:
        spans = {*term.down_axes, *term.up_axes}
        if (
            table.codes
            or term.keys is not None
            or any(axis not in whole and axis not in spans for axis in range(table.value.ndim))
        ):
            return None
        term = term.moved(picked)
    factors = [picked(*factor) for factor in table.factors]
    return [moved(table, y, factors, is_rows, term)]


def _fills_with_nothing(eqn: JaxprEqn) -> bool:
    """Whether what lies outside the table is filled with zero, NaN or, in codes, a mark."""
    fill = eqn.params["fill_value"]
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP or fill is None:
        return True
    inexact = jnp.issubdtype(jax_versions.result_of(eqn).dtype, jnp.inexact)
    return not inexact or fill == 0 or bool(np.isnan(fill))


def _gather_vector(
    eqn: JaxprEqn,
    axes: Sequence[int],
    delta: jax.Array,
    indices: jax.Array,
    windows: Sequence[int],
    batching: dict[int, int],
) -> jax.Array:
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


def _scale_result(
    interpreter: Interpreter,
    eqn: JaxprEqn,
    operands: Operands,
    y: jax.Array,
    factors: Factors,
    added: jax.Array | None = None,
) -> Value:
    """A result with the low-rank term's part added to it, and multiplied by its factors."""
    if added is not None:
        interpreter.record(eqn, next(x for x in operands if isinstance(x, Scaled)))
        if not factors:
            return y + added.astype(y.dtype)
        return scale(y, Scaled.of(y, factors, ()).factors, added=added)
    if not factors:
        return y
    scaled = Scaled.of(y, factors, origin_of(*operands), product=True, codes=False)
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return scaled  # codes multiplied as integers: the scale waits for the dequantization
    return interpreter.materialize(eqn, [scaled])[0]


class Named(NamedTuple):
    """An array, and what its axes are called."""

    array: jax.Array
    names: Sequence[Name]


def _low_rank(
    eqn: JaxprEqn,
    other: Named,
    term: LowRank,
    names: Sequence[Name],
    out: Sequence[Name],
    *group_sizes: jax.Array,
) -> jax.Array:
    """What a weight's low-rank term adds to a contraction: two products, of r columns each.

    They run in the dtype of the activations, as products with the weight itself do.

    Args:
      eqn: the contraction.
      other: the other operand.
      term: of the weight.
      names: what the weight's axes are called.
      out: what the result's axes are called.
      *group_sizes: of a ragged dot.

    Returns:
      An array that broadcasts to the result.
    """
    sides = [Named(x, [*(names[axis] for axis in axes), RANK]) for axes, x in term.factors[:2]]
    # First the side that is summed over with the operand: the other would repeat it.
    sides.sort(key=lambda side: -sum(name[0] == "contract" for name in side.names))
    result = jax_versions.result_of(eqn).dtype
    dtype = other.array.dtype if is_inexact(other.array) else sides[0].array.dtype
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    rows = None if ragged is None else other.names[ragged.lhs_ragged_dimensions[0]]
    for side, last in zip(sides, (False, True), strict=True):
        to = jnp.promote_types(dtype, result) if last else dtype
        left = Named(other.array.astype(dtype), other.names)
        right = Named(side.array.astype(dtype), side.names)
        if rows is not None and GROUP in side.names:
            other = _ragged_product(eqn, left, right, rows, group_sizes[0], to)
            continue
        needed = {*out} if last else {*out, *sides[1].names}
        kept = [n for n in dict.fromkeys([*left.names, *right.names]) if n in needed]
        other = Named(_einsum(eqn, left, right, kept, out, to), kept)
    present = [name for name in out if name in other.names]
    y = lax.transpose(other.array, [list(other.names).index(name) for name in present])
    return jnp.expand_dims(y, [i for i, name in enumerate(out) if name not in present])


def _einsum(
    eqn: JaxprEqn, x: Named, y: Named, kept: Sequence[Name], out: Sequence[Name], dtype: Any
) -> jax.Array:
    """A product of two named arrays, summed over all axes but those that are kept."""
    letters = {name: i for i, name in enumerate(dict.fromkeys([*x.names, *y.names]))}
    stated = eqn.params.get("out_sharding")
    if stated is not None:  # where the result's axes lie; those of the ranks are whole
        places = dict(zip(out, [*stated.spec, *(None for _ in out)], strict=False))
        spec = jax.sharding.PartitionSpec(*(places.get(name) for name in kept))
        stated = jax.sharding.NamedSharding(stated.mesh, spec)
    return jnp.einsum(
        x.array,
        [letters[name] for name in x.names],
        y.array,
        [letters[name] for name in y.names],
        [letters[name] for name in kept],
        precision=_precision(eqn),
        preferred_element_type=dtype,
        out_sharding=stated,
    )


def _precision(eqn: JaxprEqn) -> Any:
    """A contraction's precision; None for an algorithm, which is for the dtypes that it has."""
    precision = eqn.params["precision"]
    return precision if isinstance(precision, (tuple, lax.Precision)) else None


def _ragged_product(
    eqn: JaxprEqn, x: Named, y: Named, rows: Name, sizes: jax.Array, dtype: Any
) -> Named:
    """The ragged dot of x, whose axis rows comes in groups, with a matrix y for each group."""
    old = eqn.params["ragged_dot_dimension_numbers"]
    numbers, out = _dimension_numbers((x.names, y.names))
    product = lax.ragged_dot_general(
        x.array,
        y.array,
        sizes,
        dataclasses.replace(
            old,
            dot_dimension_numbers=numbers,
            lhs_ragged_dimensions=(list(x.names).index(rows),),
            rhs_group_dimensions=(list(y.names).index(GROUP),),
        ),
        precision=_precision(eqn),
        preferred_element_type=dtype,
    )
    return Named(product, [name for name in out if name != GROUP])


def _dropped(x: jax.Array, term: LowRank) -> jax.Array:
    """An operand as a low-rank term sees it in training: some entries zero, the others larger."""
    if term.keys is None:
        return x
    key = jax.random.wrap_key_data(term.keys.reshape(-1, term.keys.shape[-1])[0])
    kept = jax.random.bernoulli(key, 1 - term.dropout, x.shape)
    return jnp.where(kept, x / (1 - term.dropout), 0).astype(x.dtype)
