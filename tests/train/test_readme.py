"""The README's lines that load a run's adapter, as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax import models, paths
from train.comparison import protocol
from train.recipes import demo, glue

ROOT = Path(__file__).resolve().parents[2]


def test_a_runs_adapter_loads_without_the_recipes(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```\n(import jax[^`]*runs/demo/adapter[^`]*)```", readme)
    assert "from train" not in code
    monkeypatch.chdir(ROOT)
    model = models.load("train/tasks/arithmetic/tiny", progress=False)
    params = models.functional(model)[1]
    scales = ha.init(ha.plan(params, *models.targets(model, "all-linear")))
    scales = jax.tree.map(lambda delta: delta + 0.01, scales)
    ha.save(tmp_path / "adapter", scales, params)
    exec(code.replace('"runs/demo/adapter"', repr(str(tmp_path / "adapter"))), {})
    assert re.search(r"\d", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore::hyperadapt_jax.models.NewParametersWarning")
def test_a_classifiers_adapter_is_applied_with_its_head(monkeypatch):
    """The logits are those of the weights merged, with the head that was saved."""
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```\n(import hyper[^`]*runs/mrpc/adapter[^`]*)```", readme)
    assert "from train" not in code
    monkeypatch.chdir(ROOT / "tests/train/e659287")
    names = {}
    exec(code.replace("runs/mrpc", "sst2"), names)
    adapter, batch = names["adapter"], names["batch"]
    model = models.load("bert", num_labels=2, seed=1, progress=False)
    encoder, params = models.functional(model)
    merged = ha.merge(paths.replace(params, adapter.full), adapter.scales)
    more = {"mask": batch["attention_mask"], "token_types": batch.get("token_type_ids")}
    wanted = encoder(merged, batch["input_ids"], **more).logits
    assert wanted.shape == (2, 2)
    np.testing.assert_allclose(names["logits"], wanted, atol=1e-5)


def test_a_run_from_python(tmp_path, monkeypatch, capsys):
    """The lines as they stand, then the subclass with its own loss in their place."""
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```\n(import train\n[^`]*)```", readme)
    (more,) = re.findall(r"```\n(import dataclasses, jax[^`]*)```", readme)
    monkeypatch.chdir(ROOT)
    names = {"__name__": "__main__"}

    def run(code: str) -> None:
        exec(compile(code, "README.md", "exec", dont_inherit=True), names)

    run(code.replace("runs/double", str(tmp_path / "run")))
    assert "accuracy" in capsys.readouterr().out
    result, scales = names["result"], ha.load(tmp_path / "run/adapter").scales
    assert result.best["loss"] < result.before["loss"]
    jax.tree.map(np.testing.assert_array_equal, names["vectors"], scales)
    assert result._repr_markdown_().startswith("| metric | before | best | last |\n|---|---:|")
    run(more)
    again = code.replace("runs/double", str(tmp_path / "two")).replace("steps=40", "steps=4")
    again = again.replace("train.Instructions(", "Smoothed(")
    run(again)
    first = [json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[1])["loss"]
             for run in ("run", "two")]  # fmt: skip
    assert np.isfinite(first).all() and first[0] != first[1]


def test_the_readmes_comparison_is_read_as_it_says(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (text,) = re.findall(r"```yaml\n([^`]*)```", readme)
    file = tmp_path / "methods.yaml"
    file.write_text(text)
    compared = protocol.read(file, tmp_path / "out", {"demo": lambda: demo.Options})
    assert "3 + 2 + 3 runs choose the rates, 3 x 2 more" in text
    assert [len(rates) for rates in compared.rates.values()] == [3, 2, 3]
    assert len(compared.seeds) == 3 and len(list(compared.runs)) == 3 * 8
    qv = compared.run("only-q-and-v", 1e-2, 1).options
    assert qv.adapter.method == "hyperadapt" and qv.adapter.targets == ("qv",)
    assert (qv.run.steps, qv.task.problems, qv.task.report_half) == (200, 256, True)


@pytest.mark.parametrize("name", ["demo", "demo-tuning", "mrpc"])
def test_the_comparisons_in_the_repository_can_be_made(name, tmp_path):
    file = ROOT / "comparisons" / f"{name}.yaml"
    recipes = {"demo": lambda: demo.Options, "glue": lambda: glue.Options}
    small = {"mrpc": {"model": ROOT / "tests/train/e659287/bert", "max_length": 16}}
    compared = protocol.read(file, tmp_path / "out", recipes, small.get(name))
    assert {run.method for run in compared.runs} == set(compared.methods)
    chosen = sum(map(len, compared.rates.values()))
    total = chosen + (len(compared.seeds) - 1) * len(compared.methods)
    assert re.findall(r"(\d+)[\s#]+runs", file.read_text()) == [str(total)]
