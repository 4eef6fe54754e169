"""Presets of targets: the published counts from configurations alone, for every family."""

from __future__ import annotations

import jax
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax import models
from tests.models import cases


def decoder(family: str, layers: int, width: int, mlp: int, heads: int, kv: int, **fields):
    return models.config_from_dict(
        {
            "model_type": family,
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "vocab_size": 100_000,
        }
        | fields
    )


def encoder(layers: int, width: int, mlp: int, heads: int):
    return models.config_from_dict(
        {
            "model_type": "roberta",
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "vocab_size": 50_265,
        }
    )


REAL = {
    "RoBERTa-base": encoder(12, 768, 3072, 12),
    "RoBERTa-large": encoder(24, 1024, 4096, 16),
    "Llama-3-8B": decoder("llama", 32, 4096, 14336, 32, 8),
    "Llama-3.2-3B": decoder("llama", 28, 3072, 8192, 24, 8, head_dim=128),
    "Qwen2.5-7B": decoder("qwen2", 28, 3584, 18944, 28, 4),
    "Qwen2.5-0.5B": decoder("qwen2", 24, 896, 4864, 14, 2, tie_word_embeddings=True),
    "Phi-4": decoder("phi3", 40, 5120, 17920, 40, 10),
}


@pytest.mark.parametrize(
    ("name", "preset", "count"),
    [
        ("RoBERTa-base", "qv", 36_864),
        ("RoBERTa-base", "all-linear", 165_888),
        ("RoBERTa-large", "qv", 98_304),
        ("RoBERTa-large", "all-linear", 442_368),
        ("Llama-3-8B", "qv", 425_984),
        ("Llama-3-8B", "qkvud", 1_769_472),
        ("Llama-3-8B", "all-linear", 2_621_440),
        ("Llama-3.2-3B", "qv", 286_720),
        ("Llama-3.2-3B", "qkvud", 1_032_192),
        ("Llama-3.2-3B", "all-linear", 1_519_616),
        ("Qwen2.5-7B", "qv", 315_392),
        ("Qwen2.5-7B", "qkvud", 1_691_648),
        ("Qwen2.5-7B", "all-linear", 2_523_136),
        ("Qwen2.5-0.5B", "qkvud", 368_640),
        ("Qwen2.5-0.5B", "all-linear", 549_888),
        ("Phi-4", "all-linear", 3_481_600),
    ],
)
def test_the_counts_come_out_of_a_configuration(name: str, preset: str, count: int) -> None:
    config = REAL[name]
    _, params = models.functional(models.abstract(config, dtype="bfloat16"))
    assert ha.plan(params, *models.targets(config, preset)).count == count


def test_the_size_of_a_model_comes_out_without_allocating() -> None:
    config = decoder("llama", 32, 4096, 14336, 32, 8, vocab_size=128_256)
    _, params = models.functional(models.abstract(config))
    leaves = jax.tree.leaves(params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == 8_030_261_248


@pytest.mark.parametrize("preset", ["qv", "qkvo", "qkvud", "all-linear"])
@pytest.mark.parametrize("name", cases.CASES)
def test_every_preset_fits_every_family(name: str, preset: str) -> None:
    config = models.config_from_dict(cases.CASES[name].config)
    _, params = models.functional(models.abstract(config))
    chosen = {w.path for w in ha.plan(params, *models.targets(config, preset)).weights}
    roles = {"qv": "q v", "qkvo": "q k v o", "qkvud": "q k v up down"}.get(
        preset, "q k v o gate up down"
    )
    fused = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
    names = set(roles.split())
    if isinstance(config, models.EncoderConfig):
        names -= {"gate"}
    elif config.fused:
        names = {fused.get(name, name) for name in names}
    assert chosen == {f"layers/{name}/kernel" for name in names}


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="'kv'.*qv, qkvo, qkvud, all-linear"):
        models.targets(REAL["Phi-4"], "kv")
