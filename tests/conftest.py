"""Settings that the tests and the package's doctests share; they come before jax is imported."""

import os
from pathlib import Path

# Eight CPU devices, for the sharding tests; what the user has set comes last, and so wins.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite is offline: what it reads from disk must be there.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
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


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: pre-trained weights and data sets, read-only."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs pre-trained weights and data in {folder}")
    return folder
