"""What the tasks of an encoder with a new head have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning

from .. import base
from ..data.batches import Batches, stream
from ..data.examples import Examples, digest
from ..data.text import tokenize
from ..errors import InputError
from ..parallel import processes
from ..parallel.mesh import activations_of
from ..trainer import losses
from ..trainer.step import Loss
from .task import Setting, Task

# For each split, the head's outputs [N, labels] and the labels [N].
Outputs = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """One text or two, to a class or a number."""

    max_length: int = 128
    """Most tokens of a row; longer texts are truncated, and counted."""
    dropout: bool = True
    """Train with the dropout that the model's config.json asks for."""
    eval_batch_size: int = 128
    """Rows that are evaluated at once."""

    def check(self, config: models.Config) -> None:
        if self.max_length > config.max_length:
            raise InputError(f"--max-length {self.max_length}: the model takes {config.max_length}")
        if self.eval_batch_size < 1:
            raise InputError(f"--eval-batch-size {self.eval_batch_size}: give at least 1")

    def loss(self, tuning: Tuning) -> Loss:
        return losses.classification(tuning, dropout=self.dropout)

    def examples(
        self, rows: Any, split: str, setting: Setting, dropped: int = 0
    ) -> tuple[Examples, str, str]:
        """A split's examples, their digest, and a line on how many there are and what was lost."""
        made = tokenize(rows, setting.tokenizer, self.max_length)
        tokens = (row["tokens"] for row in made.data)
        base.check_tokens(tokens, setting.tokenizer, setting.base.config.vocab_size)
        summary = made.summarize(split, self.max_length, setting.log, dropped)
        return made, digest(made.data), summary

    def outputs(self, tuning: Tuning, examples: Mapping[str, Examples]) -> Callable[[Any], Outputs]:
        """A function from what trains to the head's outputs on each split."""
        logits = jax.jit(lambda *args: losses.logits(tuning, *args))
        filled = activations_of(tuning.fn).filled
        sets = {
            name: Batches(made.data, self.eval_batch_size, shuffle=False, filled=filled)
            for name, made in examples.items()
        }

        def compute(trainable: Any) -> Outputs:
            found: Outputs = {}
            for split, batches in sets.items():
                outputs, labels = [], []
                for batch in stream(batches):
                    real = batch["weight"] > 0
                    computed = processes.fetch(logits(trainable, tuning.frozen, batch))
                    outputs.append(computed[real])
                    labels.append(batch["label"][real])
                found[split] = np.concatenate(outputs), np.concatenate(labels)
            return found

        return compute


def predicted(outputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest classes ``[N]``, and which outputs are finite ``[N]``.

    What is not finite is wrong, whatever the label.

    Args:
      outputs: logits, ``[N, labels]``.
      labels: ``[N]``.
    """
    good = np.isfinite(outputs).all(-1)
    return np.where(good, outputs.argmax(-1), (labels + 1) % outputs.shape[-1]), good
