"""Dequantization: the factors wait for the weight that codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from hyperadapt_jax.interpreter import jax_versions
from hyperadapt_jax.interpreter.interpreter import Interpreter
from hyperadapt_jax.interpreter.values import (
    Operands,
    Results,
    Scaled,
    Value,
    factors_of,
    is_inexact,
    low_rank_of,
    origin_of,
    same_factors,
    value_of,
)


def mul(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> list[Value]:
    """Products of scaled and plain arrays, as in dequantization: the vectors wait."""
    size = jax_versions.result_of(eqn).size
    operands = interpreter.materialize_where(
        lambda x: x.is_vector and x.value.size < size, eqn, operands
    )
    codes = still_codes(interpreter, operands)
    if any(map(low_rank_of, operands)) and not codes:
        operands = interpreter.materialize_where(lambda x: _number(operands) is None, eqn, operands)
    if not any(isinstance(x, Scaled) for x in operands):
        return jax_versions.bind(eqn, *operands)
    [y] = jax_versions.bind(eqn, *map(value_of, operands))
    factors = [pair for x in operands for pair in factors_of(x)]
    scaled = [x for x in operands if isinstance(x, Scaled)]
    product = any(x.product for x in scaled)
    term = low_rank_of(scaled[0])
    if term is not None and not codes:
        term = term.times(_number(operands))
    return [Scaled.of(y, factors, origin_of(*scaled), product, codes, term)]


def _number(operands: Operands) -> Any:
    """The one number that a Scaled is multiplied with or divided by; None where there are more."""
    plain = [x for x in operands if not isinstance(x, Scaled)]
    return plain[0] if len(plain) == 1 and np.ndim(plain[0]) == 0 else None


def div(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """By what is not scaled: the vectors wait."""
    scaled, divisor = operands
    if not isinstance(scaled, Scaled) or isinstance(divisor, Scaled):
        return None
    if not is_inexact(scaled.value):
        return None
    codes, term = still_codes(interpreter, operands), scaled.low_rank
    if term is not None and not codes:
        if np.ndim(divisor) > 0:
            return None
        term = term.times(1 / divisor)
    [y] = jax_versions.bind(eqn, scaled.value, divisor)
    return [Scaled.of(y, scaled.factors, scaled.origin, scaled.product, codes, term)]


def affine(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """Sums of arrays with one scale; and codes minus a zero point (or that times the step)."""
    [first, *others] = [x for x in operands if isinstance(x, Scaled)]
    if others:
        [second] = others
        alike = (first.product, first.codes) == (second.product, second.codes)
        if first.low_rank is not None and not first.codes:
            return None  # a sum has the term twice
        return _waiting(eqn, operands, first) if alike and same_factors(first, second) else None
    return _waiting(eqn, operands, first) if _decodes(interpreter, operands) else None


def _decodes(interpreter: Interpreter, operands: Operands) -> bool:
    """Codes, with nothing but frozen arrays; or looked-up codes, whose zero points may be too."""
    rest = [x for x in operands if not isinstance(x, Scaled)]
    scaled = [x for x in operands if isinstance(x, Scaled)]
    if not scaled or not all(x.codes for x in scaled):
        return False
    return scaled[0].product or all(interpreter.are_frozen(rest))


def still_codes(interpreter: Interpreter, operands: Operands) -> bool:
    """Codes multiplied by a step may have a zero point to come, but not if they are looked up."""
    looked_up = any(isinstance(x, Scaled) and x.product and is_inexact(x.value) for x in operands)
    return not looked_up and _decodes(interpreter, operands)


def decode(interpreter: Interpreter, eqn: JaxprEqn, operands: Operands) -> Results:
    """Codes that are unpacked, shifted, compared, looked up: what is scaled is what they become.

    A scale of a code is a scale of everything that is decoded from it, so the vectors keep to the
    axes of the codes. None where this is no step of a decoding.
    """
    codes = [x for x in operands if isinstance(x, Scaled)]
    first, name = codes[0], jax_versions.name_of(eqn)
    if not _decodes(interpreter, operands) or not all(same_factors(x, first) for x in codes):
        return None
    if name == "mul" and len(codes) == 2 and codes[0].value is not codes[1].value:
        return _waiting(eqn, operands, first)  # as of a sign and a magnitude; else it is a square
    if name in _ON_CODES or name in _ON_INTEGERS and not any(is_inexact(x.value) for x in codes):
        return _waiting(eqn, operands, first)
    if first.low_rank is not None and name in ("gather", "bitcast_convert_type"):
        return None  # of several codes that one array packs, no term is known
    if name == "gather" and len(codes) == 1 and operands[1] is first:
        windows = eqn.params["dimension_numbers"].offset_dims
        rows = [i for i in range(jax_versions.result_of(eqn).ndim) if i not in windows]
        if any(axis >= len(rows) for axes in first.axes for axis in axes):
            return None
        return _waiting(eqn, operands, first, rows)
    if name == "bitcast_convert_type":
        ndim = jax_versions.result_of(eqn).ndim  # an axis of parts at the end, or one less
        if any(axis >= ndim for axes in first.axes for axis in axes):
            return None
        return _waiting(eqn, operands, first)
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
    eqn: JaxprEqn, operands: Operands, like: Scaled, to: Sequence[int] | None = None
) -> list[Value]:
    """Runs an equation on the values, and passes their vectors on, to other axes where given."""
    [y] = jax_versions.bind(eqn, *map(value_of, operands))
    axes = like.axes if to is None else [tuple(to[axis] for axis in spans) for spans in like.axes]
    factors = list(zip(axes, like.deltas, strict=True))
    origin = origin_of(*operands)
    return [Scaled.of(y, factors, origin, like.product, like.codes, like.low_rank)]
