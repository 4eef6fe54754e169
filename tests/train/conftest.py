"""What the tests of this folder share: programs compiled once, and a cache of rows."""

import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """The folder of compiled programs, one for all processes that run tests."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "programs"


@pytest.fixture(scope="module", autouse=True)
def compiled_once(programs):
    """Programs are kept, for processes that a test starts too; other folders' tests compile."""
    settings = {
        "jax_compilation_cache_dir": str(programs),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def use(settings):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # where it lies was settled at the first compilation

    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
        use(settings)
        yield
        use(before)


@pytest.fixture(scope="session", autouse=True)
def rows_of_the_tests(tmp_path_factory):
    """What is read is kept with the tests' own files, not among the user's."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield
