"""Adapters on disk: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

The numbers are float32 tensors named ``<path>.row``, ``<path>.col`` and, for parameters that
trained fully, ``<path>.full``. The configuration says what they belong to: the axis roles and the
shape of each adapted weight, and the base model by name, configuration and weight shapes. It
carries the SHA-256 of the numbers and of itself: a changed byte is an error, never another adapter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from hyperadapt_jax import paths
from hyperadapt_jax.scales import SIDES, Scales, ScaleVectors
from hyperadapt_jax.targets import PlanError, Target, Weight

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE, FORMAT_VERSION = "HYPERADAPT", 1

# Fields that say how a checkpoint was loaded, not which one it is.
_LOADING = {"dtype", "torch_dtype", "param_dtype", "transformers_version", "_name_or_path"}


class AdapterError(ValueError):
    """An adapter that cannot be saved, or files that are not what they claim to be."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What :func:`load` read.

    Attributes:
      scales: the scale vectors, float32.
      full: the fully trained parameters by path, float32, as ``optim.split`` gives them.
      base_model: the name of the base model, or None.
      metadata: whatever was saved along with them.
    """

    scales: Scales
    full: dict[str, jax.Array]
    base_model: str | None
    metadata: dict[str, Any]


def save(
    folder: str | os.PathLike,
    scales: Scales,
    params: Any,
    *,
    full: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    base_config: Any = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter to a folder, whole or not at all.

    The files are written beside the folder and renamed into place: a crash leaves a complete
    adapter or none. Of several processes, one calls it.

    Args:
      folder: the folder to create; an empty one will do.
      scales: the scale vectors, float32. Sharded ones are gathered.
      params: the base parameters, arrays or ``jax.ShapeDtypeStruct``, with or without those of
        ``full``: their paths and shapes are recorded, their values and dtypes are not.
      full: fully trained parameters by path, float32, such as a new head (see ``optim.split``).
      base_model: the base's name, for people and tools.
      base_config: the base's configuration, a mapping or a dataclass, for :func:`load` to compare.
      metadata: anything else to keep, as JSON.
      overwrite: replace the adapter in a folder that holds one and nothing else. The old one
        stays complete on disk until the new one is in place.

    Raises:
      AdapterError: a vector that does not fit its weight, is not float32, not finite, or not held
        by this process; a path that the base lacks; a value that JSON cannot hold; a folder that
        is not empty.

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
    shapes, full = _shapes(params, scales), dict(full or {})
    for path in scales:
        if path not in shapes:
            raise AdapterError(f"the base holds no {path!r}; {paths.nearest(path, shapes)}")
        if path in full:
            raise AdapterError(f"{path} is scaled and fully trained: leave out one of the two")
    targets = {p: {"axes": v.axes, "shape": shapes[p]} for p, v in scales.items()}
    trained = {path: list(np.shape(leaf)) for path, leaf in full.items()}
    for path, shape in trained.items():
        if shapes.get(path, shape) != shape:
            raise AdapterError(f"{path} has shape {shape} in full and {shapes[path]} in the base")

    tensors = {f"{path}.full": _host(leaf, path) for path, leaf in full.items()}
    for path, vectors in scales.items():
        for side in SIDES:
            if (delta := getattr(vectors, side)) is not None:
                tensors[f"{path}.{side}"] = _host(delta, f"{path}: {side}")
    _check(tensors, _weights(targets), trained, "the adapter")
    data = safetensors.numpy.save(tensors)

    weights = {path: shape for path, shape in sorted(shapes.items()) if path not in trained}
    base_config = None if base_config is None else _identity(base_config)
    config = {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "library_version": _library_version(),
        "base_model_name_or_path": base_model,
        "base_fingerprint": _digest([base_config, weights]),
        "base_config": base_config,
        "base_weights": weights,
        "targets": targets,
        "full": trained,
        "metadata": _as_json(metadata or {}, "metadata"),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps({**config, "checksum": _digest(config)}, indent=2) + "\n"
    # A shape on one line: strings hold no raw newline, so this touches lists of numbers alone.
    text = re.sub(r"\[\n\s+([\d,\s]+?)\n\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    _write(Path(folder).resolve(), {TENSORS: data, CONFIG: text.encode()}, overwrite)


def load(folder: str | os.PathLike, params: Any, *, base_config: Any = None) -> Adapter:
    """Reads an adapter, checks all of it, and only then places it.

    Args:
      folder: what :func:`save` wrote.
      params: the base parameters, arrays or ``jax.ShapeDtypeStruct``, in any dtype. Where a weight
        carries a ``NamedSharding``, its vectors get the part of it that belongs to their axes.
        None leaves out the comparison with the base, for work on the vectors alone.
      base_config: the base's configuration, to compare with the saved one. Fields that say how it
        was loaded (dtype, library version) do not count, and None counts as absent.

    Raises:
      AdapterError: a file that is missing, truncated, altered, linked from elsewhere or written by
        a newer version; a vector missing or too many, a wrong shape or dtype, a number that is not
        finite; another base. Each names what, where and what to do.
    """
    folder = Path(folder)
    config, file = _read_config(folder), folder / TENSORS
    data = _read(folder, TENSORS)
    try:
        if hashlib.sha256(data).hexdigest() != config["tensors_sha256"]:
            raise AdapterError(
                f"{file} ({len(data)} bytes) is truncated or altered: its SHA-256 is not the one in"
                f" {CONFIG}. Copy the folder again"
            )
        weights, trained = _weights(config["targets"]), config["full"]
        tensors = safetensors.numpy.load(data)
        _check(tensors, weights, trained, file)
        if base_config is not None:
            if config["base_config"] is None:
                raise AdapterError(f"{folder} was saved without base_config: load it without")
            _compare(config["base_config"], _identity(base_config), f"{folder}: base_config")
        if params is not None:
            shapes = {**config["base_weights"], **trained}
            _compare(shapes, _shapes(params, shapes), f"{folder}: the base")
        name, metadata = config["base_model_name_or_path"], config["metadata"]
    except AdapterError:
        raise
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, AttributeError) as e:
        # The checksums are right, so this was written so, and not by this library.
        raise AdapterError(f"{folder} is malformed, {type(e).__name__}: {e}. Save it anew") from e

    leaves = {} if params is None else dict(zip(*paths.flatten(params)[:2], strict=True))
    scales = {}
    for path, weight in weights.items():
        weight = dataclasses.replace(weight, sharding=_sharding(leaves.get(path)))
        sides = {
            side: jax.device_put(tensors[f"{path}.{side}"], getattr(weight, f"{side}_sharding"))
            for side in SIDES
            if f"{path}.{side}" in tensors
        }
        scales[path] = ScaleVectors(**{"row": None, "col": None, **sides}, axes=weight.axes)
    full = {p: jax.device_put(tensors[f"{p}.full"], _sharding(leaves.get(p))) for p in trained}
    return Adapter(scales, full, name, metadata)


def _weights(targets: Mapping[str, Any]) -> dict[str, Weight]:
    """The adapted weights that a configuration lists."""
    weights = {}
    for path, target in targets.items():
        axes, shape = target["axes"], tuple(map(int, target["shape"]))
        try:
            Target([path], axes)
        except PlanError as error:
            raise AdapterError(f"{path}: {error}") from None
        if len(axes.split()) != len(shape):
            raise AdapterError(f"{path} has the shape {list(shape)}, and the axis roles {axes!r}")
        weights[path] = Weight(path, shape, None, axes)
    return weights


def _check(
    tensors: Mapping[str, np.ndarray], weights: Mapping[str, Weight], trained: Mapping, where: Any
) -> None:
    """Raises where the tensors are not exactly those that the weights and parameters call for."""
    expected = {f"{path}.full": tuple(shape) for path, shape in trained.items()}
    for path, weight in weights.items():
        sides = {"row": weight.row_shape, "col": weight.col_shape}
        expected |= {f"{path}.{side}": shape for side, shape in sides.items() if shape}
    for name, shape in expected.items():
        if name not in tensors:
            raise AdapterError(f"{where}: {name} is missing; it has the shape {shape}")
    for name, array in tensors.items():
        if name not in expected:
            raise AdapterError(f"{where}: {name} is one too many: the targets have no such vector")
        if array.shape != expected[name]:
            raise AdapterError(f"{where}: {name} has shape {array.shape}, not {expected[name]}")
        if array.dtype != np.float32:
            raise AdapterError(f"{where}: {name} has dtype {array.dtype}, not float32")
        if not np.isfinite(array).all():
            index = np.argwhere(~np.isfinite(array))[0].tolist()
            raise AdapterError(
                f"{where}: {name}{index} is {array[tuple(index)]}, no finite number: go back to an"
                " adapter from before the training diverged"
            )


def _compare(saved: Mapping[str, Any], given: Mapping[str, Any], what: str, most: int = 5) -> None:
    """Raises where what is given is not what was saved, naming the first differences."""
    differ = [
        f"{key}: {saved.get(key, 'absent')} in the adapter's, {given.get(key, 'absent')} in yours"
        for key in sorted({*saved, *given})
        if saved.get(key) != given.get(key)
    ]
    if differ:
        more = f"; and {len(differ) - most} more" if len(differ) > most else ""
        raise AdapterError(
            f"{what} does not match, {'; '.join(differ[:most])}{more}. Give the base that it"
            " was trained on"
        )


def _shapes(params: Any, also: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes that identify a base: of its floating arrays, and of the arrays in ``also``.

    Counters, random keys and other integers are the state of a run, and no part of it.
    """
    names, leaves, _ = paths.flatten(params)
    return {
        path: list(leaf.shape)
        for path, leaf in zip(names, leaves, strict=True)
        if paths.is_array(leaf) and (path in also or jnp.issubdtype(leaf.dtype, jnp.inexact))
    }


