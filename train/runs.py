"""A run's folder: claimed by one process, for one configuration."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import options
from train.errors import InputError
from train.report import CURVES, METRICS, markdown_table, write, writing

ADAPTER, REPORT = "adapter", "report.md"


@contextlib.contextmanager
def claim(folder: Path, config: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """Opens a run folder and writes its ``config.yaml``; no other process can, until it is left.

    Where an error comes before the first metrics, the folder is free for another try.

    Args:
      folder: new, empty, or, to resume, of a run of the same configuration.
      config: what `options.flat` gave.
      resume: go on with the run that is there, if there is one.

    Raises:
      InputError: the folder is in use, cannot be written, or holds something else; or the
        configuration is not the one that the run has.
    """
    folder = Path(folder)
    file = folder / options.CONFIG
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--folder {folder} is a file: choose another name")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"--folder {folder}: another process runs there; wait for it, or choose another"
            ) from error
        if file.exists():
            if not resume:
                raise InputError(
                    f"--folder {folder} holds a run already: go on with it by --resume, or choose"
                    " another folder"
                )
            if difference := options.changed(options.read_config(file), config):
                raise InputError(
                    f"--resume: {difference} ({file}); give it as it was, or start another run"
                )
        elif any(found.name != ".lock" for found in folder.iterdir()):
            raise InputError(f"--folder {folder} is not empty, and holds no run: choose another")
        else:
            write(file, options.dump(config))
        try:
            yield folder
        except BaseException:
            if not (folder / METRICS).exists():  # refused before it began: as if never tried
                file.unlink(missing_ok=True)
            raise


def report(
    folder: Path, title: str, plan: str, metrics: tuple[list[str], list[list[str]]]
) -> None:
    """Writes ``report.md``: what trained, and what came of it.

    Args:
      folder: the run folder.
      title: of the report.
      plan: the plan's table, as text.
      metrics: header and rows of a table; the numbers are right-aligned.
    """
    header, rows = metrics
    table = markdown_table(header, rows, right=" ".join(header[1:]))
    write(
        folder / REPORT,
        f"# {title}\n\n{table}\n\n![curves]({CURVES})\n\n## What trained\n\n```\n{plan}\n```\n\n"
        f"All options are in `{options.CONFIG}`: `--config` reads them back.\n",
    )
