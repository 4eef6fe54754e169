"""The training loop: steps, evaluations, checkpoints, and every way that a run can end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from tqdm import tqdm

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning
from hyperadapt_jax.tables import table

from ..base import Base, fingerprint
from ..data.batches import Batches, stream
from ..errors import Diverged, InputError, warn
from ..options import LARGEST, OptimizerOptions, RunOptions, identity_options
from ..parallel import processes
from ..parallel.mesh import activations_of, put_rows
from ..parallel.program import memory
from ..run.folder import ADAPTER
from ..run.log import METRICS, Log, read_metrics
from .checkpoints import CheckpointMetadata, Checkpoints
from .optimizer import learning_rates, make_optimizer
from .signals import Signals, StoppedNow
from .step import Loss, make_step, start

Metrics = dict[str, float]

SAVE_SECONDS = 600.0  # the most that a killed run loses, where its evaluations are far apart
ASK_SECONDS = 10.0  # how often several processes ask whether that is so
SOURCES, BASE = "sources", "base model"  # in an adapter's metadata


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What trains, on what, and how it is measured.

    Attributes:
      name: what the progress bar is called.
      base: the frozen model.
      tuning: what trains on it.
      loss: summed loss and weight of a batch.
      batches: the training data, of enough epochs.
      evaluate: from what trains to metrics.
      criterion: from metrics to a number, higher is better, by which the best step is options; one
        that is not finite is never the best.
      sources: digests of what else the run is made of, by name: its examples and its tokenizer.
    """

    name: str
    base: Base
    tuning: Tuning
    loss: Loss
    batches: Batches
    evaluate: Callable[[Any], Metrics]
    criterion: Callable[[Metrics], float]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Spent(NamedTuple):
    """What a run took.

    Attributes:
      steps: optimizer steps.
      tokens: that it learned from, padding left out.
      seconds: of training, evaluating and saving. What a kill undid is not counted.
      sessions: one, and one more each time that it was resumed.
      step_seconds: of one step, the mean over all but the first of a session; NaN for no others.
      step_bytes: that the largest step takes on a device by XLA's analysis of its program: what it
        is given, frozen weights included, what it gives, and what it holds meanwhile; None where
        there is no such analysis.
    """

    steps: int
    tokens: int
    seconds: float
    sessions: int
    step_seconds: float
    step_bytes: int | None


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
      score: the criterion at the best evaluation.
      sources: `Job.sources`.
    """

    trainable: Any
    step: int
    before: Metrics
    best: Metrics
    last: Metrics
    spent: Spent
    score: float
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

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

    def _repr_markdown_(self) -> str:
        text = table(*self.rows, right="before best last", markdown=True)
        return f"{text}\n\nbest after step {self.step}"

    @property
    def count(self) -> int:
        """The number of trainable parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trainable))

    @property
    def numbers(self) -> dict[str, Any]:
        """All but the arrays, for programs."""
        return {
            "best_step": self.step,
            "score": self.score,
            "before": self.before,
            "best": self.best,
            "last": self.last,
            "trainable_parameters": self.count,
            **self.spent._asdict(),
            "sources": dict(self.sources),
        }

    @property
    def facts(self) -> dict[str, str]:
        """What the run took, for a report."""
        steps, tokens, seconds, sessions, *_ = self.spent
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
    job: Job,
    folder: Path,
    *,
    optimizer: OptimizerOptions,
    run: RunOptions,
    metadata: Mapping[str, Any] | None = None,
) -> Result:
    """Trains, and leaves metrics, curves, checkpoints and the best adapter in the run folder.

    A run that was stopped at any moment and is resumed computes what one that was never stopped
    computes, bit for bit on the same machine. The arrays of ``job.tuning.trainable`` are freed:
    where everything trains, they are as large as the model.

    Args:
      job: what trains, on what, and how it is measured.
      folder: the run folder, opened by this process.
      optimizer: how it trains.
      run: how long and how often.
      metadata: what to keep with the adapter: the run's options, as `options.flat` gives them.

    Raises:
      Diverged: the loss was not finite for ``run.patience`` steps in a row, or the score in no
        evaluation.
      InputError: the checkpoint is of another base model; a file cannot be written.
      Interrupted: SIGINT or SIGTERM came, and a checkpoint was written.
    """
    with Checkpoints(folder) as checkpoints, Signals() as signals:
        session = _Session(job, folder, optimizer, run, checkpoints, signals)
        with session.log:
            session.train()
        processes.wait()  # for the first one, which writes the metrics
        spent = session.total()
        trainable, best, metrics = session.best()
    rows = read_metrics(folder / METRICS)
    first = next((row for row in rows if _evaluated(row)), {})
    before = _evaluated(first) if first.get("step") == 0 else {}
    if not (folder / ADAPTER).exists():
        sources = {SOURCES: {**job.sources, BASE: session.base_digest}} if job.sources else {}
        kept_with = {**identity_options(metadata or {}), **sources}
        write_adapter(folder / ADAPTER, job.base, job.tuning, trainable, kept_with)
    score = job.criterion(metrics)
    last = session.metrics or {}
    return Result(trainable, best, before, metrics, last, spent, score, job.sources)


