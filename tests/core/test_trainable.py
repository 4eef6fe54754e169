"""What trains: split and combine, labels, masks, on the trees that users have."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hyperadapt_jax as ha
from hyperadapt_jax import paths
from hyperadapt_jax.trainable import combine, labels, split

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


class LinenModel(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5, param_dtype=self.dtype, dtype=self.dtype, name="body")(x))
        return nn.Dense(2, param_dtype=self.dtype, dtype=self.dtype, name="head")(x)


class NnxModel(nnx.Module):
    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.body = nnx.Linear(3, 5, param_dtype=dtype, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(5, 2, param_dtype=dtype, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


class EqxModel(eqx.Module):
    body: eqx.nn.Linear
    activation: callable
    temperature: float
    head: eqx.nn.Linear

    def __init__(self, dtype):
        one, two = jax.random.split(jax.random.key(0))
        self.body = eqx.nn.Linear(3, 5, use_bias=False, dtype=dtype, key=one)
        self.activation = jax.nn.relu
        self.temperature = 1.0
        self.head = eqx.nn.Linear(5, 2, dtype=dtype, key=two)

    def __call__(self, x):
        return jax.vmap(self.head)(self.activation(jax.vmap(self.body)(x))) / self.temperature


def linen(dtype):
    model = LinenModel(dtype)
    return model.apply, model.init(jax.random.key(0), X), "params/body/kernel", "in out"


def from_nnx(dtype):
    graph, state = nnx.split(NnxModel(dtype))
    return lambda s, x: nnx.merge(graph, s)(x), state, "body/kernel", "in out"


def equinox(dtype):
    return lambda model, x: model(x), EqxModel(dtype), "body/weight", "out in"


def case(build, dtype):
    """A model's function, its parameters, and scale vectors for its body that are not zero."""
    apply, params, weight, axes = build(dtype)
    scales = ha.init(ha.plan(params, ha.Target(weight, axes)))
    return apply, params, jax.tree.map(lambda v: v + 0.25, scales)


CASES = [
    pytest.param(build, dtype, id=f"{build.__name__}-{jnp.dtype(dtype).name}")
    for build in (linen, from_nnx, equinox)
    for dtype in (jnp.float32, jnp.bfloat16)
]
HEAD = r"(.*/)?head/.*"


def assert_same_tree(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if paths.is_array(y):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        else:
            assert x is y


@pytest.mark.parametrize("build, dtype", CASES)
def test_combine_undoes_split(build, dtype):
    apply, params, scales = case(build, dtype)
    trainable, frozen = split(params, scales, full=HEAD)
    assert len(trainable["full"]) == 2
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype(jnp.float32)}
    assert not any("head" in path for path in paths.flatten(frozen)[0])
    again, same = combine(trainable, frozen)
    assert_same_tree((again, same), (params, scales))
    np.testing.assert_array_equal(apply(again, X.astype(dtype)), apply(params, X.astype(dtype)))


@pytest.mark.parametrize("build, dtype", CASES)
def test_only_the_trainable_tree_has_gradients(build, dtype):
    apply, params, scales = case(build, dtype)
    trainable, frozen = split(params, scales, full=HEAD)

    def loss(trainable, frozen):
        params, scales = combine(trainable, frozen)
        size = sum(jnp.sum(v**2) for v in jax.tree.leaves(scales))
        return jnp.sum(apply(params, X.astype(dtype)).astype(jnp.float32) ** 2) + size

    grads = eqx.filter_jit(jax.grad(loss))(trainable, frozen)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    sizes = {p: leaf.shape for p, leaf in paths.arrays(params).items()}
    head = {p: shape for p, shape in sizes.items() if "head" in p}
    assert {p: g.shape for p, g in grads["full"].items()} == head


def test_split_without_full_leaves_the_parameters_as_they_are():
    _, params, scales = case(linen, jnp.float32)
    trainable, frozen = split(params, scales)
    assert trainable == {"scales": scales, "full": {}}
    assert_same_tree(frozen, params)


def test_the_trainable_tree_can_be_donated():
    # A frozen tree that still held the head would hold a buffer that the step has given away.
    apply, params, scales = case(linen, jnp.float32)
    trainable, frozen = split(params, scales, full=HEAD)

    def step(trainable, frozen):
        params, _ = combine(trainable, frozen)
        return jax.tree.map(lambda v: v + jnp.mean(apply(params, X)), trainable)

    step = jax.jit(step, donate_argnums=0)
    for _ in range(2):
        trainable = step(trainable, frozen)
    assert np.isfinite(trainable["full"]["params/head/bias"]).all()


