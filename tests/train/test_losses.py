"""The loss by chunks: against whole logits, on shards, and the memory of its compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.interpreter import jax_versions
from hyperadapt_jax.methods import METHODS
from tests.train import tiny
from train import base, methods
from train.data.batches import IGNORE
from train.options import AdapterOptions
from train.trainer import losses

B, T, V, D = 3, 13, 96, 16
HEADS = {True: ("embed/embedding", "out in"), False: ("head/kernel", "in out")}


def moved(tuned, size=0.1):
    """What trains is zero at first: what is not symmetric shows faults that zeros would hide."""
    keys = iter(jax.random.split(jax.random.key(0), 99))
    trainable = jax.tree.map(
        lambda x: x + size * jax.random.normal(next(keys), x.shape), tuned.trainable
    )
    return dataclasses.replace(tuned, trainable=trainable)


def tuning(tied, **options):
    raw = tiny.CONFIG | {"vocab_size": V, "tie_word_embeddings": tied}
    config = models.config_from_dict(raw)
    fn, params = models.functional(models.create(config, seed=1))
    params = jax.tree.map(lambda x: 3 * x, params)
    of = base.Base("random", config, fn, params, (), None)
    return moved(methods.tune(of, AdapterOptions(**options)))


def batch_of(batch=B, length=T):
    """Rows of two examples each, of whose labels some are ignored, and one row of none."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, (batch, length))
    labels[:, :3] = labels[-1] = IGNORE
    second = np.arange(length) >= 5
    row = {
        "mask": np.ones(length, bool),
        "segment_ids": 1 + second,
        "positions": np.arange(length) - 5 * second,
    }
    rows = {name: np.broadcast_to(value, (batch, length)) for name, value in row.items()}
    return {"tokens": rng.integers(0, V, (batch, length)), "labels": labels, **rows}


def by_whole_logits(tuned):
    def loss(trainable, frozen, batch, key):
        places = {name: batch[name] for name in ("segment_ids", "positions")}
        logits = tuned.forward(trainable, frozen, batch["tokens"], **places)
        counts = batch["labels"] != IGNORE
        labels = jnp.where(counts, batch["labels"], 0)
        found = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(found, where=counts), jnp.sum(counts, dtype=jnp.float32)

    return loss


def gradient(tuned, loss, batch):
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step(tuned.trainable, tuned.frozen, batch, jax.random.key(0))


def close(one, other, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def shapes(jaxpr):
    """The shapes of all that a jaxpr and those inside it compute."""
    for eqn in jax_versions.open_jaxpr(jaxpr)[0].eqns:
        yield from (out.aval.shape for out in eqn.outvars)
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(param, "eqns"):
                yield from shapes(param)


def most_logits(tuned, chunk):
    """The most logits that one array of a training step holds."""
    step = jax.value_and_grad(losses.next_token(tuned, chunk), has_aux=True)
    jaxpr = jax.make_jaxpr(step)(tuned.trainable, tuned.frozen, batch_of(), jax.random.key(0))
    found = {shape for shape in shapes(jaxpr) if shape[-1:] == (V,)} - {(D, V)}  # of the head
    return max(np.prod(shape) // V for shape in found)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, dict(targets=("all-linear",))),
        (True, dict(targets=("all-linear", "=".join(HEADS[True])))),
        (False, dict(method="lora", targets=("all-linear", "=".join(HEADS[False])))),
        (True, dict(targets=("all-linear",), full=HEADS[True][0])),
        (False, dict(method="full")),
    ],
    ids=["frozen", "tied, adapted", "low-rank", "tied, trained", "trained"],
)
def test_chunks_change_neither_the_loss_nor_its_gradient(tied, options):
    tuned, batch = tuning(tied, **options), batch_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ha.MaterializedWarning)
        found = gradient(tuned, losses.next_token(tuned, 12), batch)
        assert most_logits(tuned, 12) == 12
    close(found, gradient(tuned, by_whole_logits(tuned), batch), 1e-6)


@pytest.mark.parametrize(
    ("chunk", "at_once"), [(0, B * T), (None, B * T), (10**9, B * T), (1, B), (26, 7 * B)]
)
def test_how_many_tokens_a_chunk_has(chunk, at_once):
    """At least one of each row, and chunks of about one size."""
    tuned, batch = tuning(False), batch_of()
    assert most_logits(tuned, chunk) == at_once
    found, counts = jax.jit(losses.token_losses(tuned, chunk))(tuned.trainable, tuned.frozen, batch)
    want, weight = jax.jit(by_whole_logits(tuned))(tuned.trainable, tuned.frozen, batch, None)
    assert found.shape == (B, T) and counts.sum() == weight
    close(found[counts].sum(), want)


def test_a_label_outside_the_vocabulary_has_no_loss():
    found = losses.cross_entropy(jnp.zeros((4, V)), jnp.array([-1, 0, V - 1, V]))
    np.testing.assert_allclose(found, [np.nan, np.log(V), np.log(V), np.nan], rtol=1e-6)


class HeadAlone(models.Decoder):
    """A decoder whose "tokens" are hidden states already."""

    def hidden(self, tokens, **places):
        return tokens


