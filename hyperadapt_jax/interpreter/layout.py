"""Layout: the value passes, and its factors move with its axes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from hyperadapt_jax.interpreter import jax_versions
from hyperadapt_jax.interpreter.interpreter import Interpreter, Rule
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
    origin_of,
    same_factors,
    value_of,
    vector_like,
)
from hyperadapt_jax.sharding import vector_spec

Moved: TypeAlias = Factors | None
Arrays: TypeAlias = Sequence[jax.Array]
Move: TypeAlias = Callable[[Interpreter, JaxprEqn, Arrays, Scaled], Moved]


def moves_factors(move: Move) -> Rule:
    """A rule for one scaled operand and one result, made of a function that moves the factors.

    ``move(interpreter, eqn, others, x)`` gives x's factors on the axes of the result, or None where
    they cannot pass. The arrays of a low-rank term move as vectors on their axes do.
    """

    @functools.wraps(move)
    def rule(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
        x, *rest = operands
        others = [other for other in rest if not isinstance(other, Scaled)]
        if not isinstance(x, Scaled) or len(others) < len(rest):
            return None
        factors, low_rank = move(interpreter, eqn, others, x), x.low_rank
        if low_rank is not None:

            def one(axes: tuple[int, ...], vector: jax.Array) -> Any:
                found = move(interpreter, eqn, others, _only(x, axes, vector))
                return None if found is None else found[0]

            low_rank = low_rank.moved(one)
        if factors is None or low_rank is None is not x.low_rank:
            return None
        [y] = jax_versions.bind(eqn, x.value, *others)
        # Codes become a weight yet, however few they are, unless the data says which they are.
        stays = x.codes and all(interpreter.are_frozen(others))
        return [moved(x, y, factors, vector_like(y.shape) and not stays, low_rank)]

    return rule


def _only(x: Scaled, axes: tuple[int, ...], delta: jax.Array) -> Scaled:
    """The same value with one factor alone."""
    return dataclasses.replace(x, axes=(axes,), deltas=(delta,), low_rank=None)


@moves_factors
def keep(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    """Values that do not change: of integers, in a type that holds them all."""
    old, new = x.value.dtype, jax_versions.result_of(eqn).dtype
    held = jnp.issubdtype(new, jnp.inexact) or jnp.promote_types(old, new) == new
    return x.factors if held else None


@moves_factors
def stop_gradient(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    return [(axes, lax.stop_gradient(delta)) for axes, delta in x.factors]


@moves_factors
def reshard(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    spec = eqn.params["dst_sharding"].spec
    return [(axes, jax.sharding.reshard(d, vector_spec(spec, axes))) for axes, d in x.factors]


@moves_factors
def transpose(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    to = {axis: i for i, axis in enumerate(eqn.params["permutation"])}
    return [(tuple(to[axis] for axis in axes), delta) for axes, delta in x.factors]


@moves_factors
def squeeze(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    gone = {axis % x.value.ndim for axis in eqn.params["dimensions"]}
    left = [axis for axis in range(x.value.ndim) if axis not in gone]
    return [(tuple(map(left.index, axes)), delta) for axes, delta in x.factors]


@moves_factors
def broadcast_in_dim(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    to = eqn.params["broadcast_dimensions"]
    return [(tuple(to[axis] for axis in axes), delta) for axes, delta in x.factors]


@moves_factors
def reshape(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    """Axes that split or join: a factor is repeated over the axes that join its own."""
    order = eqn.params["dimensions"] or range(x.value.ndim)
    old, new = [x.value.shape[axis] for axis in order], eqn.params["new_sizes"]
    groups = _regroup(old, new)
    if groups is None:
        return None
    factors = []
    ordered = Scaled.of(
        jax.ShapeDtypeStruct(tuple(old), x.value.dtype),
        [(tuple(map(order.index, axes)), delta) for axes, delta in x.factors],
        x.origin,
    )
    for axes, delta in ordered.factors:
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
            interpreter.facts.note(delta, runs=_runs(touched, axes, old, spans))
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


def _regroup(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Pairs the smallest runs of old and new axes that hold the same numbers.

    >>> _regroup((2, 3, 4), (6, 2, 2))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    if 0 in old:
        return None
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before: list[int] = []
        after: list[int] = []
        a = b = 1
        while not before and not after or a != b:
            if i < len(old) and (a < b or not before or j == len(new)):
                before, a, i = [*before, i], a * old[i], i + 1
            else:
                after, b, j = [*after, j], b * new[j], j + 1
        groups.append((before, after))
    return groups


@moves_factors
def slice_(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
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


@moves_factors
def dynamic_slice(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    sizes = eqn.params["slice_sizes"]
    return [
        (axes, lax.dynamic_slice(d, [others[a] for a in axes], [sizes[a] for a in axes]))
        for axes, d in x.factors
    ]


def neg(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    [x] = operands
    assert isinstance(x, Scaled)
    [y] = jax_versions.bind(eqn, x.value)
    term = x.low_rank if x.low_rank is None or x.codes else x.low_rank.times(-1)
    return [dataclasses.replace(x, value=y, low_rank=term)]


def reduce_sum(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """A sum over axes that no vector spans, and one side of a low-rank term at most."""
    [x] = operands
    assert isinstance(x, Scaled)
    gone = eqn.params["axes"]
    left = [axis for axis in range(x.value.ndim) if axis not in gone]

    def shifted(axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(left.index(axis) for axis in axes if axis in left)

    if any(axis in gone for axes in x.axes for axis in axes):
        return None
    factors, low_rank = [(shifted(axes), delta) for axes, delta in x.factors], x.low_rank
    if low_rank is not None:
        spans = [axis for axes in (low_rank.down_axes, low_rank.up_axes) for axis in axes]
        if x.codes or low_rank.keys is not None or any(spans.count(axis) == 2 for axis in gone):
            return None
        repeats = math.prod(x.value.shape[axis] for axis in gone if axis not in spans)
        low_rank = low_rank.rebuilt(
            [
                (shifted(axes), jnp.sum(array, [i for i, a in enumerate(axes) if a in gone]))
                for axes, array in low_rank.factors
            ]
        ).times(repeats)
    [y] = jax_versions.bind(eqn, x.value)
    return [moved(x, y, factors, vector_like(y.shape) and not x.codes, low_rank)]


@moves_factors
def ppermute(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    """Each device's weight goes to another, and its vectors with it."""
    return [(axes, jax_versions.bind(eqn, delta)[0]) for axes, delta in x.factors]


