"""Plain Flax NNX models, read straight from Hugging Face folders; they know nothing of adapters."""

from hyperadapt_jax.models.build import abstract, create, functional, targets, with_params
from hyperadapt_jax.models.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    Rope,
    config_from_dict,
    config_to_dict,
    read_config,
)
from hyperadapt_jax.models.decoder import Cache, Decoder, open_cache
from hyperadapt_jax.models.encoder import Encoder, EncoderOutput
from hyperadapt_jax.models.generate import Sampling, decode, generate

__all__ = [
    "Cache",
    "Config",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "Rope",
    "Sampling",
    "abstract",
    "config_from_dict",
    "config_to_dict",
    "create",
    "decode",
    "functional",
    "generate",
    "open_cache",
    "read_config",
    "targets",
    "with_params",
]
