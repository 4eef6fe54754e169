"""The losses of the recipes: sums over a batch, and the weights that they are to be divided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hyperadapt_jax.methods import Tuning

from ..data.batches import IGNORE
from .step import Batch, Loss


def next_token(tuning: Tuning) -> Loss:
    """Cross-entropy of a decoder's labels, summed over those that are not ignored.

    Args:
      tuning: what trains, and its forward pass.

    Returns:
      A loss of batches with ``tokens`` and ``labels`` ``[B, T]``, padded on the right; packed ones
      have ``segment_ids`` and ``positions``.
    """

    def loss(
        trainable: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        found, counts = token_losses(tuning.training(key))(trainable, frozen, batch)
        return jnp.sum(found, where=counts), jnp.sum(counts, dtype=jnp.float32)

    return loss


def token_losses(tuning: Tuning) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """As :func:`next_token`, of each label ``[B, T]``, and which of them count."""

    def losses(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        # Unpacked, a token sees those before it alone, and no label follows the padding: it needs
        # no mask. But where rotary frequencies depend on the length, padding must not count.
        places = {"positions": jnp.cumsum(batch["mask"], axis=1, dtype=jnp.int32) - 1}
        places |= {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
        logits = tuning.forward(trainable, frozen, batch["tokens"], **places)
        counts = batch["labels"] != IGNORE
        found = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(counts, batch["labels"], 0)
        )
        return found, counts

    return losses


def logits(
    tuning: Tuning, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None = None
) -> jax.Array:
    """An encoder's outputs for a batch, ``[B, labels]``; with dropout where there is a key."""
    types = {"token_types": batch["token_types"]} if "token_types" in batch else {}
    return tuning.forward(
        trainable, frozen, batch["tokens"], mask=batch["mask"], rng=key, **types
    ).logits


def classification(tuning: Tuning, *, dropout: bool) -> Loss:
    """Cross-entropy of an encoder's classes, or the squared error of its one number.

    Args:
      tuning: what trains, and its forward pass.
      dropout: train with the model's own dropout.

    Returns:
      A loss of batches with ``tokens`` and ``mask`` ``[B, T]``, ``label`` and ``weight`` ``[B]``.
    """

    def loss(
        trainable: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        own = tuning.training(jax.random.fold_in(key, 1))
        outputs = logits(own, trainable, frozen, batch, key if dropout else None)
        if outputs.shape[-1] == 1:
            losses = jnp.square(outputs[:, 0] - batch["label"])
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
        return jnp.sum(losses * batch["weight"]), jnp.sum(batch["weight"])

    return loss
