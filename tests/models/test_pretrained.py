"""Real weights against what torch made of them, recorded by make_goldens.py."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import hyperadapt_jax as ha
from hyperadapt_jax import models
from tests.models import cases, compare

RECORDED = pathlib.Path(__file__).parent / "goldens" / "pretrained.safetensors"


@pytest.fixture(scope="module")
def stories(shared: pathlib.Path) -> models.Decoder:
    return models.load(shared / "weights" / "stories260K")


def test_sentence_embeddings_of_minilm(shared: pathlib.Path) -> None:
    compare.check_minilm(shared / "weights", load_file(RECORDED))


def test_a_story_token_for_token(stories: models.Decoder) -> None:
    compare.check_stories(stories, load_file(RECORDED))


def test_a_story_told_by_an_adapted_function_and_by_merged_weights(stories) -> None:
    fn, params = models.functional(stories)
    scales = cases.random_scales(stories, params)
    scales = jax.tree.map(lambda leaf: leaf / 4, scales)
    prompt = load_file(RECORDED)["stories/prompt"].tolist()
    options = {"prompts": [prompt, prompt[:2]], "max_new_tokens": 60}
    adapted = models.generate(ha.adapt(fn), params, scales, **options)
    merged = models.generate(fn, ha.merge(params, scales), **options)
    assert adapted == merged != models.generate(fn, params, **options)


def test_a_new_head_is_reported(shared: pathlib.Path) -> None:
    folder = shared / "weights" / "all-MiniLM-L6-v2"
    with pytest.warns(models.NewParametersWarning, match="classifier/out/kernel"):
        model = models.load(folder, num_labels=3, seed=1)
    _, params = models.functional(model)
    kernel = np.asarray(params["classifier"]["out"]["kernel"])
    assert kernel.shape == (384, 3) and 0.01 < kernel.std() < 0.03
    with pytest.raises(ValueError, match="num_labels=2.*llama"):
        models.load(shared / "weights" / "stories260K", num_labels=2)
