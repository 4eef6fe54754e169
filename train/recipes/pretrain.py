"""Make the demo's embedded model: a small Llama that knows one-step arithmetic, from scratch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.tables import table

from .. import base
from ..assembly import assemble, write_result
from ..files import write
from ..metrics.halves import reported
from ..options import (
    AdapterOptions,
    DeviceOptions,
    ModelOptions,
    OptimizerOptions,
    Place,
    RunOptions,
    command_line,
    flat,
)
from ..parallel import processes
from ..run import report
from ..run.folder import open_run
from ..tasks.arithmetic import problems
from ..tasks.arithmetic.task import OneStep

FRESH, MODEL = "fresh", "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Make the demo's embedded model from scratch, on synthetic arithmetic and word problems.

    A Llama of 4 layers, width 128 and 0.9 million parameters. It learns texts made on the spot,
    packed into rows; it is examined on number families that none of them uses. The run's folder
    gets the model as the Hugging Face folder `model`. About 12 minutes on 2 free CPU cores.

    Examples:
      python -m train pretrain
      # Another draw of the weights and of the texts.
      python -m train pretrain --seed 1 --folder runs/pretrain-1
      # A run that was stopped, from where it was saved.
      python -m train pretrain --resume
    """

    optimizer: OptimizerOptions = OptimizerOptions(
        optimizer="muon", muon_embeddings=True, lr=0.02, warmup=100
    )
    run: RunOptions = RunOptions(folder=Path("runs/pretrain"), steps=3100, eval_every=500)
    devices: DeviceOptions = DeviceOptions()
    task: OneStep = OneStep()

    @property
    def model(self) -> ModelOptions:
        """The model before it has learned anything, in the run's folder."""
        return ModelOptions(model=Place(str(self.run.folder / FRESH)), remat="none")

    @property
    def adapter(self) -> AdapterOptions:
        """Every parameter trains."""
        return AdapterOptions(method="full")


def run(options: Options) -> None:
    """Trains and writes the model.

    Raises:
      InputError: the folder cannot be used, a number is out of range, or there are several
        processes.
    """
    processes.alone("pretrain")
    config = flat(options, "pretrain")
    with open_run(options.run.folder, config, resume=options.run.resume) as folder:
        fresh(folder / FRESH, options.run.seed)
        made = assemble(options.task, options.model, options.adapter, options.run, options.devices)
        loaded, tuning = made.load()
        result = made.fit(loaded, tuning, folder, options.optimizer, config)
        params, _ = ha.trainable.combine(result.trainable, tuning.frozen)
        kinds = options.task.kinds
        shares = reported(result.best)
        rows = [[what, f"{shares[kind]:.1%}"] for kind, what in kinds.items()]
        write_model(folder / MODEL, options.model, params, rows)
        command = command_line("pretrain", options)
        title = "Pre-training on arithmetic"
        report.write(folder, title, made.plan, result.rows, made.facts(result), command)
        write_result(folder, result)
    if not options.run.quiet:
        print(table(["of number families never seen", "right"], rows, right="right"))
        print(f"the model is in {folder / MODEL}")


def configuration(vocabulary: int) -> models.Config:
    """The embedded model's architecture."""
    special = {"pad": problems.PAD, "bos": problems.BOS, "eos": problems.EOS}
    return models.config_from_dict(
        dict(
            model_type="llama",
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=False,
            **{f"{k}_token_id": problems.SPECIAL.index(token) for k, token in special.items()},
        )
    )


def fresh(folder: Path, seed: int) -> Path:
    """The folder of the model before it has learned anything; made if it is not there yet."""
    tokenizer = problems.tokenizer()
    if not (folder / "tokenizer.json").exists():
        model = models.create(configuration(tokenizer.get_vocab_size()), seed=seed)
        models.export(folder, model, overwrite=True, progress=False)
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": problems.BOS,
            "eos_token": problems.EOS,
            "pad_token": problems.PAD,
            "unk_token": problems.UNKNOWN,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_length,
        }
        write(folder / "tokenizer_config.json", json.dumps(about, indent=2) + "\n")
        write(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    return folder


def write_model(folder: Path, model: ModelOptions, params: Any, rows: list[list[str]]) -> None:
    """Writes the Hugging Face folder: weights in float16, tokenizer, and a model card."""
    loaded = base.load_abstract(model)
    models.export(
        folder,
        models.from_params(loaded.config, params),
        source=loaded.folder,
        dtype="float16",
        overwrite=True,
        progress=False,
    )
    write(
        folder / "README.md", CARD.format(table=table(["", "right"], rows, "right", markdown=True))
    )


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A tiny Llama that knows arithmetic of one step

Made by this project for its demo, from scratch, on synthetic text alone:

    python -m train pretrain

It completes equations of whole numbers below 100, `31+12=`, chains of them, `43, 43-8=35`, and
answers one-step word problems, by a number or by an equation. It knows a few hundred words and
nothing of the world. One family of numbers in eight, such as 12, 31 and 43, was held out of all
that it learned; on problems of those families alone:

{table}

Its weights, in float16, and its tokenizer are under the Apache License 2.0, as the project is.
"""
