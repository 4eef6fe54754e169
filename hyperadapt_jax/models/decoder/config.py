"""Model configurations, read from a Hugging Face ``config.json``.

Each field of the file is either read, checked against the only value the model implements, or
listed as one that does not change the model. Anything else is an error that names the field: a
configuration is never read as another model.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

from hyperadapt_jax.models.checkpoint.hub import read_json
from hyperadapt_jax.models.layers import ACTIVATIONS
from hyperadapt_jax.models.rope import Rope

# Fields that change neither the parameters nor the function of a model, and why. So do fields that
# are null, and those that begin with an underscore.
IGNORED_FIELDS: dict[str, str] = {
    **dict.fromkeys(
        (
            "transformers_version",
            "name_or_path",
            "auto_map",
            "tokenizer_class",
            "prefix",
            "finetuning_task",
            "task_specific_params",
            "unsloth_fixed",
            "unsloth_version",
            "transformers.js_config",
            "internal_version",
            "language",
            "license",
            "name",
            "model_name",
        ),
        "says where the checkpoint came from; remote code is never run",
    ),
    **dict.fromkeys(
        (
            "dtype",
            "torch_dtype",
            "torchscript",
            "tf_legacy_loss",
            "use_bfloat16",
            "attn_implementation",
            "use_flash_attn",
            "use_flash_attention_2",
            "fp16",
            "bf16",
            "fp32",
            "pretraining_tp",
            "chunk_size_feed_forward",
            "gradient_checkpointing",
            "use_cache",
            "xla_device",
        ),
        "says how torch computes or stores, not what",
    ),
    **dict.fromkeys(
        (
            "return_dict",
            "use_return_dict",
            "output_attentions",
            "output_hidden_states",
            "output_past",
        ),
        "says what torch returns",
    ),
    **dict.fromkeys(
        ("max_sequence_length", "model_max_length", "seq_length", "max_seq_length"),
        "says how long the texts of training were; max_position_embeddings alone is read",
    ),
    **dict.fromkeys(
        ("dual_chunk_attention_config",),
        "is read by servers of long contexts alone: the reference has no such attention",
    ),
    **dict.fromkeys(
        ("sentence_transformers", "sbert_ce_default_activation_function"),
        "says what sentence-transformers does with the outputs",
    ),
    **dict.fromkeys(
        (
            "directionality",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        ),
        "was written into the first multilingual BERT files and is read by no implementation",
    ),
    **dict.fromkeys(
        (
            "label2id",
            "id2label",
            "num_labels",
            "classifier_dropout",
            "problem_type",
            "initializer_range",
            "initializer_factor",
        ),
        "concerns the loss, a head that the model lacks, or a new checkpoint's start",
    ),
    **dict.fromkeys(
        (
            "sep_token_id",
            "cls_token_id",
            "mask_token_id",
            "unk_token_id",
            "decoder_start_token_id",
            "eos_token_ids",
            "bos_token",
            "eos_token",
            "pad_token",
            "unk_token",
            "sep_token",
            "cls_token",
            "mask_token",
        ),
        "concerns the tokenizer, whose own files are read",
    ),
    **dict.fromkeys(
        (
            "max_length",
            "min_length",
            "do_sample",
            "early_stopping",
            "num_beams",
            "temperature",
            "num_beam_groups",
            "diversity_penalty",
            "top_k",
            "top_p",
            "typical_p",
            "bad_words_ids",
            "repetition_penalty",
            "length_penalty",
            "no_repeat_ngram_size",
            "num_return_sequences",
            "encoder_no_repeat_ngram_size",
            "output_scores",
            "return_dict_in_generate",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "remove_invalid_values",
            "exponential_decay_length_penalty",
            "suppress_tokens",
            "begin_suppress_tokens",
        ),
        "is a default of generation, which takes its options from the call",
    ),
}

_DECODERS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
# What a family has where its file leaves the field out.
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_LENGTHS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768, "phi3": 4096}
_ENCODERS = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
}
# Under the heads of pre-training, the encoder alone is read.
_CLASSIFIER = "ForSequenceClassification"
_ENCODER_HEADS = ("Model", "ForMaskedLM", "ForPreTraining", _CLASSIFIER)
_MOST_LAYERS = 10_000  # a configuration holds a window for each: no file may ask for gigabytes
_LARGEST = 2**31 - 1  # sizes and token numbers are 32-bit integers
# NVIDIA's exporter leaves config.json as it was, and says here that the weights are quantized.
_QUANTIZATION_FILE = "hf_quant_config.json"
_GENERATION_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal language model of the Llama shape: pre-norm, rotary positions, gated MLP.

    Attributes:
      family: ``model_type`` of the checkpoint, which names its tensors.
      vocab_size: tokens, V.
      width: residual stream, D.
      mlp_width: hidden units of the MLP, F.
      layers: number of layers, L.
      heads: query heads, N.
      kv_heads: key and value heads, K; N is a multiple of K.
      head_dim: H.
      max_length: longest sequence of pre-training, in tokens.
      activation: name of the MLP's activation.
      norm_epsilon: added to the mean square in RMSNorm.
      rope: rotary position embedding.
      windows: per layer, how many tokens back it sees, itself included; None for all.
      qkv_bias: query, key and value projections have a bias.
      out_bias: the attention's output projection has a bias.
      mlp_bias: the MLP's projections have a bias.
      qk_norm: queries and keys are normalised per head.
      fused: query, key and value are one matrix, gate and up another.
      tied: the head is the embedding.
      bos_token: first token of a sequence, or None.
      eos_tokens: tokens that end a sequence: of `generate`, the ``stop_tokens``.
      pad_token: token of padding, or None.
    """

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
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
    tied: bool = False
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    pad_token: int | None = None


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional encoder of the BERT shape: post-norm, learned positions.

    Attributes:
      family: ``model_type`` of the checkpoint, which names its tensors and its head.
      vocab_size: tokens, V.
      width: residual stream, D.
      mlp_width: hidden units of the MLP, F.
      layers: number of layers, L.
      heads: attention heads, N; D is a multiple of N.
      positions: rows of the position table.
      token_types: rows of the token-type table.
      activation: name of the MLP's activation.
      norm_epsilon: added to the variance in LayerNorm.
      pad_token: token of padding; positions of RoBERTa count on from it.
      dropout: probability on embeddings and on the outputs of attention and MLP.
      attention_dropout: probability on attention weights.
      head_dropout: probability before the classification head.
      labels: outputs of the classification head (1 for regression), or None without a head.
      pooled: without a head, there is a pooler; not every checkpoint has one.
    """

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    positions: int
    token_types: int
    activation: str
    norm_epsilon: float
    pad_token: int
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float = 0.1
    labels: int | None = None
    pooled: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head, H."""
        return self.width // self.heads

    @property
    def pooler(self) -> bool:
        """Whether there is a pooler: with a head, in BERT alone."""
        return self.pooled if self.labels is None else self.family == "bert"

    @property
    def max_length(self) -> int:
        """Longest sequence, in tokens: RoBERTa's positions begin after that of its padding."""
        return self.positions - (0 if self.family == "bert" else self.pad_token + 1)


