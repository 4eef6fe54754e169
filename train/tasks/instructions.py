"""Instructions and answers, or whole chats: a decoder learns the answers alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import datasets
import jax
import jax.numpy as jnp
import numpy as np

from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning

from .. import base
from ..data import chat, readers
from ..data.batches import Batch, Batches, stream
from ..data.chat import PromptFormat, Template
from ..data.columns import Column, Text
from ..data.examples import Examples, digest
from ..errors import InputError
from ..metrics import finite
from ..metrics.generation import GenerationEval, Generations
from ..metrics.scoring import Score, score
from ..parallel import processes
from ..parallel.mesh import activations_of
from ..trainer import losses
from .held_out import HeldOut
from .next_token import NextToken
from .task import Evaluation, Metrics, Setting, Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructions(NextToken, HeldOut):
    """Answers to instructions: rows are read as ``prompt`` and ``answer`` say, or are chats."""

    prompt: str | None = None
    r"""What the model is given, a text with columns' names in braces: '{question}\n'. If not given,
    rows are chats in the column "messages"."""
    answer: str = "{answer}"
    """What it is to say, likewise; the end-of-text token is added."""
    chat: bool = False
    """Show prompt and answer as turns of a chat, by the tokenizer's chat template."""
    max_length: int = 512
    """Most tokens of an example; longer ones are truncated, and counted."""
    pack: bool = False
    """Fill rows of --max-length tokens with several examples, which do not see one another."""
    eval_batch_size: int = 32
    """Rows that are evaluated at once."""
    score: Score = "none"
    """How generated answers are scored at each evaluation: the same text, the last number, or
    the first of all references that is named. The best step is then the one with most of them."""
    reference: str | None = None
    """What is right, as --answer; that itself if not given."""
    questions: int = 64
    """How many held-out rows the model answers."""
    max_new_tokens: int = 128
    """Most tokens of a generated answer."""

    name = "sft"

    @property
    def primary(self) -> str:
        return "loss" if self.score == "none" else "accuracy"

    @property
    def form(self) -> PromptFormat:
        """How rows read."""
        prompt = None if self.prompt is None else Template(self.prompt)
        return PromptFormat(prompt, Template(self.answer), self.chat)

    @property
    def columns(self) -> dict[str, Column]:
        """The columns that rows must have."""
        return self.form.columns | dict.fromkeys(self.right.columns if self.right else (), Text())

    @property
    def right(self) -> Template | None:
        """What is right; None for the last turn of a chat."""
        if self.reference is None and self.prompt is None:
            return None
        return Template(self.answer if self.reference is None else self.reference)

    def check(self, config: models.Config) -> None:
        super().check(config)
        for name in ("eval_batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)}: give at least 1")
        if self.questions < 0 or (self.score != "none" and not self.questions):
            raise InputError(f"--questions {self.questions}: give at least 1, or no --score")
        if self.report_half and self.score != "none" and self.questions < 2:
            raise InputError(f"--questions {self.questions}: --report-half needs at least 2")
        if not isinstance(config, models.DecoderConfig):
            raise InputError(f"--model is a {config.family} encoder: this recipe needs a decoder")
        if self.max_length > config.max_length:
            raise InputError(f"--max-length {self.max_length}: the model takes {config.max_length}")
        if self.questions and self.max_new_tokens >= config.max_length:
            raise InputError(
                f"--max-new-tokens {self.max_new_tokens}: the model takes {config.max_length}"
                " tokens, with the prompt"
            )

    def prepare(self, setting: Setting) -> tuple[Training, Evaluation]:
        rows, held_out = self.rows(setting.seed)
        examples, summary = self._examples(rows, "training rows", setting)
        training = Training(
            examples.data,
            {"training rows": digest(examples.data)},
            {"training rows": summary},
            examples.places,
            self.max_length if self.pack else None,
        )
        return training, self.measured_on(setting, held_out)

    def measured_on(self, setting: Setting, held_out: datasets.Dataset) -> Evaluation:
        examples, summary = self._examples(held_out, "held-out rows", setting)
        right = self._references(held_out, setting.tokenizer)
        questions = self.ask(setting, held_out)
        if skipped := len(questions.prompts) - len(questions.used):
            setting.log(
                f"{skipped} of {len(questions.prompts)} questions are not asked: with"
                " --max-new-tokens they are too long for the model"
            )

        def generate(tuning: Tuning, trainable: Any) -> list[dict[str, Any]]:
            found = questions.generations(tuning.forward, trainable, tuning.frozen)
            return questions.records(found)

        numbers = {place: i for i, place in enumerate(held_out[readers.PLACE])}
        rows = [numbers[place] for place in examples.places or ()]

        return Evaluation(
            lambda tuning: self.measure(tuning, examples, questions, rows),
            {"held-out rows": digest(examples.data, *right)},
            {"held-out rows": summary},
            generate if questions.prompts else None,
        )

    def criterion(self, metrics: Metrics) -> float:
        return metrics.get("accuracy", -metrics["loss"])

    def elsewhere(self, *, questions: int | None = None, **others: Any) -> Self:
        """The same task on other held-out rows, or with more questions; see `Task.elsewhere`."""
        task = super().elsewhere(**others)
        return task if questions is None else dataclasses.replace(task, questions=questions)

    def ask(self, setting: Setting, held_out: datasets.Dataset) -> GenerationEval:
        """The questions of the first held-out rows."""
        config: Any = setting.base.config  # a decoder's; see `check`
        tokenizer = setting.tokenizer
        rows = held_out.select(range(min(len(held_out), self.questions)))
        right = self._references(held_out, tokenizer)
        choices = tuple(dict.fromkeys(right))
        references = right[: len(rows)]

        def correct(generations: Sequence[str]) -> list[bool]:
            return score(self.score, generations, references, choices) or []

        questions = GenerationEval(
            prompts=chat.prompts(rows, self.form, tokenizer) if len(rows) else [],
            references=references,
            decode=functools.partial(
                tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
            stop_tokens=tuple(sorted({tokenizer.eos_token_id, *config.eos_tokens})),
            max_new_tokens=self.max_new_tokens,
            longest=config.max_length - self.max_new_tokens,
            batch_size=self.eval_batch_size,
            filled=activations_of(setting.base.fn).filled,
            correct=None if self.score == "none" else correct,
        )
        base.check_tokens(questions.prompts, tokenizer, config.vocab_size)
        score(self.score, right, right)  # refuses those that cannot be scored
        return questions

    def measure(
        self,
        tuning: Tuning,
        examples: Examples,
        questions: GenerationEval,
        rows: Sequence[int] | None = None,
    ) -> Callable[[Any], Metrics]:
        """A function from what trains to the metrics of the held-out rows.

        ``loss`` is the mean over the answers' tokens, in nats, ``perplexity`` its exponential, and
        ``accuracy`` the share of correct answers among the generated ones, where they are scored.
        Rows and answers whose outputs are not finite are counted, as ``nonfinite`` and
        ``nonfinite_answers``; the function raises InputError where all are.

        Args:
          tuning: what trains, on which model.
          examples: of the held-out rows.
          questions: of the first of these rows.
          rows: of which row each example is; each of its own if not given.
        """
        of_row = np.arange(len(examples.data)) if rows is None else np.asarray(rows)
        filled = activations_of(tuning.fn).filled
        batches = Batches(examples.data, self.eval_batch_size, shuffle=False, filled=filled)
        token_losses = losses.token_losses(tuning, self.loss_chunk)

        @jax.jit
        def measure(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, ...]:
            found, counts = token_losses(trainable, frozen, batch)
            good = jnp.all(jnp.isfinite(found), axis=1, where=counts)
            return jnp.sum(found, 1, where=counts), jnp.sum(counts, 1), good

        def evaluate(trainable: Any) -> Metrics:
            parts = []
            for batch in stream(batches):
                real = batch["weight"] > 0
                computed = measure(trainable, tuning.frozen, batch)
                parts.append([part[real] for part in processes.fetch(computed)])
            totals, weights, good = map(np.concatenate, zip(*parts, strict=True))
            answers: Generations = []
            if questions.correct is not None:
                answers = questions.generations(tuning.forward, trainable, tuning.frozen)

            def score(rows: np.ndarray) -> Metrics:
                its = np.isin(of_row, rows)
                weight = float(weights[its].sum())
                mean = float(totals[its].sum(dtype=float)) / weight if weight else math.nan
                # A float has room for the perplexity of 709 nats.
                metrics = {"loss": mean, "perplexity": math.inf if mean > 709 else math.exp(mean)}
                metrics |= finite.count(good[its].tolist())
                if questions.correct is not None:
                    asked = rows[rows < len(answers)].tolist()
                    metrics |= questions.accuracy(answers, asked)
                    some = [answers[i] for i in asked]
                    metrics |= finite.count(some, "nonfinite_answers")
                return metrics

            count = max(of_row.max() + 1, len(answers))
            return self.scored(score, [row < len(answers) for row in range(count)])

        return evaluate

    def _examples(
        self, rows: datasets.Dataset, name: str, setting: Setting
    ) -> tuple[Examples, str]:
        """The examples of rows, and how many there are and what was lost."""
        examples = chat.examples(rows, self.form, setting.tokenizer, self.max_length)
        tokens = (row["tokens"] for row in examples.data)
        base.check_tokens(tokens, setting.tokenizer, setting.base.config.vocab_size)
        return examples, examples.summarize(name, self.max_length, setting.log)

    def _references(self, rows: datasets.Dataset, tokenizer: Any) -> list[str]:
        """What is right, of each row."""
        if self.right is None:
            return chat.references(rows, tokenizer)
        return [self.right.fill(row) for row in rows]
