"""Settings that the tests and the package's doctests share; they come before jax is imported."""

import importlib.metadata
import os
from pathlib import Path

# Eight CPU devices, for the sharding tests; what the user has set comes last, and so wins.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Programs as small as the tests' take half as long to compile without; later there is no such
    # option, and an unknown one ends the process.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite is offline: what it reads from disk must be there.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
# Runs are on one of the devices, as on most machines, but where a test asks for a mesh.
os.environ.setdefault("HYPERADAPT_MESH", "data=1")
# The tests' matrices are small, and threads of several workers that wait for one another spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most tests compile far longer than they compute; the others ask for the fixture `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# An example may compile a program, so none has a deadline; in CI every run draws the same ones.
hypothesis.settings.register_profile(
    "hyperadapt",
    deadline=None,
    max_examples=20,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("hyperadapt")


# Files with few tests that take long: begun last, one of them would be waited for alone.
_LONG = {"test_resume", "test_demo", "test_notebook", "test_wheel", "test_real", "test_compare"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; `make test` hands files to its workers in this order."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture(scope="module")
def optimized():
    """Programs are compiled as users' are: for tests of their bits, and for those that run long."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "0")
        jax.config.update(name, False)
        jax.clear_caches()
        yield
    jax.config.update(name, before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: pre-trained weights and data sets, read-only."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs pre-trained weights and data in {folder}")
    return folder
