"""Parameters trained as they are: all of them, or the head alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hyperadapt_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning."""

    summary = "every parameter of the model"

    def full(self, params: Mapping[str, Any], head: Callable[[str], bool]) -> Iterable[str]:
        return params


@dataclasses.dataclass(frozen=True)
class Head(Method):
    """A linear probe."""

    summary = "the head alone"

    def full(self, params: Mapping[str, Any], head: Callable[[str], bool]) -> Iterable[str]:
        return filter(head, params)
