"""What a run says of itself: its progress, its metrics, its curves.

``metrics.jsonl`` holds what a run computed, and nothing that depends on the clock: a run that was
stopped and resumed writes the same file as one that was not. Wall-clock figures go to the screen
and, with the metrics, to TensorBoard.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from ..errors import InputError
from ..files import write, writing
from ..parallel import processes
from .plots import curves, draw

METRICS, CURVES, EVENTS = "metrics.jsonl", "curves.png", "tensorboard"
_EVERY = 10.0  # seconds between two lines where there is no bar, and between two syncs to disk
_RECENT = 0.9  # how much of the past each step keeps in the mean speed: about ten steps count


class Log:
    """Keeps a run's metrics and shows its progress; a context manager.

    On a terminal there is a bar with loss, tokens per second and the time left; elsewhere a plain
    line about every ten seconds and at each evaluation. Rows are on disk when a call returns; the
    curves are drawn on the way out, however the run ends. Of several processes, the first one shows
    and writes all that.

    Args:
      folder: the run folder, which exists.
      total_steps: how many optimizer steps the whole run has.
      start_step: the step of the checkpoint from which the run is resumed: rows beyond it, which a
        killed run left, are removed.
      quiet: show warnings alone.
      label: what the bar and the lines begin with, such as ``cola``.

    Attributes:
      best: the best step so far, to be shown in the curves; the caller sets it.
      timed: the seconds of the steps so far, without what was paused, and how many steps these
        are: all but the first, which waits for the data to come.

    Raises:
      InputError: a file cannot be written, or ``metrics.jsonl`` cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        total_steps: int,
        *,
        start_step: int = 0,
        quiet: bool = False,
        label: str = "",
    ):
        self._first = processes.first()
        self.folder, self.quiet = Path(folder), quiet or not self._first
        self._label = f"{label}: " if label else ""
        self.total_steps, self.start_step = total_steps, start_step
        self.best: int | None = None
        self.timed, self._stepped = (0.0, 0), False

    def __enter__(self) -> Log:
        if self._first:
            self._open()
        self._recent = np.zeros(3)  # seconds, tokens and steps of late
        self._last = self._said = self._synced = time.monotonic()
        self._bar = tqdm(
            desc=self._label,
            total=self.total_steps,
            initial=self.start_step,
            disable=self.quiet or not _shows_bars(),
            dynamic_ncols=True,
            bar_format="{desc}{percentage:3.0f}% |{bar}| {n}/{total} [{elapsed}]{postfix}",
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._bar.close()
        if not self._first:
            return
        try:
            with writing(self.folder / METRICS):
                self._metrics.close()
            with writing(self.folder / EVENTS):
                self._events.close()
            if rows := read_metrics(self.folder / METRICS):
                draw(self.folder / CURVES, curves(rows, self.best))
        except Exception:
            if kind is None:  # else what ended the run is the thing to tell
                raise

    def step(self, step: int, metrics: Mapping[str, float], *, tokens: int) -> None:
        """Records an optimizer step.

        Args:
          step: how many steps are done, from 1.
          metrics: its numbers, such as ``loss``, ``lr`` and ``grad_norm``.
          tokens: how many tokens, padding left out, it learned from.
        """
        now = time.monotonic()
        self._recent = _RECENT * self._recent + (now - self._last, tokens, 1)
        if self._stepped:
            so_far, count = self.timed
            self.timed = so_far + now - self._last, count + 1
        self._stepped = True
        self._last = now
        seconds, total, steps = self._recent
        speed = total / max(seconds, 1e-9)
        self._record(step, metrics, {"speed/tokens_per_second": speed})
        left = tqdm.format_interval((self.total_steps - step) * seconds / steps)
        shown = f"loss {metrics.get('loss', math.nan):.4g}, {speed:,.0f} tokens/s, {left} left"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if now - self._said >= _EVERY:
            self._say(step, shown)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records an evaluation after a step, under ``eval/``; call it before that step is saved.

        Args:
          step: how many steps are done; 0 for the base model.
          metrics: its numbers, such as ``accuracy`` or ``eval/accuracy``.
        """
        named = {f"eval/{name.removeprefix('eval/')}": value for name, value in metrics.items()}
        self._record(step, named)
        shown = [f"{name.removeprefix('eval/')} {value:.4g}" for name, value in named.items()]
        self._say(step, ", ".join(shown), above=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside is no part of the steps' speed: compiling, evaluating, saving."""
        entered = time.monotonic()
        try:
            yield
        finally:
            self._last += time.monotonic() - entered

    def note(self, text: str) -> None:
        """Shows a line, above the bar where there is one; nothing where the run is quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Shows a line even where the run is quiet."""
        tqdm.write(text, file=sys.stderr)

    def _open(self) -> None:
        """Opens the files, without the rows beyond the step at which the run goes on."""
        file, events = self.folder / METRICS, self.folder / EVENTS
        resumed = read_metrics(file) if file.exists() else []
        kept = [row for row in resumed if row["step"] <= self.start_step]
        write(file, "".join(map(_line, kept)))
        self._row = _line(kept[-1]) if kept else None
        with writing(file):
            self._metrics = open(file, "a", encoding="utf-8")
        with writing(events):
            events.mkdir(exist_ok=True)
            # Not the package's SummaryWriter: its thread dies of a full disk, and the run waits
            # for it for ever.
            self._events = EventsWriter(str(events / "events"), f".{time.time_ns()}")
            start = SessionLog(status=SessionLog.START)  # what lies beyond is void
            event = Event(wall_time=time.time(), step=self.start_step + 1, session_log=start)
            self._events.write_event(event)

    def _record(
        self, step: int, metrics: Mapping[str, float], timed: Mapping[str, float] | None = None
    ) -> None:
        if not self._first:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        row = _line({"step": step, **numbers})
        # A run that was killed between an evaluation and its checkpoint evaluates again.
        if row != self._row:
            with writing(self.folder / METRICS):
                self._metrics.write(row)
                self._metrics.flush()
        self._row = row
        scalars = {**numbers, **(timed or {})}
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()]
        with writing(self.folder / EVENTS):
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
            self._events.write_event(event)
            if time.monotonic() - self._synced >= _EVERY:
                self._events.flush()
                self._synced = time.monotonic()

    def _say(self, step: int, text: str, above: bool = False) -> None:
        """A plain line, or, above the bar, only what the bar does not show."""
        if self._bar.disable or above:
            self.note(f"{self._label}step {step}/{self.total_steps}: {text}")
        self._said = time.monotonic()


def read_metrics(file: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a ``metrics.jsonl``; a last line that a killed run left unfinished is dropped.

    Raises:
      InputError: the file cannot be read, or a line is no row of metrics.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            rows.append({name: math.nan if x is None else x + 0 for name, x in row.items()})
            rows[-1]["step"]
        except (ValueError, AttributeError, TypeError, KeyError):
            raise InputError(
                f"{file}, line {number} is no row of metrics: remove that line"
            ) from None
    return rows


def _shows_bars() -> bool:
    """A terminal does, and a notebook, whose shell has a kernel."""
    ipython: Any = sys.modules.get("IPython")
    return sys.stderr.isatty() or hasattr(ipython and ipython.get_ipython(), "kernel")


def _line(row: Mapping[str, float]) -> str:
    """A row as JSON, which knows no NaN and no infinity: null."""
    return json.dumps({k: x if math.isfinite(x) else None for k, x in row.items()}) + "\n"
