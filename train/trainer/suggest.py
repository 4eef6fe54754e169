"""The fewest devices that a step fits on, and how it has to be computed there.

What a device holds between the steps follows from the shardings, and costs no compilation. What it
holds within one grows by about as much with each further row that it computes at once: two compiled
steps, of one row and of two, tell how much. What is found so is compiled in the end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import InputError
from .ahead import StepFacts, StepOptions, compile_step, held_bytes

SIZES = (16, 24, 40, 80, 96, 141, 192)  # GB of a device
USABLE = 0.9  # the part of it that a step may take; the rest is the runtime's
MOST = 256  # devices that are tried
TENSOR = 8  # devices along tensor, where as few along fsdp alone do not do
POLICIES = ("dots", "full")  # of --remat, in the order of what they take and of what they save


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """How a step fits into devices of a size.

    Attributes:
      size: GB of a device.
      options: the step on the smallest mesh; None where it fits on none that was tried.
      total: bytes that it takes on each.
      compiled: whether that is of the compiled program, and not an estimate.
    """

    size: float
    options: StepOptions | None = None
    total: int = 0
    compiled: bool = False


def shapes_to_try(batch_size: int) -> list[tuple[int, int, int]]:
    """The sizes of the meshes' axes, fewer devices first: powers of two along fsdp that divide the
    rows, alone and with tensor.

    >>> shapes_to_try(24)
    [(1, 1, 1), (1, 2, 1), (1, 4, 1), (1, 8, 1), (1, 1, 8), (1, 2, 8), (1, 4, 8), (1, 8, 8)]
    """
    shapes = [
        (1, n, tensor)
        for tensor in (1, TENSOR)
        for n in (2**i for i in range(MOST.bit_length()))
        if batch_size % n == 0 and n * tensor <= MOST
    ]
    return sorted(shapes, key=lambda shape: (math.prod(shape), shape[2]))


def suggest(
    asked: StepOptions,
    call: Callable[..., Any],
    *,
    sizes: Sequence[float] = SIZES,
    seconds: float = 120.0,
) -> Iterator[Suggestion]:
    """Finds the smallest mesh for each size of a device.

    On several devices, the batch is computed in as few parts as fit, and with as little computed
    again as fits then; on one, the other way round.

    Args:
      asked: the step; its mesh, ``remat`` and ``accumulate`` are what is looked for.
      call: ``call(fn, *args)``, of a process with devices enough; see `ahead.planning`.
      sizes: GB of a device.
      seconds: after which nothing more is compiled to be sure.
    """
    began = time.monotonic()
    compiled: dict[StepOptions, StepFacts] = {}

    def facts(options: StepOptions) -> StepFacts:
        if options not in compiled:
            compiled[options] = call(compile_step, options)
        return compiled[options]

    @functools.cache
    def held(shape: tuple[int, int, int]) -> float:
        try:
            return call(held_bytes, _on(asked, shape, "dots", 1))
        except InputError:  # an axis divides nothing of the model
            return math.inf

    @functools.cache
    def within(policy: str, spread: bool, tensor: int) -> tuple[int, int]:
        """Bytes of a step with one row on a device at once, and of each further one."""
        # On a device of its own no weight is gathered; on two, as much as on many.
        way = _on(asked, (1, 1 + spread, tensor), policy, 1)
        one, two = (facts(dataclasses.replace(way, batch_size=n << spread)) for n in (1, 2))
        first = one.total - one.held
        return first, max(0, two.total - two.held - first)

    def estimate(options: StepOptions) -> float:
        _, fsdp, tensor = shape = options.shape
        first, more = within(options.model.remat, fsdp > 1, tensor)
        return held(shape) + first + (_rows(options) // options.accumulate - 1) * more

    def fitting(options: StepOptions, size: float) -> Suggestion | None:
        room = USABLE * size * 1e9
        if options not in compiled and estimate(options) > room:
            return None
        if options in compiled or time.monotonic() - began < seconds:
            found = Suggestion(size, options, facts(options).total, True)
        else:
            found = Suggestion(size, options, int(estimate(options)))
        return found if found.total <= room else None

    for size in sizes:
        ways = (
            options
            for shape in shapes_to_try(asked.batch_size)
            if held(shape) <= USABLE * size * 1e9
            for options in _ways(asked, shape)
        )
        tried = (fitting(options, size) for options in ways)
        yield next((found for found in tried if found), Suggestion(size))


def _ways(asked: StepOptions, shape: tuple[int, int, int]) -> Iterator[StepOptions]:
    """How a batch can be computed on a mesh, what costs least first.

    A further part costs a device of its own next to nothing; on several, it gathers the weights
    once more.
    """
    way = _on(asked, shape, POLICIES[0], 1)
    parts = [n for n in range(1, _rows(way) + 1) if _rows(way) % n == 0]
    if way.devices == 1:
        ways = [(policy, n) for policy in POLICIES for n in parts]
    else:
        ways = [(policy, n) for n in parts for policy in POLICIES]
    return (_on(asked, shape, policy, n) for policy, n in ways)


def _rows(options: StepOptions) -> int:
    """Of a batch, on each device."""
    return options.batch_size // options.shape[1]


def _on(asked: StepOptions, shape: tuple[int, int, int], policy: Any, parts: int) -> StepOptions:
    model = dataclasses.replace(asked.model, remat=policy)
    return dataclasses.replace(asked, model=model, shape=shape, accumulate=parts)
