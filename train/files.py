"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

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
    """Writes a file whole or not at all: under another name first, then renamed into place.

    Raises:
      InputError: the system refuses.
    """
    file = Path(file)
    new = file.with_name(f".{file.name}.new")
    with writing(file):
        try:
            new.write_bytes(content.encode() if isinstance(content, str) else content)
            new.replace(file)
        finally:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
