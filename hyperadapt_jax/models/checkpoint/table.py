"""What a model's table says of a checkpoint: for each parameter, what the files call it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp


class CheckpointError(ValueError):
    """A folder does not hold the weights that a model needs; the message says which and where."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a model's table: a tensor of the checkpoint and the parameter that it fills.

    Attributes:
      name: the checkpoint's name, with "{layer}" where the tensor stands once per layer.
      path: the "/"-joined path of the parameter; where the name has "{layer}", the parameter holds
        all layers, stacked on axis 0.
      transpose: the checkpoint stores (out, in) and the parameter (in, out).
      optional: the checkpoint may lack it: the parameter is then newly initialized, and reported.
      aliases: other names of the same tensor, as with and without the prefix "bert."; a checkpoint
        may hold it under several, if all are equal.
      axes: one word for each axis of the parameter, outermost first, or nothing. ``layers`` are
        stacked; ``embed`` is the residual stream; ``heads`` and ``kv_heads`` are all heads' numbers
        together, ``head_dim`` those of one; ``mlp`` are hidden units; ``qkv`` and ``gate_up`` are
        several matrices in one; ``vocab``, ``positions`` and ``types`` are rows of tables; ``norm``
        is what a norm scales; ``pooled`` and ``labels`` belong to a head.

    >>> Tensor("layers.{layer}.up_proj.weight", "layers/up/kernel", transpose=True).names(3)
    ('layers.3.up_proj.weight',)
    """

    name: str
    path: str
    transpose: bool = False
    optional: bool = False
    aliases: tuple[str, ...] = ()
    axes: str = ""

    @property
    def stacked(self) -> bool:
        """Whether the parameter gathers one tensor of each layer."""
        return "{layer}" in self.name

    def names(self, layer: int) -> tuple[str, ...]:
        """All names that the tensor of a layer may have, the usual one first."""
        return tuple(name.replace("{layer}", str(layer)) for name in (self.name, *self.aliases))


class Rows:
    """A table in the making, of tensors whose names begin with one of several prefixes.

    Args:
      prefixes: the usual one first.

    >>> rows = Rows("bert.", "")
    >>> rows.linear("pooler.dense", "pooler", "embed pooled", bias=False)
    >>> rows.table[0].names(0), rows.table[0].path
    (('bert.pooler.dense.weight', 'pooler.dense.weight'), 'pooler/kernel')
    """

    def __init__(self, *prefixes: str):
        self.prefixes = prefixes
        self.table: list[Tensor] = []

    def add(
        self, names: str | Sequence[str], path: str, axes: str, *also: str, **options: bool
    ) -> None:
        """Adds a tensor: its names with every prefix, those in ``also`` as they are."""
        names = (names,) if isinstance(names, str) else names
        name, *aliases = (prefix + each for each in names for prefix in self.prefixes)
        self.table.append(Tensor(name, path, aliases=(*aliases, *also), axes=axes, **options))

    def linear(
        self, name: str, path: str, axes: str, *, bias: bool = True, **options: bool
    ) -> None:
        """Adds a projection: ``axes`` are those of its kernel, the last one that of its bias."""
        self.add(f"{name}.weight", f"{path}/kernel", axes, transpose=True, **options)
        if bias:
            *stack, _, outputs = axes.split()
            self.add(f"{name}.bias", f"{path}/bias", " ".join([*stack, outputs]), **options)

    def layer_norm(self, name: str, path: str, axes: str) -> None:
        """Adds a norm with a bias: checkpoints of TensorFlow's age say gamma and beta."""
        self.add((f"{name}.weight", f"{name}.gamma"), f"{path}/scale", axes)
        self.add((f"{name}.bias", f"{name}.beta"), f"{path}/bias", axes)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a load did.

    Attributes:
      loaded: paths of the parameters that the checkpoint filled.
      initialized: paths of those that it lacked, which have new values.
      ignored: names in the checkpoint that are rightly no parameter.
    """

    loaded: tuple[str, ...]
    initialized: tuple[str, ...]
    ignored: tuple[str, ...]


def check_table(tensors: Sequence[Tensor], leaves: Mapping[str, Any]) -> None:
    """Every parameter has one row of the table, and every row a parameter that it can fill."""
    paths = [tensor.path for tensor in tensors]
    if twice := duplicates(paths):
        raise ValueError(f"the table of tensors fills {first_few(twice)} more than once")
    if twice := duplicates(tensor.name for tensor in tensors):
        raise ValueError(f"the table of tensors has {first_few(twice)} in two rows")
    if unfilled := sorted(set(leaves) - set(paths)):
        raise ValueError(f"the table of tensors lacks the parameters {first_few(unfilled)}")
    if unknown := sorted(set(paths) - set(leaves)):
        raise ValueError(f"the table of tensors fills {first_few(unknown)}, which the model lacks")
    for tensor in tensors:
        leaf = leaves[tensor.path]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{tensor.path} has dtype {leaf.dtype}: weights are floating-point")
        if any(("{layer}" in alias) != tensor.stacked for alias in tensor.aliases):
            raise ValueError(f"an alias of {tensor.name!r} disagrees with it about '{{layer}}'")
        rank = len(leaf.shape) - tensor.stacked
        if rank < 0 or (tensor.transpose and rank != 2):
            how = " and ".join(["stacked"] * tensor.stacked + ["transposed"] * tensor.transpose)
            raise ValueError(f"{tensor.path} {tuple(leaf.shape)} cannot be {how}")
        axes = tensor.axes.split()
        if axes and (len(axes) != len(leaf.shape) or ("layers" == axes[0]) != tensor.stacked):
            raise ValueError(f"{tensor.path} {tuple(leaf.shape)} has no axes {tensor.axes!r}")


def shape_in_file(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that the checkpoint gives a parameter of this shape, or one layer of it."""
    shape = tuple(shape)[tensor.stacked :]
    return shape[::-1] if tensor.transpose else shape


def layers_of(tensor: Tensor, shape: Sequence[int]) -> range:
    return range(shape[0] if tensor.stacked else 1)


def duplicates(names: Iterable[str]) -> list[str]:
    return [name for name, count in collections.Counter(names).items() if count > 1]


def first_few(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
