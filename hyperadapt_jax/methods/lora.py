"""LoRA (arXiv 2106.09685), and rsLoRA (arXiv 2312.03732): ``W + alpha / r * up down``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from hyperadapt_jax.methods.method import Method
from hyperadapt_jax.plan import Plan, check_rank, init
from hyperadapt_jax.scales import Scales, side_axes, stack_axes


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """A low-rank term of each weight.

    Attributes:
      rank: r.
      alpha: the term is multiplied by ``alpha / r``; None for 2 r.
      rslora: multiply by ``alpha / sqrt(r)`` instead, so that the rank does not change how far a
        step reaches.
      dropout: the share of a weight's inputs that the term does not see in training.

    Raises:
      ValueError: a rank below 1, or a dropout outside [0, 1).
    """

    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: is {self.dropout}; give a number in [0, 1)")

    @property
    def summary(self) -> str:
        return "a low-rank term of each weight"

    @property
    def scaling(self) -> float:
        """What the term is multiplied by."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def select(self, plan: Plan) -> Plan:
        return plan.with_low_rank(self.rank)

    def init(self, key: jax.Array | None, plan: Plan, params: Any) -> Scales:
        return init(plan, key)

    def scales(self, trained: Any, params: Any) -> Scales:
        return {
            path: dataclasses.replace(vectors, up=vectors.up * self.scaling)
            for path, vectors in trained.items()
        }

    def dropped(self, scales: Scales, key: jax.Array) -> Scales:
        if not self.dropout:
            return scales
        found = {}
        for i, (path, vectors) in enumerate(scales.items()):
            spans = side_axes(vectors.axes, "up")
            stack = [vectors.up.shape[spans.index(axis)] for axis in stack_axes(vectors.axes)]
            keys = jax.random.split(jax.random.fold_in(key, i), math.prod(stack))
            data = jax.random.key_data(keys).reshape(*stack, -1)
            found[path] = dataclasses.replace(vectors, keys=data, dropout=self.dropout)
        return found
