"""The merged model: an adapter multiplied into its base, for any software that reads the format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax

import hyperadapt_jax as ha
from hyperadapt_jax import models
from hyperadapt_jax.merge import Rounding

from ..errors import InputError
from ..files import writing
from ..run.trained import TrainedOptions, load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Merge an adapter into its base, and write a Hugging Face folder: no adapter, no extra cost.

    The product is made in float32 and rounded once; a table tells what the rounding cost. One
    parameter is held at a time. The tokenizer is copied from the base. The folder appears when it
    is complete.

    Examples:
      python -m train export --adapter runs/sft --folder merged
      # In another dtype, in smaller files.
      python -m train export --adapter runs/sft --folder merged-16 --dtype bfloat16 \\
          --max-shard-size 2GB
      # The base model lies elsewhere now.
      python -m train export --adapter runs/sft --model ~/models/qwen --folder merged
    """

    trained: TrainedOptions
    folder: Path
    """Where the merged model is written: config.json, model.safetensors, the tokenizer."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype to store; that of the base's config.json if not given. bfloat16 can round a good part
    of a small update away."""
    max_shard_size: str = "5GB"
    """Most bytes of one file, such as 5GB or 200MiB."""
    overwrite: bool = False
    """Replace the model in a folder that holds one."""
    quiet: bool = False
    """Print errors alone."""


def run(options: Options) -> None:
    """Writes the merged model and prints the report.

    Raises:
      InputError: the folder is not empty, or cannot be written; there is no adapter, or no base.
      AdapterError, CheckpointError: the adapter or the base is damaged, or they do not fit.
    """
    trained = load_run(options.trained)
    base, dtype = trained.base, options.dtype or trained.dtype
    if options.folder.resolve() == base.folder.resolve():
        raise InputError(f"--folder {options.folder} is the base itself: choose another folder")
    losses: list[Rounding] = []

    def leaf(path: str) -> jax.Array:
        weight = trained.parameter(path, "float32")
        if path not in trained.adapter.scales:
            return weight
        scales = {path: trained.adapter.scales[path]}
        merged, report = ha.merge({path: weight}, scales, dtype=dtype, report=True)
        losses.extend(report.weights)
        return merged[path]

    with writing(options.folder):
        try:
            models.export(
                options.folder,
                models.abstract(base.config),
                source=base.folder,
                leaf=leaf,
                dtype=dtype,
                max_shard_size=options.max_shard_size,
                overwrite=options.overwrite,
                progress=not options.quiet,
            )
        except FileExistsError as error:
            advice = str(error).replace("pass overwrite=True", "give --overwrite")
            raise InputError(f"--folder {advice}") from error
        except models.CheckpointError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error
    if options.quiet:
        return
    if losses:
        print(ha.MergeReport(tuple(losses)))
    files = [file for file in options.folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"{options.folder}: {len(files)} files, {size / 1e6:,.1f} MB, weights in {dtype}")
