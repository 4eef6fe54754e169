"""The configuration of an encoder: its fields, and how the families' files say them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from hyperadapt_jax.models.fields import Fields
from hyperadapt_jax.models.layers import ACTIVATIONS

Head = Literal["pooled", "tanh", "relu"]
CLASSIFIER = "ForSequenceClassification"  # how an architecture with a classification head ends


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional encoder of the BERT shape: post-norm, learned positions.

    Attributes:
      family: ``model_type`` of the checkpoint, which names its tensors and its head.
      vocab_size: tokens, V.
      embed_dim: residual stream, D.
      mlp_dim: hidden units of the MLP, F.
      num_layers: number of layers, L.
      num_heads: attention heads, N; D is a multiple of N.
      num_positions: rows of the position table.
      num_token_types: rows of the token-type table; 0 without one.
      activation: name of the MLP's activation.
      norm_epsilon: added to the variance in LayerNorm.
      pad_token: token of padding.
      first_position: row of the position table for the first token; where that is not zero, padding
        is not counted and has the row before it.
      head: what the classifier is: a projection of the pooler's output (``pooled``), or of a hidden
        layer of its own with a ``tanh``, which has dropout before it too, or with a ``relu``.
      out_dropout: probability on the outputs of attention; None for that of ``dropout``.
      dropout: probability on embeddings and on the outputs of attention and MLP.
      attention_dropout: probability on attention weights.
      head_dropout: probability before the classification head.
      num_labels: outputs of the classification head (1 for regression), or None without a head.
      pooled: without a head, there is a pooler; not every checkpoint has one.
    """

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_positions: int
    num_token_types: int
    activation: str
    norm_epsilon: float
    pad_token: int
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float = 0.1
    num_labels: int | None = None
    pooled: bool = True
    first_position: int = dataclasses.field(kw_only=True)
    head: Head = dataclasses.field(kw_only=True)
    out_dropout: float | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head, H."""
        return self.embed_dim // self.num_heads

    @property
    def pooler(self) -> bool:
        """Whether there is a pooler: with a head, if that reads it."""
        return self.pooled if self.num_labels is None else self.head == "pooled"

    @property
    def max_length(self) -> int:
        """Longest sequence, in tokens."""
        return self.num_positions - self.first_position


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What sets the ``config.json`` of one family of encoders apart from those of the others.

    Attributes:
      family: the ``model_type``.
      architecture: how the names of its architectures begin.
      pad_token: ``pad_token_id``, where the file leaves it out.
      counts_padding: positions are counted from zero, padding included; else from after
        ``pad_token``, without it.
      head: as in `EncoderConfig`.
    """

    family: str
    architecture: str
    pad_token: int
    counts_padding: bool
    head: Head


def read(dialect: Dialect, fields: Fields, architectures: Sequence[str]) -> EncoderConfig:
    """Reads an encoder's configuration.

    Args:
      dialect: of its family.
      fields: of its ``config.json``; what is understood is taken from them.
      architectures: what the file calls the model; under the heads of pre-training, the encoder
        alone is read.

    Raises:
      ValueError: a field is missing or has an unsupported value; the message names it.
    """
    embed_dim = fields.positive("hidden_size")
    num_heads = fields.positive("num_attention_heads")
    if embed_dim % num_heads:
        raise fields.error(
            "num_attention_heads", num_heads, f"does not divide hidden_size {embed_dim}"
        )
    fields.expect("position_embedding_type", "absolute")
    labels = read_labels(fields, architectures)
    pad_token = fields.take("pad_token_id", int, dialect.pad_token)
    num_positions = fields.positive("max_position_embeddings", default=512)
    first_position = 0 if dialect.counts_padding else pad_token + 1
    if pad_token < 0 or num_positions <= first_position:
        raise fields.error("pad_token_id", pad_token, "expected the id of a token")
    dropout = fields.probability("hidden_dropout_prob", 0.1)
    # The pooler and the head own no token prediction: whether that one is tied has no effect.
    fields.rest.pop("tie_word_embeddings", None)
    for name in ("bos_token_id", "eos_token_id"):
        fields.tokens(name)  # an encoder ends no text, but a bad value is one
    return EncoderConfig(
        family=dialect.family,
        vocab_size=fields.positive("vocab_size"),
        embed_dim=embed_dim,
        mlp_dim=fields.positive("intermediate_size"),
        num_layers=fields.num_layers(),
        num_heads=num_heads,
        num_positions=num_positions,
        num_token_types=fields.positive("type_vocab_size", default=2),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        norm_epsilon=fields.epsilon("layer_norm_eps", 1e-12),
        pad_token=pad_token,
        dropout=dropout,
        attention_dropout=fields.probability("attention_probs_dropout_prob", 0.1),
        head_dropout=fields.probability("classifier_dropout", dropout),
        num_labels=labels,
        first_position=first_position,
        head=dialect.head,
    )


def write(dialect: Dialect, config: EncoderConfig) -> dict[str, Any]:
    """Writes an encoder's configuration as the fields of a ``config.json``, the inverse of `read`.

    Args:
      dialect: of its family.
      config: the configuration.
    """
    head = "Model" if config.num_labels is None else CLASSIFIER
    return {
        "architectures": [dialect.architecture + head],
        "model_type": dialect.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.num_positions,
        "type_vocab_size": config.num_token_types,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_epsilon,
        "pad_token_id": config.pad_token,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.head_dropout,
        **write_labels(config.num_labels),
    }


def read_labels(fields: Fields, architectures: Sequence[str]) -> int | None:
    """The outputs of the classification head; None where the architecture has none."""
    # As in the reference, the names count where both are given.
    names = fields.take("id2label", dict, None)
    labels = fields.positive("num_labels", default=2) if names is None else len(names)
    if labels == 0:
        raise fields.error("id2label", names, "expected a name for each label")
    return labels if any(name.endswith(CLASSIFIER) for name in architectures) else None


def write_labels(labels: int | None) -> dict[str, Any]:
    """The fields that name the outputs of the classification head."""
    if labels is None:
        return {}
    names = [f"LABEL_{i}" for i in range(labels)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
