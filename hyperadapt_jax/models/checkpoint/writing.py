"""Writes parameters as a Hugging Face folder: the names and layouts that the table says."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from hyperadapt_jax.files import new_folder
from hyperadapt_jax.models.checkpoint.hub import (
    INDEX,
    companions,
    expand_home,
    is_companion_folder,
    resolve,
)
from hyperadapt_jax.models.checkpoint.reading import (
    Checkpoint,
    choose,
    on_host,
    open_file,
    progress_bar,
    transposed,
    without_mesh,
)
from hyperadapt_jax.models.checkpoint.table import (
    CheckpointError,
    Tensor,
    check_table,
    layers_of,
    shape_in_file,
)
from hyperadapt_jax.paths import flatten

Array = jax.Array

# The dtypes of weights, as the format writes them.
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def export(
    folder: str | os.PathLike[str],
    tensors: Sequence[Tensor],
    params: Any,
    *,
    config: Mapping[str, Any],
    source: str | os.PathLike[str] | None = None,
    carried: Sequence[str] = (),
    leaf: Callable[[str], Array] | None = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes parameters as a Hugging Face folder that any reader of the format can load.

    One parameter at a time is asked for and one tensor at a time is fetched to the host. The folder
    appears under its name when it is complete; nothing is left behind by a failure.

    Args:
      folder: where to write.
      tensors: the model's table, one row for each parameter.
      params: the tree of parameters; of `jax.ShapeDtypeStruct` where `leaf` gives the values.
      config: the contents of config.json; its dtype is set to that of the weights.
      source: the folder the model was read from: what belongs to it, as the tokenizer, is copied,
        and its tensor names are kept where it names all tensors.
      carried: names of tensors of the source, no parameters of the model, that are written as well.
      leaf: called once with each path, gives the parameter there; so an adapter is merged weight
        by weight, and no second model held.
      dtype: the dtype to store all tensors in; each parameter's own by default.
      max_shard_size: bytes per file, as a number or as "5GB"; more than one file gets an index.
      overwrite: replace the model in a folder that holds one: config.json and other files, no
        folders.
      progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder is not empty and not to be overwritten.
      ValueError: the table and the tree disagree, a tensor is larger than `max_shard_size`, a
        dtype is none of a weight, a parameter is misshapen or spread over several processes.
      FileNotFoundError, CheckpointError: the source, or one of its files, cannot be read.

    >>> import tempfile
    >>> from hyperadapt_jax.models.checkpoint.hub import read_json
    >>> table = [Tensor("{layer}.up.weight", "up/kernel", transpose=True)]
    >>> shapes = {"up": {"kernel": jax.ShapeDtypeStruct((2, 4, 3), "bfloat16")}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export(folder, table, shapes, config={}, leaf=lambda path: jnp.ones((2, 4, 3)))
    ...     print(sorted(os.listdir(folder)), read_json(folder, "config.json"))
    ['config.json', 'model.safetensors'] {'torch_dtype': 'bfloat16'}
    """
    folder = expand_home(folder).resolve()
    source = None if source is None else resolve(source)
    paths, values, _ = flatten(params)
    leaves = dict(zip(paths, values, strict=True))
    check_table(tensors, leaves)
    limit = _size(max_shard_size)
    dtypes = {path: jnp.dtype(dtype or x.dtype) for path, x in leaves.items()}
    for path, each in dtypes.items():
        if each.name not in _CODES:
            raise ValueError(f"dtype={each.name} of {path}: expected one of {', '.join(_CODES)}")
    checkpoint = None if source is None else Checkpoint(source)
    names = _names(tensors, leaves, checkpoint)

    entries: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for tensor, layer in _order(tensors, leaves):
        shape = shape_in_file(tensor, leaves[tensor.path].shape)
        entries[names[tensor.path][layer]] = (shape, dtypes[tensor.path])
    codes = {code: name for name, code in _CODES.items()}
    others = {} if checkpoint is None else {name: checkpoint.tensors[name] for name in carried}
    for name, stored in others.items():
        if stored.dtype not in codes:
            raise CheckpointError(f"{stored.file}: {name} has dtype {stored.dtype}")
        entries[name] = (stored.shape, jnp.dtype(dtype or codes[stored.dtype]))
    copied = {} if source is None else {name: source / name for name in companions(source)}
    files = _files(entries, limit)
    file_of = {name: file for file in files for name in file.offsets}
    size = {name: math.prod(shape) * each.itemsize for name, (shape, each) in entries.items()}

    _check_free(folder, overwrite)
    with new_folder(folder) as partial:
        _write_json(partial / "config.json", _with_dtype(config, entries, size))
        for name, original in copied.items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(original, partial / name)
        if len(files) > 1:
            weight_map = {name: file_of[name].name for name in entries}
            index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
            _write_json(partial / INDEX, index)
        for file in files:
            with open(partial / file.name, "wb") as out:
                out.write(file.header)
                out.truncate(file.length)
        with progress_bar("exporting", sum(size.values()), progress) as bar:

            def write(name: str, data: np.ndarray) -> None:
                data = np.ascontiguousarray(data, entries[name][1])
                with open(partial / file_of[name].name, "r+b") as out:
                    out.seek(file_of[name].offsets[name])
                    out.write(data.reshape(-1).view(np.uint8).data)
                bar.update(size[name])

            for tensor in tensors:
                expected = tuple(leaves[tensor.path].shape)
                array = jnp.asarray(leaves[tensor.path] if leaf is None else leaf(tensor.path))
                if array.shape != expected:
                    raise ValueError(f"{tensor.path} has shape {array.shape}, expected {expected}")
                if not array.is_fully_addressable:
                    raise ValueError(
                        f"{tensor.path} is spread over several processes: gather it first"
                    )
                for layer, name in enumerate(names[tensor.path]):
                    data = _fetch(
                        array,
                        layer if tensor.stacked else None,
                        entries[name][0],
                        transpose=tensor.transpose,
                        dtype=jax.dtypes.canonicalize_dtype(entries[name][1]),
                    )
                    write(name, data)
                del array
            for name, stored in others.items():
                with open_file(stored.file) as reader:
                    write(name, reader.get_tensor(name))
    return folder


