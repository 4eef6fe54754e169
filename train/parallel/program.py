"""What a compiled program takes and does on one device: memory, products, collectives.

XLA's own cost analysis counts the body of a loop once, however often it runs. Here it is read from
the program's text, which says how often. Work is that of the matrix products and the collectives;
everything else takes little next to them, and an accelerator's compiler fuses it into them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of a number; elsewhere the name says it
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S*)? \{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Memory(NamedTuple):
    """Bytes of a program on one device.

    Attributes:
      given: its arguments.
      returned: its results that do not take the place of arguments.
      temporary: all that it holds meanwhile.
    """

    given: int
    returned: int
    temporary: int

    @property
    def total(self) -> int:
        """What the program takes."""
        return sum(self)


class Collective(NamedTuple):
    """All collectives of one kind, in one run of the program.

    Attributes:
      times: how many there are.
      bytes: of their results, on one device.
      received: bytes that a device gets from others where they are passed around a ring.
    """

    times: int
    bytes: int
    received: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does in one run of a program.

    Attributes:
      flops: of its matrix products.
      traffic: bytes of their operands and results.
      collectives: by kind.
      unbounded: loops of which the program does not say how often they run; each is counted once.
    """

    flops: float
    traffic: float
    collectives: Mapping[str, Collective]
    unbounded: int = 0

    @property
    def received(self) -> float:
        """Bytes that a device gets from others."""
        return sum(each.received for each in self.collectives.values())


def memory(compiled: Any) -> Memory | None:
    """Returns what a compiled function takes by XLA's analysis; None where there is none."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )


def work(text: str) -> Work:
    """Returns what a program does.

    Args:
      text: of its optimized HLO, as ``jax.stages.Compiled.as_text`` gives it. A body of a loop
        counts as often as it runs, and of the branches of a conditional the one with the most
        products.

    >>> import jax
    >>> def thrice(x):
    ...     return jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]
    >>> x = jax.ShapeDtypeStruct((8, 8), "float32")
    >>> found = work(jax.jit(thrice).lower(x).compile().as_text())
    >>> found.flops == 3 * 2 * 8**3, found.traffic == 3 * 3 * 8 * 8 * 4
    (True, True)
    """
    computations, entry = _parsed(text)
    match = re.search(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    devices = int(match[1]) if match else 1
    totals: dict[str, collections.Counter] = {}

    def total(name: str) -> collections.Counter:
        if name not in totals:
            totals[name] = _sum(computations[name], total, devices)
        return totals[name]

    found = total(entry)
    kinds = {
        kind: Collective(
            int(found[kind, "times"]), int(found[kind, "bytes"]), found[kind, "received"]
        )
        for kind in KINDS
        if found[kind, "times"]
    }
    return Work(found["flops"], found["traffic"], kinds, int(found["unbounded"]))


class _Instruction(NamedTuple):
    name: str
    type: str
    op: str
    rest: str  # operands and attributes


def _parsed(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the first one."""
    found: dict[str, list[_Instruction]] = {}
    here: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if match := _COMPUTATION.match(line):
                here = found[match[1]] = []
                entry = match[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            here.append(_Instruction(*match.groups()))
    return found, entry


def _sum(instructions: list[_Instruction], total: Any, devices: int) -> collections.Counter:
    """What a computation does, with those that it calls."""
    types = {each.name: each.type for each in instructions}
    found: collections.Counter = collections.Counter()  # of int and float
    for each in instructions:
        kind, _, phase = each.op.partition("-start")
        if each.op == "dot":
            _add(found, _product(each, types))
        elif kind in KINDS and not phase:
            _add(found, _collective(each, kind, types, devices))
        called = list(_called(each.rest))
        if each.op == "while":
            trips = _TRIPS.search(each.rest)
            found["unbounded"] += not trips
            for name in called:
                _add(found, total(name), int(trips[1]) if trips else 1)
        elif each.op == "conditional":
            _add(found, max(map(total, called), key=lambda branch: branch["flops"]))
        else:
            for name in called:
                _add(found, total(name))
    return found


def _add(found: Any, more: Mapping[Any, float], times: int = 1) -> None:
    for key, number in more.items():
        found[key] += times * number


def _called(rest: str) -> Iterator[str]:
    for one, several in _CALLED.findall(rest):
        yield from [one] if one else re.findall(r"[\w.\-]+", several)


def _product(each: _Instruction, types: Mapping[str, str]) -> dict[str, float]:
    operands = [_arrays(kind)[0] for kind in _operands(each.rest, types)]
    [result] = _arrays(each.type)
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
    axes = match[1] if match else ""
    contracted = math.prod(operands[0][1][int(axis)] for axis in axes.split(",") if axis)
    traffic = sum(map(_bytes, (*operands, result)))
    return {"flops": 2.0 * math.prod(result[1]) * contracted, "traffic": traffic}


def _collective(
    each: _Instruction, kind: str, types: Mapping[str, str], devices: int
) -> dict[Any, float]:
    results = sum(map(_bytes, _arrays(each.type)))
    if each.op.endswith("-start") and kind != "all-reduce":  # returns its operands too
        given = sum(_bytes(x) for name in _operands(each.rest, types) for x in _arrays(name))
        results = given if kind == "collective-permute" else results - given
    size = _group(each.rest, devices)
    others = (size - 1) / size
    received: float = {
        "all-reduce": 2 * results * others,
        "reduce-scatter": results * (size - 1),
        "collective-permute": results,
    }.get(kind, results * others)
    return {(kind, "times"): 1, (kind, "bytes"): results, (kind, "received"): received}


def _group(rest: str, devices: int) -> int:
    """How many devices take part in a collective together: all, where no groups are named."""
    if match := _MESH.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # or a part of an axis
        return math.prod(int(part or sizes[name]) for name, part in named)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match[1].split(","))
    return devices


def _operands(rest: str, types: Mapping[str, str]) -> list[str]:
    """The types of an instruction's operands."""
    names = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
    return [types[name] for name in names]


def _arrays(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each array of a type."""
    return [
        (dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in _ARRAY.findall(kind)
    ]


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = array
    digits = re.search(r"\d+", dtype)
    bits = _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 8
    return math.prod(shape) * max(bits, 8 if bits else 0) // 8
