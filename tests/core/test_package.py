"""The package as it is installed: its metadata, and what importing it costs."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_metadata_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = importlib.metadata.metadata("hyperadapt-jax")
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_import_pulls_in_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "orbax", "matplotlib", "pytest"}
    code = f"import sys, hyperadapt_jax; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