def head_alone(tied, method, trains=None, *, size=(V, D), dtype="float32", abstract=False):
    """A method on the head alone; ``trains`` is what trains fully."""
    raw = tiny.CONFIG | dict(zip(("vocab_size", "hidden_size"), size, strict=True))
    config = models.config_from_dict(raw | {"tie_word_embeddings": tied})
    make = lambda: HeadAlone(config, dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    fn, params = models.functional(nnx.eval_shape(make) if abstract else make())
    path, roles = HEADS[tied]
    plan, key = ha.plan(params, (path, roles)), jax.random.key(0)
    return ha.methods.tune(METHODS[method], fn, params, plan, full=trains, head=path, key=key)


def step_of(tuned, chunk):
    """``(trainable, hidden states, frozen, batch)`` to the loss and both gradients."""

    def loss(trainable, x, frozen, batch):
        batch = {**batch, "tokens": x, "mask": jnp.ones(batch["labels"].shape, bool)}
        return losses.next_token(tuned, chunk)(trainable, frozen, batch, jax.random.key(0))[0]

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_heads_gradient_is_summed_in_float32(tied):
    """Summed in bfloat16, those of 512 tokens would lose most of what the last ones add."""
    tuned = head_alone(tied, "head", HEADS[tied][0], dtype="bfloat16")
    rng = np.random.default_rng(0)
    labels = jnp.asarray(np.full((1, 512), 3))
    x = jnp.asarray(1 + 0.1 * rng.standard_normal((1, 512, D)), jnp.bfloat16)
    args = tuned.trainable, x, tuned.frozen, {"labels": labels}
    (_, (one, _)), (_, (other, _)) = step_of(tuned, 1)(*args), step_of(tuned, 0)(*args)
    close(one, other, 2**-7)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("tied", "method", "trains"),
    [(False, "hyperadapt", None), (True, "head", HEADS[True][0])],
    ids=["adapted", "tied, trained"],
)
def test_on_shards_of_batch_and_vocabulary(kind, tied, method, trains, monkeypatch):
    """Neither is gathered: what is summed is no larger than a chunk's hidden states, or vectors.

    Each device may hold the logits of 4 tokens, so that a chunk has 32 of all rows.
    """
    monkeypatch.setattr(losses, "LOGITS", 4 * 4 * V)
    tuned = moved(head_alone(tied, method, trains))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 12, D)).astype(np.float32)
    labels = rng.integers(0, V, (8, 12))
    labels[:, :3] = IGNORE
    whole = step_of(tuned, 0)(tuned.trainable, x, tuned.frozen, {"labels": labels})

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))
    of_head = P("tensor", None) if tied else P(None, "tensor")

    def place(tree):
        spec = lambda w: of_head if sorted(w.shape) == [D, V] else P()  # noqa: E731
        return jax.tree.map(lambda w: jax.device_put(w, NamedSharding(mesh, spec(w))), tree)

    rows = NamedSharding(mesh, P("data"))
    args = place(tuned.trainable), jax.device_put(x, rows), place(tuned.frozen)
    with jax.set_mesh(mesh):
        program = step_of(tuned, None).lower(*args, {"labels": jax.device_put(labels, rows)})
        program = program.compile()
        found = program(*args, {"labels": jax.device_put(labels, rows)})
    close(found, whole, 1e-6)
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    sizes = {}
    for result, name in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program.as_text()):
        for dims in re.findall(r"\w+\[([\d,]*)\]", result):
            size = math.prod(int(n) for n in dims.split(",") if n)
            sizes[name] = max(size, sizes.get(name, 0))
    # A trained head's gradient is summed too, each shard over the devices of the batch.
    assert sizes.pop("all-reduce") == D * (V // 4 if trains else 32 // 2)
    assert all(size <= V for size in sizes.values()), sizes  # vectors, in Explicit mode


LONG = dict(size=(128_256, 512), abstract=True)


@pytest.mark.parametrize(
    ("tied", "method", "trains"),
    [
        (False, "bitfit", "norm/scale"),
        (True, "bitfit", "norm/scale"),
        (False, "lora", None),
        (False, "head", HEADS[False][0]),
        (True, "head", HEADS[True][0]),
    ],
    ids=["frozen", "tied, frozen", "low-rank", "trained", "tied, trained"],
)
def test_memory_of_a_long_vocabulary(optimized, tied, method, trains):
    """Beside what it is given, and a trained head's own gradient, the loss and its gradient take
    what the hidden states do, whose gradient it returns, and two chunks of logits."""
    tuned = head_alone(tied, method, trains, **LONG)
    hidden = jax.ShapeDtypeStruct((8, 2048, 512), jnp.float32)
    labels = jax.ShapeDtypeStruct((8, 2048), jnp.int32)
    step = step_of(tuned, 512)
    compiled = step.lower(tuned.trainable, hidden, tuned.frozen, {"labels": labels}).compile()
    found = compiled.memory_analysis()
    held = found.temp_size_in_bytes + found.output_size_in_bytes
    own = 4 * tuned.count
    assert held - own <= 1.3 * 4 * hidden.size + 2 * 4 * 512 * 128_256
    # The default makes chunks too: whole logits would be 8.4 GB.
    step = step_of(tuned, None)
    traced = step.trace(tuned.trainable, hidden, tuned.frozen, {"labels": labels})
    most = max(np.prod(shape) for shape in shapes(traced.jaxpr) if 128_256 in shape)
    assert 4 * most <= max(losses.LOGITS, 4 * 512 * 128_256)
