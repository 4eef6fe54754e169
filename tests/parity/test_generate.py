"""Generation against transformers' own: stretched rotary positions, ends of turns, windows."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402

from hyperadapt_jax import models  # noqa: E402
from tests.models import cases, reference  # noqa: E402

ORIGINAL, NEW = 16, 16
ROWS = {
    "one row": [[3, 9, 17, 20, 5, 13, 7]],
    "unequal rows": [[3, 9, 17, 20, 5, 13, 7], [5, 4], [9] * 12],
    "at the limit": [list(range(3, 3 + ORIGINAL))],
    "beyond it": [[3 + i % 20 for i in range(ORIGINAL + 3)], [4, 8, 15]],
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 16.0],
    "original_max_position_embeddings": ORIGINAL,
}
STRETCHED = {
    "phi3-longrope": cases.CASES["phi4"].config
    | {"original_max_position_embeddings": ORIGINAL, "rope_parameters": LONGROPE},
    "llama-longrope": cases.CASES["llama2"].config | {"rope_parameters": LONGROPE},
    "llama-dynamic": cases.CASES["llama-dynamic"].config | {"max_position_embeddings": ORIGINAL},
}


def continued(model: Any, rows: list[list[int]], **options: Any) -> list[list[int]]:
    """What transformers adds to rows that are padded on the left."""
    length = max(map(len, rows))
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    found = model.generate(tokens, attention_mask=mask, do_sample=False, **options)
    return found[:, length:].tolist()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", STRETCHED)
def test_frequencies_follow_the_tokens_there_are(
    name: str, rows: str, tmp_path: pathlib.Path
) -> None:
    theirs = reference.torch_model(STRETCHED[name], seed=2)
    theirs.save_pretrained(tmp_path)
    model = models.load(tmp_path, progress=False)
    fn, params = models.functional(model)
    expected = continued(theirs, ROWS[rows], max_new_tokens=NEW, eos_token_id=None)
    for new in (4, 3 * NEW):
        found = models.generate(fn, params, prompts=ROWS[rows], max_new_tokens=new)
        assert [row[:NEW] for row in found] == [row[:new] for row in expected]


@pytest.mark.parametrize("listed", [None, "config", "one", "several"])
def test_text_ends_where_that_of_transformers_does(listed: str, tmp_path: pathlib.Path) -> None:
    prompt = ROWS["one row"]
    config = cases.CASES["llama2"].config
    theirs = reference.torch_model(config, seed=3)
    (text,) = continued(theirs, prompt, max_new_tokens=12, eos_token_id=None)
    end = text[4]
    theirs.config.eos_token_id = end if listed == "config" else 2
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    if listed in (None, "config"):
        file.unlink()
    else:
        file.write_text(json.dumps({"eos_token_id": end if listed == "one" else [2, end]}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = continued(theirs, prompt, max_new_tokens=12)
    assert (len(expected[0]) < 12) == (listed is not None)
    model = models.load(tmp_path, progress=False)
    fn, params = models.functional(model)
    ends = model.config.eos_tokens
    assert models.generate(fn, params, prompts=prompt, max_new_tokens=12, stop_tokens=ends) == (
        expected
    )


SIZES = [{}, {"sliding_window": None}]
SWITCHES = [
    {"use_sliding_window": True},
    {"use_sliding_window": True, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0},
]


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, fields) for name in ("mistral", "qwen2", "qwen3", "phi4") for fields in SIZES]
    + [(name, fields) for name in ("qwen2", "qwen3") for fields in SWITCHES],
)
def test_windows_have_the_familys_default(name: str, fields: dict[str, Any]) -> None:
    raw = {k: v for k, v in cases.CASES[name].config.items() if k != "sliding_window"} | fields
    theirs = transformers.AutoConfig.for_model(**raw)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 3
    expected = [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    assert list(models.config_from_dict(raw).windows) == expected
