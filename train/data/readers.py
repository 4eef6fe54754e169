"""Rows from files and from the hub, each checked before anything trains on it.

`read` gives a `datasets.Dataset` of the columns asked for and nothing else, on disk in its cache;
`tokenise` makes examples of it, cached too. What is wrong with a row is said with its file and
line.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import decimal
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from hyperadapt_jax import paths

from ..errors import InputError, first_line, warn

_VERSION = 3  # of what the cache holds: raise it when rows or examples are made in another way
PLACE = "(place)"  # a column that says where a row stands: its file and line
_HELD_OUT = ("validation", "valid", "val", "dev")  # names of one and the same split

Row = Mapping[str, Any]
Rows = Sequence[Row] | datasets.Dataset  # in memory

# What stands for a row that lacks columns, and for the value of a column that comes twice.
_SHORT, _TWICE = object(), object()


# ---------------------------------------------------------------------------------------- columns


@dataclasses.dataclass(frozen=True)
class Text:
    """A column of text; numbers, true and false are taken as JSON writes them, without exponent."""

    feature = datasets.Value("string")

    def parse(self, value: Any) -> str:
        """The value as text."""
        _check(value)
        if not isinstance(value, str | int | float):
            raise InputError(f"is {_kind(value)}: expected text")
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
            raise InputError(f"is {_kind(value)}: expected a list of messages")
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
                value = json.loads(value, object_pairs_hook=_pairs) if value.strip() else None
            except (ValueError, RecursionError) as error:
                raise InputError(f"is text that is not JSON: {first_line(error)}") from None
        if value is None or value == []:
            return None
        _check(value)
        if not isinstance(value, list) or not all(map(_object, value)):
            raise InputError(f"is {_kind(value)}: expected a list of objects")
        return json.dumps(value, ensure_ascii=False)


Column = Text | Number | Label | Messages | Tools


# ---------------------------------------------------------------------------------------- reading


def read(
    source: str | Path | Rows,
    columns: Mapping[str, Column],
    *,
    split: str = "train",
    config: str | None = None,
    header: Sequence[str] | None = None,
    short: bool = False,
    places: bool = False,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Read a data set.

    Whatever the file's format, a value is refused that is null, NaN or infinite, that is not valid
    Unicode, or whose column comes twice; in columns that are not wanted, nothing is looked at.

    Args:
      source: a file (.json, an array of objects or one object per line; .jsonl; .parquet; .csv;
        .tsv, whose quotes are plain characters), a folder with such files, named after the splits,
        or a data set of the hub. No code of a data set is run. Or the rows themselves.
      columns: the columns wanted, and what they hold.
      split: of a folder or a data set of the hub.
      config: of a data set of the hub that has several.
      header: the columns' names, for a .csv or .tsv file that begins without them.
      short: rows of such files may lack columns at the end: they come as None in all columns.
      places: add the column `PLACE`.
      cache_dir: where rows are kept; the usual cache of ``datasets`` if not given.

    Returns:
      The rows, with these columns in this order.

    Raises:
      InputError: there is no such data set or nothing in it, a column is missing, or a row is not
        what it should be; with file and line.
    """
    files = _find(source, split) if isinstance(source, str | Path) else []
    if not isinstance(source, str | Path):
        name = "the rows given"
        groups = [((f"row {n}", row) for n, row in enumerate(source, 1))]
    elif files is None:
        hub = _load(str(source), config, split)
        files = [Path(file["filename"]) for file in hub.cache_files]
        name = f"{source} ({split})"
        groups = [((f"{name}: row {n}", row) for n, row in enumerate(hub, 1))]
    else:
        name = ", ".join(map(str, files))
        groups = [_READERS[file.suffix](file, header, short) for file in files]

    def rows() -> Iterator[dict[str, Any]]:
        where = None
        for group in groups:
            for where, row in group:
                values = _parse(where, row, columns)
                yield {**values, PLACE: where} if places else values
        if where is None:
            raise InputError(f"{name} has no rows")

    features = {name: column.feature for name, column in columns.items()}
    if places:
        features[PLACE] = datasets.Value("string")
    # The name is part of what is said of a row; what a file holds, time and size do not tell.
    contents = [(str(file.resolve()), _contents(file)) for file in files]
    if not files:
        held = json.dumps(list(source), default=repr).encode()
        contents = [(name, hashlib.sha256(held).hexdigest())]
    try:
        with _quietly():
            return datasets.Dataset.from_generator(
                rows,
                features=datasets.Features(features),
                fingerprint=_digest(name, contents, columns, header, short, places),
                cache_dir=None if cache_dir is None else str(cache_dir),
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        reason = first_line(error.__cause__ or error)
        raise InputError(f"{name} cannot be read: {reason}") from error
    except OSError as error:
        raise _cache_error(error) from error


class Examples(NamedTuple):
    """Examples for `train.data.batches.Batches`, and what was lost on the way to them.

    Attributes:
      data: the examples, in numpy's format.
      truncated: how many were cut to the largest length.
      dropped: how many rows became no example.
      counts: how often something else befell an example, by what it is.
      places: where the row of each example stands; None if that is not known.
    """

    data: datasets.Dataset
    truncated: int
    dropped: int
    counts: Mapping[str, int] = {}
    places: Sequence[str] | None = None

    def tell(
        self, name: str, max_length: int, tell: Callable[[str], None], dropped: int = 0
    ) -> str:
        """Says in a line what came of a split's rows; as a warning where one in twenty was lost.

        What is cut does not count: that is what a largest length is for.

        Args:
          name: of the split.
          max_length: to which examples were cut.
          tell: says what is no warning.
          dropped: rows that were left out before.

        Returns:
          What it said, without the name.
        """
        rows, lost = len(self.data) + self.dropped, self.dropped + dropped
        more = "".join(f", {count:,} {what}" for what, count in self.counts.items() if count)
        text = (
            f"{rows:,} rows, {lost:,} dropped, {self.truncated:,} cut to {max_length} tokens{more}"
        )
        if max(lost, *self.counts.values(), 0) > 0.05 * (rows + dropped):
            warn(f"{name}: {text}")
        else:
            tell(f"{name}: {text}")
        return text


def tokenise(
    data: datasets.Dataset,
    function: Callable[[Mapping[str, list]], Mapping[str, list]],
    features: Mapping[str, Any],
    key: Any,
    counted: Sequence[str] = (),
) -> Examples:
    """Make examples of rows, once: they are kept beside the rows in the cache.

    Args:
      data: the rows.
      function: from columns of some rows to columns of their examples, ``truncated`` among them:
        whether the example was cut. It may leave rows out. Where rows have a column `PLACE`, so do
        the examples that it gives.
      features: what the examples' columns hold, without ``truncated``.
      key: all that the function depends on beside the rows; its ``repr`` tells one from another.
      counted: columns of numbers, beside ``features``, whose sums are `Examples.counts`.

    Raises:
      InputError: no row became an example, or the cache cannot be written.
    """
    places = PLACE in data.column_names
    aside = {"truncated": datasets.Value("bool"), **dict.fromkeys(counted, datasets.Value("int32"))}
    if places:
        aside[PLACE] = datasets.Value("string")
    try:
        with _quietly():
            made = data.map(
                function,
                batched=True,
                remove_columns=data.column_names,
                features=datasets.Features({**features, **aside}),
                new_fingerprint=_digest(data._fingerprint, key),
            )
    except OSError as error:
        raise _cache_error(error) from error
    if not len(made):
        raise InputError(f"none of the {len(data)} rows became an example: allow longer ones")
    sums = {name: sum(made[name][:]) for name in ("truncated", *counted)}
    return Examples(
        made.remove_columns(list(aside)).with_format("numpy"),
        sums.pop("truncated"),
        len(data) - len(made),
        sums,
        made[PLACE] if places else None,
    )


def digest(*parts: Any) -> str:
    """A digest of what examples hold, wherever they came from and however they are stored.

    Args:
      *parts: examples, of which every column counts, or texts.

    Returns:
      64 hexadecimal digits.
    """
    total = hashlib.sha256()
    for part in parts:
        if not isinstance(part, datasets.Dataset):
            total.update(json.dumps(part).encode())
            continue
        names = sorted(part.column_names)
        for table in part.with_format("arrow").iter(4096):
            for name in names:
                column = table[name].combine_chunks()
                total.update(f"{name} {column.type} {len(column)}".encode())
                if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
                    sizes = pyarrow.compute.list_value_length(column)
                    total.update(sizes.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
                    column = column.flatten()
                values = column.to_numpy(zero_copy_only=False)
                total.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()


def identity(tokenizer: Any) -> str:
    """A digest of all that a fast tokenizer's numbers depend on, to be part of a key."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by each call, as it pleases.
    del state["truncation"], state["padding"]
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(
        json.dumps([state, tokenizer.special_tokens_map, template], sort_keys=True).encode()
    ).hexdigest()


def _parse(where: str, row: Row | None, columns: Mapping[str, Column]) -> dict[str, Any]:
    """The wanted columns of a row."""
    if row is _SHORT:
        return dict.fromkeys(columns)
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is {_kind(row)}: expected an object with named columns")
    values = {}
    for name, column in columns.items():
        if name not in row and getattr(column, "optional", False):
            values[name] = None
            continue
        if name not in row:
            near = paths.suggest(name, row) if row else "it has none"
            raise InputError(f"{where}: there is no column {name!r}; {near}")
        try:
            if row[name] is _TWICE:
                raise InputError("comes twice")
            values[name] = column.parse(row[name])
        except InputError as error:
            raise InputError(f"{where}: column {name!r} {error}") from None
    return values


def _find(source: str | Path, split: str) -> list[Path] | None:
    """The files of a local data set; None where the source is none."""
    path = Path(os.path.expanduser(source))
    if path.is_file():
        if path.suffix not in _READERS:
            raise InputError(f"{path}: expected a file of the kind {', '.join(_READERS)}")
        return [path]
    if not path.is_dir():
        if path.suffix in _READERS or re.match(r"[./~]", str(source)):
            raise InputError(f"there is no file or folder {path}")
        return None
    files = (*path.iterdir(), *path.glob("data/*"))
    files = sorted(file for file in files if file.suffix in _READERS and file.is_file())
    names = _HELD_OUT if split in _HELD_OUT else (split,)
    pattern = re.compile(rf"({'|'.join(map(re.escape, names))})(?![a-z])")
    found = {file: match[1] for file in files if (match := pattern.match(file.name))}
    if len({file.suffix for file in found}) != 1:
        there = ", ".join(file.name for file in files[:9]) or f"no {', '.join(_READERS)}"
        raise InputError(
            f"{path} has no files of one kind for the split {split!r}, as {split}.jsonl; it has"
            f" {there}"
        )
    return _parts(path, split, found)


# What follows the name in train-00000-of-00002-0123456789abcdef, train-0, train_part1 ...
_PART = re.compile(r"[-_.]?(?:part[-_.]?)?(\d+)(?:-of-(\d+))?(?:-[0-9a-f]{8,})?")


def _parts(folder: Path, split: str, found: Mapping[Path, str]) -> list[Path]:
    """Of files and the split's name with which each begins: its one file, or all its parts."""
    exact = [file for file in found if file.stem == split]
    if len(exact) == 1 or len(found) == 1:
        return exact or list(found)
    rests = [_PART.fullmatch(file.stem.removeprefix(name)) for file, name in found.items()]
    parts = {(int(rest[1]), rest[2]) for rest in rests if rest}
    names = ", ".join(str(file.relative_to(folder)) for file in list(found)[:9])
    if len(parts) < len(found) or len(set(found.values())) > 1:
        raise InputError(
            f"{folder} has several files for the split {split!r}, {names}: give one of them, or"
            f" name its parts by numbers, as {split}-0{next(iter(found)).suffix}"
        )
    if {count and int(count) for _, count in parts} not in ({None}, {len(found)}):
        raise InputError(
            f"{folder} has {len(found)} parts of the split {split!r}, and their names tell of"
            f" another number: {names}"
        )
    return list(found)


def _load(name: str, config: str | None, split: str) -> datasets.Dataset:
    """A data set of the hub, or the copy of it that an earlier run left in the cache."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{name!r} is no file, no folder and no name of a data set of the hub")
    try:
        with _quietly():
            return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the network, the hub, a file's format, names ...
        where = name if config is None else f"{name}, {config}"
        raise InputError(
            f"{where}, split {split!r}: there is no such file or folder, and the hub's data set"
            f" cannot be read: {first_line(error)}"
        ) from error


# ------------------------------------------------------------------------------------------ files


def _lines(file: Path, newline: str = "\n") -> Iterator[str]:
    """The lines of a text file, which end with a line feed, whatever else is in them."""
    with open(file, encoding="utf-8-sig", newline=newline, errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{file}:{number} is not UTF-8 text, at character {error.start + 1}: save it"
                    " as UTF-8"
                ) from None
            yield line


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever keeps a file from being read is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error


def _json(file: Path, *_: Any) -> Iterator[tuple[str, Any]]:
    with _reading(file):
        lines = enumerate(_lines(file), 1)
        for number, line in lines:
            if line.lstrip().startswith("["):
                text = "".join([line, *(line for _, line in lines)])
                for row, value in enumerate(_decode(text, file, number), 1):
                    yield f"{file}: row {row}", value
            elif line.strip():
                yield f"{file}:{number}", _decode(line.rstrip(), file, number)
                break
        for number, line in lines:
            if line.strip():
                yield f"{file}:{number}", _decode(line.rstrip(), file, number)


def _decode(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise InputError(f"{file}:{line}: not JSON, at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}:{line}: not JSON: {first_line(error)}") from None


def _pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, in which what comes twice is marked."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = collections.Counter(name for name, _ in pairs)
        found |= {name: _TWICE for name, count in names.items() if count > 1}
    return found


def _parquet(file: Path, *_: Any) -> Iterator[tuple[str, Row]]:
    with _reading(file):
        try:
            number = 0
            with pyarrow.parquet.ParquetFile(file) as reader:
                names = reader.schema_arrow.names
                for part in reader.iter_batches(1024):
                    columns = [column.to_pylist() for column in part.columns]
                    for row in zip(*columns, strict=True):
                        number += 1
                        yield f"{file}: row {number}", _pairs(list(zip(names, row, strict=True)))
        except pyarrow.ArrowException as error:
            raise InputError(f"{file} is no parquet file: {first_line(error)}") from error


def _csv(file: Path, header: Sequence[str] | None, short: bool) -> Iterator[tuple[str, Any]]:
    with _reading(file):
        reader = csv.reader(_lines(file, newline=""), strict=True)

        def rows() -> Iterator[tuple[int, list[str]]]:
            line = 1  # where the row begins, which may go on over others
            for row in reader:
                yield line, row
                line = reader.line_num + 1

        try:
            yield from _named(file, rows(), header, short)
        except csv.Error as error:
            raise InputError(f"{file}:{reader.line_num}: not CSV: {error}") from None


def _tsv(file: Path, header: Sequence[str] | None, short: bool) -> Iterator[tuple[str, Any]]:
    with _reading(file):
        lines = _lines(file)
        rows = (line.rstrip("\r\n").split("\t") if line.strip() else [] for line in lines)
        yield from _named(file, enumerate(rows, 1), header, short)


def _named(
    file: Path, rows: Any, header: Sequence[str] | None, short: bool
) -> Iterator[tuple[str, Any]]:
    """Rows as mappings; without the empty ones; a short one as such."""
    for line, row in rows:
        if not row:
            continue
        if header is None:
            header = row
        elif len(row) == len(header):
            yield f"{file}:{line}", _pairs(list(zip(header, row, strict=True)))
        elif short and len(row) < len(header):
            yield f"{file}:{line}", _SHORT
        else:
            raise InputError(f"{file}:{line} has {len(row)} columns, and the header {len(header)}")


_READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
}


# ------------------------------------------------------------------------------------------ words


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
            if twice := [name for name, inner in value.items() if inner is _TWICE]:
                raise InputError(f"holds {twice[0]!r} twice in one object")
            values += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            values += value


_SURROGATE = re.compile("[\ud800-\udfff]")


def _kind(value: Any) -> str:
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


def _cache_error(error: OSError) -> InputError:
    where = error.filename or datasets.config.HF_DATASETS_CACHE
    why = error.strerror or first_line(error)
    return InputError(f"the cache {where} cannot be used: {why}; HF_DATASETS_CACHE names another")


def _contents(file: Path) -> str:
    with _reading(file), open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr((_VERSION, parts)).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the bars of ``datasets``, for as long as this lasts."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
