"""Greedy decoding speed next to torch transformers, on one CPU with the same weights.

Both continue the same prompts for the same number of tokens with a key-value cache; the first run,
which compiles, is reported apart. Needs torch and transformers:
``python tests/benchmarks/decode_speed.py [--model FOLDER]``. Without a folder, a random model of
the given width and depth is made.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

from hyperadapt_jax import models


def random_folder(folder: str, width: int, layers: int) -> str:
    """A random Llama as a Hugging Face folder."""
    config = models.config_from_dict(
        {
            "model_type": "llama",
            "vocab_size": 8192,
            "hidden_size": width,
            "intermediate_size": 11 * width // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": max(1, width // 256),
            "max_position_embeddings": 2048,
        }
    )
    return str(models.export(folder, models.create(config), overwrite=True, progress=False))


def seconds(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Time of the first call, and the median of the later ones."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a Hugging Face folder of a decoder")
    parser.add_argument("--width", type=int, default=512, help="of the random model")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or random_folder(scratch, args.width, args.layers)
        fn, params = models.functional(models.load(folder, progress=False))
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    print(f"jax {jax.__version__}, torch {torch.__version__}, {args.threads} threads of torch")
    print(
        f"{sum(a.size for a in jax.tree.leaves(params)):,} float32 parameters, prompts of "
        f"{args.prompt} tokens, {args.new} new ones, median of {args.repeats} runs"
    )
    print("| batch | jax, tokens/s | torch, tokens/s | ratio | first call of jax, s | same text |")
    print("|---|---|---|---|---|---|")
    for batch in args.batch:
        rng = np.random.default_rng(0)
        vocabulary = reference.config.vocab_size
        prompts = rng.integers(3, vocabulary, (batch, args.prompt)).tolist()

        def mine(prompts: list[list[int]] = prompts) -> list[list[int]]:
            return models.generate(fn, params, prompts=prompts, max_new_tokens=args.new)

        def theirs(prompts: list[list[int]] = prompts) -> list[list[int]]:
            tokens = torch.tensor(prompts)
            result = reference.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                use_cache=True,
                max_new_tokens=args.new,
                eos_token_id=None,
                pad_token_id=0,
            )
            return result[:, args.prompt :].tolist()

        first, fast = seconds(mine, args.repeats)
        _, slow = seconds(theirs, args.repeats)
        same = mine() == theirs()
        total = batch * args.new
        print(
            f"| {batch} | {total / fast:,.0f} | {total / slow:,.0f} | {slow / fast:.1f} | "
            f"{first:.1f} | {same} |"
        )


if __name__ == "__main__":
    main()
