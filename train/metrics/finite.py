"""Outputs that are not finite: an evaluation counts them, and none is made of them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hyperadapt_jax.models.generate import NOT_FINITE

from ..errors import Diverged


def decoded(
    rows: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> list[str | None]:
    """The texts of generated tokens; None where the model's outputs were not finite."""
    return [None if row[-1:] == [NOT_FINITE] else decode(row) for row in rows]


def count(outputs: Sequence[object], name: str = "nonfinite") -> dict[str, float]:
    """A metric that says how many outputs are missing, since they were NaN or infinite.

    Args:
      outputs: one for each row; None or False where it was not finite.
      name: the metric's.

    Returns:
      The metric; nothing where all outputs are finite.

    Raises:
      Diverged: none is.

    >>> count(["yes", None, "no"]), count([True, True])
    ({'nonfinite': 1.0}, {})
    """
    bad = sum(output is None or output is False for output in outputs)
    if bad and bad == len(outputs):
        raise Diverged(
            f"the model's outputs are NaN or infinite for all {bad} rows: look for numbers that are"
            " not finite in its weights, lower --lr, or take --dtype float32"
        )
    return {name: float(bad)} if bad else {}
