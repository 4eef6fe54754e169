"""The options that recipes share, and how they are read: defaults, a YAML file, the command line.

A recipe's options are one frozen dataclass whose fields are the groups below and options of its
own. On the command line and in a file they are flat: a field ``row_lr`` of any group is
``--row-lr`` here and ``row_lr:`` there.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import math
import shlex
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, NoReturn, TypeVar

import yaml

from hyperadapt_jax import paths
from hyperadapt_jax.methods import METHODS

from . import PROGRAM
from .errors import InputError
from .parallel import processes
from .parallel.mesh import Layout, make_layout, parse_mesh, parse_rules

T = TypeVar("T")

# A file, a folder, or a name on the hub; `~` is the user's home.
Place = NewType("Place", str)

CONFIG = "config.yaml"
LARGEST = 2**31 - 1  # what the step's number has room for

_EXAMPLES = "python -m train"  # what the examples of a recipe's docstring begin with

# What --help shows first, where a recipe has it.
_COMMON = (
    *("file", "task", "data", "prompt", "answer", "chat", "model", "adapter", "folder", "method"),
    *("lr", "epochs", "steps", "batch_size", "max_length", "score", "resume", "config"),
)

# Marks an option that can have several values, each of a run of its own.
SWEPT = "swept"
# Marks an option that is given without its name.
POSITIONAL = "positional"

# What may differ between a run and its continuation: where it lies, on what, and how it is shown.
_NOT_IDENTITY = {"config", "folder", "resume", "quiet", "mesh", "rules"}
# What is of one process, and of no run.
_OWN = {"coordinator", "num_processes", "process_id"}
_PLACES = {"model", "revision"}  # where the base lies; which one it is, its fingerprint says


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The base model, which stays frozen."""

    model: Place
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

    method: Annotated[str, METHODS] = "hyperadapt"
    """What is trained."""
    targets: tuple[str, ...] = ()
    """Which weights are adapted: qv, qkvo, qkvud, all-linear or ia3, or "PATTERN=ROLES" pairs such
    as ".*/(q|v)/kernel=stack in out". If not given, what the method is meant for: all-linear, or
    ia3 for that method."""
    rank: int | None = None
    """Rank of the low-rank terms, for methods that have them; if not given, 8 for lora, dora and
    hyperadapt-lora, 256 for vera, 1 for hira."""
    alpha: float | None = None
    """LoRA's alpha: a term is multiplied by alpha / rank. Twice the rank if not given."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, as rsLoRA does."""
    lora_dropout: float = 0.0
    """The share of a weight's inputs that its low-rank term does not see in training."""
    exclude: tuple[str, ...] = ()
    """Suffixes of paths that stay as they are although a target matches them."""
    full: str | None = None
    """Parameters that train fully, together with the rest: a regular expression of whole paths.
    A classifier's head, and what the checkpoint lacked, always do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How it trains. Scale vectors want about ten times LoRA's learning rate and no decay."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalizes the updates of the layers' matrices, and leaves the rest to Adam: for
    --method full."""
    muon_embeddings: bool = False
    """Let muon take the embedding and the head too."""
    lr: Annotated[float, SWEPT] = 1e-2
    """Peak learning rate, of all that has none of its own. The default is for scale vectors:
    low-rank terms want about a tenth of it. Several, such as 1e-3,3e-3,1e-2, are a run each, in
    folders below --folder, with a table and a figure of them all."""
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

    def __post_init__(self) -> None:
        for name in ("lr", "row_lr", "col_lr", "head_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{flag(name)} {value}: give a finite number from 0 on")
        for name in ("warmup", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{flag(name)} {value}: give a finite number from 0 on")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{flag(name)} {getattr(self, name)}: give a number in [0, 1)")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"--clip {self.clip}: give a positive number, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run: how long, how often, and where it is written."""

    folder: Path
    """Run folder, new or empty: configuration, metrics, checkpoints, adapter, curves, report."""
    resume: bool = False
    """Continue from the last checkpoint of the folder, exactly; from the start if it has none."""
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
    """Steps between checkpoints; if not given, at evaluations and every ten minutes."""
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

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "save_every", "patience"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                raise InputError(f"{flag(name)} {value}: give a number from 1 to {LARGEST}")
        if not 0 < self.epochs <= LARGEST:
            raise InputError(f"--epochs {self.epochs}: give a positive number up to {LARGEST}")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"--batch-size {self.batch_size} cannot be computed in {self.accumulate} equal"
                " parts: change --accumulate or --batch-size"
            )
        if not 0 <= self.seed <= LARGEST:
            raise InputError(f"--seed {self.seed}: give a number from 0 to {LARGEST}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """The devices, and what lies where on them."""

    mesh: str | None = None
    """Sizes of the axes data, fsdp and tensor of a mesh of devices, such as fsdp=4,tensor=2; one
    that is left out is 1, and -1 is the rest. data divides the rows of a batch; fsdp divides them
    too, and the weights; tensor divides heads, hidden units and the vocabulary. If not given, what
    the environment variable HYPERADAPT_MESH says, else all devices on fsdp."""
    rules: tuple[str, ...] = ()
    """Which axes of the mesh divide which axis of the weights, in place of the usual ones, such as
    vocab=tensor,fsdp or, to keep it whole, embed=; batch= is for the rows of a batch."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes that share the work, each started with this same
    command; auto lets JAX find them, as on a TPU pod slice. If not given, what SLURM, Open MPI, GKE
    or the environment variable JAX_COORDINATOR_ADDRESS says. All have to see the same folders."""
    num_processes: int | None = None
    """How many processes there are, where nothing else says it."""
    process_id: int | None = None
    """Which one this is, from 0 on; the first one prints and writes the files."""

    def join(self, *, saves: bool, farewell: str) -> processes.Member | None:
        """Makes this process one of several, where it is one; see `processes.join`."""
        given = self.coordinator, self.num_processes, self.process_id
        return processes.join(*given, saves=saves, farewell=farewell)

    def layout(self) -> Layout | None:
        """What lies where; None where all is on one device.

        Raises:
          InputError: a text cannot be read, or there are fewer devices.
        """
        return make_layout(self.mesh, self.rules)

    def __post_init__(self) -> None:
        if self.mesh is not None:
            parse_mesh(self.mesh)
        parse_rules(self.rules)
        processes.check(self.coordinator, self.num_processes, self.process_id)


def parse(recipe: str, cls: type[T], args: Sequence[str]) -> T:
    """Reads a recipe's options.

    Args:
      recipe: name of the subcommand.
      cls: its dataclass. What its docstring has from "Examples:" on ends the help.
      args: the command line after that name.

    Returns:
      The options: the command line's, else the file's that ``--config`` names, else the defaults.

    Raises:
      InputError: an option is unknown, missing or out of its range, or has several values; the file
        cannot be used.
      SystemExit: the command line asks for help (status 0).
    """
    return _build(cls, _single(_given(recipe, cls, args)))


def parse_sweep(recipe: str, cls: type[T], args: Sequence[str]) -> list[T]:
    """Reads a recipe's options, of which some may have several values: one after the other.

    Args and errors are those of :func:`parse`.
    """
    given = _given(recipe, cls, args)
    swept = {name: value for name, value in given.items() if isinstance(value, _Several)}
    return [
        _build(cls, given | dict(zip(swept, values, strict=True)))
        for values in itertools.product(*swept.values())
    ]


class _Several(tuple):
    """Values of an option that is swept."""


def _single(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same values, of which none may be several of one that is swept."""
    for name, value in values.items():
        if isinstance(value, _Several):
            raise InputError(f"{flag(name)} has {len(value)} values: give one here")
    return values


def _given(recipe: str, cls: type, args: Sequence[str]) -> dict[str, Any]:
    """The values that the command line gives, and the file that it names; see :func:`parse`."""
    fields = {field.name: field for field in _fields(cls)}
    parser = _parser(recipe, cls, fields.values())
    given, extra = parser.parse_known_args(list(args))
    if extra:
        near = paths.suggest(extra[0], map(flag, fields)) if extra[0].startswith("-") else None
        raise InputError(f"{extra[0]}: there is no such option" + (f"; {near}" if near else ""))
    values = {}
    if (file := vars(given).get("config")) is not None:
        values = _from_file(read_config(file), recipe, fields, file)
    values |= vars(given)
    if missing := [f.title for n, f in fields.items() if f.required and n not in values]:
        raise InputError(f"{', '.join(missing)}: must be given; {parser.prog} --help explains")
    return values


def make(cls: type[T], values: Mapping[str, Any]) -> T:
    """Options from Python, under their flat names, checked as a file's are.

    Raises:
      InputError: an option is unknown, missing or out of its range.
    """
    fields, found = {field.name: field for field in _fields(cls)}, {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{name}: there is no such option; {paths.suggest(name, fields)}")
        value = str(value) if isinstance(value, Path) else value
        try:
            found[name] = fields[name].read(list(value) if isinstance(value, tuple) else value)
        except ValueError as error:
            raise InputError(f"{name} {str(value)[:60]}: {error}") from None
    if missing := [name for name, field in fields.items() if field.required and name not in found]:
        raise InputError(f"{', '.join(missing)}: must be given")
    return _build(cls, _single(found))


class _UniqueKeys(yaml.SafeLoader):
    """YAML of plain values; a key that comes twice is an error, as half of it would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [str(key.value).replace("-", "_") for key, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"{', '.join(sorted(twice))} comes twice")
        return super().construct_mapping(node, deep)


def read_config(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file, a flat mapping.

    Raises:
      InputError: there is no such file, or it is not a valid YAML mapping.
    """
    try:
        found = yaml.load(Path(file).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} is not valid YAML: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{file} holds no options: write lines such as 'lr: 0.01'")
    return {name.replace("-", "_"): value for name, value in found.items()}


def flat(options: Any, recipe: str) -> dict[str, Any]:
    """All options under their flat names, as plain values that YAML and JSON hold."""
    values: dict[str, Any] = {"recipe": recipe}
    for name, value in _leaves(options):
        if name in _OWN:
            continue
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Path):
            value = str(value)
        elif value is not None and not isinstance(value, str | int | float):
            value = f"a {type(value).__name__}"  # held in memory: a digest tells what is in it
        values[name] = value
    return values


def identity_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a run what it is, of what :func:`flat` gave."""
    return {name: value for name, value in values.items() if name not in _NOT_IDENTITY}


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first option whose change makes another run of it, or None; both as :func:`flat`.

    An option that an old file lacks came later: until then what it asks for was off.
    """
    old, new = identity_options(old), identity_options(new)
    names = {*old, *(name for name, value in new.items() if value or name in old)} - _PLACES
    for name in sorted(names, key=lambda name: (name != "recipe", name)):
        if old.get(name) != new.get(name):
            return f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
    return None


def command_line(recipe: str, options: Any, *more: str) -> str:
    """The command line that gives these options, quoted for a shell.

    Args:
      recipe: name of the subcommand.
      options: its options.
      *more: words to put behind.
    """
    words = [*PROGRAM.split(), recipe]
    fields = {field.name: field for field in _fields(type(options))}
    for name, value in _leaves(options):
        if name in {"config", "resume", *_OWN} or value == fields[name].default:
            continue
        if fields[name].mark == POSITIONAL:
            words.append(str(value))
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag("no-" + name))
        elif isinstance(value, tuple):
            words += [flag(name), *value]
        else:
            text = str(value)
            words += [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
    return shlex.join([*words, *more])


def dump(values: Mapping[str, Any]) -> str:
    """The text of a ``config.yaml``; ``--config`` reads it back."""
    kept = {k: v for k, v in values.items() if k not in {"config", "resume", "quiet"}}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _leaves(options: Any) -> Iterator[tuple[str, Any]]:
    """Pairs of flat name and value, through the groups."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield field.name, value


def flag(name: str) -> str:
    """An option as the command line has it.

    >>> flag("row_lr")
    '--row-lr'
    """
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class _Field:
    """An option: its place among the groups, its type, default, help and choices, if it has some.

    A `Literal` has its values for choices; a type that is annotated with a mapping, its keys, which
    have summaries. One that is annotated with a text has that mark, `SWEPT` or `POSITIONAL`.
    """

    name: str
    group: type
    kind: Any
    many: bool
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    mark: str | None = None

    @property
    def title(self) -> str:
        """The option as the command line has it."""
        return self.name.upper() if self.mark == POSITIONAL else flag(self.name)

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def metavar(self) -> str:
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        if self.mark == POSITIONAL:
            return self.title
        kinds = {int: "INT", float: "NUMBER", Path: "PATH", Place: "PLACE"}
        return kinds.get(self.kind, "TEXT") + (",..." if self.mark == SWEPT else "")

    def read(self, value: Any) -> Any:
        """A value as text of the command line, or as YAML gives it."""
        if isinstance(value, dict):
            raise ValueError("holds options: write them on lines of their own")
        if self.mark == SWEPT:
            return self._several(value.split(",") if isinstance(value, str) else value)
        if self.many:
            return tuple(map(self._one, value if isinstance(value, list) else [value]))
        if isinstance(value, list):
            raise ValueError("is one value, not a list")
        return self._one(value)

    def _several(self, value: Any) -> Any:
        found = _Several(map(self._one, value if isinstance(value, list) else [value]))
        if not found:
            raise ValueError("give at least one")
        if len(set(found)) < len(found):
            raise ValueError("one comes twice")
        return found if len(found) > 1 else found[0]

    def _one(self, value: Any) -> Any:
        if self.optional and value in (None, "None"):
            return None
        if self.kind is bool:
            if isinstance(value, bool):
                return value
            raise ValueError("give true or false")
        if self.kind in (int, float):
            return self._number(value)
        if not isinstance(value, str):
            raise ValueError("give text, in quotes" if value is not None else "give a value")
        if self.kind in (Path, Place):
            if not value or "\0" in value:
                raise ValueError("give a path" if self.kind is Path else "give a path or a name")
            return self.kind(_at_home(value))
        if self.choices and value not in self.choices:
            raise ValueError(f"choose one of {', '.join(self.choices)}")
        return value

    def _number(self, value: Any) -> int | float:
        what = "a whole number" if self.kind is int else "a number"
        text = str(value) if isinstance(value, int | float | str) else ""
        # Python itself reads digits of any script, and underscores.
        if isinstance(value, bool) or not text.isascii() or "_" in text or len(text) > 400:
            raise ValueError(f"give {what}")
        try:
            return self.kind(text)
        except ValueError:
            raise ValueError(f"give {what}") from None


def _at_home(text: str) -> str:
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError("there is no such user: give the whole path") from None


def _fields(cls: Any) -> Iterator[_Field]:
    """A recipe's options in the order of their groups."""
    kinds, helps = typing.get_type_hints(cls, include_extras=True), _helps(cls)
    for field in dataclasses.fields(cls):
        kind, default, text = kinds[field.name], field.default, helps.get(field.name, "")
        if dataclasses.is_dataclass(kind):
            for inner in _fields(kind):
                if default is not dataclasses.MISSING:
                    inner = dataclasses.replace(inner, default=getattr(default, inner.name))
                yield inner
            continue
        optional = False
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            # The first is what a text can be; others are for Python alone.
            optional = type(None) in typing.get_args(kind)
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if many := typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
        choices: tuple[str, ...] = ()
        mark = None
        if typing.get_origin(kind) is Annotated and isinstance(typing.get_args(kind)[1], str):
            kind, mark = typing.get_args(kind)
        elif typing.get_origin(kind) is Annotated:
            kind, found = typing.get_args(kind)
            choices = tuple(found)
            text += " " + "; ".join(f"{name}: {found[name].summary}" for name in found) + "."
        elif typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
        yield _Field(field.name, cls, kind, many, optional, default, text, choices, mark)


@functools.cache  # a comparison makes hundreds of options of one class
def _helps(cls: type) -> Mapping[str, str]:
    """The docstrings that stand below the fields of a dataclass and of those that it extends."""
    helps: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        body: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                target: Any = field.target
                if isinstance(text.value, ast.Constant):
                    helps[target.id] = " ".join(str(text.value.value).split())
    return helps


def _build(cls: Any, values: Mapping[str, Any], default: Any = None) -> Any:
    """A dataclass of groups from flat values; what is not given is the default's."""
    kinds, parts = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        inner = field.default if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(kinds[field.name]):
            inner = None if inner is dataclasses.MISSING else inner
            parts[field.name] = _build(kinds[field.name], values, inner)
        elif field.name in values:
            parts[field.name] = values[field.name]
        elif inner is not dataclasses.MISSING:
            parts[field.name] = inner
    return cls(**parts)


def _from_file(
    values: Mapping[str, Any], recipe: str, fields: Mapping[str, _Field], file: str | Path
) -> dict[str, Any]:
    """A file's options, checked as those of the command line are."""
    values = dict(values)
    other = values.pop("recipe", recipe)
    if not isinstance(other, str):
        raise InputError(f"{file}: recipe is no name of a recipe; write recipe: {recipe}")
    if other != recipe:
        raise InputError(f"{file} has options of {other!r}: give it to `{PROGRAM} {other}`")
    found = {}
    for name, value in values.items():
        if name not in fields:
            near = paths.suggest(name, fields)
            raise InputError(f"{file}: {recipe} has no option {name!r}; {near}")
        try:
            found[name] = fields[name].read(value)
        except ValueError as error:
            shown = "" if isinstance(value, dict | list) else f" {str(value)[:60]}:"
            raise InputError(f"{file}: {name}{shown} {error}") from None
    return found


class _Parser(argparse.ArgumentParser):
    """The standard parser, whose errors are this program's own."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # the parser's own drops what fails


class _Read(argparse.Action):
    """Stores an option's value as its field reads it, or says in one form what is wrong."""

    def __init__(self, *, field: _Field, **options: Any):
        super().__init__(**options)
        self.field = field

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            setattr(namespace, self.dest, self.field.read(values))
        except ValueError as error:
            shown = " ".join(values) if isinstance(values, list) else values
            raise InputError(f"{option_string or self.metavar} {shown[:60]}: {error}") from None


def _parser(recipe: str, cls: type, fields: Iterable[_Field]) -> _Parser:
    about, _, examples = (inspect.getdoc(cls) or "").partition("\n\nExamples:\n")
    width = min(shutil.get_terminal_size().columns - 2, 98)
    about = "\n\n".join(textwrap.fill(text, width) for text in about.split("\n\n"))
    fields = list(fields)
    given = [f"{PROGRAM} {recipe}", *(f.title for f in fields if f.mark == POSITIONAL)]
    parser = _Parser(
        prog=f"{PROGRAM} {recipe}",
        usage=" ".join([*given, "[OPTIONS]"]),
        description=about,
        epilog=f"examples:\n{examples.replace(_EXAMPLES, PROGRAM)}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    titles = {ModelOptions: "model", AdapterOptions: "adapter", OptimizerOptions: "optimizer"}
    titles |= {RunOptions: "run", DeviceOptions: "device", cls: recipe}
    rank = {name: number for number, name in enumerate(_COMMON)}
    groups: dict[str, Any] = {}
    for field in sorted(fields, key=lambda f: rank.get(f.name, len(rank))):
        title = "common" if field.name in rank else titles.get(field.group, recipe)
        group = groups.setdefault(title, parser.add_argument_group(f"{title} options"))
        _add(group, field)
    return parser


def _add(group: Any, field: _Field) -> None:
    if field.required:
        more = "required"
    elif field.many:
        more = f"default: {' '.join(map(shlex.quote, field.default)) or 'none'}"
    else:
        unset = field.default is None or field.default is False
        more = "" if unset else f"default: {field.default}"
    text = f"{field.help} ({more})" if more else field.help
    settings: dict[str, Any] = {"dest": field.name, "help": text.replace("%", "%%")}
    if field.kind is bool:
        group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **settings)
    else:
        settings |= {"nargs": "*"} if field.many else {}
        settings |= {"action": _Read, "field": field, "metavar": field.metavar}
        if field.mark == POSITIONAL:
            del settings["dest"]
            group.add_argument(field.name, nargs="?", **settings)
        else:
            group.add_argument(flag(field.name), **settings)
