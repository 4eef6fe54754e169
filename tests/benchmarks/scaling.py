"""What a device does as devices are added to a fixed batch, by the compiled step of a decoder.

    python -m tests.benchmarks.scaling
    python -m tests.benchmarks.scaling --model path/to/model --batch-size 64 fsdp=1 fsdp=8 tensor=8

Nothing runs, and there need be no device: see `train.trainer.ahead`. Gathers of weights are held
against the bytes of all weights, which each device needs forward and, as their layers are computed
again there, backward: twice, and the head once more. Along ``tensor`` activations are reduced
instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from hyperadapt_jax.tables import table
from train import base
from train.options import ModelOptions
from train.parallel.mesh import AXES, parse_mesh
from train.trainer.ahead import StepFacts, StepOptions, compile_step, planning

LLAMA = Path(__file__).resolve().parents[1] / "fixtures/configs/llama-3-8b"
MESHES = (
    *(f"fsdp={2**n}" for n in range(9)),
    *(f"tensor={2**n}" for n in range(1, 4)),
    *("data=8", "fsdp=8,tensor=8", "fsdp=32,tensor=8"),
)
HEADER = [
    "mesh", "devices", "TFLOP", "x-devices", "GB-held", "GB-gathered", "x-weights", "GB-reduced",
]  # fmt: skip


def shape(mesh: str) -> tuple[int, int, int]:
    """The sizes of all axes of a mesh."""
    data, fsdp, tensor = (parse_mesh(mesh).get(name, 1) for name in AXES)
    return data, fsdp, tensor


def row(mesh: str, facts: StepFacts, one: StepFacts, weights: int) -> list[str]:
    """A line of the table."""
    devices, kinds = facts.options.devices, facts.work.collectives
    gathered = kinds["all-gather"].bytes if "all-gather" in kinds else 0
    others = sum(each.bytes for kind, each in kinds.items() if kind != "all-gather")
    return [
        mesh,
        f"{devices}",
        f"{facts.work.flops / 1e12:,.2f}",
        f"{devices * facts.work.flops / one.work.flops:.3f}",
        f"{facts.total / 1e9:,.2f}",
        f"{gathered / 1e9:,.2f}",
        f"{gathered / weights:.2f}",
        f"{others / 1e9:,.3f}",
    ]


def report(asked: StepOptions, meshes: Sequence[str]) -> str:
    """A table of the meshes, in Markdown."""
    shapes = {mesh: shape(mesh) for mesh in meshes}
    leaves = jax.tree.leaves(base.load_abstract(asked.model).params)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    rows = []
    most = max(math.prod(sizes) for sizes in shapes.values())
    with planning(most, asked.model.dtype) as call:

        def facts(sizes: tuple[int, int, int]) -> Any:
            return call(compile_step, dataclasses.replace(asked, shape=sizes))

        one = facts((1, 1, 1))
        for mesh, sizes in shapes.items():
            found = one if math.prod(sizes) == 1 else facts(sizes)
            rows.append(row(mesh, found, one, weights))
    return table(HEADER, rows, " ".join(HEADER[1:]), markdown=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.scaling",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("meshes", nargs="*", default=MESHES)
    parser.add_argument("--model", type=Path, default=LLAMA, help="folder with a config.json")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch-size", type=int, default=256, help="rows of all devices together")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a row")
    args = parser.parse_args(argv)
    asked = StepOptions(
        model=ModelOptions(model=str(args.model), dtype=args.dtype),
        batch_size=args.batch_size,
        max_length=args.max_length,
    )
    print(f"`{shlex.join(['python', '-m', 'tests.benchmarks.scaling', *argv])}`\n", flush=True)
    print(report(asked, args.meshes))


if __name__ == "__main__":
    main(sys.argv[1:])
