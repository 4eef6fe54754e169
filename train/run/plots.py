"""The curves of a run, and how figures become files."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(file: str | os.PathLike[str], figure: Figure) -> None:
    """Writes a figure as PNG, whole or not at all.

    Raises:
      InputError: the system refuses.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write(file, png.getvalue())


COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def curves(rows: Sequence[Mapping[str, float]], best: int | None = None) -> Figure:
    """Draws the metrics of a run over its steps: loss, evaluations, learning rates, all others.

    Evaluations that are fractions share a panel, and so do learning rates. Of a noisy curve there
    is also the mean over a twentieth of it. A perplexity has a logarithmic axis. An evaluation that
    is not finite is a cross at the bottom.

    Args:
      rows: what :func:`read_metrics` returned.
      best: a step to mark in the panels of evaluations.

    Returns:
      A figure: ``curves(rows).savefig("curves.png")``, or show it in a notebook.

    Raises:
      ValueError: there are no rows.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    if not rows:
        raise ValueError("no rows: nothing to draw")
    series: dict[str, tuple[list, list]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    panels: dict[str, list[str]] = {}
    for name in sorted(series, key=_order):
        panels.setdefault(_panel(name, series[name][1]), []).append(name)

    count, last = len(panels), max(1, *(row["step"] for row in rows))
    across = 2 if count == 4 else min(count, 3)
    down = math.ceil(count / across)
    figure = Figure(figsize=(4.6 * across, 3.1 * down), dpi=120, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).flat
    for (title, names), ax in zip(panels.items(), grid, strict=False):
        colors = iter(COLORS * len(names))
        if best is not None and any(name.startswith("eval/") for name in names):
            label = f"best step, {best}"
            ax.axvline(best, color="0.45", ls=(0, (4, 3)), lw=1.2, zorder=0, label=label)
        for name in names:
            at, found = map(np.asarray, series[name])
            _plot(ax, name, at, found, color=next(colors))
        if any("perplexity" in name for name in names):
            ax.set_yscale("log")
            ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlim(-0.02 * last, 1.03 * last)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.set_major_formatter("{x:.6g}")
        if len(ax.get_legend_handles_labels()[1]) > 1:
            ax.legend(frameon=False, fontsize=9)
    for ax in grid:
        ax.set_axis_off()
    return figure


def _order(name: str) -> int:
    """Where a metric's panel stands: losses, evaluations, learning rates, all others."""
    groups = [name.endswith("loss"), name.startswith("eval/"), name.startswith("lr"), True]
    return groups.index(True)


def _panel(name: str, values: Sequence[float]) -> str:
    """The title of the panel in which a metric is drawn."""
    kinds = ["loss", "evaluation", "learning rate", name.replace("_", " ")]
    title = kinds[_order(name)]
    if "nonfinite" in name:  # a count
        return name.replace("eval/", "evaluation: ")
    fractions = all(abs(value) <= 1 for value in values if math.isfinite(value))
    return title if fractions or title != "evaluation" else name.replace("eval/", "evaluation: ")


def _plot(ax: Axes, name: str, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    names = {"loss": "training", "eval/loss": "evaluation", "lr": "all others"}
    label = names.get(name, name.split("/", 1)[-1])
    evaluated = name.startswith("eval/")
    marker = "o" if len(steps) == 1 or (evaluated and len(steps) <= 40) else None
    lost = steps[~np.isfinite(values)]
    if evaluated and len(lost):
        cross: dict[str, Any] = {"color": color, "marker": "x", "markersize": 8, "mew": 2, "ls": ""}
        cross |= {"transform": ax.get_xaxis_transform(), "clip_on": False}
        ax.plot(lost, np.full(len(lost), 0.03), label=f"{label}, not finite", **cross)
        values = np.where(np.isfinite(values), values, np.nan)
    window = 0 if evaluated or name.startswith("lr") else len(steps) // 20
    faint: dict[str, Any] = {"alpha": 0.3, "lw": 1} if window > 1 else {"lw": 1.8, "label": label}
    ax.plot(steps, values, color=color, marker=marker, markersize=4, **faint)
    if window > 1:
        ones, finite = np.ones(window), np.isfinite(values)
        total = np.convolve(np.where(finite, values, 0), ones, "same")
        seen = np.convolve(finite, ones, "same")
        mean = np.divide(total, seen, out=np.full(len(values), np.nan), where=seen > 0)
        ax.plot(steps, mean, color=color, lw=1.8, label=f"{label}, mean of {window}")
