"""HyperAdapt (arXiv 2509.18629): ``diag(1 + row) W diag(1 + col)``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from hyperadapt_jax.methods.method import Method
from hyperadapt_jax.plan import Plan, init
from hyperadapt_jax.scales import Scales


@dataclasses.dataclass(frozen=True)
class HyperAdapt(Method):
    """Scale vectors of each weight.

    Attributes:
      sides: both, or the output-side (``row``) or input-side (``col``) ones alone.
    """

    sides: Literal["both", "row", "col"] = "both"

    @property
    def summary(self) -> str:
        sides = {"both": "both scale vectors", "row": "the output-side vector"}
        return f"{sides.get(self.sides, 'the input-side vector')} of each weight"

    def select(self, plan: Plan) -> Plan:
        return plan.restrict(self.sides)

    def init(self, key: jax.Array | None, plan: Plan, params: Any) -> Scales:
        return init(plan)