Config = DecoderConfig | EncoderConfig

_REQUIRED = object()

# How a value of any size or depth looks in an error of one line.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 40


class _Fields:
    """The fields of one ``config.json``, each of which has to be taken before `finish`."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.rest = dict(raw)
        self.where = where

    def error(self, name: str, value: Any, reason: str) -> ValueError:
        return ValueError(f"{self.where}: field {name!r} = {_SHORT.repr(value)}: {reason}")

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of a field, of the given type; null stands for a missing field."""
        value = self.rest.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.where}: field {name!r} is missing")
            return default
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = {int: whole, float: whole or isinstance(value, float)}
        if not fits.get(kind, isinstance(value, kind)):
            raise self.error(name, value, f"expected {kind.__name__}")
        if kind is int and abs(value) > _LARGEST:
            raise self.error(name, value, f"expected at most {_LARGEST}")
        if kind is not float:
            return value
        if not _finite(value):
            raise self.error(name, value, "expected a finite number")
        return float(value)

    def positive(self, name: str, kind: type = int, default: Any = _REQUIRED) -> Any:
        value = self.take(name, kind, default)
        if value is not None and value <= 0:
            raise self.error(name, value, "expected a positive number")
        return value

    def epsilon(self, name: str, default: float) -> float:
        value = self.take(name, float, default)
        if value < 0:
            raise self.error(name, value, "expected zero or more")
        return value

    def probability(self, name: str, default: float) -> float:
        value = self.take(name, float, default)
        if not 0.0 <= value < 1.0:
            raise self.error(name, value, "expected a probability in [0, 1)")
        return value

    def choice(self, name: str, options: Any, default: Any = _REQUIRED) -> str:
        value = self.take(name, str, default)
        if value not in options:
            raise self.error(name, value, f"not supported; one of {', '.join(sorted(options))}")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Check a field that may be missing but has only these supported values."""
        value = self.rest.pop(name, None)
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed)) or "null"
            raise self.error(name, value, f"not supported; expected {wanted}")

    def finish(self) -> None:
        for name in IGNORED_FIELDS:
            self.rest.pop(name, None)
        # Switches that every model here leaves off.
        for name in (
            "is_encoder_decoder",
            "is_decoder",
            "add_cross_attention",
            "tie_encoder_decoder",
        ):
            self.expect(name, False)
        self.expect("pruned_heads", {})
        self.expect("quantization_config")
        # Null is no value, and an underscore marks what a library notes for itself.
        rest = {
            name: value
            for name, value in self.rest.items()
            if value is not None and not name.startswith("_")
        }
        if rest:
            name, value = next(iter(rest.items()))
            others = ", ".join(sorted(rest)[:8])
            raise self.error(
                name,
                value,
                f"not understood, so the model could differ from the reference (all such fields: "
                f"{others}); remove it from the file if it has no effect",
            )


def read_config(path: str | pathlib.Path) -> Config:
    """Read a model's configuration from its folder or from a ``config.json``.

    Where a ``generation_config.json`` lies next to it, a decoder's ``eos_tokens`` are those of that
    file, as transformers has it: chat models name the end of a turn there alone. Its other fields
    are defaults of generation, which takes its options from the call.

    Args:
      path: a folder that holds ``config.json``, or the file itself.

    Returns:
      A `DecoderConfig` or an `EncoderConfig`, by the file's ``model_type``.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is no JSON object, a field is missing, unknown or unsupported, or a file
        next to it says that the weights are quantized.
    """
    path = pathlib.Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face model folder")
    raw = read_json(file.parent, file.name)
    if (file.parent / _QUANTIZATION_FILE).exists():
        _check_unquantized(file.parent)
    config = config_from_dict(raw, where=str(file))
    generation = file.with_name(_GENERATION_FILE)
    if isinstance(config, DecoderConfig) and generation.exists():
        fields = _Fields(read_json(file.parent, _GENERATION_FILE), str(generation))
        if eos_tokens := _tokens(fields, "eos_token_id"):
            config = dataclasses.replace(config, eos_tokens=eos_tokens)
    return config


def _check_unquantized(folder: pathlib.Path) -> None:
    fields = _Fields(read_json(folder, _QUANTIZATION_FILE), str(folder / _QUANTIZATION_FILE))
    fields.rest = fields.take("quantization", dict)
    # The cache of keys and values may be quantized at will: it is no part of the checkpoint.
    if "quant_algo" not in fields.rest:
        raise ValueError(f"{fields.where}: field 'quantization' does not say its 'quant_algo'")
    fields.expect("quant_algo")


def _finite(value: Any) -> bool:
    """Whether a value is a finite number that fits a float, as no integer of 400 digits does."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def config_from_dict(raw: Mapping[str, Any], *, where: str = "config.json") -> Config:
    """Read a model's configuration from the fields of a ``config.json``.

    Args:
      raw: the fields.
      where: what to call their source in an error.

    Returns:
      A `DecoderConfig` or an `EncoderConfig`, by ``model_type``.

    Raises:
      ValueError: a field is missing, unknown or has an unsupported value; the message names it.

    >>> config_from_dict({"model_type": "mamba"})
    Traceback (most recent call last):
    ValueError: config.json: field 'model_type' = 'mamba': not supported; one of bert, camembert, \
llama, mistral, phi3, qwen2, qwen3, roberta, xlm-roberta
    """
    fields = _Fields(raw, where)
    family = fields.choice("model_type", {**_DECODERS, **_ENCODERS})
    architectures = fields.take("architectures", list, [])
    if family in _DECODERS:
        known = (_DECODERS[family],)
    else:
        known = tuple(_ENCODERS[family] + head for head in _ENCODER_HEADS)
    for architecture in architectures:
        if architecture not in known:
            raise fields.error("architectures", architectures, f"expected {' or '.join(known)}")
    if family in _DECODERS:
        config = _decoder(fields, family)
    else:
        classifies = any(a.endswith(_CLASSIFIER) for a in architectures)
        config = _encoder(fields, family, classifies)
    fields.finish()
    return config


