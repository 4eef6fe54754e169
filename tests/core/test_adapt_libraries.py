"""`adapt` on functions that nobody here wrote: Flax Linen, Flax NNX and Equinox layers."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import hyperadapt_jax as ha
from tests.core.oracle import check_adapt, draw

pytestmark = pytest.mark.usefixtures("optimized")

X = draw(1, 2, 5, 8)
IMAGE = draw(2, 2, 6, 5, 8)
TOKENS = jnp.array([[1, 4, 0], [8, 2, 2]])
KERNEL = [(".*/kernel", "in out")]


def check(fn, params, targets, *args, **kwargs):
    """All targets on the activations, and equal to the merged weights."""
    found = check_adapt(fn, params, targets, *args, **kwargs)
    assert not found.materialized and not found.unused
    assert found.on_activations == tuple(sorted(ha.init(ha.plan(params, *targets))))


# Linen


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(x + y))), None


class Stack(nn.Module):
    length: int = 3

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        scanned = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.length
        )
        return scanned()(x, None)[0]


class TiedEmbedding(nn.Module):
    def setup(self):
        self.embed = nn.Embed(9, 6)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.embed(tokens)))


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        return dense(3)(x)


MHA = [
    (".*(query|key|value)/kernel", "in out out"),
    (".*/out/kernel", "in in out"),
]
SCANNED_MHA = [(pattern, f"stack {axes}") for pattern, axes in MHA]
LINEN = {
    "Dense": (nn.Dense(3), X, KERNEL),
    "Dense without bias, bfloat16 compute": (nn.Dense(3, use_bias=False), X, KERNEL),
    "DenseGeneral": (nn.DenseGeneral((3, 4), axis=-1), X, [(".*/kernel", "in out out")]),
    "DenseGeneral over two axes": (
        nn.DenseGeneral(3, axis=(-2, -1)),
        X,
        [(".*/kernel", "in in out")],
    ),
    "DenseGeneral with batch": (
        nn.DenseGeneral(3, axis=-1, batch_dims=(0,)),
        X,
        [(".*/kernel", "stack in out")],
    ),
    "Einsum": (nn.Einsum((8, 3, 4), "...d,dnh->...nh"), X, [(".*/kernel", "in out out")]),
    "MultiHeadDotProductAttention": (nn.MultiHeadDotProductAttention(num_heads=2), X, MHA),
    "Conv": (nn.Conv(4, (3, 3), strides=2), IMAGE, [(".*/kernel", "- - in out")]),
    "Conv, 1-D, causal, grouped": (
        nn.Conv(4, (3,), padding="CAUSAL", feature_group_count=2),
        X,
        [(".*/kernel", "- in out")],
    ),
    "ConvTranspose": (nn.ConvTranspose(4, (2, 2)), IMAGE, [(".*/kernel", "- - in out")]),
    "Embed as a tied head": (TiedEmbedding(), TOKENS, [(".*/embedding", "in out")]),
    "nn.scan of nn.remat": (
        Stack(),
        X,
        [*SCANNED_MHA, (".*/Dense_./kernel", "stack in out")],
    ),
    "nn.vmap": (Ensemble(), X, [(".*/kernel", "stack in out")]),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    module, x, targets = LINEN[name]
    params = module.init(jax.random.key(0), x)
    check(lambda params, x: module.apply(params, x), params, targets, x)


# NNX: split, and merge inside the function


def pure(module):
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return (lambda params, *args: nnx.merge(graph, params, rest)(*args)), params


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(x + self.attention(x))))


def scanned_blocks():
    """Stacked blocks made by vmap and run by lax.scan over remat, with split and merge alone."""

    def make(key):
        return nnx.split(NNXBlock(nnx.Rngs(key)), nnx.Param, ...)[1]

    params = jax.vmap(make)(jax.random.split(jax.random.key(0), 3))
    graph, _, rest = nnx.split(NNXBlock(nnx.Rngs(0)), nnx.Param, ...)

    @jax.checkpoint
    def block(x, params):
        return nnx.merge(graph, params, rest)(x), None

    return lambda params, x: lax.scan(block, x, params)[0], params


def nnx_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return NNXBlock(nnx.Rngs(key))

    blocks = make(jax.random.split(jax.random.key(0), 3))
    graph, params, rest = nnx.split(blocks, nnx.Param, ...)

    def fn(params, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return run(x, nnx.merge(graph, params, rest))

    return fn, params


def nnx_embed():
    embed = nnx.Embed(9, 6, rngs=nnx.Rngs(0))
    graph, params = nnx.split(embed)

    def fn(params, tokens):
        embed = nnx.merge(graph, params)
        return embed.attend(jnp.tanh(embed(tokens)))

    return fn, params


NNX_MHA = [
    ("(.*/)?(query|key|value)/kernel", "in out out"),
    ("(.*/)?out/kernel", "in in out"),
]
NNX_SCANNED = [(pattern, f"stack {axes}") for pattern, axes in NNX_MHA]
NNX_SCANNED.append(("(up|down)/kernel", "stack in out"))
NNX = {
    "Linear": (lambda: pure(nnx.Linear(8, 3, rngs=nnx.Rngs(0))), X, [("kernel", "in out")]),
    "LinearGeneral": (
        lambda: pure(nnx.LinearGeneral((5, 8), 3, axis=(-2, -1), rngs=nnx.Rngs(0))),
        X,
        [("kernel", "in in out")],
    ),
    "Einsum": (
        lambda: pure(nnx.Einsum("btd,dnh->bnth", (8, 3, 4), rngs=nnx.Rngs(0))),
        X,
        [("kernel", "in out out")],
    ),
    "MultiHeadAttention": (
        lambda: pure(nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))),
        X,
        NNX_MHA,
    ),
    "Conv": (
        lambda: pure(nnx.Conv(8, 4, (3, 3), rngs=nnx.Rngs(0))),
        IMAGE,
        [("kernel", "- - in out")],
    ),
    "Embed as a tied head": (nnx_embed, TOKENS, [("embedding", "in out")]),
    "stacked, lax.scan over remat": (scanned_blocks, X, NNX_SCANNED),
    "stacked, nnx.scan over nnx.remat": (nnx_scan, X, NNX_SCANNED),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    make, x, targets = NNX[name]
    fn, params = make()
    check(fn, params, targets, x)


def test_nnx_vmapped_layers():
    """Layers that see one input: their axis becomes a batch axis, so last bits may differ."""
    keys = jax.random.split(jax.random.key(0), 3)
    layers = jax.vmap(lambda k: nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(k)))[1])(keys)
    graph, _ = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))

    def fn(params, x):
        return jax.vmap(lambda params: nnx.merge(graph, params)(x))(params)

    check(fn, layers, [("kernel", "stack in out")], X, exact=False)


# Equinox: the module is the tree, and its weights are (out, in)


def eqx_scan():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(keys)

    def fn(layers, x):
        dynamic, static = eqx.partition(layers, eqx.is_array)

        @jax.checkpoint
        def body(x, layer):
            return jnp.tanh(jax.vmap(eqx.combine(layer, static))(x)), None

        return lax.scan(body, x, dynamic)[0]

    return fn, layers


def eqx_mha(model, x):
    return jax.vmap(model)(x, x, x)


EQUINOX = {
    "MLP": (
        lambda: (
            lambda model, x: jax.vmap(model)(x),
            eqx.nn.MLP(8, 3, 6, 2, key=jax.random.key(0)),
        ),
        X[0],
        [("layers/./weight", "out in")],
    ),
    "MLP, filter_jit and filter_checkpoint": (
        lambda: (
            lambda model, x: eqx.filter_jit(eqx.filter_checkpoint(eqx.filter_vmap(model)))(x),
            eqx.nn.MLP(8, 3, 6, 2, key=jax.random.key(0)),
        ),
        X[0],
        [("layers/./weight", "out in")],
    ),
    "MultiheadAttention": (
        lambda: (eqx_mha, eqx.nn.MultiheadAttention(2, 8, key=jax.random.key(0))),
        X,
        [(".*_proj/weight", "out in")],
    ),
    "Conv2d": (
        lambda: (
            lambda model, x: jax.vmap(model)(x),
            eqx.nn.Conv2d(8, 4, 3, groups=2, key=jax.random.key(0)),
        ),
        jnp.moveaxis(IMAGE, -1, 1),
        [("weight", "out in - -")],
    ),
    "stacked, scan over remat": (eqx_scan, X[0], [("weight", "stack out in")]),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox(name):
    make, x, targets = EQUINOX[name]
    fn, params = make()
    # With jax 0.12, XLA computes the base's product, whose result is transposed, the other way
    # around, x W' for (W x')', and sums in another order; a scale in between keeps it as written.
    check(fn, params, targets, x, exact=name != "stacked, scan over remat")
