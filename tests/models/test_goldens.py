"""Every family against what torch gave, recorded by make_goldens.py."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from safetensors import safe_open

from hyperadapt_jax import models
from tests.models import cases, compare

FOLDER = pathlib.Path(__file__).parent / "goldens"


def read(name: str) -> dict[str, dict[str, np.ndarray]]:
    """One recorded case, which must be of today's configuration."""
    recorded: dict[str, dict[str, np.ndarray]] = {}
    with safe_open(FOLDER / f"{name}.safetensors", "np") as file:
        config = json.loads(file.metadata()["config"])
        assert config == json.loads(json.dumps(cases.CASES[name].config)), "run make_goldens again"
        for key in file.keys():
            group, _, entry = key.partition(":")
            recorded.setdefault(group, {})[entry] = file.get_tensor(key)
    return recorded


@pytest.mark.parametrize("name", cases.CASES)
def test_outputs_and_gradients_equal_those_of_torch(name: str) -> None:
    compare.check(models.config_from_dict(cases.CASES[name].config), read(name))


def test_every_recorded_case_is_compared() -> None:
    files = {file.stem for file in FOLDER.glob("*.safetensors")}
    assert files == {*cases.CASES, "pretrained"}
