"""How a scaled weight passes through each primitive: one small rule per primitive.

A rule gets the equation and its operands, of which at least one is a :class:`Scaled`, and returns
the results; or it returns None where no vector can pass, and then the weight is materialised.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hyperadapt_jax import compat
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

    Attributes:
      value: an array of any shape.
      deltas: for each factor, an array with the shape of the axes that it spans.
      axes: for each factor, the axes of ``value`` that it spans, ascending (static).
      origin: the paths of the weights it comes from (static).
      product: it is no weight any more but a product with one, waiting to be scaled (static).
    """

    value: Any
    deltas: tuple[Any, ...]
    axes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    origin: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    product: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(
        cls, value: Any, factors: Factors, origin: tuple[str, ...], product: bool = False
    ) -> Scaled:
        """Builds one from (axes, delta) pairs, whose axes may come in any order."""
        axes, deltas = [], []
        for spans, delta in factors:
            order = sorted(range(len(spans)), key=lambda i: spans[i])
            axes.append(tuple(spans[i] for i in order))
            in_order = order == list(range(len(order)))
            deltas.append(delta if in_order else lax.transpose(delta, order))
        return cls(value, tuple(deltas), tuple(axes), origin, product)

    @property
    def factors(self) -> Factors:
        return list(zip(self.axes, self.deltas, strict=True))


def scale(x: jax.Array, factors: Factors) -> jax.Array:
    """``x * prod(1 + delta)``, multiplied in float32 or wider and rounded once to x's dtype."""
    wide = widen(x.dtype)

    def product(x, *deltas):
        y = x.astype(wide)
        for (axes, _), delta in zip(factors, deltas, strict=True):
            y = y * along(delta.astype(wide), axes, x.ndim)
        return y.astype(x.dtype)

    # A narrow operand is kept for the backward pass as it is, not as a copy in float32.
    if x.dtype != wide:
        product = jax.checkpoint(product, prevent_cse=False)
    return product(x, *(delta for _, delta in factors))


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Scaled) else x


def factors_of(x: Any) -> Factors:
    return x.factors if isinstance(x, Scaled) else ()


def origin_of(*operands: Any) -> tuple[str, ...]:
    origins = [x.origin for x in operands if isinstance(x, Scaled)]
    return type(origins[0])(path for origin in origins for path in origin)


# Contractions: vectors move from the weight to the activations, and here they are applied.


