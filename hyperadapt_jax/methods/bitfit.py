"""BitFit (Ben Zaken et al., 2022, arXiv 2106.10199): the bias terms alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hyperadapt_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """Bias terms: the parameters whose path ends in ``bias``, those of norms and heads too."""

    summary = "the bias terms alone"

    def full(self, params: Mapping[str, Any], head: Callable[[str], bool]) -> Iterable[str]:
        return (path for path in params if path.rsplit("/", 1)[-1] == "bias")
