"""A mesh of devices, and the rules by which weights, vectors and batches are divided over it.

A mesh has three axes. ``data`` divides the rows of a batch; ``fsdp`` divides them too, and each
weight, which is gathered before its use; ``tensor`` divides heads, hidden units and the vocabulary,
and so the products with them. What of it divides which axis of an array is a table, `RULES`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hyperadapt_jax import models, paths
from hyperadapt_jax.models.layers import UNSHARDED, ActivationSharding

from ..errors import InputError
from . import processes

AXES = ("data", "fsdp", "tensor")

# By what an axis of an array stands for, the mesh axes that divide it; "batch" are rows, the others
# the words of `models.logical_axes`.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "qkv": ("tensor",),
    "mlp": ("tensor",),
    "gate_up": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "head_dim": (),
    "norm": (),
    "positions": (),
    "types": (),
    "pooled": (),
    "labels": (),
}

DEFAULT = "HYPERADAPT_MESH"  # in the environment: the mesh where no other is asked for

# What others call the axis that divides a row's tokens.
_CONTEXT = {"context", "cp", "sequence", "seq", "sp"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Several devices, and what lies where on them.

    Attributes:
      mesh: the devices, with the axes `AXES`.
      rules: as `RULES`.
    """

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(RULES))

    @property
    def activations(self) -> ActivationSharding:
        """How a model's activations are spread."""
        mesh = Mesh(self.mesh.devices, AXES, axis_types=(AxisType.Auto,) * 3)
        return ActivationSharding(mesh, self.rules["batch"], self.rules["kv_heads"])

    def specs(self, config: models.Config) -> dict[str, PartitionSpec]:
        """How each parameter is divided, by its path; whole where the mesh does not divide it.

        Raises:
          InputError: an axis of the mesh divides nothing of this model.
        """
        return self._divided(config)[0]

    def loading(self, config: models.Config) -> list[tuple[str, PartitionSpec]]:
        """The same as rules that `hyperadapt_jax.models.load` takes."""
        return [(re.escape(path), spec) for path, spec in self.specs(config).items()]

    def placed(self, config: models.Config, params: Any) -> Any:
        """The shapes of a model's parameters, which carry their shardings."""
        specs = self.specs(config)
        shapes = {
            path: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, specs[path])
            )
            for path, leaf in paths.arrays(params).items()
        }
        return paths.replace(params, shapes)

    def notes(self, config: models.Config) -> list[str]:
        """Lines on the mesh, and on what it does not divide; errors are those of `specs`."""
        return [
            f"mesh: {self}, {self.mesh.size} of {jax.device_count()} devices",
            *(
                f"{name}={self.mesh.shape[name]} does not divide {word} ({count}): each device has"
                " all of them"
                for (name, word), count in self._divided(config)[1].items()
            ),
        ]

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.mesh.shape.items() if size > 1)

    def _divided(
        self, config: models.Config
    ) -> tuple[dict[str, PartitionSpec], dict[tuple[str, str], int]]:
        """The parameters' specs; by mesh axis and word, the numbers that it does not divide."""
        leaves = paths.arrays(models.functional(models.abstract(config))[1])
        specs, units, sizes = {}, _units(config), self.mesh.shape
        divides: set[str] = set(self.rules["batch"])
        undivided: dict[tuple[str, str], int] = {}
        for path, words in models.logical_axes(config).items():
            spec: list[tuple[str, ...]] = []
            used: set[str] = set()  # one axis of a parameter alone is divided by it
            for word, size in zip(words.split(), leaves[path].shape, strict=True):
                count, names = units.get(word, size), []
                for name in self.rules[word]:
                    if count % sizes[name]:
                        undivided[name, word] = units.get(word, size)
                    elif sizes[name] > 1 and name not in used:
                        count //= sizes[name]
                        names.append(name)
                used.update(names)
                spec.append(tuple(names))
            divides |= used
            specs[path] = PartitionSpec(*(names or None for names in spec))
        for name, size in sizes.items():
            if size > 1 and name not in divides:
                missed = [f"{word} {n}" for (axis, word), n in undivided.items() if axis == name]
                which = f": {', '.join(missed)}" if missed else ""
                raise InputError(f"--mesh: {name}={size} divides nothing of this model{which}")
        return specs, undivided


