"""The base model's folder: which tokenizers fit, and which configuration the weights have."""

import json

import numpy as np
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file, save_file

from hyperadapt_jax import models
from train import base
from train.__main__ import main
from train.errors import InputError
from train.options import ModelOptions

from . import tiny

WORDS = ["</s>", "<unk>", "is", *(f"w{i}" for i in range(29))]


def folder_of(where, *, words=(), added=(), **fields):
    """A random model of 32 tokens, with a tokenizer that knows these words in its place or beyond.

    `words` are its own, `added` come after them as padding and names do that a user adds.
    """
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate([*WORDS, *words])}, unk_token="<unk>"
        )
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_tokens([tokenizers.AddedToken(word) for word in added])
    tiny.folder(where)
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", **fields)
    found.save_pretrained(where)
    return ModelOptions(model=str(where))


def test_added_tokens_past_the_table_are_refused_where_they_occur(tmp_path):
    options = folder_of(tmp_path, added=["<pad>", "name"], pad_token="<pad>")
    tokenizer = base.tokenizer(options)
    assert tokenizer.pad_token_id == 32 and tokenizer("w0 name")["input_ids"] == [3, 33]
    base.check_tokens([[3, 31], [], np.asarray([4])], tokenizer, 32)
    with pytest.raises(InputError, match="example 1 holds 'name'.* token 33, .*knows 32"):
        base.check_tokens([[3], [5, 33, 5]], tokenizer, 32)


def test_a_tokenizer_of_the_models_size_is_not_looked_at_twice(tmp_path):
    options = folder_of(tmp_path)
    rows = iter(lambda: pytest.fail("asked for"), None)
    base.check_tokens(rows, base.tokenizer(options), 32)


def test_another_models_tokenizer_is_refused(tmp_path):
    options = folder_of(tmp_path, words=["more"])
    with pytest.raises(InputError, match="another model's tokenizer: its last token is 32"):
        base.tokenizer(options)


def test_a_row_with_such_a_token_ends_a_run_in_one_line(tmp_path, capsys):
    folder_of(tmp_path / "model", added=["<pad>", "name"], pad_token="<pad>")
    rows = [{"q": "w1 is", "a": "w2"}] * 11 + [{"q": "name", "a": "w2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = main([
        "sft", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"),
        "--folder", str(tmp_path / "run"), "--prompt", "{q}", "--answer", "{a}", "--steps", "1",
        "--batch-size", "4", "--eval-rows", "2", "--questions", "0", "--max-length", "16",
        "--remat", "none", "--quiet",
    ])  # fmt: skip
    assert status == 2 and "'name'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_base_is_described_as_its_weights_have_it(tmp_path):
    config = models.config_from_dict(tiny.CONFIG)
    assert not config.tie_embeddings
    models.export(tmp_path, models.create(config))
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    options = ModelOptions(model=str(tmp_path))
    described, loaded = base.load_abstract(options), base.load(options, quiet=True)
    assert described.config == loaded.config == config
    assert "head" in described.params and "head" in loaded.params
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, file)
    assert base.load_abstract(options).config.tie_embeddings
    assert "head" not in base.load(options, quiet=True).params
