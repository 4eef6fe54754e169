"""The step: its gradient against a closed form, splits of a batch, padding, what it compiles."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.methods import METHODS, Tuning
from tests.train import tiny
from train import base, methods
from train.data.batches import Batches
from train.options import AdapterOptions, OptimizerOptions
from train.trainer import losses
from train.trainer.optimizer import learning_rates, make_optimizer, schedule
from train.trainer.step import make_step, start

OPTIONS = OptimizerOptions(lr=0.1, schedule="constant", warmup=0, clip=None)


def tuning(
    method: str = "hyperadapt", dtype: str = "float32", *, biases: bool = False, **options
) -> Tuning:
    config = models.config_from_dict(tiny.CONFIG | {"attention_bias": biases})
    fn, params = models.functional(models.create(config, dtype=dtype, seed=1))
    # Vectors are zero at first: what is not symmetric shows faults that they would hide.
    tuned = methods.tune(
        base.Base("random", config, fn, params, (), None), AdapterOptions(method=method, **options)
    )
    keys = iter(jax.random.split(jax.random.key(0), 99))
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), tuned.trainable
    )
    return dataclasses.replace(tuned, trainable=moved)


def one_step(tuned, batch, *, accumulate=1, options=OPTIONS, optimizer=None):
    optimizer = optimizer or optax.apply_if_finite(optax.sgd(1.0), 2**31 - 1)
    rates = {"lr": schedule(options, options.lr, 10)}
    step = make_step(tiny.token_loss(tuned), optimizer, rates, accumulate=accumulate)
    state, metrics = step(start(tuned, optimizer, 0), tuned.frozen, batch)
    return state, {name: float(value) for name, value in metrics.items()}


def batch_of(examples, batch_size, **options):
    return Batches(examples, batch_size, shuffle=False, **options)[0]


def close(one, other, tolerance=2e-6):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=2e-5)


def test_the_update_is_the_mean_gradient_of_the_merged_model():
    """Against gradients of a loss that multiplies the weights out, and its own mean."""
    tuned = tuning()
    batch = batch_of(tiny.examples(6), 6, lengths=[16])
    fn = models.functional(models.create(models.config_from_dict(tiny.CONFIG)))[0]

    def merged_loss(trainable):
        params, scales = ha.trainable.combine(trainable, tuned.frozen)
        logits = fn(ha.merge(params, scales), batch["tokens"], mask=batch["mask"])
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["labels"].clip(0)[..., None], axis=-1
        )[..., 0]
        counts = batch["labels"] != -100
        return -(chosen * counts).sum() / counts.sum()

    loss, grads = jax.jit(jax.value_and_grad(merged_loss))(tuned.trainable)
    state, metrics = one_step(tuned, batch)
    close(state.trainable, jax.tree.map(lambda p, g: p - g, tuned.trainable, grads))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_a_batch_split_differently_gives_the_same_gradient(accumulate):
    """Rows differ in their numbers of labels, and one part holds rows without any."""
    tuned, batch = tuning(), batch_of(tiny.examples(6), 6, lengths=[16])
    batch["labels"][-2:] = -100
    whole, metrics = one_step(tuned, batch)
    split, in_parts = one_step(tuned, batch, accumulate=accumulate)
    close(whole.trainable, split.trainable)
    assert metrics == pytest.approx(in_parts, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_64_bit_types_change_no_step(accumulate):
    tuned, batch = tuning(), batch_of(tiny.examples(4), 4, lengths=[16])
    optimizer = make_optimizer(OPTIONS, tuned, 10)
    plain, metrics = one_step(tuned, batch, accumulate=accumulate, optimizer=optimizer)
    with jax.enable_x64(True):
        wide, again = one_step(tuned, batch, accumulate=accumulate, optimizer=optimizer)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide.trainable)} == {"float32"}
    close(plain.trainable, wide.trainable)
    assert metrics == pytest.approx(again, rel=1e-5)


def test_padding_does_not_stretch_the_rotary_positions():
    """Where frequencies depend on the length, it is that of the longest example, not its row."""
    raw = tiny.CONFIG | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    config = models.config_from_dict(raw | {"max_position_embeddings": 8})
    fn, params = models.functional(models.create(config, seed=1))
    params = jax.tree.map(lambda x: 3 * x, params)
    tuned = methods.tune(base.Base("random", config, fn, params, (), None), AdapterOptions())
    loss = jax.jit(losses.next_token(tuned))
    examples = tiny.examples(3)
    longest = max(len(example["tokens"]) for example in examples)
    tight, wide = (
        loss(tuned.trainable, tuned.frozen, batch_of(examples, 3, lengths=[length]), None)
        for length in (longest, 48)
    )
    close(tight, wide)


def test_padding_and_filling_change_nothing():
    """Longer rows, and rows of weight 0 that fill a batch up, leave the gradient as it is."""
    tuned, examples = tuning(), tiny.examples(5)
    tight, metrics = one_step(tuned, batch_of(examples, 5, lengths=[13]))
    wide, padded = one_step(tuned, batch_of(examples, 8, lengths=[32]))
    close(tight.trainable, wide.trainable)
    assert metrics == pytest.approx(padded, rel=1e-5)


def test_a_batch_without_labels_moves_nothing():
    tuned, batch = tuning(), batch_of(tiny.examples(2), 2, lengths=[16])
    batch["labels"][:] = -100
    state, metrics = one_step(tuned, batch)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["nonfinite_steps"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.trainable, tuned.trainable)


def test_what_is_not_finite_changes_nothing_and_is_counted():
    """Neither what trains nor the optimizer's moments; then a good step counts from zero."""
    tuned, batch = tuning(), batch_of(tiny.examples(4), 4, lengths=[16])
    broken = {**tuned.frozen, "embed": {"embedding": tuned.frozen["embed"]["embedding"] * jnp.nan}}
    optimizer = make_optimizer(OPTIONS, tuned, 10)
    step = make_step(tiny.token_loss(tuned), optimizer, {"lr": schedule(OPTIONS, 0.1, 10)})
    state = start(tuned, optimizer, 0)
    for count in (1, 2):
        state, metrics = step(state, broken, batch)
        assert (int(metrics["nonfinite_steps"]), int(state.step)) == (count, count)
        assert np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state.trainable, tuned.trainable)
    state, metrics = step(state, tuned.frozen, batch)
    assert int(metrics["nonfinite_steps"]) == 0
    fresh, _ = step(start(tuned, optimizer, 0), tuned.frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, state.trainable, fresh.trainable)


