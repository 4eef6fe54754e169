"""VeRA (arXiv 2310.11454): ``W + diag(b) B diag(d) A``, of which ``b`` and ``d`` train.

``A`` (r x inputs) and ``B`` (outputs x r) are random, frozen, and shared by all weights: each takes
the first rows and columns that it has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hyperadapt_jax import paths
from hyperadapt_jax.methods.method import Method
from hyperadapt_jax.plan import Plan, check_rank
from hyperadapt_jax.scales import Scales, ScaleVectors, side_axes, stack_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeRAVectors:
    """What VeRA trains of one weight, float32.

    Attributes:
      d: the shape of the weight's stack axes, then r.
      b: the shape of its stack and out axes.
      axes: one role per axis of the weight (static).
    """

    d: Any
    b: Any
    axes: str = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Two vectors that scale frozen random factors.

    The factors are drawn anew in each step, from ``projection_seed``, and kept nowhere. An adapter
    of it holds the products of vectors and factors, as one of LoRA with the same rank does.

    Attributes:
      rank: r; VeRA's authors take hundreds.
      d_initial: the initial value of ``d``; that of ``b`` is zero.
      projection_seed: of the factors.
    """

    rank: int = 256
    d_initial: float = 0.1
    projection_seed: int = 0

    def __post_init__(self) -> None:
        check_rank(self.rank)

    @property
    def summary(self) -> str:
        return "two vectors of each weight, around shared random factors"

    def select(self, plan: Plan) -> Plan:
        return plan.with_low_rank(self.rank)

    def init(self, key: jax.Array | None, plan: Plan, params: Any) -> dict[str, VeRAVectors]:
        found = {}
        for weight in plan.weights:
            *outputs, _ = weight.arrays["up"]
            stack = (weight.shape[i] for i in stack_axes(weight.axes))
            d = jnp.full((*stack, self.rank), self.d_initial, jnp.float32)
            found[weight.path] = VeRAVectors(d, jnp.zeros(outputs, jnp.float32), weight.axes)
        return found

    def factors(self, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
        """Returns the shared factors, ``A`` [r, inputs] and ``B`` [outputs, r].

        Uniform with Kaiming's bound for ReLU, ``sqrt(6 / fan_in)``, as VeRA's authors draw them.

        Args:
          inputs: the most that a weight has.
          outputs: likewise.
        """
        keys = jax.random.split(jax.random.key(self.projection_seed))
        shapes = (self.rank, inputs), (outputs, self.rank)
        a, b = (
            math.sqrt(6 / shape[1]) * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
            for key, shape in zip(keys, shapes, strict=True)
        )
        return a, b

    def scales(self, trained: Any, params: Any) -> Scales:
        weights, found = paths.arrays(params), {}
        shapes = {path: _free(weights[path].shape, v.axes) for path, v in trained.items()}
        if not shapes:
            return {}
        most = (max(map(math.prod, sizes)) for sizes in zip(*shapes.values(), strict=True))
        a, b = self.factors(*most)
        for path, vectors in trained.items():
            axes, stack = vectors.axes, stack_axes(vectors.axes)
            inputs, outputs = shapes[path]
            down = a[:, : math.prod(inputs)].T.reshape(*inputs, self.rank)
            up = b[: math.prod(outputs)].reshape(*outputs, self.rank)
            spans, ends = side_axes(axes, "down"), side_axes(axes, "up")
            down = _spread(down, [i for i in spans if i not in stack], spans)
            up = _spread(up, [i for i in ends if i not in stack], ends)
            down, up = down * _spread(vectors.d, stack, spans), up * vectors.b[..., None]
            found[path] = ScaleVectors(None, None, axes, down, up)
        return found


def _free(shape: Sequence[int], axes: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of a weight's input axes, and of its output axes, without those of the stack."""
    stack = stack_axes(axes)
    inputs, outputs = (
        tuple(shape[i] for i in side_axes(axes, name) if i not in stack) for name in ("down", "up")
    )
    return inputs, outputs


def _spread(x: jax.Array, own: Sequence[int], whole: Sequence[int]) -> jax.Array:
    """An array on some of a weight's axes, to broadcast against one on more of them."""
    return jnp.expand_dims(x, [i for i, axis in enumerate(whole) if axis not in own])
