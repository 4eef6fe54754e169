"""The only place that knows one JAX version from another, and how a jaxpr is read.

JAX 0.10 keeps a scan's counts in ``num_consts`` and ``num_carry``; from 0.11 they are the sizes of
the first groups of ``ft_in``. JAX 0.12 merged ``ClosedJaxpr`` into ``Jaxpr``. Under the flags that
announce its next versions (``jax_remat3`` and others) ``jax.checkpoint``, ``checkpoint_name`` and
functions with custom derivatives are one primitive, ``call_hi_primitive``, whose parameter is
an object of a class for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn
from jax.sharding import Sharding

AnyJaxpr: TypeAlias = Any  # a Jaxpr or, before JAX 0.12, a ClosedJaxpr

_OBJECTS = {
    "RematTraced": "remat2",
    "CheckpointName": "name",
    "CheckpointNameFwd": "name",
    "CustomJVPTraced": "custom_jvp_call",
    "CustomVJPTraced": "custom_vjp_call",
}


def name_of(eqn: JaxprEqn) -> str:
    """The name of an equation's primitive, one and the same under all flags."""
    if eqn.primitive.name != "call_hi_primitive":
        return eqn.primitive.name
    name = type(eqn.params["_prim"]).__name__
    return _OBJECTS.get(name, name)


def operand_of(eqn: JaxprEqn, index: int) -> Any:
    """The shape and dtype of one of an equation's operands."""
    return eqn.invars[index].aval


def result_of(eqn: JaxprEqn) -> Any:
    """The shape and dtype of an equation's first result."""
    return eqn.outvars[0].aval


def remat_params(eqn: JaxprEqn) -> tuple[AnyJaxpr, dict[str, Any]]:
    """The jaxpr inside a ``jax.checkpoint``, and the keyword arguments that it was called with."""
    params = eqn.params["_prim"].params if "_prim" in eqn.params else eqn.params
    return params["jaxpr"], {k: params[k] for k in ("policy", "prevent_cse") if k in params}


def open_jaxpr(jaxpr: AnyJaxpr) -> tuple[Jaxpr, tuple[Any, ...]]:
    """The jaxpr and the constants of a jaxpr, open or closed (one class from JAX 0.12)."""
    return (jaxpr.jaxpr, tuple(jaxpr.consts)) if hasattr(jaxpr, "consts") else (jaxpr, ())


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan equation's operands are constants, and how many are carried."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts.vals), len(carry.vals)
    return params["num_consts"], params["num_carry"]


def jit_shardings(params: dict[str, Any]) -> tuple[list[Sharding | None], list[Sharding | None]]:
    """What shardings a jit equation states for its operands and results; None where none."""

    def stated(key: str) -> list[Sharding | None]:
        return [s if isinstance(s, Sharding) else None for s in params.get(key, ())]

    return stated("in_shardings"), stated("out_shardings")


def bind(eqn: JaxprEqn, *operands: Any, **changed: Any) -> list[Any]:
    """Runs an equation on new operands, some parameters changed, and returns all its results."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    results = eqn.primitive.bind(*operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


@contextlib.contextmanager
def context_of(eqn: JaxprEqn) -> Iterator[None]:
    """Runs what is inside under an equation's name scope, traceback and context."""
    source = eqn.source_info
    stack = source_info_util.current_name_stack() + source.name_stack
    with source_info_util.user_context(source.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def where(eqn: JaxprEqn) -> str:
    """The user's line that an equation comes from: ``file:line:column (function)``."""
    return source_info_util.summarize(eqn.source_info)
