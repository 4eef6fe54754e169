"""Compare methods on one task: each at its best learning rate, over several seeds."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from ..comparison import figures, protocol
from ..comparison.protocol import Comparison
from ..comparison.runs import Outcome, Planned, Runs, check, make_folder, shared_programs
from ..comparison.summary import MethodSummary, as_table, before, choose, notes
from ..files import write, write_json
from ..options import POSITIONAL, DeviceOptions, Place, command_line
from ..parallel import processes
from ..run.plots import draw
from ..run.report import environment

RECIPES = ("demo", "glue", "classify", "sft")
TABLE, NUMBERS, COST, RATES = "compare.md", "compare.json", "parameters.png", "lr.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compare methods on one task, each at its best learning rate, over several seeds.

    Half of what is held out, the same rows for every run, chooses: the best step of each run, and,
    by the runs of the first seed, the learning rate of each method. Then each method runs at that
    rate with every seed, and the other half of the rows reports: mean and sample standard
    deviation. A rate at the edge of those tried is marked, since a better one may lie beyond.

    FILE is YAML of five keys. recipe: demo, glue, classify or sft. options: the recipe's, for all
    runs. methods: names for the table, each with options of that method alone, which are those of
    the groups adapter and optimizer; its method is the name if not given, and lr can be a list of
    its own. lr: the learning rates that are tried. seeds: of the runs.

    Each run is a run folder as others are: FOLDER/NAME/lr-RATE-seed-SEED. After a crash, Ctrl-C or
    kill -9 the same command goes on; methods, rates and seeds that are added to FILE later are
    added to the comparison. A run that diverges is a line below the table, and the others go on.

    Examples:
      # methods.yaml, of 3 + 2 + 3 runs to choose the rates, and two more of each method:
      #   recipe: demo
      #   options: {steps: 200, eval_every: 100, problems: 256}
      #   methods:
      #     hyperadapt: {}
      #     head: {lr: [1e-3, 1e-2]}
      #     only-q-and-v: {method: hyperadapt, targets: qv}
      #   lr: [3e-3, 1e-2, 3e-2]
      #   seeds: [0, 1, 2]
      python -m train compare methods.yaml --folder runs/methods
      # On the demo's task, from the repository: 45 runs.
      python -m train compare comparisons/demo.yaml --folder runs/compare-demo
      # For a script, which reads runs/mrpc/compare.json.
      python -m train compare comparisons/mrpc.yaml --folder runs/mrpc --quiet
    """

    file: Annotated[Path, POSITIONAL]
    """YAML file that says what is compared."""
    folder: Path
    """Where the runs lie, and then compare.md, compare.json, parameters.png and lr.png."""
    model: Place | None = None
    """The base model, in place of the one in FILE."""
    data: Place | None = None
    """The recipe's --data, in place of that in FILE."""
    devices: DeviceOptions = DeviceOptions()
    quiet: bool = False
    """Print warnings and errors alone."""


def run(options: Options) -> None:
    """Makes all runs, and prints and writes what they show.

    Raises:
      InputError: the file or the folder cannot be used, or there are several processes.
      Interrupted: SIGINT or SIGTERM came, and everything is saved.
    """
    processes.alone("compare")
    recipes = {name: functools.partial(_options_of, name) for name in RECIPES}
    where = {"mesh": options.devices.mesh, "rules": list(options.devices.rules) or None}
    instead = {"model": options.model, "data": options.data, **where}
    given = {name: value for name, value in instead.items() if value is not None}
    compared = protocol.read(options.file, options.folder, recipes, given)
    make_folder(options.folder)
    advice = f"change {options.file} back, choose another --folder, or remove that run's folder"
    check(compared.recipe, list(compared.runs), advice)
    with shared_programs(options.folder):
        methods = _make(compared, options.quiet)
    _write(compared, methods, options)


def _options_of(recipe: str) -> type:
    return _module(recipe).Options


def _module(recipe: str) -> Any:
    return importlib.import_module(f".{recipe}", __package__)


