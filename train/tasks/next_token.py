"""What the tasks of a decoder share: the loss of the next token."""

from __future__ import annotations

import dataclasses

from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning

from ..errors import InputError
from ..trainer import losses
from ..trainer.step import Loss
from .task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Task):
    """A task of a decoder, which learns tokens."""

    loss_chunk: int | None = None
    """Tokens whose logits exist at once, in training and where the loss is measured: the loss is
    the same, and the head is applied again in the backward pass. 0 is all tokens of a batch. If
    not given, all where their logits take no more than 256 MiB of a device, else as many as do."""

    def check(self, config: models.Config) -> None:
        super().check(config)
        if self.loss_chunk is not None and self.loss_chunk < 0:
            raise InputError(
                f"--loss-chunk {self.loss_chunk}: give a number of tokens, or 0 for all at once"
            )

    def loss(self, tuning: Tuning) -> Loss:
        return losses.next_token(tuning, self.loss_chunk)
