"""The training loop: steps, evaluations, checkpoints, and every way that a run can end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.tables import table
from train import report
from train.base import Base, fingerprint
from train.batches import Batches, stream
from train.checkpoints import Checkpoints, Position
from train.errors import InputError
from train.methods import Tuning
from train.options import OptimizerOptions, RunOptions, lasting
from train.runs import ADAPTER
from train.step import Loss, make_optimizer, make_step, schedule, start

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a recipe brings to the loop.

    Attributes:
      name: what the progress bar is called.
      base: the frozen model.
      tuning: what trains on it.
      loss: summed loss and weight of a batch.
      batches: the training data, of enough epochs.
      evaluate: from what trains to metrics.
      score: from metrics to a number, higher is better, by which the best step is chosen.
    """

    name: str
    base: Base
    tuning: Tuning
    loss: Loss
    batches: Batches
    evaluate: Callable[[Any], Metrics]
    score: Callable[[Metrics], float]


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a run came to.

    Attributes:
      trainable: what trained, as it was at the best evaluation.
      step: of that evaluation.
      before: metrics of the base model.
      best: metrics at the best evaluation.
      last: metrics after the last step.
    """

    trainable: Any
    step: int
    before: Metrics
    best: Metrics
    last: Metrics

    @property
    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table of the metrics."""
        header = ["metric", "before", "best", "last"]
        return header, [
            [name, *(f"{found[name]:.4f}" for found in (self.before, self.best, self.last))]
            for name in self.best
        ]

    def __str__(self) -> str:
        text = table(*self.rows, right="before best last")
        return f"{text}\nbest after step {self.step}"


class Interrupted(Exception):
    """SIGINT or SIGTERM came, the signal ``number``; everything is saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


def total_steps(run: RunOptions, per_epoch: int) -> int:
    """The optimizer steps of a run, from its number of steps or of epochs."""
    return run.steps if run.steps is not None else max(1, round(run.epochs * per_epoch))


def fit(
    task: Task,
    folder: Path,
    *,
    optimizer: OptimizerOptions,
    run: RunOptions,
    metadata: Mapping[str, Any] | None = None,
) -> Result:
    """Trains, and leaves metrics, curves, checkpoints and the best adapter in the run folder.

    A run that was stopped at any moment and is resumed computes what one that was never stopped
    computes, bit for bit on the same machine.

    Args:
      task: the recipe's part.
      folder: the run folder, claimed by this process.
      optimizer: how it trains.
      run: how long and how often.
      metadata: what to keep with the adapter: the run's options, as `options.flat` gives them.

    Raises:
      InputError: the loss was not finite for ``run.patience`` steps in a row; the checkpoint is of
        another base model; a file cannot be written.
      Interrupted: SIGINT or SIGTERM came, and a checkpoint was written.
    """
    tuning, steps = task.tuning, total_steps(run, task.batches.per_epoch)
    chain = make_optimizer(optimizer, tuning, steps)
    rate = schedule(optimizer, optimizer.lr, steps)
    step = make_step(task.loss, chain, rate, accumulate=run.accumulate)
    state, identity = start(tuning, chain, run.seed), fingerprint(tuning.frozen)

    def due(every: int | None) -> bool:
        return done == steps or (every is not None and done % every == 0)

    with Checkpoints(folder) as checkpoints, _Signals() as signals:
        place = metrics = None  # in the data; after this very step
        if run.resume and (found := checkpoints.restore(state)):
            state, (place, base, metrics) = found
            if base != identity:
                raise InputError(
                    f"--resume: the checkpoints in {folder} were made on another base model; give"
                    f" the one that the run began with, which is not {task.base.folder} as it is"
                )
        done, batches = int(state.step), stream(task.batches, place)
        log = report.Log(folder, steps, start_step=done, quiet=run.quiet, label=task.name)

        def save() -> None:
            copy = jax.tree.map(jnp.copy, state)  # the next step reuses the state's memory
            position = Position(batches.get_state(), identity, metrics)
            checkpoints.save(copy, position, None if metrics is None else task.score(metrics))

        def leave() -> None:
            checkpoints.wait()
            raise Interrupted(signals.received, f"saved after step {done} of {steps}")

        def evaluate() -> Metrics:
            try:
                with signals.at_once():
                    found = task.evaluate(state.trainable)
            except _Now:
                save()
                leave()
            log.evaluation(done, found)
            return found

        def tell(number: int, numbers: Any, tokens: int, rows: np.ndarray) -> None:
            numbers = {name: float(value) for name, value in numbers.items()}
            bad = int(numbers.pop("bad"))
            log.step(number, numbers, tokens=tokens)
            if not bad:
                return
            where = f"step {number} (rows {_some(rows)} of the training data)"
            log.warn(f"the loss or its gradient is not finite in {where}: nothing was changed")
            if bad >= run.patience:
                save()
                raise InputError(
                    f"the loss was not finite for {bad} steps in a row, the last {where}; the state"
                    f" after step {number - bad} is kept in {folder}: look at these rows, or start"
                    " again with a lower --lr"
                )

        with log:
            if done:
                log.note(f"{task.name}: going on after step {done} of {steps}")
            every = run.eval_every or task.batches.per_epoch
            if metrics is None and due(every):  # at the start, or stopped while it evaluated
                metrics = evaluate()
                save()
            told: list[tuple] = []
            while done < steps:
                batch = next(batches)
                rows, tokens = batch.pop("rows"), int(batch["mask"].sum())
                state, numbers = step(state, tuning.frozen, batch)
                done, metrics = done + 1, None
                told.append((done, numbers, tokens, rows))
                pause = due(every) or due(run.save_every) or signals.received
                # The numbers of a step are read while the device computes the next one.
                while len(told) > (0 if pause else 1):
                    tell(*told.pop(0))
                if not pause:
                    continue
                if due(every) and not signals.received:
                    metrics = evaluate()
                save()
                if signals.received:
                    leave()
        kept, position = checkpoints.best(state)
    evaluations = [row for row in report.read_metrics(folder / report.METRICS) if _evaluated(row)]
    before, last = (_evaluated(row) for row in (evaluations[0], evaluations[-1]))
    if not (folder / ADAPTER).exists():
        write_adapter(folder / ADAPTER, task.base, kept.trainable, lasting(metadata or {}))
    return Result(kept.trainable, int(kept.step), before, position.metrics or last, last)


def write_adapter(folder: Path, base: Base, trainable: Any, metadata: Any = None) -> None:
    """Saves what trained as an adapter folder, whole or not at all; see `hyperadapt_jax.save`."""
    try:
        ha.save(
            folder,
            trainable["scales"],
            base.params,
            full=trainable["full"],
            base_model=base.name,
            base_config=models.config_to_dict(base.config),
            metadata=metadata,
        )
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error


def _evaluated(row: Metrics) -> Metrics:
    """The evaluation's metrics in a row of metrics.jsonl."""
    return {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}


def _some(rows: np.ndarray, limit: int = 8) -> str:
    numbers = [int(row) for row in np.unique(rows) if row >= 0]
    return ", ".join(map(str, numbers[:limit])) + (" ..." if len(numbers) > limit else "")


class _Now(BaseException):
    """Raised by a signal where the work at hand can be thrown away."""


class _Signals:
    """Notes SIGINT and SIGTERM instead of dying of them; the second one kills at once."""

    def __init__(self):
        self.received: int | None = None
        self._raises = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if self._raises:
            raise _Now

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises :class:`_Now`."""
        self._raises = True
        try:
            if self.received is not None:
                raise _Now
            yield
        finally:
            self._raises = False
