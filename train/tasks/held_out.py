"""What tasks on your own rows have in common: where rows come from, and which are held out."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import datasets

from hyperadapt_jax import models

from ..data import readers
from ..data.columns import Column
from ..errors import InputError
from ..options import Place
from .task import Evaluation, Setting, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut(Task):
    """A task on rows of a file, of the hub or in memory, measured on held-out ones."""

    data: Place | readers.Rows
    """Training rows: a .json, .jsonl, .parquet, .csv or .tsv file, a folder of such, or a data set
    of the hub."""
    data_config: str | None = None
    """Configuration of a data set of the hub that has several."""
    split: str = "train"
    """Split of a folder or a data set of the hub."""
    eval_data: Place | readers.Rows | None = None
    """Held-out rows; if not given, some of the training rows are held out."""
    eval_split: str = "test"
    """Split of --eval-data where that is a folder or a data set of the hub."""
    eval_rows: int = 500
    """How many rows are held out; with --eval-data, how many of its first are used."""

    @property
    def columns(self) -> dict[str, Column]:
        """The columns that rows must have."""
        raise NotImplementedError

    def measured_on(self, setting: Setting, held_out: datasets.Dataset) -> Evaluation:
        """How what trains is measured on these held-out rows."""
        raise NotImplementedError

    def check(self, config: models.Config) -> None:
        super().check(config)
        if self.eval_rows < 1:
            raise InputError(f"--eval-rows {self.eval_rows}: give at least 1")

    def evaluation(self, setting: Setting) -> Evaluation:
        if self.eval_data is None:
            return self.measured_on(setting, self.rows(setting.seed)[1])
        return self.measured_on(setting, self._first_of(self.eval_data))

    def elsewhere(self, **options: Any) -> Self:
        """The same task on other held-out rows; see `Task.elsewhere`."""
        given = {name: value for name, value in options.items() if value is not None}
        if "rows" in given and "data" not in given and self.eval_data is None:
            raise InputError("--rows: the run held out rows of its own; give --data")
        names = {"data": "eval_data", "split": "eval_split", "rows": "eval_rows"}
        task = super().elsewhere(**{k: v for k, v in given.items() if k not in names})
        moved = {names[k]: v for k, v in given.items() if k in names}
        return dataclasses.replace(task, **moved, report_half=task.report_half and not moved)

    def read(self, source: Place | readers.Rows, split: str) -> datasets.Dataset:
        """Rows with these columns and their places."""
        return readers.read(source, self.columns, split=split, config=self.data_config, places=True)

    def rows(self, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
        """The training rows and the held-out ones."""
        rows = self.read(self.data, self.split)
        if self.eval_data is not None:
            return rows, self._first_of(self.eval_data)
        # What one run's seed lets choose must not report in the run of another seed.
        return readers.hold_out(rows, self.eval_rows, 0 if self.report_half else seed)

    def _first_of(self, eval_data: Place | readers.Rows) -> datasets.Dataset:
        rows = self.read(eval_data, self.eval_split)
        return rows.select(range(min(len(rows), self.eval_rows)))
