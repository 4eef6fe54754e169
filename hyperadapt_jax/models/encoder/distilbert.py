"""DistilBERT (arXiv 1910.01108): BERT's layers without token types and without a pooler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyperadapt_jax.models.checkpoint.reading import Checkpoint
from hyperadapt_jax.models.checkpoint.table import Rows, Tensor
from hyperadapt_jax.models.encoder.config import (
    CLASSIFIER,
    EncoderConfig,
    read_labels,
    write_labels,
)
from hyperadapt_jax.models.encoder.model import Encoder
from hyperadapt_jax.models.family import Family
from hyperadapt_jax.models.fields import Fields
from hyperadapt_jax.models.layers import ACTIVATIONS

_HEADS = {
    "ForMaskedLM": r"vocab_(transform|layer_norm|projector)\..*",
    CLASSIFIER: r"(pre_)?classifier\..*",
}


def _read(fields: Fields, architectures: Sequence[str]) -> EncoderConfig:
    embed_dim = fields.positive("dim")
    num_heads = fields.positive("n_heads")
    if embed_dim % num_heads:
        raise fields.error("n_heads", num_heads, f"does not divide dim {embed_dim}")
    pad_token = fields.take("pad_token_id", int, 0)
    if pad_token < 0:
        raise fields.error("pad_token_id", pad_token, "expected the id of a token")
    # Sines were where the position table began; it is stored in any case. Of the heads there is
    # the classifier alone: neither the dropout of another nor a tied one has an effect.
    fields.take("sinusoidal_pos_embds", bool, False)
    fields.probability("qa_dropout", 0.1)
    for name in ("tie_word_embeddings", "tie_weights_"):
        fields.take(name, bool, True)
    for name in ("bos_token_id", "eos_token_id"):
        fields.tokens(name)
    return EncoderConfig(
        family="distilbert",
        vocab_size=fields.positive("vocab_size"),
        embed_dim=embed_dim,
        mlp_dim=fields.positive("hidden_dim"),
        num_layers=fields.num_layers("n_layers"),
        num_heads=num_heads,
        num_positions=fields.positive("max_position_embeddings", default=512),
        num_token_types=0,
        activation=fields.choice("activation", ACTIVATIONS, "gelu"),
        norm_epsilon=1e-12,
        pad_token=pad_token,
        dropout=fields.probability("dropout", 0.1),
        attention_dropout=fields.probability("attention_dropout", 0.1),
        head_dropout=fields.probability("seq_classif_dropout", 0.2),
        num_labels=read_labels(fields, architectures),
        pooled=False,
        first_position=0,
        head="relu",
        out_dropout=0.0,
    )


def _write(config: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["DistilBert" + ("Model" if config.num_labels is None else CLASSIFIER)],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "dim": config.embed_dim,
        "hidden_dim": config.mlp_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "max_position_embeddings": config.num_positions,
        "activation": config.activation,
        "pad_token_id": config.pad_token,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "seq_classif_dropout": config.head_dropout,
        **write_labels(config.num_labels),
    }


def _tensors(config: EncoderConfig) -> tuple[Tensor, ...]:
    prefix = "distilbert."
    rows, head = Rows(*((prefix, "") if config.num_labels is not None else ("", prefix))), Rows("")
    rows.add("embeddings.word_embeddings.weight", "embed/words/embedding", "vocab embed")
    positions = "embeddings.position_embeddings.weight"
    rows.add(positions, "embed/positions/embedding", "positions embed")
    rows.layer_norm("embeddings.LayerNorm", "embed/norm", "norm")
    layer = "transformer.layer.{layer}"
    for name in "qkv":
        rows.linear(f"{layer}.attention.{name}_lin", f"layers/{name}", "layers embed heads")
    rows.linear(f"{layer}.attention.out_lin", "layers/o", "layers heads embed")
    rows.layer_norm(f"{layer}.sa_layer_norm", "layers/attn_norm", "layers norm")
    rows.linear(f"{layer}.ffn.lin1", "layers/up", "layers embed mlp")
    rows.linear(f"{layer}.ffn.lin2", "layers/down", "layers mlp embed")
    rows.layer_norm(f"{layer}.output_layer_norm", "layers/mlp_norm", "layers norm")
    if config.num_labels is not None:
        head.linear("pre_classifier", "classifier/dense", "embed pooled", optional=True)
        head.linear("classifier", "classifier/out", "pooled labels", optional=True)
    return (*rows.table, *head.table)


def _ignored(config: EncoderConfig) -> tuple[str, ...]:
    heads = [head for end, head in _HEADS.items() if end != CLASSIFIER or config.num_labels is None]
    return (r"(distilbert\.)?embeddings\.position_ids", *heads)


def _as_stored(config: EncoderConfig, checkpoint: Checkpoint) -> EncoderConfig:
    return config


DISTILBERT = Family(
    name="distilbert",
    architectures=tuple("DistilBert" + head for head in ("Model", *_HEADS)),
    module=Encoder,
    read=_read,
    write=_write,
    tensors=_tensors,
    ignored=_ignored,
    as_stored=_as_stored,
    heads=_HEADS,
)
