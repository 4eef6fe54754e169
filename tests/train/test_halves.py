"""One half of what is held out chooses, the other reports: disjoint, whole, whatever the seed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import train
from train.__main__ import main
from train.errors import InputError
from train.metrics.halves import halves, of_both
from train.run.log import read_metrics
from train.tasks.classify import Classify
from train.tasks.glue import Glue

from .test_cli import bert, command, refused, write_glue  # noqa: F401

TINY = Path(__file__).parents[2] / "train/tasks/arithmetic/tiny"


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_halves_are_disjoint_whole_and_balanced(count):
    groups = np.random.default_rng(1).integers(0, 3, count).tolist()
    chooses, reports = halves(groups)
    assert sorted([*chooses, *reports]) == list(range(count))
    assert 0 <= len(chooses) - len(reports) <= 1
    for group in set(groups):
        sizes = [sum(groups[i] == group for i in half) for half in (chooses, reports)]
        assert abs(sizes[0] - sizes[1]) <= 1
    again = halves(groups)
    assert all(map(np.array_equal, again, (chooses, reports)))


def test_one_row_has_no_halves():
    with pytest.raises(InputError, match="--report-half: held out are 1 rows"):
        halves(["a"])


def test_both_halves_are_scored_apart():
    values, groups = np.array([1.0, 2.0, 4.0, 8.0]), ["x"] * 4
    found = of_both(lambda rows: {"sum": float(values[rows].sum())}, groups)
    chooses, reports = halves(groups)
    assert found == {"sum": values[chooses].sum(), "report/sum": values[reports].sum()}


@pytest.mark.parametrize("kind", ["mrpc", "stsb", "mnli", "classify"])
def test_the_metrics_of_a_half_are_those_of_its_rows_alone(kind):
    """The oracle: the same task, given the rows of one half, and nothing of the other."""
    rng = np.random.default_rng(0)
    splits = ("dev_matched", "dev_mismatched") if kind == "mnli" else ("dev",)
    outputs = {"stsb": 1, "mrpc": 2}.get(kind, 3)
    whole = {
        split: (
            rng.normal(size=(31, outputs)),
            rng.uniform(0, 5, 31) if outputs == 1 else rng.integers(0, outputs, 31),
        )
        for split in splits
    }

    def measured(given, **options):
        base = Classify if kind == "classify" else Glue

        class Given(base):
            def outputs(self, tuning, examples):
                return lambda trainable: given

        more = {"data": [], "classes": ("a", "b", "c")} if base is Classify else {"task": kind}
        return Given(**more, **options).measure(None, None)(None)

    found = measured(whole, report_half=True)
    names = [(split, round(label)) for split in splits for label in whole[split][1]]
    names = [label for _, label in names] if kind == "classify" else names
    for prefix, rows in zip(("", "report/"), halves(names), strict=True):
        part = {
            split: tuple(x[rows[(rows >= 31 * i) & (rows < 31 * (i + 1))] - 31 * i] for x in both)
            for i, (split, both) in enumerate(whole.items())
        }
        wanted = measured(part)
        assert {name: found[prefix + name] for name in wanted} == wanted
    assert len(found) == 2 * len(wanted)


def test_a_run_of_glue_tells_both_halves_and_is_measured_again(command, tmp_path):  # noqa: F811
    assert main([*command, "--report-half", "--seed", "1"]) == 0
    run, file = tmp_path / "run", tmp_path / "metrics.json"
    best = best_row(run, "eval/accuracy")
    assert main(["evaluate", "--folder", str(run), "--metrics", str(file), "--quiet"]) == 0
    assert {f"eval/{k}": v for k, v in json.loads(file.read_text()).items()} == best
    assert best.keys() == {"eval/accuracy", "eval/report/accuracy"}
    # Of other rows, all are measured.
    other = tmp_path / "other.csv"
    other.write_text("sentence,label\nthe cat sat,1\nthe dog is bad,0\n")
    words = ["evaluate", "--folder", str(run), "--data", str(other), "--metrics", str(file)]
    assert main([*words, "--quiet"]) == 0
    assert json.loads(file.read_text()).keys() == {"accuracy"}


def best_row(run: Path, name: str) -> dict[str, float]:
    rows = [row for row in read_metrics(run / "metrics.jsonl") if name in row]
    best = max(rows, key=lambda row: row[name])
    return {k: v for k, v in best.items() if k.startswith("eval/")}


def test_instructions_halve_rows_and_their_questions(tmp_path):
    """The halves' losses are those of their rows, as held-out rows of their own; so are answers."""
    rows = [{"question": f"{n}+{n}=", "answer": f"{2 * n}"} for n in range(10, 40)]
    held_out = rows[20:]
    asked = 6
    task = train.Instructions(
        data=rows[:20], eval_data=held_out, prompt="{question}", max_length=32, score="exact",
        max_new_tokens=4, questions=asked, report_half=True,
    )  # fmt: skip
    options = dict(steps=1, batch_size=8, quiet=True)
    result = train.fit(TINY, "row", task, folder=tmp_path / "halves", **options)
    for prefix, half in zip(("", "report/"), halves([i < asked for i in range(10)]), strict=True):
        questions = int(sum(half < asked))
        alone = dataclasses.replace(
            task, eval_data=[held_out[i] for i in half], questions=questions, report_half=False
        )
        wanted = train.fit(TINY, "row", alone, folder=tmp_path / f"half{prefix[:-1]}", **options)
        for name in ("loss", "perplexity", "accuracy"):
            assert result.last[prefix + name] == pytest.approx(wanted.last[name], rel=1e-5)


def test_rows_held_out_of_the_data_are_the_same_for_every_seed():
    rows = [{"text": f"the cat {n}", "label": "ab"[n % 2]} for n in range(40)]
    task = Classify(data=rows, eval_rows=10, classes=("a", "b"), report_half=True)
    drawn = [task.rows(seed)[1]["text"][:] for seed in (0, 1)]
    assert drawn[0] == drawn[1]
    free = dataclasses.replace(task, report_half=False)
    assert free.rows(0)[1]["text"][:] == drawn[0] != free.rows(1)[1]["text"][:]


def test_two_questions_are_needed(tmp_path):
    task = train.Instructions(
        data=[], prompt="{question}", score="exact", questions=1, report_half=True
    )
    with pytest.raises(InputError, match="--questions 1: --report-half needs at least 2"):
        train.fit(TINY, "row", task, folder=tmp_path / "run")
