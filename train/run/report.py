"""The report of a run, in Markdown."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import hyperadapt_jax as ha
from hyperadapt_jax.tables import table

from .. import files, options
from .folder import REPORT
from .log import CURVES


def write(
    folder: Path,
    title: str,
    plan: str,
    metrics: tuple[list[str], list[list[str]]],
    facts: Mapping[str, str],
    command: str,
    generations: Sequence[Mapping[str, Any]] = (),
    figures: Iterable[str] = (),
) -> None:
    """Writes ``report.md``: what came of a run, what it took, and what trained.

    Args:
      folder: the run folder.
      title: of the report.
      plan: the plan's table, as text.
      metrics: header and rows of a table; the numbers are right-aligned.
      facts: what else to tell, by name, such as `Result.facts` and counts of rows.
      command: with which it was started; see `options.command_line`.
      generations: some of what the model generates, with ``prompt``, ``answer``, ``reference``.
      figures: file names of other pictures in the folder.
    """
    header, rows = metrics
    parts = [
        f"# {title}",
        table(header, rows, " ".join(header[1:]), markdown=True),
        f"![curves]({CURVES})",
        *(f"![{Path(name).stem}]({name})" for name in figures),
        took(facts, command),
    ]
    if generations:
        parts += ["## Generations", *map(_generation, generations)]
    parts += [
        "## What trained",
        _fenced(plan),
        f"All options are in `{options.CONFIG}`: `--config` reads them back.",
    ]
    write_text(folder, "\n\n".join(parts) + "\n")


def write_text(folder: Path, text: str) -> None:
    """Writes ``report.md``; one that is there is of the session that trained, and stays."""
    if not (folder / REPORT).exists():
        files.write(folder / REPORT, text)


def took(facts: Mapping[str, str], command: str) -> str:
    """A table of what a run took and ran on, and its command, in Markdown."""
    rows = list((dict(facts) | environment()).items())
    return "\n\n".join([table(["", "run"], rows, markdown=True), _fenced(command)])


def environment() -> dict[str, str]:
    """What this process runs on: memory so far, devices, versions."""
    devices = jax.local_devices()
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:,.2f} GB (process)"
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices]
    if any(peaks):
        memory += f", {max(peaks) / 1e9:,.2f} GB (device)"
    where = f"{jax.device_count()} x {devices[0].device_kind} ({jax.default_backend()})"
    if jax.process_count() > 1:
        where += f", in {jax.process_count()} processes"
    others = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax")]
    return {
        "peak memory": memory,
        "device": where,
        "versions": ", ".join(
            [f"hyperadapt-jax {ha.__version__}", *others, f"Python {platform.python_version()}"]
        ),
    }


def _generation(row: Mapping[str, Any]) -> str:
    lines = [f"{name}: {row[name]}" for name in ("prompt", "answer", "reference") if name in row]
    return _fenced("\n".join(lines))


def _fenced(text: str) -> str:
    """A block of text in Markdown, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
