"""Measure a run's adapter again."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning
from hyperadapt_jax.tables import table

from .. import base, data, glue, methods, options, runs
from ..errors import InputError, warn
from ..exam import Exam
from ..loop import BASE, SOURCES, other_source
from ..options import AdapterOptions, ModelOptions, Place
from ..report import write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a run's best adapter again, as the run did, on its held-out data or on other.

    What the run was told, its config.yaml says; if nothing is changed, its numbers come again.

    Examples:
      python -m train evaluate --folder runs/sft
      # Of other rows, the loss and the answers.
      python -m train evaluate --folder runs/sft --data other.jsonl --rows 1000 \\
          --predictions answers.jsonl
      # For a script.
      python -m train evaluate --folder runs/mrpc --metrics metrics.json --quiet
    """

    folder: Path
    """Folder of a run that came to its end."""
    data: Place | None = None
    """Other rows, with the columns that the run's had: for glue, GLUE's folder, a file or a data
    set of the hub; for sft, what --eval-data may be."""
    split: str | None = None
    """Split of --data where that is a folder or a data set of the hub; for sft."""
    rows: int | None = None
    """How many rows of --data are measured on; for sft."""
    questions: int | None = None
    """How many of the rows the model answers; for sft."""
    model: Place | None = None
    """The base model, where it lies elsewhere now."""
    metrics: Path | None = None
    """Write the metrics to this JSON file; null is one that is not finite."""
    predictions: Path | None = None
    """Write the model's answers to this file, one JSON object a line; for sft."""
    quiet: bool = False
    """Print errors alone."""


def run(chosen: Options) -> None:
    """Measures, prints a table and writes the files that are asked for.

    Raises:
      InputError: there is no run, adapter, base model or data, or an option is not for this run.
      AdapterError: the adapter is damaged, or of another base.
    """
    file = chosen.folder / options.CONFIG
    recipe = options.read_config(file).get("recipe")
    if not isinstance(recipe, str) or recipe not in _MEASURES:
        raise InputError(f"{file} is of no recipe that trains: its recipe is {recipe!r}")
    for name in ("split", "rows", "questions", "predictions"):
        if recipe != "sft" and getattr(chosen, name) is not None:
            raise InputError(f"--{name} is for runs of sft, and {chosen.folder} is one of {recipe}")
    if not (chosen.folder / runs.ADAPTER).is_dir():
        raise InputError(f"{chosen.folder} has no adapter: let the run come to its end (--resume)")
    module = importlib.import_module(f".{recipe}", __package__)
    theirs = options.parse(recipe, module.Options, ["--config", str(file)])
    metrics = _MEASURES[recipe](chosen, theirs, module)
    if chosen.metrics is not None:
        known = {k: value if math.isfinite(value) else None for k, value in metrics.items()}
        write(chosen.metrics, json.dumps(known, indent=2) + "\n")
    if not chosen.quiet:
        rows = [[name, f"{value:.4f}"] for name, value in metrics.items()]
        print(table(["metric", "value"], rows, right="value"))


def _model(chosen: Options, model: ModelOptions) -> ModelOptions:
    return model if chosen.model is None else dataclasses.replace(model, model=chosen.model)


def _restore(
    chosen: Options,
    model: ModelOptions,
    adapter: AdapterOptions,
    sources: Mapping[str, str] | None = None,
    *,
    labels: int | None = None,
    seed: int = 0,
) -> tuple[Tuning, Any]:
    """The run's method on its base, and what it trained; the same ones that it had, if it says so.

    ``sources`` are digests of what else the run is made of.
    """
    loaded = base.load(model, labels, seed=seed, quiet=chosen.quiet)
    config = models.config_to_dict(loaded.config)
    found = ha.load(chosen.folder / runs.ADAPTER, loaded.params, base_config=config)
    tuning = methods.tune(loaded, adapter)
    trained = {"scales": found.scales, "full": found.full}
    for part, wanted in tuning.trainable.items():
        if other := sorted(wanted.keys() ^ trained[part].keys()):
            has = "has" if other[0] in trained[part] else "lacks"
            raise InputError(
                f"the adapter in {chosen.folder} {has} {other[0]}, unlike what its"
                f" {options.CONFIG} trains now: another version of this program left it out, or the"
                " file was changed; train it again"
            )
    known = found.metadata.get(SOURCES, {})
    if sources and not known:
        warn(f"{chosen.folder} does not say which data it was made on: it is not compared")
    if known:
        sources = {BASE: base.fingerprint(tuning.frozen), **(sources or {})}
    if changed := other_source(known, sources or {}):
        raise InputError(
            f"{changed} changed since the run in {chosen.folder}, so that other numbers would come"
            " out: give it as it was" + (", or other rows by --data" if "rows" in changed else "")
        )
    return tuning, trained


