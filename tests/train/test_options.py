"""Options from the command line and from files: one parser, one set of names, errors that help."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml

from train import methods, options
from train.__main__ import RECIPES
from train.errors import InputError
from train.options import AdapterOptions, ModelOptions, OptimizerOptions, RunOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A recipe."""

    flavour: typing.Literal["sweet", "sour"]
    """The flavour."""
    model: ModelOptions
    adapter: AdapterOptions = AdapterOptions()
    optimizer: OptimizerOptions = OptimizerOptions(lr=0.5)
    run: RunOptions


NEEDED = ["--flavour", "sour", "--model", "m", "--folder", "f"]


def parse(*args: str) -> Options:
    return options.parse("recipe", Options, args)


def config(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    return ["--config", str(file)]


def test_flags_are_flat_and_defaults_are_the_recipes():
    found = parse(*NEEDED, "--row-lr", "0.25", "--targets", "qv", ".*/o/kernel=in out")
    assert found.optimizer == OptimizerOptions(lr=0.5, row_lr=0.25)
    assert found.adapter.targets == ("qv", ".*/o/kernel=in out")
    assert found.run == RunOptions(folder=Path("f"))


def test_every_value_survives_its_file(tmp_path):
    """config.yaml of a run, read back by --config, is the run's options."""
    found = parse(
        *NEEDED, "--clip", "None", "--targets", "a b", "c", "--accumulate", "4", "--lr", "1e-05",
        "--full", "head/.*", "--steps", "7", "--seed", "3", "--weight-decay", "0.1",
    )  # fmt: skip
    text = options.dump(options.flat(found, "recipe"))
    assert parse(*config(tmp_path, text)) == dataclasses.replace(
        found, run=dataclasses.replace(found.run, config=tmp_path / "some.yaml")
    )


def test_the_command_line_wins_over_the_file(tmp_path):
    text = "flavour: sweet\nmodel: m\nfolder: f\nlr: 1e-2\nrow-lr: 3\nquiet: true\nclip: null\n"
    found = parse(*config(tmp_path, text), "--row-lr", "4", "--no-quiet")
    assert (found.flavour, found.optimizer.lr, found.optimizer.row_lr) == ("sweet", 0.01, 4.0)
    assert (found.run.quiet, found.optimizer.clip) == (False, None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: 3", r"some.yaml: recipe has no option 'learning_rate'; nearest: "),
        ("recipe: glue", r"has options of 'glue': give it to `python -m train glue`"),
        ("optimizer: {lr: 3}", r"optimizer holds options"),
        ("- lr", r"is no list of options: write lines such as"),
        ("lr: [", r"is no YAML"),
        ("1: 2", r"is no list of options"),
        ("", r"is no list of options"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        parse(*NEEDED, *config(tmp_path, text))


def test_a_file_makes_no_objects(tmp_path):
    with pytest.raises(InputError, match="is no YAML"):
        parse(*NEEDED, *config(tmp_path, "lr: !!python/object/apply:os.getcwd []"))


def test_a_file_that_is_not_there():
    with pytest.raises(InputError, match="none.yaml cannot be read: No such file"):
        parse(*NEEDED, "--config", "none.yaml")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--flavour", "salty"], "salty"),
        (["--lr", "fast"], "fast"),
        (["--lr", "-1"], "lr is -1"),
        (["--lr", "nan"], "lr is nan"),
        (["--b2", "1"], "b2 is 1"),
        (["--clip", "0"], "clip is 0"),
        (["--batch-size", "6", "--accumulate", "4"], "cannot be computed in 4 equal parts"),
        (["--steps", "0"], "steps is 0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--method", "magic"], "magic"),
        (["--lerning-rate", "1"], "Unrecognized"),
    ],
)
def test_values_that_are_refused(words, message, capsys):
    """Each names itself, with status 2 and no traceback."""
    with pytest.raises(SystemExit) as stopped:
        parse(*NEEDED, *words)
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown
    assert "Traceback" not in shown


def test_what_is_compared_when_a_run_goes_on():
    old = options.flat(parse(*NEEDED), "recipe")
    moved = options.flat(parse(*NEEDED[:4], "--folder", "g", "--resume", "--quiet"), "recipe")
    assert options.changed(old, moved) is None
    other = options.flat(parse(*NEEDED, "--lr", "0.4"), "recipe")
    assert options.changed(old, other) == "lr was 0.5 and is 0.4"
    # As it comes back from the file.
    assert options.changed(yaml.safe_load(options.dump(old)), old) is None


def test_every_method_can_be_chosen():
    kind = typing.get_type_hints(AdapterOptions)["method"]
    assert set(typing.get_args(kind)) == set(methods.METHODS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_options_and_helps(recipe, capsys):
    """Names are unique across groups, every option is explained, and --help shows it."""
    import importlib

    cls = importlib.import_module(f"train.recipes.{recipe}").Options
    with pytest.raises(SystemExit) as stopped:
        options.parse(recipe, cls, ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    names = _names(cls)
    assert len(names) == len(set(names))
    for name in names:
        assert f"--{name.replace('_', '-')}" in shown
    assert cls.__doc__.splitlines()[0] in " ".join(shown.replace("│", " ").split())


def _names(cls) -> list[str]:
    found = []
    for name, kind in typing.get_type_hints(cls).items():
        found += _names(kind) if dataclasses.is_dataclass(kind) else [name]
    return found
