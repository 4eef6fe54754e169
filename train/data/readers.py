"""Rows from files and from the hub, each checked before anything trains on it.

`read` gives a `datasets.Dataset` of the columns asked for and nothing else, on disk in its cache;
`tokenize` makes examples of it, cached too. What is wrong with a row is said with its file and
line.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ..errors import InputError, first_line
from . import cache
from .columns import SHORT, Column, Row, parse_row, unique_pairs

PLACE = "(place)"  # a column that says where a row stands: its file and line
_HELD_OUT = ("validation", "valid", "val", "dev")  # names of one and the same split
Rows: TypeAlias = Sequence[Row] | datasets.Dataset  # in memory


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
    """Reads a data set.

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
    groups: list[Iterable[tuple[str, Any]]]
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
                values = parse_row(where, row, columns)
                yield {**values, PLACE: where} if places else values
        if where is None:
            raise InputError(f"{name} has no rows")

    features = {name: column.feature for name, column in columns.items()}
    if places:
        features[PLACE] = datasets.Value("string")
    # The name is part of what is said of a row; what a file holds, time and size do not tell.
    contents = [(str(file.resolve()), _contents(file)) for file in files or ()]
    if not isinstance(source, str | Path):
        held = json.dumps(list(source), default=repr).encode()
        contents = [(name, hashlib.sha256(held).hexdigest())]
    try:
        with cache.quietly():
            return datasets.Dataset.from_generator(
                rows,
                features=datasets.Features(features),
                fingerprint=cache.fingerprint(name, contents, columns, header, short, places),
                cache_dir=None if cache_dir is None else str(cache_dir),
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        reason = first_line(error.__cause__ or error)
        raise InputError(f"{name} cannot be read: {reason}") from error
    except OSError as error:
        raise cache.unusable(error) from error


def hold_out(
    rows: datasets.Dataset, count: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits rows at random into those to train on and ``count`` held-out ones, each in order.

    Raises:
      InputError: nothing is left to train on.
    """
    if len(rows) <= count:
        raise InputError(
            f"--eval-rows {count} leaves nothing of {len(rows)} rows to train on: give fewer, or"
            " --eval-data"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out, training = np.split(order, [count])
    return rows.select(np.sort(training)), rows.select(np.sort(held_out))


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
    inside = (*path.iterdir(), *path.glob("data/*"))
    files = sorted(file for file in inside if file.suffix in _READERS and file.is_file())
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
        with cache.quietly():
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
        return json.loads(text, object_pairs_hook=unique_pairs)
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
                names = reader.schema_arrow.names
                for part in reader.iter_batches(1024):
                    columns = [column.to_pylist() for column in part.columns]
                    for row in zip(*columns, strict=True):
                        number += 1
                        yield (
                            f"{file}: row {number}",
                            unique_pairs(list(zip(names, row, strict=True))),
                        )
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
            yield f"{file}:{line}", unique_pairs(list(zip(header, row, strict=True)))
        elif short and len(row) < len(header):
            yield f"{file}:{line}", SHORT
        else:
            raise InputError(f"{file}:{line} has {len(row)} columns, and the header {len(header)}")


_READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
}


def _contents(file: Path) -> str:
    with _reading(file), open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
