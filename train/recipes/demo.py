"""Adapt the embedded model to two-step problems; show what it learned and what it forgot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from tokenizers import Tokenizer

from hyperadapt_jax import rank
from hyperadapt_jax.tables import table

from .. import PROGRAM, arithmetic, base, losses, methods, options, runs
from ..batches import Batches
from ..errors import InputError
from ..exam import Exam
from ..loop import Task, fit
from ..options import AdapterOptions, ModelOptions, OptimizerOptions, Place, RunOptions
from ..report import draw, markdown_table

TINY = Path(__file__).resolve().parents[1] / "tiny"
RANK = "rank.png"
Answers = list[str | None]
WATCHED = 128  # problems of each kind while it trains, other ones than are measured in the end
MOST = 10_000_000  # problems or texts, which are made on the spot
KINDS = {
    "ride": "two-step problems, the new task",
    "equation": "bare equations, known before",
    "story": "one-step problems, known before",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Adapt an embedded model to a new task, and show that it learned: two minutes on a CPU.

    The model, a Llama of 0.9 million parameters that lies beside this recipe, knows equations and
    word problems of one step. It learns to answer problems of two steps, told in another way, by
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
    texts: int = 24_000
    """Problems to learn from. A run that needs more sees them again."""
    problems: int = 512
    """Problems of each kind to measure on, before and after."""
    show: int = 4
    """Answers to show."""

    def __post_init__(self):
        for name in ("texts", "problems", "show"):
            if not 1 <= getattr(self, name) <= MOST:
                raise InputError(f"--{name} {getattr(self, name)}: give a number from 1 to {MOST}")


def run(chosen: Options) -> None:
    """Trains, and prints and writes what came of it.

    Raises:
      InputError: the folder cannot be used, an option cannot be meant, or the model does not know
        the words of the problems.
    """
    config = options.flat(chosen, "demo")
    tell = (lambda text: None) if chosen.run.quiet else print
    described, tokenizer = base.describe(chosen.model), _tokenizer(chosen.model)
    plan = methods.table(described, methods.tune(described, chosen.adapter))
    tell(plan)
    with runs.claim(chosen.run.folder, config, resume=chosen.run.resume) as folder:
        loaded = base.load(chosen.model, quiet=chosen.run.quiet)
        tuning = methods.tune(loaded, chosen.adapter)
        final = Exam.of(list(KINDS), chosen.problems, seed=1, tokenizer=tokenizer)
        watched = Exam.of(list(KINDS), WATCHED, seed=2, tokenizer=tokenizer)
        before = final.answers(tuning.forward, tuning.trainable, tuning.frozen)
        result = fit(
            Task(
                name="demo",
                base=loaded,
                tuning=tuning,
                loss=losses.next_token(tuning),
                batches=_batches(chosen, tokenizer),
                evaluate=lambda trainable: watched.measure(
                    tuning.forward, trainable, tuning.frozen
                ),
                score=lambda metrics: metrics["ride"],
            ),
            folder,
            optimizer=chosen.optimizer,
            run=chosen.run,
            metadata=config,
        )
        after = final.answers(tuning.forward, result.trainable, tuning.frozen)
        if scales := result.trainable["scales"]:
            draw(folder / RANK, rank.figure(rank.analyse(loaded.params, scales)))

        header, rows = _rows(final, before, after)
        answers = _answers(final, before, after, chosen.show)
        total = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
        learned = f"{tuning.count:,} of {total:,} numbers trained ({tuning.count / total:.1%})"
        runs.write_report(folder, REPORT.format(
            method=chosen.adapter.method, learned=learned, step=result.step, answers=answers,
            table=markdown_table(header, rows, "before after"),
            rank=f"\n![singular values]({RANK})\n" if scales else "", plan=plan,
            took=runs.took(result.facts, options.command("demo", chosen)),
        ))  # fmt: skip
    tell(f"\n{table(header, rows, right='before after')}\n{learned}\n\n{answers}\n")
    tell(f"adapter, metrics, curves and report are in {folder}")


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


def _tokenizer(model: ModelOptions) -> Tokenizer:
    """The model's tokenizer, which must be the one of the synthetic problems."""
    found = base.tokenizer(model)
    words = {word: number for number, word in enumerate(arithmetic.vocabulary())}
    if found.get_vocab() != words:
        raise InputError(
            f"--model {model.model} does not know the words of this demo: give a model that"
            f" `{PROGRAM} pretrain` made, or take the recipe sft"
        )
    return found.backend_tokenizer


def _batches(chosen: Options, tokenizer: Tokenizer) -> Batches:
    run = chosen.run
    problems = arithmetic.problems("ride", chosen.texts, seed=run.seed, held=False)
    return Batches(
        arithmetic.examples(problems, tokenizer, answers_alone=True),
        run.batch_size,
        seed=run.seed,
        epochs=run.passes,
    )


def _rows(exam: Exam, before: Answers, after: Answers) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of accuracies."""
    shares = [exam.accuracy(answers) for answers in (before, after)]
    return ["right answers", "before", "after"], [
        [what, *(f"{found[kind]:.1%}" for found in shares)] for kind, what in KINDS.items()
    ]


def _answers(exam: Exam, before: Answers, after: Answers, count: int) -> str:
    """The first answers to the new task, before and after; None where they were not finite."""
    asked = zip(exam.problems, before, after, strict=True)
    rides = [row for row in asked if row[0].kind == "ride"][:count]
    return "\n\n".join(
        f"{problem.prompt}\n  before: {old}\n  after:  {new}  "
        + ("(right)" if new and arithmetic.correct(problem, new) else f"(wrong: {problem.answer})")
        for problem, old, new in rides
    )
