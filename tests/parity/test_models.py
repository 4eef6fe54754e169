"""Every family against transformers' torch models, live."""

from __future__ import annotations

import pathlib

import pytest

pytest.importorskip("torch")

from hyperadapt_jax import models  # noqa: E402
from tests.models import cases, compare, reference  # noqa: E402


@pytest.mark.parametrize("name", cases.CASES)
def test_outputs_and_gradients_equal_those_of_torch(name: str) -> None:
    case = cases.CASES[name]
    config = models.config_from_dict(case.config)
    compare.check(config, reference.run(case, seed=7))


@pytest.mark.parametrize("name", cases.CASES)
def test_a_written_configuration_gives_the_same_torch_model(name: str) -> None:
    case = cases.CASES[name]
    config = models.config_from_dict(case.config)
    written = models.config_to_dict(config)
    assert models.config_from_dict(written) == config
    compare.check(config, reference.run(case._replace(config=written), seed=3))


def test_pretrained_models_equal_torch(shared: pathlib.Path) -> None:
    recorded = reference.pretrained(shared / "weights")
    compare.check_minilm(shared / "weights", recorded)
    compare.check_stories(models.load(shared / "weights" / "stories260K"), recorded)
