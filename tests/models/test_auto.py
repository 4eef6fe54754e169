"""Whole models to folders and back, without torch."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import load_file, save_file

import hyperadapt_jax as ha
from hyperadapt_jax import models, paths
from tests.models import cases


def make(name: str) -> models.Decoder | models.Encoder:
    config = models.config_from_dict(cases.CASES[name].config)
    return models.from_params(config, jax.tree.map(jax.numpy.asarray, cases.random_params(config)))


@pytest.mark.parametrize("name", cases.CASES)
def test_a_model_written_and_read_is_the_same(name: str, tmp_path: pathlib.Path) -> None:
    model = make(name)
    folder = models.export(tmp_path / "out", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing
        again = models.load(folder)
    assert again.config == model.config
    jax.tree.map(
        np.testing.assert_array_equal, models.functional(model)[1], models.functional(again)[1]
    )


def test_merged_parameters_are_written_in_place_of_the_models(tmp_path: pathlib.Path) -> None:
    model = make("phi3")
    fn, params = models.functional(model)
    scales = cases.random_scales(model, params)
    models.export(tmp_path / "out", model, ha.merge(params, scales))
    fn_again, params_again = models.functional(models.load(tmp_path / "out"))
    assert fn_again == fn
    tokens = cases.batch(model.config, "none")["tokens"]
    adapted = cases.jit(ha.adapt(fn, materialize="error"))(params, scales, tokens)
    np.testing.assert_allclose(cases.jit(fn)(params_again, tokens), adapted, atol=1e-3)


def test_the_source_gives_what_the_configuration_does_not_hold(tmp_path: pathlib.Path) -> None:
    model = make("bert-classifier")
    source = models.export(tmp_path / "source", model)
    raw = json.loads((source / "config.json").read_text())
    raw |= {"id2label": {"0": "no", "1": "yes", "2": "maybe"}, "problem_type": "regression"}
    (source / "config.json").write_text(json.dumps(raw))
    out = models.export(tmp_path / "out", models.load(source), source=source)
    assert json.loads((out / "config.json").read_text()) == raw
    # A changed head is another model: its own configuration is written.
    with pytest.warns(models.NewParametersWarning):
        other = _with_labels(source, tmp_path / "base", 5)
    out = models.export(tmp_path / "other", other, source=source)
    assert models.read_config(out).num_labels == 5


def test_where_generation_ends_is_read_and_kept(tmp_path: pathlib.Path) -> None:
    source = models.export(tmp_path / "source", make("llama2"))
    raw = json.loads((source / "config.json").read_text()) | {"torchscript": False}
    (source / "config.json").write_text(json.dumps(raw))
    generation = {"eos_token_id": [2, 9], "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    model = models.load(source)
    assert model.config.eos_tokens == (2, 9)
    out = models.export(tmp_path / "out", model, source=source)
    assert json.loads((out / "config.json").read_text()) == raw
    assert json.loads((out / "generation_config.json").read_text()) == generation
    # Without the source, the written configuration says it itself.
    alone = models.export(tmp_path / "alone", model)
    assert models.read_config(out) == models.read_config(alone) == model.config


def _with_labels(source: pathlib.Path, folder: pathlib.Path, labels: int) -> models.Encoder:
    """A model with a new head on the encoder of a folder."""
    model = models.load(source)
    _, params = models.functional(model)
    headless = {name: tree for name, tree in params.items() if name != "classifier"}
    raw = models.config_to_dict(model.config) | {"architectures": ["BertModel"]}
    models.export(folder, models.from_params(models.config_from_dict(raw), headless))
    return models.load(folder, num_labels=labels)


def test_what_a_checkpoint_lacks_is_new_and_named(tmp_path: pathlib.Path) -> None:
    model = make("roberta")
    folder = models.export(tmp_path / "out", model)
    with pytest.warns(models.NewParametersWarning, match="classifier/dense/kernel") as record:
        one = models.load(folder, num_labels=2, seed=1)
    assert "layers/" not in str(record[0].message)
    with pytest.warns(models.NewParametersWarning):
        other = models.load(folder, num_labels=2, seed=2)
    a, b = (models.functional(m)[1] for m in (one, other))
    assert np.abs(a["classifier"]["out"]["kernel"] - b["classifier"]["out"]["kernel"]).max() > 0
    np.testing.assert_array_equal(a["layers"]["q"]["kernel"], b["layers"]["q"]["kernel"])
    tokens = cases.batch(model.config, "none")["tokens"]
    np.testing.assert_allclose(one(tokens).sequence, model(tokens).sequence, atol=1e-6)


def test_a_load_says_what_it_did_in_its_report(tmp_path: pathlib.Path) -> None:
    folder = models.export(tmp_path / "out", make("roberta"))
    with pytest.warns(models.NewParametersWarning) as caught:
        whole = models.functional(models.load(folder, num_labels=2, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the report says it
        fn, params, report = models.load_functional(folder, num_labels=2, seed=1)
    assert report.initialized == caught[0].message.paths
    assert {*report.loaded, *report.initialized} == paths.arrays(params).keys()
    assert fn == whole[0]
    jax.tree.map(np.testing.assert_array_equal, params, whole[1])
    # An architecture that is known need not be read again.
    config = models.load_config(folder)
    (folder / "config.json").unlink()
    again = models.load_functional(folder, config=config, num_labels=2, seed=1)
    assert (again[0], again[2]) == (fn, report)


def rewrite(folder: pathlib.Path, change: Callable[[dict], dict], **fields: Any) -> pathlib.Path:
    """The folder with other tensors and other fields of its config.json."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama2", "qwen3", "phi3"])
