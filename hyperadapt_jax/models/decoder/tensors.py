"""The table of a decoder's tensors: what a checkpoint calls each parameter."""

from __future__ import annotations

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

    def add(name: str, path: str, transpose: bool = False, also: tuple[str, ...] = ()) -> None:
        # A headless checkpoint names its tensors without the leading "model.".
        bare = name.removeprefix("model.")
        aliases = (bare, *also) if bare != name else also
        table.append(Tensor(name, path, transpose, aliases=aliases))

    def linear(name: str, path: str, bias: bool) -> None:
        add(f"model.layers.{{layer}}.{name}.weight", f"layers/{path}/kernel", transpose=True)
        if bias:
            add(f"model.layers.{{layer}}.{name}.bias", f"layers/{path}/bias")

    def norm(name: str, path: str) -> None:
        add(f"model.layers.{{layer}}.{name}.weight", f"layers/{path}/scale")

    # A tied matrix may be stored as the head, also or alone.
    add("model.embed_tokens.weight", "embed/embedding", also=(HEAD,) if config.tied else ())
    norm("input_layernorm", "attn_norm")
    for part in ("qkv",) if config.fused else ("q", "k", "v"):
        linear(f"self_attn.{part}_proj", part, config.qkv_bias)
    if config.qk_norm:
        norm("self_attn.q_norm", "q_norm")
        norm("self_attn.k_norm", "k_norm")
    linear("self_attn.o_proj", "o", config.out_bias)
    norm("post_attention_layernorm", "mlp_norm")
    for part in ("gate_up", "down") if config.fused else ("gate", "up", "down"):
        linear(f"mlp.{part}_proj", part, config.mlp_bias)
    add("model.norm.weight", "norm/scale")
    if not config.tied:
        add(HEAD, "head/kernel", transpose=True)
    return tuple(table)


def ignored(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns of checkpoint names that hold no parameter of the model.

    Args:
      config: the architecture.

    Returns:
      Full-match regular expressions: tables that are computed anew.
    """
    return (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
