"""What a training step costs: time, memory and FLOPs, HyperAdapt next to its rivals, in one run.

    python -m tests.benchmarks.step_cost
    python -m tests.benchmarks.step_cost --size llama-8b --layers 4 --attention cudnn --peak

The methods' steps take turns (A B C A B C ...), so that a machine's drift hits all alike, and each
is compared with the frozen floor of its own round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from tests.benchmarks import decoder, methods


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.step_cost",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", choices=decoder.SIZES, default="small", help="shapes of the decoder")
    add("--remat", nargs="+", choices=("none", "dots", "full"), default=["none", "dots", "full"])
    for name in ("layers", "batch", "length"):
        add(f"--{name}", type=int, help=f"instead of the size's own {name}")
    add("--dtype", choices=("float32", "bfloat16"), help="instead of the size's own dtype")
    add("--attention", choices=("xla", "cudnn"), help="implementation (chosen by JAX if not given)")
    add("--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS))
    add("--optimizer", choices=("adam", "sgd"), default="adam", help="the same for every method")
    add("--repeats", type=int, default=15, help="timed steps of each method")
    add("--warmup", type=int, default=2, help="steps of each method before them")
    add("--peak", action="store_true", help="peak device memory, each method in its own process")
    add("--json", type=Path, help="file to write the data to")
    args = parser.parse_args(argv)
    if min(args.repeats, args.warmup) < 1:
        parser.error("--repeats and --warmup must be at least 1")
    if methods.FLOOR not in args.methods:
        args.methods.insert(0, methods.FLOOR)
    return args


def decoder_of(args: argparse.Namespace, remat: str) -> decoder.Decoder:
    given = {
        name: getattr(args, name)
        for name in ("layers", "batch", "length", "dtype", "attention")
        if getattr(args, name) is not None
    }
    return dataclasses.replace(decoder.SIZES[args.size], remat=remat, **given)


class Running:
    """One method's compiled step and the state that it keeps updating."""

    def __init__(self, name: str, config: decoder.Decoder, params: Any, x: Any, optimizer: Any):
        lowered, start = methods.lower(name, config, params, x, optimizer)
        self.params, self.x = params, x
        self.compiled = lowered.compile()
        self.trained = jax.jit(start)(params) if name != methods.FLOOR else start(params)
        self.state = optimizer.init(self.trained)
        self.numbers = sum(leaf.size for leaf in jax.tree.leaves(self.trained))

    def step(self) -> None:
        """Runs one step to its end."""
        self.trained, self.state, result = self.compiled(
            self.trained, self.state, self.params, self.x, self.x
        )
        jax.block_until_ready((self.trained, self.state, result))


def inputs(config: decoder.Decoder) -> tuple[Any, jax.Array]:
    params = jax.jit(lambda key: decoder.init(key, config))(jax.random.key(0))
    return params, decoder.inputs(jax.random.key(1), config)


def measure(args: argparse.Namespace, remat: str) -> list[dict[str, Any]]:
    """One row of data per method, under one remat policy."""
    config = decoder_of(args, remat)
    optimizer = getattr(optax, args.optimizer)(1e-3)
    params, x = inputs(config)
    running, rows = {}, []
    for name in args.methods:
        try:
            running[name] = made = Running(name, config, params, x, optimizer)
        except methods.Unavailable as reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
            continue
        memory, cost = made.compiled.memory_analysis(), made.compiled.cost_analysis()
        rows.append(
            {
                "method": name,
                "remat": remat,
                "numbers": made.numbers,
                "flops": cost["flops"],
                "bytes accessed": cost.get("bytes accessed"),
                "temp bytes": memory.temp_size_in_bytes,
                "wall s": [],
                "cpu s": [],
            }
        )
    for _ in range(args.warmup):
        for made in running.values():
            made.step()
    for _ in range(args.repeats):
        for row in rows:
            wall, cpu = time.perf_counter(), time.process_time()
            running[row["method"]].step()
            row["wall s"].append(time.perf_counter() - wall)
            row["cpu s"].append(time.process_time() - cpu)
    return rows


def peak_of(name: str, args: argparse.Namespace, remat: str, argv: list[str]) -> int | None:
    """Peak bytes in use on the device, of a process of its own that runs one method's steps."""
    command = [sys.executable, "-m", "tests.benchmarks.step_cost", *argv]
    command += ["--remat", remat, "--child", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"no peak of {name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def child(name: str, args: argparse.Namespace) -> None:
    config = decoder_of(args, args.remat[0])
    params, x = inputs(config)
    made = Running(name, config, params, x, getattr(optax, args.optimizer)(1e-3))
    for _ in range(2):
        made.step()
    stats = jax.local_devices()[0].memory_stats() or {}
    print(json.dumps(stats.get("peak_bytes_in_use")))


def report(rows: list[dict[str, Any]]) -> str:
    """A markdown table; times are medians, and ratios medians over the rounds with quartiles."""
    floor = rows[0]
    on_cpu = jax.default_backend() == "cpu"
    header = ["method", "trainable", "FLOPs / floor", "step ms", "time / floor", "quartiles"]
    header += (["CPU time / floor"] if on_cpu else []) + ["temp MB"]
    peaks = any(row.get("peak bytes") for row in rows)
    header += ["peak MB"] if peaks else []
    body = []
    for row in rows:
        ratios = np.divide(row["wall s"], floor["wall s"])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        cells = [
            row["method"],
            f"{row['numbers']:,}",
            f"{row['flops'] / floor['flops']:.3f}",
            f"{1e3 * statistics.median(row['wall s']):.1f}",
            f"{middle:.3f}",
            f"{low:.3f}-{high:.3f}",
        ]
        if on_cpu:
            cells.append(f"{np.median(np.divide(row['cpu s'], floor['cpu s'])):.3f}")
        cells.append(f"{row['temp bytes'] / 1e6:.0f}")
        if peaks:
            cells.append(f"{row['peak bytes'] / 1e6:.0f}" if row.get("peak bytes") else "")
        body.append(cells)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *body])


def chip() -> str:
    """The accelerator's name, or the processor's."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind} x {jax.device_count()}"
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or "cpu"


def main(argv: list[str]) -> None:
    argv = list(argv)
    name = argv.pop(argv.index("--child") + 1) if "--child" in argv else None
    if name:
        argv.remove("--child")
    args = parse(argv)
    if name:
        return child(name, args)

    # Before this process takes the device's memory for itself.
    peaks = {}
    if args.peak:
        peaks = {
            (name, remat): peak_of(name, args, remat, argv)
            for remat in args.remat
            for name in args.methods
        }
    command = shlex.join(["python", "-m", "tests.benchmarks.step_cost", *argv])
    data = {"command": command, "chip": chip(), "jax": jax.__version__, "rows": []}
    print(f"{data['chip']}, jax {data['jax']}\n`{command}`")
    for remat in args.remat:
        rows = measure(args, remat)
        for row in rows:
            row["peak bytes"] = peaks.get((row["method"], remat))
        data["rows"] += rows
        config = decoder_of(args, remat)
        print(
            f"\n{config.layers} layers, width {config.width}, {config.batch} x {config.length}"
            f" tokens, {config.dtype}, remat: {remat}\n\n{report(rows)}"
        )
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