def _order(tensors: Sequence[Tensor], leaves: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    """The order of a checkpoint: the rows of the table, with all rows of a layer together."""
    for _, group in itertools.groupby(tensors, key=lambda tensor: tensor.stacked):
        run = list(group)
        layers = {tensor.path: layers_of(tensor, leaves[tensor.path].shape) for tensor in run}
        for layer in range(max(map(len, layers.values()))):
            yield from ((tensor, layer) for tensor in run if layer in layers[tensor.path])


def _names(
    tensors: Sequence[Tensor], leaves: Mapping[str, Any], checkpoint: Checkpoint | None
) -> dict[str, list[str]]:
    """Each parameter's names in the checkpoint, layer by layer: the source's if it has them all."""
    if checkpoint is not None:
        chosen, missing = choose(tensors, leaves, checkpoint)
        if not missing and len(chosen) == len(tensors):
            return {path: [part.name for part in parts] for path, parts in chosen.items()}
    return {
        tensor.path: [tensor.names(i)[0] for i in layers_of(tensor, leaves[tensor.path].shape)]
        for tensor in tensors
    }


def _with_dtype(
    config: Mapping[str, Any],
    entries: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    size: Mapping[str, int],
) -> dict[str, Any]:
    """The configuration with the dtype that most bytes of the weights have."""
    total: dict[str, int] = {}
    for name, (_, dtype) in entries.items():
        total[dtype.name] = total.get(dtype.name, 0) + size[name]
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: max(total, key=total.__getitem__)}


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fetch(
    array: Array, layer: int | None, shape: tuple[int, ...], *, transpose: bool, dtype: Any
) -> np.ndarray:
    """The stored form of a parameter, or of one of its layers, gathered on the host."""
    if transpose and on_host(array.devices()):
        return transposed(_fetch(array, layer, shape[::-1], transpose=False, dtype=dtype))
    if len(array.addressable_shards) == 1:
        with without_mesh():
            return np.asarray(_piece(array, layer, transpose=transpose, dtype=dtype))
    result = np.empty(shape, dtype)
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        index, local = shard.index, None
        if layer is not None:
            start, stop, _ = index[0].indices(array.shape[0])
            if not start <= layer < stop:
                continue
            index, local = index[1:], layer - start
        with without_mesh():
            piece = _piece(shard.data, local, transpose=transpose, dtype=dtype)
        result[index[::-1] if transpose else index] = np.asarray(piece)
    return result


@functools.partial(jax.jit, static_argnames=("transpose", "dtype"))
def _piece(array: Array, layer: int | None, *, transpose: bool, dtype: Any) -> Array:
    """One layer of a parameter, or all of it, in the checkpoint's layout and dtype."""
    if layer is not None:
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    return (array.T if transpose else array).astype(dtype)


def _size(limit: int | str) -> int:
    """Bytes of a limit such as "5GB" or "200MiB"."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B?", str(limit).strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise ValueError(
            f"max_shard_size={limit!r}: give bytes, or a size such as '5GB' or '200MiB'"
        )
    return int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")


@dataclasses.dataclass(frozen=True)
class _File:
    """A safetensors file to be: its header, where each tensor starts in it, and its length."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    length: int


def _files(entries: Mapping[str, tuple[tuple[int, ...], np.dtype]], limit: int) -> list[_File]:
    """Distributes tensors over files of at most `limit` bytes, in their order."""
    room = limit - 256  # for the rest of a header
    need: dict[str, int] = {}
    for name, (shape, dtype) in entries.items():
        # A header's line holds name, dtype, sizes and two offsets.
        line = len(json.dumps(name)) + 21 * (len(shape) + 2) + 64
        need[name] = math.prod(shape) * dtype.itemsize + line
        if need[name] > room:
            raise ValueError(
                f"max_shard_size={limit}: {name} alone takes {need[name] + 256} bytes; give as many"
            )
    split = huggingface_hub.split_state_dict_into_shards_factory(
        need,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=room,
    )
    return [
        _file(file, {name: entries[name] for name in names})
        for file, names in split.filename_to_tensors.items()
    ]


def _file(name: str, entries: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> _File:
    """Lays out one file: eight bytes of length, a JSON header, the tensors without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest dtypes first, so that each tensor is aligned to its own.
    for key in sorted(entries, key=lambda key: -entries[key][1].itemsize):
        shape, dtype = entries[key]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _CODES[dtype.name], "shape": shape, "data_offsets": (start, end)}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    raw = len(raw).to_bytes(8, "little") + raw
    offsets = {key: len(raw) + header[key]["data_offsets"][0] for key in entries}
    return _File(name, raw, offsets, len(raw) + end)


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that an export may not take the place of."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} is not empty: choose another, or pass overwrite=True")
        folders = [entry for entry in folder.iterdir() if not entry.is_file()]
        if not (folder / "config.json").is_file() or not all(map(is_companion_folder, folders)):
            raise FileExistsError(
                f"{folder} is more than a model, or none: to overwrite it, remove it yourself"
            )
