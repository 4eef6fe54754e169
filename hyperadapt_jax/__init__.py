"""HyperAdapt in JAX: fine-tune a frozen weight ``W`` as ``diag(1 + row) W diag(1 + col)``."""

from hyperadapt_jax import methods, peft, rank, sharding, trainable
from hyperadapt_jax.adapt import (
    Adapted,
    Explanation,
    MaterializedError,
    MaterializedWarning,
    WeightUse,
    adapt,
    explain,
)
from hyperadapt_jax.adapter import Adapter, AdapterError
from hyperadapt_jax.algebra import average, canonical, compose, interpolate, invert
from hyperadapt_jax.merge import MergeReport, merge, unmerge
from hyperadapt_jax.plan import Plan, PlanError, PlannedWeight, Target, init, plan
from hyperadapt_jax.saving import load, save
from hyperadapt_jax.scales import ScaleVectors, count
from hyperadapt_jax.version import __version__

__all__ = [
    "Adapted",
    "Adapter",
    "AdapterError",
    "Explanation",
    "MaterializedError",
    "MaterializedWarning",
    "MergeReport",
    "Plan",
    "PlanError",
    "PlannedWeight",
    "ScaleVectors",
    "Target",
    "WeightUse",
    "__version__",
    "adapt",
    "average",
    "canonical",
    "compose",
    "count",
    "explain",
    "init",
    "interpolate",
    "invert",
    "load",
    "merge",
    "methods",
    "peft",
    "plan",
    "rank",
    "save",
    "sharding",
    "trainable",
    "unmerge",
]
