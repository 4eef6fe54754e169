"""The merged model: an adapter multiplied into its base, for any software that reads the format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax

import hyperadapt_jax as ha
from hyperadapt_jax import models, paths
from hyperadapt_jax.merge import Rounding

from ..errors import InputError
from ..files import writing
from ..options import DeviceOptions, flag
from ..parallel import processes
from ..run.trained import Trained, TrainedOptions, load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Merge an adapter into its base, and write a Hugging Face folder: no adapter, no extra cost.

    The product is made in float32 and rounded once; a table tells what the rounding cost. One
    parameter is held at a time, divided over the devices where there are several. The tokenizer is
    copied from the base. The folder appears when it is complete.

    With --format peft, write the adapter alone, as one that peft's PeftModel.from_pretrained loads:
    scale vectors as HiRA (peft 0.21 or newer), low-rank terms as LoRA or DoRA.

    Examples:
      python -m train export --adapter runs/sft --folder merged
      # In another dtype, in smaller files.
      python -m train export --adapter runs/sft --folder merged-16 --dtype bfloat16 \\
          --max-shard-size 2GB
      # An adapter of Hugging Face PEFT.
      python -m train export --adapter runs/sft --format peft --folder peft-adapter
    """

    trained: TrainedOptions
    folder: Path
    """Where it is written: the merged model's config.json, model.safetensors and tokenizer, or
    PEFT's adapter_config.json and adapter_model.safetensors."""
    format: Literal["merged", "peft"] = "merged"
    """A merged model, or an adapter of Hugging Face PEFT."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype to store; that of the base's config.json if not given. bfloat16 can round a good part
    of a small update away. For --format merged: adapters are float32."""
    max_shard_size: str = "5GB"
    """Most bytes of one file, such as 5GB or 200MiB."""
    overwrite: bool = False
    """Replace the model in a folder that holds one."""
    quiet: bool = False
    """Print errors alone."""
    devices: DeviceOptions = DeviceOptions()


def run(options: Options) -> None:
    """Writes the merged model and prints the report.

    Raises:
      InputError: the folder is not empty, or cannot be written; there is no adapter, or no base;
        there are several processes.
      AdapterError, CheckpointError: the adapter or the base is damaged, or they do not fit.
    """
    processes.alone("export")
    layout = options.devices.layout()
    trained = load_run(options.trained, layout)
    for note in layout.notes(trained.base.config) if layout and not options.quiet else ():
        print(note)
    if options.format == "peft":
        _write_peft(trained, options)
        return
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


def _write_peft(trained: Trained, options: Options) -> None:
    for name in ("dtype", "overwrite"):
        if getattr(options, name):
            raise InputError(f"{flag(name)}: is for --format merged; leave it out")
    adapter, base = trained.adapter, trained.base
    params = base.params
    if any(v.row is not None and v.down is not None for v in adapter.scales.values()):
        weights = {path: trained.parameter(path, "float32") for path in adapter.scales}
        params = paths.replace(params, weights)
    task = "CAUSAL_LM"
    if isinstance(base.config, models.EncoderConfig):
        task = "FEATURE_EXTRACTION" if base.config.num_labels is None else "SEQ_CLS"
    ha.peft.save(options.folder, adapter, params, models.tensors(base.config), task_type=task)
    if not options.quiet:
        size = sum(file.stat().st_size for file in options.folder.iterdir())
        print(
            f"{options.folder}: an adapter of PEFT, {size / 1e6:,.2f} MB;"
            f" peft.PeftModel.from_pretrained(model, {str(options.folder)!r}) loads it"
        )