def test_a_head_of_its_own_is_kept_whatever_the_flag_says(
    name: str, dtype: str, tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(make(name).config, tie_embeddings=False)
    model = models.from_params(config, cases.random_params(config))
    folder = models.export(tmp_path / "in", model, dtype=dtype)
    rewrite(folder, lambda tensors: tensors, tie_word_embeddings=True)
    assert models.read_config(folder).tie_embeddings
    assert not models.load_config(folder).tie_embeddings
    again = models.load(folder, param_dtype=dtype)
    assert again.config == config
    expected = jax.tree.map(lambda x: x.astype(dtype), models.functional(model)[1])
    jax.tree.map(np.testing.assert_array_equal, models.functional(again)[1], expected)
    out = models.export(tmp_path / "out", again, source=folder)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    written, before = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(written["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.parametrize("kept", ["both", "head"])
def test_a_tied_matrix_may_be_stored_as_the_head(kept: str, tmp_path: pathlib.Path) -> None:
    model = make("qwen2")
    folder = models.export(tmp_path / "in", model)

    def change(tensors: dict) -> dict:
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
        if kept == "head":
            tensors.pop("model.embed_tokens.weight")
        return tensors | head

    rewrite(folder, change)
    again = models.load(folder)
    assert again.config == model.config and again.config.tie_embeddings
    jax.tree.map(
        np.testing.assert_array_equal, models.functional(again)[1], models.functional(model)[1]
    )
    out = models.export(tmp_path / "out", again, source=folder)
    names = load_file(out / "model.safetensors").keys()
    assert ("model.embed_tokens.weight" in names) == (kept == "both")
    assert ("lm_head.weight" in names) == (kept == "head")
    # A copy that differs in one number is another head.
    if kept == "both":

        def nudge(tensors: dict) -> dict:
            tensors["lm_head.weight"][-1, -1] += 1e-6
            return tensors

        assert not models.load(rewrite(folder, nudge)).config.tie_embeddings


def test_an_encoder_has_a_pooler_if_the_checkpoint_has_one(tmp_path: pathlib.Path) -> None:
    model = make("bert")
    folder = models.export(tmp_path / "in", model)
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if "pooler" not in k})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is newly initialized
        again = models.load(folder)
    tokens = cases.batch(model.config, "none")["tokens"]
    mine, theirs = (cases.jit(each)(tokens) for each in (again, model))
    assert mine.pooled is None and theirs.pooled is not None
    np.testing.assert_allclose(mine.sequence, theirs.sequence, atol=1e-6)
    for source in (None, folder):
        out = models.export(tmp_path / "out", again, source=source, overwrite=True)
        assert not [name for name in load_file(out / "model.safetensors") if "pooler" in name]
    # A head needs one: it is new, and written with the head.
    with pytest.warns(models.NewParametersWarning, match="pooler/kernel"):
        headed = models.load(folder, num_labels=2)
    out = models.export(tmp_path / "headed", headed, source=folder)
    assert "bert.pooler.dense.weight" in load_file(out / "model.safetensors")
    assert models.load_config(out).num_labels == 2


@pytest.mark.parametrize(
    ("name", "labels", "fresh"),
    [
        ("bert-classifier", 2, {"classifier/out/kernel", "classifier/out/bias"}),
        ("roberta-classifier", 1, {"classifier/out/kernel", "classifier/out/bias"}),
        ("camembert-classifier", 5, {"classifier/out/kernel", "classifier/out/bias"}),
        ("distilbert-classifier", 2, {"classifier/out/kernel", "classifier/out/bias"}),
        ("bert-classifier", 3, set()),
        ("roberta-classifier", None, set()),
    ],
)
def test_a_head_of_other_labels_is_new_and_the_rest_is_kept(
    name: str, labels: int | None, fresh: set[str], tmp_path: pathlib.Path
) -> None:
    model = make(name)
    folder = models.export(tmp_path / "in", model)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"problem_type": "regression", "bos_token_id": 7, "finetuning_task": "mnli"}
    (folder / "config.json").write_text(json.dumps(raw))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = models.load(folder, num_labels=labels)
    assert {path for warning in caught for path in warning.message.paths} == fresh
    assert again.config == dataclasses.replace(model.config, num_labels=labels or 3)
    before, after = (paths.arrays(models.functional(m)[1]) for m in (model, again))
    for path in before.keys() - fresh:
        np.testing.assert_array_equal(before[path], after[path])
    out = models.export(tmp_path / "out", again, source=folder)
    written = json.loads((out / "config.json").read_text())
    assert len(written["id2label"]) == (labels or 3) and written["bos_token_id"] == 7
    assert ("problem_type" in written) == ("finetuning_task" in written) == (not fresh)
    assert models.load(out).config == again.config


