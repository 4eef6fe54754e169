"""The table of a decoder's tensors: what a checkpoint calls each parameter."""

from __future__ import annotations

import dataclasses

from hyperadapt_jax.models.checkpoint.reading import Checkpoint
from hyperadapt_jax.models.checkpoint.table import Tensor
from hyperadapt_jax.models.decoder.config import DecoderConfig

HEAD = "lm_head.weight"


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """The checkpoint's tensors and their places, each parameter exactly once.

    Args:
      config: the architecture.

    Returns:
      One `Tensor` per parameter; a tied head has none.
    """
    table: list[Tensor] = []

    def add(name: str, path: str, axes: str, *also: str, transpose: bool = False) -> None:
        # A headless checkpoint names its tensors without the leading "model.".
        bare = name.removeprefix("model.")
        aliases = (bare, *also) if bare != name else also
        table.append(Tensor(name, path, transpose, aliases=aliases, axes=axes))

    def linear(name: str, path: str, axes: str, bias: bool) -> None:
        name, path = f"model.layers.{{layer}}.{name}", f"layers/{path}"
        add(f"{name}.weight", f"{path}/kernel", f"layers {axes}", transpose=True)
        if bias:
            add(f"{name}.bias", f"{path}/bias", f"layers {axes.split()[-1]}")

    def norm(name: str, path: str, axis: str = "norm") -> None:
        add(f"model.layers.{{layer}}.{name}.weight", f"layers/{path}/scale", f"layers {axis}")

    # A tied matrix may be stored as the head, also or alone.
    tied = (HEAD,) if config.tied else ()
    add("model.embed_tokens.weight", "embed/embedding", "vocab embed", *tied)
    norm("input_layernorm", "attn_norm")
    projections = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
    for part, outputs in ({"qkv": "qkv"} if config.fused else projections).items():
        linear(f"self_attn.{part}_proj", part, f"embed {outputs}", config.qkv_bias)
    if config.qk_norm:
        norm("self_attn.q_norm", "q_norm", "head_dim")
        norm("self_attn.k_norm", "k_norm", "head_dim")
    linear("self_attn.o_proj", "o", "heads embed", config.out_bias)
    norm("post_attention_layernorm", "mlp_norm")
    for part, outputs in (
        {"gate_up": "gate_up"} if config.fused else {"gate": "mlp", "up": "mlp"}
    ).items():
        linear(f"mlp.{part}_proj", part, f"embed {outputs}", config.mlp_bias)
    linear("mlp.down_proj", "down", "mlp embed", config.mlp_bias)
    add("model.norm.weight", "norm/scale", "norm")
    if not config.tied:
        add(HEAD, "head/kernel", "embed vocab", transpose=True)
    return tuple(table)


def ignored(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns of checkpoint names that hold no parameter of the model.

    Args:
      config: the architecture.

    Returns:
      Full-match regular expressions: tables that are computed anew.
    """
    return (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def as_stored(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """Tell by the weights whether the head is the embedding.

    A head that is stored together with the embedding is the head, whatever ``tie_word_embeddings``
    says, unless both are equal.

    Args:
      config: the architecture, as ``config.json`` has it.
      checkpoint: its weights.

    Raises:
      CheckpointError: a file of the weights cannot be read.
    """
    if not config.tied or HEAD not in checkpoint.tensors:
        return config
    (embedding,) = (tensor for tensor in tensors(config) if tensor.path == "embed/embedding")
    name = checkpoint.name_of(embedding)
    return dataclasses.replace(config, tied=name == HEAD or checkpoint.equal(HEAD, name))
