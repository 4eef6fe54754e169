"""The training step: one pure, jitted function of state, frozen model and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperadapt_jax.methods import Tuning

from ..options import OptimizerOptions

Batch = Mapping[str, jax.Array]

# loss(trainable, frozen, batch, key) -> (sum of the losses, sum of their weights), two scalars.
Loss = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, jax.Array]]


class State(NamedTuple):
    """All that a step changes, and all of a run that a checkpoint holds beside the data's place.

    Attributes:
      step: how many steps are done, int32.
      trainable: what trains, float32.
      optimizer: the optimizer's state.
      key: data of the random key, uint32; each step draws from it folded with its number.
      bad: how many steps in a row were not finite, int32.
    """

    step: jax.Array
    trainable: Any
    optimizer: Any
    key: jax.Array
    bad: jax.Array


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
    options: OptimizerOptions, tuning: Tuning, steps: int
) -> optax.GradientTransformation:
    """Clipping, then one optimizer for each of row, col and what trains fully.

    Args:
      options: which optimizer, and its numbers.
      tuning: what trains.
      steps: optimizer steps of the whole run.
    """

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
            muon_weight_dimension_numbers=functools.partial(_matrices, axes=tuning.axes),
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
        if own.get(label) is None:
            found["lr"] = schedule(options, options.lr, steps)
        else:
            name = "lr/head" if label == "full" else f"lr/{label}"
            found[name] = schedule(options, own[label], steps)
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


def start(tuning: Tuning, optimizer: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step; it owns its arrays, so that a step can reuse them."""
    trainable = jax.tree.map(jnp.array, tuning.trainable)
    key = jax.random.key_data(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    return State(zero, trainable, optimizer.init(trainable), key, jnp.copy(zero))


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rates: Mapping[str, optax.Schedule],
    *,
    accumulate: int = 1,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """Makes the jitted step ``(state, frozen, batch) -> (state, metrics)``; the state is donated.

    The gradient is that of the sum of all losses over the sum of all weights, so it does not depend
    on how the batch is split, nor on padding. Only the trainable tree has a gradient. One that is
    not finite changes nothing, neither what trains nor the optimizer's moments.

    Args:
      loss: the sum of the losses and the sum of their weights, of a batch or a part of one.
      optimizer: of the trainable tree.
      rates: learning rates by step, to be reported under their names.
      accumulate: equal parts of the batch, computed one after the other. It divides the rows.

    Returns:
      The step. Its metrics: ``loss`` (mean), ``grad_norm`` (before clipping), the
      learning rates, and ``bad``, how many steps in a row were not finite.
    """

    def part(trainable, frozen, batch, key):
        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, batch, key
        )
        return total, weight, grads

    def update(grads, trainable, moments):
        updates, moments = optimizer.update(grads, moments, trainable)
        return optax.apply_updates(trainable, updates), moments

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Any, batch: Batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if accumulate == 1:
            total, weight, grads = part(state.trainable, frozen, batch, key)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), dict(batch))

            def add(carry, piece):
                keyed, batch = piece
                more = part(state.trainable, frozen, batch, keyed)
                return jax.tree.map(jnp.add, carry, more), None

            zero = jnp.zeros((), jnp.float32)  # whatever the default dtype is
            zeros = (zero, zero, jax.tree.map(jnp.zeros_like, state.trainable))
            keys = jax.random.split(key, accumulate)
            (total, weight, grads), _ = jax.lax.scan(add, zeros, (keys, parts))
        mean = jnp.where(weight > 0, 1 / jnp.maximum(weight, 1e-30), 0.0)
        value = total * mean
        # A loss that overflows can have a gradient that does not: neither may count then.
        mean = jnp.where(jnp.isfinite(value), mean, jnp.nan)
        grads = jax.tree.map(lambda g: g * mean, grads)
        finite = jnp.all(jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]))
        # The updates stay inside: outside, XLA would hold them together with the gradient.
        trainable, moments = jax.lax.cond(
            finite, update, lambda _, *old: old, grads, state.trainable, state.optimizer
        )
        bad = jnp.where(finite, 0, state.bad + 1)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            **{k: jnp.asarray(rate(state.step), jnp.float32) for k, rate in rates.items()},
            "bad": bad,
        }
        return State(state.step + 1, trainable, moments, state.key, bad), metrics

    return step


def _matrices(params: Any, *, axes: Mapping[str, str]) -> Any:
    """The axes of the parameters that are matrices for Muon; the others are left to Adam."""

    def numbers(path: str) -> optax.contrib.MuonDimensionNumbers | None:
        roles = axes.get(path, "").split()
        sides = {s: tuple(i for i, r in enumerate(roles) if r == s) for s in ("in", "out")}
        if not all(sides.values()):
            return None
        return optax.contrib.MuonDimensionNumbers(sides["in"], sides["out"])

    marked = jax.tree.map(lambda _: None, params)
    return {**marked, "full": {path: numbers(path) for path in params["full"]}}
