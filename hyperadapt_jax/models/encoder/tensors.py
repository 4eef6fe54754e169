"""The table of an encoder's tensors: what a checkpoint calls each parameter."""

from __future__ import annotations

from hyperadapt_jax.models.checkpoint.table import Tensor
from hyperadapt_jax.models.encoder.config import CLASSIFIER, EncoderConfig

# The heads of a checkpoint stand beside the encoder. By the ends of their architectures:
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
    # A checkpoint of the model alone has no prefix; one with a head has it.
    prefixed = config.labels is not None
    table: list[Tensor] = []

    def add(bare: str, path: str, transpose: bool = False, optional: bool = False) -> None:
        name, alias = (prefix + bare, bare) if prefixed else (bare, prefix + bare)
        table.append(Tensor(name, path, transpose, optional, aliases=(alias,)))

    def linear(name: str, path: str, **options: bool) -> None:
        add(f"{name}.weight", f"{path}/kernel", transpose=True, **options)
        add(f"{name}.bias", f"{path}/bias", **options)

    def norm(name: str, path: str) -> None:
        # Checkpoints of TensorFlow's age say gamma and beta.
        for new, old, part in (("weight", "gamma", "scale"), ("bias", "beta", "bias")):
            add(f"{name}.{new}", f"{path}/{part}")
            last = table.pop()
            old_names = tuple(n.removesuffix(new) + old for n in (last.name, *last.aliases))
            table.append(Tensor(last.name, last.path, aliases=(*last.aliases, *old_names)))

    for name, path in (("word", "words"), ("position", "positions"), ("token_type", "types")):
        add(f"embeddings.{name}_embeddings.weight", f"embed/{path}/embedding")
    norm("embeddings.LayerNorm", "embed/norm")
    layer = "encoder.layer.{layer}"
    for name, path in (("query", "q"), ("key", "k"), ("value", "v")):
        linear(f"{layer}.attention.self.{name}", f"layers/{path}")
    linear(f"{layer}.attention.output.dense", "layers/o")
    norm(f"{layer}.attention.output.LayerNorm", "layers/attn_norm")
    linear(f"{layer}.intermediate.dense", "layers/up")
    linear(f"{layer}.output.dense", "layers/down")
    norm(f"{layer}.output.LayerNorm", "layers/mlp_norm")
    if config.pooler:
        linear("pooler.dense", "pooler", optional=True)
    if config.labels is not None:
        # The head stands beside the encoder, without its prefix.
        parts = (
            (("classifier", "out"),)
            if config.head == "pooled"
            else (
                ("classifier.dense", "dense"),
                ("classifier.out_proj", "out"),
            )
        )
        for name, path in parts:
            table.append(Tensor(f"{name}.weight", f"classifier/{path}/kernel", True, optional=True))
            table.append(Tensor(f"{name}.bias", f"classifier/{path}/bias", optional=True))
    return tuple(table)


def ignored(config: EncoderConfig) -> tuple[str, ...]:
    """Patterns of checkpoint names that hold no parameter of the model.

    Args:
      config: the architecture.

    Returns:
      Full-match regular expressions: tables of positions, heads that predict tokens, and the
      pooler and classifier where the model has none.
    """
    patterns = [r"((bert|roberta)\.)?embeddings\.(position_ids|token_type_ids)"]
    patterns += [head for end, head in HEADS.items() if end != CLASSIFIER or config.labels is None]
    if not config.pooler:
        patterns.append(r"((bert|roberta)\.)?pooler\..*")
    return tuple(patterns)
