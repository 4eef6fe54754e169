"""Hugging Face folders in and out: one engine for all models, driven by a table of tensors.

A model's table says, for each parameter, what the checkpoint calls it. All else follows from the
table and the parameters' shapes: `load` checks a whole folder before it allocates anything, then
moves each tensor to its devices in blocks, so that host memory does not grow with the model;
`export` writes the same names and layouts back, one tensor at a time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fnmatch
import functools
import itertools
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from hyperadapt_jax.paths import flatten, matcher

Array = jax.Array
Rules = Sequence[tuple[str, PartitionSpec]]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BLOCK = 16 * 2**20  # bytes of a tensor that the host holds at a time
_SMALL = (
    8 * 2**20
)  # bytes up to which a copy on the host costs less than a compiled one on a device
_STRIP = 32  # rows of a matrix that the host transposes at a time
# The dtypes of weights, as the format writes them; others are those of a quantized checkpoint.
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_DELAY = 2.0  # seconds of work before a progress bar shows
_LFS = b"version https://git-lfs"  # how a file starts whose contents were not fetched
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What belongs to a model beside its weights, as names within its folder. Data alone, no code: how
# text becomes tokens and a chat one text, how the model is to generate, what sentence-transformers
# does with its outputs, and the terms of use. A README speaks of the weights that were there.
_COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map*.json",
    "added_tokens*.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "encoder.json",
    "merges*.txt",
    "dict*.txt",
    "bpe.codes",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template*.jinja",
    "chat_template*.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/*.json",
    "[0-9]_*/*.txt",
    "[0-9]_*/*.safetensors",
    "LICENSE*",
    "NOTICE*",
)
# What is fetched from the hub with them, if only to see that the weights are quantized, and what is
# not, whatever its name: other folders than those above, and code.
_WANTED = ("config.json", "model*.safetensors", _INDEX, "hf_quant_config.json")
_UNWANTED = ("[!0-9a]*/*", "a[!d]*/*", "*/*/*", "*.py", *_PICKLES)
# Where tools keep files by their contents, and link to them from where they are used: the hub's
# cache, git-annex, DVC and Git LFS.
_STORE = re.compile(r"/blobs/[^/]+$|/annex/objects/|/[0-9a-f]{2}/[0-9a-f]{30,}$")


class CheckpointError(ValueError):
    """A folder does not hold the weights that a model needs; the message says which and where."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a model's table: a tensor of the checkpoint and the parameter that it fills.

    Attributes:
      name: the checkpoint's name, with "{layer}" where the tensor stands once per layer.
      path: the "/"-joined path of the parameter; where the name has "{layer}", the parameter holds
        all layers, stacked on axis 0.
      transpose: the checkpoint stores (out, in) and the parameter (in, out).
      optional: the checkpoint may lack it: the parameter is then newly initialised, and reported.
      aliases: other names of the same tensor, as with and without the prefix "bert."; a checkpoint
        may hold it under several, if all are equal.

    >>> Tensor("layers.{layer}.up_proj.weight", "layers/up/kernel", transpose=True).names(3)
    ('layers.3.up_proj.weight',)
    """

    name: str
    path: str
    transpose: bool = False
    optional: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        """Whether the parameter gathers one tensor of each layer."""
        return "{layer}" in self.name

    def names(self, layer: int) -> tuple[str, ...]:
        """All names that the tensor of a layer may have, the usual one first."""
        return tuple(name.replace("{layer}", str(layer)) for name in (self.name, *self.aliases))


@dataclasses.dataclass(frozen=True)
class Report:
    """What a load did.

    Attributes:
      loaded: paths of the parameters that the checkpoint filled.
      initialised: paths of those that it lacked, which have new values.
      ignored: names in the checkpoint that are rightly no parameter.
    """

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    ignored: tuple[str, ...]


# ---------------------------------------------------------------------------------------- folders


def _at_home(path: str | os.PathLike[str]) -> Path:
    """A path whose ``~`` is replaced by the user's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{path}: there is no such user: give the whole path") from None


