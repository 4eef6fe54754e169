"""Small random models, one per option, that are compared with the torch reference.

Each case is a ``config.json`` and how its batch is padded: ``none``, ``left`` or ``right``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.models import Config

BATCH, LENGTH = 2, 11


class Case(NamedTuple):
    """A model and a batch to compare."""

    config: dict[str, Any]
    padding: str = "none"


def _decoder(family: str, name: str, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "architectures": [name + "ForCausalLM"],
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | fields


def _encoder(family: str, name: str, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "architectures": [name],
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 20,
        "type_vocab_size": 2,
        "pad_token_id": 0 if family == "bert" else 1,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    } | fields


def _distilbert(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": "distilbert",
        "architectures": [name],
        "vocab_size": 23,
        "dim": 16,
        "hidden_dim": 20,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 20,
        "pad_token_id": 0,
    } | fields


_LABELS = {"id2label": {"0": "no", "1": "yes", "2": "maybe"}}
_LABELS["label2id"] = {name: int(number) for number, name in _LABELS["id2label"].items()}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.5, 4.0, 9.0]}

DECODERS = ("llama3", "llama-dynamic", "mistral", "qwen2", "qwen2-sliding", "qwen3", "phi3")

CASES: dict[str, Case] = {
    "llama2": Case(_decoder("llama", "Llama", num_key_value_heads=4)),
    "llama3": Case(
        _decoder(
            "llama",
            "Llama",
            eos_token_id=[2, 3],
            head_dim=8,
            rope_theta=500.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        "right",
    ),
    "llama-linear": Case(
        _decoder(
            "llama",
            "Llama",
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            rope_scaling={"type": "linear", "factor": 2.5},
        ),
        "left",
    ),
    "llama-dynamic": Case(
        _decoder(
            "llama",
            "Llama",
            max_position_embeddings=7,
            head_dim=6,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
        ),
    ),
    "mistral": Case(
        _decoder("mistral", "Mistral", head_dim=6, sliding_window=4, rms_norm_eps=1e-5), "left"
    ),
    "mistral-full": Case(_decoder("mistral", "Mistral", sliding_window=None)),
    "qwen2": Case(_decoder("qwen2", "Qwen2", tie_word_embeddings=True, rope_theta=1e6), "right"),
    "qwen2-sliding": Case(
        _decoder("qwen2", "Qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1)
    ),
    "qwen3": Case(
        _decoder("qwen3", "Qwen3", head_dim=8, tie_word_embeddings=True, attention_bias=True),
        "left",
    ),
    "qwen3-yarn": Case(
        _decoder(
            "qwen3",
            "Qwen3",
            head_dim=16,
            rope_theta=50.0,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 3.0,
                "attn_factor": 0.9,
                "original_max_position_embeddings": 16,
            },
        ),
        "right",
    ),
    "phi3": Case(
        _decoder("phi3", "Phi3", sliding_window=5, original_max_position_embeddings=64), "right"
    ),
    "phi4": Case(_decoder("phi3", "Phi3", sliding_window=None, rope_theta=250000.0)),
    "phi4-mini-long": Case(
        _decoder(
            "phi3",
            "Phi3",
            hidden_size=32,
            partial_rotary_factor=0.75,
            sliding_window=64,
            tie_word_embeddings=True,
            original_max_position_embeddings=8,
            rope_scaling=_LONGROPE,
        )
    ),
    "phi4-mini-short": Case(
        _decoder(
            "phi3",
            "Phi3",
            hidden_size=32,
            partial_rotary_factor=0.75,
            sliding_window=64,
            original_max_position_embeddings=16,
            rope_scaling=_LONGROPE,
        ),
        "right",
    ),
    "bert": Case(_encoder("bert", "BertModel"), "right"),
    "bert-classifier": Case(
        _encoder("bert", "BertForSequenceClassification", hidden_act="gelu_new", **_LABELS)
    ),
    "roberta": Case(_encoder("roberta", "RobertaModel", layer_norm_eps=1e-5), "right"),
    "roberta-classifier": Case(
        _encoder("roberta", "RobertaForSequenceClassification", type_vocab_size=1, **_LABELS),
        "right",
    ),
    "camembert-classifier": Case(
        _encoder("camembert", "CamembertForSequenceClassification", pad_token_id=2, **_LABELS),
        "right",
    ),
    "xlm-roberta-regression": Case(
        _encoder(
            "xlm-roberta",
            "XLMRobertaForSequenceClassification",
            hidden_act="relu",
            id2label={"0": "LABEL_0"},
            label2id={"LABEL_0": 0},
            problem_type="regression",
        ),
        "left",
    ),
    "distilbert": Case(_distilbert("DistilBertModel", sinusoidal_pos_embds=True), "right"),
    "distilbert-classifier": Case(
        _distilbert("DistilBertForSequenceClassification", activation="relu", **_LABELS), "right"
    ),
}


def batch(config: Config, padding: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens ``[B, T]`` and their mask; every row but the last is padded."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, config.vocab_size, (BATCH, LENGTH))
    mask = np.ones((BATCH, LENGTH), bool)
    if padding == "right":
        mask[:-1, -4:] = False
    elif padding == "left":
        mask[:-1, :4] = False
    return {"tokens": np.where(mask, tokens, config.pad_token), "mask": mask}


def params_of(config: Config, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tree of parameters out of a checkpoint's tensors, by the model's table."""
    tree: dict[str, Any] = {}
    for tensor in models.tensors(config):
        layers = range(config.num_layers) if "{layer}" in tensor.name else [None]
        slices = [state[tensor.name.format(layer=layer)] for layer in layers]
        slices = [s.T if tensor.transpose else s for s in slices]
        *parents, last = tensor.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.stack(slices) if "{layer}" in tensor.name else slices[0]
    return tree


def scales_of(flat: dict[str, Any]) -> dict[str, ha.ScaleVectors]:
    """An adapter out of recorded ``kernel/side`` vectors."""
    return {
        f"layers/{name}/kernel": ha.ScaleVectors(
            flat[f"{name}/row"], flat[f"{name}/col"], axes="stack in out"
        )
        for name in dict.fromkeys(key.split("/")[0] for key in flat)
    }


def random_scales(model: models.Config, params: Any, seed: int = 0) -> dict[str, ha.ScaleVectors]:
    """An adapter of every linear, far from the identity."""
    rng = np.random.default_rng(seed)
    scales = ha.init(ha.plan(params, *models.targets(model, "all-linear")))
    return jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), scales
    )


def random_params(config: Config, seed: int = 0) -> Any:
    """Parameters large enough that every part of the model matters."""
    rng = np.random.default_rng(seed)
    _, shapes = models.functional(models.abstract(config))
    return jax.tree.map_with_path(
        lambda path, leaf: (
            0.3 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
        ).astype(np.float32),
        shapes,
    )


def output_of(output: Any) -> dict[str, Any]:
    """What a model returns, by name."""
    if isinstance(output, models.EncoderOutput):
        return {name: value for name, value in output._asdict().items() if value is not None}
    return {"logits": output}


def loss(outputs: dict[str, Any], probes: dict[str, Any]) -> Any:
    """A scalar with a gradient everywhere: products of the outputs with fixed numbers."""
    return sum((outputs[name] * probes[name]).sum() for name in probes)


def jit(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``jax.jit`` for a program that runs once: compiled fast rather than well."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0}, **options)
