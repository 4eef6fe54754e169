"""How a run begins and ends: folders, best steps, numbers that are not finite, other bases."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperadapt_jax as ha
from tests.train import tiny
from train import options
from train.base import fingerprint
from train.data.batches import Batches
from train.errors import InputError
from train.metrics import finite
from train.options import OptimizerOptions
from train.run import log
from train.run.folder import ADAPTER, open_run
from train.trainer import loop
from train.trainer.checkpoints import Checkpoints
from train.trainer.optimizer import make_optimizer
from train.trainer.step import start

# Without a schedule, runs of any length are the same compiled program.
OPTIMIZER = OptimizerOptions(lr=0.1, schedule="constant", warmup=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "llama")


def fit(task: loop.Job, folder: Path, **settings) -> loop.Result:
    folder.mkdir(exist_ok=True)
    return loop.fit(task, folder, optimizer=OPTIMIZER, run=tiny.run(folder, **settings))


def test_a_run_learns_and_leaves_an_adapter_that_does_as_measured(model, tmp_path):
    task = tiny.task(model)
    result = fit(task, tmp_path / "run", steps=40, eval_every=10)
    assert result.best["loss"] < result.before["loss"] - 0.02
    assert result.best["loss"] == min(
        row["eval/loss"] for row in log.read_metrics(tmp_path / "run/metrics.jsonl")
        if "eval/loss" in row
    )  # fmt: skip
    adapter = ha.load(tmp_path / "run" / ADAPTER, task.base.params)
    found = task.evaluate({"scales": adapter.scales, "full": adapter.full})
    assert found == result.best
    assert (tmp_path / "run" / log.CURVES).stat().st_size > 10_000
    assert f"best after step {result.step}" in str(result)


def test_a_finished_run_is_not_trained_again(model, tmp_path):
    first = fit(tiny.task(model), tmp_path / "run", steps=4, eval_every=2)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = fit(tiny.task(model), tmp_path / "run", steps=4, eval_every=2, resume=True)
    assert (again.best, again.step) == (first.best, first.step)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_run_that_gets_worse_keeps_the_base(model, tmp_path):
    """The best step is the one before any training, and its adapter changes nothing."""
    scores = iter([3.0, 2.0, 1.0])
    task = tiny.task(
        model, evaluate=lambda _: {"score": next(scores)}, criterion=lambda m: m["score"]
    )
    result = fit(task, tmp_path / "run", steps=4, eval_every=2)
    assert (result.step, result.best, result.last) == (0, {"score": 3.0}, {"score": 1.0})
    scales = ha.load(tmp_path / "run" / ADAPTER, task.base.params).scales
    assert not any(np.any(v.row) or np.any(v.col) for v in scales.values())


def scored(model: Path, *scores: float) -> loop.Job:
    """The task, whose evaluations have these scores in turn."""
    left = iter(scores)
    return tiny.task(
        model, evaluate=lambda _: {"score": next(left)}, criterion=lambda metrics: metrics["score"]
    )


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([-2.0, np.nan, -3.0, -4.0], 0),
        ([np.nan, -2.0, -1.0, np.nan], 4),
        ([-np.inf, np.inf, -3.0, -4.0], 4),
        ([np.nan, np.nan, np.nan, -4.0], 6),
        ([-4.0, np.nan, np.nan, np.nan], 0),
    ],
)
def test_a_score_that_is_not_finite_is_never_the_best(model, tmp_path, capsys, scores, best):
    """It is in the metrics as null and told; the checkpoint of the true best is kept."""
    folder = tmp_path / "run"
    result = fit(scored(model, *scores), folder, steps=6, eval_every=2)
    assert (result.step, result.best["score"]) == (best, scores[best // 2])
    shown = capsys.readouterr().err
    rows = [row for row in log.read_metrics(folder / log.METRICS) if "eval/score" in row]
    for row, score in zip(rows, scores, strict=True):
        assert np.isfinite(row["eval/score"]) == np.isfinite(score)
        told = f"the score after step {row['step']} is {score}" in shown
        assert told == (not np.isfinite(score))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.best == best and {best, 4, 6} == {*checkpoints.steps, 4}
    # Resumed at its end, it is what it was.
    again = fit(scored(model), folder, steps=6, eval_every=2, resume=True)
    assert (again.step, again.best["score"]) == (best, scores[best // 2])
    assert f"{scores[-1]:.4f}" in str(again)


def test_a_run_without_any_finite_score_is_refused(model, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match="no evaluation .* gave a finite score, the last nan"):
        fit(scored(model, *[np.nan] * 4), folder, steps=6, eval_every=2)
    assert not (folder / ADAPTER).exists()


def test_the_best_step_of_a_stopped_run_is_known_when_it_is_resumed(model, tmp_path):
    folder = tmp_path / "run"

    def stopping(metrics):
        if metrics["score"] == -3.0:
            raise KeyboardInterrupt
        return metrics["score"]

    task = scored(model, -2.0, np.nan, -3.0)
    with pytest.raises(KeyboardInterrupt):
        fit(dataclasses.replace(task, criterion=stopping), folder, steps=8, eval_every=2)
    result = fit(scored(model, -3.0, np.nan, -4.0), folder, steps=8, eval_every=2, resume=True)
    assert (result.step, result.best) == (0, {"score": -2.0})
    rows = log.read_metrics(folder / log.METRICS)
    assert [row["step"] for row in rows if "eval/score" in row] == [0, 2, 4, 6, 8]


def test_an_evaluation_that_is_refused_keeps_the_state(model, tmp_path):
    """All outputs are NaN at once: status 2, and the checkpoints stay."""
    plain, folder = tiny.task(model), tmp_path / "run"
    results = iter([{"loss": 1.0}])

    def evaluate(trainable):
        try:
            return next(results)
        except StopIteration:
            return finite.count([None, None])

    with pytest.raises(InputError, match="evaluation after step 3: .* not|infinite for all 2 rows"):
        fit(dataclasses.replace(plain, evaluate=evaluate), folder, steps=6, eval_every=3)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps == [0, 3]


def test_a_finished_run_that_lost_its_metrics_is_resumed(model, tmp_path):
    first = fit(tiny.task(model), tmp_path / "run", steps=4, eval_every=2)
    (tmp_path / "run" / log.METRICS).unlink()
    again = fit(tiny.task(model), tmp_path / "run", steps=4, eval_every=2, resume=True)
    assert (again.before, again.best, again.last) == ({}, first.best, first.last)
    assert f"{first.best['loss']:.4f}" in str(again)


def test_a_long_epoch_is_saved_by_the_clock(model, tmp_path, monkeypatch):
    """Between evaluations that are far apart, a kill loses minutes."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    kept = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, state, *_: kept.append(int(state.step)))
    with pytest.raises(InputError):  # nothing was written
        fit(tiny.task(model), tmp_path / "run", steps=5, eval_every=5)
    assert kept == [0, 1, 2, 3, 4, 5]


