"""A sweep: one recipe at several learning rates, each a run in a folder below the one given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hyperadapt_jax.tables import table

from ..errors import Diverged, InputError
from ..files import write, write_json
from ..run.plots import draw
from .figures import by_rate
from .runs import Outcome, Planned, Runs, check, check_rate, make_folder, shared_programs
from .summary import at_edge, choose

TABLE, NUMBERS, FIGURE = "sweep.md", "sweep.json", "lr.png"


def sweep(
    recipe: str, run: Callable[[Any], Any], options: Sequence[Any], command: str
) -> list[Outcome]:
    """Trains once with each of several options, and says which learning rate is best.

    Args:
      recipe: its name.
      run: trains with a recipe's options, in their folder.
      options: the recipe's, which differ in the learning rate.
      command: that started the sweep.

    Raises:
      InputError: the recipe adapts no model, or an option or a folder cannot be used.
      Diverged: all runs did.
      Interrupted: SIGINT or SIGTERM came, and everything is saved.
    """
    first = options[0]
    if not hasattr(first, "adapter") or recipe == "pretrain":
        raise InputError(f"--lr: {recipe} takes one learning rate")
    folder, task = first.run.folder, first.task.resolve()
    runs = [
        Planned(
            first.adapter.method,
            dataclasses.replace(
                each,
                task=task,
                run=dataclasses.replace(each.run, folder=folder / f"lr-{each.optimizer.lr}"),
            ),
        )
        for each in options
    ]
    check_rate(runs[0])
    make_folder(folder)
    check(recipe, runs, "give it as it was, or start another sweep in another folder")
    made, outcomes = Runs(recipe, run), []
    with shared_programs(folder):
        for number, planned in enumerate(runs, 1):
            if not first.run.quiet:
                print(f"\nrun {number} of {len(runs)}: lr {planned.lr:g}")
            outcomes.append(made(planned))
    best = choose(outcomes)
    if best is None:
        raise Diverged(f"the runs of all learning rates diverged: {outcomes[0].error}")
    _write(folder, recipe, task.primary, outcomes, best, command)
    if not first.run.quiet:
        where = ", at the edge of the sweep" if at_edge(outcomes, best) else ""
        print(f"\n{_table(outcomes, best)}\n")
        print(f"the best learning rate is {best:g}{where}: {folder / f'lr-{best}'}")
        print(f"{TABLE}, {NUMBERS} and {FIGURE} are in {folder}")
    return outcomes


def _write(
    folder: Path, recipe: str, metric: str, outcomes: Sequence[Outcome], best: float, command: str
) -> None:
    pairs = [(run.planned.lr, run.chosen_by(metric)) for run in outcomes]
    method = outcomes[0].planned.method
    draw(folder / FIGURE, by_rate({method: pairs}, metric, {method: best}))
    text = [
        f"# {recipe}: {method}, by learning rate",
        _table(outcomes, best, markdown=True),
        "Each at its best step; the best rate is that of the best score there.",
        f"![scores by learning rate]({FIGURE})",
        f"```\n{command}\n```",
    ]
    write(folder / TABLE, "\n\n".join(text) + "\n")
    runs = [
        {"lr": run.planned.lr, "folder": run.planned.folder.name, **run.found} for run in outcomes
    ]
    write_json(folder / NUMBERS, {"command": command, "best_lr": best, "runs": runs})


def _table(outcomes: Sequence[Outcome], best: float, *, markdown: bool = False) -> str:
    names = dict.fromkeys(name for run in outcomes for name in run.found.get("best", {}))
    rows = []
    for run in outcomes:
        metrics = [f"{run.chosen_by(name):.4f}" for name in names]
        if run.error:
            rows.append([f"{run.planned.lr:g}", *["-"] * len(names), "diverged"])
        else:
            mark = " (best)" if run.planned.lr == best else ""
            rows.append([f"{run.planned.lr:g}{mark}", *metrics, str(run.found["best_step"])])
    header = ["lr", *names, "best_step"]
    return table(header, rows, right=" ".join(header[1:]), markdown=markdown)
