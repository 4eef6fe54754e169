"""Examples of one text or two with a label, for an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from ..errors import InputError
from .examples import Examples, build_examples, identity
from .readers import PLACE
from .special import SpecialTokens

EMPTY = "with an empty text"


def tokenize(rows: datasets.Dataset, tokenizer: Any, max_length: int) -> Examples:
    """Makes examples of rows, between special tokens, the longer text of a pair truncated first.

    Text that spells a special token is text.

    Args:
      rows: what `read` gave.
      tokenizer: a fast one of transformers.
      max_length: most tokens of an example.

    Returns:
      Examples of ``tokens``, ``label`` and, if the tokenizer tells texts apart, ``token_types``.

    Raises:
      InputError: ``max_length`` leaves no room for text.
    """
    pairs = "pair" in rows.column_names
    least = tokenizer.num_special_tokens_to_add(pairs) + 1 + pairs
    if max_length < least:
        raise InputError(f"max_length {max_length}: expected at least {least}")

    special = SpecialTokens(tokenizer)

    def encode(texts: Sequence[list], **options: Any) -> Mapping[str, list]:
        return tokenizer(*texts, return_attention_mask=False, verbose=False, **options)

    def examples(columns: Mapping[str, list]) -> dict[str, list]:
        texts = [columns["text"], columns["pair"]] if pairs else [columns["text"]]
        encoded, count = encode(texts), len(columns["label"])
        apart = [[special.apart(text[i]) for text in texts] for i in range(count)]
        truncated = [False] * count
        for i, parts in enumerate(apart):
            # A text that has to be read in parts is given as they are, others as a whole.
            split = max(map(len, parts)) > 1
            row = [[part] for part in parts] if split else [[text[i]] for text in texts]
            again = encode(row, is_split_into_words=split) if split else {}
            for name, values in again.items():
                encoded[name][i] = values[0]
            truncated[i] = len(encoded["input_ids"][i]) > max_length
            if truncated[i]:
                cut = {"truncation": "longest_first", "max_length": max_length}
                for name, values in encode(row, is_split_into_words=split, **cut).items():
                    encoded[name][i] = values[0]
        made = {names[name]: values for name, values in encoded.items()}
        kept = {name: columns[name] for name in ("label", PLACE) if name in columns}
        empty = [any(not text[i].strip() for text in texts) for i in range(count)]
        return {**made, **kept, "truncated": truncated, EMPTY: empty}

    integers = datasets.List(datasets.Value("int32"))
    names = {"input_ids": "tokens"}
    if "token_type_ids" in tokenizer.model_input_names:
        names["token_type_ids"] = "token_types"
    features = {**dict.fromkeys(names.values(), integers), "label": rows.features["label"]}
    key = (identity(tokenizer), max_length)
    return build_examples(rows, examples, features, key, (EMPTY,))
