"""Pictures of a comparison: scores by learning rate, and by how much trains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..run.plots import COLORS
from .summary import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_MARKERS, _DASHES = "osD^vP", ["-", "--", ":", "-."]


def by_rate(
    sweeps: Mapping[str, Sequence[tuple[float, float]]],
    metric: str,
    chosen: Mapping[str, float | None],
) -> Figure:
    """Draws a line for each method: its scores over the learning rates.

    A score that is not finite, as of a run that diverged, is a cross at the bottom; the chosen
    rate has a ring.

    Args:
      sweeps: pairs of a learning rate and a score, by method.
      metric: what the scores are.
      chosen: the chosen learning rate by method; None where there is none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    ax = figure.subplots()
    for style, (name, pairs) in zip(_styles(), sweeps.items(), strict=False):
        rates, scores = np.array(sorted(pairs), float).reshape(-1, 2).T
        ax.plot(rates, np.where(np.isfinite(scores), scores, np.nan), label=name, ms=4.5, **style)
        lost = rates[~np.isfinite(scores)]
        cross: dict[str, Any] = {"color": style["color"], "marker": "x", "ls": "", "mew": 2}
        cross |= {"transform": ax.get_xaxis_transform(), "clip_on": False}
        ax.plot(lost, np.full(len(lost), 0.02), **cross)
        ringed = rates == chosen[name]
        ax.plot(rates[ringed], scores[ringed], "o", mfc="none", ms=11, color=style["color"])
    ax.set_xscale("log")
    _axes(ax, "learning rate", metric)
    if len(sweeps) > 1:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def by_parameters(
    points: Mapping[str, tuple[int, Spread]], metric: str, before: Spread | None = None
) -> Figure:
    """Draws a point for each method: its mean score, and a bar of one standard deviation each way.

    Args:
      points: the number of trainable parameters and the scores, by method.
      metric: what the scores are.
      before: the scores before training, whose mean is a line; None for no line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), dpi=120, layout="constrained")
    ax = figure.subplots()
    for style, (count, spread) in zip(_styles(), points.values(), strict=False):
        error = None if math.isnan(spread.std) else spread.std
        style |= {"ls": "", "capsize": 3, "elinewidth": 1.2, "ms": 6}
        ax.errorbar([count], [spread.mean], error, **style)
    if before is not None and math.isfinite(before.mean):
        ax.axhline(before.mean, color="0.45", ls=(0, (4, 3)), lw=1.2, zorder=0)
        ax.annotate(
            "before training", (1, before.mean), xycoords=("axes fraction", "data"), color="0.35",
            xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.margins(x=0.15, y=0.12)
    _axes(ax, "trainable parameters", metric)
    _label(ax, points)
    return figure


def _styles() -> Any:
    """Color, marker and line of one method after the other: twenty-four differ."""
    for number in itertools.count():
        turn = number // len(COLORS)
        yield {
            "color": COLORS[number % len(COLORS)],
            "marker": _MARKERS[turn % len(_MARKERS)],
            "ls": _DASHES[turn % len(_DASHES)],
        }


def _axes(ax: Axes, x: str, y: str) -> None:
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.yaxis.set_major_formatter("{x:.6g}")


def _label(ax: Any, points: Mapping[str, tuple[int, Spread]]) -> None:
    """Names the points, each where its name covers nothing: near by, else further off on a line."""
    from matplotlib.transforms import Bbox

    ax.figure.draw_without_rendering()  # now it is known where all things are
    dots, bars = [], []
    for count, spread in points.values():
        std = 0.0 if math.isnan(spread.std) else spread.std
        ends = ax.transData.transform([(count, spread.mean - std), (count, spread.mean + std)])
        dots.append(ends.mean(0))
        bars.append(Bbox([ends[0] - 8, ends[1] + 8]))
    taken = [*bars, *(text.get_window_extent() for text in ax.texts)]
    inside = ax.get_window_extent()
    pixels = ax.figure.dpi / 72
    for (name, (count, spread)), dot in zip(points.items(), dots, strict=True):
        text = ax.annotate(
            name, (count, spread.mean), xytext=(0, 0), textcoords="offset points", fontsize=9,
            ha="center", va="center", arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.8},
        )  # fmt: skip
        size = text.get_window_extent()
        for offset in _offsets(size.width, size.height):
            box = _around(dot + offset, size.width, size.height)
            if _within(box, inside) and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        text.set_position(tuple(offset / pixels))
        gap = max(np.abs(offset) - (size.width / 2, size.height / 2))
        text.arrow_patch.set_visible(bool(gap > 16))


def _offsets(width: float, height: float) -> Any:
    """Where a label can be, in pixels from its point: on rings that widen."""
    for ring in range(12):
        gap = 12 + 14 * ring
        for angle in np.arange(0, 2 * np.pi, np.pi / (4 + 2 * ring)):
            side = np.array([np.cos(angle), np.sin(angle)])
            yield side * (gap + np.array([width / 2, height / 2]))


def _around(center: np.ndarray, width: float, height: float) -> Bbox:
    from matplotlib.transforms import Bbox

    half = np.array([width, height]) / 2 + 1
    return Bbox([center - half, center + half])


def _within(box: Bbox, outer: Bbox) -> bool:
    return all(outer.contains(x, y) for x, y in (box.min, box.max))
