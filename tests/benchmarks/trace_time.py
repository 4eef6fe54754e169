"""How long JAX takes to trace and lower an adapted function, next to the base function, in one run.

    python -m tests.benchmarks.trace_time

The functions take turns, JAX's caches are cleared before each, and the time is the processor's,
which other work on the machine does not stretch.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import hyperadapt_jax as ha
from tests.benchmarks import decoder, methods

BASE, ADAPTED = "base", "adapted"


def lower_seconds(fn: Callable, args: Any) -> float:
    """Processor seconds to trace and lower ``jax.jit(fn)`` with empty caches."""
    jax.clear_caches()
    gc.collect()
    gc.disable()  # a collection would be charged to whichever function it falls in
    try:
        begin = time.process_time()
        jax.jit(lambda *args: fn(*args)).lower(*args)
        return time.process_time() - begin
    finally:
        gc.enable()


FORWARD, STEP, ABOVE_FLOOR = "forward", "training step", "training step, base: frozen floor"


def pairs(config: decoder.Decoder) -> dict[str, dict[str, tuple[Callable, Any]]]:
    """``{what: {"base": (fn, args), "adapted": (fn, args)}}``.

    The base's training step is full fine-tuning. The frozen floor, its loss and gradient to the
    input, is measured too: there nothing trains.
    """
    params = jax.eval_shape(lambda key: decoder.init(key, config), jax.random.key(0))
    x = jax.ShapeDtypeStruct((config.batch, config.length, config.width), config.dtype)
    base = lambda params, x: decoder.forward(params, x, config)  # noqa: E731
    target = decoder.TARGET if config.scan else decoder.UNROLLED_TARGET
    scales = jax.eval_shape(lambda: ha.init(ha.plan(params, target)))
    optimizer = optax.sgd(1e-3)

    def step(name):
        fn, start = methods.train_step(name, config, optimizer)
        trained = jax.eval_shape(start, params)
        return fn, (trained, jax.eval_shape(optimizer.init, trained), params, x, x)

    adapted = step("HyperAdapt, adapt")
    forward = ha.adapt(base, materialize="error")
    return {
        FORWARD: {BASE: (base, (params, x)), ADAPTED: (forward, (params, scales, x))},
        STEP: {BASE: step("full fine-tuning"), ADAPTED: adapted},
        ABOVE_FLOOR: {BASE: step(methods.FLOOR), ADAPTED: adapted},
    }


def measure(every: dict[str, dict[str, Any]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each repeat, ``{what: {"base": [...], "adapted": [...]}}``, after a first one."""
    seconds = {what: {which: [] for which in pair} for what, pair in every.items()}
    jax.clear_caches()
    gc.collect()
    gc.freeze()  # what the process holds already is not looked through before each
    try:
        for repeat in range(repeats + 1):
            for what, pair in every.items():
                for which, (fn, args) in pair.items():
                    taken = lower_seconds(fn, args)
                    if repeat:
                        seconds[what][which].append(taken)
    finally:
        gc.unfreeze()
    return seconds


def ratio(seconds: dict[str, list[float]]) -> float:
    """Median of the adapted function's time over median of the base's."""
    return statistics.median(seconds[ADAPTED]) / statistics.median(seconds[BASE])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.trace_time",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--json", type=Path, help="file to write the data to")
    args = parser.parse_args(argv)

    command = shlex.join(["python", "-m", "tests.benchmarks.trace_time", *argv])
    print(f"jax {jax.__version__}\n`{command}`\n")
    print("| decoder | what | base ms | adapted ms | ratio |\n| --- | --- | ---: | ---: | ---: |")
    data = {"command": command, "jax": jax.__version__, "seconds": {}}
    for scan in (True, False):
        config = dataclasses.replace(decoder.SMALL, layers=args.layers, remat=args.remat, scan=scan)
        kind = f"{args.layers} layers, {'scanned' if scan else 'unrolled'}"
        data["seconds"][kind] = measured = measure(pairs(config), args.repeats)
        for what, seconds in measured.items():
            base, adapted = (1e3 * statistics.median(seconds[k]) for k in (BASE, ADAPTED))
            print(f"| {kind} | {what} | {base:.0f} | {adapted:.0f} | {adapted / base:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
