"""How well a decoder does by what it generates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hyperadapt_jax import models

from . import finite

Generations = list[str | None]


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationEval:
    """Prompts that a model continues, and which continuations are correct.

    Attributes:
      prompts: tokens of each prompt.
      references: a correct continuation of each, as text.
      decode: from tokens to text.
      stop_tokens: tokens that end a continuation; they are no part of its text.
      max_new_tokens: most tokens of a continuation.
      longest: most tokens of a prompt; a longer one is left out, and so is an empty one.
      batch_size: prompts that are continued at once.
      filled: from their number to how many they are filled up to, as a mesh needs them.
      correct: from the text of all continuations to which are correct; None if they are not scored.
      groups: to which group each prompt belongs, whose accuracy is a metric of that name; all are
        one, called ``accuracy``, if not given.
    """

    prompts: Sequence[Sequence[int]]
    references: Sequence[str]
    decode: Callable[[Sequence[int]], str]
    stop_tokens: Sequence[int]
    max_new_tokens: int
    longest: int
    batch_size: int
    filled: Callable[[int], int] = lambda prompts: prompts
    correct: Callable[[Sequence[str]], Sequence[bool]] | None = None
    groups: Sequence[str] | None = None

    @property
    def used(self) -> list[int]:
        """Indices of the prompts that are short enough, those of similar length side by side."""
        short = [i for i, prompt in enumerate(self.prompts) if 0 < len(prompt) <= self.longest]
        return sorted(short, key=lambda i: len(self.prompts[i]))

    def generations(self, forward: Callable[..., Any], *trees: Any) -> Generations:
        """Greedy continuations: "" where a prompt is left out, None where outputs are not finite.

        Args:
          forward: ``forward(*trees, tokens, mask=, cache=)``; keep it: another one compiles again.
          *trees: its parameters.
        """
        used = self.used
        found: Generations = [""] * len(self.prompts)
        size = self.filled(min(self.batch_size, len(used)))
        for start in range(0, len(used), max(size, 1)):
            some = used[start : start + size]
            # The last batch is filled up, so that no program is compiled for it alone.
            filled = some + some[:1] * (size - len(some))
            rows = models.generate(
                forward,
                *trees,
                prompts=[self.prompts[i] for i in filled],
                max_new_tokens=self.max_new_tokens,
                stop_tokens=self.stop_tokens,
            )
            for i, text in zip(some, finite.decoded(rows, self._text), strict=False):
                found[i] = text
        return found

    def score(self, generations: Sequence[str | None]) -> list[bool] | None:
        """Which are correct, None never; None where they are not scored."""
        if self.correct is None:
            return None
        scores = self.correct([text or "" for text in generations])
        return [ok and text is not None for ok, text in zip(scores, generations, strict=True)]

    def accuracy(
        self, generations: Sequence[str | None], rows: Iterable[int] | None = None
    ) -> dict[str, float]:
        """The share of correct ones by group; nothing where they are not scored.

        Args:
          generations: of all prompts.
          rows: indices of the prompts that count; all if not given.
        """
        scores = self.score(generations) or ()
        groups: dict[str, list[bool]] = {}
        for i in range(len(scores)) if rows is None else rows:
            groups.setdefault(self.groups[i] if self.groups else "accuracy", []).append(scores[i])
        return {group: sum(scores) / len(scores) for group, scores in groups.items()}

    def records(self, generations: Sequence[str | None]) -> list[dict[str, Any]]:
        """A mapping for each prompt: prompt, answer, reference and, if scored, correct."""
        scores, rows = self.score(generations), []
        for i, (prompt, answer) in enumerate(zip(self.prompts, generations, strict=True)):
            row = {"prompt": self.decode(prompt), "answer": answer, "reference": self.references[i]}
            rows.append(row if scores is None else row | {"correct": scores[i]})
        return rows

    def _text(self, tokens: Sequence[int]) -> str:
        ended = len(tokens) and tokens[-1] in self.stop_tokens
        return self.decode(tokens[:-1] if ended else tokens)
