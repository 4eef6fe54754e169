"""The training step: one pure, jitted function of state, frozen model and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from hyperadapt_jax.methods import Tuning
from hyperadapt_jax.models.layers import UNSHARDED, ActivationSharding

from ..parallel.mesh import activations_of, put_rest

Batch = Mapping[str, jax.Array]

# loss(trainable, frozen, batch, key) -> (sum of the losses, sum of their weights), two scalars.
Loss = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, jax.Array]]


class State(NamedTuple):
    """All that a step changes; a checkpoint holds it, and the place in the data.

    Attributes:
      step: how many steps are done, int32.
      trainable: what trains, float32.
      optimizer: the optimizer's state.
      key: data of the random key, uint32; each step draws from it folded with its number.
      nonfinite_steps: how many steps in a row were not finite, int32.
    """

    step: jax.Array
    trainable: Any
    optimizer: Any
    key: jax.Array
    nonfinite_steps: jax.Array


def start(tuning: Tuning, optimizer: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step; it owns its arrays, so that a step can reuse them.

    On a mesh, the optimizer's moments lie as what they are of; what has no place yet is whole on
    each device.
    """
    where = activations_of(tuning.fn)
    trainable = put_rest(jax.tree.map(jnp.array, tuning.trainable), where)
    key = jax.random.key_data(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    state = State(zero, trainable, optimizer.init(trainable), key, jnp.copy(zero))
    return put_rest(state, where)


def describe(tuning: Tuning, optimizer: optax.GradientTransformation) -> State:
    """The shapes of what :func:`start` gives, with their shardings; nothing is allocated.

    Args:
      tuning: what trains, set up on shapes.
      optimizer: of the trainable tree.
    """
    mesh = activations_of(tuning.fn).mesh
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def like(leaf: Any, sharding: Any = None) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or whole)

    trainable = jax.tree.map(lambda leaf: like(leaf, leaf.sharding), tuning.trainable)
    known = dict(jax.tree_util.tree_leaves_with_path(trainable))

    def moment(keys: Any, leaf: Any) -> Any:
        # The optimizer's trees hold, below keys of their own, what the trainable tree does.
        of = next((known[keys[i:]] for i in range(len(keys)) if keys[i:] in known), None)
        return like(leaf, of.sharding if of is not None and of.shape == leaf.shape else None)

    moments = jax.eval_shape(optimizer.init, trainable)
    moments = jax.tree_util.tree_map_with_path(moment, moments)
    key = like(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))))
    number = like(jax.ShapeDtypeStruct((), jnp.int32))
    return State(number, trainable, moments, key, number)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rates: Mapping[str, optax.Schedule],
    *,
    accumulate: int = 1,
    activations: ActivationSharding = UNSHARDED,
    state: State | None = None,
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
      activations: how rows are spread over a mesh; each part is.
      state: the state or its shapes, whose shardings a step keeps, on a mesh.

    Returns:
      The step. Its metrics: ``loss`` (mean), ``grad_norm`` (before clipping), the
      learning rates, and ``nonfinite_steps``, how many steps in a row were not finite.
    """

    def part(
        trainable: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, batch, key
        )
        return total, weight, grads

    def update(grads: Any, trainable: Any, moments: Any) -> tuple[Any, Any]:
        updates, moments = optimizer.update(grads, moments, trainable)
        return optax.apply_updates(trainable, updates), moments

    kept: dict[str, Any] = {}
    if activations.mesh is not None:
        whole = NamedSharding(activations.mesh, PartitionSpec())
        kept = {"out_shardings": (jax.tree.map(lambda x: x.sharding, state), whole)}

    @functools.partial(jax.jit, donate_argnums=0, **kept)
    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if accumulate == 1:
            total, weight, grads = part(state.trainable, frozen, batch, key)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), dict(batch))

            def add(carry: Any, piece: Any) -> tuple[Any, None]:
                keyed, batch = piece
                batch = jax.tree.map(activations.stream, batch)
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
        nonfinite_steps = jnp.where(finite, 0, state.nonfinite_steps + 1)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            **{k: jnp.asarray(rate(state.step), jnp.float32) for k, rate in rates.items()},
            "nonfinite_steps": nonfinite_steps,
        }
        return State(state.step + 1, trainable, moments, state.key, nonfinite_steps), metrics

    return step