def test_a_head_that_does_not_fit_its_own_configuration_is_an_error(tmp_path: pathlib.Path) -> None:
    folder = models.export(tmp_path / "in", make("bert-classifier"))
    names = {str(i): f"LABEL_{i}" for i in range(4)}
    rewrite(folder, lambda tensors: tensors, id2label=names, label2id={})
    with pytest.raises(models.CheckpointError, match=r"classifier\.weight has shape \(3, 16\)"):
        models.load(folder)


@pytest.mark.parametrize("head", ["MaskedLM", "PreTraining"])
def test_a_head_that_no_file_holds_is_not_promised(head: str, tmp_path: pathlib.Path) -> None:
    """As where a tool saved the encoder alone and left config.json as it was."""
    folder = models.export(tmp_path / "in", make("bert"))
    rewrite(folder, lambda tensors: tensors, architectures=[f"BertFor{head}"])
    out = models.export(tmp_path / "out", models.load(folder), source=folder)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.parametrize(
    ("name", "prefix"), [("bert", "cls.predictions."), ("roberta", "lm_head.")]
)
def test_a_head_of_pretraining_goes_along(name: str, prefix: str, tmp_path: pathlib.Path) -> None:
    model = make(name)
    folder = models.export(tmp_path / "in", model)
    architecture = name.capitalize() + "ForMaskedLM"
    words = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    head = {
        f"{prefix}dense.weight": np.random.default_rng(0).normal(size=(16, 16)).astype("f2"),
        f"{prefix}bias": np.ones(23, "f4"),
        f"{prefix}decoder.weight": words,  # a tied copy, which readers make of the embedding
    }
    rewrite(folder, lambda tensors: tensors | head, architectures=[architecture])
    again = models.load(folder)
    out = models.export(tmp_path / "out", again, source=folder)
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    written = load_file(out / "model.safetensors")
    assert {key for key in written if key.startswith(prefix)} == {*list(head)[:2]}
    for key in list(head)[:2]:
        np.testing.assert_array_equal(written[key], head[key], strict=True)
    # With another decoder, or none that is tied, all of it is the head.
    other = head | {f"{prefix}decoder.weight": words + 1e-3}
    for tensors, fields in ((other, {}), (head, {"tie_word_embeddings": False})):
        rewrite(folder, lambda old, new=tensors: old | new, **fields)
        out = models.export(tmp_path / "out", again, source=folder, overwrite=True)
        written = load_file(out / "model.safetensors")
        np.testing.assert_array_equal(
            written[f"{prefix}decoder.weight"], tensors[f"{prefix}decoder.weight"]
        )
    # A classifier on the encoder is another architecture, which has no such head.
    with pytest.warns(models.NewParametersWarning):
        classifier = models.load(folder, num_labels=2)
    out = models.export(tmp_path / "classifier", classifier, source=folder)
    assert not [key for key in load_file(out / "model.safetensors") if key.startswith(prefix)]
    (found,) = json.loads((out / "config.json").read_text())["architectures"]
    assert found == name.capitalize() + "ForSequenceClassification"


def test_remote_code_stays_behind(tmp_path: pathlib.Path) -> None:
    folder = models.export(tmp_path / "in", make("phi3"))
    rewrite(folder, lambda tensors: tensors, auto_map={"AutoModel": "modeling_phi3.Phi3"})
    out = models.export(tmp_path / "out", models.load(folder), source=folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["auto_map"]
    assert json.loads((out / "config.json").read_text()) == raw


def test_a_model_is_read_onto_a_mesh(tmp_path: pathlib.Path) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    model = make("llama2")
    folder = models.export(tmp_path / "out", model)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = [
        (r"layers/(q|k|v|gate|up)/kernel", PartitionSpec(None, None, "model")),
        (r"layers/(o|down)/kernel", PartitionSpec(None, "model")),
        (r".*", PartitionSpec()),
    ]
    spread = models.ActivationSharding(mesh, ("data",), ("model",))
    loaded = models.load(folder, mesh=mesh, rules=rules, activations=spread)
    fn, params = models.functional(loaded)
    assert fn.activations == spread and spread.filled(3) == 4
    kernel = params["layers"]["q"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, None, "model")
    assert kernel.addressable_shards[0].data.shape == (3, 16, 4)
    tokens = cases.batch(model.config, "none")["tokens"]
    expected = cases.jit(fn)(models.functional(model)[1], tokens)
    np.testing.assert_allclose(cases.jit(fn)(params, tokens), expected, atol=2e-5)
    rows = [[5, 6, 7], [8]]
    sharded, plain = (
        models.generate(fn, tree, prompts=rows, max_new_tokens=5)
        for tree in (params, models.functional(model)[1])
    )
    assert sharded == plain
