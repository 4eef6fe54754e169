"""The package as it is installed: its metadata, and what importing it costs."""

import importlib
import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hyperadapt_jax

ROOT = Path(__file__).resolve().parents[2]


def test_metadata_is_the_projects():
    metadata = importlib.metadata.metadata("hyperadapt-jax")
    assert metadata["Version"] == hyperadapt_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_import_pulls_in_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "orbax", "matplotlib", "pytest"}
    code = f"import sys, hyperadapt_jax; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", ["adapt", "merge", "plan"])
def test_a_function_keeps_its_name_where_its_module_has_the_same(name):
    function = getattr(hyperadapt_jax, name)
    module = importlib.import_module(f"hyperadapt_jax.{name}")  # as an import anywhere may do
    assert getattr(hyperadapt_jax, name) is function is getattr(module, name)
    assert pickle.loads(pickle.dumps(function)) is function
