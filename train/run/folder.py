"""A run's folder: opened by one process, for one configuration."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import options
from ..errors import InputError
from ..files import write, writing
from ..parallel import processes
from .log import CURVES, EVENTS, METRICS

ADAPTER, REPORT, LOCK, CHECKPOINTS = "adapter", "report.md", ".lock", "checkpoints"
RESULT = "result.json"


# What a run has made before its first evaluation; a folder of no more than these is free.
_EARLY = {options.CONFIG, METRICS, CURVES, EVENTS, CHECKPOINTS, "fresh", LOCK}


@contextlib.contextmanager
def open_run(folder: Path, config: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """Opens a run folder and writes its ``config.yaml``; no other run can, until it is left.

    Of several processes of one run, the first opens it, and all leave it together.

    Where the run ends before there is anything to resume, by an error or by a signal that kills,
    the folder is free for another try.

    Args:
      folder: new, empty, or, to resume, of a run of the same configuration.
      config: what `options.flat` gave.
      resume: continue the run that is there, if there is one.

    Raises:
      InputError: the folder is in use, cannot be written, or holds something else; or the
        configuration is not the one that the run has; or a process does not see it.
    """
    with contextlib.ExitStack() as opened:
        processes.on_first(lambda: opened.enter_context(_opened(Path(folder), config, resume)))
        if not (Path(folder) / options.CONFIG).exists():
            raise InputError(
                f"--folder {folder}: the first process opened it, and this one does not see it;"
                " give a folder that all of them share"
            )
        yield Path(folder)
        processes.wait()


@contextlib.contextmanager
def _opened(folder: Path, config: dict[str, Any], resume: bool) -> Iterator[None]:
    """The folder, opened by the first process."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--folder {folder} is a file: choose another name")
    new = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder):
            _open(folder, config, resume)
            try:
                yield
                file = folder / options.CONFIG
                if options.read_config(file).get("model") != config.get("model"):  # it has moved
                    write(file, options.dump(config))
            except BaseException:
                if not _began(folder):
                    _clear(folder)
                raise
    finally:
        if new:
            with contextlib.suppress(OSError):  # it is not empty: something came of it
                folder.rmdir()


def _open(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Refuses a folder that holds something else, or makes it ready."""
    file = folder / options.CONFIG
    if not file.exists():
        if any(path.name != LOCK and not _half(path) for path in folder.iterdir()):
            raise InputError(f"--folder {folder} is not empty, and holds no run: choose another")
    elif _began(folder):
        if not resume:
            raise InputError(
                f"--folder {folder} holds a run already: resume it with --resume, or choose"
                " another folder"
            )
        if difference := options.changed(options.read_config(file), config):
            raise InputError(
                f"--resume: {difference} ({file}); give it as it was, or start another run"
            )
    elif "recipe" not in options.read_config(file) or any(
        path.name not in _EARLY and not _half(path) for path in folder.iterdir()
    ):
        raise InputError(f"--folder {folder} holds other things, and no run: choose another")
    if not _began(folder):
        _clear(folder)
        write(file, options.dump(config))
    for path in filter(_half, folder.iterdir()):
        _remove(path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, whose file is there for as long as it is held."""
    file = folder / LOCK
    while True:
        with writing(folder):
            lock = open(file, "w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"--folder {folder}: another process runs there; wait for it, or choose another"
                ) from error
            # One that was removed between the two lines above locks nothing.
            if not _same(file, lock.fileno()):
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


def _same(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _began(folder: Path) -> bool:
    """Whether there is anything of a run to resume or to look at."""
    metrics = folder / METRICS
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(
        path.name.isdecimal() for path in folder.glob(f"{CHECKPOINTS}/*")
    )


def _half(path: Path) -> bool:
    """Whether a process was killed while it wrote this file or folder."""
    return path.name.startswith(".") and path.name.endswith(".new")


def _clear(folder: Path) -> None:
    """Removes all but the lock from a folder in which nothing began."""
    for path in folder.iterdir():
        if path.name != LOCK:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
