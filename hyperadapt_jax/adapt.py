"""``adapt``: a function transformation that adapts weights on the activations, and ``explain``.

The function is traced to a jaxpr, which is evaluated equation by equation with a separate value
type for the targeted weights (``Scaled``, in ``interpreter``). A rule per primitive moves the
vectors, and the sides of a low-rank term, along with their weight until a contraction, where they
are applied to the activations. Every other equation runs as it is, and so does every weight that no
rule can follow: it is materialized.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from hyperadapt_jax import paths
from hyperadapt_jax.interpreter import rules
from hyperadapt_jax.interpreter.interpreter import (
    MATERIALIZED,
    ON_ACTIVATIONS,
    Interpreter,
    MaterializedError,
    Refused,
    WeightUse,
)
from hyperadapt_jax.scales import Scales, check
from hyperadapt_jax.tables import table

UNUSED = "not used"


class MaterializedWarning(UserWarning):
    """A targeted weight is materialized: correct, but at a weight-sized cost in time and memory."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every use of every targeted weight; it prints as a table."""

    uses: tuple[WeightUse, ...]

    def _paths(self, how: str) -> tuple[str, ...]:
        return tuple(sorted({use.path for use in self.uses if use.how == how}))

    on_activations = property(lambda self: self._paths(ON_ACTIVATIONS), doc="Weights, by path.")
    materialized = property(lambda self: self._paths(MATERIALIZED), doc="Weights, by path.")
    unused = property(lambda self: self._paths(UNUSED), doc="Weights, by path.")

    def __str__(self) -> str:
        rows = [[u.path, u.how, u.primitive, u.where, u.reason] for u in self.uses]
        return table(["weight", "scaled", "by", "where", "why"], rows)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A function with scaled weights, as :func:`adapt` makes it.

    Two of them are equal where their functions are: what was compiled for one serves the other.
    """

    fn: Callable[..., Any]
    materialize: str

    @property
    def __name__(self) -> str:
        return f"adapt({getattr(self.fn, '__name__', type(self.fn).__name__)})"

    def __call__(self, params: Any, scales: Scales, *args: Any, **kwargs: Any) -> Any:
        refused = False
        try:
            result, interpreter = self._run(params, scales, args, kwargs)
        except Refused:
            refused = True
        if refused or interpreter.materialized and self.materialize != "allow":
            # Traced again, with paths; where codes cannot be scaled, it raises.
            found = explain(self, params, scales, *args, **kwargs)
            lost = [use for use in found.uses if use.how == MATERIALIZED]
            message = (
                f"{len({use.path for use in lost})} of {len(scales)} adapted weights are"
                " multiplied out instead of scaled on the activations:\n"
                f"{Explanation(tuple(lost))}\n"
                'materialize="allow" accepts this; hyperadapt_jax.explain shows every weight'
            )
            if refused or self.materialize == "error":
                raise MaterializedError(message)
            warnings.warn(message, MaterializedWarning, stacklevel=2)
        return result

    def _run(
        self,
        params: Any,
        scales: Scales,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        explains: bool = False,
    ) -> tuple[Any, Interpreter]:
        weights = paths.arrays(params)
        check(scales, weights)
        operands, build = paths.partition_arrays((params, args, kwargs))
        out_def: Any = None

        def flat(arrays: list[Any]) -> list[Any]:
            nonlocal out_def
            params, args, kwargs = build(arrays)
            results, out_def = jax.tree.flatten(self.fn(params, *args, **kwargs))
            return results

        jaxpr = jax.make_jaxpr(flat)(operands)
        has_codes = any(not jnp.issubdtype(weights[path].dtype, jnp.inexact) for path in scales)
        interpreter = Interpreter(rules.apply, explains, has_codes)
        interpreter.freeze(
            [x for x, path in zip(operands, weights, strict=False) if path not in scales]
        )
        for i, (path, weight) in enumerate(weights.items()):  # the parameters come first
            if path in scales:
                operands[i] = interpreter.attach(weight, scales[path], path)
        results = interpreter.materialize(None, interpreter.run(jaxpr, operands))
        return out_def.unflatten(results), interpreter


def adapt(
    fn: Callable[..., Any], *, materialize: Literal["allow", "warn", "error"] = "warn"
) -> Adapted:
    """Transforms ``fn(params, *args)`` into ``forward(params, scales, *args)``.

    The same function with every weight ``W`` in scales replaced by
    ``diag(1+col) (W + down up^T) diag(1+row)`` (kernels stored in x out), computed on the
    activations: no adapted copy of a weight and no gradient of a weight's size. A weight is
    multiplied out where that costs less, as for a vector that would repeat the activations many
    times. Scales multiply in float32, and nothing is rounded that the function itself keeps; the
    two products of a low-rank term run in the dtype of the activations. At zero deltas every
    product is exact, so the results are the base's, bit for bit, as far as XLA compiles the rest of
    both programs alike (under jit it may omit a rounding to bfloat16 that the base function
    states). It composes with
    ``jit``, ``grad``, ``jvp``, ``vmap``, ``checkpoint``, ``shard_map`` and with itself, and
    enters those (and ``scan``, ``while_loop``, ``cond``) inside fn. A function with a custom
    derivative rule gets the multiplied-out weight, so that its rule holds.

    Args:
      fn: any JAX function whose first argument is a pytree of parameters. It is traced, so it must
        be traceable, as for ``jax.jit``; arguments that are not arrays are passed as they are.
      materialize: what to do where a weight must be multiplied out: ``"allow"`` it, ``"warn"`` with
        a :class:`MaterializedWarning`, or raise a :class:`MaterializedError`.

    Returns:
      ``forward(params, scales, *args, **kwargs)``. It raises ValueError where scales do not fit
      params. Outside ``jax.jit`` it runs operation by operation: jit it, as any training step.

    >>> import hyperadapt_jax as ha
    >>> params = {"w": jnp.ones((3, 2))}
    >>> scales = {"w": ha.ScaleVectors(row=jnp.array([0.0, 1.0]), col=jnp.zeros(3), axes="in out")}
    >>> ha.adapt(lambda params, x: x @ params["w"])(params, scales, jnp.ones(3))
    Array([3., 6.], dtype=float32)
    """
    if materialize not in ("allow", "warn", "error"):
        raise ValueError(f'materialize must be "allow", "warn" or "error", not {materialize!r}')
    if not callable(fn):
        raise TypeError(f"adapt takes a function of (params, *args), not {type(fn).__name__}")
    return Adapted(fn, materialize)


def explain(
    forward: Adapted, params: Any, scales: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Explanation:
    """Reports which weights are scaled on the activations, which are materialized, where and why.

    Traces the function without running it; every array may be a ``jax.ShapeDtypeStruct``.

    Args:
      forward: what :func:`adapt` returned (before ``jax.jit``).
      params, scales, *args, **kwargs: as for forward.

    Returns:
      An :class:`Explanation`, which prints as a table.

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
    uses: list[WeightUse] = []
    arrays, build = paths.partition_arrays((params, scales, args, kwargs))

    def trace(arrays: list[Any]) -> Any:
        params, scales, args, kwargs = build(arrays)
        result, interpreter = forward._run(params, scales, args, kwargs, explains=True)
        uses.extend(interpreter.uses)
        return result

    jax.eval_shape(trace, arrays)
    used = {use.path for use in uses}
    return Explanation((*uses, *(WeightUse(path, UNUSED) for path in scales if path not in used)))