@pytest.mark.parametrize(
    "full, message",
    [
        ("params/haed/.*", r"'params/haed/\.\*' matches none of the 5 arrays; nearest: .*head"),
        (["head/kernel", "head/scale"], "'head/scale' matches none.*nearest: .*params/head"),
        ("params/body/kernel", "params/body/kernel: is scaled, so it cannot also train fully"),
        ("step", "step: has dtype int32, which has no gradient"),
        ("(", "no regular expression"),
        ([], "empty pattern"),
    ],
)
def test_split_refuses(full, message):
    _, params, scales = case(linen, jnp.float32)
    params = {**params, "step": jnp.int32(3)}
    for select in (
        lambda: split(params, scales, full),
        lambda: labels({"params": params, "scales": scales}, full),
    ):
        with pytest.raises(ValueError, match=message):
            select()


def test_split_refuses_a_tied_parameter():
    table = jnp.ones((4, 3))
    with pytest.raises(ha.PlanError, match="out/kernel: is tied to embed"):
        split({"embed": table, "out": {"kernel": table}}, {}, full="out/kernel")


def test_combine_refuses_trees_that_do_not_belong_together():
    _, params, scales = case(linen, jnp.float32)
    trainable, frozen = split(params, scales, full=HEAD)
    less = {**trainable, "full": {"params/head/bias": trainable["full"]["params/head/bias"]}}
    with pytest.raises(ValueError, match="params/head/kernel: is missing from the trainable tree"):
        combine(less, frozen)
    with pytest.raises(ValueError, match="params/head/bias: has no place in the frozen tree"):
        combine(trainable, params)


def test_labels_refuses_a_tree_of_another_kind():
    with pytest.raises(ValueError, match="has a key 'body'"):
        labels({"body": jnp.ones(3), "scales": {}})


@pytest.mark.parametrize("build, dtype", CASES)
def test_labels_give_each_group_a_learning_rate_of_its_own(build, dtype):
    _, params, scales = case(build, dtype)
    trainable, _ = split(params, scales, full=HEAD)
    rates = {"row": 0.5, "col": 0.25, "full": 0.125}
    marks = labels(trainable)
    assert jax.tree.structure(marks) == jax.tree.structure(trainable)
    optimizer = optax.partition({name: optax.sgd(rate) for name, rate in rates.items()}, marks)
    ones = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = optimizer.update(ones, optimizer.init(trainable), trainable)
    (vectors,) = updates["scales"].values()
    assert np.all(vectors.row == -0.5) and np.all(vectors.col == -0.25)
    assert all(np.all(update == -0.125) for update in updates["full"].values())


def test_labels_of_one_sided_vectors():
    params = {"w": jnp.ones((3, 5))}
    scales = ha.init(ha.plan(params, ha.Target("w", "- out")))
    assert labels({"scales": scales, "full": {}})["scales"]["w"].col is None
    assert jax.tree.leaves(labels({"params": params, "scales": scales})) == ["frozen", "row"]


@pytest.mark.parametrize("build, dtype", CASES)
def test_labels_make_a_mask_that_updates_nothing_frozen_and_keeps_no_state_for_it(build, dtype):
    _, params, scales = case(build, dtype)
    tree = {"params": params, "scales": scales}
    frozen = jax.tree.map(lambda label: label == "frozen", labels(tree, full=HEAD))
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    optimizer = optax.selective_transform(adamw, freeze_mask=frozen)
    # As from eqx.filter_grad: an array for each array, None for everything else.
    arrays = eqx.filter(tree, eqx.is_array)
    grads = jax.tree.map(jnp.ones_like, arrays)
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(tree), arrays)
    trained = 0
    for path, update in paths.arrays(updates).items():
        if path.startswith("scales") or "head" in path:
            trained += update.size
            assert np.all(update != 0), path
        else:
            assert not np.any(update), path
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * trained + 1  # mu, nu, count
    new = eqx.apply_updates(tree, updates)
    old_body, new_body = (
        {p: leaf for p, leaf in paths.arrays(t["params"]).items() if "head" not in p}
        for t in (tree, new)
    )
    assert_same_tree(new_body, old_body)