def test_what_a_run_took_is_summed_over_its_sessions(model, tmp_path):
    folder = tmp_path / "run"
    whole = fit(tiny.task(model), tmp_path / "whole", steps=6, eval_every=3).spent
    with pytest.raises(ZeroDivisionError):
        fit(tiny.task(model, batches=Ending(4)), folder, steps=6, eval_every=3)
    spent = fit(tiny.task(model), folder, steps=6, eval_every=3, resume=True).spent
    assert (spent.steps, spent.tokens, spent.sessions) == (6, whole.tokens, 2)
    assert whole.sessions == 1 and 0 < whole.seconds < 600


def test_a_full_run_holds_its_state_and_no_other_copy(model, tmp_path):
    """Three times the model, whenever it evaluates or saves: weights and two moments."""
    plain = tiny.task(model, method="full")
    size, held = 4 * plain.tuning.count, []

    def live() -> int:
        gc.collect()
        arrays = [x for x in jax.live_arrays() if x.nbytes > 64 and len(x.devices()) == 1]
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in arrays}.values())

    before = live() - size  # of the base, and of other tests

    def evaluate(trainable):
        held.append(live() - before)
        return plain.evaluate(trainable)

    task = dataclasses.replace(plain, evaluate=evaluate)
    result = fit(task, tmp_path / "run", steps=6, eval_every=2)
    assert len(held) == 4 and max(held) < 3.3 * size
    del task
    assert live() - before < 1.3 * size and result.step >= 0


class Ending(Batches):
    """The task's batches, of which one cannot be made."""

    def __init__(self, fatal: int):
        super().__init__(tiny.examples(), 8, lengths=[8, 16], epochs=100)
        self.fatal = fatal

    def __getitem__(self, i):
        return super().__getitem__(i) if i != self.fatal else 1 / 0


def poisoned(model: Path, steps: range) -> loop.Job:
    """The task, whose loss is NaN in some steps."""
    good = tiny.task(model)
    batches = good.batches

    class Poisoned(type(batches)):
        def __getitem__(self, i):
            batch = super().__getitem__(i)
            return {**batch, "weight": batch["weight"] * (np.nan if i in steps else 1)}

    def loss(trainable, frozen, batch, key):
        total, weight = good.loss(trainable, frozen, batch, key)
        return total * batch["weight"].mean(), weight

    batches.__class__ = Poisoned
    return tiny.task(model, loss=loss, batches=batches)