def _tokens(fields: _Fields, name: str) -> tuple[int, ...]:
    value = fields.rest.pop(name, None)
    values = value if isinstance(value, list) else [] if value is None else [value]
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not whole or any(abs(v) > _LARGEST for v in values):
        raise fields.error(name, value, "expected a token number or a list of them")
    return tuple(values)


def _layers(fields: _Fields) -> int:
    layers = fields.positive("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise fields.error("num_hidden_layers", layers, f"expected at most {_MOST_LAYERS}")
    return layers


def _token(fields: _Fields, name: str) -> int | None:
    """A token's number, or None: files of the first Llama say -1 for a token that there is not."""
    value = fields.take(name, int, None)
    return None if value is None or value < 0 else value


def _decoder(fields: _Fields, family: str) -> DecoderConfig:
    width = fields.positive("hidden_size")
    layers = _layers(fields)
    heads = fields.positive("num_attention_heads")
    # A missing field means the family's default, where that can be meant, and null as many as there
    # are query heads.
    kv_heads = _KV_HEADS.get(family, heads)
    if "num_key_value_heads" in fields.rest or heads % kv_heads:
        kv_heads = heads
    kv_heads = fields.positive("num_key_value_heads", default=kv_heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", kv_heads, f"does not divide {heads} heads")
    default_head_dim = 128 if family == "qwen3" else width // heads
    head_dim = fields.positive("head_dim", default=default_head_dim)
    max_length = fields.positive("max_position_embeddings", default=_LENGTHS[family])
    # Dropout of these decoders is zero in every released checkpoint; another value would train
    # another model.
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        fields.expect(name, 0, 0.0)
    if family == "llama":
        fields.expect("is_llama_config", True)
        fields.expect("rope_interleaved", False)
    if family == "phi3":
        fields.expect("full_attn_mod", 1)
        fields.expect("interpolate_factor", 1)
        fields.expect("lm_head_bias", False)
    if family in ("qwen2", "qwen3"):
        fields.expect("use_mrope", False)
    # Llama and Qwen3 have switches for biases; elsewhere the field can only repeat the default.
    if family in ("llama", "qwen3"):
        attention_bias = fields.take("attention_bias", bool, False)
    else:
        fields.expect("attention_bias", family == "qwen2")
        attention_bias = False
    if family == "llama":
        mlp_bias = fields.take("mlp_bias", bool, False)
    else:
        fields.expect("mlp_bias", False)
        mlp_bias = False
    return DecoderConfig(
        family=family,
        vocab_size=fields.positive("vocab_size"),
        width=width,
        mlp_width=fields.positive("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_length=max_length,
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        norm_epsilon=fields.epsilon("rms_norm_eps", 1e-5 if family == "phi3" else 1e-6),
        rope=_rope(fields, family, head_dim, max_length),
        windows=_windows(fields, family, layers),
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        fused=family == "phi3",
        tied=fields.take("tie_word_embeddings", bool, False),
        bos_token=_token(fields, "bos_token_id"),
        eos_tokens=_tokens(fields, "eos_token_id"),
        pad_token=_token(fields, "pad_token_id"),
    )


def _windows(fields: _Fields, family: str, layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        fields.expect("sliding_window")
        return (None,) * layers
    # A missing field means the family's default, and null no window.
    default = 4096 if family != "phi3" and "sliding_window" not in fields.rest else None
    window = fields.positive("sliding_window", default=default)
    if family in ("mistral", "phi3"):
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


def _rope(fields: _Fields, family: str, head_dim: int, max_length: int) -> Rope:
    theta = fields.positive("rope_theta", float, None)
    fraction = fields.positive("partial_rotary_factor", float, None)
    outer_original = None
    if family == "phi3":
        outer_original = fields.positive("original_max_position_embeddings", default=4096)
    scaling = fields.take("rope_scaling", dict, None)
    scaling = {**(fields.take("rope_parameters", dict, None) or {}), **(scaling or {})}
    inner = _Fields(scaling, f"{fields.where}: rope_scaling")
    legacy_kind = inner.take("type", str, "default")
    kind = inner.take("rope_type", str, legacy_kind)
    kinds = {"default", "linear", "dynamic", "llama3", "yarn", "longrope"}
    if family == "phi3":
        kind = "longrope" if kind == "su" else kind
        kinds = {"default", "longrope"}
    if kind not in kinds:
        raise inner.error(
            "rope_type", kind, f"not supported for {family}; one of {', '.join(sorted(kinds))}"
        )
    theta = inner.positive("rope_theta", float, theta or 10000.0)
    fraction = inner.positive("partial_rotary_factor", float, fraction or 1.0)
    if fraction != 1.0 and family != "phi3":
        raise inner.error("partial_rotary_factor", fraction, f"{family} rotates whole heads")
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
        rope = _longrope(inner, rope, rotated // 2, max_length, outer_original)
    # Without stretching, the length of pre-training has no effect.
    inner.rest.pop("original_max_position_embeddings", None)
    if kind in ("default", "linear"):
        inner.expect("factor", rope.factor)
    if inner.rest:
        name, value = next(iter(inner.rest.items()))
        raise inner.error(name, value, f"not understood for rope_type {kind!r}")
    return rope


def _yarn(fields: _Fields, rope: Rope, max_length: int) -> Rope:
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
    fields: _Fields, rope: Rope, frequencies: int, max_length: int, original: int | None
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
        if len(values) != frequencies or not all(_finite(v) and v > 0 for v in values):
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


def _encoder(fields: _Fields, family: str, classifies: bool) -> EncoderConfig:
    width = fields.positive("hidden_size")
    heads = fields.positive("num_attention_heads")
    if width % heads:
        raise fields.error("num_attention_heads", heads, f"does not divide hidden_size {width}")
    fields.expect("position_embedding_type", "absolute")
    # As in the reference, the names count where both are given.
    names = fields.take("id2label", dict, None)
    labels = fields.positive("num_labels", default=2) if names is None else len(names)
    if labels == 0:
        raise fields.error("id2label", names, "expected a name for each label")
    pad_token = fields.take("pad_token_id", int, 0 if family == "bert" else 1)
    positions = fields.positive("max_position_embeddings", default=512)
    if pad_token < 0 or (family != "bert" and positions <= pad_token + 1):
        raise fields.error("pad_token_id", pad_token, "expected the number of a token")
    dropout = fields.probability("hidden_dropout_prob", 0.1)
    # The pooler and the head own no token prediction: whether that one is tied has no effect.
    fields.rest.pop("tie_word_embeddings", None)
    for name in ("bos_token_id", "eos_token_id"):
        _tokens(fields, name)  # an encoder ends no text, but a bad value is one
    return EncoderConfig(
        family=family,
        vocab_size=fields.positive("vocab_size"),
        width=width,
        mlp_width=fields.positive("intermediate_size"),
        layers=_layers(fields),
        heads=heads,
        positions=positions,
        token_types=fields.positive("type_vocab_size", default=2),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        norm_epsilon=fields.epsilon("layer_norm_eps", 1e-12),
        pad_token=pad_token,
        dropout=dropout,
        attention_dropout=fields.probability("attention_probs_dropout_prob", 0.1),
        head_dropout=fields.probability("classifier_dropout", dropout),
        labels=labels if classifies else None,
    )


def config_to_dict(config: Config) -> dict[str, Any]:
    """Write a configuration as the fields of a ``config.json``, the inverse of `config_from_dict`.

    Args:
      config: the configuration.

    Returns:
      Fields in the spelling that readers of every age know (``rope_theta``, ``rope_scaling``).
    """
    if isinstance(config, DecoderConfig):
        return _decoder_to_dict(config)
    return _encoder_to_dict(config)


def _decoder_to_dict(config: DecoderConfig) -> dict[str, Any]:
    family = config.family
    raw: dict[str, Any] = {
        "architectures": [_DECODERS[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_token,
        "eos_token_id": list(config.eos_tokens) or None,
        "pad_token_id": config.pad_token,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
    }
    if len(config.eos_tokens) == 1:
        raw["eos_token_id"] = config.eos_tokens[0]
    if family in ("llama", "qwen3"):
        raw["attention_bias"] = config.out_bias
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    window = next((w for w in config.windows if w is not None), None)
    if family != "llama":
        raw["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = window is not None
        raw["layer_types"] = [
            "full_attention" if w is None else "sliding_attention" for w in config.windows
        ]
    if family == "phi3":
        raw["partial_rotary_factor"] = config.rope.fraction
        if config.rope.kind == "longrope":
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


def _encoder_to_dict(config: EncoderConfig) -> dict[str, Any]:
    head = "Model" if config.labels is None else _CLASSIFIER
    raw: dict[str, Any] = {
        "architectures": [_ENCODERS[config.family] + head],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.positions,
        "type_vocab_size": config.token_types,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_epsilon,
        "pad_token_id": config.pad_token,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.head_dropout,
    }
    if config.labels is not None:
        raw["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.labels)}
        raw["label2id"] = {f"LABEL_{i}": i for i in range(config.labels)}
    return raw
