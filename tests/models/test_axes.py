"""The logical axes of every family's parameters: one word for each axis, of its size."""

from __future__ import annotations

import dataclasses

import pytest

import hyperadapt_jax as ha
from hyperadapt_jax import models, paths
from hyperadapt_jax.models.registry import FAMILIES
from tests.models import cases

COMMON = {
    "layers": lambda c: c.layers,
    "vocab": lambda c: c.vocab_size,
    "embed": lambda c: c.width,
    "norm": lambda c: c.width,
    "heads": lambda c: c.heads * c.head_dim,
    "mlp": lambda c: c.mlp_width,
}
DECODER = COMMON | {
    "kv_heads": lambda c: c.kv_heads * c.head_dim,
    "qkv": lambda c: (c.heads + 2 * c.kv_heads) * c.head_dim,
    "head_dim": lambda c: c.head_dim,
    "gate_up": lambda c: 2 * c.mlp_width,
}
ENCODER = COMMON | {
    "positions": lambda c: c.positions,
    "types": lambda c: c.token_types,
    "pooled": lambda c: c.width,
    "labels": lambda c: c.labels,
}


def variants(name: str) -> list[models.Config]:
    """A case with and without its head."""
    config = models.config_from_dict(cases.CASES[name].config)
    if isinstance(config, models.DecoderConfig):
        return [dataclasses.replace(config, tied=tied) for tied in (True, False)]
    return [dataclasses.replace(config, labels=labels) for labels in (None, 1, 5)]


@pytest.mark.parametrize("name", cases.CASES)
def test_every_axis_has_one_word_of_its_size(name: str) -> None:
    for config in variants(name):
        sizes = DECODER if isinstance(config, models.DecoderConfig) else ENCODER
        params = paths.arrays(models.functional(models.abstract(config))[1])
        axes = models.logical_axes(config)
        assert axes.keys() == params.keys()
        for path, words in axes.items():
            words = words.split()
            assert len(set(words)) == len(words), path
            assert tuple(sizes[word](config) for word in words) == params[path].shape, path


def test_every_family_is_looked_at() -> None:
    families = {models.config_from_dict(case.config).family for case in cases.CASES.values()}
    assert families == FAMILIES.keys()


@pytest.mark.parametrize("name", cases.CASES)
def test_the_matrices_of_the_layers_are_the_targets_of_all_linear(name: str) -> None:
    config = models.config_from_dict(cases.CASES[name].config)
    _, params = models.functional(models.abstract(config))
    plan = ha.plan(params, *models.targets(config, "all-linear"))
    axes = models.logical_axes(config)
    for weight in plan.weights:
        stack, inputs, outputs = axes[weight.path].split()
        assert weight.axes == "stack in out" and stack == "layers"
        assert "embed" in (inputs, outputs)
    left = axes.keys() - {weight.path for weight in plan.weights}
    layers = [path for path in left if path.startswith("layers/")]
    assert all(len(axes[path].split()) == 2 for path in layers)  # biases and norms