def resolve(
    path_or_name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Finds a checkpoint's folder: a local one first, else a repository of the Hugging Face hub.

    From the hub come the configuration, the safetensors files at the repository's root and what
    belongs to them, as the tokenizer; no code, no pickles, no copies in other formats.

    Args:
      path_or_name: a folder, or a repository name such as "meta-llama/Llama-3.2-1B".
      revision: a branch, tag or commit of the repository; ignored for a local folder.
      cache_dir: where downloads are kept; the hub's usual cache by default.

    Raises:
      FileNotFoundError: neither a folder nor a repository that can be read, offline included.
    """
    name, folder = str(path_or_name), _at_home(path_or_name)
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file: give the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FileNotFoundError(f"no folder {name!r}, and it cannot be a repository of the hub")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise FileNotFoundError(
            f"no folder {name!r}; to read it from the hub, install huggingface_hub"
        ) from None
    try:
        found = hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=[*_WANTED, *_COMPANIONS],
            ignore_patterns=[*_UNWANTED],
        )
    except Exception as error:  # the client's own, the network's, the file system's: one answer
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"no folder {name!r}, and no repository of that name{at} to be had from the hub: "
            f"{type(error).__name__}{': ' + reason[0] if reason else ''}. Check the name, the "
            "network (HF_HUB_OFFLINE) and, for a gated or private repository, the login (HF_TOKEN)"
        ) from error
    return Path(found)


def _inside(folder: Path, name: str, referrer: str = "") -> Path:
    """The file of a folder, or an error where its name or a link leads out of the folder.

    A link may lead to where a tool keeps files by their contents, as the hub's cache does, and to a
    file of the same name: neither can pass off another file of this machine as one of a model's.
    """
    where = f"{folder / referrer} names {name!r}" if referrer else f"{folder} holds {name!r}"
    parts = tuple(name.replace("\\", "/").split("/"))
    if Path(name).is_absolute() or {"..", ""} & {*parts}:
        raise CheckpointError(f"{where}, which is no file inside the folder")
    try:
        target = (folder / name).resolve()
        target.exists()  # an error where the file system can have no such name
        inside = target.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}, which is no name of a file: {error}") from error
    namesake = target.parts[-len(parts) :] == parts
    if not (inside or namesake or _STORE.search(target.as_posix())):
        raise CheckpointError(
            f"{where}, a link that leads outside the folder, to {target}: put the file there itself"
        )
    return folder / name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys occur once, of which plain `json` would keep the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"{_some(_twice(key for key, _ in pairs))} stands there twice")
    return result


def read_json(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Reads a JSON object from a file of a folder.

    Raises:
      CheckpointError: the file is missing, outside the folder, no JSON object, or has a key twice.
    """
    file = _inside(Path(folder), name)
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in collections.Counter(names).items() if count > 1]


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---------------------------------------------------------------------------------------- headers


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor as a file holds it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # the code of the format: "F32", "BF16", ...

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self.dtype]

    @property
    def bytes(self) -> int:
        return self.itemsize * math.prod(self.shape)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        start = b""
        with contextlib.suppress(OSError), open(file, "rb") as raw:
            start = raw.read(len(_LFS))
        reason = "it is a Git LFS pointer; run `git lfs pull`" if start == _LFS else error
        raise CheckpointError(f"{file} cannot be read: {reason}") from error


