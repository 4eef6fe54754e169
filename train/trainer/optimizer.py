"""The optimizer of what trains: schedules, and one optimizer for each label."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hyperadapt_jax.methods import Tuning

from ..options import OptimizerOptions


def schedule(options: OptimizerOptions, peak: float, steps: int) -> optax.Schedule:
    """The learning rate over a run: linear warm-up from zero, then as ``options.schedule`` says.

    Args:
      options: kind of schedule and warm-up.
      peak: the highest learning rate.
      steps: optimizer steps of the whole run.

    >>> rate = schedule(OptimizerOptions(warmup=0.5, schedule="linear"), 1.0, 8)
    >>> [float(rate(step)) for step in range(9)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warm = round(options.warmup * steps if options.warmup < 1 else options.warmup)
    warm = min(warm, steps)
    rest = max(steps - warm, 1)
    after = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[options.schedule]()
    if not warm:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), after], [warm])


def make_optimizer(
    options: OptimizerOptions,
    tuning: Tuning,
    steps: int,
    matrices: Mapping[str, str] | None = None,
) -> optax.GradientTransformation:
    """Clipping, then one optimizer for each of row, col and what trains fully.

    Args:
      options: which optimizer, and its numbers.
      tuning: what trains.
      steps: optimizer steps of the whole run.
      matrices: for Muon, the model's matrices, as `hyperadapt_jax.models.matrices` gives them.

    Raises:
      ValueError: Muon is asked for, and the matrices are not given.
    """
    if matrices is None:
        if options.optimizer == "muon":
            raise ValueError("muon needs the model's matrices: give models.matrices(config)")
        matrices = {}

    def one(rate: float | None) -> optax.GradientTransformation:
        rate = schedule(options, options.lr if rate is None else rate, steps)
        moments = {"b1": options.b1, "b2": options.b2}
        if options.optimizer == "adamw":
            return optax.adamw(rate, weight_decay=options.weight_decay, **moments)
        return optax.contrib.muon(
            rate,
            weight_decay=options.weight_decay,
            adam_b1=options.b1,
            adam_b2=options.b2,
            adam_weight_decay=options.weight_decay,
            muon_weight_dimension_numbers=dimensions,
        )

    dimensions = functools.partial(
        _dimensions, matrices=matrices, embeddings=options.muon_embeddings
    )
    own = _own(options)
    optimizers = {label: one(own.get(label)) for label in set(jax.tree.leaves(tuning.labels))}
    parts = [optax.partition(optimizers, tuning.labels)]
    if options.clip is not None:
        parts.insert(0, _clip(options.clip))
    return optax.chain(*parts)


def learning_rates(
    options: OptimizerOptions, tuning: Tuning, steps: int
) -> dict[str, optax.Schedule]:
    """The learning rates that are in use: ``lr``, and those that have a value of their own.

    Args:
      options: their peaks, and their schedule.
      tuning: what trains.
      steps: optimizer steps of the whole run.
    """
    own, found = _own(options), {}
    for label in sorted(set(jax.tree.leaves(tuning.labels))):
        if (rate := own.get(label)) is None:
            found["lr"] = schedule(options, options.lr, steps)
        else:
            name = "lr/head" if label == "full" else f"lr/{label}"
            found[name] = schedule(options, rate, steps)
    return found


def _clip(norm: float) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, by one factor: its choice for each number needs a copy."""

    def clip(grads: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, norm / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(clip)


def _own(options: OptimizerOptions) -> dict[str, float | None]:
    """The learning rates of labels that can have one of their own; None for the common one."""
    return {"row": options.row_lr, "col": options.col_lr, "full": options.head_lr}


def _dimensions(params: Any, *, matrices: Mapping[str, str], embeddings: bool) -> Any:
    """The axes of the parameters that are matrices for Muon; the others are left to Adam.

    Those are the stacked matrices of the layers and, if asked for, the embedding and the head.
    """

    def numbers(path: str) -> optax.contrib.MuonDimensionNumbers | None:
        roles = matrices.get(path, "").split()
        if "stack" not in roles and not embeddings:
            return None
        sides = {s: tuple(i for i, r in enumerate(roles) if r == s) for s in ("in", "out")}
        if not all(sides.values()):
            return None
        return optax.contrib.MuonDimensionNumbers(sides["in"], sides["out"])

    marked = jax.tree.map(lambda _: None, params)
    return {**marked, "full": {path: numbers(path) for path in params["full"]}}
