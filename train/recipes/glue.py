"""Fine-tune an encoder on a task of GLUE, measured as GLUE measures it."""

from __future__ import annotations

import dataclasses

from ..assembly import launch
from ..options import AdapterOptions, DeviceOptions, ModelOptions, OptimizerOptions, RunOptions
from ..tasks.glue import Glue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune an encoder on a task of GLUE: a new head, and scale vectors on its weights.

    Metrics are GLUE's own, on the development set, before, during and after; the adapter of the
    best step is kept.

    Examples:
      python -m train glue --task mrpc --model FacebookAI/roberta-base --folder runs/mrpc
      # GLUE's own files, a head that learns faster, and ten epochs.
      python -m train glue --task rte --model FacebookAI/roberta-large --data ~/glue \\
          --folder runs/rte --epochs 10 --lr 5e-3 --head-lr 5e-4
      # A run that was stopped, from where it was saved.
      python -m train glue --config runs/rte/config.yaml --folder runs/rte --resume
    """

    task: Glue
    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    optimizer: OptimizerOptions = OptimizerOptions(head_lr=1e-3)
    run: RunOptions
    devices: DeviceOptions = DeviceOptions()


def run(options: Options) -> None:
    """Trains; see `train.assembly.launch`."""
    launch("glue", options, f"GLUE: {options.task.name}, {options.adapter.method}")
