"""Measure a run's adapter again."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning
from hyperadapt_jax.tables import table

from .. import base, methods
from ..assembly import describe, write_rows
from ..data.examples import identity
from ..errors import InputError, warn
from ..files import write_json
from ..options import CONFIG, DeviceOptions, Place, parse, read_config
from ..parallel.mesh import Layout, activations_of
from ..run.folder import ADAPTER
from ..tasks.task import Evaluation, Setting
from ..trainer.loop import BASE, SOURCES, other_source
from . import RECIPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a run's best adapter again, as the run did, on its held-out data or on other.

    The options are those of the run's config.yaml; unchanged, they give the same metrics again.

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
    set of the hub; for sft and classify, what --eval-data may be."""
    split: str | None = None
    """Split of --data where that is a folder or a data set of the hub; for sft and classify."""
    rows: int | None = None
    """How many rows of --data are measured on; for sft and classify."""
    questions: int | None = None
    """How many of the rows the model answers; for sft."""
    model: Place | None = None
    """The base model, where it lies elsewhere now."""
    metrics: Path | None = None
    """Write the metrics to this JSON file; null is one that is not finite."""
    predictions: Path | None = None
    """Write the generated answers to this file, one JSON object a line; for sft."""
    quiet: bool = False
    """Print errors alone."""
    devices: DeviceOptions = DeviceOptions()


def run(options: Options) -> None:
    """Measures, prints a table and writes the files that are asked for.

    Raises:
      InputError: there is no run, adapter, base model or data, or an option is not for this run.
      AdapterError: the adapter is damaged, or of another base.
    """
    theirs = load_options(options)
    asked = {name: getattr(options, name) for name in ("data", "split", "rows", "questions")}
    task = theirs.task.elsewhere(**asked)
    if not (options.folder / ADAPTER).is_dir():
        raise InputError(f"{options.folder} has no adapter: let the run come to its end (--resume)")
    model = theirs.model
    if options.model is not None:
        model = dataclasses.replace(model, model=options.model)
    log = (lambda text: None) if options.quiet else print
    setting, layout = describe(task, model, options.devices, theirs.run.seed, log)
    evaluation = task.evaluation(setting)
    if options.predictions is not None and evaluation.generate is None:
        raise InputError(f"--predictions: a run of {task.name} generates no answers")
    same = options.data is options.split is options.rows is None
    tuning, trained = _restore(options, theirs, setting, layout, evaluation, same)
    metrics = evaluation.on(tuning)(trained)
    if options.predictions is not None:
        write_rows(options.predictions, evaluation.generate(tuning, trained))
    if options.metrics is not None:
        write_json(options.metrics, metrics)
    if not options.quiet:
        rows = [[name, f"{value:.4f}"] for name, value in metrics.items()]
        print(table(["metric", "value"], rows, right="value"))


def load_options(options: Options) -> Any:
    """The options that a run was given, with its folder where it lies now.

    Raises:
      InputError: the folder holds no run, or one that does not train.
    """
    file = options.folder / CONFIG
    recipe = read_config(file).get("recipe")
    module: Any = None
    if isinstance(recipe, str) and recipe in RECIPES:
        module = importlib.import_module(f".{recipe}", __package__)
    if "task" not in getattr(getattr(module, "Options", None), "__dataclass_fields__", ()):
        raise InputError(f"{file} is of no recipe that trains: its recipe is {recipe!r}")
    theirs = parse(str(recipe), module.Options, ["--config", str(file)])
    return dataclasses.replace(theirs, run=dataclasses.replace(theirs.run, folder=options.folder))


def _restore(
    options: Options,
    theirs: Any,
    setting: Setting,
    layout: Layout | None,
    evaluation: Evaluation,
    same: bool,
) -> tuple[Tuning, Any]:
    """The run's method on its base, and what it trained; the same ones that it had, if it says so.

    ``same`` is whether it is measured on the data that it was measured on before.
    """
    labels, seed = theirs.task.num_labels, theirs.run.seed
    loaded = base.load(setting.model, labels, layout, seed=seed, quiet=options.quiet)
    config = models.config_to_dict(loaded.config)
    found = ha.load(options.folder / ADAPTER, loaded.params, base_config=config)
    tuning = methods.tune(loaded, theirs.adapter, seed)
    wanted = jax.eval_shape(tuning.adapter, tuning.trainable)
    for has_now, has in zip(wanted, (found.scales, found.full), strict=True):
        if other := sorted(has_now.keys() ^ has.keys()):
            verb = "has" if other[0] in has else "lacks"
            raise InputError(
                f"the adapter in {options.folder} {verb} {other[0]}, unlike what its"
                f" {CONFIG} trains now: another version of this program left it out, or the"
                " file was changed; train it again"
            )
    known, sources = found.metadata.get(SOURCES, {}), {}
    if evaluation.sources:
        sources = {"tokenizer": identity(setting.tokenizer)}
        sources |= evaluation.sources if same else {}
        if not known:
            warn(f"{options.folder} does not say which data it was made on: it is not compared")
    if known:
        sources = {BASE: base.fingerprint(tuning.frozen), **sources}
    if changed := other_source(known, sources):
        raise InputError(
            f"{changed} changed since the run in {options.folder}, so that other numbers would come"
            " out: give it as it was" + (", or other rows by --data" if "rows" in changed else "")
        )
    restored = ha.methods.restore(
        loaded.fn, loaded.params, found, replicate=activations_of(loaded.fn).rows
    )
    return restored, restored.trainable
