"""HiRA (ICLR 2025, openreview TwJrTz9cRS): ``W + W * (up down)``, entry by entry.

Neither scale vectors nor a low-rank term give a product with a low-rank matrix, entry by entry: so
each weight is made anew in every pass, which costs about as many operations as full fine-tuning. It
is here to be compared with: of rank 1 it trains as many parameters as HyperAdapt.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from hyperadapt_jax import paths
from hyperadapt_jax.methods.method import Method
from hyperadapt_jax.plan import Plan, check_rank, init
from hyperadapt_jax.scales import Scales, compute_dtype, low_rank_product


@dataclasses.dataclass(frozen=True)
class HiRA(Method):
    """A low-rank matrix that each weight is multiplied with, entry by entry, and added.

    An adapter of it holds whole weights.

    Attributes:
      rank: of the matrix.
    """

    rank: int = 1

    def __post_init__(self) -> None:
        check_rank(self.rank)

    @property
    def summary(self) -> str:
        return "a low-rank factor of each weight's entries, which makes whole weights"

    def select(self, plan: Plan) -> Plan:
        return plan.with_low_rank(self.rank)

    def init(self, key: jax.Array | None, plan: Plan, params: Any) -> Scales:
        return init(plan, key)

    def scales(self, trained: Any, params: Any) -> Scales:
        return {}

    def weights(self, trained: Any, params: Any) -> dict[str, jax.Array]:
        arrays, found = paths.arrays(params), {}
        for path, vectors in trained.items():
            weight = arrays[path]
            scale = 1 + low_rank_product(vectors)
            wide = compute_dtype(weight.dtype)
            found[path] = (weight.astype(wide) * scale).astype(weight.dtype)
        return found
