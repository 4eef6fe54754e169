"""(IA)^3 (arXiv 2205.05638): vectors that scale keys, values and the last matrix of each MLP.

The weight alone is scaled, as everywhere here; its authors and PEFT scale a bias with it.
"""

from __future__ import annotations

import dataclasses

from hyperadapt_jax.methods.hyperadapt import HyperAdapt


@dataclasses.dataclass(frozen=True)
class IA3(HyperAdapt):
    """One scale vector of each weight: which side, the roles of its targets say."""

    @property
    def summary(self) -> str:
        return "the output side of keys and values, the input side of each MLP's last matrix"

    @property
    def targets(self) -> str:
        return "ia3"
