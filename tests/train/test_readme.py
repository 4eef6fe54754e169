"""The README's lines that load a run's adapter, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import jax

import hyperadapt_jax as ha
from hyperadapt_jax import models

ROOT = Path(__file__).resolve().parents[2]


def test_a_runs_adapter_loads_without_the_recipes(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```\n(import jax[^`]*runs/demo/adapter[^`]*)```", readme)
    assert "from train" not in code
    monkeypatch.chdir(ROOT)
    model = models.load("train/tiny", progress=False)
    params = models.functional(model)[1]
    scales = ha.init(ha.plan(params, *models.targets(model, "all-linear")))
    scales = jax.tree.map(lambda delta: delta + 0.01, scales)
    ha.save(tmp_path / "adapter", scales, params)
    exec(code.replace('"runs/demo/adapter"', repr(str(tmp_path / "adapter"))), {})
    assert re.search(r"\d", capsys.readouterr().out)
