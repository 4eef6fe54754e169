"""The logical axes of every family's parameters: one word for each axis, of its size."""

from __future__ import annotations

import dataclasses

import pytest

import hyperadapt_jax as ha
from hyperadapt_jax import models, paths
from hyperadapt_jax.models.registry import FAMILIES
from tests.models import cases

COMMON = {
    "layers": lambda c: c.num_layers,
    "vocab": lambda c: c.vocab_size,
    "embed": lambda c: c.embed_dim,
    "norm": lambda c: c.embed_dim,
    "heads": lambda c: c.num_heads * c.head_dim,
    "mlp": lambda c: c.mlp_dim,
}
DECODER = COMMON | {
    "kv_heads": lambda c: c.num_kv_heads * c.head_dim,
    "qkv": lambda c: (c.num_heads + 2 * c.num_kv_heads) * c.head_dim,
    "head_dim": lambda c: c.head_dim,
    "gate_up": lambda c: 2 * c.mlp_dim,
}
ENCODER = COMMON | {
    "positions": lambda c: c.num_positions,
    "types": lambda c: c.num_token_types,
    "pooled": lambda c: c.embed_dim,
    "labels": lambda c: c.num_labels,
}


def variants(name: str) -> list[models.Config]:
    """A case with and without its head."""
    config = models.config_from_dict(cases.CASES[name].config)
    if isinstance(config, models.DecoderConfig):
        return [dataclasses.replace(config, tie_embeddings=tied) for tied in (True, False)]
    return [dataclasses.replace(config, num_labels=labels) for labels in (None, 1, 5)]


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
    stacked = {p: roles for p, roles in models.matrices(config).items() if "stack" in roles}
    assert {weight.path: weight.axes for weight in plan.weights} == stacked
    axes = models.logical_axes(config)
    for path in stacked:
        layers, inputs, outputs = axes[path].split()
        assert layers == "layers" and "embed" in (inputs, outputs)


@pytest.mark.parametrize("name", cases.CASES)
def test_kernels_and_embeddings_are_the_matrices(name: str) -> None:
    for config in variants(name):
        params = paths.arrays(models.functional(models.abstract(config))[1])
        found = models.matrices(config)
        assert set(found) == {p for p in params if p.endswith(("/kernel", "/embedding"))}
        for path, roles in found.items():
            assert len(roles.split()) == params[path].ndim
            assert ("stack" in roles) == path.startswith("layers/")
