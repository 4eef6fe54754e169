"""Fine-tune an encoder on texts and their classes."""

from __future__ import annotations

import dataclasses

from ..assembly import launch
from ..options import AdapterOptions, DeviceOptions, ModelOptions, OptimizerOptions, RunOptions
from ..tasks.classify import Classify


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune an encoder on texts and their classes: a new head, and scale vectors.

    The classes are those of the training rows. Held-out rows give accuracy and macro F1, before,
    during and after; the best step's adapter is kept, and confusion.png shows which class is taken
    for which.

    Examples:
      # Rows such as {"text": "Stocks rose on Friday.", "label": "Business"}.
      python -m train classify --model FacebookAI/roberta-base --data news.jsonl \\
          --folder runs/news --epochs 2
      # Columns of other names, and a file of held-out rows.
      python -m train classify --model FacebookAI/roberta-base --data train.csv \\
          --eval-data test.csv --text title --label topic --folder runs/topics --epochs 2
      # A run that was stopped, from where it was saved.
      python -m train classify --config runs/news/config.yaml --folder runs/news --resume
    """

    task: Classify
    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    optimizer: OptimizerOptions = OptimizerOptions(head_lr=1e-3)
    run: RunOptions
    devices: DeviceOptions = DeviceOptions()


def run(options: Options) -> None:
    """Trains; see `train.assembly.launch`."""
    launch("classify", options, f"Classification: {options.adapter.method}")
