"""Compare a model, plain and adapted, with what the torch reference gave."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

import hyperadapt_jax as ha
from hyperadapt_jax import models
from tests.models import cases

TOLERANCE = 2e-4


def check(config: models.Config, recorded: dict[str, dict[str, np.ndarray]]) -> None:
    """Outputs, adapted outputs and gradients for the scales equal the recorded ones."""
    params = cases.params_of(config, recorded["weights"])
    inputs, probes = recorded["inputs"], recorded["probes"]
    fn, wanted = models.functional(models.abstract(config))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, wanted)
    forward = ha.adapt(fn, materialize="error")

    def run(scales):
        output = forward(params, scales, inputs["tokens"], mask=inputs["mask"])
        outputs = cases.output_of(output)
        return cases.loss(outputs, probes), outputs

    run = cases.jit(jax.value_and_grad(run, has_aux=True))
    scales = cases.scales_of(recorded["scales"])
    _, plain = run(jax.tree.map(np.zeros_like, scales))[0]
    (_, changed), grads = run(scales)
    assert plain.keys() >= recorded["outputs"].keys()
    for name, value in recorded["outputs"].items():
        seen = inputs["mask"] if value.ndim == 3 else np.ones(len(value), bool)
        for mine, theirs in ((plain, value), (changed, recorded["scaled_outputs"][name])):
            difference = np.abs(np.asarray(mine[name])[seen] - theirs[seen]).max()
            assert difference < TOLERANCE, (name, difference)
        assert np.abs(value - recorded["scaled_outputs"][name]).max() > 100 * TOLERANCE
    expected = cases.scales_of(recorded["grads"])
    for path, vectors in expected.items():
        for side in ("row", "col"):
            mine, theirs = np.asarray(getattr(grads[path], side)), getattr(vectors, side)
            # Gradients are sums over all tokens: compare to the size of the largest.
            size = np.abs(theirs).max()
            assert size > 1e-3, f"{path}: {side} has no gradient to compare"
            assert np.abs(mine - theirs).max() < TOLERANCE * max(1.0, size), (path, side)


def check_minilm(weights: pathlib.Path, recorded: dict[str, np.ndarray]) -> None:
    """Sentence embeddings, means over the tokens, point where the recorded ones do."""
    model = models.load(weights / "all-MiniLM-L6-v2")
    tokens, mask = recorded["minilm/tokens"], recorded["minilm/mask"]
    sequence = cases.jit(lambda: model(tokens, mask=mask).sequence)()
    mine = (sequence * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    theirs = recorded["minilm/embeddings"]
    norms = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    assert (1 - (mine * theirs).sum(1) / norms < 1e-4).all()
    assert np.abs(mine - theirs).max() < TOLERANCE


def check_stories(model: models.Decoder, recorded: dict[str, np.ndarray]) -> None:
    """The greedy continuation is the recorded one, token for token."""
    fn, params = models.functional(model)
    prompt = recorded["stories/prompt"].tolist()
    (mine,) = models.generate(fn, params, prompts=[prompt], max_new_tokens=200)
    assert mine == recorded["stories/continuation"].tolist()
