"""Special tokens, such as those that end a text, and text that merely spells one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

from ..errors import InputError


class SpecialTokens:
    """A tokenizer's special tokens.

    Args:
      tokenizer: a fast one of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self._normalizer = tokenizer, tokenizer.backend_tokenizer.normalizer
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        texts = {*tokenizer.all_special_tokens, *(token.content for token in added)}
        self._numbers = set(tokenizer.convert_tokens_to_ids(list(texts)))
        self._pattern = self._any(texts)
        # Spelled in other letters, a text may come to be one only as the tokenizer reads it.
        self._suspect = self._any({*texts, *map(self._normal, texts)})

    def split(self, text: str) -> list[str]:
        """A text between special tokens, and these at each second place."""
        return self._pattern.split(text)

    def apart(self, text: str) -> list[str]:
        """A text in parts, none of which has any of these tokens when it is tokenized alone."""
        parts, todo = [], [text]
        while todo:
            part = todo.pop()
            places = [0, *self._cuts(part), len(part)]
            pieces = [part[start:end] for start, end in itertools.pairwise(places)]
            if len(pieces) == 1:
                parts.append(part)
            else:
                todo += reversed(pieces)
        return parts

    def _cuts(self, text: str) -> list[int]:
        """Where a text is to be cut: within each special token that it spells."""
        if not (self._suspect.search(text) or self._suspect.search(self._normal(text))):
            return []
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        found = [
            span
            for token, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if token in self._numbers
            # A word that the tokenizer does not know is none, unless it is that token's own name.
            and (token != self.tokenizer.unk_token_id or self._pattern.search(text, *span))
        ]
        cuts = sorted({start + 1 for start, end in found if end - start > 1} - {len(text)})
        if found and not cuts:
            if len(text) < 2:
                raise InputError(f"{text!r} is a special token of the tokenizer, and no text")
            return [len(text) // 2]
        return cuts

    def _normal(self, text: str) -> str:
        return text if self._normalizer is None else self._normalizer.normalize_str(text)

    @staticmethod
    def _any(texts: Iterable[str]) -> re.Pattern[str]:
        longest = sorted(filter(None, texts), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")