def _stored(folder: Path) -> dict[str, _Stored]:
    """All tensors of a folder's checkpoint by name, from the headers of its files alone."""
    if (folder / _SINGLE).exists():
        files, weight_map = [_SINGLE], None
    elif (folder / _INDEX).exists():
        weight_map = read_json(folder, _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise CheckpointError(f"{folder / _INDEX}: 'weight_map' must map tensor names to files")
        files = sorted(set(weight_map.values()))
    else:
        pickles = [f.name for f in folder.iterdir() if any(f.match(p) for p in _PICKLES)]
        advice = (
            f"; {_some(sorted(pickles))} could run code when opened and is not read: convert it "
            "once to safetensors, with save_pretrained of transformers"
            if pickles
            else ""
        )
        raise CheckpointError(f"{folder} holds neither {_SINGLE} nor {_INDEX}{advice}")

    for name in files:
        file = _inside(folder, name, _INDEX if weight_map is not None else "")
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{folder / _INDEX} names {name!r}: only safetensors are read")
        if not file.is_file():
            raise CheckpointError(f"{file}, which {_INDEX} names, is missing: fetch it again")

    found: dict[str, _Stored] = {}
    for name in files:
        file = folder / name
        with _opened(file) as reader:
            for key in reader.keys():
                if key in found:
                    raise CheckpointError(f"{key} stands in both {found[key].file} and {file}")
                if weight_map is not None and weight_map.get(key) != name:
                    raise CheckpointError(
                        f"{file} holds {key}, which {_INDEX} does not place there"
                    )
                view = reader.get_slice(key)
                found[key] = _Stored(key, file, tuple(view.get_shape()), str(view.get_dtype()))
    for key in weight_map or ():
        if key not in found:
            raise CheckpointError(
                f"{folder / weight_map[key]} lacks {key}, which {_INDEX} places there"
            )
    return found


# -------------------------------------------------------------------------------------- the table


def _check_table(tensors: Sequence[Tensor], leaves: Mapping[str, Any]) -> None:
    """Every parameter has one row of the table, and every row a parameter that it can fill."""
    paths = [tensor.path for tensor in tensors]
    if twice := _twice(paths):
        raise ValueError(f"the table of tensors fills {_some(twice)} more than once")
    if twice := _twice(tensor.name for tensor in tensors):
        raise ValueError(f"the table of tensors has {_some(twice)} in two rows")
    if unfilled := sorted(set(leaves) - set(paths)):
        raise ValueError(f"the table of tensors lacks the parameters {_some(unfilled)}")
    if unknown := sorted(set(paths) - set(leaves)):
        raise ValueError(f"the table of tensors fills {_some(unknown)}, which the model lacks")
    for tensor in tensors:
        leaf = leaves[tensor.path]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{tensor.path} has dtype {leaf.dtype}: weights are floating-point")
        if any(("{layer}" in alias) != tensor.stacked for alias in tensor.aliases):
            raise ValueError(f"an alias of {tensor.name!r} disagrees with it about '{{layer}}'")
        rank = len(leaf.shape) - tensor.stacked
        if rank < 0 or (tensor.transpose and rank != 2):
            how = " and ".join(["stacked"] * tensor.stacked + ["transposed"] * tensor.transpose)
            raise ValueError(f"{tensor.path} {tuple(leaf.shape)} cannot be {how}")


def _shape_in_file(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that the checkpoint gives a parameter of this shape, or one layer of it."""
    shape = tuple(shape)[tensor.stacked :]
    return shape[::-1] if tensor.transpose else shape


def _layers(tensor: Tensor, shape: Sequence[int]) -> range:
    return range(shape[0] if tensor.stacked else 1)


def has_weights(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a checkpoint, or the index of one."""
    return any((Path(folder) / name).exists() for name in (_SINGLE, _INDEX))


def shapes(folder: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a folder's checkpoint holds, from its files' headers alone.

    Raises:
      CheckpointError: there is no checkpoint, or a file of it cannot be read.
    """
    return {name: tensor.shape for name, tensor in _stored(Path(folder)).items()}


def equal(folder: str | os.PathLike[str], one: str, other: str) -> bool:
    """Whether two tensors of a folder's checkpoint hold the same numbers, read block by block.

    Raises:
      CheckpointError: a file of the checkpoint cannot be read.
    """
    stored = _stored(Path(folder))
    return _same(stored[one], stored[other])


def _same(one: _Stored, other: _Stored) -> bool:
    """Whether two stored tensors hold equal numbers, compared block by block."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= {*_ITEMSIZE}:
        return False
    index, itemsize = tuple((0, size) for size in one.shape), max(one.itemsize, other.itemsize)
    with _opened(one.file) as mine, _opened(other.file) as theirs:
        pairs = zip(
            _blocks(mine.get_slice(one.name), index, itemsize),
            _blocks(theirs.get_slice(other.name), index, itemsize),
            strict=True,
        )
        for (_, a), (_, b) in pairs:
            # Equal bits are told fast; other bits may still be equal numbers of two dtypes.
            if a.tobytes() != b.tobytes() and not np.array_equal(a.astype("f8"), b.astype("f8")):
                return False
    return True


def _choose(
    tensors: Sequence[Tensor], leaves: Mapping[str, Any], stored: Mapping[str, _Stored]
) -> tuple[dict[str, list[_Stored]], list[str]]:
    """The stored tensors that fill each parameter, layer by layer, and the names found nowhere."""
    chosen: dict[str, list[_Stored]] = {}
    missing: list[str] = []
    for tensor in tensors:
        parts, absent = [], []
        for layer in _layers(tensor, leaves[tensor.path].shape):
            there = [stored[name] for name in tensor.names(layer) if name in stored]
            if not all(_same(there[0], other) for other in there[1:]):
                places = ", ".join(f"{part.name} in {part.file}" for part in there)
                raise CheckpointError(
                    f"{tensor.path} is there under several names, with different numbers: {places}"
                )
            parts += there[:1]
            absent += [] if there else [tensor.names(layer)[0]]
        if parts or not tensor.optional:
            chosen[tensor.path] = parts
            missing += absent
    return chosen, missing


def _check(
    folder: Path,
    tensors: Sequence[Tensor],
    leaves: Mapping[str, Any],
    stored: Mapping[str, _Stored],
    chosen: Mapping[str, Sequence[_Stored]],
    missing: Sequence[str],
    ignored: Sequence[str],
) -> list[str]:
    """Raises where the checkpoint is not the model's; gives the names to pass over."""
    taken = {part.name for parts in chosen.values() for part in parts}
    known = {
        name
        for tensor in tensors
        for layer in _layers(tensor, leaves[tensor.path].shape)
        for name in tensor.names(layer)
    }
    rest = [name for name in stored if name not in taken]
    matchers = [matcher(pattern) for pattern in ignored]
    skipped = [n for n in rest if n in known or any(matches(n) for matches in matchers)]
    extra = [name for name in rest if name not in skipped]
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if extra:
        problems.append(
            "it holds tensors that the model has no place for: "
            + _some(f"{name} {stored[name].shape} in {stored[name].file.name}" for name in extra)
        )
    if problems:
        raise CheckpointError(
            f"{folder} is no checkpoint of this model: {'; '.join(problems)}. "
            "Does config.json belong to these weights?"
        )
    for tensor in tensors:
        expected = _shape_in_file(tensor, leaves[tensor.path].shape)
        for part in chosen.get(tensor.path, ()):
            if part.shape != expected:
                raise CheckpointError(
                    f"{part.file}: {part.name} has shape {part.shape}, but the model's "
                    f"configuration asks for {expected}"
                )
            if part.dtype not in _ITEMSIZE:
                raise CheckpointError(
                    f"{part.file}: {part.name} has dtype {part.dtype}; only "
                    f"{', '.join(_ITEMSIZE)} are read: give an unquantised checkpoint"
                )
    return skipped


# --------------------------------------------------------------------------------------- sharding


def _sharding(
    path: str, shape: tuple[int, ...], mesh: Mesh | None, rules: Rules
) -> NamedSharding | None:
    if mesh is None:
        if rules:
            raise ValueError("sharding rules need the mesh that they speak of: pass mesh=")
        return None
    for pattern, spec in rules:
        if matcher(pattern)(path):
            try:
                sharding = NamedSharding(mesh, spec)
                if len(spec) > len(shape):
                    raise ValueError(f"{len(spec)} axes for {len(shape)}")
                sharding.shard_shape(shape)
            except ValueError as error:
                raise ValueError(
                    f"rule ({pattern!r}, {spec}) does not fit {path} {shape}: {error}"
                ) from error
            return sharding
    raise ValueError(
        f"no sharding rule matches {path} {shape}; end the rules with ('.*', P()) to replicate"
    )


# -------------------------------------------------------------------------------------------- load


def _transposed(matrix: np.ndarray) -> np.ndarray:
    """A transposed copy of a matrix, by strips of rows, so that both sides stay in the cache."""
    # As integers of the same size, which numpy moves as it is: it converts dtypes not its own.
    bits = np.dtype(f"u{matrix.dtype.itemsize}")
    result = np.empty(matrix.shape[::-1], bits)
    for row in range(0, len(matrix), _STRIP):
        result[:, row : row + _STRIP] = matrix[row : row + _STRIP].view(bits).T
    return result.view(matrix.dtype)


def _on_host(devices: Iterable[Any]) -> bool:
    """Whether the devices' memory is the host's, where numpy moves numbers faster than XLA."""
    return all(device.platform == "cpu" for device in devices)


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Host memory that begins as XLA wants it, so that a CPU device takes it over uncopied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transpose")
def _write_device(buffer: Array, block: Array, start: tuple[int, ...], *, transpose: bool) -> Array:
    """Puts a block of a stored tensor in its place, in the layout and dtype of the parameter."""
    block = (block.T if transpose else block).astype(buffer.dtype)
    block = block.reshape((1,) * (buffer.ndim - block.ndim) + block.shape)
    return jax.lax.dynamic_update_slice(buffer, block, start)


def _write_host(buffer: np.ndarray, block: np.ndarray, start: tuple[int, ...]) -> None:
    """The same in host memory, for a block in the parameter's layout."""
    block = block.reshape((1,) * (buffer.ndim - block.ndim) + block.shape)
    buffer[tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))] = block


def _without_mesh() -> contextlib.AbstractContextManager[Any]:
    """A context for steps on single devices, which a mesh set by the caller would forbid."""
    return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))


