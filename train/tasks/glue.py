"""GLUE's tasks, measured as GLUE measures them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import numpy as np

from hyperadapt_jax.methods import Tuning

from ..data import glue
from ..data.examples import Examples
from ..data.glue import GlueTask
from ..metrics import finite
from ..metrics.classification import METRICS
from ..options import Place
from .classification import Classification, predicted
from .task import Evaluation, Metrics, Setting, Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glue(Classification):
    """A task of GLUE, with a new head."""

    task: Literal["cola", "sst2", "mrpc", "stsb", "rte", "wnli", "qnli", "qqp", "mnli"]
    """The task."""
    data: Place = Place(glue.HUB)
    """GLUE's folder, which holds MRPC/train.tsv and the like, or the data set's name on the hub."""

    @property
    def name(self) -> str:
        return self.task

    @property
    def primary(self) -> str:
        return best(self.glue)

    @property
    def num_labels(self) -> int:
        return self.glue.outputs

    @property
    def glue(self) -> GlueTask:
        """What GLUE says of the task."""
        return glue.TASKS[self.task]

    def prepare(self, setting: Setting) -> tuple[Training, Evaluation]:
        training, digest, summary = self._read("train", setting)
        sources, counts = {"training rows": digest}, {"train": summary}
        train = Training(training.data, sources, counts, training.places)
        return train, self.evaluation(setting)

    def evaluation(self, setting: Setting) -> Evaluation:
        examples, sources, counts = {}, {}, {}
        for split in self.glue.dev:
            made, sources[f"rows of {split}"], counts[split] = self._read(split, setting)
            examples[split] = made
        return Evaluation(lambda tuning: self.measure(tuning, examples), sources, counts)

    def elsewhere(self, *, data: Place | None = None, **others: Any) -> Self:
        """The same task on other rows: GLUE's folder, a file or a data set of the hub."""
        super().elsewhere(**others)
        return self if data is None else dataclasses.replace(self, data=data, report_half=False)

    def measure(self, tuning: Tuning, examples: dict[str, Examples]) -> Callable[[Any], Metrics]:
        """A function from what trains to the task's metrics on its development sets.

        It counts rows whose outputs are not finite, as ``nonfinite``, and raises InputError where
        all are.
        """
        task, outputs = self.glue, self.outputs(tuning, examples)

        def evaluate(trainable: Any) -> Metrics:
            found = outputs(trainable)
            splits = np.repeat(list(found), [len(labels) for _, labels in found.values()])
            logits, labels = map(np.concatenate, zip(*found.values(), strict=True))
            predictions, good = predicted(logits, labels)
            if not task.labels:
                predictions = logits[:, 0]

            def score(rows: np.ndarray) -> Metrics:
                chosen = {name: rows[splits[rows] == name] for name in found}
                scores = metrics(task, {k: (predictions[i], labels[i]) for k, i in chosen.items()})
                missing = finite.count(good[rows].tolist())
                if missing and not task.labels:  # a correlation knows no wrong prediction
                    scores = dict.fromkeys(scores, math.nan)
                return scores | missing

            # Of a regression, rows whose numbers are close are a group.
            return self.scored(score, list(zip(splits, labels.round(), strict=True)))

        return evaluate

    def _read(self, split: str, setting: Setting) -> tuple[Examples, str, str]:
        rows, dropped = glue.read(self.glue, self.data, split)
        return self.examples(rows, split, setting, dropped)


def metrics(task: GlueTask, found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """GLUE's metrics of a task, as fractions; F1 is of class 1.

    Where a metric is not defined, since all predictions or all labels are one, it is 0; so it is
    where a prediction of a regression is not finite.

    Args:
      task: which.
      found: predictions ``[N]``, classes or numbers, and labels ``[N]`` of each split of
        ``task.dev``.

    Returns:
      Metrics by name; where there are two splits, the name ends with the split's.

    >>> metrics(glue.TASKS["mrpc"], {"dev": (np.array([1, 1, 0]), np.array([1, 0, 0]))})
    {'accuracy': 0.666..., 'f1': 0.666...}
    """
    return {
        metric + split.removeprefix("dev"): METRICS[metric](*found[split])
        for split in task.dev
        for metric in task.metrics
    }


def best(task: GlueTask) -> str:
    """The name of the metric that says which step of a run is best."""
    return task.metrics[0] + task.dev[0].removeprefix("dev")
