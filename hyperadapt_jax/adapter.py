"""Adapters, and their files: ``adapter_config.json`` and ``adapter_model.safetensors``.

The arrays are float32 tensors named ``<path>.row``, ``<path>.col`` and, for parameters that
trained fully, ``<path>.full``. The configuration says which weights and which base they belong to,
and carries the SHA-256 of the arrays and of itself: a changed byte is an error, never another
adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from hyperadapt_jax import paths
from hyperadapt_jax.files import new_folder
from hyperadapt_jax.plan import Target
from hyperadapt_jax.scales import SIDES, Scales, ScaleVectors, side_axes, side_shape
from hyperadapt_jax.scales import check as check_scales
from hyperadapt_jax.sharding import vector_sharding
from hyperadapt_jax.tables import first_few
from hyperadapt_jax.version import __version__

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE, FORMAT_VERSION = "HYPERADAPT", 1

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
            _compare(_identity(self.base_config), _identity(base_config), "base_config")
        if params is None:
            return
        known = {path: list(np.shape(leaf)) for path, leaf in self.full.items()}
        if self.base_weights is not None:
            shapes = {**self.base_weights, **known}
            _compare(shapes, _shapes(params, shapes), "the base")
        else:
            arrays = paths.arrays(params)
            found = {path: list(arrays[path].shape) for path in known if path in arrays}
            _compare(known, found, "the base")
        with _refuse("the base does not match"):
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

    def placed(self, params: Any) -> Adapter:
        """The same adapter, its arrays sharded like the axes of their parameters."""
        leaves = paths.arrays(params)

        def put(x: Any, path: str, axes: Sequence[int]) -> jax.Array:
            like = paths.named_sharding(leaves.get(path))
            return jax.device_put(x, like and vector_sharding(like, axes))

        def both(path: str, vectors: ScaleVectors) -> ScaleVectors:
            deltas = {side: getattr(vectors, side) for side in SIDES}
            placed: dict[str, Any] = {
                side: put(delta, path, side_axes(vectors.axes, side))
                for side, delta in deltas.items()
                if delta is not None
            }
            return dataclasses.replace(vectors, **placed)

        scales = {path: both(path, vectors) for path, vectors in self.scales.items()}
        full = {path: put(leaf, path, range(leaf.ndim)) for path, leaf in self.full.items()}
        return dataclasses.replace(self, scales=scales, full=full)


def save(
    folder: str | os.PathLike,
    adapter: Adapter | Scales,
    params: Any,
    *,
    full: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    base_config: Any = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter to a new folder, atomically. Of several processes, one calls it.

    Args:
      folder: the folder to create; an empty one is accepted.
      adapter: an :class:`Adapter`, or its scale vectors alone, float32, with the rest given as
        keywords. Sharded arrays are gathered.
      params: the base parameters, arrays or ``jax.ShapeDtypeStruct``, with or without those of
        ``full``: their paths and shapes are recorded.
      full: fully trained parameters by path, float32, such as a new head: what
        :func:`hyperadapt_jax.trainable.split` splits off.
      base_model: the base's name, for people and tools.
      base_config: the base's configuration, a mapping or a dataclass, for :func:`load` to compare.
      metadata: anything else to keep, as JSON.

    Raises:
      AdapterError: a vector that does not fit its weight, is not float32, not finite, or not held
        by this process; a path that the base lacks; what JSON cannot hold; a folder with files.

    >>> import tempfile
    >>> import hyperadapt_jax as ha
    >>> params = {"dense": {"kernel": jnp.ones((3, 5))}}
    >>> scales = ha.init(ha.plan(params, ha.Target("dense/kernel", "in out")))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, scales, params, base_model="ones")
    ...     adapter = load(folder, params)
    >>> adapter.base_model, adapter.scales["dense/kernel"].col
    ('ones', Array([0., 0., 0.], dtype=float32))
    """
    if not isinstance(adapter, Adapter):
        adapter = Adapter(adapter, full or {}, base_model, base_config, metadata or {})
    elif not full is base_model is base_config is metadata is None:
        raise AdapterError(
            "an Adapter holds full, base_model, base_config and metadata itself; set them with"
            " dataclasses.replace"
        )
    scales, full = adapter.scales, dict(adapter.full)
    shapes = _shapes(params, scales)
    for path in scales:
        if path not in shapes:
            raise AdapterError(f"{path}: is missing from the base; {paths.suggest(path, shapes)}")
        if path in full:
            raise AdapterError(f"{path}: is scaled and fully trained; leave out one of the two")
    trained = {path: list(np.shape(leaf)) for path, leaf in full.items()}
    for path, shape in trained.items():
        if shapes.get(path, shape) != shape:
            raise AdapterError(f"{path}: has shape {shape} in full, but {shapes[path]} in the base")
    tensors = {f"{path}.full": _on_host(leaf, path) for path, leaf in full.items()}
    for path, vectors in scales.items():
        for side in SIDES:
            if (delta := getattr(vectors, side)) is not None:
                tensors[f"{path}.{side}"] = _on_host(delta, f"{path}: {side}")

    base_config = None if adapter.base_config is None else _identity(adapter.base_config)
    weights = {path: shape for path, shape in sorted(shapes.items()) if path not in trained}
    config = {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base_model_name_or_path": adapter.base_model,
        "base_fingerprint": _digest([base_config, weights]),
        "base_config": base_config,
        "base_weights": weights,
        "targets": {path: {"axes": v.axes, "shape": shapes[path]} for path, v in scales.items()},
        "full": trained,
        "metadata": _as_json(adapter.metadata, "metadata"),
    }
    _check(config, tensors, "the adapter")
    data = safetensors.numpy.save(tensors)
    config["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps({**config, "checksum": _digest(config)}, indent=2) + "\n"
    # A shape on one line: strings hold no raw newline, so this touches lists of numbers alone.
    text = re.sub(r"\[\n\s+([\d,\s]+?)\n\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    _write(Path(folder).resolve(), {TENSORS: data, CONFIG: text.encode()})


def load(folder: str | os.PathLike, params: Any = None, *, base_config: Any = None) -> Adapter:
    """Reads an adapter, checks all of it, and only then places it.

    Args:
      folder: what :func:`save` wrote.
      params: the base parameters, arrays or ``jax.ShapeDtypeStruct``, in any dtype, to compare:
        see :meth:`Adapter.check`. Vectors are then sharded like the axes of their weight. None: no
        comparison with the base, which :meth:`Adapter.apply` makes.
      base_config: the base's configuration, to compare with the saved one.

    Raises:
      AdapterError: a file that is missing, truncated, altered, linked from elsewhere or written by
        a newer version; a missing or unexpected vector, a wrong shape or dtype, a value that is not
        finite; another base. The message says what is wrong, where, and what to do.
    """
    folder = Path(folder)
    config, data = _read(folder)
    with _refuse(f"{folder} is malformed (save it anew)"):
        if hashlib.sha256(data).hexdigest() != config["tensors_sha256"]:
            raise AdapterError(
                f"{folder / TENSORS}: is truncated or altered; copy the folder again"
            )
        tensors = safetensors.numpy.load(data)
        _check(config, tensors, folder / TENSORS)
        adapter = Adapter(
            scales={
                path: ScaleVectors(
                    row=tensors.get(f"{path}.row"),
                    col=tensors.get(f"{path}.col"),
                    axes=target["axes"],
                )
                for path, target in config["targets"].items()
            },
            full={path: tensors[f"{path}.full"] for path in config["full"]},
            base_model=config["base_model_name_or_path"],
            base_config=config["base_config"],
            metadata=config["metadata"],
            base_weights=dict(config["base_weights"]),
        )
    try:
        adapter.check(params, base_config)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
    return adapter.placed(params)


@contextlib.contextmanager
def _refuse(what: str) -> Iterator[None]:
    """Turns any exception raised inside into an AdapterError; an AdapterError passes as it is."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{what}: {error}") from error


def _check(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: Any) -> None:
    """Refuses tensors that are not exactly those which the configuration calls for."""
    shapes = {f"{path}.full": tuple(shape) for path, shape in config["full"].items()}
    for path, target in config["targets"].items():
        roles, shape = target["axes"], target["shape"]
        with _refuse(path):
            Target([path], roles)
        if len(roles.split()) != len(shape):
            raise AdapterError(f"{path}: has shape {shape}, but the axis roles {roles!r}")
        for side in SIDES:
            if (needs := side_shape(shape, roles, side)) is not None:
                shapes[f"{path}.{side}"] = needs
    for name in {**shapes, **tensors}:
        array, shape = tensors.get(name), shapes.get(name)
        if array is None:
            problem = f": is missing; expected shape {shape}"
        elif shape is None:
            problem = ": is unexpected; the targets have no such vector"
        elif array.shape != shape:
            problem = f": has shape {array.shape}, not {shape}"
        elif array.dtype != np.float32:
            problem = f": has dtype {array.dtype}, not float32"
        elif not np.isfinite(array).all():
            index = np.argwhere(~np.isfinite(array))[0].tolist()
            problem = (
                f"{index}: is {array[tuple(index)]}; take a checkpoint from before it diverged"
            )
        else:
            continue
        raise AdapterError(f"{where}: {name}{problem}")


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


def _shapes(params: Any, also: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes that identify a base: of all but counters and random keys, and of ``also``."""
    return {
        path: list(leaf.shape)
        for path, leaf in paths.arrays(params).items()
        if path in also or jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def _on_host(leaf: Any, what: str) -> np.ndarray:
    if isinstance(leaf, jax.core.Tracer):
        raise AdapterError(f"{what}: is traced; save outside of jit")
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise AdapterError(
            f"{what}: is spread over several processes; gather the adapter on all of them, with"
            " jax.experimental.multihost_utils.process_allgather(scales, tiled=True)"
        )
    return np.array(leaf, order="C")


def _identity(base_config: Any) -> dict[str, Any]:
    """A base's configuration as JSON, without what only says how it was loaded."""
    if dataclasses.is_dataclass(base_config) and not isinstance(base_config, type):
        base_config = dataclasses.asdict(base_config)
    if not isinstance(base_config, Mapping):
        what = type(base_config).__name__
        raise AdapterError(f"base_config: is a {what}; give a mapping or a dataclass")
    kept = {k: v for k, v in base_config.items() if v is not None and k not in _LOADING}
    return _as_json(kept, "base_config")


def _as_json(fields: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields as they come back from JSON; one by one, so that an error names the field."""
    out = {}
    for key, value in fields.items():
        with _refuse(f"{what}[{key!r}] cannot be written as JSON"):
            out[str(key)] = json.loads(json.dumps(value, allow_nan=False))
    return out


def _digest(value: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys and the layout of its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The configuration, known to be as it was written, and the bytes of the other file."""
    files = {}
    for file in (folder / CONFIG, folder / TENSORS):
        with _refuse(f"{file} cannot be read"):
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
    with _refuse(f"{file} is no JSON object (copy the folder again)"):
        config = json.loads(files[CONFIG])
        checksum = dict.pop(config, "checksum", None)
        digest = _digest(config)
    if config.get("peft_type") != PEFT_TYPE:
        raise AdapterError(
            f"{file}: does not say peft_type {PEFT_TYPE!r}; it is another kind of adapter"
        )
    version = config.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise AdapterError(
            f"{file}: has format_version {version}, but this hyperadapt-jax reads"
            f" {FORMAT_VERSION}; upgrade it to {config.get('library_version')} or newer"
        )
    if version != FORMAT_VERSION or digest != checksum:
        raise AdapterError(f"{file}: was altered after it was saved; copy the folder again")
    return config, files[TENSORS]


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes a folder of files atomically: under a temporary name next to it, then renamed."""
    if folder.is_file():
        raise AdapterError(f"{folder}: is a file; choose another name")
    if folder.exists() and any(folder.iterdir()):
        raise AdapterError(f"{folder}: is not empty; choose another folder, or remove this one")
    with new_folder(folder) as new:
        for name, data in contents.items():
            (new / name).write_bytes(data)
