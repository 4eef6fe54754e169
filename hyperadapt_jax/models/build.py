"""From a configuration to a model, from a model to a function and its tree, and what to adapt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from hyperadapt_jax.models.config import Config, DecoderConfig
from hyperadapt_jax.models.decoder import Decoder
from hyperadapt_jax.models.encoder import Encoder

Model = Decoder | Encoder
Params = Mapping[str, Any]

# Which projections each preset takes, by their role in the layer.
PRESETS: dict[str, tuple[str, ...]] = {
    "qv": ("q", "v"),
    "qkvo": ("q", "k", "v", "o"),
    "qkvud": ("q", "k", "v", "up", "down"),
    "all-linear": ("q", "k", "v", "o", "gate", "up", "down"),
}
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


def create(config: Config, *, seed: int = 0, **options: Any) -> Model:
    """Make a newly initialised model.

    Args:
      config: the architecture.
      seed: of the initial parameters.
      **options: ``dtype``, ``param_dtype``, ``remat``, ``attention``, as `Decoder` and `Encoder`
        take them.

    Returns:
      The model.

    Raises:
      ValueError: an option has an unknown value.
    """
    kind = Decoder if isinstance(config, DecoderConfig) else Encoder
    return kind(config, rngs=nnx.Rngs(params=seed), **options)


def abstract(config: Config, **options: Any) -> Model:
    """Make a model whose parameters are shapes and dtypes alone, so that nothing is allocated.

    Args:
      config: the architecture.
      **options: as for `create`.

    Returns:
      The model, with a `jax.ShapeDtypeStruct` for each parameter.
    """
    return nnx.eval_shape(lambda: create(config, **options))


@dataclasses.dataclass(frozen=True)
class Function:
    """A model without its parameters: ``function(params, *args)`` is ``model(*args)``.

    Functions of models of the same configuration and options are equal, so that a compiled
    program is found again.
    """

    graph: nnx.GraphDef

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Apply the model with the given tree of parameters."""
        return nnx.merge(self.graph, params)(*args, **kwargs)


def functional(model: Model) -> tuple[Function, Params]:
    """Split a model into a pure function and its tree of parameters.

    Args:
      model: a model, abstract or not.

    Returns:
      ``(fn, params)``: ``fn(params, *args, **kwargs)`` equals ``model(*args, **kwargs)``, and
      ``params`` is a nested dict of arrays with paths as ``layers/q/kernel``.

    >>> from hyperadapt_jax import models
    >>> config = models.config_from_dict(dict(model_type="qwen3", vocab_size=9, hidden_size=8,
    ...     intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4))
    >>> fn, params = models.functional(models.create(config))
    >>> params["layers"]["q"]["kernel"].shape
    (2, 8, 8)
    >>> fn(params, jax.numpy.ones((1, 3), int)).shape
    (1, 3, 9)
    """
    graph, state = nnx.split(model)
    return Function(graph), nnx.to_pure_dict(state)


def with_params(config: Config, params: Params, **options: Any) -> Model:
    """Make a model of given parameters.

    Args:
      config: the architecture.
      params: a nested dict as `functional` returns it; the arrays are not copied.
      **options: as for `create`.

    Returns:
      The model.

    Raises:
      ValueError: a parameter is missing, extra or misshapen.
    """
    fn, wanted = functional(abstract(config, **options))
    wanted, given = (
        {"/".join(key.key for key in path): leaf for path, leaf in leaves}
        for leaves in (jax.tree.leaves_with_path(wanted), jax.tree.leaves_with_path(params))
    )
    for path in sorted(wanted.keys() ^ given.keys()):
        raise ValueError(f"{path}: {'missing' if path in wanted else 'not a parameter'}")
    for path, leaf in given.items():
        if leaf.shape != wanted[path].shape:
            raise ValueError(f"{path}: expected {wanted[path].shape}, found {leaf.shape}")
    return nnx.merge(fn.graph, params)


def targets(model: Model | Config, preset: str) -> tuple[tuple[str, str], ...]:
    """The weights that a preset adapts, as ``(pattern, axes)`` pairs.

    Args:
      model: a model or its configuration.
      preset: ``qv``, ``qkvo``, ``qkvud`` (query, key, value, up, down) or ``all-linear`` (every
        projection of the layers; never embedding, pooler or head). A fused matrix is taken whole
        where it holds any of them: in Phi, ``qv`` takes ``qkv``.

    Returns:
      Pairs of a full-match pattern on the "/"-joined path and the roles of the weight's axes.

    Raises:
      ValueError: there is no such preset.

    >>> from hyperadapt_jax import models
    >>> config = models.config_from_dict(dict(model_type="phi3", vocab_size=9, hidden_size=8,
    ...     intermediate_size=16, num_hidden_layers=2, num_attention_heads=2))
    >>> models.targets(config, "all-linear")
    (('.*/(qkv|o|gate_up|down)/kernel', 'stack in out'),)
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    config = getattr(model, "config", model)
    names = PRESETS[preset]
    if not isinstance(config, DecoderConfig):
        names = tuple(name for name in names if name != "gate")
    elif config.fused:
        names = tuple(dict.fromkeys(_FUSED.get(name, name) for name in names))
    return ((f".*/({'|'.join(names)})/kernel", "stack in out"),)