def test_a_loss_that_is_not_finite_stops_the_run(model, tmp_path, capsys):
    """After `patience` steps in a row; the message names step and rows, the state is kept."""
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=r"3 steps in a row, the last step 10 \(rows [\d, ]+") as e:
        fit(poisoned(model, range(7, 100)), folder, patience=3)
    assert "the state after step 7 is kept" in str(e.value)
    assert "not finite in step 8" in capsys.readouterr().err
    with Checkpoints(folder) as checkpoints:
        task = tiny.task(model)
        like = start(task.tuning, make_optimizer(OPTIMIZER, task.tuning, 20), 0)
        state, _ = checkpoints.restore(like)
    assert all(np.isfinite(leaf).all() for leaf in state.trainable["scales"].values()
               for leaf in (leaf.row, leaf.col))  # fmt: skip
    losses = [row["loss"] for row in log.read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert np.isnan(losses[7:]).all() and np.isfinite(losses[:7]).all()


def test_a_few_losses_that_are_not_finite_are_passed_over(model, tmp_path):
    result = fit(poisoned(model, range(7, 9)), tmp_path / "run", patience=3)
    assert np.isfinite(result.last["loss"])


def test_another_base_is_refused(model, tmp_path):
    """Even one of the same shapes: a single bit tells them apart."""
    fit(tiny.task(model), tmp_path / "run", steps=2)
    other = tiny.folder(tmp_path / "other", seed=7)
    with pytest.raises(InputError, match="made on another base model.*other"):
        fit(tiny.task(other), tmp_path / "run", steps=2, resume=True)


def test_a_checkpoint_that_is_damaged_is_named(model, tmp_path):
    fit(tiny.task(model), tmp_path / "run", steps=2)
    for file in (tmp_path / "run/checkpoints/2/state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"cannot be read: remove .*checkpoints/2 to fall back"):
        fit(tiny.task(model), tmp_path / "run", steps=2, resume=True)


def test_a_checkpoint_of_another_version_is_told_from_a_damaged_one(model, tmp_path):
    """Its state has other parts: no older checkpoint of that run would fit either."""
    fit(tiny.task(model), tmp_path, steps=2)
    task = tiny.task(model)
    like = start(task.tuning, make_optimizer(OPTIMIZER, task.tuning, 20), 0)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match="another version"):
        checkpoints.restore(like._replace(nonfinite_steps=None))


def test_the_last_step_is_evaluated_though_it_is_no_multiple(model, tmp_path):
    fit(tiny.task(model), tmp_path / "run", steps=7, eval_every=3)
    rows = log.read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 3, 6, 7]


# ------------------------------------------------------------------------------------------ folders


def claim(folder, config=None, **settings):
    settings = {"resume": False, **settings}
    return open_run(folder, config or {"recipe": "glue", "lr": 0.1}, **settings)


def begin(folder: Path) -> None:
    """What a run's first step leaves."""
    (folder / log.METRICS).write_text('{"step": 0}\n')


def test_a_folder_is_claimed_once(tmp_path):
    with claim(tmp_path / "a/b/run") as folder:
        assert options.read_config(folder / "config.yaml") == {"recipe": "glue", "lr": 0.1}
        with pytest.raises(InputError, match="another process runs there"):
            with claim(tmp_path / "a/b/run", resume=True):
                pass
        begin(folder)
    with pytest.raises(InputError, match="holds a run already: resume it with --resume"):
        with claim(tmp_path / "a/b/run"):
            pass
    with claim(tmp_path / "a/b/run", resume=True):
        pass
    assert {file.name for file in folder.iterdir()} == {"config.yaml", log.METRICS}


def test_a_folder_is_free_again_where_nothing_was_done(tmp_path):
    """Nothing is left of it, not even the folder if it is new."""
    (tmp_path / "old").mkdir()
    for name in ("run", "old"):
        with pytest.raises(ZeroDivisionError):
            with claim(tmp_path / name) as folder:
                (folder / log.METRICS).touch()
                (folder / "checkpoints").mkdir()
                raise ZeroDivisionError
    assert [list(path.iterdir()) for path in tmp_path.iterdir()] == [[]]
    with pytest.raises(ZeroDivisionError):
        with claim(tmp_path / "run") as folder:
            begin(folder)
            raise ZeroDivisionError
    with pytest.raises(InputError, match="holds a run already"):
        with claim(tmp_path / "run"):
            pass


