"""Whole models to folders and back, without torch."""

from __future__ import annotations

import json
import pathlib
import warnings

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import hyperadapt_jax as ha
from hyperadapt_jax import models
from tests.models import cases


def make(name: str) -> models.Decoder | models.Encoder:
    config = models.config_from_dict(cases.CASES[name].config)
    return models.with_params(config, jax.tree.map(jax.numpy.asarray, cases.random_params(config)))


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
    adapted = cases.jit(ha.adapt(fn, materialise="error"))(params, scales, tokens)
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
    assert models.read_config(out).labels == 5


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
    models.export(folder, models.with_params(models.config_from_dict(raw), headless))
    return models.load(folder, labels=labels)


def test_what_a_checkpoint_lacks_is_new_and_named(tmp_path: pathlib.Path) -> None:
    model = make("roberta")
    folder = models.export(tmp_path / "out", model)
    with pytest.warns(models.NewParametersWarning, match="classifier/dense/kernel") as record:
        one = models.load(folder, labels=2, seed=1)
    assert "layers/" not in str(record[0].message)
    with pytest.warns(models.NewParametersWarning):
        other = models.load(folder, labels=2, seed=2)
    a, b = (models.functional(m)[1] for m in (one, other))
    assert np.abs(a["classifier"]["out"]["kernel"] - b["classifier"]["out"]["kernel"]).max() > 0
    np.testing.assert_array_equal(a["layers"]["q"]["kernel"], b["layers"]["q"]["kernel"])
    tokens = cases.batch(model.config, "none")["tokens"]
    np.testing.assert_allclose(one(tokens).sequence, model(tokens).sequence, atol=1e-6)


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
    fn, params = models.functional(models.load(folder, mesh=mesh, rules=rules))
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
