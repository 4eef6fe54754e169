"""Comparisons and sweeps: who chooses, who reports, and that any moment is one to go on from."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.text import Text

from train.__main__ import main
from train.comparison import figures, protocol
from train.comparison.runs import PROGRAMS, Outcome, Planned, shared_programs
from train.comparison.summary import MethodSummary, Spread, choose
from train.options import OptimizerOptions, RunOptions
from train.recipes import classify
from train.run.log import read_metrics

from .test_cli import bert, refused, write_glue  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_glue(tmp_path_factory.mktemp("data") / "glue")


@pytest.fixture(scope="module")
def given(bert, data) -> dict:  # noqa: F811
    """What is compared, as YAML holds it."""
    options = dict(
        task="sst2", model=str(bert), data=str(data), steps=4, eval_every=2, batch_size=4,
        max_length=16, schedule="constant", warmup=0, patience=1,
    )  # fmt: skip
    own = {"method": "full", "head_lr": None, "lr": ["1e-2", 1e38]}
    methods = {"row": {}, "all": own}
    return dict(recipe="glue", options=options, methods=methods, lr=["1e-3", 0.1], seeds=[0, 1])


def compare(given: dict, folder: Path, name: str = "out") -> list[str]:
    """The command's words, and its file."""
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    return ["compare", str(file), "--folder", str(folder / name)]


