"""``adapt``: a function transformation that scales weights on the activations, and ``explain``.

The function is traced to a jaxpr, which is read equation by equation with a value type of its own
for the targeted weights (``Scaled``, in ``interpreter``). A rule per primitive moves the
vectors along with their weight until a contraction, where they multiply the activations. Every
other equation runs as it is, and so does every weight that no rule can follow: it is materialised.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hyperadapt_jax import paths
from hyperadapt_jax.interpreter import jax_versions, rules
from hyperadapt_jax.interpreter.rules import KEEPS_ZEROS
from hyperadapt_jax.interpreter.values import Facts, Names, Scaled, scale
from hyperadapt_jax.scales import Scales, check
from hyperadapt_jax.tables import table

ON_ACTIVATIONS = "on activations"
MATERIALISED = "materialised"
UNUSED = "not used"
ZERO = "zero"


class MaterialisedWarning(UserWarning):
    """A targeted weight is multiplied out: right, but at a weight-sized cost in time and memory."""


class MaterialisedError(TypeError):
    """A targeted weight would have to be multiplied out, which is not allowed or not possible."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of one weight: how its vectors are applied, by which primitive, where, and why so."""

    path: str
    how: str
    primitive: str = ""
    where: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every use of every targeted weight. Printed, it is a table."""

    uses: tuple[Use, ...]

    def _paths(self, how: str) -> tuple[str, ...]:
        return tuple(sorted({use.path for use in self.uses if use.how == how}))

    on_activations = property(lambda self: self._paths(ON_ACTIVATIONS), doc="Weights, by path.")
    materialised = property(lambda self: self._paths(MATERIALISED), doc="Weights, by path.")
    unused = property(lambda self: self._paths(UNUSED), doc="Weights, by path.")

    def __str__(self) -> str:
        rows = [[u.path, u.how, u.primitive, u.where, u.reason] for u in self.uses]
        return table(["weight", "scaled", "by", "where", "why"], rows)


@dataclasses.dataclass(frozen=True)
class _Context:
    """What a rule may ask for: to enter a jaxpr, to note a use, to multiply a weight out."""

    uses: dict[Use, None] = dataclasses.field(default_factory=dict)  # an ordered set
    bodies: dict[Any, Callable] = dataclasses.field(default_factory=dict)  # one per inner jaxpr
    facts: Facts = dataclasses.field(default_factory=Facts)
    # Arrays, by identity, that are made of frozen parameters and constants alone: no activation,
    # nor an adapted weight. Where there are codes, they tell a zero point from a bias.
    frozen: dict[int, Any] | None = None

    def freeze(self, arrays: Sequence[Any]) -> None:
        if self.frozen is not None:
            self.frozen.update((id(x), x) for x in arrays)

    def is_frozen(self, x: Any) -> bool:
        return self.frozen is not None and id(x) in self.frozen

    def known(self, operands: Sequence[Any]) -> tuple[bool, ...]:
        return tuple(map(self.is_frozen, operands))

    def still(self, known: Sequence[bool], operands: Sequence[Any]) -> Sequence[Any]:
        """The operands as an inner function gets them, of which those known are frozen."""
        self.freeze([x for x, frozen in zip(operands, known, strict=True) if frozen])
        return operands

    def run(self, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr on operands of which some may be Scaled; so may the results be."""
        jaxpr, consts = jax_versions.open_jaxpr(jaxpr)
        values: dict[Any, Any] = {}

        def read(atom):
            return atom.val if hasattr(atom, "val") else values[atom]

        values.update(zip(jaxpr.constvars, consts, strict=True))
        self.freeze(consts)
        values.update(zip(jaxpr.invars, operands, strict=True))
        for eqn in jaxpr.eqns:
            with jax_versions.context_of(eqn):
                operands = [read(atom) for atom in eqn.invars]
                self.freeze([atom.val for atom in eqn.invars if hasattr(atom, "val")])
                results = self._equation(eqn, operands)
                if all(self.known(operands)):
                    self.freeze(results)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        if not any(isinstance(x, Scaled) for x in operands):
            results = jax_versions.bind(eqn, *operands)
            if jax_versions.name_of(eqn) in KEEPS_ZEROS:
                x = operands[0]
                if self.facts.of(x) == ZERO or np.ndim(x) == 0 and self.is_zero(x):
                    self.facts.note(results[0], ZERO)
            return results
        results = rules.apply(self, eqn, operands)
        if results is None:
            results = jax_versions.bind(eqn, *self.plain(eqn, operands))
        return results

    def is_zero(self, x: Any) -> bool:
        """Whether an array is known to hold nothing but zeros, which any scale leaves as they are.

        Traced, it is known where it was broadcast from a constant. A constant is looked at.
        """
        if self.facts.of(x) == ZERO:
            return True
        if isinstance(x, Scaled | jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
            return False
        return jnp.issubdtype(jnp.result_type(x), jnp.number) and not np.asarray(x).any()

    def applied(self, eqn: Any, weight: Any, onto: Any = None) -> None:
        """Notes that a weight's vectors multiply activations, or (onto) another adapted weight."""
        if isinstance(weight, Scaled):
            self._note(weight, ON_ACTIVATIONS, eqn)
        if isinstance(onto, Scaled):
            self._note(onto, MATERIALISED, eqn, "it is multiplied with another adapted weight")

    def plain(self, eqn: Any, operands: Sequence[Any], reason: str = "") -> list[Any]:
        """The operands with every Scaled among them multiplied out, and noted."""
        return [self._resolve(x, eqn, reason) if isinstance(x, Scaled) else x for x in operands]

    def _resolve(self, x: Scaled, eqn: Any, reason: str) -> jax.Array:
        if not jnp.issubdtype(x.value.dtype, jnp.inexact):
            raise MaterialisedError(
                f"{' * '.join(x.origin)}: integer codes cannot be scaled at `{_name(eqn)}`"
                f" ({_where(eqn)}); dequantize them first, or adapt the out side alone"
            )
        if x.product:
            self._note(x, ON_ACTIVATIONS, eqn)
        elif x.is_vector:
            self._note(x, ON_ACTIVATIONS, eqn, "it is no larger than its vector")
        else:
            self._note(x, MATERIALISED, eqn, reason or _reason(eqn))
        return scale(x.value, x.factors)

    def _note(self, x: Scaled, how: str, eqn: Any, reason: str = "") -> None:
        for path in dict.fromkeys(x.origin):
            self.uses[Use(path, how, _name(eqn), _where(eqn), reason)] = None


def _name(eqn: Any) -> str:
    return jax_versions.name_of(eqn) if eqn is not None else "return"


def _where(eqn: Any) -> str:
    return jax_versions.where(eqn) if eqn is not None else ""


def _reason(eqn: Any) -> str:
    if eqn is None:
        return "the function returns it"
    name = _name(eqn)
    if name.startswith("custom_"):
        return "a derivative rule of its own takes the whole weight"
    if name in ("scan", "while"):
        return "the loop changes it, or hands it out"
    return f"no vector passes through this `{name}`"


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A function with scaled weights, as :func:`adapt` makes it.

    Two of them are equal where their functions are: what was compiled for one serves the other.
    """

    fn: Callable[..., Any]
    materialise: str

    @property
    def __name__(self) -> str:
        return f"adapt({getattr(self.fn, '__name__', type(self.fn).__name__)})"

    def __call__(self, params: Any, scales: Scales, *args: Any, **kwargs: Any) -> Any:
        result, uses = self._run(params, scales, args, kwargs, Names)
        if self.materialise != "allow":
            if any(use.how == MATERIALISED for use in uses):
                found = explain(self, params, scales, *args, **kwargs)
                lost = [use for use in found.uses if use.how == MATERIALISED]
                message = (
                    f"{len({use.path for use in lost})} of {len(scales)} adapted weights are"
                    " multiplied out instead of scaled on the activations:\n"
                    f"{Explanation(tuple(lost))}\n"
                    'materialise="allow" accepts this; hyperadapt_jax.explain shows every weight'
                )
                if self.materialise == "error":
                    raise MaterialisedError(message)
                warnings.warn(message, MaterialisedWarning, stacklevel=2)
        return result

    def _run(self, params, scales, args, kwargs, names_type) -> tuple[Any, list[Use]]:
        weights = paths.arrays(params)
        check(scales, weights)
        operands, build = paths.separate((params, args, kwargs))
        out_def = None

        def flat(arrays):
            nonlocal out_def
            params, args, kwargs = build(arrays)
            results, out_def = jax.tree.flatten(self.fn(params, *args, **kwargs))
            return results

        jaxpr = jax.make_jaxpr(flat)(operands)
        codes = any(not jnp.issubdtype(weights[path].dtype, jnp.inexact) for path in scales)
        context = _Context(frozen={} if codes else None)
        context.freeze(
            [x for x, path in zip(operands, weights, strict=False) if path not in scales]
        )
        for i, (path, weight) in enumerate(weights.items()):  # the parameters come first
            if path in scales:
                operands[i] = Scaled.of(weight, scales[path].factors(), names_type([path]))
        results = context.plain(None, context.run(jaxpr, operands))
        used = {use.path for use in context.uses}
        unused = [Use(path, UNUSED) for path in scales if path not in used]
        return out_def.unflatten(results), [*context.uses, *unused]


def adapt(
    fn: Callable[..., Any], *, materialise: Literal["allow", "warn", "error"] = "warn"
) -> Adapted:
    """Transforms ``fn(params, *args)`` into ``forward(params, scales, *args)``.

    The same function with every weight ``W`` in scales replaced by ``diag(1+col) W diag(1+row)``
    (kernels stored in x out), computed on the activations: no scaled copy of a weight and no
    gradient of a weight's size. A weight is multiplied out where that costs less, as for a vector
    that would repeat the activations many times over. Scales multiply in float32, and nothing is
    rounded that the function itself keeps. At zero deltas every product is exact, so the results
    are the base's, bit for bit, as far as XLA compiles the rest of both programs alike (under jit
    it may leave out a rounding to bfloat16 that the base function states). It composes with
    ``jit``, ``grad``, ``jvp``, ``vmap``, ``checkpoint``, ``shard_map`` and with itself, and
    enters those (and ``scan``, ``while_loop``, ``cond``) inside fn. A function with a derivative
    rule of its own gets the multiplied-out weight, so that its rule holds.

    Args:
      fn: any JAX function whose first argument is a pytree of parameters. It is traced, so it must
        be traceable, as for ``jax.jit``; arguments that are no arrays reach it as they are.
      materialise: what to do where a weight must be multiplied out: ``"allow"`` it, ``"warn"`` with
        a :class:`MaterialisedWarning`, or raise a :class:`MaterialisedError`.

    Returns:
      ``forward(params, scales, *args, **kwargs)``. It raises ValueError where scales do not fit
      params. Outside ``jax.jit`` it runs operation by operation: jit it, as any training step.

    >>> import hyperadapt_jax as ha
    >>> params = {"w": jnp.ones((3, 2))}
    >>> scales = {"w": ha.ScaleVectors(row=jnp.array([0.0, 1.0]), col=jnp.zeros(3), axes="in out")}
    >>> ha.adapt(lambda params, x: x @ params["w"])(params, scales, jnp.ones(3))
    Array([3., 6.], dtype=float32)
    """
    if materialise not in ("allow", "warn", "error"):
        raise ValueError(f'materialise must be "allow", "warn" or "error", not {materialise!r}')
    if not callable(fn):
        raise TypeError(f"adapt takes a function of (params, *args), not {type(fn).__name__}")
    return Adapted(fn, materialise)


def explain(
    forward: Adapted, params: Any, scales: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Explanation:
    """Which weights are scaled on the activations, which are materialised, where and why.

    Traces the function without running it; ``jax.ShapeDtypeStruct`` will do for every array.

    Args:
      forward: what :func:`adapt` returned (before ``jax.jit``).
      params, scales, *args, **kwargs: as for forward.

    Returns:
      An :class:`Explanation`; print it.

    Raises:
      TypeError: forward is not what adapt returned.

    >>> import hyperadapt_jax as ha
    >>> params = {"w": jnp.ones((3, 2))}
    >>> scales = ha.init(ha.plan(params, ("w", "in out")))
    >>> forward = ha.adapt(lambda params, x: x @ params["w"])
    >>> ha.explain(forward, params, scales, jnp.ones(3)).on_activations
    ('w',)
    """
    if not isinstance(forward, Adapted):
        raise TypeError(
            "explain takes what adapt(fn) returned, before jit or grad,"
            f" not {type(forward).__name__}"
        )
    uses: list[Use] = []
    arrays, build = paths.separate((params, scales, args, kwargs))

    def trace(arrays):
        result, found = forward._run(*build(arrays), tuple)
        uses.extend(found)
        return result

    jax.eval_shape(trace, arrays)
    return Explanation(tuple(uses))
