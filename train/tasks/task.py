"""What a task is: examples, a loss, an evaluation, and the metric that selects the best step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning

from ..base import Base, tokenizer
from ..errors import InputError
from ..metrics.halves import halves, of_both
from ..options import ModelOptions
from ..trainer.loop import Metrics
from ..trainer.step import Loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What a task meets in a run.

    Attributes:
      base: the model, as shapes alone.
      model: which model that is.
      seed: of whatever is drawn.
      log: shows a line to the user.
    """

    base: Base
    model: ModelOptions
    seed: int = 0
    log: Callable[[str], None] = lambda text: None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, read when a task asks for it."""
        return tokenizer(self.model)


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """The examples to learn from.

    Attributes:
      examples: as `train.data.batches.Batches` takes them.
      sources: digests of what they hold, by name; a run is not resumed on others.
      summary: how many rows there are and what was lost, by name, for the report.
      places: where the row of each stands; None where that is not known.
      pack: fill rows of this many tokens with several examples; None for one a row.
    """

    examples: Sequence[Mapping[str, Any]]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    summary: Mapping[str, str] = dataclasses.field(default_factory=dict)
    places: Sequence[str] | None = None
    pack: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """How what trains is measured, on examples that were read.

    Attributes:
      on: ``on(tuning)`` gives a function from what trains to metrics.
      sources: digests of what it is measured on, by name.
      summary: how many rows there are and what was lost, by name, for the report.
      generate: ``generate(tuning, trainable)`` gives what the model generates, a mapping each, with
        ``prompt``, ``answer`` and ``reference``; None where there are none.
      figures: ``figures(tuning, trainable)`` gives pictures of the result by file name, such as a
        confusion matrix; None where there are none.
    """

    on: Callable[[Tuning], Callable[[Any], Metrics]]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    summary: Mapping[str, str] = dataclasses.field(default_factory=dict)
    generate: Callable[[Tuning, Any], list[dict[str, Any]]] | None = None
    figures: Callable[[Tuning, Any], Mapping[str, Figure]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned. A subclass is a frozen dataclass, whose fields are its options."""

    report_half: bool = False
    """Choose the best step by one half of what is held out, and measure the other half beside it,
    under the same names with "report/" before them. The halves do not depend on --seed."""

    @property
    def name(self) -> str:
        """What a run of it is called, such as ``mrpc``."""
        raise NotImplementedError

    @property
    def primary(self) -> str:
        """The name of the metric that a result is first told by."""
        raise NotImplementedError

    @property
    def known(self) -> tuple[str, ...]:
        """Names of metrics of what the base model knows before, which a run may make it forget."""
        return ()

    @property
    def num_labels(self) -> int | None:
        """How many outputs a new head of an encoder has; None for the model as it is."""
        return None

    def resolve(self) -> Task:
        """The same task with what its data tell filled in, such as names of classes.

        A run is of the resolved task, and its ``config.yaml`` says what was found.
        """
        return self

    def check(self, config: models.Config) -> None:
        """Refuses a model that it is not for, and options that do not fit the model.

        Raises:
          InputError: says which option, and what to do.
        """

    def prepare(self, setting: Setting) -> tuple[Training, Evaluation]:
        """Reads the examples to learn from, and those that are measured while it trains."""
        raise NotImplementedError

    def evaluation(self, setting: Setting) -> Evaluation:
        """Reads what a run is measured on when it has ended."""
        raise NotImplementedError

    def loss(self, tuning: Tuning) -> Loss:
        """The loss of a batch: a sum over it, and the weight to divide by."""
        raise NotImplementedError

    def criterion(self, metrics: Metrics) -> float:
        """A number, higher is better, by which the best step is chosen."""
        return metrics[self.primary]

    def scored(self, score: Callable[[np.ndarray], Metrics], groups: Sequence[Hashable]) -> Metrics:
        """The metrics of what is held out; with ``report_half``, of each half.

        Args:
          score: from indices of rows to their metrics.
          groups: a group for each row, such as its class, of which both halves get equally many.
        """
        return of_both(score, groups) if self.report_half else score(np.arange(len(groups)))

    def reporting(self, groups: Sequence[Hashable]) -> np.ndarray:
        """Indices of the rows by which a result is told: all, or the half that reports."""
        return halves(groups)[1] if self.report_half else np.arange(len(groups))

    def elsewhere(self, **options: Any) -> Self:
        """The same task, measured on other data or in another way.

        Args:
          **options: ``data``, ``split``, ``rows``, ``questions``, as the recipe evaluate has them;
            None where not given.

        Raises:
          InputError: the task has no such thing.
        """
        for name, value in options.items():
            if value is not None:
                raise InputError(f"--{name}: a run of {self.name} has no such thing to change")
        return self
