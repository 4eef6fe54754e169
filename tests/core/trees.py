"""The same small model in every kind of parameter tree, and weights with every kind of axes."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import hyperadapt_jax as ha


class Linen(nn.Module):
    """Two Dense layers, q and v; boxed with the names of their mesh axes where asked for."""

    boxed: Any = None

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        init = self.boxed(init, (None, "model")) if self.boxed else init
        return nn.Dense(5, kernel_init=init, name="q")(x), nn.Dense(5, name="v")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.q = nnx.Linear(3, 5, rngs=rngs)
        self.v = nnx.Linear(3, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Equinox(eqx.Module):
    q: eqx.nn.Linear
    v: eqx.nn.Linear
    activation: Any = jax.nn.gelu


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    """Fields that hold arrays, one of them called value."""

    query: Any
    key: Any
    value: Any


def layer() -> dict:
    return {"kernel": jnp.arange(15.0).reshape(3, 5), "bias": jnp.ones(5)}


def linen(boxed: Any = None) -> Any:
    return Linen(boxed).init(jax.random.key(0), jnp.ones((1, 3)))


def equinox() -> Equinox:
    keys = jax.random.split(jax.random.key(0))
    return Equinox(*(eqx.nn.Linear(3, 5, key=key) for key in keys))


# name: the tree, and the path, the axis roles and the bias of its q
TREES = {
    "linen": (linen, "params/q/kernel", "in out", "params/q/bias"),
    "linen, boxed": (
        lambda: linen(nn.with_partitioning), "params/q/kernel", "in out", "params/q/bias"
    ),
    "linen, logically boxed": (
        lambda: linen(nn.with_logical_partitioning), "params/q/kernel", "in out", "params/q/bias"
    ),
    "nnx state": (lambda: nnx.split(Nnx(nnx.Rngs(0)))[1], "q/kernel", "in out", "q/bias"),
    "nnx pure dict": (
        lambda: nnx.to_pure_dict(nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)[1]),
        "q/kernel", "in out", "q/bias",
    ),
    "equinox": (equinox, "q/weight", "out in", "q/bias"),
    "dict": (lambda: {"q": layer(), "v": layer()}, "q/kernel", "in out", "q/bias"),
    "list": (lambda: [layer(), (layer(),)], "0/kernel", "in out", "0/bias"),
    "dataclass": (
        lambda: {"q": Layer(**layer()), "v": Layer(**layer())}, "q/kernel", "in out", "q/bias"
    ),
}  # fmt: skip

# Odd sizes, stacks, one side alone, several axes to a side; one adapter scales them all.
AXES = {
    "plain": ("in out", (3, 5)),
    "transposed": ("out in", (5, 3)),
    "one input": ("in out", (1, 7)),
    "one output": ("in out", (7, 1)),
    "row only": ("- out", (3, 5)),
    "col only": ("in -", (3, 5)),
    "vector": ("out", (5,)),
    "stacked": ("stack in out", (2, 3, 5)),
    "stacked last": ("in out stack", (3, 5, 2)),
    "experts in layers": ("stack stack in out", (2, 3, 1, 4)),
    "heads out": ("in out out", (4, 2, 3)),
    "heads in": ("in in out", (2, 3, 4)),
    "convolution": ("- - in out", (3, 2, 3, 5)),
}


def weights(seed: int = 0, dtype: Any = jnp.float32) -> dict:
    """A weight for each of AXES: normal, of unit variance."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, (_, shape) in AXES.items()}


@functools.cache
def identity() -> dict:
    """The scale vectors of ``weights()``, as they start."""
    return ha.init(ha.plan(weights(), *(([name], axes) for name, (axes, _) in AXES.items())))


def adapter(seed: int = 0, size: float = 0.5, negative: bool = True) -> dict:
    """An adapter of ``weights()``: scales exp(size * normal), half of them negated where asked."""
    rng = np.random.default_rng(seed)

    def draw(like):
        signs = rng.choice([1, -1], like.shape) if negative else 1
        return np.asarray(signs * np.exp(size * rng.normal(size=like.shape)) - 1, np.float32)

    return jax.tree.map(draw, identity())


def dense(vectors: ha.ScaleVectors, ndim: int) -> np.ndarray:
    """The factor of every entry of the weight, in float64: the oracle, an outer product."""
    roles = vectors.axes.split()
    product = np.ones([1] * ndim)
    for delta, role in ((vectors.row, "out"), (vectors.col, "in")):
        if delta is not None:
            shape = iter(delta.shape)
            sizes = [next(shape) if r in (role, "stack") else 1 for r in roles]
            product = product * (1 + np.asarray(delta, np.float64)).reshape(sizes)
    return product
