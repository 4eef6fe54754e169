"""What the runs of a comparison show: rates, scores over seeds, and what they cost."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from hyperadapt_jax.tables import table

from ..trainer.loop import Metrics
from .runs import Outcome


@dataclasses.dataclass(frozen=True)
class Spread:
    """Numbers as their mean and their sample standard deviation, NaN for a single one.

    >>> print(Spread.of([0.5, 0.7])), print(Spread.of([0.5]))
    0.6000 ± 0.1414
    0.5000
    (None, None)
    """

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Their spread; of no values, all is NaN."""
        if not values:
            return cls(math.nan, math.nan, 0)
        finite = all(map(math.isfinite, values))
        several = len(values) > 1 and finite
        std = statistics.stdev(values) if several else math.nan
        return cls(statistics.fmean(values) if finite else math.nan, std, len(values))

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:.4f}" + ("" if math.isnan(self.std) else f" ± {self.std:.4f}")


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """What came of one method.

    Attributes:
      name: what it is called.
      sweep: a run at each learning rate, of the first seed, in the order of the rates.
      runs: a run of each seed at the chosen rate; none where all of the sweep diverged.
      known: names of metrics of what the base model knew.
    """

    name: str
    sweep: Sequence[Outcome]
    runs: Sequence[Outcome]
    known: Sequence[str] = ()

    @property
    def lr(self) -> float | None:
        """The chosen learning rate."""
        return choose(self.sweep)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest, so that a better one may be beyond.

        The highest of those that did not diverge is no edge.
        """
        return at_edge(self.sweep, self.lr)

    @property
    def done(self) -> list[Outcome]:
        """The runs that did not diverge."""
        return [run for run in self.runs if not run.error]

    @property
    def metrics(self) -> dict[str, Spread]:
        """Of the half that reports, at each run's best step."""
        return spreads([run.metrics() for run in self.done])

    @property
    def forgotten(self) -> dict[str, Spread]:
        """How much of what the base model knew is lost: the share of its correct answers."""
        return spreads([_lost(run, self.known) for run in self.done])

    @property
    def parameters(self) -> int | None:
        """The number of trainable ones."""
        return next((run.found["trainable_parameters"] for run in self.done), None)

    @property
    def step_seconds(self) -> float | None:
        """Of one step: the median over the runs."""
        known = [run.found["step_seconds"] for run in self.done]
        known = [seconds for seconds in known if seconds is not None]
        return statistics.median(known) if known else None

    @property
    def step_bytes(self) -> int | None:
        """That a step takes: the most over the runs."""
        return max(filter(None, (run.found["step_bytes"] for run in self.done)), default=None)

    @property
    def numbers(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "lr": self.lr,
            "at_edge": self.at_edge,
            "trainable_parameters": self.parameters,
            "metrics": {name: vars(spread) for name, spread in self.metrics.items()},
            "forgotten": {name: vars(spread) for name, spread in self.forgotten.items()},
            "step_seconds": self.step_seconds,
            "step_bytes": self.step_bytes,
            "diverged": sum(bool(run.error) for run in {*self.sweep, *self.runs}),
        }


def choose(sweep: Sequence[Outcome]) -> float | None:
    """The learning rate of the highest score, the lower one of two; None where all diverged."""
    good = [run for run in sweep if not run.error]
    best = max(good, key=lambda run: (run.score, -run.planned.lr), default=None)
    return None if best is None else best.planned.lr


def at_edge(sweep: Sequence[Outcome], lr: float | None) -> bool:
    """Whether a rate is the lowest or the highest of several that were tried."""
    rates = [run.planned.lr for run in sweep]
    return len(rates) > 1 and lr in (min(rates), max(rates))


def spreads(found: Sequence[Metrics]) -> dict[str, Spread]:
    """The spread of each metric that all runs have."""
    names = [name for name in (found[0] if found else ()) if all(name in run for run in found)]
    return {name: Spread.of([run[name] for run in found]) for name in names}


def before(methods: Sequence[MethodSummary]) -> dict[str, Spread]:
    """The spread, over seeds, of each metric of the model before training."""
    found: dict[int, Metrics] = {}
    for run in (run for method in methods for run in method.done):
        found.setdefault(run.planned.seed, run.metrics("before"))
    return spreads([metrics for metrics in found.values() if metrics])


def as_table(methods: Sequence[MethodSummary], primary: str, *, markdown: bool) -> str:
    """A row for each method, after one for the model before training.

    Args:
      methods: what came of each.
      primary: the metric that comes first.
      markdown: for a file.
    """
    known = methods[0].known
    names = dict.fromkeys(name for method in methods for name in method.metrics)
    others = [n for n in names if n not in (primary, *known) and "nonfinite" not in n]
    shown = [primary, *others] if primary in names else others
    timed = any(method.step_seconds is not None for method in methods)
    measured = any(method.step_bytes is not None for method in methods)

    base = before(methods)
    header = ["method", "lr", "parameters", *shown, *(f"forgotten/{name}" for name in known)]
    header += ["step"] * timed + ["memory"] * measured + ["runs"]
    dash = Spread.of([])
    first = ["before training", "", "", *(str(base.get(name, dash)) for name in shown)]
    first += [""] * (len(header) - len(first))
    rows = [first]
    for method in methods:
        lr = "-" if method.lr is None else f"{method.lr:g}" + EDGE * method.at_edge
        row = [method.name, lr, "-" if method.parameters is None else f"{method.parameters:,}"]
        row += [str(method.metrics.get(name, dash)) for name in shown]
        row += [str(method.forgotten.get(name, dash)) for name in known]
        if timed:
            seconds = method.step_seconds
            row.append("-" if seconds is None else f"{1000 * seconds:,.1f} ms")
        if measured:
            held = method.step_bytes
            row.append("-" if held is None else f"{held / 1e6:,.1f} MB")
        rows.append([*row, _made(method)])
    right = " ".join(header[1:])
    return table(header, rows, right=right, markdown=markdown)


EDGE = " (edge)"


def notes(methods: Sequence[MethodSummary]) -> list[str]:
    """What is to be said below the table."""
    found = []
    if any(method.at_edge for method in methods):
        found.append(
            "(edge): the chosen learning rate is the lowest or the highest that was tried; the"
            " sweep was too narrow to say what the method can do."
        )
    if methods[0].known:
        found.append(
            "Forgotten is the share of the base model's correct answers to what it knew before"
            " that is lost."
        )
    if any(method.step_seconds is not None for method in methods):
        found.append("Step is the time of one optimizer step, the median of the runs' means.")
    if any(method.step_bytes is not None for method in methods):
        found.append(
            "Memory is what XLA's analysis gives for the compiled step: frozen weights, what"
            " trains and its optimizer's state, the batch, and temporary arrays."
        )
    for method in methods:
        for run in dict.fromkeys((*method.sweep, *method.runs)):
            if run.error:
                found.append(f"Diverged: {run.planned}: {run.error}")
    return found


def _made(method: MethodSummary) -> str:
    """How many runs the numbers are of, and of how many where some diverged."""
    done, total = len(method.done), len(method.runs)
    if not total:
        return "diverged"
    return f"{done}" if done == total else f"{done} of {total}"


def _lost(run: Outcome, known: Sequence[str]) -> Metrics:
    before, after = run.metrics("before"), run.metrics()
    return {
        name: 1 - after[name] / before[name] if before[name] else math.nan
        for name in known
        if name in before and name in after
    }
