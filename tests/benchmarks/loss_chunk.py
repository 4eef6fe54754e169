r"""What a training step costs by chunks of logits, next to whole logits, in one run.

    python -m tests.benchmarks.loss_chunk
    python -m tests.benchmarks.loss_chunk --vocabulary 128256 --layers 1 --batch 64 --length 256 \
        --chunks 512 --repeats 0

The steps, HyperAdapt's on all linears if not told otherwise, take turns (A B C A B C ...), and each
is compared with that of whole logits in its own round. With the default shapes the head is a fifth
of the weights, as Llama-3.2-1B's is. The memory of temporaries is that of XLA's analysis; for it
alone, with no repeats, no step runs.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import optax

from hyperadapt_jax import models
from hyperadapt_jax.methods import METHODS
from tests.benchmarks import step_cost
from train import base, methods
from train.options import AdapterOptions
from train.trainer import losses
from train.trainer.step import make_step, start

HEADER = ["logits at once", "step ms", "time / whole", "quartiles", "temp MB"]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.loss_chunk",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="hyperadapt")
    add("--chunks", nargs="+", type=int, default=[512, 256], help="tokens of a chunk")
    add("--vocabulary", type=int, default=16_384)
    add("--width", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--batch", type=int, default=4)
    add("--length", type=int, default=512)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--remat", choices=("none", "dots", "full"), default="dots")
    add("--repeats", type=int, default=7, help="timed steps of each; 0 to compile alone")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of data for whole logits, and one for each size of chunks."""
    config = models.config_from_dict(
        dict(
            model_type="llama",
            vocab_size=args.vocabulary,
            hidden_size=args.width,
            intermediate_size=4 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.width // 64),
            max_position_embeddings=args.length,
            tie_word_embeddings=False,
        )
    )
    fn, params = models.functional(models.create(config, dtype=args.dtype, remat=args.remat))
    of = base.Base("random", config, fn, params, (), None)
    tuned = methods.tune(of, AdapterOptions(method=args.method))
    tokens = np.random.default_rng(0).integers(0, args.vocabulary, (args.batch, args.length + 1))
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "mask": np.ones((args.batch, args.length), bool),
    }
    optimizer, rows = optax.adam(1e-3), []
    for chunk in (0, *args.chunks):
        state = start(tuned, optimizer, 0)
        step = make_step(losses.next_token(tuned, chunk), optimizer, {})
        program = step.lower(state, tuned.frozen, batch).compile()
        rows.append(
            {
                "chunk": chunk,
                "program": program,
                "state": state,
                "temp bytes": program.memory_analysis().temp_size_in_bytes,
                "seconds": [],
            }
        )
    for repeat in range(args.repeats and args.repeats + 1):
        for row in rows:
            begin = time.perf_counter()
            row["state"], found = row["program"](row["state"], tuned.frozen, batch)
            jax.block_until_ready((row["state"], found))
            if repeat:
                row["seconds"].append(time.perf_counter() - begin)
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """A markdown table; times are medians, and ratios medians over the rounds with quartiles."""
    whole, body = rows[0]["seconds"], []
    for row in rows:
        cells = [f"of {row['chunk']} tokens" if row["chunk"] else "of all tokens"]
        if whole:
            low, middle, high = np.percentile(np.divide(row["seconds"], whole), [25, 50, 75])
            cells += [f"{1e3 * statistics.median(row['seconds']):.0f}", f"{middle:.3f}"]
            cells.append(f"{low:.3f}-{high:.3f}")
        else:
            cells += [""] * 3
        body.append([*cells, f"{row['temp bytes'] / 1e6:,.0f}"])
    rule = ["---", *["---:"] * (len(HEADER) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [HEADER, rule, *body])


def main(argv: list[str]) -> None:
    args = parse(argv)
    command = shlex.join(["python", "-m", "tests.benchmarks.loss_chunk", *argv])
    print(f"{step_cost.chip()}, jax {jax.__version__}\n`{command}`\n", flush=True)
    print(report(measure(args)))


if __name__ == "__main__":
    main(sys.argv[1:])