class _Session:
    """What one process does of a run: from its start or a checkpoint to its end or a signal.

    Attributes:
      steps: of the whole run.
      done: steps so far.
      metrics: of the evaluation after this very step; None if there was none.
      log: the run's log, a context manager.
      base_digest: the fingerprint of the frozen parameters.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        optimizer: OptimizerOptions,
        run: RunOptions,
        checkpoints: Checkpoints,
        signals: Signals,
    ):
        self.job, self.folder, self.run = job, folder, run
        self._checkpoints, self._signals = checkpoints, signals
        self.steps = total_steps(run, job.batches.per_epoch)
        matrices = models.matrices(job.base.config)
        chain = make_optimizer(optimizer, job.tuning, self.steps, matrices)
        rates = learning_rates(optimizer, job.tuning, self.steps)
        self._where = activations_of(job.tuning.fn)
        self._state = start(job.tuning, chain, run.seed)
        self._step: Any = make_step(
            job.loss,
            chain,
            rates,
            accumulate=run.accumulate,
            activations=self._where,
            state=self._state,
        )
        self.base_digest = fingerprint(job.tuning.frozen)
        _free(job.tuning.trainable)
        self._like = jax.tree.map(_shape, self._state)
        self.metrics: Metrics | None = None
        self._earlier: dict[str, float] = {}  # spent before this session
        data = self._resume() if run.resume and checkpoints.steps else None
        self._batches = stream(job.batches, data)
        self._first = self.done = int(self._state.step)
        self._began = self._saved = time.monotonic()
        self._ask = 0  # the step from which on several processes ask again whether to save
        self._tokens = 0  # of this session
        self._pending: list[tuple[int, Any, int]] = []
        self._shapes: dict[tuple[int, ...], Any] = {}  # of the batches that are compiled for
        self.log = Log(folder, self.steps, start_step=self.done, quiet=run.quiet, label=job.name)
        self.log.best = checkpoints.best

    def _resume(self) -> dict[str, Any]:
        """Takes up the last checkpoint, and gives the place in the data."""
        _free(self._state)
        self._state, known = self._checkpoints.restore(self._like)
        if changed := other_source(known.sources, self.job.sources):
            raise InputError(
                f"--resume: {changed} changed since the run in {self.folder} began: give it as it"
                " was, or start another run"
            )
        if self.job.sources and not known.sources:
            warn(f"{self.folder} does not say which data it was made on: it is not compared")
        if known.base != self.base_digest:
            raise InputError(
                f"--resume: the checkpoints in {self.folder} were made on another base model; give"
                f" the one that the run began with, which is not {self.job.base.folder} as it is"
            )
        self.metrics, self._earlier = known.metrics, known.spent
        return known.data

    def train(self) -> None:
        """Trains to the end, evaluating and saving when it is due."""
        if self.done:
            self.log.note(f"{self.job.name}: resumed after step {self.done} of {self.steps}")
        every = self.run.eval_every or self.job.batches.per_epoch
        if self.metrics is None and self._due(every):  # at the start, or stopped as it evaluated
            self._evaluate()
            self._save()
        while self.done < self.steps:
            self._advance()
            late, stopped = self._late(), self._signals.due()
            pause = self._due(every) or self._due(self.run.save_every) or late or stopped
            # The metrics of a step are read while the device computes the next one.
            self._report(keep=0 if pause else 1)
            if not pause:
                continue
            if self._due(every) and not self._signals.due():
                self._evaluate()
            self._save()
            if self._signals.due():
                self._stop()

    def best(self) -> tuple[Any, int, Metrics]:
        """What trained as it was at the best evaluation, its step, and its metrics."""
        best = self._checkpoints.best
        if best is None:
            raise Diverged(
                f"no evaluation of the run in {self.folder} gave a finite score, the last"
                f" {self.job.criterion(self.metrics or {})}: start again with a lower --lr, or"
                " --dtype float32"
            )
        if best == self.done:
            return self._state.trainable, best, self.metrics or {}
        _free(self._state)
        restored, known = self._checkpoints.restore(self._like, best)
        _free(restored.optimizer)
        return restored.trainable, best, known.metrics or {}

    def total(self) -> Spent:
        """What the whole run took so far."""
        found = self.spent()
        timed, held = found["timed_steps"], found["step_bytes"]
        return Spent(
            self.steps,
            int(found["tokens"]),
            found["seconds"],
            int(found["sessions"]),
            found["step_seconds"] / timed if timed else math.nan,
            int(held) if held else None,
        )

    def spent(self) -> dict[str, float]:
        """What the run took so far, as numbers that add up over its sessions, or that stay."""
        step_seconds, timed = self.log.timed
        now = {
            "tokens": self._tokens,
            "seconds": time.monotonic() - self._began,
            "sessions": self._first < self.steps,
            "step_seconds": step_seconds,
            "timed_steps": timed,
        }
        spent = {name: self._earlier.get(name, 0) + number for name, number in now.items()}
        return spent | {"step_bytes": self._step_bytes() or self._earlier.get("step_bytes", 0)}

    def _step_bytes(self) -> int:
        """What the step takes for the largest batch so far; 0 where nobody knows."""
        if not self._shapes:
            return 0
        batch = self._shapes[max(self._shapes, key=math.prod)]
        # JAX has kept the program that it compiled for these very arrays.
        program = self._step.lower(self._state, self.job.tuning.frozen, batch).compile()
        found = memory(program)
        return 0 if found is None else found.total

    def _due(self, every: int | None) -> bool:
        return self.done == self.steps or (every is not None and self.done % every == 0)

    def _late(self) -> bool:
        """Whether too much would be lost now; of several processes, the first one's clock says it,
        about once in `ASK_SECONDS`."""
        if self.done < self._ask:
            return False
        since = time.monotonic() - self._saved
        if not processes.several():
            return since >= SAVE_SECONDS
        seconds, steps = self.log.timed
        until = max(1, int(ASK_SECONDS * steps / seconds)) if steps else 1
        late, until = processes.agreed(since >= SAVE_SECONDS, min(until, LARGEST - self.steps))
        self._ask = self.done + until
        return bool(late)

    def _advance(self) -> None:
        """One optimizer step; its metrics stay on the device for now."""
        batch = next(self._batches)
        tokens, shape = int(batch["mask"].sum()), batch["tokens"].shape
        known = shape in self._shapes
        batch = put_rows(batch, self._where)
        with contextlib.nullcontext() if known else self.log.paused():  # it compiles
            self._state, metrics = self._step(self._state, self.job.tuning.frozen, batch)
        self._shapes[shape] = jax.tree.map(_shape, batch)
        self.done, self.metrics, self._tokens = self.done + 1, None, self._tokens + tokens
        self._pending.append((self.done, metrics, tokens))

    def _report(self, keep: int) -> None:
        """Logs the metrics of all steps but the last ``keep``, and stops where none is finite."""
        batches = self.job.batches
        while len(self._pending) > keep:
            step, metrics, tokens = self._pending.pop(0)
            numbers = {name: float(value) for name, value in metrics.items()}
            nonfinite = int(numbers.pop("nonfinite_steps"))
            self.log.step(step, numbers, tokens=tokens)
            if not nonfinite:
                continue
            where = f"step {step} ({batches.where(batches.example_ids(step - 1))})"
            self.log.warn(f"the loss or its gradient is not finite in {where}: nothing was changed")
            if nonfinite >= self.run.patience:
                self._save()
                raise Diverged(
                    f"the loss was not finite for {nonfinite} steps in a row, the last {where}; the"
                    f" state after step {step - nonfinite} is kept in {self.folder}: look at these"
                    " rows, or start again with a lower --lr"
                )

    def _evaluate(self) -> None:
        try:
            with self.log.paused(), self._signals.at_once():
                found = self.job.evaluate(self._state.trainable)
        except StoppedNow:
            self._save()
            self._stop()
        except InputError as error:
            if self.done:
                self._save()
            raise type(error)(f"the evaluation after step {self.done}: {error}") from error
        self.log.evaluation(self.done, found)
        if not math.isfinite(score := self.job.criterion(found)):
            self.log.warn(
                f"the score after step {self.done} is {score}: this step is never the best one"
            )
        self.metrics = found

    def _save(self) -> None:
        score = None if self.metrics is None else self.job.criterion(self.metrics)
        with self.log.paused():
            known = CheckpointMetadata(
                data=self._batches.get_state(),
                base=self.base_digest,
                metrics=self.metrics,
                spent=self.spent(),
                sources=dict(self.job.sources),
            )
            self._checkpoints.save(self._state, known, score)
        self._saved, self.log.best = time.monotonic(), self._checkpoints.best

    def _stop(self) -> NoReturn:
        number = self._signals.received or signal.SIGTERM
        raise Interrupted(number, f"saved after step {self.done} of {self.steps}")


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype; of one that lies on devices, how it does too."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


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
    if processes.several():
        trainable = processes.fetch(trainable)
    if not processes.first():
        return
    config = models.config_to_dict(base.config)
    adapter = ha.Adapter(*tuning.adapter(trainable), base.name, config, metadata)
    try:
        ha.save(folder, adapter, base.params)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error


def _evaluated(row: Metrics) -> Metrics:
    """The evaluation's metrics in a row of metrics.jsonl."""
    return {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
