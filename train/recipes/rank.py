"""What rank an adapter's updates have: a table, a figure, and the numbers behind them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import hyperadapt_jax as ha
from hyperadapt_jax import paths
from hyperadapt_jax.rank import RankReport, Spectrum
from hyperadapt_jax.scales import ScaleVectors

from .. import files
from ..errors import InputError
from ..run import plots
from ..run.trained import Trained, TrainedOptions, load_run

TABLE, FIGURE = "rank.json", "rank.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the rank of an adapter's updates, next to the frozen weights and random vectors.

    Prints a table of medians, and writes rank.json (every matrix) and rank.png (singular values).
    A decomposition of n x m takes n m min(n, m) operations: of a large model, choose some weights
    and some layers.

    Examples:
      python -m train rank --adapter runs/sft
      # Of a large model: two weights of four layers.
      python -m train rank --adapter runs/sft --weights q/kernel up/kernel --limit 4
      # An adapter's folder alone, and the figure elsewhere.
      python -m train rank --adapter runs/sft/adapter --folder figures
    """

    trained: TrainedOptions
    folder: Path | None = None
    """Where rank.json and rank.png are written; the folder of --adapter if not given."""
    weights: tuple[str, ...] = ()
    """Suffixes of the weights' paths, such as q/kernel; every adapted weight if not given."""
    limit: int | None = None
    """Most layers of each weight, evenly spread from the first to the last; all if not given."""
    seed: int = 0
    """Seed of the random vectors."""
    quiet: bool = False
    """Print warnings and errors alone."""


def run(options: Options) -> RankReport:
    """Measures, prints and writes.

    Raises:
      InputError: nothing is scaled, no weight has such a path, or a file cannot be written.
      AdapterError, CheckpointError: the adapter or the base is damaged, or they do not fit.
    """
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit}: give at least 1")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: give a number from 0 on")
    trained = load_run(options.trained)
    folder = options.folder or options.trained.adapter
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = _choose(trained, options.weights)
    spectra: list[Spectrum] = []
    for path in tqdm(weights, desc="decomposing", disable=options.quiet or None, delay=2):
        spectra += analyze(trained, path, options.limit, options.seed)
    found = RankReport(tuple(spectra))
    files.write(folder / TABLE, json.dumps([_as_json(s) for s in spectra], indent=1) + "\n")
    plots.draw(folder / FIGURE, ha.rank.figure(found))
    if not options.quiet:
        print(found)
        print(f"{folder}: {TABLE}, {FIGURE}")
    return found


def analyze(
    trained: Trained, path: str, limit: int | None = None, seed: int = 0
) -> Iterator[Spectrum]:
    """The spectra of one weight, as `hyperadapt_jax.rank.analyze` gives them, of some layers.

    Args:
      trained: the adapter and its base.
      path: which weight; layers are on its first axis.
      limit: most layers; all if not given.
      seed: of the random vectors.
    """
    weight, vectors = trained.parameter(path, trained.dtype), trained.adapter.scales[path]
    layers = np.arange(len(weight))
    if limit is not None and vectors.axes.startswith("stack"):
        layers = np.unique(np.linspace(0, len(weight) - 1, min(limit, len(weight))).round())
        layers = layers.astype(int)
        weight, vectors = jax.tree.map(lambda x: x[layers], (weight, vectors))
    for spectrum in ha.rank.analyze({path: weight}, {path: vectors}, seed=seed).spectra:
        first, *rest = spectrum.index or (0,)
        index = (int(layers[first]), *rest) if spectrum.index else ()
        yield dataclasses.replace(spectrum, index=index)


def _choose(trained: Trained, suffixes: tuple[str, ...]) -> list[str]:
    """The adapted weights whose paths end in one of the suffixes; each must match some."""
    scales: dict[str, ScaleVectors] = trained.adapter.scales
    if not scales:
        raise InputError("the adapter scales no weight, so that there are no updates to measure")
    for suffix in suffixes:
        if not any(map(paths.matcher([suffix]), scales)):
            raise InputError(f"--weights {suffix} is none of them; {paths.suggest(suffix, scales)}")
    return list(filter(paths.matcher(suffixes), scales)) if suffixes else list(scales)


def _as_json(spectrum: Spectrum) -> dict:
    kept = ("path", "index", "source", "shape", "bound")
    return {**{name: getattr(spectrum, name) for name in kept}, **vars(spectrum.measures)}
