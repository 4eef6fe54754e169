"""HyperAdapt and LoRA together: ``diag(1 + row) (W + alpha / r * up down) diag(1 + col)``."""

from __future__ import annotations

import dataclasses

from hyperadapt_jax.methods.lora import LoRA
from hyperadapt_jax.plan import Plan
from hyperadapt_jax.scales import SIDES


@dataclasses.dataclass(frozen=True)
class HyperAdaptLoRA(LoRA):
    """Both scale vectors of each weight, and a low-rank term; its fields are those of LoRA."""

    @property
    def summary(self) -> str:
        return "both scale vectors and a low-rank term of each weight"

    def select(self, plan: Plan) -> Plan:
        return plan.with_low_rank(self.rank, tuple(SIDES))
