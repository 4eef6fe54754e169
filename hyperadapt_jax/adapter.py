"""Adapters: everything that was trained, and the base that it belongs to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperadapt_jax import paths
from hyperadapt_jax.files import new_folder
from hyperadapt_jax.scales import Scales, ScaleVectors, side_axes
from hyperadapt_jax.scales import check as check_scales
from hyperadapt_jax.sharding import vector_sharding
from hyperadapt_jax.tables import first_few

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names too

# Fields that say how a checkpoint was loaded or where its text ends, not which one it is.
_LOADING = {"dtype", "torch_dtype", "param_dtype", "transformers_version", "_name_or_path",
            "eos_token_id", "eos_tokens"}  # fmt: skip


class AdapterError(ValueError):
    """An adapter that cannot be saved, does not fit its base, or whose files are damaged."""


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Everything that was trained, and the base that it belongs to.

    Attributes:
      scales: the scale vectors, float32, ``{path: ScaleVectors}``.
      full: what else was trained, such as a new head: float32 arrays by path.
      base_model: the base's name.
      base_config: the base's configuration, as JSON; None where it was not saved.
      metadata: anything else, as JSON.
      base_weights: shapes of the base's other parameters by path; None where it was not read from
        a folder.

    >>> import hyperadapt_jax as ha
    >>> params = {"body": jnp.ones((2, 3)), "head": jnp.ones(3)}
    >>> scales = ha.init(ha.plan(params, ha.Target("body", "in out")))
    >>> adapter = Adapter(scales, full={"head": jnp.zeros(3)})
    >>> params, scales = adapter.apply(params)
    >>> params["head"]
    Array([0., 0., 0.], dtype=float32)
    """

    scales: Scales
    full: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base_model: str | None = None
    base_config: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base_weights: Mapping[str, Sequence[int]] | None = None

    def check(self, params: Any = None, base_config: Any = None) -> None:
        """Compares the base with the one that the adapter was trained on.

        Args:
          params: the base parameters, arrays or ``jax.ShapeDtypeStruct``, in any dtype, with those
            of ``full``; None to compare the configuration alone.
          base_config: the base's configuration, a mapping or a dataclass. Fields that say how it
            was loaded (dtype, library version) or where its text ends do not count, and None
            counts as absent.

        Raises:
          AdapterError: they differ; it names where.
        """
        if base_config is not None:
            if self.base_config is None:
                raise AdapterError("base_config: was not saved with the adapter; load it without")
            _compare(identity(self.base_config), identity(base_config), "base_config")
        if params is None:
            return
        known = {path: list(np.shape(leaf)) for path, leaf in self.full.items()}
        if self.base_weights is not None:
            shapes = {**self.base_weights, **known}
            _compare(shapes, shapes_of(params, shapes), "the base")
        else:
            arrays = paths.arrays(params)
            found = {path: list(arrays[path].shape) for path in known if path in arrays}
            _compare(known, found, "the base")
        with refusing("the base does not match"):
            check_scales(self.scales, paths.arrays(params))

    def apply(self, params: Any) -> tuple[Any, Scales]:
        """Puts the fully trained parameters in their places, and returns them with the vectors.

        Args:
          params: the base parameters, any pytree of arrays, with a place for each of ``full``.

        Returns:
          ``(params, scales)``, for a function that `hyperadapt_jax.adapt` made, or for
          `hyperadapt_jax.merge`. Each has the sharding that its parameter has, and what was
          trained fully its dtype too.

        Raises:
          AdapterError: as :meth:`check`.
        """
        self.check(params)
        placed, leaves = self.placed(params), paths.arrays(params)
        full = {path: leaf.astype(leaves[path].dtype) for path, leaf in placed.full.items()}
        return paths.replace(params, full), placed.scales

    def placed(self, params: Any, replicate: Sequence[str] = ()) -> Adapter:
        """The same adapter, its arrays sharded like the axes of their parameters.

        Args:
          params: the parameters.
          replicate: mesh axes along which the vectors are kept whole.
        """
        leaves = paths.arrays(params)

        def put(x: Any, path: str, axes: Sequence[int], replicate: Sequence[str] = ()) -> jax.Array:
            like = paths.named_sharding(leaves.get(path))
            return jax.device_put(x, like and vector_sharding(like, axes, replicate))

        def all_of(path: str, vectors: ScaleVectors) -> ScaleVectors:
            placed: dict[str, Any] = {
                name: put(array, path, side_axes(vectors.axes, name), replicate)
                for name, array in vectors.arrays.items()
            }
            return dataclasses.replace(vectors, **placed)

        scales = {path: all_of(path, vectors) for path, vectors in self.scales.items()}
        full = {path: put(leaf, path, range(leaf.ndim)) for path, leaf in self.full.items()}
        return dataclasses.replace(self, scales=scales, full=full)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns any exception raised inside into an AdapterError; an AdapterError passes as it is."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{what}: {error}") from error