@moves_factors
def rev(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
    flipped = eqn.params["dimensions"]
    return [
        (axes, lax.rev(d, [i for i, a in enumerate(axes) if a in flipped])) for axes, d in x.factors
    ]


@moves_factors
def all_gather(interpreter: Interpreter, eqn: JaxprEqn, others: Arrays, x: Scaled) -> Moved:
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


def split(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> list[Value]:
    """A weight split along an axis: each piece takes its part of the vectors."""
    [x] = operands
    assert isinstance(x, Scaled)
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    cuts = np.cumsum(sizes)[:-1].tolist()

    def pieces(factors: Factors) -> list[Factors]:
        parts = [
            jnp.split(d, cuts, axes.index(axis)) if axis in axes else [d] * len(sizes)
            for axes, d in factors
        ]
        spans = [axes for axes, _ in factors]
        return [[(a, p[i]) for a, p in zip(spans, parts, strict=True)] for i in range(len(sizes))]

    values = jax_versions.bind(eqn, x.value)
    terms: Sequence[LowRank | None] = [None] * len(sizes)
    if (low_rank := x.low_rank) is not None:
        terms = [low_rank.rebuilt(part) for part in pieces(low_rank.factors)]
    return [
        Scaled.of(v, factors, x.origin, x.product, x.codes, term)
        for v, factors, term in zip(values, pieces(x.factors), terms, strict=True)
    ]


def concatenate(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """Arrays joined along an axis, old or new (``stack``): so are their vectors.

    What is scaled by nothing is scaled by one. A vector that does not span the joined axis stays
    as it is where all operands share it, and is repeated along it where they differ.
    """
    codes = [x for x in operands if isinstance(x, Scaled) and x.codes]
    if len(codes) < len(operands) or not all(same_factors(x, codes[0]) for x in codes):
        # Looked-up rows are activations; but parts of one code wait together.
        operands = interpreter.materialize_where(
            lambda x: x.product and is_inexact(x.value), eqn, operands
        )
    [y] = jax_versions.bind(eqn, *map(value_of, operands))
    scaled = [x for x in operands if isinstance(x, Scaled)]
    if not scaled:
        return [y]
    new = jax_versions.name_of(eqn) == "stack"
    joined = eqn.params["axis" if new else "dimension"]
    sizes = [1 if new else value_of(x).shape[joined] for x in operands]

    def shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis + (new and axis >= joined) for axis in axes)

    first = operands[0] if len(scaled) == len(operands) else None
    shared = [
        (axes, delta)
        for axes, delta in factors_of(first)
        if (new or joined not in axes)
        and all(any(a == axes and d is delta for a, d in x.factors) for x in scaled)
    ]
    factors = [(shifted(axes), delta) for axes, delta in shared]

    # For each set of axes, what each operand has there: a column of this table is a new vector.
    columns: dict[tuple[tuple[int, ...], int], dict[int, jax.Array]] = {}
    repeated = set()
    for i, x in enumerate(operands):
        seen: list[tuple[int, ...]] = []
        for axes, delta in factors_of(x):
            if any(a == axes and d is delta for a, d in shared):
                continue
            spans = tuple(sorted({*shifted(axes), joined}))
            if new or joined not in axes:
                delta = jnp.expand_dims(delta, spans.index(joined))
                repeated |= {spans} if sizes[i] > 1 else set()
            shape = [sizes[i] if axis == joined else y.shape[axis] for axis in spans]
            columns.setdefault((spans, seen.count(spans)), {})[i] = jnp.broadcast_to(delta, shape)
            seen.append(spans)
    low_rank = None
    if any(x.low_rank is not None for x in scaled):
        if any(x.codes for x in scaled):
            return None
        low_rank = _joined(operands, joined, new, y)
        if low_rank.down.size + low_rank.up.size > y.size:
            return None  # as large as the weights themselves
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
    product = any(x.product for x in scaled)
    codes_left = any(x.codes for x in scaled)
    return [Scaled.of(y, factors, origin_of(*scaled), product, codes_left, low_rank)]


def _joined(operands: Operands, joined: int, new: bool, y: jax.Array) -> LowRank:
    """The low-rank terms of arrays that are joined along an axis, as one term.

    Along a new axis, or one that both sides of every term span, both sides are joined; else the
    ranks add up, and the part of each array is zero for the others' ranks.
    """

    def shifted(factors: Factors) -> Factors:
        return [(tuple(a + (new and a >= joined) for a in axes), x) for axes, x in factors]

    found = [low_rank_of(x) for x in operands]
    terms = [term and term.rebuilt(shifted(term.factors)) for term in found]
    sizes = [1 if new else value_of(x).shape[joined] for x in operands]
    known = [(term, size) for term, size in zip(terms, sizes, strict=True) if term is not None]
    first = known[0][0]
    stacked = len({term.rank for term, _ in known}) == 1 and all(
        size == 1 or joined in term.down_axes and joined in term.up_axes for term, size in known
    )
    spans = [{axis for term, _ in known for axis in term.factors[side][0]} for side in (0, 1)]
    # One side at least must span the axis, so that a term is zero outside of its part.
    for spanned in spans if stacked else spans[1:] if joined not in spans[0] else ():
        spanned.add(joined)
    sides: list[tuple[tuple[int, ...], jax.Array]] = []
    for side, axes in enumerate(map(tuple, map(sorted, spans))):
        parts = []
        for term, size in zip(terms, sizes, strict=True):
            shape = [size if axis == joined else y.shape[axis] for axis in axes]
            if term is None:
                parts.append(jnp.zeros((*shape, first.rank if stacked else 0), first.up.dtype))
                continue
            own, array = term.factors[side]
            array = jnp.expand_dims(array, [i for i, axis in enumerate(axes) if axis not in own])
            parts.append(jnp.broadcast_to(array, (*shape, term.rank)))
        if joined in axes and not stacked:
            ends = np.cumsum([part.shape[-1] for part in parts]).tolist()
            empty = [(0, 0)] * len(axes)
            parts = [
                jnp.pad(part, [*empty, (end - part.shape[-1], ends[-1] - end)])
                for part, end in zip(parts, ends, strict=True)
            ]
        sides.append(
            (axes, lax.concatenate(parts, axes.index(joined) if joined in axes else len(axes)))
        )
    keys = None if first.keys is None else first.keys.reshape(-1, first.keys.shape[-1])[0]
    return dataclasses.replace(first, keys=keys, keys_axes=()).rebuilt(sides)


def pad(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """What is padded with zeros may be scaled by anything: by one."""
    x, padding = operands
    config = eqn.params["padding_config"]
    grows = any(low > 0 or high > 0 or interior for low, high, interior in config)
    if not isinstance(x, Scaled) or grows and not interpreter.is_zero(padding):
        return None
    [y] = jax_versions.bind(eqn, x.value, padding)

    def padded(axes: tuple[int, ...], d: jax.Array) -> tuple[tuple[int, ...], jax.Array]:
        return axes, lax.pad(d, jnp.zeros((), d.dtype), [config[axis] for axis in axes])

    low_rank = x.low_rank
    if low_rank is not None:
        spans = {*low_rank.down_axes, *low_rank.up_axes}
        if any(any(c) for axis, c in enumerate(config) if axis not in spans):
            return None  # the term would be there where zeros are
        low_rank = low_rank.moved(padded)
    return [moved(x, y, [padded(*factor) for factor in x.factors], low_rank=low_rank)]


def select_n(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """A choice between arrays that the same vectors scale, as they do zeros (a pruned weight)."""
    which, *cases = operands
    scaled = [x for x in cases if isinstance(x, Scaled)]
    alike = all(same_factors(x, scaled[0]) for x in scaled)
    others = [x for x in cases if not isinstance(x, Scaled)]
    if isinstance(which, Scaled) or not alike or not all(map(interpreter.is_zero, others)):
        return None
    if others and scaled[0].low_rank is not None:
        return None  # the term would be there where zeros are
    [y] = jax_versions.bind(eqn, which, *map(value_of, cases))
    return [dataclasses.replace(scaled[0], value=y, origin=origin_of(*scaled))]


def overwrite(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """Zeros written into a weight, as into a padding token's row of a table."""
    x, *others = operands
    if isinstance(x, Scaled) and x.low_rank is not None:
        return None  # the term would be there where zeros are
    at = 1 if jax_versions.name_of(eqn) == "scatter" else 0  # the indices come first there
    if not isinstance(x, Scaled) or any(isinstance(other, Scaled) for other in others):
        return None
    if not interpreter.is_zero(others[at]):
        return None
    [y] = jax_versions.bind(eqn, x.value, *others)
    return [moved(x, y, x.factors)]


def each(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> list[Value]:
    """Primitives that hand every operand through, as a barrier does."""
    values = jax_versions.bind(eqn, *map(value_of, operands))
    return [
        dataclasses.replace(x, value=v) if isinstance(x, Scaled) else v
        for v, x in zip(values, operands, strict=True)
    ]
