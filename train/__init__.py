"""Recipes that fine-tune, watch, resume, evaluate and export: ``python -m train --help``.

An installed package has them as ``hyperadapt_jax.train``, and as the command ``hyperadapt``.
"""

import importlib
from typing import Any

# How this program is called: from a checkout, or as it is installed.
PROGRAM = "python -m train" if __package__ == "train" else "hyperadapt"

# What Python programs use; imported when it is asked for, since that takes seconds.
_PUBLIC = {
    "fit": "assembly",
    "Result": "trainer.loop",
    "Interrupted": "trainer.loop",
    "InputError": "errors",
    "Task": "tasks.task",
    "Setting": "tasks.task",
    "Training": "tasks.task",
    "Evaluation": "tasks.task",
    "Instructions": "tasks.instructions",
    "Glue": "tasks.glue",
    "Classify": "tasks.classify",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
