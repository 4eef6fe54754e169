"""The training loop: steps, evaluations, checkpoints, and every way that a run can end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning
from hyperadapt_jax.tables import table

from ..base import Base, fingerprint
from ..data.batches import Batches, stream
from ..errors import InputError, warn
from ..options import LARGEST, OptimizerOptions, RunOptions, lasting
from ..run import log as report
from ..run.folder import ADAPTER
from .checkpoints import Checkpoints, Position
from .step import Loss, learning_rates, make_optimizer, make_step, start

Metrics = dict[str, float]

SAVE_SECONDS = 600.0  # the most that a killed run loses, where its evaluations are far apart
SOURCES, BASE = "sources", "base model"  # in an adapter's metadata


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
      score: from metrics to a number, higher is better, by which the best step is chosen; one that
        is not finite is never the best.
      sources: digests of what else the run is made of, by name: its examples and its tokenizer.
    """

    name: str
    base: Base
    tuning: Tuning
    loss: Loss
    batches: Batches
    evaluate: Callable[[Any], Metrics]
    score: Callable[[Metrics], float]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Spent(NamedTuple):
    """What a run took.

    Attributes:
      steps: optimizer steps.
      tokens: that it learned from, padding left out.
      seconds: of training, evaluating and saving. What a kill undid is not counted.
      sessions: one, and one more each time that it was resumed.
    """

    steps: int
    tokens: int
    seconds: float
    sessions: int


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a run came to.

    Attributes:
      trainable: what trained, as it was at the best evaluation.
      step: of that evaluation.
      before: metrics of the base model; empty where metrics.jsonl no longer has them.
      best: metrics at the best evaluation.
      last: metrics after the last step.
      spent: what it took, over all sessions.
    """

    trainable: Any
    step: int
    before: Metrics
    best: Metrics
    last: Metrics
    spent: Spent

    @property
    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table of the metrics."""
        header = ["metric", "before", "best", "last"]
        columns = self.before, self.best, self.last
        return header, [
            [name, *(f"{found[name]:.4f}" if name in found else "" for found in columns)]
            for name in dict.fromkeys(name for found in columns for name in found)
        ]

    def __str__(self) -> str:
        text = table(*self.rows, right="before best last")
        return f"{text}\nbest after step {self.step}"

    @property
    def facts(self) -> dict[str, str]:
        """What the run took, for a report."""
        steps, tokens, seconds, sessions = self.spent
        took = f"{tqdm.format_interval(seconds)}, with evaluations and checkpoints"
        if sessions > 1:
            took += f"; {sessions} sessions together, without what a kill undid"
        return {
            "best step": f"{self.step} of {steps}",
            "duration": took,
            "tokens": f"{tokens:,} trained on, padding left out",
        }


