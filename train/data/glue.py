"""GLUE (Wang et al., 2019): its tasks, their files as GLUE lays them out, and its metrics."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..errors import InputError
from . import readers as data
from .readers import PLACE, Examples, Label, Number, Text
from .special import SpecialTokens

HUB = "nyu-mll/glue"
EMPTY = "with an empty text"


@dataclasses.dataclass(frozen=True)
class Task:
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

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            ("sentence", "label"),
            ("matthews",),
            ("unacceptable", "acceptable"),
            header=("source", "label", "mark", "sentence"),
        ),
        Task("sst2", "SST-2", ("sentence", "label"), ("accuracy",), ("negative", "positive")),
        Task(
            "mrpc",
            "MRPC",
            ("#1 String", "#2 String", "Quality"),
            ("accuracy", "f1"),
            ("not_equivalent", "equivalent"),
            texts=("sentence1", "sentence2"),
            short=True,
        ),
        Task("stsb", "STS-B", ("sentence1", "sentence2", "score"), ("pearson", "spearman")),
        Task("rte", "RTE", _PAIR, ("accuracy",), _ENTAILED),
        Task("wnli", "WNLI", _PAIR, ("accuracy",), ("not_entailment", "entailment")),
        Task("qnli", "QNLI", ("question", "sentence", "label"), ("accuracy",), _ENTAILED),
        Task(
            "qqp",
            "QQP",
            ("question1", "question2", "is_duplicate"),
            ("accuracy", "f1"),
            ("not_duplicate", "duplicate"),
            short=True,
        ),
        Task(
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
    task: Task, source: str | Path = HUB, split: str = "train", *, cache_dir: Path | None = None
) -> tuple[datasets.Dataset, int]:
    """Read a split of a task.

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
        source = next((file for file in files if file.is_file()), None)
        if source is None:
            raise InputError(f"{folder} holds neither {task.folder}/{split}.tsv nor {split}.tsv")
    else:
        texts, label = task.texts or texts, "label"
        options = {"config": task.name, "split": split.replace("dev", "validation")}
    columns = {**dict.fromkeys(texts, Text()), label: kind}
    rows = data.read(source, columns, places=True, cache_dir=cache_dir, **options)
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


def tokenise(rows: datasets.Dataset, tokenizer: Any, max_length: int) -> Examples:
    """Make examples of rows, between special tokens, the longer text of a pair cut first.

    Text that spells a special token is text.

    Args:
      rows: what `read` gave.
      tokenizer: a fast one of transformers.
      max_length: most tokens of an example.

    Returns:
      Examples of ``tokens``, ``label`` and, if the tokenizer tells texts apart, ``token_types``.

    Raises:
      InputError: ``max_length`` leaves no room for text.
    """
    pairs = "pair" in rows.column_names
    least = tokenizer.num_special_tokens_to_add(pairs) + 1 + pairs
    if max_length < least:
        raise InputError(f"max_length {max_length}: expected at least {least}")

    special = SpecialTokens(tokenizer)

    def encode(texts: Sequence[list], **options: Any) -> Mapping[str, list]:
        return tokenizer(*texts, return_attention_mask=False, verbose=False, **options)

    def examples(columns: Mapping[str, list]) -> dict[str, list]:
        texts = [columns["text"], columns["pair"]] if pairs else [columns["text"]]
        encoded, count = encode(texts), len(columns["label"])
        apart = [[special.apart(text[i]) for text in texts] for i in range(count)]
        truncated = [False] * count
        for i, parts in enumerate(apart):
            # A text that has to be read in parts is given as they are, others as a whole.
            split = max(map(len, parts)) > 1
            row = [[part] for part in parts] if split else [[text[i]] for text in texts]
            again = encode(row, is_split_into_words=split) if split else {}
            for name, values in again.items():
                encoded[name][i] = values[0]
            truncated[i] = len(encoded["input_ids"][i]) > max_length
            if truncated[i]:
                cut = {"truncation": "longest_first", "max_length": max_length}
                for name, values in encode(row, is_split_into_words=split, **cut).items():
                    encoded[name][i] = values[0]
        made = {names[name]: values for name, values in encoded.items()}
        kept = {name: columns[name] for name in ("label", PLACE) if name in columns}
        empty = [any(not text[i].strip() for text in texts) for i in range(count)]
        return {**made, **kept, "truncated": truncated, EMPTY: empty}

    integers = datasets.List(datasets.Value("int32"))
    names = {"input_ids": "tokens"}
    if "token_type_ids" in tokenizer.model_input_names:
        names["token_type_ids"] = "token_types"
    features = {**dict.fromkeys(names.values(), integers), "label": rows.features["label"]}
    key = (data.identity(tokenizer), max_length)
    return data.tokenise(rows, examples, features, key, (EMPTY,))


def metrics(task: Task, found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """GLUE's metrics of a task, as fractions; F1 is of class 1.

    Where a metric is not defined, since all predictions or all labels are one, it is 0; so it is
    where a prediction of a regression is not finite.

    Args:
      task: which.
      found: predictions ``[N]``, classes or numbers, and labels ``[N]`` of each split of
        ``task.dev``.

    Returns:
      Metrics by name; where there are two splits, the name ends with the split's.

    >>> metrics(TASKS["mrpc"], {"dev": (np.array([1, 1, 0]), np.array([1, 0, 0]))})
    {'accuracy': 0.666..., 'f1': 0.666...}
    """
    return {
        metric + split.removeprefix("dev"): _METRICS[metric](*found[split])
        for split in task.dev
        for metric in task.metrics
    }


def best(task: Task) -> str:
    """The name of the metric that says which step of a run is best."""
    return task.metrics[0] + task.dev[0].removeprefix("dev")


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, zero_division=0.0))


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(labels)) == 1 or len(np.unique(predictions)) == 1:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(function: Any, predictions: np.ndarray, labels: np.ndarray) -> float:
    sides = [np.asarray(side, np.float64) for side in (predictions, labels)]
    # What differs by a float32's rounding alone is constant too: its order is noise.
    if not np.isfinite(sides).all() or any(np.ptp(x) <= 1e-6 * np.abs(x).max() for x in sides):
        return 0.0
    return float(function(*sides).statistic)


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
