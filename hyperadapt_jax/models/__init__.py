"""Plain Flax NNX models, read straight from Hugging Face folders; they know nothing of adapters."""

from hyperadapt_jax.models.auto import (
    NewParametersWarning,
    abstract,
    create,
    export,
    from_params,
    functional,
    load,
    load_config,
    load_functional,
    logical_axes,
    matrices,
    targets,
    tensors,
)
from hyperadapt_jax.models.checkpoint.reading import Checkpoint
from hyperadapt_jax.models.checkpoint.table import CheckpointError, Report, Tensor
from hyperadapt_jax.models.decoder.config import DecoderConfig
from hyperadapt_jax.models.decoder.model import Cache, Decoder, init_cache
from hyperadapt_jax.models.encoder.config import EncoderConfig
from hyperadapt_jax.models.encoder.model import Encoder, EncoderOutput
from hyperadapt_jax.models.generate import Sampling, decode, generate
from hyperadapt_jax.models.layers import ActivationSharding
from hyperadapt_jax.models.registry import Config, config_from_dict, config_to_dict, read_config
from hyperadapt_jax.models.rope import Rope

__all__ = [
    "ActivationSharding",
    "Cache",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "NewParametersWarning",
    "Report",
    "Rope",
    "Sampling",
    "Tensor",
    "abstract",
    "config_from_dict",
    "config_to_dict",
    "create",
    "decode",
    "export",
    "from_params",
    "functional",
    "generate",
    "init_cache",
    "load",
    "load_config",
    "load_functional",
    "logical_axes",
    "matrices",
    "read_config",
    "targets",
    "tensors",
]
