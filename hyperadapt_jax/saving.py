"""Adapters' files: ``adapter_config.json`` and ``adapter_model.safetensors``.

The arrays are float32 tensors named ``<path>.row``, ``<path>.col``, ``<path>.down``, ``<path>.up``
and, for parameters that trained fully, ``<path>.full``. The configuration says which weights and
which base they belong to, and carries the SHA-256 of the arrays and of itself: a changed byte is an
error, never another adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from hyperadapt_jax import paths, peft
from hyperadapt_jax.adapter import (
    CONFIG,
    TENSORS,
    Adapter,
    AdapterError,
    as_json,
    identity,
    on_host,
    read_folder,
    refusing,
    shapes_of,
    write_folder,
)
from hyperadapt_jax.plan import Target
from hyperadapt_jax.scales import ARRAYS, SIDES, Scales, ScaleVectors, side_shape
from hyperadapt_jax.version import __version__

PEFT_TYPE = "HYPERADAPT"
FORMAT_VERSION = 2  # of adapters with low-rank terms; the others are written as version 1 still


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
    >>> import jax.numpy as jnp
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
    shapes = shapes_of(params, scales)
    for path in scales:
        if path not in shapes:
            raise AdapterError(f"{path}: is missing from the base; {paths.suggest(path, shapes)}")
        if path in full:
            raise AdapterError(f"{path}: is scaled and fully trained; leave out one of the two")
    trained = {path: list(np.shape(leaf)) for path, leaf in full.items()}
    for path, shape in trained.items():
        if shapes.get(path, shape) != shape:
            raise AdapterError(f"{path}: has shape {shape} in full, but {shapes[path]} in the base")
    tensors = {f"{path}.full": on_host(leaf, path) for path, leaf in full.items()}
    for path, vectors in scales.items():
        for name, array in vectors.arrays.items():
            tensors[f"{path}.{name}"] = on_host(array, f"{path}: {name}")

    base_config = None if adapter.base_config is None else identity(adapter.base_config)
    weights = {path: shape for path, shape in sorted(shapes.items()) if path not in trained}
    config = {
        "peft_type": PEFT_TYPE,
        "format_version": 1 if all(v.down is None for v in scales.values()) else 2,
        "library_version": __version__,
        "base_model_name_or_path": adapter.base_model,
        "base_fingerprint": _digest([base_config, weights]),
        "base_config": base_config,
        "base_weights": weights,
        "targets": {path: _target(vectors, shapes[path]) for path, vectors in scales.items()},
        "full": trained,
        "metadata": as_json(adapter.metadata, "metadata"),
    }
    _check(config, tensors, "the adapter")
    data = safetensors.numpy.save(tensors)
    config["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps({**config, "checksum": _digest(config)}, indent=2) + "\n"
    # A shape on one line: strings hold no raw newline, so this touches lists of numbers alone.
    text = re.sub(r"\[\n\s+([\d,\s]+?)\n\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    write_folder(folder, {TENSORS: data, CONFIG: text.encode()})


def load(
    folder: str | os.PathLike,
    params: Any = None,
    *,
    base_config: Any = None,
    tensors: Iterable[peft.Row] | None = None,
) -> Adapter:
    """Reads an adapter, checks all of it, and only then places it.

    Args:
      folder: what :func:`save` wrote, or PEFT: see `hyperadapt_jax.peft.load`.
      params: the base parameters, arrays or ``jax.ShapeDtypeStruct``, in any dtype, to compare:
        see :meth:`Adapter.check`. Vectors are then sharded like the axes of their weight. None: no
        comparison with the base, which :meth:`Adapter.apply` makes.
      base_config: the base's configuration, to compare with the saved one; PEFT saves none.
      tensors: for PEFT's folder, the table of the checkpoint's tensors, ``models.tensors(config)``.

    Raises:
      AdapterError: a file that is missing, truncated, altered, linked from elsewhere or written by
        a newer version; a missing or unexpected vector, a wrong shape or dtype, a value that is not
        finite; another base. The message says what is wrong, where, and what to do.
    """
    folder = Path(folder)
    config, data = read_folder(folder)
    if config.get("peft_type") != PEFT_TYPE:
        if params is None or tensors is None:
            raise AdapterError(
                f"{folder / CONFIG}: says peft_type {config.get('peft_type')!r}, not {PEFT_TYPE!r}:"
                " to read an adapter of PEFT, give the base's params and tensors="
                "models.tensors(config)"
            )
        return peft.load(folder, params, tensors).placed(params)
    _verify(folder / CONFIG, config)
    with refusing(f"{folder} is malformed (save it anew)"):
        if hashlib.sha256(data).hexdigest() != config["tensors_sha256"]:
            raise AdapterError(
                f"{folder / TENSORS}: is truncated or altered; copy the folder again"
            )
        found = safetensors.numpy.load(data)
        _check(config, found, folder / TENSORS)
        adapter = Adapter(
            scales={
                path: _vectors(target["axes"], {n: found.get(f"{path}.{n}") for n in ARRAYS})
                for path, target in config["targets"].items()
            },
            full={path: found[f"{path}.full"] for path in config["full"]},
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


def _check(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: Any) -> None:
    """Refuses tensors that are not exactly those which the configuration calls for."""
    shapes = {f"{path}.full": tuple(shape) for path, shape in config["full"].items()}
    for path, target in config["targets"].items():
        roles, shape = target["axes"], target["shape"]
        with refusing(path):
            Target([path], roles)
        if len(roles.split()) != len(shape):
            raise AdapterError(f"{path}: has shape {shape}, but the axis roles {roles!r}")
        names, rank = target.get("arrays", SIDES), target.get("rank")
        if unknown := {*names} - {*ARRAYS}:
            raise AdapterError(f"{path}: has arrays of an unknown kind: {min(unknown)!r}")
        for name in names:
            if (needs := side_shape(shape, roles, name, rank)) is not None:
                shapes[f"{path}.{name}"] = needs
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


def _vectors(axes: str, arrays: Mapping[str, Any]) -> ScaleVectors:
    return ScaleVectors(axes=axes, **arrays)


def _target(vectors: ScaleVectors, shape: list[int]) -> dict[str, Any]:
    """What is said of an adapted weight; of one with scale vectors alone, the roles say it all."""
    target: dict[str, Any] = {"axes": vectors.axes, "shape": shape}
    if vectors.down is not None:
        target |= {"arrays": list(vectors.arrays), "rank": int(np.shape(vectors.down)[-1])}
    return target


def _digest(value: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys and the layout of its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _verify(file: Path, config: dict[str, Any]) -> None:
    """Refuses a configuration of another version, or that is not as it was written."""
    checksum = config.pop("checksum", None)
    version = config.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise AdapterError(
            f"{file}: has format_version {version}, but this hyperadapt-jax reads"
            f" {FORMAT_VERSION}; upgrade it to {config.get('library_version')} or newer"
        )
    if version not in range(1, FORMAT_VERSION + 1) or _digest(config) != checksum:
        raise AdapterError(f"{file}: was altered after it was saved; copy the folder again")
