"""The options that recipes share, and how they are read: defaults, a YAML file, the command line.

A recipe's options are one frozen dataclass whose fields are the groups below and options of its
own. On the command line and in a file they are flat: a field ``row_lr`` of any group is
``--row-lr`` here and ``row_lr:`` there.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from hyperadapt_jax import paths
from train.errors import InputError

T = TypeVar("T")

CONFIG = "config.yaml"

# What may differ between a run and its continuation: where it lies and how it is shown.
_PASSING = {"config", "folder", "resume", "quiet"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The base model, which stays frozen."""

    model: str
    """Hugging Face folder, or a repository of the hub such as Qwen/Qwen2.5-0.5B."""
    revision: str | None = None
    """Branch, tag or commit of a repository of the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights and of the computation. What trains is float32 always."""
    remat: Literal["none", "dots", "full"] = "dots"
    """What the backward pass computes again: nothing, all but matrix products, or everything."""
    attention: Literal["xla", "cudnn"] | None = None
    """Attention kernel; JAX's own choice if not given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What trains."""

    method: Literal["hyperadapt", "row", "col", "full", "head"] = "hyperadapt"
    """Both scale vectors of each weight, the output-side or the input-side ones alone, every
    parameter of the model, or the head alone."""
    targets: tuple[str, ...] = ("all-linear",)
    """Which weights are scaled: qv, qkvo, qkvud or all-linear, or "PATTERN=ROLES" pairs such as
    ".*/(q|v)/kernel=stack in out"."""
    exclude: tuple[str, ...] = ()
    """Suffixes of paths that stay unscaled although a target matches them."""
    full: str | None = None
    """Parameters that train fully beside the vectors: a regular expression of whole paths. A
    classifier's head, and what the checkpoint lacked, always do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How it trains. Scale vectors want about ten times LoRA's learning rate and no decay."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of whole matrices: for --method full."""
    lr: float = 1e-2
    """Peak learning rate, of all that has none of its own."""
    row_lr: float | None = None
    """Peak learning rate of the output-side vectors."""
    col_lr: float | None = None
    """Peak learning rate of the input-side vectors."""
    head_lr: float | None = None
    """Peak learning rate of what trains fully."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls, to zero, after the warm-up."""
    warmup: float = 0.06
    """Steps of linear warm-up: a share of all steps if below 1, else their number."""
    weight_decay: float = 0.0
    """Decoupled decay; of a vector, towards the identity."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.999
    """Adam's decay of the second moment."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None does not clip."""

    def __post_init__(self):
        for name in ("lr", "row_lr", "col_lr", "head_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}: give a finite number that is not negative")
        for name in ("warmup", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}: give a number that is not negative")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a number in [0, 1)")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip is {self.clip}: give a positive number, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run: how long, how often, and where it is written."""

    folder: Path
    """Run folder, new or empty: configuration, metrics, checkpoints, adapter, curves, report."""
    resume: bool = False
    """Go on from the last checkpoint of the folder, exactly; from the start if it has none."""
    epochs: float = 3.0
    """Passes over the training data."""
    steps: int | None = None
    """Optimizer steps, in place of epochs."""
    batch_size: int = 32
    """Rows of one optimizer step."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other; the gradient is the same."""
    eval_every: int | None = None
    """Steps between evaluations; once an epoch if not given."""
    save_every: int | None = None
    """Steps between checkpoints; at evaluations alone if not given."""
    patience: int = 5
    """Steps in a row whose loss may be NaN or infinite before the run stops. None of them changes
    what trains."""
    seed: int = 0
    """Seed of a new head, of the order of the data and of dropout."""
    quiet: bool = False
    """Print warnings and errors alone."""
    config: Path | None = None
    """YAML file of options, under the names that they have here; what the command line says wins.
    A run's own config.yaml is one."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "eval_every", "save_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give at least 1")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise InputError(f"epochs is {self.epochs}: give a positive number")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"batch_size {self.batch_size} cannot be computed in {self.accumulate} equal parts:"
                " change accumulate or batch_size"
            )
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}: give a number from 0 to 2147483647")

    @property
    def passes(self) -> int:
        """Epochs that are enough for all steps."""
        return self.steps or math.ceil(self.epochs)


def parse(recipe: str, cls: type[T], args: Sequence[str]) -> T:
    """Reads a recipe's options.

    Args:
      recipe: name of the subcommand.
      cls: its dataclass.
      args: the command line after that name.

    Returns:
      The options: the command line's, else the file's that ``--config`` names, else the defaults.

    Raises:
      InputError: the file cannot be read, is of another recipe or names an unknown option.
      SystemExit: the command line is wrong (status 2), or asks for help (status 0).
    """
    args = list(args)
    if file := _config_file(args):
        args = [*_as_args(read_config(file), recipe, cls, file), *args]
    return tyro.cli(
        Annotated[cls, tyro.conf.OmitArgPrefixes],
        args=args,
        prog=f"python -m train {recipe}",
        compact_help=False,
    )


def read_config(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file, a flat mapping.

    Raises:
      InputError: there is no such file, or it is no YAML mapping.
    """
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} is no YAML: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{file} is no list of options: write lines such as 'lr: 0.01'")
    return {name.replace("-", "_"): value for name, value in found.items()}


def flat(options: Any, recipe: str) -> dict[str, Any]:
    """All options under their flat names, as plain values that YAML and JSON hold."""
    values: dict[str, Any] = {"recipe": recipe}
    for name, value in _leaves(options):
        if isinstance(value, Path):
            value = str(value)
        values[name] = list(value) if isinstance(value, tuple) else value
    return values


def lasting(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a run what it is, of what :func:`flat` gave."""
    return {name: value for name, value in values.items() if name not in _PASSING}


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first option whose change makes another run of it, or None; both as :func:`flat`."""
    old, new = lasting(old), lasting(new)
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            return f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
    return None


def dump(values: Mapping[str, Any]) -> str:
    """The text of a ``config.yaml``; ``--config`` reads it back."""
    kept = {k: v for k, v in values.items() if k not in {"config", "resume", "quiet"}}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _leaves(options: Any):
    """Pairs of flat name and value, through the groups."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield field.name, value


def _names(cls: type) -> set[str]:
    """The flat names of a recipe's options."""
    names = set()
    for name, kind in typing.get_type_hints(cls).items():
        names |= _names(kind) if dataclasses.is_dataclass(kind) else {name}
    return names


def _config_file(args: Sequence[str]) -> str | None:
    """What the last ``--config`` of a command line says."""
    file = None
    for i, arg in enumerate(args):
        if arg == "--config" and i + 1 < len(args):
            file = args[i + 1]
        elif arg.startswith("--config="):
            file = arg.removeprefix("--config=")
    return file


def _as_args(values: Mapping[str, Any], recipe: str, cls: type, file: str | Path) -> list[str]:
    """A file's options as the words of a command line, so that one parser checks both."""
    values = dict(values)
    other = values.pop("recipe", recipe)
    if other != recipe:
        raise InputError(f"{file} has options of {other!r}: give it to `python -m train {other}`")
    known, words = _names(cls), []
    for name, value in values.items():
        if name not in known:
            near = paths.nearest(name, known)
            raise InputError(f"{file}: {recipe} has no option {name!r}; {near}")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, dict):
            raise InputError(f"{file}: {name} holds options: write them on lines of their own")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words
