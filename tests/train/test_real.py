"""A pre-trained encoder on real data, for a few steps; the README quotes the whole run."""

from __future__ import annotations

import numpy as np
import pytest

from train.__main__ import main
from train.run import log

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.slow
def test_minilm_begins_to_learn_mrpc(shared, tmp_path, capsys):
    folder = tmp_path / "run"
    words = [
        "glue", "--task", "mrpc", "--model", str(shared / "weights/all-MiniLM-L6-v2"),
        "--data", str(shared / "data/glue"), "--folder", str(folder),
        "--steps", "16", "--batch-size", "16", "--max-length", "32", "--seed", "1",
    ]  # fmt: skip
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "42,242 trainable parameters of 22,713,986" in shown
    assert "train: 3,667 rows" in shown and "dev: 408 rows" in shown
    rows = log.read_metrics(folder / log.METRICS)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.02
    last = rows[-1]
    # Of the development set, 279 of 408 pairs are paraphrases.
    assert last["eval/accuracy"] >= 279 / 408
    assert last["eval/f1"] > 0.8