def dot_general(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A vector on free or batch axes scales the result, one on contracted axes the other operand.

    Where a vector spans contracted and free axes (experts that all see one input), its free axes
    become batch axes of the product: the other operand is repeated along them, and scaled.
    """
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
        for axes, delta in factors_of(operand):
            spans = [names[side][axis] for axis in axes]
            if all(name in out for name in spans):
                after.append((tuple(out.index(name) for name in spans), delta))
            else:
                before[1 - side].append((spans, delta))
                repeated += [n for n in spans if n[0] == "free" and n not in repeated]
    if any(before[side] and not jnp.issubdtype(values[side].dtype, jnp.inexact) for side in (0, 1)):
        return None
    if repeated and eqn.params.get("out_sharding") is not None:
        return None

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
            values[side] = scale(ordered.value, ordered.factors)

    def places(kind):
        found = [n for n in names[0] if n in names[1] and (n[0] == "contract") == kind]
        return tuple(tuple(names[side].index(n) for n in found) for side in (0, 1)), found

    if repeated:
        new_contract, _ = places(True)
        new_batch, shared = places(False)
        new_out = shared + [n for ns in names for n in ns if n[0] == "free" and n not in shared]
        [y] = compat.bind(eqn, *values, dimension_numbers=(new_contract, new_batch))
        y = lax.transpose(y, [new_out.index(n) for n in out])
    else:
        [y] = compat.bind(eqn, *values)
    return [_scale_result(ctx, eqn, operands, y, after)]


def conv_general_dilated(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """The kernel's out vector scales the result's features, its in vector the input's features."""
    lhs, rhs = operands
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis, in_axis = numbers.rhs_spec[:2]
    if isinstance(lhs, Scaled) or eqn.params["batch_group_count"] != 1:
        return None
    after, before = [], []
    for axes, delta in rhs.factors:
        if axes == (out_axis,):
            after.append(((numbers.out_spec[1],), delta))
        elif axes == (in_axis,):
            before.append(((numbers.lhs_spec[1],), jnp.tile(delta, groups)))
        else:
            return None
    if before:
        ctx.applied(eqn, rhs, onto=lhs)
    [y] = compat.bind(eqn, scale(lhs, before), rhs.value)
    return [_scale_result(ctx, eqn, operands, y, after)]


def gather(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """Whole slices picked by index: so are the vectors. Looked-up rows are activations."""
    table, indices = operands
    numbers, slice_sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    picked = numbers.collapsed_slice_dims
    kept = [axis for axis in range(table.value.ndim) if axis not in picked]
    whole = (
        sorted(picked) == sorted(numbers.start_index_map)
        and not numbers.operand_batching_dims
        and all(slice_sizes[axis] == table.value.shape[axis] for axis in kept)
    )
    fill = eqn.params["fill_value"]
    if not whole or not (fill is None or fill == 0 or np.isnan(fill)):
        return None
    [y] = compat.bind(eqn, table.value, indices)
    rows = [axis for axis in range(y.ndim) if axis not in numbers.offset_dims]
    factors = []
    for axes, delta in table.factors:
        spans = [numbers.offset_dims[kept.index(axis)] for axis in axes if axis in kept]
        looked_up = [axis for axis in axes if axis in picked]
        if looked_up:
            columns = [numbers.start_index_map.index(axis) for axis in looked_up]
            index = tuple(indices[..., column] for column in columns)
            order = [axes.index(axis) for axis in looked_up]
            order += [i for i in range(len(axes)) if i not in order]
            delta = lax.transpose(delta, order).at[index]
            delta = delta.get(mode=eqn.params["mode"], fill_value=0, wrap_negative_indices=False)
            spans = rows + spans
        factors.append((tuple(spans), delta))
    return [Scaled.of(y, factors, table.origin, product=len(kept) < 2)]


def _scale_result(ctx: Any, eqn: Any, operands: Sequence[Any], y: Any, factors: Factors) -> Any:
    if not factors:
        return y
    scaled = Scaled.of(y, factors, origin_of(*operands), product=True)
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return scaled  # codes multiplied as integers: the scale waits for the dequantisation
    return ctx.plain(eqn, [scaled])[0]


# Layout: the value passes, and the vectors move with their axes.


def _layout(move: Callable[[Any, Any, Scaled], Factors | None]) -> Callable:
    """A rule for one scaled operand, one result, and factors that ``move`` carries to its axes."""

    def rule(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
        scaled, *others = operands
        if not isinstance(scaled, Scaled) or any(isinstance(x, Scaled) for x in others):
            return None
        factors = move(eqn, others, scaled)
        if factors is None:
            return None
        [y] = compat.bind(eqn, scaled.value, *others)
        return [Scaled.of(y, factors, scaled.origin, scaled.product)]

    return rule


def _keep(eqn: Any, others: Any, x: Scaled) -> Factors | None:
    return x.factors if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact) else None


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
    return [
        (
            tuple(left.index(axis) for axis in axes if axis in left),
            lax.squeeze(delta, [i for i, axis in enumerate(axes) if axis in gone]),
        )
        for axes, delta in x.factors
    ]


def _broadcast_in_dim(eqn: Any, others: Any, x: Scaled) -> Factors:
    shape, to = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    factors = []
    for axes, delta in x.factors:
        repeated = [i for i, a in enumerate(axes) if x.value.shape[a] != shape[to[a]]]
        spans = tuple(to[axis] for i, axis in enumerate(axes) if i not in repeated)
        factors.append((spans, lax.squeeze(delta, repeated)))
    return factors


def _reshape(eqn: Any, others: Any, x: Scaled) -> Factors | None:
    """Axes that split or join: a factor is repeated over the axes that join its own."""
    if eqn.params["dimensions"] is not None:
        return None
    old, new = x.value.shape, eqn.params["new_sizes"]
    groups = _regroup(old, new)
    if groups is None:
        return None
    factors = []
    for axes, delta in x.factors:
        touched = [(before, after) for before, after in groups if set(before) & set(axes)]
        wide = [axis for before, _ in touched for axis in before]
        spans = tuple(axis for _, after in touched for axis in after)
        if wide != list(axes):
            shape = tuple(old[axis] for axis in wide)
            if len(wide) > 1 and math.prod(shape) == math.prod(old):
                return None  # as large as the weight itself
            missing = [i for i, axis in enumerate(wide) if axis not in axes]
            delta = jnp.broadcast_to(jnp.expand_dims(delta, missing), shape)
        factors.append((spans, lax.reshape(delta, tuple(new[axis] for axis in spans))))
    return factors


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


def _rev(eqn: Any, others: Any, x: Scaled) -> Factors:
    flipped = eqn.params["dimensions"]
    return [
        (axes, lax.rev(d, [i for i, a in enumerate(axes) if a in flipped])) for axes, d in x.factors
    ]


def _all_gather(eqn: Any, others: Any, x: Scaled) -> Factors | None:
    axis = eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        return None
    return [
        (axes, compat.bind(eqn, d, all_gather_dimension=axes.index(axis))[0] if axis in axes else d)
        for axes, d in x.factors
    ]


def split(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """One weight cut in several along an axis: each piece takes its part of the vectors."""
    [x] = operands
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    cuts = np.cumsum(sizes)[:-1].tolist()
    pieces = [
        jnp.split(d, cuts, axes.index(axis)) if axis in axes else [d] * len(sizes)
        for axes, d in x.factors
    ]
    values = compat.bind(eqn, x.value)
    deltas = zip(*pieces, strict=True)
    return [
        dataclasses.replace(x, value=v, deltas=tuple(d))
        for v, d in zip(values, deltas, strict=True)
    ]


def each(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Primitives that hand every operand through, as a barrier does."""
    values = compat.bind(eqn, *map(value_of, operands))
    return [
        dataclasses.replace(x, value=v) if isinstance(x, Scaled) else v
        for v, x in zip(values, operands, strict=True)
    ]


def mul(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Products of scaled and plain arrays, as in dequantisation: the vectors wait."""
    [y] = compat.bind(eqn, *map(value_of, operands))
    factors = [pair for x in operands for pair in factors_of(x)]
    product = any(isinstance(x, Scaled) and x.product for x in operands)
    return [Scaled.of(y, factors, origin_of(*operands), product)]


# Primitives with inner jaxprs: they are entered, through JAX's own transformations.


def jit(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    before, after = compat.jit_shardings(eqn.params)
    operands = [_constrain(x, s) for x, s in zip(operands, before, strict=True)]
    results = ctx.run(eqn.params["jaxpr"], operands)
    return [_constrain(y, s) for y, s in zip(results, after, strict=True)]


def _constrain(x: Any, sharding: Any) -> Any:
    """A weight is constrained, and its vectors stay where they are."""
    if sharding is None:
        return x
    if isinstance(x, Scaled):
        return dataclasses.replace(x, value=_constrain(x.value, sharding))
    return lax.with_sharding_constraint(x, sharding)


def remat(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """``jax.checkpoint``, with its policy."""
    how = {key: eqn.params[key] for key in ("policy", "prevent_cse")}
    key = (id(eqn.params["jaxpr"]), *how.values())
    if key not in ctx.bodies:
        inner = partial(ctx.run, eqn.params["jaxpr"])
        ctx.bodies[key] = jax.checkpoint(lambda *xs: inner(xs), **how)
    body = ctx.bodies[key]
    jaxpr, _ = compat.open_jaxpr(eqn.params["jaxpr"])
    handed_on = dict(zip(jaxpr.invars, operands, strict=True))
    results = zip(jaxpr.outvars, body(*operands), strict=True)
    return [handed_on.get(atom, y) if atom in jaxpr.invars else y for atom, y in results]


def cond(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    if eqn.params.get("branches_platforms") is not None or isinstance(operands[0], Scaled):
        return None
    branches = [
        lambda *xs, branch=branch: ctx.plain(eqn, ctx.run(branch, xs))
        for branch in eqn.params["branches"]
    ]
    return lax.switch(operands[0], branches, *operands[1:])


def scan(ctx: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Weights come in as constants, as carried constants or as scanned operands.

    A scanned weight's vectors are scanned along where they span the scanned axis. A weight that the
    body hands out slice by slice, as NNX does, is the scanned weight itself.
    """
    params = eqn.params
    n_consts, n_carry = compat.scan_counts(params)
    consts, carry, xs = _split(operands, n_consts, n_carry)
    loop = _Loop(ctx, eqn, params["jaxpr"], n_consts, carry)
    scanned, rebuild = zip(*map(_scan_operand, xs), strict=True) if xs else ((), ())
    handed_out = {}

    def body(carry, slices):
        slices = [make(part) for make, part in zip(rebuild, slices, strict=True)]
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
    body = jax.shard_map(
        lambda *xs: tuple(ctx.plain(eqn, ctx.run(params["jaxpr"], xs))),
        mesh=params["mesh"],
        in_specs=specs,
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(body(*operands))


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
        return Scaled(value, tuple(deltas), axes, x.origin, x.product)

    return [x.value, *(d for s, d in zip(sliced, x.deltas, strict=True) if s)], make


class _Loop:
    """A loop's carry, less the weights that it hands on unchanged: those are constants."""

    def __init__(self, ctx: Any, eqn: Any, body: Any, n_consts: int, carry: Sequence[Any]):
        jaxpr, _ = compat.open_jaxpr(body)
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

RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
    "mul": mul,
    "split": split,
    "optimization_barrier": each,
    "device_put": each,
    **dict.fromkeys(
        ["convert_element_type", "copy", "copy_p", "reduce_precision", "pvary", "pcast", "name"]
        + ["neg", "div", "sharding_constraint"],
        _layout(_keep),
    ),
    "stop_gradient": _layout(_stop_gradient),
    "reshard": _layout(_reshard),
    "transpose": _layout(_transpose),
    "squeeze": _layout(_squeeze),
    "broadcast_in_dim": _layout(_broadcast_in_dim),
    "reshape": _layout(_reshape),
    "slice": _layout(_slice),
    "dynamic_slice": _layout(_dynamic_slice),
    "rev": _layout(_rev),
    "all_gather": _layout(_all_gather),
    "all_gather_invariant": _layout(_all_gather),
    "jit": jit,
    "remat2": remat,
    "cond": cond,
    "scan": scan,
    "while": while_loop,
    "shard_map": shard_map,
}