def make_layout(mesh: str | None, rules: Sequence[str] = ()) -> Layout | None:
    """The layout that options ask for; None where all is on one device, as without a mesh.

    Args:
      mesh: as `parse_mesh` takes it; if not given, what the environment variable `DEFAULT` says,
        or else all devices on ``fsdp``.
      rules: as `parse_rules` takes them.

    Raises:
      InputError: a text cannot be read, or there are fewer devices.
    """
    table, source = parse_rules(rules), "--mesh"
    if mesh is None and (mesh := os.environ.get(DEFAULT)):
        source = DEFAULT
    sizes = parse_mesh("fsdp=-1" if mesh is None else mesh, source)
    devices = jax.devices()
    given = math.prod(size for size in sizes.values() if size > 0)
    rest, over = divmod(len(devices), given)
    if not rest or (over and -1 in sizes.values()):
        takes = f"takes {given}" if not rest else f"takes a multiple of {given}"
        raise InputError(f"{source} {mesh}: it {takes} devices, and there are {len(devices)}")
    shape = tuple(rest if sizes.get(name, 1) == -1 else sizes.get(name, 1) for name in AXES)
    if math.prod(shape) == 1:
        return None
    if processes.several() and math.prod(shape) < len(devices):
        raise InputError(
            f"{source} {mesh}: it takes {math.prod(shape)} of the {len(devices)} devices, and each"
            " of several processes has to give all of its own: take all, or start fewer"
        )
    return Layout(make_mesh(shape), table)


def make_mesh(shape: Sequence[int], kind: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of the first devices that there are.

    Args:
      shape: sizes of the axes `AXES`.
      kind: ``Explicit`` makes the shardings a part of the arrays' types. What computes with a model
        has to be inside of `jax.sharding.auto_axes` then.
    """
    some = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(tuple(shape), AXES, axis_types=(kind,) * 3, devices=some)


def parse_mesh(text: str, source: str = "--mesh") -> dict[str, int]:
    """Reads the sizes of a mesh's axes.

    Args:
      text: pairs of axis and size; -1 is the rest, for one axis.
      source: what to call it in an error.

    Raises:
      InputError: says what cannot be read.

    >>> parse_mesh("fsdp=-1,tensor=2")
    {'fsdp': -1, 'tensor': 2}
    """
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        name, equals, size = (part.strip() for part in pair.partition("="))
        if name in _CONTEXT:
            raise InputError(
                f"{source} {text}: no axis divides a row's tokens, since attention here sees whole"
                " rows: lower --max-length, or divide heads with tensor"
            )
        if name not in AXES:
            raise InputError(
                f"{source} {text}: {name!r} is no axis: give some of {', '.join(AXES)}, as"
                " data=2,fsdp=4"
            )
        if name in sizes:
            raise InputError(f"{source} {text}: {name} comes twice")
        if not equals or not re.fullmatch(r"-1|[1-9][0-9]{0,8}", size):
            raise InputError(f"{source} {text}: give {name} a number from 1 on, or -1 for the rest")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise InputError(f"{source} {text}: one axis alone can be the rest, -1")
    return sizes


def parse_rules(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`RULES`, some of them replaced.

    Args:
      texts: ``WORD=AXES``, such as ``vocab=tensor,fsdp``, or ``embed=`` for what stays whole.

    Raises:
      InputError: says what cannot be read.

    >>> parse_rules(["vocab=tensor,fsdp", "embed="])["vocab"]
    ('tensor', 'fsdp')
    """
    rules = dict(RULES)
    for text in texts:
        word, equals, names = (part.strip() for part in text.partition("="))
        if not equals:
            raise InputError(f"--rules {text}: give WORD=AXES, such as vocab=tensor,fsdp")
        if word not in rules:
            raise InputError(
                f"--rules {text}: {word!r} is no axis of an array: give one of {', '.join(rules)}"
            )
        axes = tuple(name.strip() for name in names.split(",")) if names else ()
        if wrong := [name for name in axes if name not in AXES or axes.count(name) > 1]:
            raise InputError(
                f"--rules {text}: {wrong[0]!r} is no axis of a mesh, or comes twice: give some of"
                f" {', '.join(AXES)}"
            )
        rules[word] = axes
    return rules


def activations_of(fn: Callable[..., Any]) -> ActivationSharding:
    """How the activations of a model's function are spread; of any other function, not at all."""
    return getattr(fn, "activations", UNSHARDED)


def put_rows(batch: Mapping[str, Any], activations: ActivationSharding) -> Mapping[str, Any]:
    """A batch on the devices, divided by its rows; as it is where there is no mesh."""
    if activations.mesh is None:
        return batch
    where = NamedSharding(activations.mesh, PartitionSpec(activations.rows))
    return {name: _put(rows, where) for name, rows in batch.items()}


def put_rest(tree: Any, activations: ActivationSharding) -> Any:
    """A tree whose arrays that lie on no mesh yet are whole on each device of this one."""
    if activations.mesh is None:
        return tree
    whole = NamedSharding(activations.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if paths.named_sharding(x) else _put(x, whole), tree)


def _put(array: Any, where: NamedSharding) -> jax.Array:
    """An array that every process has, of which each device gets its slices."""
    return jax.make_array_from_callback(array.shape, where, np.asarray(array).__getitem__)


def _units(config: models.Config) -> dict[str, int]:
    """The numbers of what cannot be cut, for words whose axes hold several numbers of each."""
    heads = config.num_heads
    kv_heads = getattr(config, "num_kv_heads", heads)
    units = {"heads": heads, "kv_heads": kv_heads, "qkv": math.gcd(heads, kv_heads)}
    return units | {"gate_up": config.mlp_dim}
