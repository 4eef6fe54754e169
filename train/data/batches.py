"""Batches in a seeded order: any of them can be asked for by number, so a run resumes by a number.

An example is a dict of one row: ``tokens``, other fields as long as it (``labels``,
``token_types``), and numbers such as ``label``. `Batches` first forms rows, of one example each or,
packed, of several; then, for each epoch, it shuffles the rows, gathers those of similar length and
cuts them into batches. `stream` reads batches ahead while the device works.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from ..errors import InputError
from . import packing

IGNORE = -100  # the label of a token that has no loss
WINDOW = 64  # batches among which rows of similar length are gathered

Batch = dict[str, np.ndarray]


class Batches(Sequence[Batch]):
    """The batches of all epochs, each a pure function of the seed and its number.

    A batch is a dict of arrays. The examples' fields are padded to ``[B, T]``, where T is one of
    the lengths, or gathered to ``[B]``; integers are int32, other numbers float32. With them come:

    * ``mask``: True at tokens, ``[B, T]``;
    * ``weight``: 1 for a row, 0 where a batch is filled up, ``[B]`` float32;
    * packed: ``segment_ids``, from 1 on in each row and 0 at padding, and ``positions``, counted
      anew in each example, ``[B, T]`` int32.

    Args:
      examples: a sequence of dicts, or a ``datasets.Dataset``.
      batch_size: rows of a batch, B.
      lengths: the lengths T that batches may have: for each there is a compiled program. If not
        given, `length_buckets` up to the longest example.
      pack: put several examples into each row of this length, by best-fit packing.
      seed: of the order.
      shuffle: draw a new order for each epoch. Without, rows come in the examples' order, but for
        those of similar length being gathered.
      epochs: how often each example comes.
      steps: the number of batches that have to be there, in place of ``epochs``.
      shard: ``(index, count)``: of each batch, the index-th of ``count`` equal parts.
      divisor: of the rows of a batch, for each shard: in so many parts it is computed.
      filled: from the rows of such a part to how many it is filled up to, as a mesh needs them.
      places: where the row of each example stands, for error messages.

    No batch is larger than the data: ``batch_size`` is then as many rows as there are, and as many
    more as ``count`` and ``divisor`` need.

    Raises:
      InputError: there are no examples, one is empty or too long, or a number is out of range.

    >>> examples = [{"tokens": [5, 6, 7], "label": 1}, {"tokens": [8], "label": 0}]
    >>> batch = Batches(examples, 2, lengths=[4], shuffle=False)[0]
    >>> batch["tokens"].tolist(), batch["label"].tolist()
    ([[5, 6, 7, 0], [8, 0, 0, 0]], [1, 0])
    >>> Batches([{"tokens": [5, 6]}, {"tokens": [8]}], 1, pack=4)[0]["segment_ids"].tolist()
    [[1, 1, 2, 0]]
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int,
        *,
        lengths: Sequence[int] | None = None,
        pack: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int = 1,
        steps: int | None = None,
        shard: tuple[int, int] = (0, 1),
        divisor: int = 1,
        filled: Callable[[int], int] = lambda rows: rows,
        places: Sequence[str] | None = None,
    ):
        index, count = shard
        for name, number in (("batch size", batch_size), ("epochs", epochs), ("shards", count)):
            if number < 1:
                raise InputError(f"{name} {number}: expected at least 1")
        if batch_size % count or not 0 <= index < count:
            raise InputError(f"shard {index} of {count} does not divide a batch of {batch_size}")
        self.examples, self._places = examples, places
        sizes = _sizes(examples)
        if not len(sizes):
            raise InputError("the data set is empty: there is nothing to make batches of")
        longest = int(sizes.max())
        lengths = [pack] if pack else sorted(lengths or length_buckets(longest))
        if sizes.min() == 0:
            raise InputError(f"{self.where([sizes.argmin()])} has no tokens: leave it out")
        if longest > lengths[-1]:
            raise InputError(
                f"{self.where([sizes.argmax()])} has {longest} tokens and must fit into"
                f" {lengths[-1]}: truncate it"
            )
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.packed = bool(pack)
        # The examples of each row, [N, n], -1 where it has fewer; the length that it needs, [N].
        self._rows = packing.pack(sizes, pack, seed) if pack else np.arange(len(sizes))[:, None]
        unit = count * divisor
        batch_size = min(batch_size, -(-len(self._rows) // unit) * unit)
        self.batch_size = batch_size
        self._part = slice(index * batch_size // count, (index + 1) * batch_size // count)
        self._parts, self._filled = divisor, filled(batch_size // unit)
        used = np.where(self._rows < 0, 0, sizes[self._rows]).sum(axis=1)
        self._lengths = np.asarray(lengths)[np.searchsorted(lengths, used)]
        self.per_epoch = -(-len(self._rows) // batch_size)
        if steps is not None:
            self.epochs = max(1, -(-steps // self.per_epoch))
        self._epoch = functools.lru_cache(maxsize=2)(self._cut)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __getitem__(self, number: Any) -> Any:
        # The length is the whole batch's, so that all its parts have one.
        return self._collate(self._members(number), self._lengths[self._batch(number)].max())

    def example_ids(self, number: int) -> np.ndarray:
        """The indices of a batch's examples, -1 where there is none: ``[B]``; packed ``[B, n]``."""
        rows = self._members(number)
        return rows if self.packed else rows[:, 0]

    def where(self, example_ids: Any, limit: int = 8) -> str:
        """Where examples stand: the files and lines of some, or else their indices."""
        numbers = sorted({int(row) for row in np.ravel(example_ids) if row >= 0})
        some = [str(n) if self._places is None else self._places[n] for n in numbers[:limit]]
        kind = "" if self._places is not None else "rows " if len(numbers) > 1 else "row "
        more = f" and {len(numbers) - limit} more" if numbers[limit:] else ""
        return f"{kind}{', '.join(some)}{more}"

    def _batch(self, number: int) -> np.ndarray:
        """The rows of a batch, of all shards."""
        epoch, place = divmod(range(len(self))[number], self.per_epoch)
        return self._epoch(epoch)[place]

    def _members(self, number: int) -> np.ndarray:
        """The examples of each row of this shard's batch, ``[B, n]``, filled up with -1."""
        batch = self._batch(number)
        rows = np.full((self.batch_size, self._rows.shape[1]), -1, np.int64)
        rows[: len(batch)] = self._rows[batch]
        parts = rows[self._part].reshape(self._parts, -1, rows.shape[1])
        more = self._filled - parts.shape[1]
        parts = np.pad(parts, [(0, 0), (0, more), (0, 0)], constant_values=-1)
        return parts.reshape(-1, rows.shape[1])

    def _cut(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = np.arange(len(self._rows))
        if self.shuffle:
            order = rng.permutation(order)
        size = WINDOW * self.batch_size
        windows = np.split(order, range(size, len(order), size))
        order = np.concatenate([w[np.argsort(self._lengths[w], kind="stable")] for w in windows])
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def _collate(self, rows: np.ndarray, length: int) -> Batch:
        """The batch of ``rows: [B, n]``, some of which only fill it up."""
        real = {i: self._row(row[row >= 0]) for i, row in enumerate(rows) if row[0] >= 0}
        batch: Batch = {}
        some = next(iter(real.values()), None) or self._row(self._rows[0, :1])
        for name, like in some.items():
            shape = (len(rows), length)[: 1 + like.ndim]
            batch[name] = np.full(shape, IGNORE if name == "labels" else 0, like.dtype)
            for i, row in real.items():
                place: tuple[Any, ...] = (i, *map(slice, row[name].shape))
                batch[name][place] = row[name]
        return batch

    def _row(self, members: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of one row: those of its examples, end to end, and what tells them apart."""
        examples = [self._example(int(i)) for i in members]
        sizes = [len(example["tokens"]) for example in examples]
        row = {
            name: np.concatenate([e[name] for e in examples]) if like.ndim else like
            for name, like in examples[0].items()
        }
        row["mask"] = np.ones(sum(sizes), bool)
        row["weight"] = np.ones((), np.float32)
        if self.packed:
            row["segment_ids"] = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
            row["positions"] = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        return row

    def _example(self, number: int) -> dict[str, np.ndarray]:
        example = {}
        for name, value in self.examples[number].items():
            value = np.asarray(value)
            like = np.int32 if np.issubdtype(value.dtype, np.integer) else np.float32
            example[name] = value.astype(like)
        shape = example["tokens"].shape
        for name, value in example.items():
            if value.shape != shape and (value.ndim or self.packed):
                what = "it cannot be packed" if not value.ndim else f"tokens has {shape}"
                where = self.where([number])
                raise InputError(f"{where}: {name} has the shape {value.shape}: {what}")
        return example


def length_buckets(longest: int) -> list[int]:
    """Few lengths, so that few programs are compiled: two to each doubling, from 32 to the longest.

    >>> length_buckets(100)
    [32, 48, 64, 96, 100]
    """
    steps = (size << doubling for doubling in range(longest.bit_length()) for size in (32, 48))
    return [*(size for size in steps if size < longest), longest]


def stream(batches: Batches, state: Mapping[str, Any] | None = None) -> grain.DatasetIterator:
    """Reads batches in their order, a few ahead of the device.

    Args:
      batches: what to read.
      state: what ``get_state()`` of such an iterator gave, a dict that JSON can hold, to continue
        there.

    Returns:
      An iterator with ``get_state()`` and ``set_state(state)``.
    """
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    if state is not None:
        iterator.set_state(dict(state))
    return iterator


def _sizes(examples: Any) -> np.ndarray:
    """The number of tokens of each example, ``[N]``."""
    if hasattr(examples, "with_format"):  # a datasets.Dataset: Arrow knows, no row need be read
        import pyarrow.compute

        columns = examples.select_columns("tokens").with_format("arrow").iter(10_000)
        sizes = [pyarrow.compute.list_value_length(part["tokens"]).to_numpy() for part in columns]
        return np.concatenate([np.zeros(0, np.int64), *sizes]).astype(np.int64)
    return np.fromiter((len(example["tokens"]) for example in examples), np.int64)
