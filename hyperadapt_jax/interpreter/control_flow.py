"""Primitives with inner jaxprs: they are entered, through JAX's own transformations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import Sharding

from hyperadapt_jax.interpreter import jax_versions
from hyperadapt_jax.interpreter.interpreter import Interpreter
from hyperadapt_jax.interpreter.values import Operands, Results, Scaled, Value
from hyperadapt_jax.sharding import vector_spec


def jit(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> list[Value]:
    before, after = jax_versions.jit_shardings(eqn.params)
    operands = [_constrain(interpreter, x, s) for x, s in zip(operands, before, strict=True)]
    results = interpreter.run(eqn.params["jaxpr"], operands)
    return [_constrain(interpreter, y, s) for y, s in zip(results, after, strict=True)]


def _constrain(interpreter: Interpreter, x: Value, sharding: Sharding | None) -> Value:
    """A weight is constrained, and its vectors stay where they are."""
    if sharding is None:
        return x
    if isinstance(x, Scaled):
        return dataclasses.replace(x, value=lax.with_sharding_constraint(x.value, sharding))
    constrained = lax.with_sharding_constraint(x, sharding)
    return interpreter.freeze_again(interpreter.are_frozen([x]), [constrained])[0]


def remat(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> list[Value]:
    """``jax.checkpoint``, with its policy."""
    closed, how = jax_versions.remat_params(eqn)
    frozen = interpreter.are_frozen(operands)
    key = (id(closed), *how.values(), frozen)
    if key not in interpreter.bodies:

        def run(*xs: Value) -> list[Value]:
            return interpreter.run(closed, interpreter.freeze_again(frozen, xs))

        interpreter.bodies[key] = jax.checkpoint(run, **how)
    results = interpreter.bodies[key](*operands)
    jaxpr, _ = jax_versions.open_jaxpr(closed)
    handed_on = dict(zip(jaxpr.invars, operands, strict=True))
    return [
        handed_on.get(atom, y) if atom in jaxpr.invars else y
        for atom, y in zip(jaxpr.outvars, results, strict=True)
    ]


def cond(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    index, *operands = operands
    if eqn.params.get("branches_platforms") is not None or isinstance(index, Scaled):
        return None
    frozen = interpreter.are_frozen(operands)

    def entered(branch: jax_versions.AnyJaxpr) -> Callable[..., list[jax.Array]]:
        def run(*xs: Value) -> list[jax.Array]:
            results = interpreter.run(branch, interpreter.freeze_again(frozen, xs))
            return interpreter.materialize(eqn, results)

        return run

    return lax.switch(index, [entered(branch) for branch in eqn.params["branches"]], *operands)


def scan(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> list[Value]:
    """Weights come in as constants, as carried constants or as scanned operands.

    A scanned weight's vectors are scanned along where they span the scanned axis. A weight that the
    body returns slice by slice, as NNX does, is the scanned weight itself.
    """
    params = eqn.params
    n_consts, n_carry = jax_versions.scan_counts(params)
    consts, carry, xs = _split(operands, n_consts, n_carry)
    loop = _Loop(interpreter, eqn, params["jaxpr"], n_consts, carry)
    scanned, rebuild = zip(*map(_scan_operand, xs), strict=True) if xs else ((), ())
    frozen = interpreter.are_frozen(xs)
    handed_out: dict[int, Value] = {}

    def body(carry: list[jax.Array], slices: Any) -> tuple[list[jax.Array], Any]:
        slices = [make(part) for make, part in zip(rebuild, slices, strict=True)]
        interpreter.freeze_again(frozen, slices)
        inputs = [*consts, *loop.restore_invariant(carry), *slices]
        results = interpreter.run(params["jaxpr"], inputs)
        ys: list[Any] = results[n_carry:]
        for i, y in enumerate(ys):
            for x, piece in zip(xs, slices, strict=True):
                if isinstance(y, Scaled) and y is piece:
                    handed_out[i], ys[i] = x, None
        return loop.drop_invariant(results[:n_carry]), interpreter.materialize(eqn, ys)

    last, ys = lax.scan(
        body,
        loop.start,
        scanned,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*loop.restore_invariant(last), *(handed_out.get(i, y) for i, y in enumerate(ys))]


def while_loop(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> list[Value]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = _split(operands, n_cond, n_body)
    loop = _Loop(interpreter, eqn, params["body_jaxpr"], n_body, carry)

    def cond(carry: Sequence[jax.Array]) -> Any:
        inputs = [*cond_consts, *loop.restore_invariant(carry)]
        return interpreter.run(params["cond_jaxpr"], inputs)[0]

    def body(carry: Sequence[jax.Array]) -> Sequence[jax.Array]:
        inputs = [*body_consts, *loop.restore_invariant(carry)]
        return loop.drop_invariant(interpreter.run(params["body_jaxpr"], inputs))

    return loop.restore_invariant(lax.while_loop(cond, body, loop.start))


def shard_map(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> list[Value]:
    """Each vector is split over the mesh as the axes of its weight are."""
    params = eqn.params
    specs = tuple(map(_specs, operands, params["in_specs"]))
    frozen = interpreter.are_frozen(operands)

    def inner(*xs: Value) -> tuple[jax.Array, ...]:
        shards = interpreter.freeze_again(frozen, [*map(_shard, xs)])
        return tuple(interpreter.materialize(eqn, interpreter.run(params["jaxpr"], shards)))

    body = jax.shard_map(
        inner,
        mesh=params["mesh"],
        in_specs=specs,
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(body(*operands))


def _specs(x: Value, spec: Any) -> Any:
    """How an operand is split over a mesh, whose value is split as spec says."""
    if not isinstance(x, Scaled):
        return spec
    deltas, low_rank = tuple(vector_spec(spec, axes) for axes in x.axes), x.low_rank
    if low_rank is not None:  # the last axis is whole
        low_rank = low_rank.rebuilt([(a, vector_spec(spec, a)) for a, _ in low_rank.factors])
    return dataclasses.replace(x, value=spec, deltas=deltas, low_rank=low_rank)


def _shard(x: Value) -> Value:
    """A device's part of a weight, which may be of size one along an axis."""
    if not isinstance(x, Scaled):
        return x
    return Scaled.of(x.value, x.factors, x.origin, x.product, x.codes, x.low_rank)


