"""HyperAdapt in JAX: fine-tune a frozen weight ``W`` as ``diag(1 + row) W diag(1 + col)``."""

from hyperadapt_jax import adapter_io, optim, rank, sharding
from hyperadapt_jax.adapt import (
    Adapted,
    Explanation,
    MaterialisedError,
    MaterialisedWarning,
    Use,
    adapt,
    explain,
)
from hyperadapt_jax.adapter_io import AdapterError, load, save
from hyperadapt_jax.merge import MergeReport, merge, unmerge
from hyperadapt_jax.scales import (
    ScaleVectors,
    average,
    canonical,
    compose,
    count,
    interpolate,
    invert,
)
from hyperadapt_jax.targets import Plan, PlanError, Target, Weight, init, plan

__all__ = [
    "Adapted",
    "AdapterError",
    "Explanation",
    "MaterialisedError",
    "MaterialisedWarning",
    "MergeReport",
    "Plan",
    "PlanError",
    "ScaleVectors",
    "Target",
    "Use",
    "Weight",
    "adapt",
    "adapter_io",
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
    "optim",
    "plan",
    "rank",
    "save",
    "sharding",
    "unmerge",
]
