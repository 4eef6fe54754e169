"""The interpreter: it evaluates a jaxpr of which some values are weights with factors attached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from hyperadapt_jax.interpreter import jax_versions
from hyperadapt_jax.interpreter.values import (
    Facts,
    LowRank,
    Operands,
    Results,
    Scaled,
    Value,
    multiplied_out,
)
from hyperadapt_jax.scales import ScaleVectors, side_axes, stack_axes

ON_ACTIVATIONS = "on activations"
MATERIALIZED = "materialized"
BOTH = "it is multiplied with another adapted weight"

# Zeros in, zeros out.
KEEPS_ZEROS = frozenset(
    "broadcast_in_dim convert_element_type copy pvary reshape squeeze transpose slice"
    " neg sharding_constraint".split()
)


class MaterializedError(TypeError):
    """A targeted weight would have to be multiplied out, which is not allowed or not possible."""


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """One use of one weight: how its vectors are applied, by which primitive, where, and why."""

    path: str
    how: str
    primitive: str = ""
    where: str = ""
    reason: str = ""


class Refused(Exception):
    """Codes cannot be scaled: as :class:`MaterializedError`, where no weight has a name."""


class Rule(Protocol):
    """Runs an equation of which some operands are Scaled; None where no factor can pass."""

    def __call__(
        self, interpreter: Interpreter, eqn: JaxprEqn, operands: Operands, /
    ) -> Results: ...


@dataclasses.dataclass(eq=False)
class Interpreter:
    """Evaluates jaxprs, and lets rules run inner jaxprs, record uses of weights, materialize them.

    Attributes:
      rule: runs every equation that has a Scaled among its operands.
      explains: whether weights carry their paths, and their uses are listed.
      has_codes: whether a weight is quantized: only then are frozen arrays tracked.
      materialized: whether a weight was multiplied out.
      uses: each use of each weight, once and in order.
      bodies: the function made of each inner jaxpr, so that JAX traces layers alike once.
      facts: what is known of arrays: ``zero``, all entries are; ``runs``, the length of runs of
        equal entries along each axis of a factor; ``frozen``, computed from frozen parameters and
        constants alone, no activation or adapted weight: that tells a zero point from a bias.
    """

    rule: Rule
    explains: bool = False
    has_codes: bool = False
    materialized: bool = False
    uses: dict[WeightUse, None] = dataclasses.field(default_factory=dict)
    bodies: dict[Any, Callable[..., list[Value]]] = dataclasses.field(default_factory=dict)
    facts: Facts = dataclasses.field(default_factory=Facts)

    def attach(self, weight: jax.Array, vectors: ScaleVectors, path: str) -> Scaled:
        """A weight with factors that wait to scale it, and the low-rank term that waits too."""
        low_rank = None
        if vectors.down is not None:
            low_rank = LowRank(
                vectors.down,
                vectors.up,
                vectors.keys,
                side_axes(vectors.axes, "down"),
                side_axes(vectors.axes, "up"),
                stack_axes(vectors.axes),
                vectors.dropout,
            )
        origin = (path,) if self.explains else ()
        return Scaled.of(weight, vectors.factors(), origin, low_rank=low_rank)

    def run(self, jaxpr: jax_versions.AnyJaxpr, operands: Operands) -> list[Value]:
        """Evaluates a jaxpr on operands of which some may be Scaled; so may the results be."""
        jaxpr, consts = jax_versions.open_jaxpr(jaxpr)
        values: dict[Var, Value] = {}

        def read(atom: Var | Literal) -> Value:
            return atom.val if isinstance(atom, Literal) else values[atom]

        values.update(zip(jaxpr.constvars, consts, strict=True))
        self.freeze(consts)
        values.update(zip(jaxpr.invars, operands, strict=True))
        for eqn in jaxpr.eqns:
            with jax_versions.context_of(eqn):
                operands = [read(atom) for atom in eqn.invars]
                self.freeze([atom.val for atom in eqn.invars if isinstance(atom, Literal)])
                results = self._run_equation(eqn, operands)
                if all(self.are_frozen(operands)):
                    self.freeze(results)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _run_equation(self, eqn: JaxprEqn, operands: Operands) -> list[Value]:
        if any(isinstance(x, Scaled) for x in operands):
            results = self.rule(self, eqn, operands)
            if results is None:
                results = jax_versions.bind(eqn, *self.materialize(eqn, operands))
            return results
        results = jax_versions.bind(eqn, *operands)
        if jax_versions.name_of(eqn) in KEEPS_ZEROS:
            x: Any = operands[0]
            if self.facts.get(x, "zero") or np.ndim(x) == 0 and self.is_zero(x):
                self.facts.note(results[0], zero=True)
        return results

    def is_zero(self, x: Value) -> bool:
        """Whether an array is known to be all zero, so that no scale changes it.

        Of a traced array it is known where it was broadcast from a constant.
        """
        if self.facts.get(x, "zero"):
            return True
        if isinstance(x, Scaled | jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
            return False
        return jnp.issubdtype(jnp.result_type(x), jnp.number) and not np.asarray(x).any()

    def freeze(self, arrays: Operands) -> None:
        """Notes that arrays are computed from frozen parameters and constants alone."""
        if self.has_codes:
            for x in arrays:
                self.facts.note(x, frozen=True)

    def are_frozen(self, operands: Operands) -> tuple[bool, ...]:
        """Whether each operand is known to come from frozen parameters and constants alone."""
        if not self.has_codes:
            return (False,) * len(operands)
        return tuple(self.facts.get(x, "frozen", False) for x in operands)

    def freeze_again(self, frozen: Sequence[bool], operands: Operands) -> Operands:
        """Notes which operands, as an inner function gets them, are frozen, and returns them."""
        self.freeze([x for x, is_frozen in zip(operands, frozen, strict=True) if is_frozen])
        return operands

    def record(self, eqn: JaxprEqn, weight: Value, onto: Value | None = None) -> None:
        """Notes that a weight's vectors multiply activations, or (onto) another adapted weight."""
        if isinstance(weight, Scaled):
            self._note(weight, ON_ACTIVATIONS, eqn)
        if isinstance(onto, Scaled):
            self._note(onto, MATERIALIZED, eqn, BOTH)

    def materialize(
        self, eqn: JaxprEqn | None, operands: Operands, reason: str = ""
    ) -> list[jax.Array]:
        """The operands with every Scaled among them multiplied out, and noted.

        Args:
          eqn: what takes them; None where the function returns them.
          operands: arrays, plain or scaled.
          reason: why; the usual one for this equation if empty.
        """
        return [self._resolve(x, eqn, reason) if isinstance(x, Scaled) else x for x in operands]

    def materialize_where(
        self, condition: Callable[[Scaled], bool], eqn: JaxprEqn, operands: Operands
    ) -> list[Value]:
        """The operands with every Scaled among them that meets a condition multiplied out."""
        return [
            self._resolve(x, eqn) if isinstance(x, Scaled) and condition(x) else x for x in operands
        ]

    def _resolve(self, x: Scaled, eqn: JaxprEqn | None, reason: str = "") -> jax.Array:
        if not jnp.issubdtype(x.value.dtype, jnp.inexact):
            if not self.explains:
                raise Refused
            raise MaterializedError(
                f"{' * '.join(x.origin)}: integer codes cannot be scaled at `{_name(eqn)}`"
                f" ({_where(eqn)}); dequantize them first, or adapt the out side alone"
            )
        if x.product:
            self._note(x, ON_ACTIVATIONS, eqn)
        elif x.is_vector:
            self._note(x, ON_ACTIVATIONS, eqn, "it is no larger than its vector")
        else:
            self._note(x, MATERIALIZED, eqn, reason or _reason(eqn))
        return multiplied_out(x)

    def _note(self, x: Scaled, how: str, eqn: JaxprEqn | None, reason: str = "") -> None:
        self.materialized |= how == MATERIALIZED
        for path in x.origin:
            self.uses[WeightUse(path, how, _name(eqn), _where(eqn), reason)] = None


def _name(eqn: JaxprEqn | None) -> str:
    return "return" if eqn is None else jax_versions.name_of(eqn)


def _where(eqn: JaxprEqn | None) -> str:
    return "" if eqn is None else jax_versions.where(eqn)


def _reason(eqn: JaxprEqn | None) -> str:
    if eqn is None:
        return "the function returns it"
    name = _name(eqn)
    if name.startswith("custom_"):
        return "its custom derivative rule takes the whole weight"
    if name in ("scan", "while"):
        return "the loop changes it, or returns it"
    return f"no vector passes through this `{name}`"
