"""Reads a folder's weights into a tree of parameters, driven by a model's table of tensors.

`load` checks a whole folder before it allocates anything, then moves each tensor to its devices in
blocks, so that host memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from hyperadapt_jax.models.checkpoint.hub import (
    INDEX,
    PICKLES,
    SINGLE,
    expand_home,
    file_inside,
    read_json,
)
from hyperadapt_jax.models.checkpoint.table import (
    CheckpointError,
    Report,
    Tensor,
    check_table,
    first_few,
    layers_of,
    shape_in_file,
)
from hyperadapt_jax.paths import flatten, matcher, named_sharding

Array = jax.Array
Rules = Sequence[tuple[str, PartitionSpec]]

_BLOCK = 16 * 2**20  # bytes of a tensor that the host holds at a time
# Bytes up to which a copy on the host costs less than a compiled one on a device.
_SMALL = 8 * 2**20
_STRIP = 32  # rows of a matrix that the host transposes at a time
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # others are those of a quantized checkpoint
_DELAY = 2.0  # seconds of work before a progress bar shows
_LFS = b"version https://git-lfs"  # how a file starts whose contents were not fetched


@dataclasses.dataclass(frozen=True)
class Stored:
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


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder's checkpoint, as the headers of its files tell it: they are read once, when needed.

    Attributes:
      folder: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.
    """

    folder: Path

    def exists(self) -> bool:
        """Whether the folder holds a checkpoint, or the index of one."""
        return any((self.folder / name).exists() for name in (SINGLE, INDEX))

    @functools.cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """All tensors by name.

        Raises:
          CheckpointError: there is no checkpoint, or a file of it cannot be read.
        """
        return _read_headers(self.folder)

    def name_of(self, tensor: Tensor) -> str | None:
        """What a row of a table, or the first layer's, is called here; None where it is not."""
        return next((name for name in tensor.names(0) if name in self.tensors), None)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, read block by block.

        Raises:
          CheckpointError: a file cannot be read.
        """
        return _same(self.tensors[one], self.tensors[other])

    def read(self, tensor: Tensor, like: jax.ShapeDtypeStruct | Array) -> Array:
        """Reads one parameter; the other tensors are not looked at.

        Args:
          tensor: its row of the model's table.
          like: its shape, and the dtype to give it; where it carries a ``NamedSharding``, the
            devices get their slices, else the default device gets all.

        Returns:
          The parameter, its layers stacked.

        Raises:
          CheckpointError: a tensor of it is missing or misshapen, or a file cannot be read.

        >>> import tempfile
        >>> from hyperadapt_jax import models
        >>> config = models.config_from_dict(dict(model_type="qwen3", vocab_size=9, hidden_size=8,
        ...     intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4))
        >>> table = {tensor.path: tensor for tensor in models.tensors(config)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = models.export(folder, models.create(config))
        ...     checkpoint = models.Checkpoint(Path(folder))
        ...     like = jax.ShapeDtypeStruct((2, 8, 16), "bfloat16")
        ...     checkpoint.read(table["layers/up/kernel"], like).dtype
        dtype(bfloat16)
        """
        shape, leaves = tuple(like.shape), {tensor.path: like}
        chosen, missing = choose([tensor], leaves, self)
        if missing or not chosen:
            raise CheckpointError(f"{self.folder} lacks {first_few(missing or [tensor.name])}")
        _check_stored(tensor, chosen[tensor.path], shape)
        with without_mesh():
            where = named_sharding(like)
            return _assemble(tensor, chosen[tensor.path], shape, like.dtype, where, lambda _: None)


def load(
    folder: str | os.PathLike[str] | Checkpoint,
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
      folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`; or the
        `Checkpoint` of it.
      tensors: the model's table, one row for each parameter.
      params: the tree to fill: arrays or `jax.ShapeDtypeStruct`, for their shapes and dtypes alone.
      ignored: full-match regular expressions of checkpoint names that the model rightly leaves out.
      renewed: paths of optional parameters that are newly initialized, whatever is stored.
      initial: called with the path of each optional parameter that the checkpoint lacks; gives its
        new value.
      mesh: where the parameters live; without it, whole on the default device.
      rules: pairs of a full-match regular expression on the path and a PartitionSpec; the first
        that matches holds, and one must.
      progress: show a bar on standard error when it takes longer than two seconds.

    Returns:
      The tree, filled, and a `Report`.

    Raises:
      CheckpointError: the files cannot be read, or are not those of this model.
      ValueError: the table and the tree disagree, or a rule does not fit.

    >>> import tempfile
    >>> from hyperadapt_jax.models.checkpoint.writing import export
    >>> table = [Tensor("{layer}.up.weight", "up/kernel", transpose=True)]
    >>> stacked = {"up": {"kernel": jnp.ones((2, 4, 3))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export(folder, table, stacked, config={})
    ...     tree, report = load(folder, table, stacked)
    >>> tree["up"]["kernel"].shape, report.loaded
    ((2, 4, 3), ('up/kernel',))
    """
    paths, values, treedef = flatten(params)
    leaves = dict(zip(paths, values, strict=True))
    check_table(tensors, leaves)
    shardings = {path: _sharding(path, tuple(x.shape), mesh, rules) for path, x in leaves.items()}
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(expand_home(folder))
    chosen, missing = choose([t for t in tensors if t.path not in renewed], leaves, checkpoint)
    new = [tensor.path for tensor in tensors if tensor.path not in chosen]
    skipped = _check(checkpoint, tensors, leaves, chosen, missing, ignored)
    if new and initial is None:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {first_few(new)}, and no initial values are given for them"
        )

    filled = {}
    total = sum(x.bytes for parts in chosen.values() for x in parts)
    with progress_bar("loading", total, progress) as bar:
        for tensor in tensors:
            leaf, sharding = leaves[tensor.path], shardings[tensor.path]
            shape, dtype = tuple(leaf.shape), leaf.dtype
            if tensor.path in chosen:
                with without_mesh():
                    filled[tensor.path] = _assemble(
                        tensor, chosen[tensor.path], shape, dtype, sharding, bar.update
                    )
                continue
            assert initial is not None  # as checked above
            value = jnp.asarray(initial(tensor.path), dtype)
            if value.shape != shape:
                raise ValueError(f"initial value of {tensor.path}: {value.shape}, expected {shape}")
            filled[tensor.path] = value if sharding is None else jax.device_put(value, sharding)
    report = Report(
        loaded=tuple(path for path in leaves if path in chosen),
        initialized=tuple(path for path in leaves if path not in chosen),
        ignored=tuple(skipped),
    )
    return treedef.unflatten([filled[path] for path in paths]), report


