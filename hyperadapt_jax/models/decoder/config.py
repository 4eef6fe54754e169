"""The configuration of a decoder: its fields, and how the families' files say them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from hyperadapt_jax.models.fields import Fields, is_finite
from hyperadapt_jax.models.layers import ACTIVATIONS
from hyperadapt_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal language model of the Llama shape: pre-norm, rotary positions, gated MLP.

    Attributes:
      family: ``model_type`` of the checkpoint, which names its tensors.
      vocab_size: tokens, V.
      embed_dim: residual stream, D.
      mlp_dim: hidden units of the MLP, F.
      num_layers: number of layers, L.
      num_heads: query heads, N.
      num_kv_heads: key and value heads, K; N is a multiple of K.
      head_dim: H.
      max_length: longest sequence of pre-training, in tokens.
      activation: name of the MLP's activation.
      norm_epsilon: added to the mean square in RMSNorm.
      rope: rotary position embedding.
      windows: per layer, how many tokens back it sees, itself included; None for all.
      qkv_bias: query, key and value projections have a bias.
      out_bias: the attention's output projection has a bias.
      mlp_bias: the MLP's projections have a bias.
      qk_norm: queries and keys are normalized per head.
      fused: query, key and value are one matrix, gate and up another.
      tie_embeddings: the head is the embedding.
      bos_token: first token of a sequence, or None.
      eos_tokens: tokens that end a sequence: of `generate`, the ``stop_tokens``.
      pad_token: token of padding, or None.
    """

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    activation: str
    norm_epsilon: float
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    tie_embeddings: bool = False
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    pad_token: int | None = None


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What sets the ``config.json`` of one family of decoders apart from those of the others.

    Attributes:
      family: the ``model_type``.
      architecture: what the file calls the model.
      max_length: ``max_position_embeddings``, where the file leaves it out.
      num_kv_heads: ``num_key_value_heads``, where left out; None for as many as there are query
        heads.
      head_dim: where left out; None for ``hidden_size`` divided by the heads.
      norm_epsilon: ``rms_norm_eps``, where left out.
      qkv_bias: query, key and value projections have a bias, whatever the file says.
      qk_norm: queries and keys are normalized per head.
      fused: query, key and value are one matrix, gate and up another.
      windows: which layers a ``sliding_window`` is for; ``some`` are named by further fields.
      window: ``sliding_window``, where left out.
      switches: the biases that the file may switch on.
      constants: fields with the only value that they may have.
      rope_kinds: the scalings of the rotary frequencies that there are.
      rope_aliases: other names of them.
      partial_rope: ``partial_rotary_factor`` may leave a part of each head as it is.
      original_length: ``original_max_position_embeddings`` next to the scaling, where left out;
        None where there is no such field.
      recomputes: as `Rope.recomputes` of a ``longrope``.
    """

    family: str
    architecture: str
    max_length: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    windows: Literal["none", "some", "all"] = "all"
    window: int | None = None
    switches: tuple[str, ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()
    rope_kinds: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    rope_aliases: tuple[tuple[str, str], ...] = ()
    partial_rope: bool = False
    original_length: int | None = None
    recomputes: bool = False


def read(dialect: Dialect, fields: Fields, architectures: Sequence[str]) -> DecoderConfig:
    """Reads a decoder's configuration.

    Args:
      dialect: of its family.
      fields: of its ``config.json``; what is understood is taken from them.
      architectures: what the file calls the model.

    Raises:
      ValueError: a field is missing or has an unsupported value; the message names it.
    """
    embed_dim = fields.positive("hidden_size")
    num_layers = fields.num_layers()
    num_heads = fields.positive("num_attention_heads")
    # A missing field means the family's default, where that can be meant, and null as many as there
    # are query heads.
    num_kv_heads = dialect.num_kv_heads or num_heads
    if "num_key_value_heads" in fields.rest or num_heads % num_kv_heads:
        num_kv_heads = num_heads
    num_kv_heads = fields.positive("num_key_value_heads", default=num_kv_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", num_kv_heads, f"does not divide {num_heads} heads"
        )
    head_dim = fields.positive("head_dim", default=dialect.head_dim or embed_dim // num_heads)
    max_length = fields.positive("max_position_embeddings", default=dialect.max_length)
    # Dropout of these decoders is zero in every released checkpoint; another value would train
    # another model.
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        fields.expect(name, 0, 0.0)
    for name, value in dialect.constants:
        fields.expect(name, value)
    attention_bias = _switch(fields, "attention_bias", dialect, dialect.qkv_bias)
    mlp_bias = _switch(fields, "mlp_bias", dialect, False)
    return DecoderConfig(
        family=dialect.family,
        vocab_size=fields.positive("vocab_size"),
        embed_dim=embed_dim,
        mlp_dim=fields.positive("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_length=max_length,
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        norm_epsilon=fields.epsilon("rms_norm_eps", dialect.norm_epsilon),
        rope=_rope(fields, dialect, head_dim, max_length),
        windows=_windows(fields, dialect, num_layers),
        qkv_bias=attention_bias or dialect.qkv_bias,
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=dialect.qk_norm,
        fused=dialect.fused,
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        bos_token=fields.token("bos_token_id"),
        eos_tokens=fields.tokens("eos_token_id"),
        pad_token=fields.token("pad_token_id"),
    )


def _switch(fields: Fields, name: str, dialect: Dialect, fixed: bool) -> bool:
    """A switch of biases; where the family has none, the field can only repeat what is fixed."""
    if name in dialect.switches:
        return fields.take(name, bool, False)
    fields.expect(name, fixed)
    return False


def _windows(fields: Fields, dialect: Dialect, layers: int) -> tuple[int | None, ...]:
    if dialect.windows == "none":
        fields.expect("sliding_window")
        return (None,) * layers
    # A missing field means the family's default, and null no window.
    default = None if "sliding_window" in fields.rest else dialect.window
    window = fields.positive("sliding_window", default=default)
    if dialect.windows == "all":
        return (window,) * layers
    if not fields.take("use_sliding_window", bool, False):
        window = None
    first = fields.take("max_window_layers", int, 28)
    types = fields.take("layer_types", list, None)
    if types is None:
        sliding = [window is not None and layer >= first for layer in range(layers)]
    else:
        kinds = ("full_attention", "sliding_attention")
        if len(types) != layers or any(kind not in kinds for kind in types):
            raise fields.error(
                "layer_types",
                types,
                f"expected {layers} times 'full_attention' or 'sliding_attention'",
            )
        sliding = [kind == "sliding_attention" for kind in types]
        if any(sliding) and window is None:
            raise fields.error("layer_types", types, "sliding layers without a sliding_window")
    return tuple(window if slides else None for slides in sliding)


def _rope(fields: Fields, dialect: Dialect, head_dim: int, max_length: int) -> Rope:
    theta = fields.positive("rope_theta", float, None)
    fraction = fields.positive("partial_rotary_factor", float, None)
    outer_original = None
    if dialect.original_length is not None:
        outer_original = fields.positive(
            "original_max_position_embeddings", default=dialect.original_length
        )
    scaling = fields.take("rope_scaling", dict, None)
    scaling = {**(fields.take("rope_parameters", dict, None) or {}), **(scaling or {})}
    inner = Fields(scaling, f"{fields.where}: rope_scaling")
    legacy_kind = inner.take("type", str, "default")
    kind = inner.take("rope_type", str, legacy_kind)
    kind = dict(dialect.rope_aliases).get(kind, kind)
    if kind not in dialect.rope_kinds:
        kinds = ", ".join(sorted(dialect.rope_kinds))
        raise inner.error("rope_type", kind, f"not supported for {dialect.family}; one of {kinds}")
    theta = inner.positive("rope_theta", float, theta or 10000.0)
    fraction = inner.positive("partial_rotary_factor", float, fraction or 1.0)
    if fraction != 1.0 and not dialect.partial_rope:
        reason = f"{dialect.family} rotates whole heads"
        raise inner.error("partial_rotary_factor", fraction, reason)
    rotated = int(head_dim * fraction) if fraction <= 1.0 else 0
    if rotated < 2 or rotated % 2:
        raise inner.error(
            "partial_rotary_factor",
            fraction,
            f"expected to rotate an even part of the {head_dim} dimensions of a head",
        )
    rope = Rope(theta=theta, kind=kind, fraction=fraction)
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        rope = dataclasses.replace(rope, factor=inner.positive("factor", float))
    if kind == "dynamic" and rotated < 4:
        raise inner.error("rope_type", kind, f"needs four rotated dimensions, found {rotated}")
    if kind == "dynamic":
        # The reference stretches from max_position_embeddings, whatever else the file says.
        inner.rest.pop("original_max_position_embeddings", None)
        rope = dataclasses.replace(rope, original_length=max_length)
    if kind == "llama3":
        rope = dataclasses.replace(
            rope,
            original_length=inner.positive("original_max_position_embeddings", default=max_length),
            low_frequency_factor=inner.positive("low_freq_factor", float),
            high_frequency_factor=inner.positive("high_freq_factor", float),
        )
        if rope.high_frequency_factor <= rope.low_frequency_factor:
            raise inner.error(
                "high_freq_factor", rope.high_frequency_factor, "must be above low_freq_factor"
            )
    if kind == "yarn":
        rope = _yarn(inner, rope, max_length)
    if kind == "longrope":
        rope = dataclasses.replace(rope, recomputes=dialect.recomputes)
        rope = _longrope(inner, rope, rotated // 2, max_length, outer_original)
    # Without stretching, the length of pre-training has no effect.
    inner.rest.pop("original_max_position_embeddings", None)
    if kind in ("default", "linear"):
        inner.expect("factor", rope.factor)
    if inner.rest:
        name, value = next(iter(inner.rest.items()))
        raise inner.error(name, value, f"not understood for rope_type {kind!r}")
    return rope


def _yarn(fields: Fields, rope: Rope, max_length: int) -> Rope:
    def inferred(weight: float = 1.0) -> float:
        return 1.0 + 0.1 * weight * math.log(rope.factor) if rope.factor > 1.0 else 1.0

    weights = [fields.take(name, float, None) for name in ("mscale", "mscale_all_dim")]
    amplitude = inferred(weights[0]) / inferred(weights[1]) if all(weights) else inferred()
    fields.rest.pop("attn_factor", None)  # a name that the reference does not read either
    fields.expect("truncate", True)
    rope = dataclasses.replace(
        rope,
        original_length=fields.positive("original_max_position_embeddings", default=max_length),
        low_frequency_factor=fields.positive("beta_slow", float, 1.0),
        high_frequency_factor=fields.positive("beta_fast", float, 32.0),
        amplitude=fields.positive("attention_factor", float, amplitude),
    )
    if rope.theta <= 1.0:
        raise fields.error("rope_theta", rope.theta, "expected more than one for rope_type 'yarn'")
    return rope


def _longrope(
    fields: Fields, rope: Rope, frequencies: int, max_length: int, original: int | None
) -> Rope:
    inner_original = fields.positive("original_max_position_embeddings", default=max_length)
    original = original or inner_original
    stretch = fields.positive("factor", float, max_length / original)
    amplitude = 1.0
    if original < 2:
        raise fields.error("original_max_position_embeddings", original, "expected two or more")
    if stretch > 1.0:
        amplitude = math.sqrt(1.0 + math.log(stretch) / math.log(original))
    factors = []
    for name in ("short_factor", "long_factor"):
        values = fields.take(name, list)
        if len(values) != frequencies or not all(is_finite(v) and v > 0 for v in values):
            raise fields.error(name, values, f"expected {frequencies} positive numbers")
        factors.append(tuple(float(v) for v in values))
    return dataclasses.replace(
        rope,
        factor=stretch,
        original_length=original,
        short_factors=factors[0],
        long_factors=factors[1],
        amplitude=fields.positive("attention_factor", float, amplitude),
    )


def write(dialect: Dialect, config: DecoderConfig) -> dict[str, Any]:
    """Writes a decoder's configuration as the fields of a ``config.json``, the inverse of `read`.

    Args:
      dialect: of its family.
      config: the configuration.
    """
    raw: dict[str, Any] = {
        "architectures": [dialect.architecture],
        "model_type": dialect.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token,
        "eos_token_id": list(config.eos_tokens) or None,
        "pad_token_id": config.pad_token,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
    }
    if len(config.eos_tokens) == 1:
        raw["eos_token_id"] = config.eos_tokens[0]
    if "attention_bias" in dialect.switches:
        raw["attention_bias"] = config.out_bias
    if "mlp_bias" in dialect.switches:
        raw["mlp_bias"] = config.mlp_bias
    window = next((w for w in config.windows if w is not None), None)
    if dialect.windows != "none":
        raw["sliding_window"] = window
    if dialect.windows == "some":
        raw["use_sliding_window"] = window is not None
        raw["layer_types"] = [
            "full_attention" if w is None else "sliding_attention" for w in config.windows
        ]
    if dialect.partial_rope:
        raw["partial_rotary_factor"] = config.rope.fraction
    if dialect.original_length is not None and config.rope.kind == "longrope":
        raw["original_max_position_embeddings"] = config.rope.original_length
    return raw


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind == "longrope":
        return scaling | {
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
            "factor": rope.factor,
            "attention_factor": rope.amplitude,
            "original_max_position_embeddings": rope.original_length,
        }
    scaling["factor"] = rope.factor
    if rope.kind == "yarn":
        scaling |= {
            "beta_slow": rope.low_frequency_factor,
            "beta_fast": rope.high_frequency_factor,
            "attention_factor": rope.amplitude,
            "original_max_position_embeddings": rope.original_length,
        }
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    return scaling