def _split(operands: Operands, *counts: int) -> list[list[Value]]:
    cuts = np.cumsum((0, *counts)).tolist()
    return [list(operands[a:b]) for a, b in zip(cuts, [*cuts[1:], None], strict=True)]


def _scan_operand(x: Value) -> tuple[Any, Callable[[Any], Value]]:
    """What of a scanned operand is sliced by the loop, and how a slice is made whole again."""
    if not isinstance(x, Scaled):
        return x, lambda part: part
    factors, count = [*x.factors, *(x.low_rank.factors if x.low_rank else ())], len(x.deltas)
    sliced = [bool(axes) and axes[0] == 0 for axes, _ in factors]
    axes = [tuple(a - 1 for a in spans if a != 0) for spans, _ in factors]

    def make(part: Sequence[Any]) -> Scaled:
        value, rows = part[0], iter(part[1:])
        arrays = (next(rows) if s else d for s, (_, d) in zip(sliced, factors, strict=True))
        slices = list(zip(axes, arrays, strict=True))
        low_rank = x.low_rank and x.low_rank.rebuilt(slices[count:])
        deltas = tuple(delta for _, delta in slices[:count])
        spans = tuple(axes[:count])
        return Scaled(value, deltas, spans, x.origin, x.product, x.codes, low_rank)

    return [x.value, *(d for s, (_, d) in zip(sliced, factors, strict=True) if s)], make


class _Loop:
    """A loop's carry, without the weights that it passes on unchanged: those are constants."""

    def __init__(
        self,
        interpreter: Interpreter,
        eqn: JaxprEqn,
        body: jax_versions.AnyJaxpr,
        n_consts: int,
        carry: Operands,
    ):
        jaxpr, _ = jax_versions.open_jaxpr(body)
        invars = jaxpr.invars[n_consts : n_consts + len(carry)]
        same = [a is b for a, b in zip(invars, jaxpr.outvars, strict=False)]
        self.interpreter, self.eqn, self.carry = interpreter, eqn, carry
        self.fixed = [isinstance(x, Scaled) and s for x, s in zip(carry, same, strict=True)]
        self.start = self.drop_invariant(carry)

    def drop_invariant(self, carry: Operands) -> list[jax.Array]:
        moving = [x for x, fixed in zip(carry, self.fixed, strict=True) if not fixed]
        return self.interpreter.materialize(self.eqn, moving)

    def restore_invariant(self, carry: Sequence[jax.Array]) -> list[Value]:
        moving = iter(carry)
        return [x if f else next(moving) for x, f in zip(self.carry, self.fixed, strict=True)]
