"""Examples made of rows, kept in the cache, and digests of what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.compute

from ..errors import InputError, warn
from . import cache
from .readers import PLACE


class Examples(NamedTuple):
    """Examples for `train.data.batches.Batches`, and what was lost on the way to them.

    Attributes:
      data: the examples, in numpy's format.
      truncated: how many were truncated to the largest length.
      dropped: how many rows became no example.
      counts: how often something else befell an example, by what it is.
      places: where the row of each example stands; None if that is not known.
    """

    data: datasets.Dataset
    truncated: int
    dropped: int
    counts: Mapping[str, int] = {}
    places: Sequence[str] | None = None

    def summarize(
        self, name: str, max_length: int, log: Callable[[str], None], dropped: int = 0
    ) -> str:
        """Says in a line what came of a split's rows; as a warning where one in twenty was lost.

        Truncated rows do not count: that is what a largest length is for.

        Args:
          name: of the split.
          max_length: to which examples were truncated.
          log: shows what is no warning.
          dropped: rows that were left out before.

        Returns:
          What it said, without the name.
        """
        rows, lost = len(self.data) + self.dropped, self.dropped + dropped
        more = "".join(f", {count:,} {what}" for what, count in self.counts.items() if count)
        text = f"{rows:,} rows, {lost:,} dropped, {self.truncated:,} truncated"
        text += f" to {max_length} tokens{more}"
        if max(lost, *self.counts.values(), 0) > 0.05 * (rows + dropped):
            warn(f"{name}: {text}")
        else:
            log(f"{name}: {text}")
        return text


def build_examples(
    data: datasets.Dataset,
    function: Callable[[Mapping[str, list]], Mapping[str, list]],
    features: Mapping[str, Any],
    key: Any,
    counted: Sequence[str] = (),
) -> Examples:
    """Makes examples of rows, once: they are kept with the rows in the cache.

    Args:
      data: the rows.
      function: from columns of some rows to columns of their examples, ``truncated`` among them:
        whether the example was truncated. It may leave rows out. Where rows have a column `PLACE`,
        so do the examples that it gives.
      features: what the examples' columns hold, without ``truncated``.
      key: all that the function depends on besides the rows; its ``repr`` tells one from another.
      counted: columns of numbers, besides ``features``, whose sums are `Examples.counts`.

    Raises:
      InputError: no row became an example, or the cache cannot be written.
    """
    places = PLACE in data.column_names
    aside = {"truncated": datasets.Value("bool"), **dict.fromkeys(counted, datasets.Value("int32"))}
    if places:
        aside[PLACE] = datasets.Value("string")
    try:
        with cache.quietly():
            made = data.map(
                function,
                batched=True,
                remove_columns=data.column_names,
                features=datasets.Features({**features, **aside}),
                new_fingerprint=cache.fingerprint(data._fingerprint, key),
            )
    except OSError as error:
        raise cache.unusable(error) from error
    if not len(made):
        raise InputError(f"none of the {len(data)} rows became an example: allow longer ones")
    sums = {name: sum(made[name][:]) for name in ("truncated", *counted)}
    return Examples(
        made.remove_columns(list(aside)).with_format("numpy"),
        sums.pop("truncated"),
        len(data) - len(made),
        sums,
        made[PLACE] if places else None,
    )


def digest(*parts: Any) -> str:
    """A digest of what examples hold, wherever they came from and however they are stored.

    Args:
      *parts: examples, of which every column counts, or texts.

    Returns:
      64 hexadecimal digits.
    """
    total = hashlib.sha256()
    for part in parts:
        if not isinstance(part, datasets.Dataset):
            total.update(json.dumps(part).encode())
            continue
        names = sorted(part.column_names)
        for table in part.with_format("arrow").iter(4096):
            for name in names:
                column = table[name].combine_chunks()
                total.update(f"{name} {column.type} {len(column)}".encode())
                if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
                    sizes = pyarrow.compute.list_value_length(column)
                    total.update(sizes.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
                    column = column.flatten()
                values = column.to_numpy(zero_copy_only=False)
                total.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()


def identity(tokenizer: Any) -> str:
    """A digest of all that a fast tokenizer's numbers depend on, to be part of a key."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by each call, as it pleases.
    del state["truncation"], state["padding"]
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(
        json.dumps([state, tokenizer.special_tokens_map, template], sort_keys=True).encode()
    ).hexdigest()
