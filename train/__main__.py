"""The command line: ``python -m train RECIPE ...``, or, installed, ``hyperadapt RECIPE ...``."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from . import PROGRAM
from .recipes import RECIPES


def main(args: Sequence[str] | None = None) -> int:
    """Runs one recipe.

    Args:
      args: the command line without the program's name; ``sys.argv`` if not given.

    Returns:
      The exit status: 0 if done; 2 if something given cannot be used, in which case one line says
      what, where and what to do; 130 or 143 if SIGINT or SIGTERM stopped the run, after its state
      was saved; 141 if nobody reads what it prints.
    """
    args = list(sys.argv[1:] if args is None else args)
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed before the program began
            setattr(sys, stream, open(os.devnull, "w"))
    # A run that has to end before it can save anything tidies up as after Ctrl-C.
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            return _main(args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC) or error.filename is not None:
            raise
        # Else the interpreter fails of it once more when it leaves.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 128 + signal.SIGPIPE
        return _refused(f"what is printed cannot be written: {error.strerror}")
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, _: Any) -> None:
    sys.exit(128 + number)


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else 2
    name, *rest = args
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        return _refused(f"there is no recipe {name!r}: choose one of {known}")
    # Orbax and grain tell of each save, with tracebacks; what matters comes as an exception too.
    for noisy in ("absl", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
    # From here on, since they take seconds to import.
    import jax

    import hyperadapt_jax as ha
    from hyperadapt_jax import models

    try:
        from . import options
        from .comparison.sweep import sweep
        from .errors import InputError, first_line
        from .parallel import processes
        from .trainer.loop import Interrupted

        recipe = importlib.import_module(f".recipes.{name}", __package__)
    except ModuleNotFoundError as error:
        return _refused(
            f"{error.name} is not installed: pip install 'hyperadapt-jax[train]' has all that the"
            " recipes need"
        )
    refusals = (InputError, ha.PlanError, ha.AdapterError, models.CheckpointError)
    # A comparison is resumed by the same command.
    trains = "run" in recipe.Options.__dataclass_fields__
    words = [word for word in rest if word not in ("--resume", "--no-resume")]
    resume = shlex.join([*PROGRAM.split(), name, *words, *(["--resume"] if trains else [])])
    member: processes.Member | None = None

    def ended(status: int) -> int:
        if member is not None:
            member.leave(status)
        return status

    try:
        parsed = options.parse_sweep(name, recipe.Options, rest)
        if devices := getattr(parsed[0], "devices", None):
            again = f", all of them, with: {resume}" if trains else ""
            farewell = f"another process died or is out of reach; {PROGRAM} ended here. Start again"
            member = devices.join(saves=trains, farewell=f"error: {farewell}{again}")
        if not processes.first():
            sys.stdout = open(os.devnull, "w")
        if len(parsed) == 1:
            recipe.run(parsed[0])
        else:
            sweep(name, recipe.run, parsed, shlex.join([*PROGRAM.split(), name, *rest]))
    except Interrupted as stopped:
        if processes.first():
            name = signal.Signals(stopped.number).name
            print(f"{name}: {stopped}; resume with: {resume}", file=sys.stderr)
        return ended(128 + stopped.number)
    except refusals as error:
        return ended(_refused(str(error)))
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            if member is None:
                raise
            print(f"error: {first_line(error)}", file=sys.stderr)
            member.fall()
        return ended(
            _refused(
                "there is too little memory: raise --accumulate, lower --batch-size or"
                " --max-length, or take --remat full or --dtype bfloat16"
            )
        )
    except OSError as error:
        if error.filename is None:
            raise
        return ended(_refused(f"{error.filename}: {error.strerror or error}"))
    return ended(0)


def _refused(reason: str) -> int:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, RECIPES))
    lines = [f"  {name:<{width}}  {what}" for name, what in RECIPES.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} RECIPE [OPTIONS]",
            "",
            "Fine-tune a frozen model with scale vectors: n + m numbers for an n x m weight.",
            "",
            "recipes:",
            *lines,
            "",
            f"{PROGRAM} RECIPE --help lists a recipe's options. Exit status: 0 done, 2 something",
            "given cannot be used, 130 or 143 stopped by Ctrl-C or SIGTERM, with everything saved.",
        ]
    )


def _unraisable(found: Any) -> None:
    """What becomes of an exception that Python drops.

    One by which a signal ends the program, dropped in a callback of the garbage collector, is asked
    for again. One that comes of a failed checkpoint, after the error that is shown, is left out:
    when one of its arrays cannot be written, the writes of the others still report to the event
    loop that Orbax has closed by then.
    """
    value, number = found.exc_value, None
    if isinstance(value, KeyboardInterrupt):
        number = signal.SIGINT
    elif isinstance(value, SystemExit) and value.code == 128 + signal.SIGTERM:
        number = signal.SIGTERM
    if number is not None:
        # Later, when the callback is done: raised in here, it would be dropped once more.
        again = threading.Timer(0.1, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    elif str(value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def run() -> int:
    """The program, as the system starts it; see `main`."""
    sys.unraisablehook = _unraisable
    return main()


if __name__ == "__main__":
    sys.exit(run())
