"""Configurations: what is read, what is passed over, and what is refused by name."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from hyperadapt_jax import models
from tests.models import cases


@pytest.mark.parametrize("name", cases.CASES)
def test_writing_and_reading_gives_the_same_configuration(name: str) -> None:
    config = models.config_from_dict(cases.CASES[name].config)
    written = json.loads(json.dumps(models.config_to_dict(config)))
    assert models.config_from_dict(written) == config


@pytest.mark.parametrize(
    ("case", "field", "value", "message"),
    [
        ("llama2", "n_shared_experts", 2, "not understood"),
        ("bert", "embedding_size", 128, "not understood"),
        ("llama2", "quantization_config", {"bits": 4}, "expected null"),
        ("llama2", "sliding_window", 4, "expected null"),
        ("llama2", "hidden_act", "xielu", "one of gelu"),
        ("llama2", "attention_dropout", 0.1, "expected 0"),
        ("llama2", "architectures", ["LlamaForSequenceClassification"], "LlamaForCausalLM"),
        ("llama2", "num_key_value_heads", 3, "does not divide 4"),
        ("llama2", "hidden_size", "16", "expected int"),
        ("llama2", "hidden_size", True, "expected int"),
        ("llama2", "rms_norm_eps", float("nan"), "finite"),
        ("llama2", "vocab_size", -1, "positive"),
        ("llama2", "eos_token_id", "</s>", "token number"),
        ("qwen2", "attention_bias", False, "expected True"),
        ("mistral", "attention_bias", True, "expected False"),
        ("qwen2", "layer_types", ["sliding_attention"] * 3, "without a sliding_window"),
        ("qwen2", "layer_types", ["full_attention"], "3 times"),
        ("qwen2", "use_mrope", True, "expected False"),
        ("phi3", "partial_rotary_factor", 0.3, "even"),
        ("llama2", "partial_rotary_factor", 0.5, "whole heads"),
        ("phi3", "resid_pdrop", 0.1, "expected 0"),
        ("bert", "position_embedding_type", "relative_key", "expected 'absolute'"),
        ("bert", "is_decoder", True, "expected False"),
        ("bert", "num_attention_heads", 3, "does not divide"),
        ("bert", "hidden_dropout_prob", 1.0, "probability"),
        ("bert", "pruned_heads", {"0": [1]}, "expected {}"),
    ],
)
def test_a_field_that_would_make_another_model_is_named(
    case: str, field: str, value: Any, message: str
) -> None:
    raw = cases.CASES[case].config | {field: value}
    with pytest.raises(ValueError, match=f"{field}.*{message}"):
        models.config_from_dict(raw)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "ntk", "factor": 4.0}, "rope_type.*ntk.*not supported"),
        ({"rope_type": "linear"}, "factor.*missing"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast.*not understood"),
        ({"rope_type": "default", "factor": 2.0}, "factor.*expected 1.0"),
        (
            {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "high_freq_factor.*above",
        ),
        ({"rope_type": "longrope"}, "short_factor.*missing"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "2 positive numbers"),
    ],
)
def test_rope_scaling_that_is_not_implemented_is_refused(
    scaling: dict[str, Any], message: str
) -> None:
    raw = cases.CASES["llama2"].config | {"rope_scaling": scaling}
    with pytest.raises(ValueError, match=f"rope_scaling.*{message}"):
        models.config_from_dict(raw)


def test_both_spellings_of_rope_scaling_are_read_alike() -> None:
    base = cases.CASES["llama2"].config
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}
    old = {"rope_theta": 7, "rope_scaling": {"type": "linear", "factor": 2.0}}
    read = [models.config_from_dict(base | fields) for fields in (new, old)]
    assert read[0] == read[1]
    assert read[0].rope == models.Rope(theta=7.0, kind="linear", factor=2.0)


def test_fields_without_effect_are_passed_over() -> None:
    base = cases.CASES["qwen2"].config
    more = {"torch_dtype": "bfloat16", "use_cache": False, "max_window_layers": 2, "top_p": 0.9}
    assert models.config_from_dict(base | more) == models.config_from_dict(base)


def test_labels_give_a_head_only_to_a_classifier() -> None:
    raw = cases.CASES["bert-classifier"].config
    assert models.config_from_dict(raw).labels == 3
    assert models.config_from_dict(raw | {"architectures": ["BertModel"]}).labels is None
    assert models.config_from_dict(raw | {"architectures": ["BertForMaskedLM"]}).labels is None
    short = {name: value for name, value in raw.items() if name not in ("id2label", "label2id")}
    assert models.config_from_dict(short).labels == 2


def test_a_file_is_read_and_a_bad_one_is_named(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="config.json"):
        models.read_config(tmp_path)
    file.write_text(json.dumps(cases.CASES["llama2"].config))
    assert models.read_config(tmp_path) == models.read_config(file)
    file.write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json.*not valid JSON"):
        models.read_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        models.read_config(tmp_path)
    file.write_text('{"model_type": "llama", "vocab_size": 8}')
    with pytest.raises(ValueError, match="'hidden_size' is missing"):
        models.read_config(tmp_path)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [7, 2]}, (7, 2)),
        ({"eos_token_id": 7, "suppress_tokens": [1], "do_sample": True}, (7,)),
        ({"eos_token_id": None}, (2,)),
        ({"eos_token_id": []}, (2,)),
        ({"temperature": 0.6}, (2,)),
    ],
)
def test_generation_config_names_the_tokens_that_end_a_text(
    generation: dict[str, Any], expected: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
    raw = cases.CASES["llama2"].config
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert models.read_config(tmp_path) == models.config_from_dict(raw)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = models.read_config(tmp_path)
    assert config.eos_tokens == expected
    assert models.read_config(tmp_path / "config.json") == config
    assert models.config_from_dict(models.config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "generation_config.json: not valid JSON"),
        ("", "generation_config.json: not valid JSON"),
        ("[2]", "generation_config.json: expected a JSON object, found list"),
        ('{"eos_token_id": "</s>"}', "generation_config.json: field 'eos_token_id'.*token number"),
        ('{"eos_token_id": [2, 3.0]}', "generation_config.json: field 'eos_token_id'"),
        ('{"eos_token_id": true}', "generation_config.json: field 'eos_token_id'"),
    ],
)
def test_a_bad_generation_config_is_named(text: str, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cases.CASES["llama2"].config))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        models.read_config(tmp_path)
    # An encoder generates nothing, whatever lies next to it.
    (tmp_path / "config.json").write_text(json.dumps(cases.CASES["bert"].config))
    assert models.read_config(tmp_path) == models.config_from_dict(cases.CASES["bert"].config)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_window_that_is_switched_on_without_a_size_has_the_familys(name: str) -> None:
    raw = cases.CASES[name].config | {"use_sliding_window": True, "max_window_layers": 1}
    assert models.config_from_dict(raw).windows == (None, 4096, 4096)
    assert models.config_from_dict(raw | {"sliding_window": None}).windows == (None,) * 3
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert models.config_from_dict(raw | {"layer_types": types}).windows == (4096, None, None)


def test_the_switches_of_each_family() -> None:
    def read(name: str) -> Any:
        return models.config_from_dict(cases.CASES[name].config)

    assert (read("qwen2").qkv_bias, read("qwen2").out_bias) == (True, False)
    assert (read("qwen3").qk_norm, read("qwen3").qkv_bias) == (True, True)
    assert read("phi3").fused
    assert read("mistral").windows == (4, 4, 4)
    assert read("qwen2-sliding").windows == (None, 3, 3)
    assert read("llama3").eos_tokens == (2, 3)
    # Mistral's file of the first release leaves the window out and means 4096.
    first = {k: v for k, v in cases.CASES["mistral"].config.items() if k != "sliding_window"}
    assert models.config_from_dict(first).windows == (4096,) * 3
