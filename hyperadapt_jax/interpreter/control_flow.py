"""Primitives with inner jaxprs: they are entered, through JAX's own transformations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax

from hyperadapt_jax.interpreter import jax_versions
from hyperadapt_jax.interpreter.values import Scaled
from hyperadapt_jax.sharding import vector_spec


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
