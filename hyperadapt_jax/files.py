"""Files and folders that are written atomically: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write(file: Path, content: bytes) -> None:
    """Writes a file under a temporary name next to it, then renames it into place.

    Raises:
      OSError: the system refuses; what was there before stays.
    """
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_bytes(content)
        new.replace(file)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder next to the wanted one, which takes its place at the end.

    What was there before goes once the new one is on the disk; where the body raises, it stays and
    the new one goes.

    Raises:
      OSError: the system refuses.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as around:
    ...     with new_folder(Path(around, "model")) as new:
    ...         _ = (new / "config.json").write_text("{}")
    ...     [path.name for path in Path(around).rglob("*")]
    ['model', 'config.json']
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{folder.name}.{secrets.token_hex(4)}"
    new, old = folder.parent / f"{mark}.new", folder.parent / f"{mark}.old"
    new.mkdir()
    try:
        yield new
        for file in new.rglob("*"):  # on the disk before it has its name
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        if hasattr(os, "O_DIRECTORY"):  # a rename is durable once the folder around it is
            around = os.open(folder.parent, os.O_DIRECTORY)
            try:
                os.fsync(around)
            finally:
                os.close(around)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
