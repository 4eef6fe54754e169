"""A run, put together of a base model, a method, a task and options."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperadapt_jax.methods import Tuning

from . import base, methods
from .base import Base
from .data.batches import Batches
from .data.examples import identity
from .files import write, write_json
from .options import (
    AdapterOptions,
    DeviceOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    command_line,
    flat,
    make,
)
from .parallel.mesh import Layout, activations_of
from .run import report
from .run.folder import RESULT, open_run
from .run.plots import draw
from .tasks.task import Evaluation, Setting, Task, Training
from .trainer import loop
from .trainer.loop import Result

PREDICTIONS = "predictions.jsonl"
SHOWN = 3  # generations in the report


@dataclasses.dataclass(frozen=True, eq=False)
class Assembly:
    """All of a run that is known before its model is loaded.

    Attributes:
      task: what is learned.
      setting: the model, as shapes alone, and its tokenizer.
      adapter: which method, on which weights.
      run: how long, and with which seed.
      layout: what lies where on several devices; None for one.
      plan: what trains, as text.
      training: the examples to learn from.
      evaluation: how what trains is measured.
    """

    task: Task
    setting: Setting
    adapter: AdapterOptions
    run: RunOptions
    layout: Layout | None
    plan: str
    training: Training
    evaluation: Evaluation

    @property
    def sources(self) -> dict[str, str]:
        """Digests of what the run is made of, except the base; none where it makes its own data."""
        digests = {**self.training.sources, **self.evaluation.sources}
        return {"tokenizer": identity(self.setting.tokenizer), **digests} if digests else {}

    def facts(self, result: Result) -> dict[str, str]:
        """What a report says of a run, and of its devices where there are several."""
        return result.facts | ({} if self.layout is None else {"mesh": str(self.layout)})

    def load(self) -> tuple[Base, Tuning]:
        """The model with its weights, and what trains on it."""
        labels, seed = self.task.num_labels, self.run.seed
        loaded = base.load(self.setting.model, labels, self.layout, seed=seed, quiet=self.run.quiet)
        return loaded, methods.tune(loaded, self.adapter, seed)

    def fit(
        self,
        loaded: Base,
        tuning: Tuning,
        folder: Path,
        optimizer: OptimizerOptions,
        config: Mapping[str, Any],
    ) -> Result:
        """Trains, in a run folder that `open_run` opened; see `train.trainer.loop.fit`."""
        filled = activations_of(loaded.fn).filled
        batches = Batches(
            self.training.examples,
            self.run.batch_size,
            pack=self.training.pack,
            seed=self.run.seed,
            epochs=math.ceil(self.run.epochs),
            steps=self.run.steps,
            divisor=self.run.accumulate,
            filled=filled,
            places=self.training.places,
        )
        if batches.batch_size < self.run.batch_size:
            self.setting.log(
                f"--batch-size {self.run.batch_size}: there are no more than"
                f" {len(self.training.examples)}, which each step takes"
            )
        rows = batches.batch_size // self.run.accumulate
        if (more := filled(rows)) > rows:
            self.setting.log(
                f"--batch-size: each {rows} rows are filled up to {more}, which the mesh divides"
            )
        job = loop.Job(
            name=self.task.name,
            base=loaded,
            tuning=tuning,
            loss=self.task.loss(tuning),
            batches=batches,
            evaluate=self.evaluation.on(tuning),
            criterion=self.task.criterion,
            sources=self.sources,
        )
        return loop.fit(job, folder, optimizer=optimizer, run=self.run, metadata=config)


def assemble(
    task: Task,
    model: ModelOptions,
    adapter: AdapterOptions,
    run: RunOptions,
    devices: DeviceOptions,
) -> Assembly:
    """Reads all that a run needs but for the model's weights, and says what will train.

    Raises:
      InputError: the model, the data or an option cannot be used.
    """
    log: Callable[[str], None] = (lambda text: None) if run.quiet else print
    setting, layout = describe(task, model, devices, run.seed, log)
    plan = methods.table(setting.base, methods.tune(setting.base, adapter))
    log(plan)
    training, evaluation = task.prepare(setting)
    return Assembly(task, setting, adapter, run, layout, plan, training, evaluation)


def describe(
    task: Task,
    model: ModelOptions,
    devices: DeviceOptions,
    seed: int,
    log: Callable[[str], None],
) -> tuple[Setting, Layout | None]:
    """What a task meets, its model as shapes alone, and what lies where on several devices.

    Args:
      task: what is learned or measured.
      model: which model.
      devices: on which devices.
      seed: of whatever is drawn.
      log: shows a line to the user; here, what a mesh does not divide.

    Raises:
      InputError: the model or the devices cannot be used, or the task is none for the model.
    """
    layout = devices.layout()
    setting = Setting(base.load_abstract(model, task.num_labels, layout), model, seed, log)
    task.check(setting.base.config)
    for note in layout.notes(setting.base.config) if layout else ():
        log(note)
    return setting, layout


def launch(recipe: str, options: Any, title: str, command: str | None = None) -> Result:
    """A whole run: trains, and leaves the best adapter, predictions and a report in its folder.

    Args:
      recipe: its name.
      options: options with the groups ``task``, ``model``, ``adapter``, ``optimizer``, ``run`` and
        ``devices``.
      title: of the report.
      command: with which it was started, if not by the command line.

    Raises:
      InputError: the model, the data or the folder cannot be used.
      Interrupted: SIGINT or SIGTERM came, and everything is saved.
    """
    options = dataclasses.replace(options, task=options.task.resolve())
    config = flat(options, recipe)
    with open_run(options.run.folder, config, resume=options.run.resume) as folder:
        made = assemble(options.task, options.model, options.adapter, options.run, options.devices)
        loaded, tuning = made.load()
        result = made.fit(loaded, tuning, folder, options.optimizer, config)
        rows: Sequence[dict[str, Any]] = ()
        if made.evaluation.generate is not None:
            rows = made.evaluation.generate(tuning, result.trainable)
            write_rows(folder / PREDICTIONS, rows)
        figures: Mapping[str, Any] = {}
        if made.evaluation.figures is not None:
            figures = made.evaluation.figures(tuning, result.trainable)
            for name, figure in figures.items():
                draw(folder / name, figure)
        facts = {**made.facts(result), **made.training.summary, **made.evaluation.summary}
        command = command or command_line(recipe, options)
        report.write(folder, title, made.plan, result.rows, facts, command, rows[:SHOWN], figures)
        write_result(folder, result)
    what = "adapter, metrics, predictions" if rows else "adapter, metrics"
    made.setting.log(f"\n{result}\n{what}, curves and report are in {folder}")
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """The options that all recipes which train have in common."""

    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    run: RunOptions
    devices: DeviceOptions = DeviceOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options(_Settings):
    task: Task


def fit(model: str | Path, method: str, task: Task, **given: Any) -> Result:
    """Fine-tunes from Python: what the recipes do, with your own task and data.

    Args:
      model: a Hugging Face folder, or a repository of the hub.
      method: a name in `hyperadapt_jax.methods.METHODS`.
      task: what is learned, such as `train.Instructions`, whose data may be a list of dicts or a
        ``datasets.Dataset``; or a subclass of `train.Task`, with a loss and a measure of its own.
      **given: other options, named as on the command line: ``folder``, which is needed, ``steps``,
        ``lr``, ``batch_size``, ``targets``, ``dtype``, ``mesh``, ``resume``, ...

    Returns:
      What the run came to. Printed, it is a table; its adapter lies in the folder.

    Raises:
      InputError: the model, the data or an option cannot be used.
      Interrupted: the run was stopped, and everything is saved: ``resume=True`` continues it.
    """
    known = make(_Settings, {"model": model, "method": method, **given})
    groups = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
    title = f"{task.name}: {known.adapter.method}"
    return launch("fit", _Options(task=task, **groups), title, "train.fit(...)")


def write_result(folder: Path, result: Result) -> None:
    """Writes ``result.json``, the last file of a run; one that is there is of the session that
    trained, and stays."""
    if not (folder / RESULT).exists():
        write_json(folder / RESULT, result.numbers)


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, whole or not at all.

    Raises:
      InputError: the file cannot be written.
    """
    write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
