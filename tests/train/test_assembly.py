"""Runs from Python: the same as from the command line, with data, a loss and a measure of one's
own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperadapt_jax as ha
import train
from hyperadapt_jax import models
from train.__main__ import main
from train.run.log import read_metrics

from . import tiny

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "train/tasks/arithmetic/tiny"
ROWS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 14) for b in range(1, 4)]
SHORT = {"steps": 3, "batch_size": 4, "quiet": True}


def instructions(data, **options):
    wanted = dict(prompt="{question}", eval_rows=4, questions=2, max_new_tokens=4, max_length=16)
    return train.Instructions(data=data, **{**wanted, **options})


@pytest.fixture(scope="module")
def from_files(tmp_path_factory):
    """The folder of a run of the recipe sft."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--model", str(TINY), "--data", str(folder / "rows.jsonl"), "--prompt", "{question}",
             "--eval-rows", "4", "--questions", "2", "--max-new-tokens", "4", "--max-length", "16",
             "--steps", "3", "--batch-size", "4", "--quiet"]  # fmt: skip
    assert main(["sft", *words, "--folder", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_rows_in_memory_give_what_rows_in_files_give(from_files, tmp_path, kind, capsys):
    result = train.fit(TINY, "hyperadapt", instructions(kind(ROWS)), folder=tmp_path / "r", **SHORT)
    assert read_metrics(tmp_path / "r/metrics.jsonl") == read_metrics(from_files / "metrics.jsonl")
    predictions = [folder / "predictions.jsonl" for folder in (tmp_path / "r", from_files)]
    assert predictions[0].read_text() == predictions[1].read_text()
    assert "perplexity" in str(result) and result.step in (0, 3)
    params = models.functional(models.load(TINY, progress=False))[1]
    found, wanted = (ha.load(f / "adapter", params) for f in (tmp_path / "r", from_files))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), found.scales, wanted.scales)
    )

    # It goes on with the same rows, and with no others.
    again = train.fit(
        TINY, "hyperadapt", instructions(kind(ROWS)), folder=tmp_path / "r", resume=True, **SHORT
    )
    assert again.best == result.best
    other = instructions(kind([*ROWS, {"question": "1+1=", "answer": "2"}]))
    with pytest.raises(train.InputError, match="rows changed since the run"):
        train.fit(TINY, "hyperadapt", other, folder=tmp_path / "r", resume=True, **SHORT)
    assert main(["evaluate", "--folder", str(tmp_path / "r")]) == 2
    assert "is of no recipe that trains: its recipe is 'fit'" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(train.Task):
    """Sequences that repeat their first two tokens, with a smoothed loss; without a tokenizer."""

    smoothing: float = 0.1
    name = "copy"

    def prepare(self, setting):
        held_out = tiny.examples(6, seed=1)
        tokens = np.zeros((6, 16), np.int32)
        for row, example in zip(tokens, held_out, strict=True):
            row[: len(example["tokens"])] = example["tokens"]

        def on(tuning):
            logits = jax.jit(lambda t: tuning.forward(t, tuning.frozen, tokens))
            right = np.stack([np.pad(e["labels"], (0, 16 - len(e["labels"]))) for e in held_out])

            def measure(trainable):
                found = np.asarray(logits(trainable)).argmax(-1)
                return {"copied": float(np.mean(found[tokens > 0] == right[tokens > 0]))}

            return measure

        return train.Training(tiny.examples()), train.Evaluation(on)

    def loss(self, tuning):
        def loss(trainable, frozen, batch, key):
            logits = tuning.forward(trainable, frozen, batch["tokens"], mask=batch["mask"])
            wanted = jax.nn.one_hot(batch["labels"], logits.shape[-1])
            losses = optax.softmax_cross_entropy(
                logits, optax.smooth_labels(wanted, self.smoothing)
            )
            return (losses * batch["mask"]).sum(), batch["mask"].sum().astype(jnp.float32)

        return loss

    def criterion(self, metrics):
        return metrics["copied"]


def test_a_task_of_ones_own_has_its_loss_and_its_measure(tmp_path, capsys):
    model = tiny.folder(tmp_path / "model")
    options = dict(steps=40, batch_size=8, lr=0.1, head_lr=1e-2, full="head/.*", eval_every=20)
    result = train.fit(model, "row", Copy(), folder=tmp_path / "run", **options)
    assert set(result.best) == {"copied"} and result.best["copied"] > result.before["copied"]
    shown = capsys.readouterr()
    assert "copied" in shown.out and "copy: step 20/40: copied" in shown.err
    report = (tmp_path / "run/report.md").read_text()
    assert report.startswith("# copy: row") and "train.fit(...)" in report


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(learning_rate=0.1), "learning_rate: there is no such option; nearest: "),
        (dict(lr="fast"), "lr fast: give a number"),
        (dict(method="adalora"), "method adalora: choose one of hyperadapt"),
        (dict(method="row", rank=4), "--rank 4: --method row has no such option; it is for .*lora"),
        (dict(method="lora", rank=0), "--method lora: rank: is 0; give at least 1"),
        (dict(method="lora", lora_dropout=1.0), "--method lora: dropout: is 1.0; give a number"),
        (dict(folder=None), "folder None: give"),
        (dict(steps=0), "--steps 0: give a number from 1"),
        (dict(model="/nowhere/at/all"), "nowhere"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(tmp_path, given, message):
    words = {"model": TINY, "method": "row", "folder": tmp_path / "run", **SHORT, **given}
    with pytest.raises(train.InputError, match=message):
        train.fit(task=instructions(ROWS), **words)
    assert not (tmp_path / "run").exists()


def test_rows_in_memory_are_checked_as_others(tmp_path):
    for rows, message in [
        ([*ROWS, {"question": "1+1="}], "row 13: there is no column 'answer'"),
        ([*ROWS, {"question": "1+1=", "answer": float("nan")}], "row 13: column 'answer' is or"),
        ([], "the rows given has no rows"),
        ([*ROWS, 3], "row 13 is a number: expected an object"),
    ]:
        with pytest.raises(train.InputError, match=message):
            train.fit(TINY, "row", instructions(rows), folder=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


def test_the_public_names_are_there():
    assert {"fit", "Task", "Instructions", "Glue"} <= set(dir(train))
    assert train.Glue(task="mrpc").name == "mrpc" and train.Result.__name__ == "Result"
    with pytest.raises(AttributeError, match="'train' has no attribute 'tune'"):
        train.tune  # noqa: B018