def test_each_length_compiles_once():
    """Later steps of a length, other batches and the last, filled one, find the program made."""
    tuned, traced = tuning(), []

    def loss(trainable, frozen, batch, key):
        traced.append(batch["tokens"].shape)
        return tiny.token_loss(tuned)(trainable, frozen, batch, key)

    optimizer = make_optimizer(OPTIONS, tuned, 10)
    step = make_step(loss, optimizer, {"lr": schedule(OPTIONS, 0.1, 10)})
    state = start(tuned, optimizer, 0)
    batches = Batches(tiny.examples(30), 8, lengths=[8, 16], epochs=3)
    lengths = set()
    for i in range(len(batches)):
        batch = batches[i]
        lengths.add(batch["tokens"].shape[1])
        state, _ = step(state, tuned.frozen, batch)
    assert lengths == {8, 16}
    assert len(traced) == 2


def test_the_base_has_no_gradient_and_the_optimizer_no_state_of_it():
    tuned = tuning(dtype="bfloat16")
    state = start(tuned, make_optimizer(OptimizerOptions(), tuned, 10), 0)
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert held < 3 * tuned.count + 30
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}


def test_bfloat16_moves_the_vectors_by_less_than_its_own_spacing():
    """Around one, bfloat16 numbers are 0.0078 apart; a step of 1e-4 must not be lost."""
    tuned, batch = tuning(dtype="bfloat16"), batch_of(tiny.examples(6), 6, lengths=[16])
    options = OptimizerOptions(lr=1e-4, warmup=0, schedule="constant")
    state, _ = one_step(tuned, batch, optimizer=make_optimizer(options, tuned, 10), options=options)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), state.trainable, tuned.trainable)
    assert all(0 < step < 2e-4 for step in jax.tree.leaves(moved))


def test_row_col_and_head_have_rates_of_their_own():
    """Adam's first step is as long as its learning rate: each part moves by its own."""
    tuned, batch = tuning(full="norm/scale"), batch_of(tiny.examples(6), 6, lengths=[16])
    options = OptimizerOptions(row_lr=1e-3, col_lr=3e-3, head_lr=0.0, warmup=0, clip=None)
    state, _ = one_step(tuned, batch, optimizer=make_optimizer(options, tuned, 10), options=options)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.trainable, tuned.trainable)
    for vectors in moved["scales"].values():
        assert (vectors.row, vectors.col) == pytest.approx((1e-3, 3e-3), rel=1e-2)
    assert moved["full"] == {"norm/scale": 0.0}


def test_clipping_takes_the_norm_of_all_together():
    tuned, batch = tuning(), batch_of(tiny.examples(6), 6, lengths=[16])
    norm = one_step(tuned, batch)[1]["grad_norm"]
    clipped = optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(norm / 10), optax.sgd(1.0)), 10
    )
    state, metrics = one_step(tuned, batch, optimizer=clipped)
    step = jax.tree.map(jnp.subtract, state.trainable, tuned.trainable)
    assert float(optax.tree.norm(step)) == pytest.approx(norm / 10, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0, 0.5, 1, 0.8536, 0.5, 0.1464, 0]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("warmup", [2, 2 / 6])
