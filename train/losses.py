"""The losses of the recipes: sums over a batch, and the weights that they are to be divided by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from train.batches import IGNORE
from train.methods import Tuning
from train.step import Batch, Loss


def next_token(tuning: Tuning) -> Loss:
    """Cross-entropy of a decoder's labels, summed over those that are not ignored.

    Args:
      tuning: what trains, and its forward pass.

    Returns:
      A loss of batches with ``tokens`` and ``labels`` ``[B, T]``, padded on the right; packed ones
      have ``segment_ids`` and ``positions``.
    """

    def loss(trainable, frozen, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Unpacked, a token sees those before it alone, and no label follows the padding.
        packed = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
        logits = tuning.forward(trainable, frozen, batch["tokens"], **packed)
        counts = batch["labels"] != IGNORE
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(counts, batch["labels"], 0)
        )
        return jnp.sum(losses, where=counts), jnp.sum(counts, dtype=jnp.float32)

    return loss
