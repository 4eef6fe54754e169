"""Fine-tune a decoder on instructions and answers."""

from __future__ import annotations

import dataclasses

from ..assembly import launch
from ..options import AdapterOptions, DeviceOptions, ModelOptions, OptimizerOptions, RunOptions
from ..tasks.instructions import Instructions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune a decoder on instructions and answers; the loss is of the answers alone.

    Rows are read as --prompt and --answer say, or are whole chats in a column "messages", shown by
    the tokenizer's chat template. Held-out rows give the loss before, during and after; the best
    step's adapter is kept. Generations for some of them go to predictions.jsonl.

    Examples:
      # Questions and answers in two columns; the base model shows no chat template.
      python -m train sft --model Qwen/Qwen2.5-0.5B --data rows.jsonl \\
          --folder runs/sft --prompt '{question}' --answer ' {answer}' --epochs 3
      # Whole chats in a column "messages", scored by what the model generates.
      python -m train sft --model Qwen/Qwen2.5-0.5B-Instruct --data chats.parquet \\
          --folder runs/chat --score last-number --questions 200 --dtype bfloat16
      # A run that was stopped, from where it was saved.
      python -m train sft --config runs/chat/config.yaml --folder runs/chat --resume
    """

    task: Instructions
    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    run: RunOptions
    devices: DeviceOptions = DeviceOptions()


def run(options: Options) -> None:
    """Trains; see `train.assembly.launch`."""
    launch("sft", options, f"Fine-tuning: {options.adapter.method}")
