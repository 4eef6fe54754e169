"""Runs that are made one after the other, each in a folder of its own; finished ones are read."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
from jax.experimental.compilation_cache import compilation_cache

from .. import base, methods
from ..errors import Diverged, InputError
from ..files import write_json, writing
from ..metrics.halves import reported
from ..options import CONFIG, changed, flat, read_config
from ..run.folder import LOCK, RESULT
from ..trainer.loop import Interrupted, Metrics
from ..trainer.optimizer import learning_rates

PROGRAMS = ".programs"


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """A run that is to be made.

    Attributes:
      method: what it is called.
      options: the recipe's, with the run's folder.
    """

    method: str
    options: Any

    @property
    def lr(self) -> float:
        return self.options.optimizer.lr

    @property
    def seed(self) -> int:
        return self.options.run.seed

    @property
    def folder(self) -> Path:
        return self.options.run.folder

    def __str__(self) -> str:
        return f"{self.method}, lr {self.lr:g}, seed {self.seed}"


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a run.

    Attributes:
      planned: the run.
      found: its ``result.json``; where it diverged, ``error`` alone.
    """

    planned: Planned
    found: Mapping[str, Any]

    @property
    def error(self) -> str | None:
        """Why there is no result; None where there is one."""
        return self.found.get("error")

    @property
    def score(self) -> float:
        """By which runs are compared to choose one, higher is better; -inf where it diverged."""
        score = self.found.get("score")
        return -math.inf if score is None else score

    def metrics(self, when: str = "best") -> Metrics:
        """The metrics ``before`` training or at the ``best`` step, of the half that reports."""
        return reported(_numbers(self.found.get(when, {})))

    def chosen_by(self, name: str) -> float:
        """A metric at the best step, of the half that chooses; NaN where it diverged."""
        return _numbers(self.found.get("best", {})).get(name, math.nan)


def check(recipe: str, runs: Sequence[Planned], advice: str) -> None:
    """Refuses folders that hold other runs than those that are planned.

    Args:
      recipe: of all runs.
      runs: those that may be made.
      advice: what to do about it.

    Raises:
      InputError: says which option of which run was another.
    """
    for run in runs:
        file = run.folder / CONFIG
        if not file.is_file():
            continue
        if not run.options.run.resume:
            raise InputError(
                f"--folder {run.folder} holds a run already: continue with --resume, or choose"
                " another folder"
            )
        old, new = read_config(file), flat(run.options, recipe)
        # A finished run is not loaded again: which base it was made on, its name must tell.
        differences = [changed(old, new)]
        differences += [
            f"{name} was {old.get(name)!r} and is {new[name]!r}"
            for name in ("model", "revision")
            if old.get(name) != new[name]
        ]
        if difference := next(filter(None, differences), None):
            raise InputError(f"{run.folder} holds another run: {difference}; {advice}")


def check_rate(run: Planned) -> None:
    """Refuses a sweep over a learning rate that nothing trains with.

    Raises:
      InputError: all that trains has a rate of its own; or there is no such model or target.
    """
    options = run.options
    tuning = methods.tune(
        base.load_abstract(options.model, options.task.num_labels), options.adapter
    )
    used = learning_rates(options.optimizer, tuning, 1)
    if "lr" not in used:
        own = {"lr/head": "head_lr", "lr/row": "row_lr", "lr/col": "col_lr"}
        names = " and ".join(own.get(name, name) for name in used)
        raise InputError(
            f"lr changes nothing with --method {options.adapter.method}: all that trains has the"
            f" rate {names}; set that to null"
        )


class Runs:
    """Makes runs; a call gives a run's outcome, at once where it is there already.

    Args:
      recipe: of all runs.
      run: trains with a recipe's options, in their folder.
    """

    def __init__(self, recipe: str, run: Callable[[Any], Any]):
        self.recipe, self._run = recipe, run
        self._first: Outcome | None = None

    def __call__(self, run: Planned) -> Outcome:
        """Makes the run, or goes on with it.

        Raises:
          InputError: it cannot be made, or was made of other data than another one.
          Interrupted: SIGINT or SIGTERM came, and everything is saved.
        """
        file = run.folder / RESULT
        if not file.exists():
            try:
                self._run(run.options)
            except Diverged as error:
                if not run.folder.is_dir():  # nothing of it is kept
                    return Outcome(run, {"error": str(error)})
                write_json(file, {"error": str(error)})
            except KeyboardInterrupt:
                raise Interrupted(signal.SIGINT, "the runs before this one are kept") from None
            gc.collect()  # a run's arrays are in circles: the next one needs their room
        outcome = Outcome(run, _read(file))
        if not outcome.error:
            self._compare(outcome)
        return outcome

    def _compare(self, outcome: Outcome) -> None:
        """Refuses runs of different data."""
        first = self._first = self._first or outcome
        old, new = (run.found.get("sources", {}) for run in (first, outcome))
        if name := next((name for name in new if old.get(name) != new[name]), None):
            raise InputError(
                f"the {name} of {outcome.planned.folder} are not those of {first.planned.folder}:"
                " the data changed meanwhile; give them as they were, or another --folder"
            )


@contextlib.contextmanager
def shared_programs(folder: Path) -> Iterator[None]:
    """Inside, a program that took long to compile is compiled once for all runs that need it.

    They are kept in the folder until everything is done; where the user has such a folder, there.
    """
    name, config = "jax_compilation_cache_dir", cast(Any, jax.config)
    if getattr(config, name) is not None:
        yield
        return
    config.update(name, str(folder / PROGRAMS))
    compilation_cache.reset_cache()
    try:
        yield
        shutil.rmtree(folder / PROGRAMS, ignore_errors=True)
    finally:
        config.update(name, None)
        compilation_cache.reset_cache()


def make_folder(folder: Path) -> None:
    """Makes the folder of several runs.

    Raises:
      InputError: it holds a run itself, or cannot be made.
    """
    if (folder / CONFIG).exists() or (folder / LOCK).exists():
        raise InputError(f"--folder {folder} holds a single run: choose another")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--folder {folder} is a file: choose another name")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read: {error}; remove it, and the run writes it again"
        ) from error
    return found


def _numbers(metrics: Mapping[str, float | None]) -> Metrics:
    return {name: math.nan if value is None else value for name, value in metrics.items()}
