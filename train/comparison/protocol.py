"""What is compared, read from a YAML file: methods, learning rates and seeds on one task."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperadapt_jax import paths

from ..errors import InputError
from ..options import AdapterOptions, OptimizerOptions, RunOptions, make, read_config
from .runs import Planned, check_rate

KEYS = ("recipe", "options", "methods", "lr", "seeds")
# What a comparison sets for each run.
_SET = ("config", "folder", "lr", "method", "quiet", "report_half", "resume", "seed")
_OF_A_METHOD = tuple(
    field.name
    for group in (AdapterOptions, OptimizerOptions)
    for field in dataclasses.fields(group)
)


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What is compared.

    Attributes:
      recipe: which trains.
      cls: the class of its options.
      common: options of all runs, under flat names.
      methods: options of each method, likewise, by its name in the table.
      rates: the learning rates of each method.
      seeds: of the runs at the best rate; the first one's choose it.
      folder: in which all runs lie.
    """

    recipe: str
    cls: type
    common: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    folder: Path

    def run(self, method: str, lr: float, seed: int) -> Planned:
        """One of the runs."""
        folder = self.folder / method / f"lr-{lr}-seed-{seed}"
        given = {"lr": lr, "seed": seed, "folder": folder}
        always = {"resume": True, "quiet": True, "report_half": True}
        return Planned(method, make(self.cls, given | dict(self.methods[method]) | always))

    @property
    def runs(self) -> Iterator[Planned]:
        """All that may be made."""
        for name, rates in self.rates.items():
            for lr in rates:
                for seed in self.seeds:
                    yield self.run(name, lr, seed)


def read(
    file: Path,
    folder: Path,
    recipes: Mapping[str, Callable[[], type]],
    instead: Mapping[str, Any] | None = None,
) -> Comparison:
    """Reads a comparison, and checks all of its runs' options.

    Args:
      file: YAML, with the keys `KEYS`.
      folder: for all runs.
      recipes: those that can be compared, and what gives the class of a recipe's options.
      instead: options in place of the file's.

    Raises:
      InputError: says what in the file cannot be used.
    """
    values = read_config(file)
    for name in values:
        if name not in KEYS:
            raise InputError(f"{file}: a comparison has no {name!r}; {paths.suggest(name, KEYS)}")
    for name in ("recipe", "methods", "lr", "seeds"):
        if name not in values:
            raise InputError(f"{file}: {name} must be given; `compare --help` shows an example")
    recipe = values["recipe"]
    if not isinstance(recipe, str) or recipe not in recipes:
        raise InputError(f"{file}: recipe {recipe!r}: choose one of {', '.join(recipes)}")
    cls = recipes[recipe]()

    common = _mapping(file, "options", values.get("options")) | dict(instead or {})
    for name in _SET:
        if name in common:
            raise InputError(
                f"{file}: options: {name} is set by the comparison: leave it out"
                + ("; learning rates are in lr" if name == "lr" else "")
                + ("; seeds are in seeds" if name == "seed" else "")
                + ("; methods are in methods" if name == "method" else "")
            )
    methods, rates = {}, {}
    everyones = _rates(file, "lr", values["lr"])
    if not isinstance(values["methods"], dict) or not values["methods"]:
        raise InputError(f"{file}: methods: give some, a name and its options, as in 'row: {{}}'")
    for name, given in values["methods"].items():
        where = f"methods: {name}"
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise InputError(
                f"{file}: {where}: a name is letters, digits, '+', '-', '.' and '_': it becomes a"
                " folder"
            )
        own = _mapping(file, where, given)
        for option in own:
            if option not in _OF_A_METHOD:
                known = paths.suggest(option, _OF_A_METHOD)
                raise InputError(
                    f"{file}: {where}: {option} is no option of a method's own: write it under"
                    f" options, for all; {known}"
                )
        lr = own.pop("lr", None)
        rates[name] = everyones if lr is None else _rates(file, f"{where}: lr", lr)
        methods[name] = {"method": name, **common, **own}
    comparison = Comparison(
        recipe, cls, common, methods, rates, _seeds(file, values["seeds"]), folder
    )
    with _named(file, "options"):
        make(cls, {**common, "folder": folder})
    for name in methods:
        with _named(file, f"methods: {name}"):
            first = comparison.run(name, rates[name][0], comparison.seeds[0])
    # What the task finds in its data is the same for all, and is found once.
    task = first.options.task.resolve()
    found = {
        field.name: getattr(task, field.name)
        for field in dataclasses.fields(task)
        if getattr(task, field.name) != getattr(first.options.task, field.name)
    }
    methods = {name: {**own, **found} for name, own in methods.items()}
    comparison = dataclasses.replace(comparison, methods=methods)
    for name, tried in rates.items():
        with _named(file, f"methods: {name}"):
            if len(tried) > 1:
                check_rate(comparison.run(name, tried[0], comparison.seeds[0]))
    return comparison


@contextlib.contextmanager
def _named(file: Path, where: str) -> Iterator[None]:
    """Errors of options say where in the file they stand."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}: {where}: {error}") from None


def _mapping(file: Path, where: str, value: Any) -> dict[str, Any]:
    """Options, under the names that they have in Python."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{file}: {where}: give options, such as {{batch_size: 8}}")
    return {name.replace("-", "_"): found for name, found in value.items()}


def _several(file: Path, where: str, value: Any, example: str) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{file}: {where}: give a list of at least one, such as {example}")
    return value


def _rates(file: Path, where: str, value: Any) -> tuple[float, ...]:
    found = []
    for rate in _several(file, where, value, "[1e-3, 1e-2]"):
        if isinstance(rate, list):
            raise InputError(f"{file}: {where}: {rate} is none: give numbers")
        with _named(file, where):
            found.append(make(OptimizerOptions, {"lr": rate}).lr)
        if not found[-1] > 0:
            raise InputError(f"{file}: {where}: {found[-1]:g}: give positive learning rates")
    return _distinct(file, where, found)


def _seeds(file: Path, value: Any) -> tuple[int, ...]:
    found = []
    for seed in _several(file, "seeds", value, "[0, 1, 2]"):
        with _named(file, "seeds"):
            found.append(make(RunOptions, {"folder": ".", "seed": seed}).seed)
    return _distinct(file, "seeds", found)


def _distinct(file: Path, where: str, values: list[Any]) -> tuple[Any, ...]:
    if twice := [value for value in values if values.count(value) > 1]:
        raise InputError(f"{file}: {where}: {twice[0]:g} comes twice")
    return tuple(values)
