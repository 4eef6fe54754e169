"""Files that are written atomically, or refused in one line."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hyperadapt_jax import files

from .errors import InputError
from .parallel import processes


@contextlib.contextmanager
def writing(file: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in the error where the system refuses to write it, as on a full disk."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{file} cannot be written: {reason}; make room, or choose another folder"
        ) from error


def write(file: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically, of several processes in the first one; see `hyperadapt_jax.files`.

    Raises:
      InputError: the system refuses.
    """
    if not processes.first():
        return
    with writing(file):
        files.write(Path(file), content.encode() if isinstance(content, str) else content)


def write_json(file: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON, in which a number that is not finite is null.

    Raises:
      InputError: the system refuses.
    """
    write(file, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
