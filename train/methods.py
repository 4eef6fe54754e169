"""From options to what trains: the method that ``--method`` names, set up on a base model."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.methods import METHODS, Tuning

from .base import Base
from .errors import InputError
from .options import AdapterOptions


def tune(base: Base, options: AdapterOptions) -> Tuning:
    """Sets a method up on a model, on shapes alone or on arrays.

    A classifier's head, and what the checkpoint lacks, trains whatever else is named: left as it
    was drawn, it would make every answer a random one. A decoder's head was trained with it.

    Args:
      base: the model; where it was only described, nothing is allocated.
      options: which method and which weights.

    Raises:
      InputError: a target that matches nothing or cannot be meant; nothing would train.
    """
    classifies = getattr(base.config, "num_labels", None) is not None
    untied = "head/.*" if not getattr(base.config, "tie_embeddings", True) else None
    head = "classifier/.*" if classifies else untied
    full = [re.escape(path) for path in base.missing]
    if options.full is not None:
        try:
            re.compile(options.full)
        except re.error as error:
            raise InputError(f"--full {options.full!r} is no pattern: {error}") from error
        full.append(f"(?:{options.full})")
    if classifies:
        full.append("classifier/.*")
    try:
        targets = _targets(base.config, options.targets)
        plan = ha.plan(base.params, *targets, exclude=list(options.exclude) or None)
        pattern = "|".join(full) or None
        method = METHODS[options.method]
        tuning = ha.methods.tune(method, base.fn, base.params, plan, full=pattern, head=head)
    except ValueError as error:
        raise InputError(f"--targets {' '.join(options.targets)}: {error}") from error
    if not jax.tree.leaves(tuning.trainable):
        raise InputError(
            f"--method {options.method} trains nothing here: the model has no such parameters;"
            " choose another method, or name parameters with --full"
        )
    return tuning


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
        lines.append(f"{numbers:,} parameters train fully: {some}")
    return "\n".join(
        [
            *lines,
            f"{tuning.count:,} trainable parameters of {total:,}: {12 * tuning.count / 1e6:,.2f} MB"
            f" with Adam's state, next to {held / 1e6:,.1f} MB of frozen weights",
        ]
    )


def _targets(config: models.Config, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Presets and ``PATTERN=ROLES`` texts as pairs for `hyperadapt_jax.plan`."""
    pairs: list[tuple[str, str]] = []
    for text in texts:
        pattern, equals, roles = text.rpartition("=")
        pairs += [(pattern, roles)] if equals else models.targets(config, text)
    return pairs
