"""The demo's tasks: synthetic arithmetic, answered by a small decoder in its own words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from hyperadapt_jax.methods import Tuning

from ... import PROGRAM
from ...errors import InputError
from ...metrics import finite
from ...metrics.generation import GenerationEval
from ...parallel.mesh import activations_of
from ..next_token import NextToken
from ..task import Evaluation, Metrics, Setting, Training
from . import problems
from .exam import exam

WATCHED = 128  # at most, of each kind, while the demo trains; others than in the end
MOST = 10_000_000  # problems or texts, which are made on the spot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic(NextToken):
    """Problems that are made on the spot; those that are measured are of number families of their
    own."""

    kinds: ClassVar[dict[str, str]]  # of problems that are measured, and what they are

    texts: int = 24_000
    """Problems to learn from. A run that needs more sees them again."""
    problems: int = 512
    """Problems of each kind to measure on when it has ended; with --report-half, all along."""

    def __post_init__(self) -> None:
        for name in ("texts", "problems"):
            if not 1 <= getattr(self, name) <= MOST:
                raise InputError(f"--{name} {getattr(self, name)}: give a number from 1 to {MOST}")

    def evaluation(self, setting: Setting) -> Evaluation:
        final = self.final(setting)
        return Evaluation(lambda tuning: self.measure(tuning, final))

    def final(self, setting: Setting) -> GenerationEval:
        """The problems that a run is measured on when it has ended."""
        return self.exam(setting, self.problems, seed=1)

    def exam(self, setting: Setting, count: int, seed: int) -> GenerationEval:
        """As many problems of each kind."""
        filled = activations_of(setting.base.fn).filled
        return exam(list(self.kinds), count, seed=seed, tokenizer=_words(setting), filled=filled)

    def measure(self, tuning: Tuning, asked: GenerationEval) -> Callable[[Any], Metrics]:
        """A function from what trains to the accuracy of each kind of problems.

        It raises InputError where no answer has finite outputs.
        """

        def evaluate(trainable: Any) -> Metrics:
            answers = asked.generations(tuning.forward, trainable, tuning.frozen)

            def score(rows: np.ndarray) -> Metrics:
                some = [answers[i] for i in rows]
                return asked.accuracy(answers, rows.tolist()) | finite.count(some)

            return self.scored(score, asked.groups or answers)

        return evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoSteps(Arithmetic):
    """Problems of two steps, answered by two equations: what the demo learns."""

    name = "demo"
    kinds = {
        "ride": "two-step problems, the new task",
        "equation": "bare equations, known before",
        "story": "one-step problems, known before",
    }
    primary = "ride"
    known = ("equation", "story")

    def prepare(self, setting: Setting) -> tuple[Training, Evaluation]:
        tokenizer = _words(setting)
        drawn = problems.draw("ride", self.texts, seed=setting.seed, held=False)
        examples = problems.examples(drawn, tokenizer, answers_alone=True)
        if self.report_half:  # the other half is as good as problems of their own
            return Training(examples), self.evaluation(setting)
        watched = self.exam(setting, min(WATCHED, self.problems), seed=2)
        return Training(examples), Evaluation(lambda tuning: self.measure(tuning, watched))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStep(Arithmetic):
    """Equations and word problems of one step: what the demo's model knows before."""

    texts: int = 300_000
    """Texts to make. A run that needs more rows sees them again."""
    length: int = 64
    """Tokens of a row, filled with several texts."""
    problems: int = 256
    """Problems of each kind in an evaluation."""

    name = "pretrain"
    kinds = {
        "equation": "bare equations",
        "story": "word problems, answered by a number",
        "story_equation": "word problems, answered by an equation",
    }

    def prepare(self, setting: Setting) -> tuple[Training, Evaluation]:
        tokenizer, mixture = _words(setting), problems.MIXTURE
        drawn = problems.draw(mixture, self.texts, seed=setting.seed, held=False)
        examples = problems.examples(drawn, tokenizer, answers_alone=False)
        return Training(examples, pack=self.length), self.evaluation(setting)

    def criterion(self, metrics: Metrics) -> float:
        return min(metrics[kind] for kind in self.kinds)


def _words(setting: Setting) -> Tokenizer:
    """The tokenizer itself, which must be the one of the synthetic problems."""
    words = {word: number for number, word in enumerate(problems.vocabulary())}
    if setting.tokenizer.get_vocab() != words:
        raise InputError(
            f"--model {setting.base.name} does not know the words of this demo: give a model that"
            f" `{PROGRAM} pretrain` made, or take the recipe sft"
        )
    return setting.tokenizer.backend_tokenizer