def test_one_tree_and_the_split_train_alike():
    _, params, scales = case(linen, jnp.float32)
    tree = {"params": params, "scales": scales}
    trainable, frozen = split(params, scales, full=HEAD)
    groups = {"row": optax.adam(1e-2), "col": optax.adam(1e-3), "full": optax.adamw(1e-4)}
    whole = optax.partition({**groups, "frozen": optax.set_to_zero()}, labels(tree, full=HEAD))
    alone = optax.partition(groups, labels(trainable))
    whole_state, alone_state = whole.init(tree), alone.init(trainable)
    assert len(jax.tree.leaves(whole_state)) == len(jax.tree.leaves(alone_state))
    for step in range(3):
        grads = jax.tree.map(lambda v, step=step: jnp.cos(v + step), tree)
        own, _ = split(grads["params"], grads["scales"], full=HEAD)
        update, whole_state = whole.update(grads, whole_state, tree)
        tree = optax.apply_updates(tree, update)
        update, alone_state = alone.update(own, alone_state, trainable)
        trainable = optax.apply_updates(trainable, update)
    params, scales = combine(trainable, frozen)
    for one, two in zip(
        jax.tree.leaves(tree), jax.tree.leaves({"params": params, "scales": scales}), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def recover(store, read, weight_decay=0.0, steps=200):
    """200 Adam steps of 1e-3 toward known scales of a bfloat16 weight: the loss and the vectors."""
    keys = jax.random.split(jax.random.key(0), 4)
    kernel = jax.random.normal(keys[0], (16, 16), jnp.bfloat16)
    x = jax.random.normal(keys[1], (64, 16), jnp.bfloat16)
    col, row = (1 + 0.05 * jax.random.normal(key, 16) for key in keys[2:])

    def forward(col, row):
        return (x * col).astype(jnp.float32) @ kernel.astype(jnp.float32) * row

    optimizer = optax.adamw(1e-3, weight_decay=weight_decay)

    def loss(vectors):
        return jnp.mean((forward(*map(read, vectors)) - forward(col, row)) ** 2)

    def step(carry, _):
        vectors, state = carry
        value, grads = jax.value_and_grad(loss)(vectors)
        updates, state = optimizer.update(grads, state, vectors)
        return (optax.apply_updates(vectors, updates), state), value

    start = (store, store)
    (vectors, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(
        (start, optimizer.init(start))
    )
    return losses, vectors


def test_small_steps_on_a_bf16_base_are_not_lost():
    ha_scales = ha.init(ha.plan({"w": jnp.ones((16, 16), jnp.bfloat16)}, ("w", "in out")))
    losses, vectors = recover(ha_scales["w"].col, lambda delta: 1 + delta)
    assert losses[-1] < 1e-3 * losses[0]
    # The trap: the bfloat16 nearest to one is 2**-8 away, and a step of 1e-3 rounds back to one.
    stuck, same = recover(jnp.ones(16, jnp.bfloat16), lambda scale: scale)
    assert np.all(np.asarray(same) == 1)
    assert stuck[-1] == stuck[0] > 0.5 * losses[0]


def test_weight_decay_pulls_toward_the_identity():
    start = jnp.full(16, 0.5)
    scales = {"w": ha.ScaleVectors(start, -start, "in out")}
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, scales)
    state = optimizer.init(scales)
    for _ in range(3):
        updates, state = optimizer.update(zeros, state, scales)
        scales = optax.apply_updates(scales, updates)
    # Scales of 1.5 and 0.5 both come nearer to one: by the same factor, (1 - rate * decay) a step.
    np.testing.assert_allclose(1 + scales["w"].row, 1 + 0.5 * 0.999**3, rtol=1e-6)
    np.testing.assert_allclose(1 + scales["w"].col, 1 - 0.5 * 0.999**3, rtol=1e-6)


def test_a_bf16_head_trains_in_float32():
    params = {"head": jnp.ones(4, jnp.bfloat16)}
    trainable, frozen = split(params, {}, full="head")
    optimizer = optax.sgd(1e-3)
    state = optimizer.init(trainable)

    def loss(trainable):
        return jnp.sum(combine(trainable, frozen)[0]["head"]).astype(jnp.float32)

    for _ in range(8):
        grads = jax.grad(loss)(trainable)
        updates, state = optimizer.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    np.testing.assert_allclose(trainable["full"]["head"], 0.992, rtol=1e-6)
    assert np.all(combine(trainable, frozen)[0]["head"] < 1)
    bf16 = params
    for _ in range(8):
        bf16 = optax.apply_updates(bf16, {"head": jnp.full(4, -1e-3, jnp.bfloat16)})
    assert np.all(bf16["head"] == 1)
