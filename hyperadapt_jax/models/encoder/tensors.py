"""The table of an encoder's tensors: what a checkpoint calls each parameter."""

from __future__ import annotations

import dataclasses

from hyperadapt_jax.models.checkpoint.reading import Checkpoint
from hyperadapt_jax.models.checkpoint.table import Rows, Tensor
from hyperadapt_jax.models.encoder.config import CLASSIFIER, EncoderConfig

# The heads of a checkpoint are stored next to the encoder. By the ends of their architectures:
HEADS = {
    "ForMaskedLM": r"(cls\.predictions|lm_head)\..*",
    "ForPreTraining": r"cls\.(?!predictions\.).*",
    CLASSIFIER: r"classifier\..*",
}


def tensors(config: EncoderConfig, prefix: str) -> tuple[Tensor, ...]:
    """The checkpoint's tensors and their places, each parameter exactly once.

    Args:
      config: the architecture.
      prefix: what the encoder's names begin with in a checkpoint that has a head.

    Returns:
      One `Tensor` per parameter; the pooler and the head may be missing in a checkpoint.
    """
    # A checkpoint of the model alone has no prefix; one with a head has it, but for the head.
    rows, head = Rows(*((prefix, "") if config.num_labels is not None else ("", prefix))), Rows("")
    rows.add("embeddings.word_embeddings.weight", "embed/words/embedding", "vocab embed")
    positions = "embeddings.position_embeddings.weight"
    rows.add(positions, "embed/positions/embedding", "positions embed")
    rows.add("embeddings.token_type_embeddings.weight", "embed/types/embedding", "types embed")
    rows.layer_norm("embeddings.LayerNorm", "embed/norm", "norm")
    layer = "encoder.layer.{layer}"
    for name, path in (("query", "q"), ("key", "k"), ("value", "v")):
        rows.linear(f"{layer}.attention.self.{name}", f"layers/{path}", "layers embed heads")
    rows.linear(f"{layer}.attention.output.dense", "layers/o", "layers heads embed")
    rows.layer_norm(f"{layer}.attention.output.LayerNorm", "layers/attn_norm", "layers norm")
    rows.linear(f"{layer}.intermediate.dense", "layers/up", "layers embed mlp")
    rows.linear(f"{layer}.output.dense", "layers/down", "layers mlp embed")
    rows.layer_norm(f"{layer}.output.LayerNorm", "layers/mlp_norm", "layers norm")
    if config.pooler:
        rows.linear("pooler.dense", "pooler", "embed pooled", optional=True)
    if config.num_labels is not None and config.head == "pooled":
        head.linear("classifier", "classifier/out", "pooled labels", optional=True)
    elif config.num_labels is not None:
        head.linear("classifier.dense", "classifier/dense", "embed pooled", optional=True)
        head.linear("classifier.out_proj", "classifier/out", "pooled labels", optional=True)
    return (*rows.table, *head.table)


def ignored(config: EncoderConfig) -> tuple[str, ...]:
    """Patterns of checkpoint names that hold no parameter of the model.

    Args:
      config: the architecture.

    Returns:
      Full-match regular expressions: tables of positions, heads that predict tokens, and the
      pooler and classifier where the model has none.
    """
    patterns = [r"((bert|roberta)\.)?embeddings\.(position_ids|token_type_ids)"]
    patterns += [
        head for end, head in HEADS.items() if end != CLASSIFIER or config.num_labels is None
    ]
    if not config.pooler:
        patterns.append(r"((bert|roberta)\.)?pooler\..*")
    return tuple(patterns)


def as_stored(config: EncoderConfig, checkpoint: Checkpoint, prefix: str) -> EncoderConfig:
    """Finds from the weights whether an encoder without a head has a pooler.

    Args:
      config: the architecture, as ``config.json`` has it.
      checkpoint: its weights.
      prefix: as in `tensors`.
    """
    if config.num_labels is not None:
        return dataclasses.replace(config, pooled=True)
    rows = (row for row in tensors(config, prefix) if row.path.startswith("pooler/"))
    return dataclasses.replace(config, pooled=any(checkpoint.name_of(row) for row in rows))
