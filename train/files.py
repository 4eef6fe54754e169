"""Files that are written atomically, or refused in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hyperadapt_jax import files

from .errors import InputError


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
    """Writes a file atomically; see `hyperadapt_jax.files`.

    Raises:
      InputError: the system refuses.
    """
    with writing(file):
        files.write(Path(file), content.encode() if isinstance(content, str) else content)
