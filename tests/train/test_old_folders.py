"""Folders that an earlier version wrote: ``e659287`` is its commit.

Each run has an ``evaluate.json``, what that version measured of it, and a classifier's has
``logits.json``, what its adapter made of some tokens.
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax import models
from train.__main__ import main

OLD, TINY = (
    Path(__file__).parent / "e659287",
    Path(__file__).parents[2] / "train/tasks/arithmetic/tiny",
)
CLASSIFIERS = ["sst2", "sst2-row-bias", "sst2-head"]


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the folders, as the working directory that their runs had."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize("run", ["sst2", "sst2-head", "sft", "demo"])
def test_an_old_run_is_measured_as_it_was(old, run, capsys):
    """The same metrics, and a line that says what cannot be compared."""
    model = "bert" if run in CLASSIFIERS else str(TINY)
    words = ["evaluate", "--folder", run, "--model", model, "--metrics", "again.json"]
    assert main(words) == 0
    then, now = (json.loads((old / f).read_text()) for f in (f"{run}/evaluate.json", "again.json"))
    assert now == pytest.approx(then, rel=1e-4)
    if run != "demo":  # which makes its data
        assert f"{run} does not say which data it was made on" in capsys.readouterr().err


def test_an_old_run_that_left_its_head_untrained_is_refused(old, capsys):
    """That version trained what ``--full`` matched alone, and neither trained nor kept the head."""
    assert main(["evaluate", "--folder", "sst2-row-bias", "--model", "bert"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lacks classifier/out/bias" in error and "train it again" in error


@pytest.mark.parametrize("run", CLASSIFIERS)
def test_an_old_adapter_gives_the_logits_that_it_gave(old, run):
    found = json.loads((old / run / "logits.json").read_text())
    with pytest.warns(models.NewParametersWarning):
        fn, params = models.functional(models.load("bert", num_labels=2, progress=False))
    params, scales = ha.load(old / run / "adapter").apply(params)
    logits = ha.adapt(fn)(params, scales, jnp.asarray(found["tokens"])).logits
    np.testing.assert_allclose(logits, np.asarray(found["logits"]), atol=1e-5)


def test_an_old_checkpoint_is_refused_in_one_line(old, capsys):
    """Its run cannot be resumed, and is left as it is."""
    files = {f: f.read_bytes() for f in sorted((old / "sst2-head").rglob("*")) if f.is_file()}
    words = ["glue", "--config", "sst2-head/config.yaml", "--folder", "sst2-head", "--resume"]
    assert main([*words, "--quiet"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the checkpoints in ") and "another version" in error
    assert files == {f: f.read_bytes() for f in files}
