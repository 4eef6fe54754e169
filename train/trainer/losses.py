"""The losses of the recipes: sums over a batch, and the weights that they are to be divided by."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType

from hyperadapt_jax import models, paths
from hyperadapt_jax.methods import Tuning
from hyperadapt_jax.scales import compute_dtype

from ..data.batches import IGNORE
from .step import Batch, Loss

LOGITS = 2**28  # bytes of logits that a device holds at most, where no chunk is named


def next_token(tuning: Tuning, chunk: int | None = None) -> Loss:
    """Cross-entropy of a decoder's labels, summed over those that are not ignored.

    Args:
      tuning: what trains, and its forward pass.
      chunk: tokens whose logits exist at once, as :func:`token_losses` takes it.

    Returns:
      A loss of batches with ``tokens`` and ``labels`` ``[B, T]``, padded on the right; packed ones
      have ``segment_ids`` and ``positions``.
    """

    def loss(
        trainable: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        found, counts = token_losses(tuning.training(key), chunk)(trainable, frozen, batch)
        return jnp.sum(found, where=counts), jnp.sum(counts, dtype=jnp.float32)

    return loss


def token_losses(
    tuning: Tuning, chunk: int | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """As :func:`next_token`, of each label ``[B, T]``, and which of them count.

    The logits ``[B, T, V]`` of a long vocabulary are many times larger than all else that a step
    holds. So the head is applied to a chunk of tokens after another, and again to each of them in
    the backward pass: nothing of that size exists in either. Chunks run along T, so that a batch
    whose rows lie on several devices stays where it is. (Chunked, or fused, linear cross-entropy:
    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009; Hsu et
    al., "Liger Kernel", arXiv 2410.10989.)

    Args:
      tuning: what trains, and its forward pass: of a model with `Decoder`'s two steps, ``hidden``
        and ``logits``.
      chunk: tokens of a chunk, of all rows together and at least one of each; 0 for the logits of
        all tokens at once. If not given, that of all where they take 256 MiB of a device at most
        (float32, spread over the batch's mesh if it lies on one), else chunks that do.
    """

    def losses(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        # Unpacked, a token sees those before it alone, and no label follows the padding: it needs
        # no mask. But where rotary frequencies depend on the length, padding must not count.
        places = {"positions": jnp.cumsum(batch["mask"], axis=1, dtype=jnp.int32) - 1}
        places |= {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
        counts = batch["labels"] != IGNORE
        labels = jnp.where(counts, batch["labels"], 0)
        here = dataclasses.replace(tuning, frozen=frozen)
        whole = jax.eval_shape(here.adapter, trainable)[1]  # what has a gradient of its own size
        method = functools.partial(_label_losses, chunk=chunk, summed=tuple(whole))
        return tuning.forward(
            trainable, frozen, batch["tokens"], labels, method=method, **places
        ), counts

    return losses


def _label_losses(
    model: models.Decoder,
    tokens: jax.Array,
    labels: jax.Array,
    *,
    chunk: int | None,
    summed: Collection[str],
    **places: jax.Array,
) -> jax.Array:
    """The loss of each label ``[B, T]``; gradients of the parameters at the paths ``summed`` are
    summed over the chunks in float32, whatever their dtype."""
    x = model.hidden(tokens, **places)
    fn, params = models.functional(model)
    batch, length = labels.shape
    if chunk is None:
        mesh = model.activations.mesh or jax.typeof(labels).sharding.mesh
        kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        devices = math.prod(n for n, kind in kinds if kind != AxisType.Manual)
        chunk = max(1, LOGITS * devices // (4 * model.config.vocab_size))
    size = _per_row(chunk or labels.size, batch, length)

    def losses(x: jax.Array, labels: jax.Array) -> jax.Array:
        # One axis of tokens: XLA then computes the gradient of the logits in their place.
        # On a mesh its rows stay where they are: else XLA may gather it, and not the head.
        x = model.activations.tokens(x.reshape(-1, x.shape[-1]))
        logits = fn(params, x, method=lambda model, x: model.logits(x))
        logits = model.activations.tokens(logits)
        return cross_entropy(logits, labels.reshape(-1)).reshape(labels.shape)

    if size == length:
        return losses(x, labels)
    wide = {path: w for path, w in paths.arrays(params).items() if path in summed}
    params = paths.replace(params, {p: w.astype(compute_dtype(w.dtype)) for p, w in wide.items()})

    @functools.partial(jax.checkpoint, prevent_cse=False)  # the loop keeps both passes apart
    def part(start: jax.Array) -> jax.Array:
        return losses(*(lax.dynamic_slice_in_dim(y, start, size, axis=1) for y in (x, labels)))

    # The last chunk begins where it ends with the rows: its first losses are there already.
    count = -(-length // size)
    found = lax.map(part, np.minimum(np.arange(count) * size, length - size))
    found = jnp.moveaxis(found, 0, 1).reshape(batch, count * size)
    last, twice = (count - 1) * size, count * size - length
    return jnp.concatenate([found[:, :last], found[:, last + twice :]], axis=1)


def _per_row(chunk: int, batch: int, length: int) -> int:
    """Tokens of each row that a chunk has, at least one, where all chunks have about as many."""
    most = min(max(1, chunk // batch), length)
    return -(-length // -(-length // most))


@jax.custom_jvp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The losses ``[N]`` of logits ``[N, V]`` for labels ``[N]``; NaN for a label that has none.

    As optax has it, but with a derivative that is one pass over the logits and makes one array of
    their size.

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
    Array([1.3862944], dtype=float32)
    """
    return _cross_entropy(logits, labels)[0]


@cross_entropy.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    logits, labels = primals
    losses, normalizers = _cross_entropy(logits, labels)
    hits = jnp.arange(logits.shape[-1], dtype=labels.dtype) == labels[:, None]
    slopes = jnp.exp(logits - normalizers[:, None]) - hits.astype(logits.dtype)
    return losses, jnp.sum(slopes * tangents[0], axis=-1)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    normalizers = jax.nn.logsumexp(logits, axis=-1)
    chosen = jax.vmap(_chosen)(logits, labels)
    return normalizers - chosen, normalizers


def _chosen(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The label's of the logits ``[V]``; where they are split in Explicit mode, JAX asks where it
    is to lie."""
    return logits.at[label].get(
        mode="fill",
        fill_value=jnp.nan,
        wrap_negative_indices=False,
        out_sharding=jax.typeof(label).sharding,
    )


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
