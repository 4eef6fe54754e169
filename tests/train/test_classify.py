"""The recipe `classify`: classes that are discovered, their metrics, and the confusion matrix."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import sklearn.metrics

import train
from train.__main__ import main
from train.base import load_abstract
from train.errors import InputError
from train.options import ModelOptions, read_config
from train.run.log import read_metrics
from train.tasks.classification import predicted
from train.tasks.classify import Classify, confusion
from train.tasks.task import Setting

from .test_cli import bert, refused  # noqa: F401

TOPICS = {"animals": ("the cat sat", "the dog ran"), "films": ("a good film", "a bad film"),
          "furniture": ("the mat", "on the mat")}  # fmt: skip
ROWS = [{"text": f"{text} {n}", "label": topic} for n in range(8)
        for topic, texts in TOPICS.items() for text in texts]  # fmt: skip


@pytest.fixture
def command(bert, tmp_path):  # noqa: F811
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        "classify", "--model", str(bert), "--data", str(tmp_path / "rows.jsonl"), "--folder",
        str(tmp_path / "run"), "--steps", "250", "--batch-size", "8", "--max-length", "16",
        "--eval-rows", "12", "--lr", "3e-3", "--eval-every", "125", "--method", "full",
        "--no-dropout",
    ]  # fmt: skip


def test_a_run_learns_and_is_measured_again(command, tmp_path, capsys):
    """To be measured on other rows, a run needs its training rows no more."""
    assert main(command) == 0
    run = tmp_path / "run"
    assert read_config(run / "config.yaml")["classes"] == ["animals", "films", "furniture"]
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "eval/accuracy" in row]
    best = max(rows, key=lambda row: row["eval/accuracy"])
    assert best["eval/accuracy"] > 0.9 and best["eval/macro_f1"] > 0.9
    assert (run / "confusion.png").read_bytes()[1:4] == b"PNG"
    assert "![confusion](confusion.png)" in (run / "report.md").read_text()
    assert main(["evaluate", "--folder", str(run), "--metrics", str(tmp_path / "m.json")]) == 0
    again = json.loads((tmp_path / "m.json").read_text())
    assert again == {name: best[f"eval/{name}"] for name in ("accuracy", "macro_f1")}
    other = tmp_path / "other.csv"
    other.write_text("text,label\nthe cat sat,animals\na good film,films\n")
    (tmp_path / "rows.jsonl").unlink()
    words = ["evaluate", "--folder", str(run), "--data", str(other), "--quiet"]
    assert main([*words, "--metrics", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "m.json").read_text()).keys() == {"accuracy", "macro_f1"}
    assert main([*command, "--resume", "--no-quiet"]) == 2  # its data are gone
    capsys.readouterr()


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 4)).astype(np.float32), rng.integers(0, 3, 40)
    logits[3] = np.nan

    class Given(Classify):
        def outputs(self, tuning, examples):
            return lambda trainable: {"held-out rows": (logits, labels)}

    found = Given(data=[], classes=("a", "b", "c", "d")).measure(None, None)(None)
    predictions = predicted(logits, labels)[0]
    assert predictions[3] != labels[3]
    f1 = sklearn.metrics.f1_score(labels, predictions, average="macro")
    accuracy = sklearn.metrics.accuracy_score(labels, predictions)
    assert found == pytest.approx({"accuracy": accuracy, "macro_f1": f1, "nonfinite": 1.0})


@pytest.mark.parametrize("count", [2, 30])
def test_the_confusion_matrix_has_a_row_for_each_true_class(count):
    labels = np.array([0, 0, 1, 1, 1])
    figure = confusion(np.array([0, 1, 1, 1, 0]), labels, [f"class {i}" for i in range(count)])
    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array()[:2, :2], [[1 / 2, 1 / 2], [1 / 3, 2 / 3]])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == (["1", "1", "1", "2"] if count == 2 else [])
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == (
        "predicted class", "true class")  # fmt: skip


def test_classes_that_are_numbers_are_in_their_order():
    rows = [{"text": "a", "label": label} for label in (10, 9, 2, 10)]
    assert Classify(data=rows).resolve().classes == ("2", "9", "10")
    rows = [{"text": "a", "label": label} for label in ("no", "10", "9", "an")]
    assert Classify(data=rows).resolve().classes == ("9", "10", "an", "no")


def test_a_class_is_its_text_and_no_index(bert):  # noqa: F811
    """Labels 1 and 2 are the outputs 0 and 1, whatever their type."""
    rows = [{"text": f"the cat {i}", "label": 1 + i % 2} for i in range(8)]
    task = Classify(data=rows, eval_rows=2).resolve()
    which = ModelOptions(model=str(bert))
    training, _ = task.prepare(Setting(load_abstract(which, task.num_labels), which))
    places = [int(place.removeprefix("row ")) - 1 for place in training.places]
    assert [example["label"] for example in training.examples] == [i % 2 for i in places]


def test_from_python_with_rows_of_ones_own(bert, tmp_path):  # noqa: F811
    task = train.Classify(data=ROWS, eval_data=ROWS[:6], max_length=16)
    result = train.fit(
        bert, "row", task, folder=tmp_path / "run", steps=2, batch_size=4, quiet=True
    )
    assert result.best.keys() == {"accuracy", "macro_f1"}
    head = result.trainable["full"]["classifier/out/bias"]
    assert head.shape == (3,) and jax.tree.leaves(result.trainable["scales"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": "text"}, "--text and --label are both 'text': give two columns"),
        ({"label": "topic"}, "row 1: there is no column 'topic'; nearest: "),
        ({"data": [{"text": "a", "label": "x"}] * 3}, "there are 1 classes .'x'.: give a column"),
        ({"data": [{"text": "a", "label": i} for i in range(1001)]}, "there are 1001 classes"),
        ({"classes": ("animals", "films")}, "row 5: column 'label' is 'furniture', which is none"),
        ({"classes": ("films", "films")}, "--classes films films: one is named twice"),
        ({"eval_data": [{"text": "a", "label": "x"}]}, "row 1: column 'label' is 'x', which"),
        ({"data": [{"text": "a", "label": None}]}, "row 1: column 'label' is null"),
        ({"eval_rows": 48}, "--eval-rows 48 leaves nothing of 48 rows"),
        ({"eval_rows": 0}, "--eval-rows 0: give at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused(given, message, bert, tmp_path):  # noqa: F811
    task = Classify(**{"data": ROWS, "eval_rows": 12, "max_length": 16, **given})
    with pytest.raises(InputError, match=message):
        train.fit(bert, "row", task, folder=tmp_path / "run", steps=1)
    assert not (tmp_path / "run").exists()


def test_a_decoder_is_refused(command, capsys):
    other = "train/tasks/arithmetic/tiny"
    assert "this recipe needs an encoder" in refused(capsys, *command, "--model", other)


def test_what_is_no_option_of_the_task_is_refused(command, tmp_path, capsys):
    words = ["evaluate", "--folder", str(tmp_path / "run")]
    assert main([*command, "--steps", "1"]) == 0
    message = "--questions: a run of classify has no such thing to change"
    assert message in refused(capsys, *words, "--questions", "3")
    assert "--rows: the run held out rows of its own" in refused(capsys, *words, "--rows", "3")
    assert "generates no answers" in refused(capsys, *words, "--predictions", "x")
