"""The strict reading of a JSON file's fields: each is understood, or refused by its name.

Each field of a ``config.json`` is either read, checked against the only value the model implements,
or listed as one that does not change the model. Anything else is an error that names the field: a
configuration is never read as another model.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

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

_MOST_LAYERS = 10_000  # a configuration holds a window for each: no file may ask for gigabytes
_LARGEST = 2**31 - 1  # sizes and token ids are 32-bit integers
_REQUIRED = object()

# How a value of any size or depth looks in an error of one line.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 40


class Fields:
    """The fields of one ``config.json``, each of which has to be taken before `finish`."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.rest = dict(raw)
        self.where = where

    def error(self, name: str, value: Any, reason: str) -> ValueError:
        """The error of a field, to be raised."""
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
        if not is_finite(value):
            raise self.error(name, value, "expected a finite number")
        return float(value)

    def positive(self, name: str, kind: type = int, default: Any = _REQUIRED) -> Any:
        """A number above zero."""
        value = self.take(name, kind, default)
        if value is not None and value <= 0:
            raise self.error(name, value, "expected a positive number")
        return value

    def epsilon(self, name: str, default: float) -> float:
        """A number that is zero or more."""
        value = self.take(name, float, default)
        if value < 0:
            raise self.error(name, value, "expected zero or more")
        return value

    def probability(self, name: str, default: float) -> float:
        """A probability of dropping, below one."""
        value = self.take(name, float, default)
        if not 0.0 <= value < 1.0:
            raise self.error(name, value, "expected a probability in [0, 1)")
        return value

    def choice(self, name: str, options: Any, default: Any = _REQUIRED) -> str:
        """One of some names."""
        value = self.take(name, str, default)
        if value not in options:
            raise self.error(name, value, f"not supported; one of {', '.join(sorted(options))}")
        return value

    def token(self, name: str) -> int | None:
        """A token's id, or None: files of the first Llama say -1 where there is none."""
        value = self.take(name, int, None)
        return None if value is None or value < 0 else value

    def tokens(self, name: str) -> tuple[int, ...]:
        """The ids of tokens, of which the file may name one, several or none."""
        value = self.rest.pop(name, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
        if not whole or any(abs(v) > _LARGEST for v in values):
            raise self.error(name, value, "expected a token id or a list of them")
        return tuple(values)

    def num_layers(self, name: str = "num_hidden_layers") -> int:
        """The number of layers, which is bounded."""
        layers = self.positive(name)
        if layers > _MOST_LAYERS:
            raise self.error(name, layers, f"expected at most {_MOST_LAYERS}")
        return layers

    def expect(self, name: str, *allowed: Any) -> None:
        """Checks a field that may be missing but has only these supported values."""
        value = self.rest.pop(name, None)
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed)) or "null"
            raise self.error(name, value, f"not supported; expected {wanted}")

    def finish(self) -> None:
        """Refuses what is left, but for fields that change nothing."""
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


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number that fits a float, as no integer of 400 digits does."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
