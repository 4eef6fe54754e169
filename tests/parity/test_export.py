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
from safetensors.numpy import load_file, save_file  # noqa: E402

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


def theirs_and_mine(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, models.Model]:
    """Logits of a causal language model, as transformers reads its folder and as we do."""
    model = models.load(folder)
    tokens = np.asarray([[3, 9, 7, 4, 20]])
    with torch.no_grad():
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        logits = reference(torch.tensor(tokens)).logits
    return logits.float().numpy(), np.asarray(cases.jit(model)(tokens)), model


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("llama2", "other"),
        ("llama2", "copy"),
        ("llama2", "alone"),
        ("mistral", "other"),
        ("qwen2", "alone"),
        ("qwen3", "copy"),
        ("phi3", "other"),
    ],
)
def test_which_head_counts_is_decided_as_transformers_does(
    name: str, head: str, tmp_path: pathlib.Path
) -> None:
    config = cases.CASES[name].config | {"tie_word_embeddings": head != "other"}
    reference.torch_model(config).save_pretrained(tmp_path / "in")
    raw = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    if head != "other":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    if head == "alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, {"format": "pt"})
    theirs, mine, model = theirs_and_mine(tmp_path / "in")
    np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)
    assert model.config.tie_embeddings == (head != "other")
    out = models.export(tmp_path / "out", model, source=tmp_path / "in")
    for again in theirs_and_mine(out)[:2]:
        np.testing.assert_allclose(again, theirs, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", "ForMaskedLM"),
        ("bert", "ForPreTraining"),
        ("bert", "untied"),
        ("roberta", "ForMaskedLM"),
        ("roberta", "untied"),
        ("xlm-roberta", "ForMaskedLM"),
        ("camembert", "ForMaskedLM"),
        ("distilbert", "ForMaskedLM"),
    ],
)
def test_the_architecture_of_an_export_is_there(
    name: str, head: str, tmp_path: pathlib.Path
) -> None:
    """Of an encoder without its folder's head, transformers misses nothing and adds nothing."""
    names = {"xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
    family = names.get(name, name.capitalize())
    base = cases.CASES[name if name in ("bert", "distilbert") else "roberta"].config
    config = base | {"model_type": name, "architectures": [family + head]}
    if head == "untied":  # the flag still says so, as after training with the head's own matrix
        config |= {"architectures": [family + "ForMaskedLM"], "tie_word_embeddings": False}
    source = reference.torch_model(config, seed=3)
    source.save_pretrained(tmp_path / "in")
    if head == "untied":
        raw = json.loads((tmp_path / "in" / "config.json").read_text())
        (tmp_path / "in" / "config.json").write_text(
            json.dumps(raw | {"tie_word_embeddings": True})
        )
    model = models.load(tmp_path / "in")
    fn, params = models.functional(model)
    scales = adapter(model, params, seed=3)
    merged = ha.merge(params, scales)
    out = models.export(tmp_path / "out", model, merged, source=tmp_path / "in")

    written = load_file(out / "model.safetensors")
    pooled = any("pooler" in key for key in load_file(tmp_path / "in" / "model.safetensors"))
    assert any("pooler" in key for key in written) == pooled
    (architecture,) = json.loads((out / "config.json").read_text())["architectures"]
    theirs, info = getattr(transformers, architecture).from_pretrained(
        out, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = source.state_dict(), theirs.state_dict()
    others = [key for key in before if not key.startswith(("bert.", "roberta.", "distilbert."))]
    assert others and all(torch.equal(before[key], after[key]) for key in others)
    # The encoder under the head is the adapted one.
    tokens = np.asarray([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        body = getattr(theirs, theirs.base_model_prefix).eval()
        sequence = body(torch.tensor(tokens)).last_hidden_state.numpy()
    expected = cases.jit(fn)(merged, tokens).sequence
    np.testing.assert_allclose(sequence, expected, atol=TOLERANCE)
    # Of the bare encoder, transformers says that the pooler is new, if it is.
    bare, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    new = not pooled and hasattr(bare, "pooler")
    assert bool([key for key in info["missing_keys"] if "pooler" in key]) == new


@pytest.mark.parametrize("name", ["bert-classifier", "roberta-classifier", "distilbert-classifier"])
def test_another_number_of_labels_keeps_what_transformers_keeps(
    name: str, tmp_path: pathlib.Path
) -> None:
    config = cases.CASES[name].config
    reference.torch_model(config).save_pretrained(tmp_path)
    with pytest.warns(models.NewParametersWarning) as caught:
        model = models.load(tmp_path, num_labels=2)
    theirs, info = getattr(transformers, config["architectures"][0]).from_pretrained(
        tmp_path, num_labels=2, ignore_mismatched_sizes=True, output_loading_info=True
    )
    renamed = {row.path: row.name for row in models.tensors(model.config)}
    fresh = {renamed[path] for path in caught[0].message.paths}
    assert fresh == {key for key, *_ in info["mismatched_keys"]}
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    for path, leaf in paths.arrays(models.functional(model)[1]).items():
        if "{layer}" not in renamed[path] and renamed[path] not in fresh:
            value = state[renamed[path]]
            value = value.T if path.endswith("/kernel") else value
            np.testing.assert_array_equal(leaf, value, err_msg=path)


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
