"""The table of a decoder's tensors: what a checkpoint calls each parameter."""

from __future__ import annotations

import dataclasses

from hyperadapt_jax.models.checkpoint.reading import Checkpoint
from hyperadapt_jax.models.checkpoint.table import Rows, Tensor
from hyperadapt_jax.models.decoder.config import DecoderConfig

HEAD = "lm_head.weight"


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """The checkpoint's tensors and their places, each parameter exactly once.

    Args:
      config: the architecture.

    Returns:
      One `Tensor` per parameter; a tied head has none.
    """
    rows, head = Rows("model.", ""), Rows("")  # a headless checkpoint has no prefix
    layer = "layers.{layer}"
    # A tied matrix may be stored as the head, also or alone.
    tied = (HEAD,) if config.tie_embeddings else ()
    rows.add("embed_tokens.weight", "embed/embedding", "vocab embed", *tied)
    rows.add(f"{layer}.input_layernorm.weight", "layers/attn_norm/scale", "layers norm")
    projections = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
    for name, outputs in ({"qkv": "qkv"} if config.fused else projections).items():
        axes = f"layers embed {outputs}"
        rows.linear(f"{layer}.self_attn.{name}_proj", f"layers/{name}", axes, bias=config.qkv_bias)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        rows.add(f"{layer}.self_attn.{name}.weight", f"layers/{name}/scale", "layers head_dim")
    axes = "layers heads embed"
    rows.linear(f"{layer}.self_attn.o_proj", "layers/o", axes, bias=config.out_bias)
    rows.add(f"{layer}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "layers norm")
    projections = {"gate": "mlp", "up": "mlp"}
    for name, outputs in ({"gate_up": "gate_up"} if config.fused else projections).items():
        axes = f"layers embed {outputs}"
        rows.linear(f"{layer}.mlp.{name}_proj", f"layers/{name}", axes, bias=config.mlp_bias)
    axes = "layers mlp embed"
    rows.linear(f"{layer}.mlp.down_proj", "layers/down", axes, bias=config.mlp_bias)
    rows.add("norm.weight", "norm/scale", "norm")
    if not config.tie_embeddings:
        head.add(HEAD, "head/kernel", "embed vocab", transpose=True)
    return (*rows.table, *head.table)


def ignored(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns of checkpoint names that hold no parameter of the model.

    Args:
      config: the architecture.

    Returns:
      Full-match regular expressions: tables that the model computes itself.
    """
    return (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def as_stored(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """Finds from the weights whether the head is the embedding.

    A head that is stored together with the embedding is the head, whatever ``tie_word_embeddings``
    says, unless both are equal.

    Args:
      config: the architecture, as ``config.json`` has it.
      checkpoint: its weights.

    Raises:
      CheckpointError: a file of the weights cannot be read.
    """
    if not config.tie_embeddings or HEAD not in checkpoint.tensors:
        return config
    (embedding,) = (tensor for tensor in tensors(config) if tensor.path == "embed/embedding")
    name = checkpoint.name_of(embedding) or HEAD
    tied = name == HEAD or checkpoint.equal(HEAD, name)
    return dataclasses.replace(config, tie_embeddings=tied)
