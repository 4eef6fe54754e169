"""How a run begins and ends: folders, best steps, numbers that are not finite, other bases."""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hyperadapt_jax as ha
from tests.train import tiny
from train import loop, options, report, runs
from train.base import fingerprint
from train.checkpoints import Checkpoints
from train.errors import InputError
from train.options import OptimizerOptions
from train.step import make_optimizer, start

# Without a schedule, runs of any length are the same compiled program.
OPTIMIZER = OptimizerOptions(lr=0.1, schedule="constant", warmup=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "llama")


def fit(task: loop.Task, folder: Path, **settings) -> loop.Result:
    folder.mkdir(exist_ok=True)
    return loop.fit(task, folder, optimizer=OPTIMIZER, run=tiny.run(folder, **settings))


def test_a_run_learns_and_leaves_an_adapter_that_does_as_measured(model, tmp_path):
    task = tiny.task(model)
    result = fit(task, tmp_path / "run", steps=40, eval_every=10)
    assert result.best["loss"] < result.before["loss"] - 0.02
    assert result.best["loss"] == min(
        row["eval/loss"] for row in report.read_metrics(tmp_path / "run/metrics.jsonl")
        if "eval/loss" in row
    )  # fmt: skip
    adapter = ha.load(tmp_path / "run" / runs.ADAPTER, task.base.params)
    found = task.evaluate({"scales": adapter.scales, "full": adapter.full})
    assert found == result.best
    assert (tmp_path / "run" / report.CURVES).stat().st_size > 10_000
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
    task = tiny.task(model, evaluate=lambda _: {"score": next(scores)}, score=lambda m: m["score"])
    result = fit(task, tmp_path / "run", steps=4, eval_every=2)
    assert (result.step, result.best, result.last) == (0, {"score": 3.0}, {"score": 1.0})
    scales = ha.load(tmp_path / "run" / runs.ADAPTER, task.base.params).scales
    assert not any(np.any(v.row) or np.any(v.col) for v in scales.values())


def poisoned(model: Path, steps: range) -> loop.Task:
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
    losses = [row["loss"] for row in report.read_metrics(folder / "metrics.jsonl") if "loss" in row]
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


def test_the_last_step_is_evaluated_though_it_is_no_multiple(model, tmp_path):
    fit(tiny.task(model), tmp_path / "run", steps=7, eval_every=3)
    rows = report.read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 3, 6, 7]


# ------------------------------------------------------------------------------------------ folders


def claim(folder, config=None, **settings):
    settings = {"resume": False, **settings}
    return runs.claim(folder, config or {"recipe": "glue", "lr": 0.1}, **settings)


def test_a_folder_is_claimed_once(tmp_path):
    with claim(tmp_path / "a/b/run") as folder:
        assert options.read_config(folder / "config.yaml") == {"recipe": "glue", "lr": 0.1}
        with pytest.raises(InputError, match="another process runs there"):
            with claim(tmp_path / "a/b/run", resume=True):
                pass
    with pytest.raises(InputError, match="holds a run already: go on with it by --resume"):
        with claim(tmp_path / "a/b/run"):
            pass
    with claim(tmp_path / "a/b/run", resume=True):
        pass


def test_a_folder_is_free_again_where_nothing_was_done(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with claim(tmp_path / "run"):
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        with claim(tmp_path / "run", {"recipe": "sft"}) as folder:
            (folder / report.METRICS).touch()
            raise ZeroDivisionError
    with pytest.raises(InputError, match="holds a run already"):
        with claim(tmp_path / "run"):
            pass


def test_a_changed_option_is_named(tmp_path):
    with claim(tmp_path / "run"):
        pass
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
