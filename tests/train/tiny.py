"""A task of the loop that takes seconds: a random two-layer Llama learns short sequences."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import optax

from hyperadapt_jax import models
from hyperadapt_jax.methods import Tuning
from train import base, methods
from train.data.batches import Batches
from train.options import AdapterOptions, ModelOptions, OptimizerOptions, RunOptions
from train.trainer import loop

CONFIG = dict(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


def folder(where: Path, seed: int = 0) -> Path:
    """A Hugging Face folder of the model."""
    model = models.create(models.config_from_dict(CONFIG), seed=seed)
    return models.export(where, model, progress=False)


def examples(count: int = 40, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Sequences that repeat their first two tokens; lengths differ."""
    rng = np.random.default_rng(seed)
    rows = []
    for size in rng.integers(3, 14, count):
        tokens = np.resize(rng.integers(1, 32, 2), size + 1)
        rows.append({"tokens": tokens[:-1], "labels": tokens[1:]})
    return rows


def token_loss(tuning: Tuning):
    """Summed cross-entropy over the labels that count, and how many they are."""

    def loss(trainable, frozen, batch, key):
        logits = tuning.forward(trainable, frozen, batch["tokens"], mask=batch["mask"])
        counts = (batch["labels"] != -100) & batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"].clip(0))
        return (losses * counts).sum(), counts.sum().astype("float32")

    return loss


def task(model: Path, *, method: str = "hyperadapt", **options) -> loop.Job:
    """The task on the model in a folder."""
    loaded = base.load(ModelOptions(model=str(model)), quiet=True)
    tuning = methods.tune(loaded, AdapterOptions(method=method))
    loss = token_loss(tuning)
    held_out = Batches(examples(8, seed=1), 8, lengths=[16], shuffle=False)[0]
    measured = jax.jit(lambda t, f: loss(t, f, held_out, None))

    def evaluate(trainable):
        total, count = measured(trainable, tuning.frozen)
        return {"loss": float(total / count)}

    batches = Batches(examples(), 8, lengths=[8, 16], epochs=100)
    fields = dict(
        name="tiny",
        base=loaded,
        tuning=tuning,
        loss=loss,
        batches=batches,
        evaluate=evaluate,
        criterion=lambda metrics: -metrics["loss"],
    )
    return loop.Job(**{**fields, **options})


def run(folder: Path, **options) -> RunOptions:
    return RunOptions(**{"folder": folder, "steps": 20, "eval_every": 5, "quiet": True, **options})


def fit(model: Path, folder: Path, **options) -> loop.Result:
    """A whole run in an existing folder."""
    folder.mkdir(exist_ok=True)
    return loop.fit(
        task(model), folder, optimizer=OptimizerOptions(lr=3e-2), run=run(folder, **options)
    )
