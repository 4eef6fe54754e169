"""Held-out rows in two halves, of which one chooses and the other reports."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from ..errors import InputError

REPORT = "report/"  # what the names of the reporting half's metrics begin with


def halves(groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows at random into two halves, always the same ones.

    Args:
      groups: a group for each row, such as its class; the two halves have equally many of each,
        but for one.

    Returns:
      Indices of the rows, in order, of the half that chooses and of the one that reports.

    Raises:
      InputError: there are not two rows.

    >>> halves(["yes", "no", "yes", "no", "no"])
    (array([1, 2, 4]), array([0, 3]))
    """
    if len(groups) < 2:
        raise InputError(f"--report-half: held out are {len(groups)} rows: give at least 2")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    order = np.random.default_rng(0).permutation(len(groups))
    ranks = np.array([numbers[groups[i]] for i in order])
    order = order[np.argsort(ranks, kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def of_both(
    score: Callable[[np.ndarray], Mapping[str, float]], groups: Sequence[Hashable]
) -> dict[str, float]:
    """The metrics of both halves: those of the reporting one have names that begin with `REPORT`.

    Args:
      score: from indices of rows to their metrics.
      groups: see `halves`.
    """
    chooses, reports = halves(groups)
    reported = {REPORT + name: value for name, value in score(reports).items()}
    return {**score(chooses), **reported}


def reported(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a result is told by: the reporting half's, or all where there are no halves.

    >>> reported({"accuracy": 0.9, "report/accuracy": 0.8}), reported({"accuracy": 0.9})
    ({'accuracy': 0.8}, {'accuracy': 0.9})
    """
    found = {k.removeprefix(REPORT): v for k, v in metrics.items() if k.startswith(REPORT)}
    return found or dict(metrics)
