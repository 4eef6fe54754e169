"""Measure a run's adapter again."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import jax

from hyperadapt_jax.tables import table
from train import base, glue, methods, options
from train.errors import InputError
from train.exam import Exam
from train.methods import Tuning
from train.options import AdapterOptions, ModelOptions
from train.recipes import sft
from train.report import write
from train.trained import Trained, TrainedOptions, find


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a run's best adapter again, as the run did, on its held-out data or on other.

    What the run was told, its config.yaml says. Numbers are those of the run if nothing is changed.
    """

    folder: Path
    """Folder of a run that came to its end."""
    data: str | None = None
    """Other rows, with the columns that the run's had: for glue, GLUE's folder, a file or a data
    set of the hub; for sft, what --eval-data may be."""
    split: str | None = None
    """Split of --data where that is a folder or a data set of the hub; for sft."""
    rows: int | None = None
    """How many of the rows are measured on; for sft."""
    questions: int | None = None
    """How many of them the model answers; for sft."""
    model: str | None = None
    """The base model, where it lies elsewhere now."""
    metrics: Path | None = None
    """Write the metrics to this JSON file."""
    predictions: Path | None = None
    """Write the model's answers to this file, one JSON object a line; for sft."""
    quiet: bool = False
    """Print errors alone."""


def run(chosen: Options) -> None:
    """Measures, prints a table and writes the files that are asked for.

    Raises:
      InputError: there is no run, adapter, base model or data, or an option is not for this run.
      AdapterError, CheckpointError: the adapter or the base is damaged, or they do not fit.
    """
    file = chosen.folder / options.CONFIG
    recipe = options.read_config(file).get("recipe")
    if recipe not in _MEASURES:
        raise InputError(f"{file} is of no recipe that trains: its recipe is {recipe!r}")
    for name in _SFT if recipe != "sft" else ():
        if getattr(chosen, name) is not None:
            raise InputError(f"--{name} is for runs of sft, and {chosen.folder} is one of {recipe}")
    module = importlib.import_module(f"train.recipes.{recipe}")
    theirs = options.parse(recipe, module.Options, ["--config", str(file)])
    trained = find(TrainedOptions(adapter=chosen.folder, model=chosen.model))
    model = getattr(theirs, "model", ModelOptions(model="", remat="none"))
    model = dataclasses.replace(model, model=trained.base.name)
    metrics = _MEASURES[recipe](chosen, theirs, model, trained)
    if chosen.metrics is not None:
        write(chosen.metrics, json.dumps(metrics, indent=2) + "\n")
    if not chosen.quiet:
        rows = [[name, f"{value:.4f}"] for name, value in metrics.items()]
        print(table(["metric", "value"], rows, right="value"))


def _tune(theirs: Any, loaded: base.Base, trained: Trained, head: str | None) -> tuple[Tuning, Any]:
    """The run's method on its base, and what it trained."""
    tuning = methods.tune(loaded, theirs, head=head)
    trainable = {"scales": trained.adapter.scales, "full": trained.adapter.full}
    if jax.tree.structure(trainable) != jax.tree.structure(tuning.trainable):
        raise InputError("the adapter has not what its run's configuration trains")
    return tuning, trainable


def _glue(chosen: Options, theirs: Any, model: ModelOptions, trained: Trained) -> dict[str, float]:
    from train.recipes.glue import HEAD, evaluation

    task, tokenizer = glue.TASKS[theirs.task], base.tokenizer(model)
    examples = {}
    for split in task.dev:
        rows, _ = glue.read(task, chosen.data or theirs.data, split)
        examples[split] = glue.tokenise(rows, tokenizer, theirs.max_length).data
    loaded = base.load(model, task.outputs, quiet=chosen.quiet)
    tuning, trainable = _tune(theirs.adapter, loaded, trained, HEAD)
    return evaluation(task, tuning, examples, theirs.eval_batch_size)(trainable)


def _sft(chosen: Options, theirs: Any, model: ModelOptions, trained: Trained) -> dict[str, float]:
    changes = {
        "eval_data": chosen.data,
        "eval_split": chosen.split,
        "eval_rows": chosen.rows,
        "questions": chosen.questions,
    }
    asked = {name: value for name, value in changes.items() if value is not None}
    if "eval_rows" in asked and not (chosen.data or theirs.eval_data):
        raise InputError(f"--rows: {chosen.folder} held out rows of its own; give --data")
    theirs = dataclasses.replace(theirs, **asked)
    tokenizer = base.tokenizer(model)
    held_out = sft.read_eval(theirs) if theirs.eval_data is not None else sft.read(theirs)[1]
    loaded = base.load(model, quiet=chosen.quiet)
    head = "head/.*" if theirs.adapter.method == "head" else None
    tuning, trainable = _tune(theirs.adapter, loaded, trained, head)
    questions = sft.ask(theirs, loaded, held_out, tokenizer)
    metrics = sft.evaluation(theirs, tuning, held_out, tokenizer, questions)(trainable)
    if chosen.predictions is not None:
        answers = questions.answers(tuning.forward, trainable, tuning.frozen)
        questions.save(chosen.predictions, answers)
    return metrics


def _exam(chosen: Options, theirs: Any, model: ModelOptions, trained: Trained) -> dict[str, float]:
    if chosen.data is not None:
        raise InputError("--data: demo and pretrain make their problems; they read no data")
    module = importlib.import_module(type(theirs).__module__)
    loaded, tokenizer = base.load(model, quiet=chosen.quiet), base.tokenizer(model)
    adapter = getattr(theirs, "adapter", AdapterOptions(method="full"))
    head = "head/.*" if adapter.method == "head" else None
    tuning, trainable = _tune(adapter, loaded, trained, head)
    kinds, inner = list(module.KINDS), tokenizer.backend_tokenizer
    exam = Exam.of(kinds, theirs.problems, seed=1, tokenizer=inner)
    return exam.accuracy(exam.answers(tuning.forward, trainable, tuning.frozen))


_MEASURES = {"glue": _glue, "sft": _sft, "demo": _exam, "pretrain": _exam}
_SFT = ("split", "rows", "questions", "predictions")
