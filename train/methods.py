"""The methods that ``--method`` names: what trains, and the forward pass that it trains through.

A method makes a :class:`Tuning` of a frozen model. The step, the loop and the checkpoints know
nothing else of it, so another method is another entry of ``METHODS``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import hyperadapt_jax as ha
from hyperadapt_jax import models

from .base import Base
from .errors import InputError
from .options import AdapterOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
    """A model as the trainer sees it.

    Attributes:
      forward: ``forward(trainable, frozen, *args, **kwargs)``, the model's outputs.
      trainable: what trains, float32: ``{"scales": ..., "full": ...}``.
      frozen: the rest.
      plan: the scaled weights; None where none is.
      axes: roles of the axes of each targeted weight, by path, whether or not it is scaled.
    """

    forward: Callable[..., Any]
    trainable: dict[str, Any]
    frozen: Any
    plan: ha.Plan | None
    axes: Mapping[str, str]

    @property
    def count(self) -> int:
        """How many numbers train."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trainable))


@dataclasses.dataclass(frozen=True)
class Method:
    """Which sides of the targets are scaled, if any, and whether all else trains fully."""

    sides: str | None = "both"
    everything: bool = False


METHODS: dict[str, Method] = {
    "hyperadapt": Method("both"),
    "row": Method("row"),
    "col": Method("col"),
    "full": Method(None, everything=True),
    "head": Method(None),
}


def tune(base: Base, options: AdapterOptions) -> Tuning:
    """Sets a method up on a model, on shapes alone or on arrays.

    Args:
      base: the model; where it was only described, nothing is allocated.
      options: which method and which weights.

    Raises:
      InputError: a target that matches nothing or cannot be meant; nothing would train.
    """
    method = METHODS[options.method]
    full = _full(base, options, method)
    try:
        targets = _targets(base.config, options.targets)
        exclude = list(options.exclude) or None
        both = ha.plan(base.params, *targets, exclude=exclude)
        plan = method.sides and ha.plan(base.params, *targets, exclude=exclude, sides=method.sides)

        def split(params):
            return ha.optim.split(params, ha.init(plan) if plan else {}, full=full)

        shapes_alone = isinstance(jax.tree.leaves(base.params)[0], jax.ShapeDtypeStruct)
        trainable, frozen = (
            jax.eval_shape(split, base.params) if shapes_alone else split(base.params)
        )
    except ValueError as error:
        raise InputError(f"--targets {' '.join(options.targets)}: {error}") from error
    if not jax.tree.leaves(trainable):
        raise InputError(
            f"--method {options.method} trains nothing here: the model has no head apart;"
            " choose another method, or name parameters with --full"
        )
    axes = {weight.path: weight.axes for weight in both.weights}
    return Tuning(_forward(base.fn, bool(plan)), trainable, frozen, plan or None, axes)


def table(base: Base, tuning: Tuning) -> str:
    """What trains, as text: the plan of the vectors, the full parameters, numbers and bytes."""
    leaves = jax.tree.leaves(base.params)
    total = sum(leaf.size for leaf in leaves)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    lines = [str(tuning.plan)] if tuning.plan else []
    full = tuning.trainable["full"]
    if full:
        numbers = sum(leaf.size for leaf in full.values())
        some = ", ".join(list(full)[:4]) + (f" and {len(full) - 4} more" if len(full) > 4 else "")
        lines.append(f"{numbers:,} numbers train fully: {some}")
    return "\n".join(
        [
            *lines,
            f"{tuning.count:,} numbers train of {total:,}: {12 * tuning.count / 1e6:,.2f} MB with"
            f" Adam's state, beside {held / 1e6:,.1f} MB of frozen weights",
        ]
    )


def _targets(config: models.Config, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Presets and ``PATTERN=ROLES`` texts as pairs for `hyperadapt_jax.plan`."""
    pairs: list[tuple[str, str]] = []
    for text in texts:
        pattern, equals, roles = text.rpartition("=")
        pairs += [(pattern, roles)] if equals else models.targets(config, text)
    return pairs


def _full(base: Base, options: AdapterOptions, method: Method) -> str | None:
    """The pattern of the parameters that train fully.

    A classifier's head, and what the checkpoint lacks, trains whatever else is named: left as it
    was drawn, it would make every answer a random one. A decoder's head was trained with it.
    """
    if method.everything:
        return ".*"
    if options.full is not None:
        try:
            re.compile(options.full)
        except re.error as error:
            raise InputError(f"--full {options.full!r} is no pattern: {error}") from error
    patterns = [re.escape(path) for path in base.fresh]
    if options.full is not None:
        patterns.append(f"(?:{options.full})")
    if getattr(base.config, "labels", None) is not None:
        patterns.append("classifier/.*")
    elif options.method == "head" and not getattr(base.config, "tied", True):
        patterns.append("head/.*")
    return "|".join(patterns) or None


def _forward(fn: Callable[..., Any], scaled: bool) -> Callable[..., Any]:
    adapted = ha.adapt(fn) if scaled else None

    def forward(trainable, frozen, *args, **kwargs):
        params, scales = ha.optim.combine(trainable, frozen)
        if adapted is None:
            return fn(params, *args, **kwargs)
        return adapted(params, scales, *args, **kwargs)

    return forward
