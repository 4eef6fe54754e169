"""Child processes that have the imports behind them, and are killed and signalled in place of the
tests."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tests.train.tiny", "transformers", "train.comparison.sweep", "train.recipes.sft"]
)
