"""Questions that a decoder answers in its own words, and how its answers are marked."""

from __future__ import annotations

import dataclasses
import decimal
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from hyperadapt_jax import models
from train import finite
from train.errors import InputError
from train.report import write

Score = Literal["none", "exact", "last-number", "first-match"]

# A minus after a digit, a letter or a bracket is an operator, not a sign.
_NUMBER = re.compile(
    r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)", re.ASCII
)


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """What a model is asked, and what is right.

    Attributes:
      prompts: tokens of each question.
      references: what is right, as text.
      score: how an answer is marked.
      tokenizer: the model's.
      stop_tokens: tokens that end an answer.
      max_new_tokens: most tokens of an answer.
      longest: most tokens of a prompt; a longer one is not asked, and has no answer.
      rows: questions that are answered at once.
    """

    prompts: Sequence[Sequence[int]]
    references: Sequence[str]
    score: Score
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    max_new_tokens: int
    longest: int
    rows: int

    @property
    def asked(self) -> list[int]:
        """Numbers of the questions that are short enough, those of like length side by side."""
        short = [i for i, prompt in enumerate(self.prompts) if 0 < len(prompt) <= self.longest]
        return sorted(short, key=lambda i: len(self.prompts[i]))

    def answers(self, forward: Callable[..., Any], *trees: Any) -> list[str | None]:
        """What the model answers, taking the likeliest token each time; "" where it is not asked,
        None where its outputs are not finite.

        Args:
          forward: ``forward(*trees, tokens, mask=, cache=)``; keep it: another one compiles again.
          *trees: its parameters.
        """
        asked = self.asked
        answers: list[str | None] = [""] * len(self.prompts)
        for start in range(0, len(asked), self.rows):
            some = asked[start : start + self.rows]
            # The last rows are filled up, so that no program is compiled for them alone.
            filled = some + some[:1] * (self.rows - len(some))
            found = models.generate(
                forward,
                *trees,
                prompts=[self.prompts[i] for i in filled],
                max_new_tokens=self.max_new_tokens,
                stop_tokens=self.stop_tokens,
            )
            texts = finite.decoded(
                found, lambda row: self.tokenizer.decode(row, skip_special_tokens=True)
            )
            for i, text in zip(some, texts, strict=False):
                answers[i] = text
        return answers

    def accuracy(self, answers: Sequence[str | None]) -> dict[str, float]:
        """``{"accuracy": ...}``, the share of right answers; nothing where none is marked."""
        marks = self.marks(answers)
        return {} if marks is None else {"accuracy": sum(marks) / len(marks)}

    def marks(self, answers: Sequence[str | None]) -> list[bool] | None:
        """Which answers are right: none that is not there; None where none is marked."""
        marks = mark(self.score, [answer or "" for answer in answers], self.references)
        return marks and [
            right and answer is not None for right, answer in zip(marks, answers, strict=True)
        ]

    def save(self, file: Path, answers: Sequence[str | None]) -> None:
        """Writes one JSON object a line: prompt, answer, reference and, if marked, right.

        Raises:
          InputError: the file cannot be written.
        """
        marks = self.marks(answers)
        lines = []
        for i, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True)):
            row = {"prompt": self.tokenizer.decode(prompt), "answer": answer}
            row["reference"] = self.references[i]
            if marks is not None:
                row["right"] = marks[i]
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write(file, "".join(lines))


def mark(score: Score, answers: Sequence[str], references: Sequence[str]) -> list[bool] | None:
    """Which answers are right.

    Args:
      score: ``exact``: the same text, but for space around it; ``last-number``: the last number of
        both is equal; ``first-match``: of all references, the one that the answer names first is
        its own; ``none``: answers are not marked.
      answers: what was answered.
      references: what is right.

    Raises:
      InputError: a reference has no number, or is empty.

    >>> mark("last-number", ["so 3 and 1,200.0 apples", "none"], ["#### 1200", "#### 3"])
    [True, False]
    >>> mark("first-match", ["It is true, not false", "no idea"], ["true", "false"])
    [True, False]
    """
    if score == "none":
        return None
    read = {"exact": str.strip, "last-number": last_number, "first-match": _first(references)}[
        score
    ]
    pairs = [(read(answer), read(right)) for answer, right in zip(answers, references, strict=True)]
    for number, (_, right) in enumerate(pairs):
        if right is None:
            raise InputError(
                f"--score {score} finds nothing to compare with in {references[number][:60]!r}:"
                " give another score, or --reference"
            )
    return [answer == right for answer, right in pairs]


def last_number(text: str) -> decimal.Decimal | None:
    """The last number of a text, or None.

    >>> last_number("5 - 7 = -2."), last_number("costs $1,250.50, no more"), last_number("20-15")
    (Decimal('-2'), Decimal('1250.50'), Decimal('15'))
    """
    found = _NUMBER.findall(text)
    return decimal.Decimal(found[-1].replace(",", "")) if found else None


def _first(references: Sequence[str]) -> Callable[[str], str | None]:
    """A function that finds which of the references a text names first, as a word of its own."""
    words = {reference.strip().casefold() for reference in references} - {""}
    longest = sorted(map(re.escape, words), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest)})(?!\w)") if words else re.compile(r"(?!)")

    def find(text: str) -> str | None:
        found = pattern.search(text.casefold())
        return found and found[0]

    return find
