"""How many problems of synthetic arithmetic a decoder solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from ...metrics.generation import GenerationEval
from . import problems

BATCH_SIZE = 384
LONGEST = 24  # tokens of an answer


def exam(
    kinds: Sequence[str],
    count: int,
    *,
    seed: int,
    tokenizer: Tokenizer,
    filled: Callable[[int], int] = lambda prompts: prompts,
) -> GenerationEval:
    """As many problems of each kind, of number families that no training ever used.

    Args:
      kinds: of problems; each is a group of its own.
      count: problems of each kind.
      seed: of their draw.
      tokenizer: the model's.
      filled: as in `GenerationEval`.
    """
    drawn = [problems.draw(kind, count, seed=seed, held=True) for kind in kinds]
    # One of each kind, then the next one of each, so that all batches cost the same.
    asked = [problem for each in zip(*drawn, strict=True) for problem in each]

    def correct(answers: Sequence[str]) -> list[bool]:
        return [problems.correct(p, answer) for p, answer in zip(asked, answers, strict=True)]

    prompts = problems.prompts(asked, tokenizer)
    stop: Any = tokenizer.token_to_id(problems.EOS)
    return GenerationEval(
        prompts=prompts,
        references=[problem.answer for problem in asked],
        decode=tokenizer.decode,
        stop_tokens=[stop],
        max_new_tokens=LONGEST,
        longest=max(map(len, prompts)),
        batch_size=BATCH_SIZE,
        filled=filled,
        correct=correct,
        groups=[problem.kind for problem in asked],
    )