@pytest.fixture(scope="module")
def words(given, tmp_path_factory) -> list[str]:
    return compare(given, tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def whole(words) -> Path:
    """The folder of a comparison that nothing stopped."""
    assert main([*words, "--quiet"]) == 0
    return Path(words[-1])


def without_times(file: Path) -> dict:
    """What a comparison found, without what depends on the clock and on where it lies."""
    found = json.loads(file.read_text())
    for each in [*found["runs"], *found["methods"].values()]:
        for name in ("step_seconds", "seconds", "sessions"):
            each.pop(name, None)
        each["error"] = "error" in each  # which names the folder
    del found["command"], found["environment"]
    return found


def table(folder: Path) -> list[list[str]]:
    """The cells of compare.md, without the times."""
    lines = (folder / "compare.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    kept = [i for i, name in enumerate(rows[0]) if name != "step"]
    return [[row[i] for i in kept] for row in rows if len(row) == len(rows[0])]


def test_one_half_chooses_and_the_other_reports(whole):
    """The oracle: rates, steps and scores by hand, from the runs' metrics.jsonl alone."""
    found = json.loads((whole / "compare.json").read_text())
    assert found["seeds"] == [0, 1] and found["primary"] == "accuracy"

    def at_best(run: str) -> tuple[float, float]:
        rows = read_metrics(whole / run / "metrics.jsonl")
        evaluated = [row for row in rows if "eval/accuracy" in row]
        (step,) = (each["best_step"] for each in found["runs"] if each["folder"] == run)
        best = max(row["eval/accuracy"] for row in evaluated)
        (row,) = (row for row in evaluated if row["step"] == step)
        assert row["eval/accuracy"] == best
        return best, row["eval/report/accuracy"]

    chosen = {lr: at_best(f"row/lr-{lr}-seed-0")[0] for lr in (0.001, 0.1)}
    lr = max(chosen, key=lambda lr: (chosen[lr], -lr))
    row = found["methods"]["row"]
    assert row["lr"] == lr and row["at_edge"]
    reported = [at_best(f"row/lr-{lr}-seed-{seed}")[1] for seed in (0, 1)]
    assert row["metrics"]["accuracy"]["mean"] == pytest.approx(statistics.mean(reported))
    assert row["metrics"]["accuracy"]["std"] == pytest.approx(statistics.stdev(reported))
    assert {each["folder"] for each in found["runs"]} == {
        *(f"row/lr-{each}-seed-0" for each in (0.001, 0.1)), f"row/lr-{lr}-seed-1",
        "all/lr-0.01-seed-0", "all/lr-1e+38-seed-0", "all/lr-0.01-seed-1",
    }  # fmt: skip
    shown = Spread.of(reported)
    (line,) = (cells for cells in table(whole) if cells[0] == "row")
    assert line[1] == f"{lr:g} (edge)" and line[3] == str(shown)
    assert all((whole / name).read_bytes()[1:4] == b"PNG" for name in ("lr.png", "parameters.png"))


def test_a_run_that_diverged_is_a_line_and_not_the_end(whole):
    found = json.loads((whole / "compare.json").read_text())
    (lost,) = (run for run in found["runs"] if "error" in run)
    assert lost["folder"] == "all/lr-1e+38-seed-0"
    text = (whole / "compare.md").read_text()
    assert "Diverged: all, lr 1e+38, seed 0: the loss was not finite" in text
    assert found["methods"]["all"]["lr"] == 0.01 and found["methods"]["all"]["diverged"] == 1


def test_a_comparison_says_what_it_cost(whole):
    found = json.loads((whole / "compare.json").read_text())
    row, full = (found["methods"][name] for name in ("row", "all"))
    assert 0 < row["trainable_parameters"] < full["trainable_parameters"]
    # Adam holds two more numbers for each that trains, and the step's gradient is one more.
    more = full["trainable_parameters"] - row["trainable_parameters"]
    assert full["step_bytes"] - row["step_bytes"] >= 2 * 4 * more
    assert 0 < row["step_seconds"] < 60
    header = table(whole)[0]
    assert header == ["method", "lr", "parameters", "accuracy", "memory", "runs"]


def test_the_same_command_again_makes_no_run(whole, words, capsys):
    files = [f for f in whole.glob("*/*/*") if f.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files}
    cells, found = table(whole), without_times(whole / "compare.json")
    assert main(words) == 0
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert table(whole) == cells and without_times(whole / "compare.json") == found
    assert "before training" in capsys.readouterr().out


def test_a_run_of_it_is_a_run_as_others_are(whole, tmp_path):
    run, file = whole / "row/lr-0.1-seed-0", tmp_path / "again.json"
    assert main(["evaluate", "--folder", str(run), "--metrics", str(file), "--quiet"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert json.loads(file.read_text()) == result["best"]


def test_what_makes_a_run_another_is_refused(whole, words, given, capsys):
    file = Path(words[1])
    text = file.read_text()
    try:
        other = str(ROOT / "tests/train/e659287/bert")
        for name, value in {"steps": 5, "model": other}.items():
            file.write_text(yaml.safe_dump(given | {"options": given["options"] | {name: value}}))
            error = refused(capsys, *words)
            assert f"holds another run: {name} was" in error and "change" in error
    finally:
        file.write_text(text)


@pytest.mark.slow
def test_kill_nine_and_on(whole, given, tmp_path):
    """Killed in a run's midst, then in the next's: in the end all is as if nothing had been."""
    words = compare(given, tmp_path)
    for number in (1, 2):
        # In its own process, which is killed when the evaluation of so many runs has begun.
        with subprocess.Popen([sys.executable, "-m", "train", *words, "--quiet"], cwd=ROOT) as run:
            end = time.monotonic() + 200
            while len(list(tmp_path.glob("out/*/*/metrics.jsonl"))) < number:
                assert run.poll() is None and time.monotonic() < end
                time.sleep(0.01)
            os.kill(run.pid, signal.SIGKILL)
    assert main([*words, "--quiet"]) == 0
    assert table(Path(words[-1])) == table(whole)
    assert without_times(tmp_path / "out/compare.json") == without_times(whole / "compare.json")
    for file in whole.glob("*/*/metrics.jsonl"):
        assert (tmp_path / "out" / file.relative_to(whole)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "fine-tune"}, "recipe 'fine-tune': choose one of demo, glue, classify, sft"),
        ({"recipe": "pretrain"}, "recipe 'pretrain': choose one of demo, glue, classify, sft"),
        ({"recipe": None}, "recipe None: choose one of"),
        ({"rates": [1.0]}, "a comparison has no 'rates'"),
        ({"options": {"epoch": 1}}, "epoch: there is no such option; nearest: epochs"),
        ({"options": {"lr": 1.0}}, "options: lr is set by the comparison"),
        ({"options": {"seed": 1}}, "options: seed is set by the comparison"),
        ({"options": [1]}, "options: give options, such as"),
        ({"options": {"task": "sst2"}}, "options: model: must be given"),
        ({"methods": {}}, "methods: give some"),
        ({"methods": ["row"]}, "methods: give some"),
        ({"methods": {"rows": {}}}, "methods: rows: method rows: choose one of hyperadapt"),
        ({"methods": {"a/b": {"method": "row"}}}, "methods: a/b: a name is letters"),
        ({"methods": {"row": {"steps": 3}}}, "methods: row: steps is no option of a method's own"),
        ({"methods": {"row": {"b2": 2}}}, "methods: row: --b2 2.0: give a number in [0, 1)"),
        ({"methods": {"row": {"lr": []}}}, "methods: row: lr: give a list of at least one"),
        ({"lr": []}, "lr: give a list of at least one"),
        ({"lr": ["fast"]}, "lr: lr fast: give a number"),
        ({"lr": [True]}, "lr: lr True: give a number"),
        ({"lr": [[1.0]]}, "lr: [1.0] is none: give numbers"),
        ({"methods": {"head": {}}}, "methods: head: lr changes nothing with --method head"),
        ({"methods": {"row": {"row_lr": 1}}}, "all that trains has the rate head_lr and row_lr"),
        ({"methods": {"row": {"targets": "qkx"}}}, "preset='qkx'"),
        ({"lr": [0]}, "lr: 0: give positive learning rates"),
        ({"lr": ["1e-3", 0.001]}, "lr: 0.001 comes twice"),
        ({"seeds": []}, "seeds: give a list of at least one"),
        ({"seeds": [0, 0]}, "seeds: 0 comes twice"),
        ({"seeds": [0.5]}, "seeds: seed 0.5: give a whole number"),
        ({"seeds": 3}, "seeds: give a list of at least one"),
    ],
)
def test_a_bad_file_is_refused_in_a_line(given, tmp_path, capsys, change, message):
    words = compare({k: v for k, v in (given | change).items()}, tmp_path)
    error = refused(capsys, *words)
    assert message in error and words[1] in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: {row: {}, row: {}}", "row comes twice"),
        ("recipe: demo", "methods must be given"),
        ("recipe: [", "is not valid YAML"),
    ],
)
def test_a_file_that_is_none_is_refused_in_a_line(tmp_path, capsys, text, message):
    file = tmp_path / "compare.yaml"
    file.write_text(text)
    assert message in refused(capsys, "compare", str(file), "--folder", str(tmp_path / "out"))
    assert "FILE: must be given" in refused(capsys, "compare", "--folder", "x")
    assert "cannot be read" in refused(capsys, "compare", "no.yaml", "--folder", "x")


