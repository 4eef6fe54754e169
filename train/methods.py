"""From options to what trains: the method that ``--method`` names, set up on a base model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.methods import METHODS, Method, Tuning

from .base import Base
from .errors import InputError
from .options import AdapterOptions, flag
from .parallel.mesh import activations_of

_DRAWN = 1  # folded into the run's key: what a method draws is not what the steps draw


def method_of(options: AdapterOptions) -> Method:
    """The method that the options name, with those of them that are its own.

    Raises:
      InputError: an option that the method does not have, or a value that it cannot take.
    """
    method = METHODS[options.method]
    known = {field.name for field in dataclasses.fields(method)}
    given = {}
    for name, field in _OPTIONS.items():
        value = getattr(options, name)
        if value == _DEFAULTS[name]:
            continue
        if field not in known:
            having = [n for n, m in METHODS.items() if hasattr(m, field)]
            raise InputError(
                f"{flag(name)} {value}: --method {options.method} has no such option; it is for"
                f" {', '.join(having)}"
            )
        given[field] = value
    try:
        return dataclasses.replace(method, **given)
    except ValueError as error:
        raise InputError(f"--method {options.method}: {error}") from error


# The options that are a method's own, and the names of its fields.
_OPTIONS = {"rank": "rank", "alpha": "alpha", "rslora": "rslora", "lora_dropout": "dropout"}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(AdapterOptions)}


def tune(base: Base, options: AdapterOptions, seed: int = 0) -> Tuning:
    """Sets a method up on a model, on shapes alone or on arrays.

    A classifier's head, and what the checkpoint lacks, trains whatever else is named: left as it
    was drawn, it would make every answer a random one. A decoder's head was trained with it.

    Args:
      base: the model; where it was only described, nothing is allocated.
      options: which method and which weights.
      seed: of initial values that a method draws.

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
    method = method_of(options)
    try:
        targets = _targets(base.config, options.targets or [method.targets])
        # What divides the batch divides no vector; see hyperadapt_jax.sharding.
        whole = activations_of(base.fn).rows
        exclude = list(options.exclude) or None
        plan = ha.plan(base.params, *targets, exclude=exclude, replicate=whole)
        pattern = "|".join(full) or None
        key = jax.random.fold_in(jax.random.key(seed), _DRAWN)
        tuning = ha.methods.tune(
            method, base.fn, base.params, plan, full=pattern, head=head, key=key
        )
    except ValueError as error:
        named = f"--targets {' '.join(options.targets)}" if options.targets else "--targets"
        raise InputError(f"{named}: {error}") from error
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
