"""GLUE's tasks, measured as GLUE measures them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from hyperadapt_jax.methods import Tuning

from ..data import glue
from ..data.readers import Examples
from ..metrics import finite
from ..options import Place
from .classification import Classification, classes
from .task import Evaluation, Metrics, Setting, Task, Training


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
    def labels(self) -> int:
        return self.known.outputs

    @property
    def known(self) -> glue.Task:
        """What GLUE says of the task."""
        return glue.TASKS[self.task]

    def prepare(self, setting: Setting) -> tuple[Training, Evaluation]:
        training, digest, told = self._read("train", setting)
        sources, counts = {"training rows": digest}, {"train": told}
        train = Training(training.data, sources, counts, training.places)
        return train, self.evaluation(setting)

    def evaluation(self, setting: Setting) -> Evaluation:
        examples, sources, counts = {}, {}, {}
        for split in self.known.dev:
            made, sources[f"rows of {split}"], counts[split] = self._read(split, setting)
            examples[split] = made
        return Evaluation(lambda tuning: self.measure(tuning, examples), sources, counts)

    def criterion(self, metrics: Metrics) -> float:
        return metrics[glue.best(self.known)]

    def elsewhere(self, *, data: Place | None = None, **others: Any) -> Task:
        """The same task on other rows: GLUE's folder, a file or a data set of the hub."""
        super().elsewhere(**others)
        return self if data is None else dataclasses.replace(self, data=data)

    def measure(self, tuning: Tuning, examples: dict[str, Examples]) -> Callable[[Any], Metrics]:
        """A function from what trains to the task's metrics on its development sets.

        It counts rows whose outputs are not finite, as ``nonfinite``, and raises InputError where
        all are.
        """
        task, outputs = self.known, self.outputs(tuning, examples)

        def evaluate(trainable: Any) -> Metrics:
            found, kept = {}, []
            for split, (logits, labels) in outputs(trainable).items():
                predictions, good = classes(logits, labels)
                found[split] = (predictions if task.labels else logits[:, 0]), labels
                kept += good.tolist()
            metrics, missing = glue.metrics(task, found), finite.count(kept)
            if missing and not task.labels:  # a correlation knows no wrong prediction
                metrics = dict.fromkeys(metrics, math.nan)
            return metrics | missing

        return evaluate

    def _read(self, split: str, setting: Setting) -> tuple[Examples, str, str]:
        rows, dropped = glue.read(self.known, self.data, split)
        return self.examples(rows, split, setting, dropped)
