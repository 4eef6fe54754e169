"""Rows from files and from the hub, each checked before anything trains on it.

`read` gives a `datasets.Dataset` of the columns asked for and nothing else, on disk in its cache;
`tokenise` makes examples of it, cached too. What is wrong with a row is said with its file and
line.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from hyperadapt_jax import paths
from train.errors import InputError, first_line

_VERSION = 1  # of what the cache holds: raise it when rows or examples are made in another way
_HELD_OUT = ("validation", "valid", "val", "dev")  # names of one and the same split

Row = Mapping[str, Any]


# ---------------------------------------------------------------------------------------- columns


@dataclasses.dataclass(frozen=True)
class Text:
    """A column of text; numbers, true and false are taken as JSON writes them."""

    feature = datasets.Value("string")

    def parse(self, value: Any) -> str:
        """The value as text."""
        if not isinstance(value, str | int | float):
            raise InputError(f"is {_kind(value)}: expected text")
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
        except (TypeError, ValueError):
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
    """A column of conversations: lists of ``{"role": ..., "content": ...}``."""

    feature = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]

    def parse(self, value: Any) -> list[dict[str, str]]:
        """The conversation, without other fields."""
        if not isinstance(value, list) or not value:
            raise InputError(f"is {_kind(value)}: expected a list of messages")
        turns = []
        for number, turn in enumerate(value, 1):
            fields = [
                turn.get(name) if isinstance(turn, dict) else None for name in self.feature[0]
            ]
            if not all(isinstance(field, str) for field in fields):
                raise InputError(f"has no text in 'role' and 'content' of message {number}")
            turns.append(dict(zip(self.feature[0], fields, strict=True)))
        return turns


Column = Text | Number | Label | Messages


# ---------------------------------------------------------------------------------------- reading


def read(
    source: str | Path,
    columns: Mapping[str, Column],
    *,
    split: str = "train",
    config: str | None = None,
    header: Sequence[str] | None = None,
    short: bool = False,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Read a data set.

    Args:
      source: a file (.json, an array of objects or one object per line; .jsonl; .parquet; .csv;
        .tsv, whose quotes are plain characters), a folder with such files, named after the splits,
        or a data set of the hub. No code of a data set is run.
      columns: the columns wanted, and what they hold.
      split: of a folder or a data set of the hub.
      config: of a data set of the hub that has several.
      header: the columns' names, for a .csv or .tsv file that begins without them.
      short: rows of such files may lack columns at the end: they come as None in all columns.
      cache_dir: where rows are kept; the usual cache of ``datasets`` if not given.

    Returns:
      The rows, with these columns in this order.

    Raises:
      InputError: there is no such data set or nothing in it, a column is missing, or a row is not
        what it should be; with file and line.
    """
    files = _find(source, split)
    if files is None:
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
                yield _parse(where, row, columns)
        if where is None:
            raise InputError(f"{name} has no rows")

    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    features = datasets.Features({name: column.feature for name, column in columns.items()})
    try:
        with _quietly():
            return datasets.Dataset.from_generator(
                rows,
                features=features,
                fingerprint=_digest(stamps, columns, header, short),
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
    """Examples for `train.batches.Batches`, and what was lost on the way to them.

    Attributes:
      data: the examples, in numpy's format.
      truncated: how many were cut to the largest length.
      dropped: how many rows became no example.
    """

    data: datasets.Dataset
    truncated: int
    dropped: int


def tokenise(
    data: datasets.Dataset,
    function: Callable[[Mapping[str, list]], Mapping[str, list]],
    features: Mapping[str, Any],
    key: Any,
) -> Examples:
    """Make examples of rows, once: they are kept beside the rows in the cache.

    Args:
      data: the rows.
      function: from columns of some rows to columns of their examples, ``truncated`` among them:
        whether the example was cut. It may leave rows out.
      features: what the examples' columns hold, without ``truncated``.
      key: all that the function depends on beside the rows; its ``repr`` tells one from another.

    Raises:
      InputError: no row became an example, or the cache cannot be written.
    """
    features = datasets.Features({**features, "truncated": datasets.Value("bool")})
    try:
        with _quietly():
            made = data.map(
                function,
                batched=True,
                remove_columns=data.column_names,
                features=features,
                new_fingerprint=_digest(data._fingerprint, key),
            )
    except OSError as error:
        raise _cache_error(error) from error
    if not len(made):
        raise InputError(f"none of the {len(data)} rows became an example: allow longer ones")
    truncated = sum(made["truncated"][:])
    examples = made.remove_columns("truncated").with_format("numpy")
    return Examples(examples, truncated, len(data) - len(made))


def identity(tokenizer: Any) -> str:
    """A digest of all that a fast tokenizer's numbers depend on, to be part of a key."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by each call, as it pleases.
    del state["truncation"], state["padding"]
    return _digest(state, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None))


def _parse(where: str, row: Row | None, columns: Mapping[str, Column]) -> dict[str, Any]:
    """The wanted columns of a row."""
    if row is None:
        return dict.fromkeys(columns)
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is {_kind(row)}: expected an object with named columns")
    values = {}
    for name, column in columns.items():
        if name not in row:
            near = paths.nearest(name, row) if row else "it has none"
            raise InputError(f"{where}: there is no column {name!r}; {near}")
        try:
            values[name] = column.parse(row[name])
        except InputError as error:
            raise InputError(f"{where}: column {name!r} {error}") from None
    return values


def _find(source: str | Path, split: str) -> list[Path] | None:
    """The files of a local data set; None where the source is none."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _READERS:
            raise InputError(f"{path}: expected a file of the kind {', '.join(_READERS)}")
        return [path]
    if not path.is_dir():
        if path.suffix in _READERS or re.match(r"[./~]", str(source)):
            raise InputError(f"there is no file or folder {path}")
        return None
    files = sorted(f for f in (*path.iterdir(), *path.glob("data/*")) if f.suffix in _READERS)
    names = "|".join(_HELD_OUT if split in _HELD_OUT else [re.escape(split)])
    found = [file for file in files if re.match(rf"({names})(?![a-z])", file.name)]
    if len({file.suffix for file in found}) != 1:
        there = ", ".join(file.name for file in files[:9]) or f"no {', '.join(_READERS)}"
        raise InputError(
            f"{path} has no files of one kind for the split {split!r}, as {split}.jsonl; it has"
            f" {there}"
        )
    return found


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


def _open(file: Path) -> Any:
    """A text file whose lines end with a line feed, whatever else is in them."""
    return open(file, encoding="utf-8-sig", newline="\n")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever keeps a file from being read is an InputError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {first_line(error)}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error


def _json(file: Path, *_: Any) -> Iterator[tuple[str, Any]]:
    with _reading(file), _open(file) as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        if first.lstrip().startswith("["):
            for number, row in enumerate(_decode(lines.read(), file, 1), 1):
                yield f"{file}: row {number}", row
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{file}:{number}", _decode(line.rstrip(), file, number)


def _decode(text: str, file: Path, line: int) -> Any:
    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise InputError(f"{file}:{line}: not JSON, at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}:{line}: not JSON: {first_line(error)}") from None


def _parquet(file: Path, *_: Any) -> Iterator[tuple[str, Row]]:
    with _reading(file):
        try:
            number = 0
            with pyarrow.parquet.ParquetFile(file) as reader:
                for part in reader.iter_batches(1024):
                    for row in part.to_pylist():
                        number += 1
                        yield f"{file}: row {number}", row
        except pyarrow.ArrowException as error:
            raise InputError(f"{file} is no parquet file: {first_line(error)}") from error


def _csv(file: Path, header: Sequence[str] | None, short: bool) -> Iterator[tuple[str, Row | None]]:
    with _reading(file), open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            yield from _named(file, ((reader.line_num, row) for row in reader), header, short)
        except csv.Error as error:
            raise InputError(f"{file}:{reader.line_num}: not CSV: {error}") from None


def _tsv(file: Path, header: Sequence[str] | None, short: bool) -> Iterator[tuple[str, Row | None]]:
    with _reading(file), _open(file) as lines:
        rows = (line.rstrip("\r\n").split("\t") if line.strip() else [] for line in lines)
        yield from _named(file, enumerate(rows, 1), header, short)


def _named(
    file: Path, rows: Any, header: Sequence[str] | None, short: bool
) -> Iterator[tuple[str, Row | None]]:
    """Rows as mappings; without the empty ones; a short one as None."""
    for line, row in rows:
        if header is None:
            header = row
        elif len(row) == len(header):
            yield f"{file}:{line}", dict(zip(header, row, strict=True))
        elif short and 0 < len(row) < len(header):
            yield f"{file}:{line}", None
        elif row:
            raise InputError(f"{file}:{line} has {len(row)} columns, and the header {len(header)}")


_READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
}


# ------------------------------------------------------------------------------------------ words


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