def _compare(saved: Mapping[str, Any], given: Mapping[str, Any], what: str) -> None:
    """Raises where what is given is not what was saved, naming the first differences."""
    differ = [
        f"{key}: {saved.get(key, 'absent')} in the adapter's, {given.get(key, 'absent')} in yours"
        for key in sorted({*saved, *given})
        if saved.get(key) != given.get(key)
    ]
    if differ:
        shown = first_few(differ, 5, "; ")
        raise AdapterError(f"{what}: does not match, {shown}; give the base that it was trained on")


def shapes_of(params: Any, also: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes that identify a base: of all but counters and random keys, and of ``also``."""
    return {
        path: list(leaf.shape)
        for path, leaf in paths.arrays(params).items()
        if path in also or jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def on_host(leaf: Any, what: str) -> np.ndarray:
    if isinstance(leaf, jax.core.Tracer):
        raise AdapterError(f"{what}: is traced; save outside of jit")
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise AdapterError(
            f"{what}: is spread over several processes; gather the adapter on all of them, with"
            " jax.experimental.multihost_utils.process_allgather(scales, tiled=True)"
        )
    return np.array(leaf, order="C")


def identity(base_config: Any) -> dict[str, Any]:
    """A base's configuration as JSON, without what only says how it was loaded."""
    if dataclasses.is_dataclass(base_config) and not isinstance(base_config, type):
        base_config = dataclasses.asdict(base_config)
    if not isinstance(base_config, Mapping):
        what = type(base_config).__name__
        raise AdapterError(f"base_config: is a {what}; give a mapping or a dataclass")
    kept = {k: v for k, v in base_config.items() if v is not None and k not in _LOADING}
    return as_json(kept, "base_config")


def as_json(fields: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields as they come back from JSON; one by one, so that an error names the field."""
    out = {}
    for key, value in fields.items():
        with refusing(f"{what}[{key!r}] cannot be written as JSON"):
            out[str(key)] = json.loads(json.dumps(value, allow_nan=False))
    return out


def read_folder(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Returns an adapter folder's configuration and the bytes of its other file.

    Raises:
      AdapterError: a file that is missing, cannot be read, or lies outside of the folder; a
        configuration that is no JSON object.
    """
    files = {}
    for file in (folder / CONFIG, folder / TENSORS):
        with refusing(f"{file} cannot be read"):
            if not folder.is_dir():
                raise AdapterError(f"{folder}: there is no such folder")
            if file.resolve().parent != folder.resolve():
                raise AdapterError(f"{file}: is a link to {file.resolve()}, outside the folder")
            if not file.is_file():
                raise AdapterError(
                    f"{folder}: holds no file {file.name}; it is no adapter, or an incomplete copy"
                )
            files[file.name] = file.read_bytes()
    file = folder / CONFIG
    with refusing(f"{file} is no JSON object (copy the folder again)"):
        config = dict(**json.loads(files[CONFIG]))
    return config, files[TENSORS]


def write_folder(folder: str | os.PathLike, contents: Mapping[str, bytes]) -> None:
    """Writes a folder of files atomically: under a temporary name next to it, then renamed."""
    folder = Path(folder).resolve()
    if folder.is_file():
        raise AdapterError(f"{folder}: is a file; choose another name")
    if folder.exists() and any(folder.iterdir()):
        raise AdapterError(f"{folder}: is not empty; choose another folder, or remove this one")
    with new_folder(folder) as new:
        for name, data in contents.items():
            (new / name).write_bytes(data)
