"""Configurations: what is read, what is passed over, and what is refused by name."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest

from hyperadapt_jax import models
from hyperadapt_jax.models.registry import FAMILIES
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
        ("llama2", "eos_token_id", "</s>", "token id"),
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


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("qwen2", {"torch_dtype": "bfloat16", "use_cache": False, "max_window_layers": 2}),
        ("qwen2", {"top_p": 0.9, "dual_chunk_attention_config": {"chunk_size": 8}}),
        ("llama2", {"_name_or_path": "/a", "_model_name_or_path": "b", "_anything": [1, {"a": 2}]}),
        ("llama2", {"mlp_only_layers": None, "quantization_config": None, "unheard_of": None}),
        ("llama2", {"max_sequence_length": 2048, "unk_token_id": 0, "internal_version": "7b-v2"}),
        ("mistral", {"id2label": {"0": "A"}, "label2id": {"A": 0}, "_num_labels": 1}),
        ("phi3", {"num_labels": 2, "classifier_dropout": 0.1, "unk_token": "<unk>"}),
        ("bert", {"sentence_transformers": {"version": "4.0"}, "_num_labels": 5}),
        ("bert", {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}),
        ("roberta", {"language": "english", "name": "Roberta", "use_return_dict": True}),
        ("distilbert", {"qa_dropout": 0.3, "tie_weights_": True, "sinusoidal_pos_embds": False}),
    ],
)
def test_fields_without_effect_are_passed_over(case: str, more: dict[str, Any]) -> None:
    base = cases.CASES[case].config
    assert models.config_from_dict(base | more) == models.config_from_dict(base)


def test_a_token_that_there_is_not_may_be_called_minus_one() -> None:
    raw = cases.CASES["llama2"].config | {"pad_token_id": -1, "bos_token_id": -1}
    config = models.config_from_dict(raw)
    assert config.pad_token is config.bos_token is None


def test_labels_give_a_head_only_to_a_classifier() -> None:
    raw = cases.CASES["bert-classifier"].config
    assert models.config_from_dict(raw).num_labels == 3
    assert models.config_from_dict(raw | {"architectures": ["BertModel"]}).num_labels is None
    assert models.config_from_dict(raw | {"architectures": ["BertForMaskedLM"]}).num_labels is None
    short = {name: value for name, value in raw.items() if name not in ("id2label", "label2id")}
    assert models.config_from_dict(short).num_labels == 2
    assert models.config_from_dict(short | {"num_labels": 4}).num_labels == 4
    # As in the reference, the names count.
    assert models.config_from_dict(raw | {"num_labels": 4, "_num_labels": 5}).num_labels == 3


@pytest.mark.parametrize(("case", "name"), [("bert", "Bert"), ("roberta", "Roberta")])
def test_under_a_head_of_pretraining_there_is_the_encoder(case: str, name: str) -> None:
    raw = cases.CASES[case].config
    for head in ("ForMaskedLM", "ForPreTraining"):
        read = models.config_from_dict(raw | {"architectures": [name + head]})
        assert read == models.config_from_dict(raw)
    for other in (name + "ForQuestionAnswering", name + "ForTokenClassification", "ElectraModel"):
        with pytest.raises(ValueError, match="architectures"):
            models.config_from_dict(raw | {"architectures": [other]})


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
        ("{", "generation_config.json is not valid JSON"),
        ("", "generation_config.json is not valid JSON"),
        ("[2]", "generation_config.json: expected a JSON object, found list"),
        ('{"eos_token_id": "</s>"}', "generation_config.json: field 'eos_token_id'.*token id"),
        ('{"eos_token_id": [2, 3.0]}', "generation_config.json: field 'eos_token_id'"),
        ('{"eos_token_id": [2, 1000000000000]}', "generation_config.json: field 'eos_token_id'"),
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


@pytest.mark.parametrize(
    ("name", "kv_heads", "length"),
    [
        ("llama2", 64, 2048), ("mistral", 8, 131072), ("qwen2", 32, 32768),
        ("qwen3", 32, 32768), ("phi3", 64, 4096),
    ],
)  # fmt: skip
def test_a_field_that_is_left_out_is_the_familys_default(
    name: str, kv_heads: int, length: int
) -> None:
    raw = cases.CASES[name].config | {"num_attention_heads": 64, "hidden_size": 128}
    left_out = ("num_key_value_heads", "max_position_embeddings")
    short = {key: value for key, value in raw.items() if key not in left_out}
    config = models.config_from_dict(short)
    assert (config.num_kv_heads, config.max_length) == (kv_heads, length)
    assert models.config_from_dict(raw | {"num_key_value_heads": None}).num_kv_heads == 64


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_window_that_is_switched_on_without_a_size_has_the_familys(name: str) -> None:
    raw = cases.CASES[name].config | {"use_sliding_window": True, "max_window_layers": 1}
    assert models.config_from_dict(raw).windows == (None, 4096, 4096)
    assert models.config_from_dict(raw | {"sliding_window": None}).windows == (None,) * 3
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert models.config_from_dict(raw | {"layer_types": types}).windows == (4096, None, None)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":' * 100_000,
        b'{"model_type": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"model_type": "llama", "vocab_size": 1, "vocab_size": 2}',
        '{"model_type": "ll\u00e4ma"}'.encode("latin-1"),
        b'\xef\xbb\xbf{"model_type": "llama"}',
        b'{"model_type": "llama", "vocab_size": ' + b"9" * 5_000 + b"}",
        b'{"model_type": "llama", "hidden_size": NaN}',
        b'{"model_type": "llama", "hidden_size": 1e999}',
        b"null",
        b"",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_a_bad_file_is_an_error_of_one_line(tmp_path: pathlib.Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        models.read_config(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# Values of no field, and numbers that no size of a model can be.
WRONG = ["x", [], ["x"], {}, {"a": 1}, [["x"]], 10**400, -(10**400), 10**12, float("nan"), -1.5]


@pytest.mark.parametrize(
    "case", ["llama3", "phi4-mini-long", "qwen2-sliding", "qwen3-yarn", "roberta", "distilbert"]
)
def test_a_bad_value_is_an_error_that_names_its_field(case: str) -> None:
    """Whatever stands in a field, the configuration is read or refused, in one line and at once."""
    raw = cases.CASES[case].config
    scaling = raw.get("rope_scaling") or {}
    places = [(name, raw | {name: value}) for name in raw for value in WRONG]
    for name in (*scaling, "type", "rope_type", "rope_theta"):
        for value in WRONG if scaling else ():
            places.append((name, raw | {"rope_scaling": scaling | {name: value}}))
    more = ("layer_types", "rope_theta", "partial_rotary_factor", "head_dim", "rms_norm_eps")
    places += [(name, raw | {name: value}) for name in more for value in WRONG]
    refused = 0
    for name, broken in places:
        try:
            models.config_from_dict(broken)
        except ValueError as error:
            refused += 1
            message = str(error)
            assert message.startswith("config.json") and "\n" not in message
            assert len(message) < 600, name
    assert refused > len(places) / 2


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("llama2", {"num_hidden_layers": 10**9}, "num_hidden_layers.*at most 10000"),
        ("bert", {"num_hidden_layers": 10**9}, "num_hidden_layers.*at most 10000"),
        ("llama2", {"vocab_size": 2**31}, "vocab_size.*at most"),
        ("llama2", {"rms_norm_eps": -1.0}, "rms_norm_eps.*zero or more"),
        ("bert", {"layer_norm_eps": -1e-5}, "layer_norm_eps.*zero or more"),
        ("qwen2", {"layer_types": ["full_attention", ["x"], {}]}, "layer_types"),
        ("llama2", {"rope_scaling": {"type": ["linear"]}}, "'type'.*expected str"),
        ("llama2", {"rope_theta": 10**400}, "rope_theta.*finite"),
        ("phi3", {"partial_rotary_factor": 1e308}, "partial_rotary_factor"),
        ("phi3", {"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        ("phi4-mini-long", {"original_max_position_embeddings": 1}, "two or more"),
        ("roberta", {"pad_token_id": -1}, "pad_token_id"),
        ("roberta", {"pad_token_id": 19}, "pad_token_id"),
        ("bert-classifier", {"id2label": {}}, "id2label"),
        ("distilbert", {"n_layers": 10**9}, "n_layers.*at most 10000"),
        ("distilbert", {"n_heads": 3}, "n_heads.*does not divide dim 16"),
        ("distilbert", {"pad_token_id": -1}, "pad_token_id"),
        ("llama2", {"unheard_of": [[[[[["deep"] * 99] * 99]]]]}, "unheard_of.*not understood"),
    ],
)
def test_a_value_out_of_range_is_named(case: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.config_from_dict(cases.CASES[case].config | fields)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quantization": {"quant_algo": "FP8"}}, "quant_algo.*FP8.*not supported"),
        ({"quantization": {"quant_algo": {"a": "W4A16"}}}, "quant_algo"),
        ({"quantization": {}}, "quant_algo"),
        ({"quantization": "FP8"}, "expected dict"),
        ({}, "missing"),
        ([], "expected a JSON object"),
        ({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, None),
    ],
)
def test_weights_that_a_file_beside_calls_quantized_are_refused(
    tmp_path: pathlib.Path, said: Any, message: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cases.CASES["llama2"].config))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    if message is None:
        models.read_config(tmp_path)
        return
    with pytest.raises(ValueError, match=rf"hf_quant_config\.json.*{message}"):
        models.read_config(tmp_path)
    with pytest.raises(ValueError, match=r"hf_quant_config\.json"):
        models.read_config(tmp_path / "config.json")


# Public models of a family that is read, which are refused for another reason.
OTHERS = {
    "Qwen/Qwen3-32B-FP8": "quantization_config",
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": "quantization_config",
    "intfloat/e5-mistral-7b-instruct": "architectures.*MistralModel",
    "bert-large-uncased-whole-word-masking-finetuned-squad": "architectures.*QuestionAnswering",
    "deepset/roberta-base-squad2": "architectures.*QuestionAnswering",
    "dslim/bert-base-NER": "architectures.*TokenClassification",
    # The list gives stubs of these.
    "almanach/camembert-base": "'num_attention_heads' is missing",
    "distilbert/distilbert-base-uncased": "'dim' is missing",
}


def test_public_configurations_are_read_or_refused_as_they_should_be(
    shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = shared / "cases" / "models" / "configs.json"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    wrong, read = [], 0
    for number, (name, entry) in enumerate(json.loads(file.read_text()).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(entry["config"]))
        known = entry["config"].get("model_type") in FAMILIES
        reason = OTHERS.get(name, None if known else "model_type")
        if name == "nvidia/Llama-3.1-70B-Instruct-FP8":  # config.json does not say so
            (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
            reason = "hf_quant_config"
        try:
            models.read_config(folder)
        except ValueError as error:
            if reason is None or not re.search(reason, str(error)):
                wrong.append((name, str(error)))
        else:
            read += 1
            wrong += [(name, "accepted")] if reason else []
    assert not wrong and read > 100


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
