"""What rank an adapter's updates have: a table, a figure, and the numbers behind them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
    """Measure the rank of an adapter's updates, next to the frozen weights and random arrays.

    Prints a table of medians, and writes rank.json (every matrix) and rank.png (singular values).
    With --against, the updates of other runs on the same base stand next to it, such as LoRA's and
    full fine-tuning's. One matrix is held at a time. A decomposition of n x m takes n m min(n, m)
    operations: of a large model, choose some weights and some layers.

    Examples:
      python -m train rank --adapter runs/sft
      # Of a large model: two weights of four layers.
      python -m train rank --adapter runs/sft --weights q/kernel up/kernel --limit 4
      # Next to two other runs, and the figure elsewhere.
      python -m train rank --adapter runs/sft --against lora=runs/lora full=runs/full \\
          --folder figures
    """

    trained: TrainedOptions
    folder: Path | None = None
    """Where rank.json and rank.png are written; the folder of --adapter if not given."""
    weights: tuple[str, ...] = ()
    """Suffixes of the weights' paths, such as q/kernel; every adapted weight if not given."""
    limit: int | None = None
    """Most layers of each weight, evenly spread from the first to the last; all if not given."""
    seed: int = 0
    """Seed of the random arrays."""
    against: tuple[str, ...] = ()
    """Other adapters or runs on the same base, as NAME=PATH."""
    on_device: bool = False
    """Decompose in float32 on the accelerator; in float64 on the host if not given."""
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
    others = dict(_other(text, trained, options.trained) for text in options.against)
    folder = options.folder or options.trained.adapter
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = _choose(trained, options.weights)
    spectra: list[Spectrum] = []
    for path in tqdm(weights, desc="decomposing", disable=options.quiet or None, delay=2):
        spectra += analyze(
            trained, path, options.limit, options.seed, others, on_device=options.on_device
        )
    found = RankReport(tuple(spectra))
    files.write(folder / TABLE, json.dumps([_as_json(s) for s in spectra], indent=1) + "\n")
    plots.draw(folder / FIGURE, ha.rank.figure(found))
    if not options.quiet:
        print(found)
        print(f"{folder}: {TABLE}, {FIGURE}")
    return found


def analyze(
    trained: Trained,
    path: str,
    limit: int | None = None,
    seed: int = 0,
    others: Mapping[str, Trained] | None = None,
    *,
    on_device: bool = False,
) -> Iterator[Spectrum]:
    """The spectra of one weight, as `hyperadapt_jax.rank.analyze` gives them, of some layers.

    Args:
      trained: the adapter and its base.
      path: which weight; layers are on its first axis.
      limit: most layers; all if not given.
      seed: of the random arrays.
      others: other adapters of the base, by name: those that adapt or train the weight are measured
        too.
      on_device: as in `hyperadapt_jax.rank.analyze`.
    """
    weight, vectors = trained.parameter(path, trained.dtype), trained.adapter.scales[path]
    controls: dict[str, Any] = {}
    for name, other in (others or {}).items():
        if path in other.adapter.scales:
            controls[name] = other.adapter.scales[path]
        elif path in other.adapter.full:
            controls[name] = np.asarray(other.adapter.full[path]) - np.asarray(weight, np.float32)
    layers = np.arange(len(weight))
    if limit is not None and vectors.axes.startswith("stack"):
        layers = np.unique(np.linspace(0, len(weight) - 1, min(limit, len(weight))).round())
        layers = layers.astype(int)
        weight, vectors, controls = jax.tree.map(lambda x: x[layers], (weight, vectors, controls))
    found = ha.rank.analyze(
        {path: weight},
        {path: vectors},
        {name: {path: control} for name, control in controls.items()},
        seed=seed,
        on_device=on_device,
    )
    for spectrum in found.spectra:
        first, *rest = spectrum.index or (0,)
        index = (int(layers[first]), *rest) if spectrum.index else ()
        yield dataclasses.replace(spectrum, index=index)


def _other(text: str, trained: Trained, options: TrainedOptions) -> tuple[str, Trained]:
    """One of ``--against``: its name, and the adapter, which is of the same base."""
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise InputError(f"--against {text}: give NAME=PATH, such as lora=runs/lora")
    if name in (ha.rank.UPDATE, ha.rank.RANDOM, ha.rank.BASE):
        raise InputError(f"--against {text}: the report itself has a {name}; choose another name")
    other = load_run(dataclasses.replace(options, adapter=Path(place)))
    try:
        other.adapter.check(trained.base.params)
    except ha.AdapterError as error:
        raise InputError(f"--against {text}: {error}") from None
    return name, other


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
