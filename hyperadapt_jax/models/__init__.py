"""Plain Flax NNX models, read straight from Hugging Face folders; they know nothing of adapters."""

from hyperadapt_jax.models.build import (
    NewParametersWarning,
    abstract,
    create,
    describe,
    export,
    functional,
    load,
    targets,
    tensors,
    with_params,
)
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
from hyperadapt_jax.models.weights import CheckpointError, Tensor

__all__ = [
    "Cache",
    "CheckpointError",
    "Config",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "NewParametersWarning",
    "Rope",
    "Sampling",
    "Tensor",
    "abstract",
    "config_from_dict",
    "config_to_dict",
    "create",
    "decode",
    "describe",
    "export",
    "functional",
    "generate",
    "load",
    "open_cache",
    "read_config",
    "targets",
    "tensors",
    "with_params",
]
