"""What would train: the plan of a method on a model, before anything is allocated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import huggingface_hub

from .. import base, methods
from ..errors import InputError, first_line
from ..options import AdapterOptions, ModelOptions, Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Show what a method would train: weights, axis roles, numbers, bytes, share of the model.

    Reads the model's config.json and no weights, so that it takes seconds for a model of any size;
    of a repository of the hub, nothing else is fetched. What the weights turn out to lack, such as
    a pooler, a run trains fully as well.

    Examples:
      python -m train plan --model Qwen/Qwen2.5-0.5B
      # An encoder with a new head of three classes.
      python -m train plan --model FacebookAI/roberta-base --labels 3
      # Queries and values alone, and the norms fully.
      python -m train plan --model Qwen/Qwen2.5-0.5B --targets qv --full '.*norm/scale'
    """

    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    labels: int | None = None
    """Outputs of a new classification head on an encoder, which trains fully; 1 for regression.
    No head if not given."""


def run(options: Options) -> None:
    """Prints the plan.

    Raises:
      InputError: there is no such model, a target matches nothing, or nothing would train.
    """
    if options.labels is not None and options.labels < 1:
        raise InputError(f"--labels {options.labels}: give at least 1")
    described = base.load_abstract(_config_alone(options.model), options.labels)
    print(methods.table(described, methods.tune(described, options.adapter)))


def _config_alone(options: ModelOptions) -> ModelOptions:
    """The options with a folder in place of a repository of the hub: its config.json, no more."""
    if Path(options.model).expanduser().exists():
        return options
    try:
        file = huggingface_hub.hf_hub_download(
            options.model, "config.json", revision=options.revision
        )
    except Exception as error:  # the client's own, the network's, the file system's: one answer
        raise InputError(
            f"--model {options.model} is no folder, and its config.json could not be"
            f" downloaded from the hub: {first_line(error)} Check the name, the network"
            " (HF_HUB_OFFLINE) and, for a gated repository, the login (HF_TOKEN)"
        ) from error
    return dataclasses.replace(options, model=Place(str(Path(file).parent)))