def _blocks(
    view: Any, index: tuple[tuple[int, int], ...], itemsize: int
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The part of a stored tensor at `index`, in blocks of rows: (start within the part, block)."""
    if not index:
        yield (), view[()]
        return
    (first, last), *rest = index
    columns = tuple(slice(*each) for each in rest)
    row = itemsize * math.prod(stop - start for start, stop in rest)
    step = max(1, _BLOCK // max(1, row))
    for start in range(first, last, step):
        block = view[(slice(start, min(start + step, last)), *columns)]
        yield (start - first, *(0 for _ in rest)), block


def _assemble(
    tensor: Tensor,
    parts: Sequence[_Stored],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding | None,
    advance: Callable[[int], Any],
) -> Array:
    """One parameter out of its stored tensors, block by block, each device its own slices."""
    # Devices by the part that they hold, as (start, stop) of each axis: replicas share one read.
    shards: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    if sharding is None:
        shards[tuple((0, size) for size in shape)] = [None]
    else:
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            key = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
            shards.setdefault(key, []).append(device)

    local = shape if sharding is None else sharding.shard_shape(shape)
    small = math.prod(local) * jnp.dtype(dtype).itemsize <= _SMALL
    used = jnp.zeros(()).devices() if sharding is None else sharding.device_set
    on_host = small or _on_host(used)
    if on_host:
        buffers = {key: [_empty(local, dtype)] for key in shards}
    else:
        buffers = {
            key: [jnp.zeros(local, dtype, device=device) for device in devices]
            for key, devices in shards.items()
        }
    turn = -1 if tensor.transpose else 1
    for layer, part in enumerate(parts):
        # Opened for each tensor anew, so that the pages of the mapped file are given back with it.
        with _opened(part.file) as reader:
            view = reader.get_slice(part.name)
            for key, devices in shards.items():
                stack, index = key[: tensor.stacked], key[tensor.stacked :]
                if not all(start <= layer < stop for start, stop in stack):
                    continue
                prefix = tuple(layer - start for start, _ in stack)
                for start, block in _blocks(view, index[::turn], part.itemsize):
                    start = (*prefix, *start[::turn])
                    if on_host:
                        block = _transposed(block) if tensor.transpose else block
                        _write_host(buffers[key][0], block, start)
                        continue
                    block = block.astype(jax.dtypes.canonicalize_dtype(block.dtype), copy=False)
                    buffers[key] = [
                        _write_device(
                            buffer, jax.device_put(block, device), start, transpose=tensor.transpose
                        )
                        for buffer, device in zip(buffers[key], devices, strict=True)
                    ]
                    # A queue of blocks on their way to the devices would be held by the host.
                    jax.block_until_ready(buffers[key])
        advance(part.bytes)
    if on_host:
        buffers = {
            key: [jax.device_put(buffers[key][0], device) for device in devices]
            for key, devices in shards.items()
        }
    arrays = [array for key in shards for array in buffers[key]]
    if sharding is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _bar(title: str, total: int, progress: bool) -> tqdm:
    """A bar of bytes on standard error, where that is a terminal and the work takes long."""
    disable = None if progress else True
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, delay=_DELAY, disable=disable)


def load(
    folder: str | os.PathLike[str],
    tensors: Sequence[Tensor],
    params: Any,
    *,
    ignored: Sequence[str] = (),
    renewed: Sequence[str] = (),
    initial: Callable[[str], Array] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = (),
    progress: bool = True,
) -> tuple[Any, Report]:
    """Reads a folder's safetensors into a tree of parameters.

    The whole folder is checked from its files' headers before anything is allocated. Then each
    tensor goes to its devices in blocks of at most 16 MiB, cast to the parameter's dtype: every
    device gets its own slices, and the host holds no more than a block and one tensor's pages.

    Args:
      folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
      tensors: the model's table, one row for each parameter.
      params: the tree to fill: arrays or `jax.ShapeDtypeStruct`, for their shapes and dtypes alone.
      ignored: full-match regular expressions of checkpoint names that the model rightly leaves out.
      renewed: paths of optional parameters that are newly initialized, whatever is stored.
      initial: called with the path of each optional parameter that the checkpoint lacks; gives its
        new value.
      mesh: where the parameters live; without it, whole on the default device.
      rules: pairs of a full-match regular expression on the path and a PartitionSpec; the first
        that matches holds, and one must.
      progress: shows a bar on standard error when it takes longer than two seconds.

    Returns:
      The tree, filled, and a `Report`.

    Raises:
      CheckpointError: the files cannot be read, or are not those of this model.
      ValueError: the table and the tree disagree, or a rule does not fit.

    >>> import tempfile
    >>> table = [Tensor("{layer}.up.weight", "up/kernel", transpose=True)]
    >>> stacked = {"up": {"kernel": jnp.ones((2, 4, 3))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export(folder, table, stacked, config={})
    ...     tree, report = load(folder, table, stacked)
    >>> tree["up"]["kernel"].shape, report.loaded
    ((2, 4, 3), ('up/kernel',))
    """
    folder = _at_home(folder)
    paths, values, treedef = flatten(params)
    leaves = dict(zip(paths, values, strict=True))
    _check_table(tensors, leaves)
    shardings = {path: _sharding(path, tuple(x.shape), mesh, rules) for path, x in leaves.items()}
    stored = _stored(folder)
    chosen, missing = _choose([t for t in tensors if t.path not in renewed], leaves, stored)
    new = [tensor.path for tensor in tensors if tensor.path not in chosen]
    skipped = _check(folder, tensors, leaves, stored, chosen, missing, ignored)
    if new and initial is None:
        raise CheckpointError(
            f"{folder} lacks {_some(new)}, and no initial values are given for them"
        )

    filled = {}
    with _bar("loading", sum(x.bytes for parts in chosen.values() for x in parts), progress) as bar:
        for tensor in tensors:
            leaf, sharding = leaves[tensor.path], shardings[tensor.path]
            shape, dtype = tuple(leaf.shape), leaf.dtype
            if tensor.path in chosen:
                with _without_mesh():
                    filled[tensor.path] = _assemble(
                        tensor, chosen[tensor.path], shape, dtype, sharding, bar.update
                    )
                continue
            value = jnp.asarray(initial(tensor.path), dtype)
            if value.shape != shape:
                raise ValueError(f"initial value of {tensor.path}: {value.shape}, expected {shape}")
            filled[tensor.path] = value if sharding is None else jax.device_put(value, sharding)
    report = Report(
        loaded=tuple(path for path in leaves if path in chosen),
        initialised=tuple(path for path in leaves if path not in chosen),
        ignored=tuple(skipped),
    )
    return treedef.unflatten([filled[path] for path in paths]), report


# ------------------------------------------------------------------------------------------ export


@functools.partial(jax.jit, static_argnames=("transpose", "dtype"))
def _piece(array: Array, layer: int | None, *, transpose: bool, dtype: Any) -> Array:
    """One layer of a parameter, or all of it, in the checkpoint's layout and dtype."""
    if layer is not None:
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    return (array.T if transpose else array).astype(dtype)


def _fetch(
    array: Array, layer: int | None, shape: tuple[int, ...], *, transpose: bool, dtype: Any
) -> np.ndarray:
    """The stored form of a parameter, or of one of its layers, gathered on the host."""
    if transpose and _on_host(array.devices()):
        return _transposed(_fetch(array, layer, shape[::-1], transpose=False, dtype=dtype))
    if len(array.addressable_shards) == 1:
        with _without_mesh():
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
        with _without_mesh():
            piece = _piece(shard.data, local, transpose=transpose, dtype=dtype)
        result[index[::-1] if transpose else index] = np.asarray(piece)
    return result


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
    groups: list[list[str]] = []
    free = 0
    for name, (shape, dtype) in entries.items():
        # A header's line holds name, dtype, sizes and two offsets; 256 bytes are for the rest.
        line = len(json.dumps(name)) + 21 * (len(shape) + 2) + 64
        need = math.prod(shape) * dtype.itemsize + line
        if need > limit - 256:
            raise ValueError(
                f"max_shard_size is {limit} bytes, but {name} alone takes {need + 256}"
            )
        if need > free:
            groups.append([])
            free = limit - 256
        groups[-1].append(name)
        free -= need
    total = len(groups)
    names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    return [
        _file(name, {key: entries[key] for key in group})
        for name, group in zip(names if total > 1 else [_SINGLE], groups, strict=True)
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


@contextlib.contextmanager
def _new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its name when all is written, or goes."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} is not empty: choose another, or pass overwrite=True")
        folders = [entry for entry in folder.iterdir() if not entry.is_file()]
        if not (folder / "config.json").is_file() or not all(map(_kept_folder, folders)):
            raise FileExistsError(
                f"{folder} is more than a model, or none: to overwrite it, remove it yourself"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{folder.name}.{secrets.token_hex(4)}"
    partial, old = folder.parent / f"{mark}.partial", folder.parent / f"{mark}.old"
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):  # on the disk before it has its name
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


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
      overwrite: replaces the model in a folder that holds one: config.json and other files, no
        folders.
      progress: shows a bar on standard error when it takes longer than two seconds.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder is not empty and not to be overwritten.
      ValueError: the table and the tree disagree, a tensor is larger than `max_shard_size`, a
        dtype is none of a weight, a parameter is misshapen or spread over several processes.
      FileNotFoundError, CheckpointError: the source, or one of its files, cannot be read.

    >>> import tempfile
    >>> table = [Tensor("{layer}.up.weight", "up/kernel", transpose=True)]
    >>> shapes = {"up": {"kernel": jax.ShapeDtypeStruct((2, 4, 3), "bfloat16")}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export(folder, table, shapes, config={}, leaf=lambda path: jnp.ones((2, 4, 3)))
    ...     print(sorted(os.listdir(folder)), read_json(folder, "config.json"))
    ['config.json', 'model.safetensors'] {'torch_dtype': 'bfloat16'}
    """
    folder = _at_home(folder).resolve()
    source = None if source is None else resolve(source)
    paths, values, _ = flatten(params)
    leaves = dict(zip(paths, values, strict=True))
    _check_table(tensors, leaves)
    limit = _size(max_shard_size)
    dtypes = {path: jnp.dtype(dtype or x.dtype) for path, x in leaves.items()}
    for path, each in dtypes.items():
        if each.name not in _CODES:
            raise ValueError(
                f"{path} would be stored as {each.name}: choose one of {', '.join(_CODES)}"
            )
    names = _names(tensors, leaves, source)
    stored = _stored(source) if carried else {}

    entries: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for tensor, layer in _order(tensors, leaves):
        shape = _shape_in_file(tensor, leaves[tensor.path].shape)
        entries[names[tensor.path][layer]] = (shape, dtypes[tensor.path])
    for name in carried:
        own = {code: key for key, code in _CODES.items()}.get(stored[name].dtype)
        if own is None:
            raise CheckpointError(f"{stored[name].file}: {name} has dtype {stored[name].dtype}")
        entries[name] = (stored[name].shape, jnp.dtype(dtype or own))
    companions = [] if source is None else _companions(source)
    files = _files(entries, limit)
    file_of = {name: file for file in files for name in file.offsets}
    size = {name: math.prod(shape) * each.itemsize for name, (shape, each) in entries.items()}

    with _new_folder(folder, overwrite) as partial:
        _write_json(partial / "config.json", _with_dtype(config, entries, size))
        for name in companions:
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, partial / name)
        if len(files) > 1:
            weight_map = {name: file_of[name].name for name in entries}
            index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
            _write_json(partial / _INDEX, index)
        for file in files:
            with open(partial / file.name, "wb") as out:
                out.write(file.header)
                out.truncate(file.length)
        with _bar("exporting", sum(size.values()), progress) as bar:

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
            for name in carried:
                with _opened(stored[name].file) as reader:
                    write(name, reader.get_tensor(name))
    return folder


def _order(tensors: Sequence[Tensor], leaves: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    """The order of a checkpoint: the rows of the table, with all rows of a layer together."""
    for _, run in itertools.groupby(tensors, key=lambda tensor: tensor.stacked):
        run = list(run)
        layers = {tensor.path: _layers(tensor, leaves[tensor.path].shape) for tensor in run}
        for layer in range(max(map(len, layers.values()))):
            yield from ((tensor, layer) for tensor in run if layer in layers[tensor.path])


def _names(
    tensors: Sequence[Tensor], leaves: Mapping[str, Any], source: Path | None
) -> dict[str, list[str]]:
    """Each parameter's names in the checkpoint, layer by layer: the source's if it has them all."""
    if source is not None:
        chosen, missing = _choose(tensors, leaves, _stored(source))
        if not missing and len(chosen) == len(tensors):
            return {path: [part.name for part in parts] for path, parts in chosen.items()}
    return {
        tensor.path: [tensor.names(i)[0] for i in _layers(tensor, leaves[tensor.path].shape)]
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


def _belongs(name: str) -> bool:
    """Whether a file, by its name within a folder, belongs to the model beside its weights."""
    matches = (p for p in _COMPANIONS if p.count("/") == name.count("/"))
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in matches)


def _kept_folder(folder: Path) -> bool:
    """Whether a folder within a model's holds what belongs to the model, and nothing else."""
    names = [f"{folder.name}/{file.name}" for file in folder.iterdir()] if folder.is_dir() else []
    return bool(names) and all(map(_belongs, names))


def _companions(source: Path) -> list[str]:
    """The names of a folder's files that belong to the model; links are followed with care."""
    files = [file for file in (*source.glob("*"), *source.glob("*/*")) if file.is_file()]
    names = sorted(file.relative_to(source).as_posix() for file in files)
    kept = [name for name in names if _belongs(name)]
    for name in kept:
        _inside(source, name)
    for name in names:
        pickled = "/" in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in _PICKLES)
        if pickled and _belongs(str(Path(name).with_suffix(".safetensors"))):
            if not list((source / name).parent.glob("*.safetensors")):
                warnings.warn(
                    f"{source / name} could run code when opened and is not copied: the export"
                    " lacks this part of the model; convert it once to safetensors",
                    stacklevel=4,
                )
    return kept
