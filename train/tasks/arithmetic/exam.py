"""How many problems of synthetic arithmetic a decoder answers rightly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning

from ...metrics import finite
from . import problems as arithmetic
from .problems import Problem

ROWS = 384  # answered at once
LONGEST = 24  # tokens of an answer


@dataclasses.dataclass(frozen=True)
class Exam:
    """Problems whose number families no training ever used, as many of each kind.

    Attributes:
      problems: one of each kind, then the next one of each, so that all rounds cost the same.
      tokenizer: the model's.
    """

    problems: tuple[Problem, ...]
    tokenizer: Tokenizer

    @classmethod
    def of(cls, kinds: Sequence[str], count: int, *, seed: int, tokenizer: Tokenizer) -> Exam:
        """Draws ``count`` problems of each kind."""
        drawn = [arithmetic.problems(kind, count, seed=seed, held=True) for kind in kinds]
        rounds = zip(*drawn, strict=True)
        return cls(tuple(problem for each in rounds for problem in each), tokenizer)

    def answers(self, forward: Callable[..., Any], *trees: Any) -> list[str | None]:
        """What the model answers, taking the likeliest token each time; see `finite.decoded`.

        Args:
          forward: ``forward(*trees, tokens, mask=, cache=)``; keep it: another one compiles again.
          *trees: its parameters.
        """
        stop = [self.tokenizer.token_to_id(arithmetic.EOS)]
        prompts = arithmetic.prompts(self.problems, self.tokenizer)
        found: list[list[int]] = []
        for start in range(0, len(prompts), ROWS):
            found += models.generate(
                forward,
                *trees,
                prompts=prompts[start : start + ROWS],
                max_new_tokens=LONGEST,
                stop_tokens=stop,
            )
        return finite.decoded(found, self.tokenizer.decode)

    def on(self, tuning: Tuning) -> Callable[[Any], dict[str, float]]:
        """A function from what trains to the accuracy of what the model answers; see `answers`.

        It raises InputError where no answer has finite outputs.
        """

        def measure(trainable: Any) -> dict[str, float]:
            answers = self.answers(tuning.forward, trainable, tuning.frozen)
            return self.accuracy(answers) | finite.count(answers, "nonfinite")

        return measure

    def accuracy(self, answers: Sequence[str | None]) -> dict[str, float]:
        """The share of right answers, by kind of problem."""
        right: dict[str, list[bool]] = {}
        for problem, answer in zip(self.problems, answers, strict=True):
            correct = answer is not None and arithmetic.correct(problem, answer)
            right.setdefault(problem.kind, []).append(correct)
        return {kind: sum(marks) / len(marks) for kind, marks in right.items()}
