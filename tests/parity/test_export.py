"""Load, adapt, merge, export: transformers reads the folder and gives the adapted outputs."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import transformers  # noqa: E402

import hyperadapt_jax as ha  # noqa: E402
from hyperadapt_jax import models, paths  # noqa: E402
from tests.models import cases, reference  # noqa: E402

TOLERANCE = 1e-3  # of outputs between 0.7 and 6, in float32


def adapter(model: Any, params: Any, seed: int) -> Any:
    """Random scales of every linear, a fifth away from one."""
    plan = ha.plan(params, *models.targets(model, "all-linear"))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), ha.init(plan)
    )


def torch_outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers makes of a folder, which must hold all that it looks for."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not [key for key in info["missing_keys"] if "position_ids" not in key]
    with torch.no_grad():
        outputs = reference.outputs_of(model.eval(), inputs, {})
    return {name: value.float().numpy() for name, value in outputs.items()}


@pytest.mark.parametrize("name", cases.CASES)
def test_the_exported_folder_gives_the_adapted_outputs(name: str, tmp_path: pathlib.Path) -> None:
    case = cases.CASES[name]
    source, out = tmp_path / "source", tmp_path / "out"
    reference.torch_model(case.config, seed=5).save_pretrained(source)
    model = models.load(source)
    fn, params = models.functional(model)
    scales = adapter(model, params, seed=5)
    inputs = cases.batch(model.config, case.padding, seed=5)

    adapted = cases.output_of(ha.adapt(fn)(params, scales, inputs["tokens"], mask=inputs["mask"]))

    names, leaves, _ = paths.flatten(params)
    base = dict(zip(names, leaves, strict=True))

    def merged(path: str) -> jax.Array:
        """One weight at a time, so that no second model is held."""
        if path not in scales:
            return base[path]
        return ha.merge({path: base[path]}, {path: scales[path]})[path]

    models.export(out, model, source=source, leaf=merged, max_shard_size="10KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1

    seen = inputs["mask"][..., None]
    for key, value in torch_outputs(out, inputs).items():
        difference = np.abs(value - np.asarray(adapted[key]))
        difference = difference * seen if value.ndim == 3 else difference
        assert difference.max() < TOLERANCE, key
    before = torch_outputs(source, inputs)
    assert all(np.abs(before[key] - np.asarray(adapted[key])).max() > 0.1 for key in before)

    _, again = models.functional(models.load(out))
    jax.tree.map(np.testing.assert_array_equal, again, ha.merge(params, scales))


@pytest.mark.parametrize("name", ["llama3", "phi4", "roberta-classifier"])
def test_a_bfloat16_checkpoint_keeps_its_bits(name: str, tmp_path: pathlib.Path) -> None:
    case = cases.CASES[name]
    source, out = tmp_path / "source", tmp_path / "out"
    theirs = reference.torch_model(case.config).to(torch.bfloat16)
    theirs.save_pretrained(source)
    models.export(out, models.load(source, param_dtype="bfloat16"), source=source)
    again = type(theirs).from_pretrained(out)
    assert again.dtype == torch.bfloat16
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "stories260K"])
def test_real_folders_are_read_back(
    name: str, shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = shared / "weights" / name
    out = models.export(tmp_path / "out", models.load(source), source=source)
    words = "Once upon a time there was a little dog."
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(f)(words) for f in (source, out))
    assert theirs["input_ids"] == ours["input_ids"]
    tokens = np.asarray([ours["input_ids"]])
    inputs = {"tokens": tokens, "mask": np.ones(tokens.shape, bool)}
    before, after = torch_outputs(source, inputs), torch_outputs(out, inputs)
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)
