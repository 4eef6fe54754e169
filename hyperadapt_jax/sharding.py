"""The vectors' shardings, out of the weights'."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import NamedSharding, PartitionSpec


def vector_spec(spec: PartitionSpec, axes: Sequence[int]) -> PartitionSpec:
    """A weight's partition spec, restricted to the axes that a vector spans.

    >>> vector_spec(PartitionSpec(None, "data", ("model", "expert")), (0, 2)) == PartitionSpec(
    ...     None, ("model", "expert")
    ... )
    True
    """
    return PartitionSpec(*(spec[i] if i < len(spec) else None for i in axes))


def vector_sharding(sharding: NamedSharding, axes: Sequence[int]) -> NamedSharding | None:
    """A weight's sharding, restricted to the axes that a vector spans; None where it spans none."""
    return NamedSharding(sharding.mesh, vector_spec(sharding.spec, axes)) if axes else None
