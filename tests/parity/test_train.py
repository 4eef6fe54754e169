"""What the recipes leave, in torch: the embedded model, and an adapter that `export` merged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import transformers  # noqa: E402

import hyperadapt_jax as ha  # noqa: E402
from hyperadapt_jax import models  # noqa: E402
from train.__main__ import main  # noqa: E402
from train.tasks.arithmetic import problems  # noqa: E402

TINY = Path(__file__).resolve().parents[2] / "train" / "tasks" / "arithmetic" / "tiny"
PROMPTS = [
    problem.prompt
    for kind in ("equation", "story")
    for problem in problems.draw(kind, 6, seed=3, held=True)
]


def in_torch(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Logits of the first prompt, and greedy answers to all, by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    with torch.no_grad():
        for prompt in PROMPTS:
            tokens = tokenizer(prompt, return_tensors="pt").input_ids
            if not answers:
                logits = model(tokens).logits[0].numpy()
            new = model.generate(tokens, max_new_tokens=16, do_sample=False)[0, tokens.shape[1] :]
            answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return logits, answers


def in_jax(scales: ha.Scales | None = None) -> tuple[np.ndarray, list[str]]:
    """The same by this library, with the scale vectors on the embedded model's activations."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model = models.load(TINY, progress=False)
    fn, params = models.functional(model)
    trees = (params,) if scales is None else (params, scales)
    forward = fn if scales is None else ha.adapt(fn)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    logits = jax.jit(forward)(*trees, np.array([prompts[0]]))[0]
    stop = model.config.eos_tokens
    found = models.generate(forward, *trees, prompts=prompts, max_new_tokens=16, stop_tokens=stop)
    return logits, [tokenizer.decode(row, skip_special_tokens=True) for row in found]


def test_the_embedded_model_answers_alike():
    theirs, ours = in_torch(TINY), in_jax()
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-4)
    assert ours[1] == theirs[1]


def test_an_exported_adapter_answers_alike(tmp_path):
    """Random vectors, a tenth away from one: the answers are other ones than the base's."""
    _, params = models.functional(models.load(TINY, progress=False))
    config = models.read_config(TINY)
    rng = np.random.default_rng(0)
    scales = jax.tree.map(
        lambda x: jax.numpy.asarray(rng.normal(0, 0.1, x.shape), x.dtype),
        ha.init(ha.plan(params, *models.targets(config, "all-linear"))),
    )
    ha.save(
        tmp_path / "adapter", scales, params, base_model=str(TINY),
        base_config=models.config_to_dict(config),
    )  # fmt: skip
    words = ["export", "--adapter", str(tmp_path / "adapter"), "--folder", str(tmp_path / "merged")]
    assert main([*words, "--dtype", "float32"]) == 0
    theirs, ours = in_torch(tmp_path / "merged"), in_jax(scales)
    np.testing.assert_allclose(ours[0], theirs[0], atol=5e-4)
    assert ours[1] == theirs[1] != in_jax()[1]
