"""Adapt the embedded model to two-step problems; show what it learned and what it forgot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from hyperadapt_jax import rank
from hyperadapt_jax.tables import table

from ..assembly import assemble, write_result
from ..errors import InputError
from ..metrics.generation import GenerationEval, Generations
from ..options import (
    AdapterOptions,
    DeviceOptions,
    ModelOptions,
    OptimizerOptions,
    Place,
    RunOptions,
    command_line,
    flat,
)
from ..parallel import processes
from ..run import report
from ..run.folder import open_run
from ..run.plots import draw
from ..tasks.arithmetic.task import MOST, TwoSteps

TINY = Path(__file__).resolve().parents[1] / "tasks" / "arithmetic" / "tiny"
RANK = "rank.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Adapt an embedded model to a new task, and show that it learned: two minutes on a CPU.

    The model, a Llama of 0.9 million parameters that comes with this recipe, knows equations and
    word problems of one step. It learns to answer problems of two steps, in another wording, by
    two equations. Every accuracy is of problems whose number families no training used.

    Examples:
      python -m train demo
      # The output-side vectors alone.
      python -m train demo --method row --folder runs/demo-row
      # Every parameter, for comparison.
      python -m train demo --method full --lr 1e-3 --folder runs/demo-full
    """

    model: ModelOptions = ModelOptions(model=Place(str(TINY)), remat="none")
    adapter: AdapterOptions = AdapterOptions()
    optimizer: OptimizerOptions = OptimizerOptions(lr=1.5e-2, b2=0.98)
    run: RunOptions = RunOptions(folder=Path("runs/demo"), steps=750, eval_every=150)
    devices: DeviceOptions = DeviceOptions()
    task: TwoSteps = TwoSteps()
    show: int = 4
    """Answers to show."""

    def __post_init__(self) -> None:
        if not 1 <= self.show <= MOST:
            raise InputError(f"--show {self.show}: give a number from 1 to {MOST}")


def run(options: Options) -> None:
    """Trains, and prints and writes what came of it.

    Raises:
      InputError: the folder cannot be used, an option cannot be meant, or the model does not know
        the words of the problems.
    """
    config = flat(options, "demo")
    with open_run(options.run.folder, config, resume=options.run.resume) as folder:
        made = assemble(options.task, options.model, options.adapter, options.run, options.devices)
        loaded, tuning = made.load()
        total = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
        final = options.task.final(made.setting)
        before = final.generations(tuning.forward, tuning.trainable, tuning.frozen)
        result = made.fit(loaded, tuning, folder, options.optimizer, config)
        after = final.generations(tuning.forward, result.trainable, tuning.frozen)
        if scales := tuning.adapter(result.trainable)[0]:
            whole = processes.fetch((loaded.params, scales))
            draw(folder / RANK, rank.figure(rank.analyze(*whole)))

        header, rows = _rows(options.task, final, before, after)
        answers = _answers(final, before, after, options.show)
        learned = f"{tuning.count:,} of {total:,} trainable parameters ({tuning.count / total:.1%})"
        report.write_text(folder, REPORT.format(
            method=options.adapter.method, learned=learned, step=result.step, answers=answers,
            table=table(header, rows, "before after", markdown=True),
            rank=f"\n![singular values]({RANK})\n" if scales else "", plan=made.plan,
            took=report.took(made.facts(result), command_line("demo", options)),
        ))  # fmt: skip
        write_result(folder, result)
    log = made.setting.log
    log(f"\n{table(header, rows, right='before after')}\n{learned}\n\n{answers}\n")
    log(f"adapter, metrics, curves and report are in {folder}")


REPORT = """# Demo: {method}

{learned}; the adapter is that of step {step}.
No number family of these problems was used in any training, the base model's or the adapter's.

{table}

![curves](curves.png)
{rank}
{took}

## Answers

```
{answers}
```

## What trained

```
{plan}
```

All options are in `config.yaml`: `--config` reads them back.
"""


def _rows(
    task: TwoSteps, final: GenerationEval, before: Generations, after: Generations
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of accuracies."""
    counted = task.reporting(final.groups or before).tolist()
    shares = [final.accuracy(answers, counted) for answers in (before, after)]
    return ["correct answers", "before", "after"], [
        [what, *(f"{found[kind]:.1%}" for found in shares)] for kind, what in task.kinds.items()
    ]


def _answers(final: GenerationEval, before: Generations, after: Generations, count: int) -> str:
    """The first answers to the new task, before and after; None where they were not finite."""
    rows = zip(final.groups or (), before, final.records(after), strict=True)
    rides = [(old, row) for kind, old, row in rows if kind == "ride"][:count]
    return "\n\n".join(
        f"{row['prompt']}\n  before: {old}\n  after:  {row['answer']}  "
        + ("(correct)" if row["correct"] else f"(wrong: {row['reference']})")
        for old, row in rides
    )
