"""The shardings of the vectors, derived from those of their weights.

A vector is sharded as the axes of its weight that it spans, and so is each side of a low-rank
term, whose last axis, that of the rank, is whole. Under tensor parallelism that is best:
each device holds the part of the vector that it multiplies by. Mesh axes that shard both the batch
and the weights (FSDP) are different: there a weight is gathered before its use, and a vector that
is sharded like it is gathered with it, in every pass, while its gradient is not sharded.
``replicate`` names those mesh axes: the vectors, small as they are, are kept whole along them.

Inside ``jax.shard_map``, where a function sees its weight's shard alone, an adapted function needs
the vectors' shards: there ``in_specs`` are :func:`vector_shardings` without ``replicate``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from hyperadapt_jax import paths
from hyperadapt_jax.scales import Scales, ScaleVectors, side_axes


def vector_spec(
    spec: PartitionSpec, axes: Sequence[int], replicate: Sequence[str] = ()
) -> PartitionSpec:
    """Returns a weight's partition spec, restricted to the axes that a vector spans.

    Args:
      spec: the weight's.
      axes: the weight's axes that the vector spans, in the vector's order.
      replicate: mesh axes along which the vector is kept whole.

    >>> from jax.sharding import PartitionSpec as P
    >>> vector_spec(P(None, "data", ("data", "model")), (0, 2)) == P(None, ("data", "model"))
    True
    >>> vector_spec(P(None, ("data", "model")), (0, 1), replicate=["data"]) == P(None, "model")
    True
    """

    def kept(entry: Any) -> Any:
        if entry is None or isinstance(entry, str):
            return None if entry in replicate else entry
        names = tuple(name for name in entry if name not in replicate)
        return names if len(names) > 1 else names[0] if names else None

    return PartitionSpec(*(kept(spec[i]) if i < len(spec) else None for i in axes))


def vector_sharding(
    sharding: NamedSharding, axes: Sequence[int], replicate: Sequence[str] = ()
) -> NamedSharding | None:
    """Returns a weight's sharding, restricted to the axes that a vector spans; None for no axes.

    Args:
      sharding: the weight's.
      axes: the weight's axes that the vector spans, in the vector's order.
      replicate: mesh axes along which the vector is kept whole.

    Raises:
      ValueError: ``replicate`` names an axis that the mesh does not have.
    """
    check_axes(sharding.mesh, replicate)
    spec = vector_spec(sharding.spec, axes, replicate)
    return NamedSharding(sharding.mesh, spec) if axes else None


def check_axes(mesh: Mesh | AbstractMesh, replicate: Sequence[str]) -> None:
    """Raises ValueError where ``replicate`` is no list of axes of the mesh."""
    if isinstance(replicate, str) or not set(replicate) <= set(mesh.axis_names):
        raise ValueError(
            f"replicate: is {replicate!r}; give a list of axes of the mesh {mesh.axis_names}"
        )


def vector_shardings(scales: Scales, weights: Any, replicate: Sequence[str] = ()) -> Scales:
    """Returns the shardings of an adapter's vectors, for ``jax.device_put`` or ``jax.jit``.

    Args:
      scales: the adapter, of arrays or ``jax.ShapeDtypeStruct``.
      weights: the parameters, of arrays or ``jax.ShapeDtypeStruct`` that carry a sharding; or a
        tree with the parameters' paths, of ``NamedSharding`` or of ``PartitionSpec``.
      replicate: mesh axes along which the vectors are kept whole: those that shard the batch.

    Returns:
      A tree of the structure of ``scales``, of ``NamedSharding``, or of ``PartitionSpec`` where
      ``weights`` holds these. On a single device, the vectors' device is their weight's.

    Raises:
      ValueError: no sharding is known for an adapted weight, or ``replicate`` names an axis that
        the mesh does not have.

    >>> import jax, jax.numpy as jnp
    >>> import hyperadapt_jax as ha
    >>> params = {"w": jnp.ones((4, 6))}
    >>> scales = ha.init(ha.plan(params, ("w", "in out")))
    >>> specs = vector_shardings(scales, {"w": PartitionSpec("data", "model")}, replicate=["data"])
    >>> specs["w"].row == PartitionSpec("model"), specs["w"].col == PartitionSpec(None)
    (True, True)
    >>> scales = jax.device_put(scales, vector_shardings(scales, params))
    """
    names, leaves, _ = paths.flatten(weights)
    known = dict(zip(names, leaves, strict=True))

    def of(path: str, axes: tuple[int, ...]) -> Any:
        leaf = known.get(path)
        sharding = getattr(leaf, "sharding", leaf)
        if isinstance(sharding, PartitionSpec):
            return vector_spec(sharding, axes, replicate)
        if isinstance(sharding, NamedSharding):
            return vector_sharding(sharding, axes, replicate)
        if isinstance(sharding, SingleDeviceSharding):
            return sharding
        kind = f"has a sharding of type {type(sharding).__name__}"
        what = kind if path in known else "is not in the tree"
        raise ValueError(
            f"{path}: {what}; give arrays that carry a NamedSharding, or a tree of"
            f" NamedSharding or PartitionSpec; {paths.suggest(path, known)}"
        )

    def all_of(path: str, vectors: ScaleVectors) -> ScaleVectors:
        specs = {name: of(path, side_axes(vectors.axes, name)) for name in vectors.arrays}
        return dataclasses.replace(vectors, **specs)

    return {path: all_of(path, vectors) for path, vectors in scales.items()}
