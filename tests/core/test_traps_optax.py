"""Known traps of training part of a tree, each shown with plain optax, and absent here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax.trainable import combine, labels, split

WEIGHT = (6, 4)


@pytest.fixture
def tree():
    kernel = jnp.linspace(-1.0, 1.0, 24).reshape(WEIGHT)
    params = {"kernel": kernel, "bias": jnp.ones(4)}
    return {"params": params, "scales": ha.init(ha.plan(params, ha.Target("kernel", "in out")))}


def loss(params, scales):
    vectors, x = scales["kernel"], jnp.linspace(0.0, 1.0, 18).reshape(3, 6)
    y = (x * (1 + vectors.col)) @ params["kernel"] * (1 + vectors.row) + params["bias"]
    return jnp.mean((y - 1) ** 2)


def of_one_tree(tree):
    return loss(tree["params"], tree["scales"])


def step(optimizer, tree):
    """The tree after one step, and the optimizer's state."""
    state = optimizer.init(tree)
    updates, state = optimizer.update(jax.grad(of_one_tree)(tree), state, tree)
    return optax.apply_updates(tree, updates), state


def state_size(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def shapes(tree):
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def test_trap_masked_passes_raw_gradients_to_frozen_weights(tree):
    frozen = jax.tree.map(lambda label: label == "frozen", labels(tree))
    trains = jax.tree.map(lambda freezes: not freezes, frozen)
    trapped, _ = step(optax.masked(optax.adam(1e-2), trains), tree)
    raw = jax.grad(of_one_tree)(tree)["params"]["kernel"]
    np.testing.assert_allclose(
        trapped["params"]["kernel"] - tree["params"]["kernel"], raw, atol=1e-6
    )
    assert np.any(raw)

    ours, _ = step(optax.selective_transform(optax.adam(1e-2), freeze_mask=frozen), tree)
    for name, before in tree["params"].items():
        np.testing.assert_array_equal(ours["params"][name], before)
    assert np.any(ours["scales"]["kernel"].row) and np.any(ours["scales"]["kernel"].col)


def test_trap_masked_set_to_zero_allocates_state_for_frozen_weights(tree):
    frozen = jax.tree.map(lambda label: label == "frozen", labels(tree))
    chained = optax.chain(optax.adam(1e-2), optax.masked(optax.set_to_zero(), frozen))
    after, state = step(chained, tree)
    np.testing.assert_array_equal(after["params"]["kernel"], tree["params"]["kernel"])
    assert shapes(state).count(WEIGHT) == 2

    vectors = ha.count(tree["scales"])
    _, state = step(optax.selective_transform(optax.adam(1e-2), freeze_mask=frozen), tree)
    assert state_size(state) == 2 * vectors + 1
    trainable, _ = split(tree["params"], tree["scales"])
    assert state_size(optax.adam(1e-2).init(trainable)) == 2 * vectors + 1


def test_trap_stop_gradient_still_returns_a_gradient_of_full_size(tree):
    def stopped(tree):
        return loss(jax.lax.stop_gradient(tree["params"]), tree["scales"])

    grads = jax.jit(jax.grad(stopped))(tree)
    assert shapes(grads).count(WEIGHT) == 1 and not np.any(grads["params"]["kernel"])

    trainable, frozen = split(tree["params"], tree["scales"])
    ours = jax.jit(jax.grad(lambda t, f: loss(*combine(t, f))))
    assert shapes(ours(trainable, frozen)) == shapes(tree["scales"])
    text = ours.lower(trainable, frozen).as_text()
    results = text[text.index("func.func public @main") :].split("->", 1)[1].split("{\n", 1)[0]
    assert "6x4" not in results and "tensor<6xf32>" in results
    np.testing.assert_array_equal(
        ours(trainable, frozen)["scales"]["kernel"].row, grads["scales"]["kernel"].row
    )
