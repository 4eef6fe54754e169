"""GLUE (Wang et al., 2019): its tasks, their files as GLUE lays them out, and its metrics."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import datasets

from ..errors import InputError
from . import readers
from .columns import Label, Number, Text

HUB = "nyu-mll/glue"


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
      name: the task's, and the configuration's of the hub's data set.
      folder: of its files, within GLUE's.
      columns: of its files: one text or two, then the label.
      metrics: the first of them says which step of a run is best.
      labels: names of the classes in the order of their numbers; none for a number from 0 to 5.
      texts: columns of the hub's data set, where they have other names.
      header: columns of all lines, where the files begin without.
      short: lines may lack columns.
      dev: the splits to evaluate on.
    """

    name: str
    folder: str
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    header: tuple[str, ...] | None = None
    short: bool = False
    dev: tuple[str, ...] = ("dev",)

    @property
    def outputs(self) -> int:
        """How many numbers a model's head gives for a row; one is a regression's."""
        return len(self.labels) or 1


_PAIR = ("sentence1", "sentence2", "label")
_ENTAILED = ("entailment", "not_entailment")

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "cola",
            "CoLA",
            ("sentence", "label"),
            ("matthews",),
            ("unacceptable", "acceptable"),
            header=("source", "label", "mark", "sentence"),
        ),
        GlueTask("sst2", "SST-2", ("sentence", "label"), ("accuracy",), ("negative", "positive")),
        GlueTask(
            "mrpc",
            "MRPC",
            ("#1 String", "#2 String", "Quality"),
            ("accuracy", "f1"),
            ("not_equivalent", "equivalent"),
            texts=("sentence1", "sentence2"),
            short=True,
        ),
        GlueTask("stsb", "STS-B", ("sentence1", "sentence2", "score"), ("pearson", "spearman")),
        GlueTask("rte", "RTE", _PAIR, ("accuracy",), _ENTAILED),
        GlueTask("wnli", "WNLI", _PAIR, ("accuracy",), ("not_entailment", "entailment")),
        GlueTask("qnli", "QNLI", ("question", "sentence", "label"), ("accuracy",), _ENTAILED),
        GlueTask(
            "qqp",
            "QQP",
            ("question1", "question2", "is_duplicate"),
            ("accuracy", "f1"),
            ("not_duplicate", "duplicate"),
            short=True,
        ),
        GlueTask(
            "mnli",
            "MNLI",
            ("sentence1", "sentence2", "gold_label"),
            ("accuracy",),
            ("entailment", "neutral", "contradiction"),
            texts=("premise", "hypothesis"),
            short=True,
            dev=("dev_matched", "dev_mismatched"),
        ),
    )
}


def read(
    task: GlueTask, source: str | Path = HUB, split: str = "train", *, cache_dir: Path | None = None
) -> tuple[datasets.Dataset, int]:
    """Reads a split of a task.

    Args:
      task: which.
      source: GLUE's folder, with ``MRPC/train.tsv`` and the like, the task's own folder within, or
        the hub's data set.
      split: ``train``, or one of ``task.dev``.
      cache_dir: where rows are kept.

    Returns:
      The rows, with columns ``text``, ``pair`` if there are two texts, ``label`` and
      `train.data.readers.PLACE`; and how many were dropped, because they lack columns or a label.

    Raises:
      InputError: a file is missing, a row is not what it should be, or all training rows have one
        label.
    """
    *texts, label = task.columns
    kind = Label(task.labels, missing=("-",)) if task.labels else Number(0, 5)
    folder = Path(os.path.expanduser(source))
    options: dict[str, Any] = {"header": task.header, "short": task.short}
    if folder.is_dir():
        files = [folder / name / f"{split}.tsv" for name in (task.folder, ".")]
        present = [file for file in files if file.is_file()]
        if not present:
            raise InputError(f"{folder} holds neither {task.folder}/{split}.tsv nor {split}.tsv")
        source = present[0]
    else:
        texts, label = list(task.texts or texts), "label"
        options = {"config": task.name, "split": split.replace("dev", "validation")}
    columns = {**dict.fromkeys(texts, Text()), label: kind}
    rows = readers.read(source, columns, places=True, cache_dir=cache_dir, **options)
    names = *("text", "pair")[: len(texts)], "label"
    rows = rows.rename_columns(dict(zip(columns, names, strict=True)))
    labels = rows["label"][:]
    kept = [i for i, label in enumerate(labels) if label is not None]
    found = {labels[i] for i in kept}
    if not kept:
        raise InputError(f"{source}: none of the {len(rows)} rows of {split} has a label")
    if split == "train" and task.labels and len(found) == 1:
        raise InputError(
            f"{source}: all {len(kept)} training rows have the label {task.labels[found.pop()]!r}:"
            " there is nothing to learn"
        )
    dropped = len(rows) - len(kept)
    return rows.select(kept) if dropped else rows, dropped