class Interrupted(Exception):
    """SIGINT or SIGTERM came, the signal ``number``; everything is saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


def total_steps(run: RunOptions, per_epoch: int) -> int:
    """The optimizer steps of a run, from its number of steps or of epochs.

    Raises:
      InputError: there is no room for their number.
    """
    steps = run.steps if run.steps is not None else max(1, round(run.epochs * per_epoch))
    if steps > LARGEST:
        raise InputError(f"--epochs {run.epochs:g} are {steps} steps: give fewer than {LARGEST}")
    return steps


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
    computes, bit for bit on the same machine. The arrays of ``task.tuning.trainable`` are freed:
    where everything trains, they are as large as the model.

    Args:
      task: the recipe's part.
      folder: the run folder, claimed by this process.
      optimizer: how it trains.
      run: how long and how often.
      metadata: what to keep with the adapter: the run's options, as `options.flat` gives them.

    Raises:
      InputError: the loss was not finite for ``run.patience`` steps in a row, or the score in no
        evaluation; the checkpoint is of another base model; a file cannot be written.
      Interrupted: SIGINT or SIGTERM came, and a checkpoint was written.
    """
    tuning, steps = task.tuning, total_steps(run, task.batches.per_epoch)
    chain = make_optimizer(optimizer, tuning, steps)
    rates = learning_rates(optimizer, tuning, steps)
    step = make_step(task.loss, chain, rates, accumulate=run.accumulate)
    state, identity = start(tuning, chain, run.seed), fingerprint(tuning.frozen)
    _free(tuning.trainable)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )

    def due(every: int | None) -> bool:
        return done == steps or (every is not None and done % every == 0)

    with Checkpoints(folder) as checkpoints, _Signals() as signals:
        place = metrics = None  # in the data; after this very step
        spent: dict[str, float] = {}  # before this session
        if run.resume and checkpoints.steps:
            _free(state)
            state, (place, base, metrics, spent, sources) = checkpoints.restore(like)
            if changed := other_source(sources, task.sources):
                raise InputError(
                    f"--resume: {changed} changed since the run in {folder} began: give it as it"
                    " was, or start another run"
                )
            if task.sources and not sources:
                warn(f"{folder} does not say which data it was made on: it is not compared")
            if base != identity:
                raise InputError(
                    f"--resume: the checkpoints in {folder} were made on another base model; give"
                    f" the one that the run began with, which is not {task.base.folder} as it is"
                )
        first = done = int(state.step)
        batches = stream(task.batches, place)
        log = report.Log(folder, steps, start_step=done, quiet=run.quiet, label=task.name)
        began = saved = time.monotonic()
        seen = 0  # tokens of this session

        def spending() -> dict[str, float]:
            return {
                "tokens": spent.get("tokens", 0) + seen,
                "seconds": spent.get("seconds", 0.0) + time.monotonic() - began,
                "sessions": spent.get("sessions", 0) + (first < steps),
            }

        def save() -> None:
            nonlocal saved
            place, made_of = batches.get_state(), dict(task.sources)
            position = Position(place, identity, metrics, spending(), made_of)
            with log.paused():
                checkpoints.save(state, position, None if metrics is None else task.score(metrics))
            saved, log.best = time.monotonic(), checkpoints.best

        def leave() -> None:
            raise Interrupted(signals.received, f"saved after step {done} of {steps}")

        def evaluate() -> Metrics:
            try:
                with log.paused(), signals.at_once():
                    found = task.evaluate(state.trainable)
            except _Now:
                save()
                leave()
            except InputError as error:
                if done:
                    save()
                raise InputError(f"the evaluation after step {done}: {error}") from error
            log.evaluation(done, found)
            if not math.isfinite(score := task.score(found)):
                log.warn(f"the score after step {done} is {score}: this step is never the best one")
            return found

        def tell(number: int, numbers: Any, tokens: int, rows: np.ndarray) -> None:
            numbers = {name: float(value) for name, value in numbers.items()}
            bad = int(numbers.pop("bad"))
            log.step(number, numbers, tokens=tokens)
            if not bad:
                return
            where = f"step {number} ({task.batches.where(rows)})"
            log.warn(f"the loss or its gradient is not finite in {where}: nothing was changed")
            if bad >= run.patience:
                save()
                raise InputError(
                    f"the loss was not finite for {bad} steps in a row, the last {where}; the state"
                    f" after step {number - bad} is kept in {folder}: look at these rows, or start"
                    " again with a lower --lr"
                )

        with log:
            log.best = checkpoints.best
            if done:
                log.note(f"{task.name}: going on after step {done} of {steps}")
            every = run.eval_every or task.batches.per_epoch
            if metrics is None and due(every):  # at the start, or stopped while it evaluated
                metrics = evaluate()
                save()
            told: list[tuple] = []
            shapes: set[tuple[int, ...]] = set()
            while done < steps:
                batch = next(batches)
                rows, tokens = batch.pop("rows"), int(batch["mask"].sum())
                known, shape = batch["tokens"].shape in shapes, batch["tokens"].shape
                with contextlib.nullcontext() if known else log.paused():  # it compiles
                    state, numbers = step(state, tuning.frozen, batch)
                shapes.add(shape)
                done, metrics, seen = done + 1, None, seen + tokens
                told.append((done, numbers, tokens, rows))
                late = time.monotonic() - saved >= SAVE_SECONDS
                pause = due(every) or due(run.save_every) or late or signals.received
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
        took = Spent(steps, **spending())
        if (best := checkpoints.best) is None:
            raise InputError(
                f"no evaluation of the run in {folder} gave a finite score, the last"
                f" {task.score(metrics)}: start again with a lower --lr, or --dtype float32"
            )
        kept, last = state.trainable, metrics
        if best != done:
            _free(state)
            restored, position = checkpoints.restore(like, best)
            kept, metrics = restored.trainable, position.metrics
            _free(restored.optimizer)
    first = next((r for r in report.read_metrics(folder / report.METRICS) if _evaluated(r)), {})
    before = _evaluated(first) if first.get("step") == 0 else {}
    if not (folder / ADAPTER).exists():
        made_of = {SOURCES: {**task.sources, BASE: identity}} if task.sources else {}
        kept_with = {**lasting(metadata or {}), **made_of}
        write_adapter(folder / ADAPTER, task.base, tuning, kept, kept_with)
    return Result(kept, best, before, metrics, last, took)


def _free(tree: Any) -> None:
    """Gives the memory of arrays back that are not read again, whoever still names them."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def other_source(known: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first source of which both know a digest, and not the same one."""
    changed = (name for name in found if known.get(name, found[name]) != found[name])
    return next((f"the {name}" for name in changed), None)


def write_adapter(
    folder: Path, base: Base, tuning: Tuning, trainable: Any, metadata: Mapping[str, Any]
) -> None:
    """Saves what trained as an adapter folder, whole or not at all; see `hyperadapt_jax.save`."""
    config = models.config_to_dict(base.config)
    adapter = ha.Adapter(*tuning.adapter(trainable), base.name, config, metadata)
    try:
        ha.save(folder, adapter, base.params)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error


def _evaluated(row: Metrics) -> Metrics:
    """The evaluation's metrics in a row of metrics.jsonl."""
    return {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}


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
