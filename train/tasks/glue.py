"""Fine-tune an encoder on a task of GLUE, measured as GLUE measures it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from hyperadapt_jax.methods import Tuning

from .. import base, data, finite, glue, losses, methods, options, runs
from ..batches import Batches, stream
from ..errors import InputError
from ..loop import Task, fit
from ..options import AdapterOptions, ModelOptions, OptimizerOptions, Place, RunOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune an encoder on a task of GLUE: a new head, and scale vectors on its weights.

    Metrics are GLUE's own, on the development set, before, during and after; the adapter of the
    best step is kept.

    Examples:
      python -m train glue --task mrpc --model FacebookAI/roberta-base --folder runs/mrpc
      # GLUE's own files, a head that learns faster, and ten epochs.
      python -m train glue --task rte --model FacebookAI/roberta-large --data ~/glue \\
          --folder runs/rte --epochs 10 --lr 5e-3 --head-lr 5e-4
      # A run that was stopped, from where it was saved.
      python -m train glue --config runs/rte/config.yaml --folder runs/rte --resume
    """

    task: Literal["cola", "sst2", "mrpc", "stsb", "rte", "wnli", "qnli", "qqp", "mnli"]
    """The task."""
    data: Place = Place(glue.HUB)
    """GLUE's folder, which holds MRPC/train.tsv and the like, or the data set's name on the hub."""
    max_length: int = 128
    """Most tokens of a row; longer texts are cut, and counted."""
    dropout: bool = True
    """Train with the dropout that the model's config.json asks for."""
    eval_batch_size: int = 128
    """Rows that are evaluated at once."""
    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    optimizer: OptimizerOptions = OptimizerOptions(head_lr=1e-3)
    run: RunOptions


def run(chosen: Options) -> None:
    """Trains, and leaves the best adapter and a report in the run folder.

    Raises:
      InputError: the model, the data or the folder cannot be used.
    """
    config, task = options.flat(chosen, "glue"), glue.TASKS[chosen.task]
    described = base.describe(chosen.model, task.outputs)
    if chosen.max_length > described.config.max_length:
        raise InputError(
            f"--max-length {chosen.max_length}: the model takes {described.config.max_length}"
        )
    if chosen.eval_batch_size < 1:
        raise InputError(f"--eval-batch-size {chosen.eval_batch_size}: give at least 1")
    plan = methods.table(described, methods.tune(described, chosen.adapter))
    tell = (lambda text: None) if chosen.run.quiet else print
    tell(plan)
    with runs.claim(chosen.run.folder, config, resume=chosen.run.resume) as folder:
        tokenizer = base.tokenizer(chosen.model)
        training, rows, told = read(chosen, task, "train", tokenizer, tell)
        sources = {"tokenizer": data.identity(tokenizer), "training rows": rows}
        examples, counts = {}, {"train": told}
        for split in task.dev:
            made, rows, counts[split] = read(chosen, task, split, tokenizer, tell)
            examples[split], sources[name(split)] = made.data, rows
        batches = Batches(
            training.data,
            chosen.run.batch_size,
            seed=chosen.run.seed,
            epochs=chosen.run.passes,
            divisor=chosen.run.accumulate,
            places=training.places,
        )
        loaded = base.load(chosen.model, task.outputs, seed=chosen.run.seed, quiet=chosen.run.quiet)
        tuning = methods.tune(loaded, chosen.adapter)
        result = fit(
            Task(
                name=chosen.task,
                base=loaded,
                tuning=tuning,
                loss=losses.classification(tuning, dropout=chosen.dropout),
                batches=batches,
                evaluate=evaluation(task, tuning, examples, chosen.eval_batch_size),
                score=lambda metrics: metrics[glue.best(task)],
                sources=sources,
            ),
            folder,
            optimizer=chosen.optimizer,
            run=chosen.run,
            metadata=config,
        )
        title = f"GLUE: {chosen.task}, {chosen.adapter.method}"
        command = options.command("glue", chosen)
        facts = result.facts | counts
        runs.report(folder, title, plan, result.rows, facts, command)
    tell(f"\n{result}\nadapter, metrics, curves and report are in {folder}")


def read(
    chosen: Options,
    task: glue.Task,
    split: str,
    tokenizer: Any,
    tell: Callable[[str], None],
) -> tuple[data.Examples, str, str]:
    """A split's examples, the digest of what they hold, and what is told of what was lost."""
    rows, dropped = glue.read(task, chosen.data, split)
    examples = glue.tokenise(rows, tokenizer, chosen.max_length)
    base.check_tokens((row["tokens"] for row in examples.data), tokenizer, chosen.model)
    told = examples.tell(split, chosen.max_length, tell, dropped)
    return examples, data.digest(examples.data), told


def name(split: str) -> str:
    """What a split's rows are called where they are told from others."""
    return f"rows of {split}"


def evaluation(task: glue.Task, tuning: Tuning, examples: dict, batch_size: int):
    """A function from what trains to the task's metrics on its development sets.

    Args:
      task: which.
      tuning: the model.
      examples: of each of ``task.dev``.
      batch_size: rows at once.

    The function counts rows whose outputs are not finite, as ``nonfinite``, and raises InputError
    where all are.
    """
    logits = jax.jit(lambda *args: losses.logits(tuning, *args))
    sets = {name: Batches(rows, batch_size, shuffle=False) for name, rows in examples.items()}

    def evaluate(trainable) -> dict[str, float]:
        found, kept = {}, []
        for split, batches in sets.items():
            outputs, labels = [], []
            for batch in stream(batches):
                real = batch.pop("rows") >= 0
                outputs.append(np.asarray(logits(trainable, tuning.frozen, batch))[real])
                labels.append(batch["label"][real])
            outputs, labels = np.concatenate(outputs), np.concatenate(labels)
            good = np.isfinite(outputs).all(-1)
            kept += good.tolist()
            if task.labels:  # what is not finite is wrong, whatever the label
                predictions = np.where(good, outputs.argmax(-1), (labels + 1) % len(task.labels))
            else:
                predictions = outputs[:, 0]
            found[split] = predictions, labels
        metrics, missing = glue.metrics(task, found), finite.count(kept)
        if missing and not task.labels:  # a correlation knows no wrong prediction
            metrics = dict.fromkeys(metrics, math.nan)
        return metrics | missing

    return evaluate