def _read_headers(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's checkpoint by name, from the headers of its files alone."""
    if (folder / SINGLE).exists():
        files, weight_map = [SINGLE], None
    elif (folder / INDEX).exists():
        weight_map = read_json(folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise CheckpointError(f"{folder / INDEX}: 'weight_map' must map tensor names to files")
        files = sorted(set(weight_map.values()))
    else:
        pickles = [f.name for f in folder.iterdir() if any(f.match(p) for p in PICKLES)]
        advice = (
            f"; {first_few(sorted(pickles))} could run code when opened and is not read: convert "
            "it once to safetensors, with save_pretrained of transformers"
            if pickles
            else ""
        )
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{advice}")

    for name in files:
        file = file_inside(folder, name, INDEX if weight_map is not None else "")
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{folder / INDEX} names {name!r}: only safetensors are read")
        if not file.is_file():
            raise CheckpointError(f"{file}, which {INDEX} names, is missing: fetch it again")

    found: dict[str, Stored] = {}
    for name in files:
        file = folder / name
        with open_file(file) as reader:
            for key in sorted(reader.keys()):
                if key in found:
                    raise CheckpointError(f"{key} stands in both {found[key].file} and {file}")
                if weight_map is not None and weight_map.get(key) != name:
                    raise CheckpointError(f"{file} holds {key}, which {INDEX} does not place there")
                view = reader.get_slice(key)
                found[key] = Stored(key, file, tuple(view.get_shape()), str(view.get_dtype()))
    for key, name in (weight_map or {}).items():
        if key not in found:
            raise CheckpointError(f"{folder / name} lacks {key}, which {INDEX} places there")
    return found


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        start = b""
        with contextlib.suppress(OSError), open(file, "rb") as raw:
            start = raw.read(len(_LFS))
        reason = "it is a Git LFS pointer; run `git lfs pull`" if start == _LFS else error
        raise CheckpointError(f"{file} cannot be read: {reason}") from error


def _same(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors hold equal numbers, compared block by block."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= {*_ITEMSIZE}:
        return False
    index, itemsize = tuple((0, size) for size in one.shape), max(one.itemsize, other.itemsize)
    with open_file(one.file) as mine, open_file(other.file) as theirs:
        pairs = zip(
            _blocks(mine.get_slice(one.name), index, itemsize),
            _blocks(theirs.get_slice(other.name), index, itemsize),
            strict=True,
        )
        for (_, a), (_, b) in pairs:
            # Equal bits are found fast; other bits may still be equal numbers of two dtypes.
            if a.tobytes() != b.tobytes() and not np.array_equal(a.astype("f8"), b.astype("f8")):
                return False
    return True


def choose(
    tensors: Sequence[Tensor], leaves: Mapping[str, Any], checkpoint: Checkpoint
) -> tuple[dict[str, list[Stored]], list[str]]:
    """The stored tensors that fill each parameter, layer by layer, and the names found nowhere."""
    stored = checkpoint.tensors
    chosen: dict[str, list[Stored]] = {}
    missing: list[str] = []
    for tensor in tensors:
        parts, absent = [], []
        for layer in layers_of(tensor, leaves[tensor.path].shape):
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
    checkpoint: Checkpoint,
    tensors: Sequence[Tensor],
    leaves: Mapping[str, Any],
    chosen: Mapping[str, Sequence[Stored]],
    missing: Sequence[str],
    ignored: Sequence[str],
) -> list[str]:
    """Raises where the checkpoint is not the model's; returns the names to pass over."""
    stored = checkpoint.tensors
    taken = {part.name for parts in chosen.values() for part in parts}
    known = {
        name
        for tensor in tensors
        for layer in layers_of(tensor, leaves[tensor.path].shape)
        for name in tensor.names(layer)
    }
    rest = [name for name in stored if name not in taken]
    matchers = [matcher(pattern) for pattern in ignored]
    skipped = [n for n in rest if n in known or any(matches(n) for matches in matchers)]
    extra = [name for name in rest if name not in skipped]
    problems = []
    if missing:
        problems.append(f"it lacks {first_few(missing)}")
    if extra:
        problems.append(
            "it holds tensors that the model has no place for: "
            + first_few(
                f"{name} {stored[name].shape} in {stored[name].file.name}" for name in extra
            )
        )
    if problems:
        raise CheckpointError(
            f"{checkpoint.folder} is no checkpoint of this model: {'; '.join(problems)}. "
            "Does config.json belong to these weights?"
        )
    for tensor in tensors:
        _check_stored(tensor, chosen.get(tensor.path, ()), leaves[tensor.path].shape)
    return skipped


def _check_stored(tensor: Tensor, parts: Sequence[Stored], shape: Sequence[int]) -> None:
    """Raises where the stored tensors cannot fill a parameter of this shape."""
    expected = shape_in_file(tensor, shape)
    for part in parts:
        if part.shape != expected:
            raise CheckpointError(
                f"{part.file}: {part.name} has shape {part.shape}, but the model's "
                f"configuration asks for {expected}"
            )
        if part.dtype not in _ITEMSIZE:
            raise CheckpointError(
                f"{part.file}: {part.name} has dtype {part.dtype}; only "
                f"{', '.join(_ITEMSIZE)} are read: give an unquantized checkpoint"
            )


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


def _assemble(
    tensor: Tensor,
    parts: Sequence[Stored],
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
            key = tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))
            shards.setdefault(key, []).append(device)

    local = shape if sharding is None else sharding.shard_shape(shape)
    small = math.prod(local) * jnp.dtype(dtype).itemsize <= _SMALL
    used = jnp.zeros(()).devices() if sharding is None else sharding.device_set
    by_host = small or on_host(used)
    buffers: dict[tuple[tuple[int, int], ...], list[Any]]
    if by_host:
        buffers = {key: [_empty(local, dtype)] for key in shards}
    else:
        buffers = {
            key: [jnp.zeros(local, dtype, device=device) for device in devices]
            for key, devices in shards.items()
        }
    turn = -1 if tensor.transpose else 1
    for layer, part in enumerate(parts):
        # Opened again for each tensor, so that the pages of the mapped file are given back with it.
        with open_file(part.file) as reader:
            view = reader.get_slice(part.name)
            for key, devices in shards.items():
                stack, inner = key[: tensor.stacked], key[tensor.stacked :]
                if not all(start <= layer < stop for start, stop in stack):
                    continue
                prefix = tuple(layer - start for start, _ in stack)
                for start, block in _blocks(view, inner[::turn], part.itemsize):
                    start = (*prefix, *start[::turn])
                    if by_host:
                        block = transposed(block) if tensor.transpose else block
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
    if by_host:
        buffers = {
            key: [jax.device_put(buffers[key][0], device) for device in devices]
            for key, devices in shards.items()
        }
    arrays = [array for key in shards for array in buffers[key]]
    if sharding is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


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


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A transposed copy of a matrix, by strips of rows, so that both sides stay in the cache."""
    # As integers of the same size, which numpy moves as it is: it converts dtypes not its own.
    bits = np.dtype(f"u{matrix.dtype.itemsize}")
    result = np.empty(matrix.shape[::-1], bits)
    for row in range(0, len(matrix), _STRIP):
        result[:, row : row + _STRIP] = matrix[row : row + _STRIP].view(bits).T
    return result.view(matrix.dtype)


def on_host(devices: Iterable[Any]) -> bool:
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


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """A context for steps on single devices, which a mesh set by the caller would forbid."""
    return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))


def progress_bar(title: str, total: int, progress: bool) -> tqdm:
    """A bar of bytes on standard error, where that is a terminal and the work takes long."""
    disable = None if progress else True
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, delay=_DELAY, disable=disable)
