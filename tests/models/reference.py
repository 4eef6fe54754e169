"""The torch reference of a small random model: its weights, outputs and gradients."""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
import transformers

from hyperadapt_jax import models
from tests.models import cases


def torch_model(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A model of transformers with random weights, large enough that every part matters."""
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        settings = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config["architectures"][0])
    model = kind._from_config(settings, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        one = "norm" in name.lower() and name.endswith("weight")
        parameter.data = 1 + 0.2 * draw if one else 0.3 * draw
    return model


def names_of_kernels(config: models.Config) -> dict[str, str]:
    """For each kernel in the layers, its checkpoint name with ``{layer}``."""
    return {
        tensor.path.split("/")[1]: tensor.name
        for tensor in models.tensors(config)
        if tensor.path.startswith("layers/") and tensor.path.endswith("/kernel")
    }


def outputs_of(model: torch.nn.Module, inputs: dict[str, np.ndarray], weights: dict) -> dict:
    """Outputs of the model with some of its weights replaced, under this library's names."""
    result = torch.func.functional_call(
        model,
        weights,
        kwargs={
            "input_ids": torch.tensor(inputs["tokens"]),
            "attention_mask": torch.tensor(inputs["mask"]).long(),
        },
    )
    names = {"logits": "logits", "sequence": "last_hidden_state", "pooled": "pooler_output"}
    found = {name: getattr(result, theirs, None) for name, theirs in names.items()}
    return {name: value for name, value in found.items() if value is not None}


SENTENCES = (
    "A cat sits on the mat.",
    "On the mat there is a cat!",
    "Scale the rows and the columns of a frozen matrix, and leave its bias alone.",
    "Paris",
)


def pretrained(weights: pathlib.Path) -> dict[str, np.ndarray]:
    """What torch makes of real weights: sentence embeddings and a greedy story.

    Args:
      weights: the folder that holds ``all-MiniLM-L6-v2`` and ``stories260K``.

    Returns:
      ``minilm/tokens``, ``minilm/mask`` and ``minilm/embeddings`` (means over tokens, ``[B, D]``);
      ``stories/prompt`` and ``stories/continuation`` (200 tokens).
    """
    folder = weights / "all-MiniLM-L6-v2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        sequence = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    embeddings = (sequence * mask).sum(1) / mask.sum(1)
    folder = weights / "stories260K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    story = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=200,
        eos_token_id=None,
        pad_token_id=0,
    )[0, prompt.shape[1] :]
    return {
        "minilm/tokens": batch["input_ids"].numpy(),
        "minilm/mask": batch["attention_mask"].numpy().astype(bool),
        "minilm/embeddings": embeddings.numpy(),
        "stories/prompt": prompt[0].numpy(),
        "stories/continuation": story.numpy(),
    }


def run(case: cases.Case, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Everything a comparison needs, as nested dicts of arrays.

    Returns:
      ``weights`` by checkpoint name, ``inputs``, ``probes`` of the loss, ``scales`` by kernel and
      side (deltas around one), ``outputs`` and ``scaled_outputs`` without and with the scales, and
      ``grads`` of the loss for the scales.
    """
    config = models.config_from_dict(case.config)
    model = torch_model(case.config, seed)
    inputs = cases.batch(config, case.padding, seed)
    rng = np.random.default_rng(seed)
    names = names_of_kernels(config)
    state = dict(model.state_dict())
    scales, weights = {}, {}
    for kernel, name in names.items():
        outputs, inputs_ = state[name.format(layer=0)].shape
        for side, size in (("row", outputs), ("col", inputs_)):
            delta = 0.2 * rng.standard_normal((config.num_layers, size))
            scales[f"{kernel}/{side}"] = torch.tensor(delta.astype(np.float32), requires_grad=True)
        for layer in range(config.num_layers):
            row, col = (1 + scales[f"{kernel}/{side}"][layer] for side in ("row", "col"))
            weights[name.format(layer=layer)] = row[:, None] * state[name.format(layer=layer)] * col
    plain, changed = outputs_of(model, inputs, {}), outputs_of(model, inputs, weights)
    probes = {}
    for name, value in plain.items():
        probe = rng.standard_normal(tuple(value.shape)).astype(np.float32)
        # What stands at padding has no meaning and no share in the loss.
        probes[name] = probe * inputs["mask"][..., None] if probe.ndim == 3 else probe
    total = cases.loss(changed, {name: torch.tensor(value) for name, value in probes.items()})
    grads = torch.autograd.grad(total, list(scales.values()))
    tied = "lm_head.weight" in state and getattr(config, "tie_embeddings", False)
    if tied:
        del state["lm_head.weight"]

    def arrays(tree: dict) -> dict[str, np.ndarray]:
        return {name: value.detach().numpy() for name, value in tree.items()}

    return {
        "weights": arrays(state),
        "inputs": inputs,
        "probes": probes,
        "scales": arrays(scales),
        "outputs": arrays(plain),
        "scaled_outputs": arrays(changed),
        "grads": arrays(dict(zip(scales, grads, strict=True))),
    }