def test_a_folder_of_a_single_run_is_none_for_many(given, tmp_path, capsys):
    words = compare(given, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.yaml").write_text("recipe: glue\n")
    assert "holds a single run" in refused(capsys, *words)


# ------------------------------------------------------------------------------------- what is made


@pytest.fixture
def swept(given, tmp_path) -> list[str]:
    """The words of a recipe at two learning rates."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**given["options"], "lr": ["1e-3", 0.1], "method": "row"}))
    return ["glue", "--config", str(file), "--folder", str(tmp_path / "sweep")]


def test_several_learning_rates_are_a_sweep(swept, tmp_path, capsys):
    assert main(swept) == 0
    folder, shown = tmp_path / "sweep", capsys.readouterr().out
    found = json.loads((folder / "sweep.json").read_text())
    best = {run["lr"]: run["best"]["accuracy"] for run in found["runs"]}
    assert found["best_lr"] == max(best, key=lambda lr: (best[lr], -lr))
    assert f"the best learning rate is {found['best_lr']:g}, at the edge of the sweep" in shown
    assert "(best)" in (folder / "sweep.md").read_text()
    assert (folder / "lr.png").read_bytes()[1:4] == b"PNG"
    for lr in (0.001, 0.1):  # as a run of its own
        rows = read_metrics(folder / f"lr-{lr}" / "metrics.jsonl")
        assert rows[-1]["eval/accuracy"] == rows[-1]["eval/accuracy"]
        assert "lr: " + str(lr) in (folder / f"lr-{lr}" / "config.yaml").read_text()
    assert "--resume" in refused(capsys, *swept)
    files = {file: file.read_bytes() for file in folder.glob("*/*") if file.is_file()}
    more = [*swept, "--resume", "--lr", "1e-3,0.1,1e-2", "--quiet"]
    assert main(more) == 0
    assert all(file.read_bytes() == content for file, content in files.items())
    assert len(json.loads((folder / "sweep.json").read_text())["runs"]) == 3
    assert "steps was 4 and is 5" in refused(capsys, *more, "--steps", "5")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "1e-3,fast"], "--lr 1e-3,fast: give a number"),
        (["--lr", "1e-3,"], "--lr 1e-3,: give a number"),
        (["--lr", "1e-3,0.001"], "--lr 1e-3,0.001: one comes twice"),
        (["--lr", "1e-3,-1"], "--lr -1.0: give a finite number from 0 on"),
    ],
)
def test_a_bad_sweep_is_refused_in_a_line(swept, capsys, words, message):
    assert message in refused(capsys, *swept, *words)


def test_recipes_that_adapt_no_model_take_one_rate(tmp_path, capsys):
    words = ["pretrain", "--lr", "1e-3,1e-2", "--folder", str(tmp_path / "run")]
    assert "--lr: pretrain takes one learning rate" in refused(capsys, *words)


def outcome(lr: float, score: float | None) -> Outcome:
    class Options:
        optimizer, run = OptimizerOptions(lr=lr), RunOptions(folder=Path("run"))

    return Outcome(Planned("m", Options()), {"error": "NaN"} if score is None else {"score": score})


def test_the_best_rate_is_the_lower_of_two_and_never_one_that_diverged():
    assert choose([outcome(0.1, 0.5), outcome(0.01, 0.5), outcome(0.001, 0.4)]) == 0.01
    assert choose([outcome(0.1, None), outcome(0.01, -3.0)]) == 0.01
    assert choose([outcome(0.1, None)]) is None


@pytest.mark.parametrize(
    ("scores", "edge"),
    [([1, 2, 1], False), ([2, 1, 1], True), ([0, 1, 2], True), ([1, 2, None], False), ([1], False)],
)
def test_a_best_rate_at_the_edge_is_told(scores, edge):
    sweep = [outcome(10.0**-i, score) for i, score in enumerate(reversed(scores))]
    assert MethodSummary("m", sweep, ()).at_edge is edge


def test_classes_are_discovered_once_for_all_runs(bert, tmp_path):  # noqa: F811
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": w, "label": w[0]}) + "\n" for w in "abcabcabc"))
    options = dict(model=str(bert), data=str(rows), max_length=16)
    given = dict(recipe="classify", options=options, methods={"row": {}}, lr=[1, 2], seeds=[0])
    words = compare(given, tmp_path)
    found = protocol.read(Path(words[1]), tmp_path / "out", {"classify": lambda: classify.Options})
    assert [run.options.task.classes for run in found.runs] == [("a", "b", "c")] * 2


def test_a_comparison_in_which_all_diverged_says_so(given, tmp_path, capsys):
    words = compare(
        given | {"methods": {"all": given["methods"]["all"] | {"lr": [1e38]}}}, tmp_path
    )
    assert main(words) == 0
    assert "Diverged: all, lr 1e+38, seed 0" in capsys.readouterr().out
    cells = table(tmp_path / "out")
    assert cells[-1] == ["all", "-", "-", "diverged"]


@pytest.fixture
def no_cache():
    """Programs are kept nowhere, as with a user who named no folder for them."""
    name, before = "jax_compilation_cache_dir", jax.config.jax_compilation_cache_dir
    jax.config.update(name, None)
    yield
    jax.config.update(name, before)
    compilation_cache.reset_cache()


def test_programs_are_kept_for_the_other_runs_and_then_removed(no_cache, tmp_path):
    with pytest.raises(ZeroDivisionError), shared_programs(tmp_path):
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
        assert any((tmp_path / PROGRAMS).iterdir())
        1 / 0  # noqa: B018
    assert any((tmp_path / PROGRAMS).iterdir())  # whoever goes on has them
    with shared_programs(tmp_path):
        pass
    assert not (tmp_path / PROGRAMS).exists() and jax.config.jax_compilation_cache_dir is None


def test_the_labels_of_a_figure_cover_nothing():
    """Of points side by side and on one another, with and without a bar, at the line before."""
    points = {f"method-{i}": (1000 + i % 3, Spread(0.5 + i / 2000, 0.01, 5)) for i in range(9)}
    points |= {"alone": (10**6, Spread(0.4, float("nan"), 1))}
    figure = figures.by_parameters(points, "score", Spread(0.4, 0.0, 5))
    figure.draw_without_rendering()
    (ax,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without their lines
    assert [text.get_text() for text in ax.texts] == ["before training", *points]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    dots = [ax.transData.transform((count, spread.mean)) for count, spread in points.values()]
    assert not any(box.contains(*dot) for box in boxes[1:] for dot in dots)
