"""The command line: ``python -m train RECIPE ...``."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

RECIPES = {
    "demo": "adapt an embedded model to a new task and show that it learned: two minutes on a CPU",
    "glue": "fine-tune an encoder on a task of GLUE",
    "sft": "fine-tune a decoder on instructions and answers",
    "pretrain": "make the embedded model of the demo from scratch",
    "evaluate": "measure a run's adapter again, on its own data or on other",
    "export": "merge an adapter into its base: a Hugging Face folder for any other software",
    "rank": "what rank an adapter's updates have, as a table and a figure",
    "plan": "what would train, with which memory; reads no weights",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs one recipe.

    Args:
      args: the command line without the program's name; ``sys.argv`` if not given.

    Returns:
      The exit status: 0 if done; 2 if something given cannot be used, in which case one line says
      what, where and what to do; 130 or 143 if SIGINT or SIGTERM stopped the run, after its state
      was saved.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else 2
    name, *rest = args
    if name not in RECIPES:
        return _refused(f"there is no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    # Orbax and grain tell of each save, with tracebacks; what matters comes as an exception too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
    # From here on, since they take seconds to import.
    import jax

    import hyperadapt_jax as ha
    from hyperadapt_jax import models
    from train import options
    from train.errors import InputError
    from train.loop import Interrupted

    refusals = (InputError, ha.PlanError, ha.AdapterError, models.CheckpointError)
    try:
        recipe = importlib.import_module(f"train.recipes.{name}")
        chosen = options.parse(name, recipe.Options, rest)
        recipe.run(chosen)
    except Interrupted as stopped:
        command = f"python -m train {name} {' '.join(rest)}".replace(" --resume", "")
        print(
            f"{signal.Signals(stopped.number).name}: {stopped}; go on with: {command} --resume",
            file=sys.stderr,
        )
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        return 128 + signal.SIGINT
    except refusals as error:
        return _refused(str(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(
            "the device has too little memory: raise --accumulate, lower --batch-size or"
            " --max-length, or take --remat full or --dtype bfloat16"
        )
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        return _refused(f"{error.filename or 'a file'}: {error.strerror or error}")
    return 0


def _refused(reason: str) -> int:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, RECIPES))
    lines = [f"  {name:<{width}}  {what}" for name, what in RECIPES.items()]
    return "\n".join(
        [
            "usage: python -m train RECIPE [OPTIONS]",
            "",
            "Fine-tune a frozen model with scale vectors: n + m numbers for an n x m weight.",
            "",
            "recipes:",
            *lines,
            "",
            "python -m train RECIPE --help lists a recipe's options. Exit status: 0 done,",
            "2 something given cannot be used, 130 or 143 stopped by Ctrl-C or SIGTERM with",
            "everything saved.",
        ]
    )


def _unraisable(found: Any) -> None:
    """Leaves out what comes of a failed checkpoint beside the error that is told.

    When one of its arrays cannot be written, the writes of the others still report to the event
    loop that Orbax has closed by then.
    """
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


if __name__ == "__main__":
    sys.unraisablehook = _unraisable
    sys.exit(main())
