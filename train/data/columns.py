"""What a column of rows may hold, and how each value is checked."""

from __future__ import annotations

import collections
import dataclasses
import decimal
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from hyperadapt_jax import paths

from ..errors import InputError, first_line


@dataclasses.dataclass(frozen=True)
class Text:
    """A column of text; numbers, true and false are taken as JSON writes them, without exponent."""

    feature = datasets.Value("string")

    def parse(self, value: Any) -> str:
        """The value as text."""
        _check(value)
        if not isinstance(value, str | int | float):
            raise InputError(f"is {kind(value)}: expected text")
        if isinstance(value, float) and (value == 0 or 1e-6 <= abs(value) < 1e21):
            return format(decimal.Decimal(repr(value)), "f")
        return value if isinstance(value, str) else json.dumps(value)


@dataclasses.dataclass(frozen=True)
class Number:
    """A column of numbers between two bounds, which count in."""

    low: float = -math.inf
    high: float = math.inf
    feature = datasets.Value("float32")

    def parse(self, value: Any) -> float:
        """The value as a number."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and self.low <= number <= self.high):
            raise InputError(
                f"is {_shown(value)}: expected a number from {self.low} to {self.high}"
            )
        return number


@dataclasses.dataclass(frozen=True)
class Label:
    """A column of classes, given by name or by number.

    Attributes:
      names: of the classes, in the order of their numbers.
      missing: what stands where a row has no label; such rows come as None.
    """

    names: tuple[str, ...]
    missing: tuple[str, ...] = ()
    feature = datasets.Value("int32")

    def parse(self, value: Any) -> int | None:
        """The number of the class."""
        if str(value) in self.missing:
            return None
        if value in self.names:
            return self.names.index(value)
        numbers = {str(i): i for i in range(len(self.names))}
        if isinstance(value, bool) or str(value) not in numbers:
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(self.names))
            raise InputError(f"is {_shown(value)}: expected one of {known}")
        return numbers[str(value)]


@dataclasses.dataclass(frozen=True)
class Messages:
    """A column of conversations: lists of ``{"role": ..., "content": ...}`` with other fields."""

    feature = datasets.Value("string")  # JSON, which keeps every digit

    def parse(self, value: Any) -> str:
        """The conversation as JSON, each message with its fields, null ones left out.

        A message without text is one whose text is empty, if it has something else to say.
        """
        _check(value)
        if not isinstance(value, list) or not value:
            raise InputError(f"is {kind(value)}: expected a list of messages")
        turns = []
        for number, turn in enumerate(value, 1):
            fields = {k: v for k, v in turn.items() if v is not None} if _object(turn) else {}
            if fields.keys() - {"role", "content", "weight"} and fields.get("role") == "assistant":
                fields.setdefault("content", "")
            if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
                raise InputError(f"has no text in 'role' and 'content' of message {number}")
            if fields.get("weight", 1) not in (0, 1):
                raise InputError(
                    f"has no weight of 0 or 1 in message {number}: {_shown(fields['weight'])}"
                )
            turns.append(fields)
        return json.dumps(turns, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class Tools:
    """A column, which rows may lack, of what a conversation can call: a list of objects."""

    feature = datasets.Value("string")  # JSON, which keeps every digit
    optional = True

    def parse(self, value: Any) -> str | None:
        """The tools as JSON; None where there are none. They may come as the text of that JSON."""
        if isinstance(value, str):
            try:
                value = json.loads(value, object_pairs_hook=unique_pairs) if value.strip() else None
            except (ValueError, RecursionError) as error:
                raise InputError(f"is text that is not JSON: {first_line(error)}") from None
        if value is None or value == []:
            return None
        _check(value)
        if not isinstance(value, list) or not all(map(_object, value)):
            raise InputError(f"is {kind(value)}: expected a list of objects")
        return json.dumps(value, ensure_ascii=False)


Column = Text | Number | Label | Messages | Tools


def _object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _check(value: Any) -> None:
    """Refuses what no format should hold: null, NaN, infinity, half a character, a name twice.

    Within lists and objects, null may be meant.
    """
    if value is None:
        raise InputError("is null: expected a value")
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"is or holds {json.dumps(value)}: expected a finite number or text")
        if isinstance(value, str) and (found := _SURROGATE.search(value)):
            raise InputError(
                f"is or holds half a character, {found[0]!r},"
                f" after {value[: found.start()][-20:]!r}"
            )
        if _object(value):
            if twice := [name for name, inner in value.items() if inner is TWICE]:
                raise InputError(f"holds {twice[0]!r} twice in one object")
            values += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            values += value


_SURROGATE = re.compile("[\ud800-\udfff]")


def kind(value: Any) -> str:
    """What a value is, in a word that those know who wrote it."""
    names = {
        type(None): "null",
        bool: "true or false",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else repr(type(value))
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."


Row = Mapping[str, Any]

# What stands for a row that lacks columns, and for the value of a column that comes twice.
SHORT, TWICE = object(), object()


def parse_row(where: str, row: Row | None, columns: Mapping[str, Column]) -> dict[str, Any]:
    """The wanted columns of a row."""
    if row is SHORT:
        return dict.fromkeys(columns)
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is {kind(row)}: expected an object with named columns")
    values: dict[str, Any] = {}
    for name, column in columns.items():
        if name not in row and getattr(column, "optional", False):
            values[name] = None
            continue
        if name not in row:
            near = paths.suggest(name, row) if row else "it has none"
            raise InputError(f"{where}: there is no column {name!r}; {near}")
        try:
            if row[name] is TWICE:
                raise InputError("comes twice")
            values[name] = column.parse(row[name])
        except InputError as error:
            raise InputError(f"{where}: column {name!r} {error}") from None
    return values


def unique_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, in which a name that comes twice has the value `TWICE`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = collections.Counter(name for name, _ in pairs)
        found |= {name: TWICE for name, count in names.items() if count > 1}
    return found