def _make(compared: Comparison, quiet: bool) -> list[MethodSummary]:
    """All runs: each method at each of its rates, then at the best one with the other seeds."""
    train = Runs(compared.recipe, _module(compared.recipe).run)
    first, *others = compared.seeds
    total = sum(map(len, compared.rates.values())) + len(others) * len(compared.methods)
    with tqdm(total=total, desc="runs", disable=quiet or None, dynamic_ncols=True) as bar:

        def make(planned: Planned) -> Outcome:
            bar.set_postfix_str(str(planned))
            outcome = train(planned)
            primary = planned.options.task.primary
            shown = outcome.error or f"{primary} {outcome.chosen_by(primary):.4g}"
            if not quiet:
                tqdm.write(f"{planned}: {shown}")
            bar.update()
            return outcome

        sweeps = {
            name: [make(compared.run(name, lr, first)) for lr in rates]
            for name, rates in compared.rates.items()
        }
        methods = []
        for name, sweep in sweeps.items():
            lr, runs = choose(sweep), []
            if lr is None:
                bar.total -= len(others)
            else:
                runs = [run for run in sweep if run.planned.lr == lr]
                runs += [make(compared.run(name, lr, seed)) for seed in others]
            known = sweep[0].planned.options.task.known
            methods.append(MethodSummary(name, sweep, runs, known))
    return methods


def _write(compared: Comparison, methods: Sequence[MethodSummary], options: Options) -> None:
    folder, task = options.folder, methods[0].sweep[0].planned.options.task
    primary = task.primary
    chosen = {method.name: method.lr for method in methods}
    sweeps = {
        method.name: [(run.planned.lr, run.chosen_by(primary)) for run in method.sweep]
        for method in methods
    }
    draw(folder / RATES, figures.by_rate(sweeps, f"{primary} (half that chooses)", chosen))
    points = {
        method.name: (method.parameters, method.metrics[primary])
        for method in methods
        if method.parameters is not None and primary in method.metrics
    }
    base = before(methods)
    figure = figures.by_parameters(points, f"{primary} (half that reports)", base.get(primary))
    draw(folder / COST, figure)

    first, seeds = compared.seeds[0], ", ".join(map(str, compared.seeds))
    chooses = (
        "One half of what is held out, the same for all runs, chooses the best step of each run"
        f" and, by the runs of seed {first}, the learning rate of each method."
    )
    reports = (
        "The other half reports, at that step and rate: mean ± sample standard deviation over"
        f" seeds {seeds}."
    )
    command = command_line("compare", options)
    below = notes(methods)
    lines = "\n".join(f"* {note}" for note in below)
    about = "\n".join(f"* {name}: {value}" for name, value in environment().items())
    parts = [
        f"# {task.name}: {', '.join(compared.methods)}",
        f"{chooses} {reports}",
        as_table(methods, primary, markdown=True),
        *([lines] if below else []),
        f"![scores by trainable parameters]({COST})",
        f"![scores by learning rate]({RATES})",
        f"```\n{command}\n```",
        about,
    ]
    write(folder / TABLE, "\n\n".join(parts) + "\n")
    unique = dict.fromkeys(run for method in methods for run in (*method.sweep, *method.runs))
    write_json(
        folder / NUMBERS,
        {
            "recipe": compared.recipe,
            "protocol": [chooses, reports],
            "command": command,
            "options": compared.common,
            "primary": primary,
            "seeds": compared.seeds,
            "before": {name: vars(spread) for name, spread in base.items()},
            "methods": {
                method.name: {
                    "options": compared.methods[method.name],
                    "rates": compared.rates[method.name],
                    **method.numbers,
                }
                for method in methods
            },
            "runs": [
                {
                    "method": run.planned.method,
                    "lr": run.planned.lr,
                    "seed": run.planned.seed,
                    "folder": str(run.planned.folder.relative_to(folder)),
                    **run.found,
                }
                for run in unique
            ],
            "environment": environment(),
        },
    )
    if not options.quiet:
        print(f"\n{as_table(methods, primary, markdown=False)}\n")
        print("\n".join([*below, f"{TABLE}, {NUMBERS}, {COST} and {RATES} are in {folder}"]))