def test_what_a_kill_left_before_the_first_step_is_no_run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in (".lock", ".adapter.12345678.new", ".config.yaml.new", log.METRICS):
        (folder / name).touch()
    (folder / "config.yaml").write_text("recipe: sft\nlr: 3.0\n")
    for resume in (False, True):
        with claim(folder, resume=resume):
            assert {path.name for path in folder.iterdir()} == {".lock", "config.yaml"}
            assert options.read_config(folder / "config.yaml")["recipe"] == "glue"


def test_half_written_folders_are_removed_and_others_are_not(tmp_path):
    with claim(tmp_path / "run") as folder:
        begin(folder)
    (folder / ".adapter.0123.new").mkdir()
    (folder / ".adapter.0123.new/adapter_config.json").touch()
    (folder / "notes.txt").touch()
    with claim(folder, resume=True):
        pass
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", log.METRICS, "notes.txt"
    }  # fmt: skip


@pytest.mark.parametrize("text", ["port: 80", "recipe: glue"])
def test_a_config_of_something_else_is_left_alone(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / ("compose" if "recipe" in text else ".lock")).touch()
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="holds other things, and no run"):
        with claim(tmp_path):
            pass
    assert {path.name for path in tmp_path.iterdir()} | {".lock"} == before | {".lock"}
    assert (tmp_path / "config.yaml").read_text() == text


def test_a_changed_option_is_named(tmp_path):
    with claim(tmp_path / "run") as folder:
        begin(folder)
    with pytest.raises(InputError, match=r"--resume: lr was 0.1 and is 0.2 .*config.yaml"):
        with claim(tmp_path / "run", {"recipe": "glue", "lr": 0.2}, resume=True):
            pass


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(InputError, match="is not empty, and holds no run"):
            with claim(tmp_path, resume=resume):
                pass
    with pytest.raises(InputError, match="thesis.tex is a file"):
        with claim(tmp_path / "thesis.tex"):
            pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        with claim(tmp_path / "file/run"):
            pass


# -------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_sees_every_bit():
    tree = {"a": jnp.arange(24.0, dtype=jnp.bfloat16).reshape(4, 6), "b": jnp.ones(3, jnp.int8)}
    changed = [
        {**tree, "a": tree["a"].at[3, 5].add(0.125)},
        {**tree, "a": tree["a"].T.reshape(4, 6)},
        {**tree, "a": tree["a"].reshape(6, 4)},
        {**tree, "a": tree["a"][jnp.array([1, 0, 2, 3])]},
        {**tree, "a": tree["a"].astype(jnp.float32)},
        {"a": tree["a"], "c": tree["b"]},
        {**tree, "b": tree["b"].at[0].set(-1)},
        {**tree, "a": -tree["a"]},
    ]
    found = [fingerprint(t) for t in (tree, *changed)]
    assert len(set(found)) == len(found)
    assert fingerprint({k: np.asarray(v) for k, v in tree.items()}) == found[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        with claim(tmp_path / "run"):
            pass


def test_a_run_tells_in_numbers_what_it_was(model, tmp_path):
    """The bytes of a step are those of XLA's analysis; what they hold at least is counted here."""
    result = fit(tiny.task(model), tmp_path / "run", steps=6, eval_every=2)
    numbers = result.numbers
    assert numbers["best_step"] == result.step and numbers["best"] == result.best
    assert numbers["score"] == -result.best["loss"] and numbers["steps"] == 6
    assert numbers["trainable_parameters"] == tiny.task(model).tuning.count
    assert 0 < numbers["step_seconds"] < numbers["seconds"]
    frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.task(model).tuning.frozen))
    held = 3 * 4 * numbers["trainable_parameters"] + frozen
    assert held < numbers["step_bytes"] < 100 * held
    again = fit(tiny.task(model), tmp_path / "run", steps=6, eval_every=2, resume=True)
    for name in ("step_seconds", "step_bytes", "best"):
        assert again.numbers[name] == numbers[name]


def test_step_times_leave_out_the_first_and_what_was_paused(model, tmp_path):
    def evaluate(trainable):
        time.sleep(0.4)
        return {"loss": 1.0}

    task = dataclasses.replace(tiny.task(model), evaluate=evaluate)
    spent = fit(task, tmp_path / "run", steps=4, eval_every=1).spent
    assert spent.seconds > 2.0 and spent.step_seconds < 0.3


def test_the_bytes_of_a_step_need_no_other_program(model, tmp_path, monkeypatch):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event)
    )

    def programs(name: str) -> int:
        jax.clear_caches()
        compiled.clear()
        fit(tiny.task(model), tmp_path / name, steps=2, eval_every=1)
        return sum(event.endswith("backend_compile_duration") for event in compiled)

    count = programs("run")
    monkeypatch.setattr(loop._Session, "_step_bytes", lambda self: 0)
    assert 0 < count == programs("other")