def _sharding(leaf: Any) -> jax.sharding.NamedSharding | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _host(leaf: Any, what: str) -> np.ndarray:
    """An array gathered to this host."""
    if isinstance(leaf, jax.core.Tracer):
        raise AdapterError(f"{what} is traced: save outside of jit")
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise AdapterError(
            f"{what} is spread over several processes: gather the adapter on all of them with"
            " jax.experimental.multihost_utils.process_allgather(scales, tiled=True), save on one"
        )
    return np.array(leaf, order="C")


def _identity(base_config: Any) -> dict[str, Any]:
    """A base's configuration as JSON, without what only says how it was loaded."""
    if dataclasses.is_dataclass(base_config) and not isinstance(base_config, type):
        base_config = dataclasses.asdict(base_config)
    if not isinstance(base_config, Mapping):
        raise AdapterError(
            f"base_config is a {type(base_config).__name__}: give a mapping or a dataclass, such as"
            " what config.json holds"
        )
    kept = {k: v for k, v in base_config.items() if v is not None and k not in _LOADING}
    return _as_json(kept, "base_config")


def _as_json(fields: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields as they come back from JSON; one by one, so that an error names the field."""
    out = {}
    for key, value in fields.items():
        try:
            out[str(key)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise AdapterError(f"{what}[{key!r}] cannot be written as JSON: {error}") from None
    return out


def _digest(value: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys and the layout of its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _library_version() -> str:
    try:
        return importlib.metadata.version("hyperadapt-jax")
    except importlib.metadata.PackageNotFoundError:  # imported from a source tree
        return "unknown"


def _read_config(folder: Path) -> dict[str, Any]:
    where, text = folder / CONFIG, _read(folder, CONFIG)
    try:
        config = json.loads(text)
        checksum = config.pop("checksum", None) if isinstance(config, dict) else None
        digest = _digest(config)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is no JSON ({error}): copy the folder again") from None
    if not isinstance(config, dict) or config.get("peft_type") != PEFT_TYPE:
        raise AdapterError(f"{where} does not say peft_type {PEFT_TYPE!r}: not such an adapter")
    version = config.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise AdapterError(
            f"{where} has format_version {version}, and this hyperadapt-jax reads {FORMAT_VERSION}:"
            f" upgrade it, to {config.get('library_version')} or newer"
        )
    if version != FORMAT_VERSION or digest != checksum:
        raise AdapterError(
            f"{where} was altered after it was saved: its checksum differs. Copy the folder again;"
            " to change what it says, load the adapter and save it anew"
        )
    return config


def _read(folder: Path, name: str) -> bytes:
    file = folder / name
    try:
        target = file.resolve()
        if not folder.is_dir():
            old = _previous(folder.resolve())
            hint = f": an interrupted save left the previous one in {old}" if old.is_dir() else ""
            raise AdapterError(f"there is no folder {folder}{hint}")
        if target.parent != folder.resolve():
            raise AdapterError(f"{file} is a link to {target}, outside the folder: copy it here")
        if not target.is_file():
            raise AdapterError(f"{folder} holds no file {name}: no adapter, or an incomplete copy")
        return target.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise AdapterError(f"{file} cannot be read: {error}") from None


def _previous(folder: Path) -> Path:
    """Where an adapter waits while another takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _write(folder: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Puts a folder of files in place by renaming it, so that nobody ever sees half of it."""
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file: choose another name")
    present = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if present and not overwrite:
        raise AdapterError(
            f"{folder} is not empty: choose another folder, or pass overwrite=True to replace the"
            " adapter in it"
        )
    if others := [name for name in present if name not in files]:
        raise AdapterError(
            f"{folder} holds {others[0]!r}, which is no part of an adapter, and overwrite=True"
            " replaces nothing else: choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    old, new = _previous(folder), folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.new")
    new.mkdir()
    try:
        for name, data in files.items():
            with open(new / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if present:
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if present:
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if hasattr(os, "O_DIRECTORY"):  # a rename is durable once the folder around it is
        around = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(around)
        finally:
            os.close(around)
    shutil.rmtree(old, ignore_errors=True)