def _tell(chosen: Options) -> Callable[[str], None]:
    return (lambda text: None) if chosen.quiet else print


def _glue(chosen: Options, theirs: Any, recipe: Any) -> dict[str, float]:
    task, model = glue.TASKS[theirs.task], _model(chosen, theirs.model)
    tokenizer, examples = base.tokenizer(model), {}
    sources = {"tokenizer": data.identity(tokenizer)}
    asked = dataclasses.replace(theirs, data=chosen.data or theirs.data, model=model)
    for split in task.dev:
        made, rows, _ = recipe.read(asked, task, split, tokenizer, _tell(chosen))
        examples[split] = made.data
        if chosen.data is None:
            sources[recipe.name(split)] = rows
    tuning, trained = _restore(
        chosen, model, theirs.adapter, sources, labels=task.outputs, seed=theirs.run.seed
    )
    return recipe.evaluation(task, tuning, examples, theirs.eval_batch_size)(trained)


def _sft(chosen: Options, theirs: Any, recipe: Any) -> dict[str, float]:
    if chosen.data is None and theirs.eval_data is None and chosen.rows is not None:
        raise InputError(f"--rows: {chosen.folder} held out rows of its own; give --data")
    asked = {
        "model": _model(chosen, theirs.model),
        "eval_data": chosen.data,
        "eval_split": chosen.split,
        "eval_rows": chosen.rows,
        "questions": chosen.questions,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    theirs = dataclasses.replace(theirs, **given)
    described, tokenizer = recipe.describe(theirs), base.tokenizer(theirs.model)
    held_out = recipe.read_eval(theirs) if theirs.eval_data else recipe.read(theirs)[1]
    sources = {"tokenizer": data.identity(tokenizer)}
    rows, _ = recipe.measured(theirs, held_out, tokenizer, _tell(chosen))
    if chosen.data is chosen.split is chosen.rows is None:
        sources |= rows
    questions = recipe.ask(theirs, described, held_out, tokenizer)
    tuning, trained = _restore(chosen, theirs.model, theirs.adapter, sources)
    metrics = recipe.evaluation(theirs, tuning, held_out, tokenizer, questions)(trained)
    if chosen.predictions is not None:
        answers = questions.answers(tuning.forward, trained, tuning.frozen)
        questions.save(chosen.predictions, answers)
    return metrics


def _exam(chosen: Options, theirs: Any, recipe: Any) -> dict[str, float]:
    if chosen.data is not None:
        raise InputError(f"--data: {chosen.folder} is of a recipe that makes its own problems")
    model = getattr(theirs, "model", None) or ModelOptions(model=str(chosen.folder / "fresh"))
    model, adapter = _model(chosen, model), getattr(theirs, "adapter", _FULL)
    tokenizer = base.tokenizer(model).backend_tokenizer
    tuning, trained = _restore(chosen, model, adapter)
    exam = Exam.of(list(recipe.KINDS), theirs.problems, seed=1, tokenizer=tokenizer)
    return exam.measure(tuning.forward, trained, tuning.frozen)


_FULL = AdapterOptions(method="full")  # how the embedded model is made
_MEASURES = {"glue": _glue, "sft": _sft, "demo": _exam, "pretrain": _exam}