def test_schedules(kind, expected, warmup):
    rate = schedule(OptimizerOptions(schedule=kind, warmup=warmup), 1.0, 6)
    np.testing.assert_allclose([float(rate(i)) for i in range(7)], expected, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_schedule_of_hardly_any_steps(steps):
    rate = schedule(OptimizerOptions(warmup=100), 1.0, steps)
    assert all(0 <= float(rate(i)) <= 1 for i in range(steps + 2))


def test_muon_takes_the_stacked_matrices_alone():
    """Its update of a slice is orthogonal; what is no matrix, as a norm's scale, goes to Adam."""
    tuned, batch = tuning("full"), batch_of(tiny.examples(6), 6, lengths=[16])
    options = OptimizerOptions(optimizer="muon", lr=1.0, warmup=0, clip=None)
    with pytest.raises(ValueError, match="muon needs the model's matrices"):
        make_optimizer(options, tuned, 10)
    matrices = models.matrices(models.config_from_dict(tiny.CONFIG))
    optimizer = make_optimizer(options, tuned, 10, matrices)
    state, _ = one_step(tuned, batch, optimizer=optimizer, options=options)
    step = jax.tree.map(jnp.subtract, state.trainable["full"], tuned.trainable["full"])
    values = np.linalg.svd(step["layers/gate/kernel"], compute_uv=False)
    assert values.shape == (2, 16)
    assert 0.7 < np.median(values) < 1.4  # five steps of Newton and Schulz come as near as that
    assert values.max() < 1.5
    adam = np.abs(step["norm/scale"])  # all entries alike, whatever their gradients
    np.testing.assert_allclose(adam, adam.max(), rtol=1e-3)
    with_embeddings = make_optimizer(
        dataclasses.replace(options, muon_embeddings=True), tuned, 10, matrices
    )
    also, _ = one_step(tuned, batch, optimizer=with_embeddings, options=options)
    same = {  # up to a last bit: they are two programs
        p: np.allclose(also.trainable["full"][p], x, rtol=1e-5, atol=1e-6)
        for p, x in state.trainable["full"].items()
    }
    assert {p for p, equal in same.items() if not equal} == {
        p for p in matrices if "/" in p and not p.startswith("layers")
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(method):
    tuned, batch = tuning(method, biases=True), batch_of(tiny.examples(6), 6, lengths=[16])
    state, metrics = one_step(tuned, batch)
    moved = [
        float(jnp.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (state.trainable, tuned.trainable)), strict=True)
    ]
    assert metrics["nonfinite_steps"] == 0
    assert max(moved) > 0


def test_the_learning_rates_that_are_in_use():
    """Those with a peak of their own by name, of what trains alone; all follow the schedule."""
    options = OptimizerOptions(lr=0.1, row_lr=0.2, head_lr=0.3, schedule="linear", warmup=0)
    for method, names in [("hyperadapt", {"lr", "lr/row"}), ("row", {"lr/row"}), ("col", {"lr"}),
                          ("head", {"lr/head"})]:  # fmt: skip
        tuned = tuning(method, full="norm/scale") if method == "head" else tuning(method)
        rates = learning_rates(options, tuned, 4)
        assert rates.keys() == names
        peaks = {"lr": 0.1, "lr/row": 0.2, "lr/head": 0.3}
        for name, rate in rates.items():
            assert [float(rate(i)) for i in (0, 2, 4)] == pytest.approx(
                [peaks[name], peaks[name] / 2, 0]
            )


@pytest.mark.usefixtures("optimized")
def test_a_full_step_needs_room_for_the_gradient_alone():
    """And a part of the updates, beside the state that it reuses, by XLA's own account."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=4)
    config = models.config_from_dict(tiny.CONFIG | sizes | heads)
    fn, params = models.functional(models.abstract(config, remat="full"))
    tuned = methods.tune(
        base.Base("wide", config, fn, params, (), None), AdapterOptions(method="full")
    )
    options = OptimizerOptions(lr=1e-3)
    chain = make_optimizer(options, tuned, 10)
    step = make_step(tiny.token_loss(tuned), chain, learning_rates(options, tuned, 10))
    batch = batch_of(tiny.examples(2), 2, lengths=[16])
    state = jax.eval_shape(
        lambda trainable: start(dataclasses.replace(tuned, trainable=trainable), chain, 0),
        tuned.trainable,
    )
    memory = step.lower(state, tuned.frozen, batch).compile().memory_analysis()
    model = 4 * tuned.count
    assert memory.alias_size_in_bytes == pytest.approx(3 * model, rel=0.01)
    assert memory.temp_size_in_bytes < 1.7 * model
