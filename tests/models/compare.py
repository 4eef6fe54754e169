"""Compare a model with what the torch reference gave."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from hyperadapt_jax import models
from tests.models import cases

TOLERANCE = 2e-4


def nested(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scales by kernel and then side, out of ``kernel/side`` keys."""
    tree: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        kernel, side = name.split("/")
        tree.setdefault(kernel, {})[side] = value
    return tree


def check(config: models.Config, recorded: dict[str, dict[str, np.ndarray]]) -> None:
    """Outputs, scaled outputs and gradients equal the recorded ones."""
    params = cases.params_of(config, recorded["weights"])
    inputs, probes = recorded["inputs"], recorded["probes"]
    fn, wanted = models.functional(models.abstract(config))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, wanted)
    scales = nested(recorded["scales"])
    run = cases.scaled_function(fn, params, inputs, probes)
    _, plain = run(jax.tree.map(np.zeros_like, scales))[0]
    (_, changed), grads = run(scales)
    assert plain.keys() >= recorded["outputs"].keys()
    for name, value in recorded["outputs"].items():
        seen = inputs["mask"] if value.ndim == 3 else np.ones(len(value), bool)
        for mine, theirs in ((plain, value), (changed, recorded["scaled_outputs"][name])):
            difference = np.abs(np.asarray(mine[name])[seen] - theirs[seen]).max()
            assert difference < TOLERANCE, (name, difference)
    assert grads.keys() == nested(recorded["grads"]).keys()
    for kernel, sides in nested(recorded["grads"]).items():
        for side, theirs in sides.items():
            # Gradients are sums over all tokens: compare to the size of the largest.
            difference = np.abs(np.asarray(grads[kernel][side]) - theirs).max()
            assert difference < TOLERANCE * max(1.0, np.abs(theirs).max()), (kernel, side)
            assert np.abs(theirs).max() > 1e-3, f"{kernel}/{side} has no gradient to compare"
