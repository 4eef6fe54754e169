"""The built wheel, installed in an environment of its own, away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the extras alone bring; the library is to do without.
EXTRAS = ["datasets", "grain", "jinja2", "matplotlib", "sklearn", "tensorboardX", "transformers"]


def check(*words: str | Path, cwd: Path, status: int = 0) -> str:
    """What a command prints, which ends with the given status."""
    apart = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=apart, text=True, capture_output=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by the build backend itself, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    check(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of a fresh environment; dependencies are lent by the one of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    check(*pip, wheel, cwd=folder)
    purelib = check(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                    cwd=folder).strip()  # fmt: skip
    # Of a folder that is named here, .pth files are not read: the checkout stays out.
    Path(purelib, "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hyperadapt_jax"}
    assert {
        "hyperadapt_jax/py.typed",
        "hyperadapt_jax/train/tasks/arithmetic/tiny/model.safetensors",
    } <= {*names}
    assert not [name for name in names if "__pycache__" in name or "tests" in name]


def test_the_command_runs_the_demo(installed, tmp_path):
    words = ["--steps", "3", "--problems", "4", "--texts", "64", "--folder", "demo"]
    shown = check(installed / "hyperadapt", "demo", *words, cwd=tmp_path)
    assert "two-step problems, the new task" in shown
    assert {"adapter", "curves.png", "report.md"} <= {f.name for f in (tmp_path / "demo").iterdir()}
    assert "\nhyperadapt demo " in (tmp_path / "demo/report.md").read_text()


def test_the_library_does_without_the_extras(installed, tmp_path):
    """It is imported, and names its version; a recipe says what to install."""
    block = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}));"
    found = "import hyperadapt_jax as ha; from hyperadapt_jax import models; print(ha.__version__)"
    python = installed / "python"
    version = check(python, "-c", f"{block} {found}; assert ha.__file__ > sys.prefix", cwd=tmp_path)
    assert version.strip() in (ROOT / "hyperadapt_jax/version.py").read_text()
    run = f"{block} from hyperadapt_jax.train.__main__ import main; sys.exit(main(['demo']))"
    refused = check(python, "-c", run, cwd=tmp_path, status=2)
    assert refused.startswith("error: ") and "pip install 'hyperadapt-jax[train]'" in refused
