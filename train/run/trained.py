"""What a run left: an adapter, with the base that it belongs to, read one parameter at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import hyperadapt_jax as ha
from hyperadapt_jax import models, paths
from hyperadapt_jax.adapter import CONFIG
from hyperadapt_jax.models.checkpoint import hub

from ..base import Base, load_abstract
from ..errors import InputError
from ..options import ModelOptions, Place
from ..parallel.mesh import Layout
from .folder import ADAPTER


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedOptions:
    """What was trained."""

    adapter: Path
    """Adapter folder, or a run folder, whose best adapter is taken."""
    model: Place | None = None
    """Its base model, a folder or a repository of the hub; what the adapter names if not given."""
    revision: str | None = None
    """Branch, tag or commit of a repository of the hub."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """An adapter and its base.

    Attributes:
      adapter: the vectors, and what trained fully.
      base: the frozen model, as shapes alone, which say where it is to lie.
    """

    adapter: ha.Adapter
    base: Base

    @property
    def dtype(self) -> str:
        """The dtype in which the base is stored, as its config.json says; else float32."""
        config = hub.read_json(self.base.folder, "config.json")
        name = config.get("dtype") or config.get("torch_dtype")
        return name if name in ("bfloat16", "float16") else "float32"

    def parameter(self, path: str, dtype: str) -> jax.Array:
        """One parameter in the given dtype: as it was trained fully, else as the base stores it.

        Raises:
          CheckpointError: the base's files lack it, or are damaged.
        """
        if path in self.adapter.full:
            return self.adapter.full[path].astype(dtype)
        shape = self._shapes[path]
        like = jax.ShapeDtypeStruct(shape.shape, dtype, sharding=shape.sharding)
        return self._checkpoint.read(self._tensors[path], like)

    @functools.cached_property
    def _checkpoint(self) -> models.Checkpoint:
        return models.Checkpoint(self.base.folder)

    @functools.cached_property
    def _tensors(self) -> dict[str, models.Tensor]:
        return {tensor.path: tensor for tensor in models.tensors(self.base.config)}

    @functools.cached_property
    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return paths.arrays(self.base.params)


def load_run(options: TrainedOptions, layout: Layout | None = None) -> Trained:
    """Reads an adapter and describes its base; the base's weights are read when they are asked for.

    Args:
      options: which adapter, and its base.
      layout: what lies where on several devices.

    Raises:
      InputError: there is no adapter, or no base.
      AdapterError: the adapter is damaged, or of another base.
    """
    folder = next(
        (f for f in (options.adapter, options.adapter / ADAPTER) if (f / CONFIG).is_file()), None
    )
    if folder is None:
        raise InputError(
            f"--adapter {options.adapter} holds no {CONFIG}, nor {ADAPTER}/{CONFIG}: give an"
            " adapter folder, or the folder of a run that came to its end"
        )
    adapter = ha.load(folder)
    model = options.model or adapter.base_model
    if model is None:
        raise InputError(f"{folder} does not name its base model: give it with --model")
    known = adapter.base_config
    labels = None if known is None else _labels(known, folder)
    described = ModelOptions(model=Place(model), revision=options.revision)
    base = load_abstract(described, labels, layout)
    try:
        adapter.check(base.params, None if known is None else models.config_to_dict(base.config))
    except ha.AdapterError as error:
        raise ha.AdapterError(f"{folder}: {error}") from None
    return Trained(adapter, base)


def _labels(base_config: Mapping[str, Any], folder: Path) -> int | None:
    """How many outputs the head had that the adapter was trained with; None without a head."""
    try:
        return getattr(models.config_from_dict(base_config), "num_labels", None)
    except ValueError as error:
        raise InputError(f"{folder / CONFIG}: its base_config cannot be used: {error}") from error
