"""The families that are known, and a ``config.json`` read and written by its ``model_type``."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from hyperadapt_jax.models.checkpoint.hub import read_json
from hyperadapt_jax.models.decoder import families as decoders
from hyperadapt_jax.models.decoder.config import DecoderConfig
from hyperadapt_jax.models.encoder import families as encoders
from hyperadapt_jax.models.encoder.config import EncoderConfig
from hyperadapt_jax.models.encoder.distilbert import DISTILBERT
from hyperadapt_jax.models.family import Family
from hyperadapt_jax.models.fields import Fields

Config = DecoderConfig | EncoderConfig

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        decoders.LLAMA,
        decoders.MISTRAL,
        decoders.QWEN2,
        decoders.QWEN3,
        decoders.PHI3,
        encoders.BERT,
        encoders.ROBERTA,
        encoders.XLM_ROBERTA,
        encoders.CAMEMBERT,
        DISTILBERT,
    )
}

# NVIDIA's exporter leaves config.json as it was, and says here that the weights are quantized.
_QUANTIZATION_FILE = "hf_quant_config.json"
_GENERATION_FILE = "generation_config.json"


def family_of(config: Config) -> Family:
    """The family of a configuration.

    Args:
      config: the configuration.

    Raises:
      ValueError: there is no such family.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"family={config.family!r}: expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.family]


def read_config(path: str | pathlib.Path) -> Config:
    """Reads a model's configuration from its folder or from a ``config.json``.

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
        fields = Fields(read_json(file.parent, _GENERATION_FILE), str(generation))
        if eos_tokens := fields.tokens("eos_token_id"):
            config = dataclasses.replace(config, eos_tokens=eos_tokens)
    return config


def _check_unquantized(folder: pathlib.Path) -> None:
    fields = Fields(read_json(folder, _QUANTIZATION_FILE), str(folder / _QUANTIZATION_FILE))
    fields.rest = fields.take("quantization", dict)
    # The cache of keys and values may be quantized at will: it is no part of the checkpoint.
    if "quant_algo" not in fields.rest:
        raise ValueError(f"{fields.where}: field 'quantization' does not say its 'quant_algo'")
    fields.expect("quant_algo")


def config_from_dict(raw: Mapping[str, Any], *, where: str = "config.json") -> Config:
    """Reads a model's configuration from the fields of a ``config.json``.

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
distilbert, llama, mistral, phi3, qwen2, qwen3, roberta, xlm-roberta
    """
    fields = Fields(raw, where)
    family = FAMILIES[fields.choice("model_type", FAMILIES)]
    architectures, known = fields.take("architectures", list, []), family.architectures
    if any(architecture not in known for architecture in architectures):
        raise fields.error("architectures", architectures, f"expected {' or '.join(known)}")
    config = family.read(fields, architectures)
    fields.finish()
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Writes a configuration as the fields of a ``config.json``, the inverse of `config_from_dict`.

    Args:
      config: the configuration.

    Returns:
      Fields in the spelling that readers of every age know (``rope_theta``, ``rope_scaling``).
    """
    return family_of(config).write(config)
