"""plan, export and rank: what a user asks of a model, or of a run that is over."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperadapt_jax as ha
from hyperadapt_jax import models, paths
from train.__main__ import main
from train.recipes import rank

LLAMA = dict(
    model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    tie_word_embeddings=True,
)  # fmt: skip
BERT = dict(
    model_type="bert", vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=32, type_vocab_size=2,
)  # fmt: skip
LLAMA_3_8B = dict(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0,
    max_position_embeddings=8192, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip


def build(config, seed=0, **options):
    return models.create(models.config_from_dict(config), seed=seed, **options)


def vectors(params, config, size=0.3):
    """Random vectors for all linears of a model."""
    scales = ha.init(ha.plan(params, *models.targets(config, "all-linear")))
    leaves, treedef = jax.tree.flatten(scales)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten(noise)


def save(folder, model, scales, base, **options):
    """An adapter folder as a run leaves it."""
    params = models.functional(model)[1]
    config = models.config_to_dict(model.config)
    ha.save(folder, scales, params, base_model=str(base), base_config=config, **options)


def train(where, dtype):
    """A base, its vectors, and a folder with the base and the run that left them."""
    model = build(LLAMA, dtype=dtype)
    base = models.export(where / "base", model, progress=False)
    (base / "tokenizer.json").write_text("{}")
    scales = vectors(models.functional(model)[1], model.config)
    save(where / "run" / "adapter", model, scales, base)
    return model, scales, where


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("decoder"), "float32")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def stored(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp(request.param), request.param)


def test_plan_of_llama_3_8b_needs_its_configuration_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    widths = {"q": 4096 + 4096, "k": 4096 + 1024, "v": 4096 + 1024, "o": 4096 + 4096,
              "gate": 4096 + 14336, "up": 4096 + 14336, "down": 14336 + 4096}  # fmt: skip
    presets = {"qv": "q v", "qkvud": "q k v up down", "all-linear": " ".join(widths)}
    counts = {"qv": "425,984", "qkvud": "1,769,472", "all-linear": "2,621,440"}
    for preset, names in presets.items():
        assert main(["plan", "--model", str(tmp_path), "--targets", preset]) == 0
        shown = capsys.readouterr().out
        assert counts[preset] == f"{32 * sum(widths[name] for name in names.split()):,}"
        assert f"{counts[preset]} trainable parameters" in shown and "8,030,261,248" in shown
    assert main(["plan", "--model", str(tmp_path), "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert f"{2 * 8030261248 / 1e6:,.1f} MB" in shown  # of frozen weights
    assert f"{12 * 2621440 / 1e6:.2f} MB" in shown  # of vectors, with Adam's state


def test_plan_of_other_methods(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    inputs, outputs = 2 * (5 * 16 + 24), 2 * (5 * 16 + 24)
    head = 16 * 3 + 3
    counts = {"hyperadapt": inputs + outputs + head, "row": outputs + head, "col": inputs + head}
    counts |= {"head": head}
    for method, count in counts.items():
        args = ["plan", "--model", str(tmp_path), "--method", method, "--labels", "3"]
        assert main(args) == 0
        assert f"\n{count:,} trainable parameters of" in f"\n{capsys.readouterr().out}"


def test_plan_fetches_the_configuration_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert main(["plan", "--model", "some/model", "--revision", "v2"]) == 0
    assert asked == [(("some/model", "config.json"), {"revision": "v2"})]
    assert "layers/q/kernel" in capsys.readouterr().out


@pytest.mark.parametrize("args, reason", [
    (["--model", "no/such-model"], "no/such-model is no folder, and its config.json could not be"),
    (["--model", "."], "config.json: no such file"),
    (["--model", "{llama}", "--targets", "qx"], "preset='qx': expected one of qv"),
    (["--model", "{llama}", "--targets", "nothing=in out"], "'nothing' matches none"),
    (["--model", "{llama}", "--method", "head"], "trains nothing here"),
    (["--model", "{llama}", "--labels", "2"], "is a decoder, llama"),
    (["--model", "{llama}", "--labels", "0"], "--labels 0"),
])  # fmt: skip
def test_plan_refuses(tmp_path, monkeypatch, capsys, args, reason):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    refused(capsys, ["plan", *(arg.format(llama=folder) for arg in args)], reason)


def refused(capsys, args, reason):
    """The command ends with status 2 and one line that gives the reason."""
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line


def test_the_exported_model_is_the_merged_one(stored, tmp_path, capsys):
    model, scales, where = stored
    args = ["export", "--adapter", str(where / "run"), "--folder", str(tmp_path / "merged")]
    assert main(args) == 0
    fn, params = models.functional(model)
    merged, report = ha.merge(params, scales, report=True)
    dtype = model.dtype.name
    again, written = models.functional(models.load(tmp_path / "merged", dtype=dtype))
    jax.tree.map(np.testing.assert_array_equal, written, merged)

    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(again(written, tokens), fn(merged, tokens))
    np.testing.assert_allclose(
        again(written, tokens), ha.adapt(fn)(params, scales, tokens),
        **({"atol": 1e-4} if dtype == "float32" else {"atol": 0.1}),
    )  # fmt: skip

    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == dtype
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    for weight in report.weights:
        name, update, error, relative = rows[weight.path]
        assert name == dtype and float(update) == pytest.approx(weight.update, rel=1e-2)
        assert float(error) == pytest.approx(weight.error, rel=1e-2)
        assert float(relative) == pytest.approx(weight.relative, rel=1e-2)


def test_an_adapter_is_exported_for_peft(decoder, tmp_path, capsys):
    model, scales, where = decoder
    args = ["export", "--adapter", str(where / "run"), "--folder", str(tmp_path / "peft")]
    assert main([*args, "--format", "peft"]) == 0
    assert "PeftModel.from_pretrained" in capsys.readouterr().out
    params = models.functional(model)[1]
    found = ha.load(tmp_path / "peft", params, tensors=models.tensors(model.config))
    assert found.scales.keys() == scales.keys() and found.base_model == str(where / "base")
    for path, vectors in scales.items():
        np.testing.assert_array_equal(found.scales[path].row, vectors.row)
        np.testing.assert_array_equal(found.scales[path].col, vectors.col)
    refused(capsys, [*args, "--format", "peft"], "is not empty")
    other = [*args[:-1], str(tmp_path / "other"), "--format", "peft"]
    refused(capsys, [*other, "--dtype", "bfloat16"], "--dtype: is for --format merged")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_rounded_to_once_and_reported(stored, tmp_path, dtype, capsys):
    model, scales, where = stored
    folder = tmp_path / "merged"
    args = ["export", "--adapter", str(where / "run" / "adapter"), "--folder", str(folder)]
    assert main([*args, "--dtype", dtype]) == 0
    wide = jax.tree.map(lambda x: x.astype("float32"), models.functional(model)[1])
    exact = paths.arrays(ha.merge(wide, scales))
    written = paths.arrays(models.functional(models.load(folder, dtype=dtype))[1])
    for path, weight in exact.items():
        np.testing.assert_array_equal(written[path], weight.astype(dtype))
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    if dtype != "float32":
        for path in scales:
            lost = np.asarray(written[path], np.float64) - np.asarray(exact[path], np.float64)
            assert float(rows[path][2]) == pytest.approx(np.linalg.norm(lost), rel=1e-2)


def test_a_classifier_is_exported_with_its_head(tmp_path, capsys):
    base = models.export(tmp_path / "base", build(BERT), progress=False)
    with pytest.warns(models.NewParametersWarning):
        model = models.load(base, num_labels=3)
    fn, params = models.functional(model)
    scales = vectors(params, model.config)
    full = {
        "classifier/out/kernel": jax.random.normal(jax.random.key(2), (16, 3)),
        "classifier/out/bias": jnp.arange(3.0),
    }
    save(tmp_path / "run" / "adapter", model, scales, base, full=full)
    args = ["export", "--adapter", str(tmp_path / "run"), "--folder", str(tmp_path / "merged")]
    assert main([*args, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    again, written = models.functional(models.load(tmp_path / "merged"))
    tokens = jnp.arange(12).reshape(2, 6)
    expected = fn(ha.merge(paths.replace(params, full), scales), tokens)
    np.testing.assert_array_equal(again(written, tokens).logits, expected.logits)


def test_a_fully_trained_model_is_exported(tmp_path):
    base = models.export(tmp_path / "base", build(LLAMA), progress=False)
    model = build(LLAMA, seed=5)
    save(tmp_path / "adapter", model, {}, base, full=paths.arrays(models.functional(model)[1]))
    args = ["export", "--adapter", str(tmp_path / "adapter"), "--folder", str(tmp_path / "out")]
    assert main(args) == 0
    written = models.functional(models.load(tmp_path / "out"))[1]
    jax.tree.map(np.testing.assert_array_equal, written, models.functional(model)[1])


def test_export_overwrites_a_model_when_told(decoder, tmp_path, capsys):
    where = decoder[2]
    args = ["export", "--adapter", str(where / "run"), "--folder", str(tmp_path / "merged")]
    assert main(args) == 0
    capsys.readouterr()
    refused(capsys, args, "is not empty: choose another, or give --overwrite")
    assert main([*args, "--overwrite", "--max-shard-size", "8kB"]) == 0
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    models.load(tmp_path / "merged")


def test_export_refuses(decoder, tmp_path, capsys):
    where = decoder[2]
    run, out = str(where / "run"), str(tmp_path / "out")
    wider = models.export(tmp_path / "wider", build({**LLAMA, "hidden_size": 20}), progress=False)
    other = build({**LLAMA, "rope_theta": 5e5})
    other = models.export(tmp_path / "other", other, progress=False)
    torn = tmp_path / "torn"
    shutil.copytree(where / "run" / "adapter", torn)
    (torn / "adapter_model.safetensors").write_bytes(b"")
    for changed, reason in [
        (["--adapter", str(tmp_path)], "holds no adapter_config.json, nor adapter/"),
        (["--adapter", str(torn)], "truncated or altered"),
        (["--model", str(wider)], "in yours"),
        (["--model", str(other)], "rope"),
        (["--model", str(tmp_path / "none")], "no folder"),
        (["--folder", str(where / "base"), "--overwrite"], "is the base itself"),
        (["--folder", str(other / "config.json")], "is a file"),
        (["--max-shard-size", "much"], "max_shard_size='much'"),
    ]:
        given = {"--adapter": run, "--folder": out, "--model": str(where / "base")}
        given |= dict([changed[:2]])
        args = [word for pair in given.items() for word in pair]
        refused(capsys, ["export", *args, *changed[2:]], reason)
        assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_half_model(decoder, tmp_path, capsys):
    where = decoder[2]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        args = ["export", "--adapter", str(where / "run"), "--folder", str(tmp_path / "out")]
        assert main(args) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "out cannot be written: File too large" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_a_base_is_asked_for_one(decoder, tmp_path, capsys):
    model, scales, where = decoder
    ha.save(tmp_path / "plain", scales, models.functional(model)[1])
    args = ["export", "--adapter", str(tmp_path / "plain"), "--folder", str(tmp_path / "out")]
    refused(capsys, args, "does not name its base model: give it with --model")
    assert main([*args, "--model", str(where / "base"), "--quiet"]) == 0


def test_rank_is_that_of_the_library(stored, tmp_path, capsys):
    model, scales, where = stored
    args = ["rank", "--adapter", str(where / "run"), "--folder", str(tmp_path / "rank")]
    assert main(args) == 0
    expected = ha.rank.analyze(models.functional(model)[1], scales)
    assert capsys.readouterr().out.startswith(str(expected))
    rows = json.loads((tmp_path / "rank" / rank.TABLE).read_text())
    for row, spectrum in zip(rows, expected.spectra, strict=True):
        assert row == {
            "path": spectrum.path, "index": list(spectrum.index), "source": spectrum.source,
            "shape": list(spectrum.shape), "bound": spectrum.bound, **vars(spectrum.measures),
        }  # fmt: skip
    assert (tmp_path / "rank" / rank.FIGURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("limit, layers", [(1, [0]), (2, [0, 2]), (9, [0, 1, 2])])
def test_rank_of_some_weights_and_layers(decoder, capsys, limit, layers):
    model, scales, where = decoder
    args = ["rank", "--adapter", str(where / "run"), "--weights", "q/kernel", "up/kernel"]
    assert main([*args, "--limit", str(limit), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    rows = json.loads((where / "run" / rank.TABLE).read_text())  # beside the adapter
    whole = {
        (s.path, *s.index): s.measures.stable
        for s in ha.rank.analyze(models.functional(model)[1], scales).spectra
        if s.source == "update"
    }
    found = {(r["path"], *r["index"]): r["stable"] for r in rows if r["source"] == "update"}
    keys = [(f"layers/{name}/kernel", layer) for name in ("q", "up") for layer in layers]
    assert found == {key: whole[key] for key in keys}


def test_rank_stands_next_to_other_runs(decoder, tmp_path, capsys):
    """A low-rank adapter's update and full fine-tuning's, of the same base, layer by layer."""
    model, scales, where = decoder
    params = models.functional(model)[1]
    plan = ha.plan(params, *models.targets(model.config, "qv")).with_low_rank(2)
    noise = lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    low = jax.tree.map(noise, ha.init(plan, jax.random.key(0)))
    save(tmp_path / "low", model, low, where / "base")
    other = models.functional(build(LLAMA, seed=7))[1]
    save(tmp_path / "full", model, {}, where / "base", full=paths.arrays(other))
    args = ["rank", "--adapter", str(where / "run"), "--folder", str(tmp_path), "--limit", "1"]
    args += ["--weights", "q/kernel", "up/kernel", "--quiet"]
    against = [f"lora={tmp_path / 'low'}", f"full={tmp_path / 'full'}"]
    assert main([*args, "--against", *against]) == 0
    rows = json.loads((tmp_path / rank.TABLE).read_text())
    found = {(row["path"].split("/")[1], row["source"]): row for row in rows}
    names = {"update", "random", "base", "full"}
    assert set(found) == {(w, n) for w in ("q", "up") for n in names} | {("q", "lora")}
    assert found["q", "lora"]["numerical"] == 2
    step = np.asarray(other["layers"]["up"]["kernel"][0] - params["layers"]["up"]["kernel"][0])
    assert found["up", "full"]["norm"] == pytest.approx(np.linalg.norm(step), rel=1e-5)
    for text, reason in [("lora", "give NAME=PATH"), ("base=x", "choose another name")]:
        refused(capsys, [*args, "--against", text], f"--against {text}: ")
        refused(capsys, [*args, "--against", text], reason)


def test_rank_refuses(decoder, tmp_path, capsys):
    model, _, where = decoder
    run = ["rank", "--adapter", str(where / "run")]
    refused(capsys, [*run, "--weights", "qq/kernel"], "nearest: layers/q/kernel")
    refused(capsys, [*run, "--limit", "0"], "--limit 0")
    refused(capsys, [*run, "--folder", str(where / "base" / "config.json")], "cannot be written")
    full = paths.arrays(models.functional(build(LLAMA))[1])
    save(tmp_path / "full", build(LLAMA), {}, where / "base", full=full)
    refused(capsys, ["rank", "--adapter", str(tmp_path / "full")], "scales no weight")


@pytest.mark.parametrize("recipe", ["plan", "export", "rank"])
def test_help_names_every_option(recipe, capsys):
    with pytest.raises(SystemExit) as left:
        main([recipe, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m train {recipe}" in shown and "(required)" in shown
