"""The rank of an adapter's updates: its bound, and measures that tell more than a count.

The update of a weight by scale vectors is ``dW = W0 * (a b^T - 1)``, so
``rank(dW) <= min(2 rank(W0), n, m)``, and nearly any vectors attain that; a low-rank term adds its
r. A count of non-zero singular values therefore says little. The measures here weigh them, and
controls show what the same weight, or random arrays in the place of the trained ones, give.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.linalg import norm, svd

from hyperadapt_jax import paths
from hyperadapt_jax.scales import (
    Scales,
    ScaleVectors,
    check,
    iter_stack,
    stack_axes,
)
from hyperadapt_jax.tables import table

UPDATE, RANDOM, BASE = "update", "random", "base"


def bound(base_rank: int, shape: tuple[int, int], sides: int = 2, low_rank: int = 0) -> int:
    """Returns the highest rank of an update: ``min(sides * rank(W0) + r, n, m)``.

    ``A W0 B - W0`` is the sum of two matrices of at most that rank; ``(A - I) W0`` is one.

    Args:
      base_rank: the rank of the frozen weight.
      shape: its shape (n, m) as a matrix.
      sides: 2 where rows and columns are scaled, 1 where only one of them is, 0 where none is.
      low_rank: r, of a low-rank term.

    >>> bound(20, (64, 64)), bound(40, (64, 64)), bound(20, (64, 64), sides=1)
    (40, 64, 20)
    """
    return min(sides * base_rank + low_rank, *shape)


@dataclasses.dataclass(frozen=True)
class Measures:
    """Measures of a matrix's rank from its singular values ``s``; all zero for a zero matrix.

    Attributes:
      norm: the Frobenius norm, ``sqrt(sum(s**2))``.
      stable: the stable rank, ``sum(s**2) / max(s)**2`` (Rudelson and Vershynin, 2007, "Sampling
        from large matrices: an approach through geometric functional analysis").
      entropy: the entropy effective rank, ``exp(-sum(p log p))`` with ``p = s / sum(s)`` (Roy and
        Vetterli, 2007, "The effective rank: a measure of effective dimensionality").
      above_10, above_1, above_01: how many exceed 10 %, 1 %, 0.1 % of the largest.
      energy_90, energy_99: how many of the largest make up 90 %, 99 % of ``sum(s**2)``.
      numerical: how many exceed a tolerance, relative to the largest.
    """

    norm: float = 0.0
    stable: float = 0.0
    entropy: float = 0.0
    above_10: int = 0
    above_1: int = 0
    above_01: int = 0
    energy_90: int = 0
    energy_99: int = 0
    numerical: int = 0


def measure(singular_values: Sequence[float] | np.ndarray, tolerance: float) -> Measures:
    """Returns the measures of a matrix with these singular values.

    Args:
      singular_values: all of them, in any order.
      tolerance: relative to the largest; what is below it is rounding noise.

    >>> found = measure([3.0, 3.0, 3.0, 0.0], tolerance=1e-7)
    >>> found.stable, round(found.entropy, 6), found.energy_90, found.numerical
    (3.0, 3.0, 3, 3)
    """
    s = np.sort(np.asarray(singular_values, np.float64))[::-1]
    if not s.any():
        return Measures()
    relative, p = s / s[0], s[s > 0] / s.sum()
    energy = np.cumsum(relative**2)

    def short_of(share: float) -> int:
        # The margin: a share that is met exactly must not cost one more by a rounding of the sum.
        return int(np.sum(energy < (share - 1e-12) * energy[-1]))

    return Measures(
        norm=float(norm(s)),
        stable=float(energy[-1]),
        entropy=float(np.exp(-np.sum(p * np.log(p)))),
        above_10=int(np.sum(relative > 0.1)),
        above_1=int(np.sum(relative > 0.01)),
        above_01=int(np.sum(relative > 0.001)),
        energy_90=short_of(0.90) + 1,
        energy_99=short_of(0.99) + 1,
        numerical=int(np.sum(relative > tolerance)),
    )


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """One matrix of a report.

    Attributes:
      path: the weight's path.
      index: which slice of the weight's stack axes; empty where there are none.
      source: ``"update"``, ``"random"`` (what random arrays of the same norm make), ``"base"``
        (the frozen weight) or the name of a control.
      shape: (n, m) of the matrix.
      bound: the bound on the rank of an update, None for the base and for dense controls.
      singular_values: float64, from the largest down.
      measures: what they say.
    """

    path: str
    index: tuple[int, ...]
    source: str
    shape: tuple[int, int]
    bound: int | None
    singular_values: np.ndarray
    measures: Measures

    @property
    def kind(self) -> str:
        """The path with ``*`` for every number: the layers of a model have weights of one kind."""
        return re.sub(r"(?<![^/])\d+(?![^/])", "*", self.path)


@dataclasses.dataclass(frozen=True)
class RankReport:
    """The spectra of an adapter's updates and of their controls.

    It prints as a table of medians over the layers and stack slices of each kind of weight.
    """

    spectra: tuple[Spectrum, ...]

    def groups(self) -> dict[tuple[str, tuple[int, int]], dict[str, list[Spectrum]]]:
        """Returns the spectra by (kind, shape of the matrix), then by source."""
        groups: dict = {}
        for spectrum in self.spectra:
            sources = groups.setdefault((spectrum.kind, spectrum.shape), {})
            sources.setdefault(spectrum.source, []).append(spectrum)
        return groups

    def __str__(self) -> str:
        columns = [field.name for field in dataclasses.fields(Measures)]
        rows = []
        for (kind, shape), sources in self.groups().items():
            for source, spectra in sources.items():
                values = [[getattr(s.measures, name) for name in columns] for s in spectra]
                most = [s.bound for s in spectra if s.bound is not None]
                numbers = [f"{x:.4g}" for x in np.median(values, axis=0)]
                numbers += [f"{np.median(most):.4g}" if most else "-"]
                rows.append([kind, "x".join(map(str, shape)), len(spectra), source, *numbers])
        header = ["weight", "matrix", "count", "source", *columns, "bound"]
        return table(header, rows, right=" ".join(["count", *columns, "bound"]))


def analyze(
    params: Any,
    scales: Scales,
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    *,
    on_device: bool = False,
) -> RankReport:
    """Measures the rank of each adapted weight's update, together with controls.

    Every stack slice is a separate matrix, with the out axes as its rows and all others as its
    columns (without an out axis: the in axes as its columns). One matrix is held at a time. The
    update is computed in float64 on the host, from the arrays and the frozen weight: the difference
    of a merged weight and the frozen one is rounding noise of full rank. Each matrix costs
    O(n m min(n, m)).

    The tolerance of the numerical rank is ``max(eps, max(n, m) * eps64)``, with the ``eps`` of the
    dtype in which the frozen weight, or the control, is stored: rounding a matrix to it makes
    singular values of up to about ``eps / 2`` of the largest.

    Args:
      params: the frozen parameters, floating point.
      scales: the scale vectors.
      controls: updates to compare with, ``{name: {path: update}}``: a dense one in the shape of its
        weight, such as full fine-tuning's difference, or the ``ScaleVectors`` of another adapter;
        any subset of the paths.
      seed: of the random arrays: Gaussian, with the norm of the trained ones, slice by slice.
      on_device: decompose each matrix in float32 on JAX's default device, for accelerators: fast,
        and the tolerance is ``max(n, m)`` times float32's eps at least. Else in float64 by LAPACK.

    Raises:
      ValueError: an adapter that does not fit the parameters, a control of another path or shape
        or of a reserved name, a dtype that is not floating, a value that is not finite.

    >>> params = {"w": jnp.eye(4)}
    >>> scales = {"w": ScaleVectors(jnp.array([1.0, 0, 0, 0]), None, "- out")}
    >>> report = analyze(params, scales)
    >>> [(s.source, s.bound, s.measures.numerical) for s in report.spectra]
    [('update', 4, 1), ('random', 4, 4), ('base', None, 4)]
    """
    arrays, controls, spectra = paths.arrays(params), controls or {}, []
    check(scales, arrays)
    for name, updates in controls.items():
        if name in (UPDATE, RANDOM, BASE):
            raise ValueError(f"{name}: is a name that the report uses itself; rename the control")
        for path in updates:
            if path not in scales:
                raise ValueError(f"{name}: {path}: is not adapted; {paths.suggest(path, scales)}")
            if isinstance(updates[path], ScaleVectors):
                try:
                    check({path: updates[path]}, arrays)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                if stack_axes(updates[path].axes) != stack_axes(scales[path].axes):
                    raise ValueError(f"{name}: {path}: has other stack axes than the adapter")
                continue
            has, needs = np.shape(updates[path]), arrays[path].shape
            if has != needs:
                raise ValueError(f"{name}: {path}: has shape {has}, but the weight has {needs}")
    for path, vectors in scales.items():
        known = {name: of[path] for name, of in {**controls, BASE: arrays}.items() if path in of}
        others = {name: x for name, x in known.items() if isinstance(x, ScaleVectors)}
        dense = {name: np.asarray(x) for name, x in known.items() if name not in others}
        given = {
            f"{name}.{side}" if name else side: np.asarray(array)
            for name, of in {"": vectors, **others}.items()
            for side, array in of.arrays.items()
        }
        for name, array in {**dense, **given}.items():
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(f"{name}: {path}: has dtype {array.dtype}, not a floating one")
            if not np.isfinite(array).all():
                raise ValueError(f"{name}: {path}: has a NaN or an infinity")
        spectra += _spectra(path, vectors, dense, others, seed, on_device)
    return RankReport(tuple(spectra))


def _spectra(
    path: str,
    vectors: ScaleVectors,
    dense: Mapping[str, np.ndarray],
    others: Mapping[str, ScaleVectors],
    seed: int,
    on_device: bool,
) -> list[Spectrum]:
    """Returns the spectra of one weight by slice.

    Args:
      path: the weight's.
      vectors: what adapts it.
      dense: the weight, and controls of its shape.
      others: what adapts it in controls that are adapters.
      seed, on_device: as in :func:`analyze`.
    """
    roles = [role for role in vectors.axes.split() if role != "stack"]
    rows = [i for i, role in enumerate(roles) if role == ("out" if "out" in roles else "-")]
    spectra = []
    slices = (iter_stack(other, dense[BASE]) for other in others.values())
    for (part, arrays), *adapters in zip(
        iter_stack(vectors, *dense.values()), *slices, strict=True
    ):
        given = {name: a.astype(np.float64) for name, a in zip(dense, arrays, strict=True)}
        base = given.pop(BASE)
        rng = np.random.default_rng([seed, zlib.crc32(path.encode()), *part.index])
        deltas, low_rank = (
            [x * (norm(d) / norm(x)) for d in like for x in [rng.standard_normal(d.shape)]]
            for like in (part.deltas, part.low_rank)
        )
        noise = dataclasses.replace(part, deltas=deltas, low_rank=low_rank)
        sources = {
            UPDATE: part.update(base),
            **given,
            **{n: other.update(base) for n, (other, _) in zip(others, adapters, strict=True)},
            RANDOM: noise.update(base),
            BASE: base,
        }
        found = {}
        for source, values in sources.items():
            matrix = np.moveaxis(values, rows, range(len(rows)))
            matrix = matrix.reshape(math.prod(matrix.shape[: len(rows)]), -1)
            eps = float(jnp.finfo(dense.get(source, dense[BASE]).dtype).eps)
            tolerance = max(eps, max(matrix.shape) * np.finfo(np.float64).eps)
            if on_device:
                wide = np.asarray(jnp.linalg.svd(matrix.astype(np.float32), compute_uv=False))
                singular = wide.astype(np.float64)
                tolerance = max(tolerance, max(matrix.shape) * float(np.finfo(np.float32).eps))
            else:
                singular = svd(matrix, compute_uv=False)
            found[source] = singular, measure(singular, tolerance)
        added = low_rank[0].shape[-1] if low_rank else 0
        limit = bound(found[BASE][1].numerical, matrix.shape, len(deltas), added)
        for source, measured in found.items():
            most = limit if source in (UPDATE, RANDOM) else None
            spectra.append(Spectrum(path, part.index, source, matrix.shape, most, *measured))
    return spectra


def figure(report: RankReport, columns: int = 3) -> Any:
    """Draws the singular values relative to the largest, one panel per kind of weight.

    A line is the median over the layers and stack slices of its kind, and the band around it
    reaches from the least to the greatest. It ends in a dot at a numerical rank below the full
    one; a dotted vertical line is the bound on it.

    Args:
      report: what :func:`analyze` returned.
      columns: the most panels side by side.

    Returns:
      A ``matplotlib.figure.Figure``: ``figure(report).savefig("rank.png")``.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: the report is empty.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ImportError("figure needs matplotlib: pip install 'hyperadapt-jax[plot]'") from error
    groups = report.groups()
    if not groups:
        raise ValueError("the report is empty; nothing to draw")
    names = list(dict.fromkeys(spectrum.source for spectrum in report.spectra))
    colors = itertools.cycle(["#009E73", "#CC79A7", "#E69F00", "#56B4E9"])
    looks: dict[str, dict[str, Any]] = {
        name: {"color": next(colors), "label": name} for name in names
    }
    looks[UPDATE] = {"color": "#0072B2", "lw": 2.4, "label": "update"}
    looks[RANDOM] = {"color": "#D55E00", "ls": "--", "label": "random arrays"}
    looks[BASE] = {"color": "#777777", "label": "frozen weight"}

    across = max(1, min(columns, len(groups)))
    down = math.ceil(len(groups) / across)
    fig = Figure(figsize=(max(3.4 * across, 6.0), 2.7 * down + 0.9), dpi=150, layout="constrained")
    grid = fig.subplots(down, across, squeeze=False, sharey=True).flat
    legend = {}
    for ax, ((kind, (n, m)), sources) in zip(grid, groups.items(), strict=False):
        full, count = min(n, m), len(sources[UPDATE])
        for source, spectra in sources.items():
            relative = [s.singular_values / (s.singular_values[0] or 1) for s in spectra]
            ranks = [[s.measures.numerical] for s in spectra]
            lines = np.where(np.arange(full) < ranks, relative, 0)
            end = np.count_nonzero(np.median(lines, axis=0))
            x, lines = np.arange(1, end + 1) / full, lines[:, :end]
            (legend[source],) = ax.plot(x, np.median(lines, axis=0), **looks[source])
            band, color = (lines.min(axis=0), lines.max(axis=0)), looks[source]["color"]
            ax.fill_between(x, *band, color=color, alpha=0.15, lw=0)
            if 0 < end < full:
                legend[source].set(marker="o", markevery=[-1], markersize=4)
        limit = np.median([spectrum.bound for spectrum in sources[UPDATE]])
        if limit < full:
            look = {"color": "#0072B2", "lw": 1, "ls": ":", "label": "bound on the rank"}
            legend["bound"] = ax.axvline(limit / full, **look)
        ax.set_title(kind, fontsize=10, loc="left")
        ax.set_xlabel(f"{n} × {m}" + (f", {count} matrices" if count > 1 else ""), fontsize=8)
        ax.set(xlim=(0, 1.03), yscale="log")
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.grid(color="#e6e6e6", lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in fig.axes[len(groups) :]:
        ax.remove()
    fig.supxlabel("singular values, largest first, as a share of min(n, m)", fontsize=9)
    fig.supylabel("singular value / largest", fontsize=9)
    handles = [legend[name] for name in [*names, "bound"] if name in legend]
    wide = 3 if across < 3 else 5
    fig.legend(handles=handles, loc="outside upper center", ncols=wide, frameon=False, fontsize=9)
    return fig
