"""Options from the command line and from files: one parser, one set of names, errors that help."""

from __future__ import annotations

import dataclasses
import shlex
import typing
from pathlib import Path

import pytest
import yaml

from hyperadapt_jax.methods import METHODS
from train import options
from train.__main__ import RECIPES, main
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


def test_several_values_are_options_one_after_the_other(tmp_path):
    """Of the command line or of a file, and only where they are asked for."""
    for words in (["--lr", "1e-3,2,3e-2"], config(tmp_path, "lr: [1e-3, 2, 0.03]")):
        found = options.parse_sweep("recipe", Options, [*NEEDED, *words])
        assert [each.optimizer.lr for each in found] == [1e-3, 2.0, 3e-2]
        assert len({dataclasses.replace(each.optimizer, lr=1.0) for each in found}) == 1
    (one,) = options.parse_sweep("recipe", Options, [*NEEDED, "--lr", "0.5"])
    assert one == parse(*NEEDED, "--lr", "0.5")
    with pytest.raises(InputError, match="--lr has 2 values: give one here"):
        parse(*NEEDED, "--lr", "1,2")


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
        ("- lr", r"holds no options: write lines such as"),
        ("lr: [", r"is not valid YAML"),
        ("1: 2", r"holds no options"),
        ("", r"holds no options"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        parse(*NEEDED, *config(tmp_path, text))


def test_a_file_makes_no_objects(tmp_path):
    with pytest.raises(InputError, match="is not valid YAML"):
        parse(*NEEDED, *config(tmp_path, "lr: !!python/object/apply:os.getcwd []"))


def test_a_file_that_is_not_there():
    with pytest.raises(InputError, match="none.yaml cannot be read: No such file"):
        parse(*NEEDED, "--config", "none.yaml")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--flavour", "salty"], "--flavour salty: choose one of sweet, sour"),
        (["--lr", "3x"], "--lr 3x: give a number"),
        (["--lr", "1_0"], "--lr 1_0: give a number"),
        (["--lr", "-1"], "--lr -1.0: give a finite number from 0 on"),
        (["--lr", "nan"], "--lr nan: give a finite number"),
        (["--row-lr=-inf"], "--row-lr -inf: give a finite number"),
        (["--warmup", "1e999"], "--warmup inf: give a finite number"),
        (["--b2", "1"], "--b2 1.0: give a number in [0, 1)"),
        (["--clip", "0"], "--clip 0.0: give a positive number, or None"),
        (["--clip", ""], "--clip : give a number"),
        (["--batch-size", "6", "--accumulate", "4"], "cannot be computed in 4 equal parts"),
        (["--batch-size", "4.0"], "--batch-size 4.0: give a whole number"),
        (["--batch-size", "٣"], "--batch-size ٣: give a whole number"),
        (["--batch-size", "9" * 5000], "give a whole number"),
        (["--steps", "0"], "--steps 0: give a number from 1 to 2147483647"),
        (["--steps", "3000000000"], "--steps 3000000000: give a number from 1 to 2147483647"),
        (["--steps", "None", "--eval-every", "x"], "--eval-every x: give a whole number"),
        (["--epochs", "0"], "--epochs 0.0: give a positive number"),
        (["--epochs", "1e300"], "--epochs 1e+300: give a positive number up to"),
        (["--epochs", "None"], "--epochs None: give a number"),
        (["--seed", "-1"], "--seed -1: give a number from 0"),
        (["--method", "magic"], "--method magic: choose one of hyperadapt, row"),
        (["--weigth-decay", "1"], "--weigth-decay: there is no such option; nearest: --weight-d"),
        (["--le", "1"], "--le: there is no such option"),
        (["stray"], "stray: there is no such option"),
        (["--lr"], "--lr: expected one argument"),
        (["--quiet=yes"], "--no-quiet"),
        (["--folder", ""], "--folder : give a path"),
        (["--model", ""], "--model : give a path or a name"),
        (["--model", "~nobody-of-that-name/x"], "x: there is no such user: give the whole path"),
        (["--folder", "~nobody-of-that-name"], "name: there is no such user: give the whole path"),
    ],
)
def test_values_that_are_refused(words, message):
    """Each names itself and what to give, in one line."""
    with pytest.raises(InputError) as refused:
        parse(*NEEDED, *words)
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match=r"^--model, --folder: must be given; python -m train re"):
        parse("--flavour", "sour")


def test_the_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = parse("--flavour", "sour", "--model", "~/m", "--folder", "~")
    assert (found.model.model, found.run.folder) == ("/home/me/m", Path("/home/me"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("recipe: [1]", "recipe is no name of a recipe"),
        ("row-lr: [1, 2]", "row_lr is one value, not a list"),
        ("lr: [1, 2]", "--lr has 2 values: give one here"),
        ("lr: [1, [2]]", "give a number"),
        ("lr: []", "lr give at least one"),
        ("lr: 2024-01-01", "lr 2024-01-01: give a number"),
        ("lr: true", "lr True: give a number"),
        ("lr: .nan", "--lr nan: give a finite number"),
        ("lr: 1\nlr: 2", "lr comes twice"),
        ("lr: 1\nrow-lr: 2\nrow_lr: 3", "row_lr comes twice"),
        ("lr:\t1\n\tclip: 2", "is not valid YAML"),
        ("steps: 4.5", "steps 4.5: give a whole number"),
        ("steps: {a: 1}", "steps holds options"),
        ("model: 12", "model 12: give text, in quotes"),
        ("model: yes", "model True: give text, in quotes"),
        ("flavour: null", "flavour None: give a value"),
        ("targets: [[qv]]", "targets give text, in quotes"),
        ("quiet: 1", "quiet 1: give true or false"),
        ("clip: &a [*a]", "clip is one value, not a list"),
        ("folder: ~nobody-of-that-name/x", "there is no such user"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nlr: *b", "recipe has no option 'a'"),
        ("? [1]\n: 2", "is not valid YAML|holds no options"),
        ("lr: " + "[" * 5000, "is not valid YAML"),
        ("lr: 1\n---\nlr: 2", "is not valid YAML"),
        ("lr: !!python/name:os.getcwd", "is not valid YAML"),
        ("lr: \x00", "is not valid YAML"),
    ],
)
def test_values_of_a_file_that_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as refused:
        parse(*NEEDED, *config(tmp_path, text))
    assert len(str(refused.value)) < 600


def test_a_folder_or_bytes_for_a_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        parse(*NEEDED, "--config", str(tmp_path))
    (tmp_path / "some.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not valid YAML"):
        parse(*NEEDED, "--config", str(tmp_path / "some.yaml"))


def test_a_command_gives_the_options_that_it_was_made_of():
    found = parse(
        *NEEDED, "--folder", "my runs/it's", "--clip", "None", "--lr", "1e-05", "--no-quiet",
        "--targets", "a b", "--full=-x", "--resume",
    )  # fmt: skip
    line = options.command_line("recipe", found, "--resume")
    assert line.startswith("python -m train recipe --flavour sour --model m --targets 'a b' --full")
    assert parse(*shlex.split(line)[4:]) == found
    assert "--batch-size" not in line


def test_what_is_compared_when_a_run_goes_on():
    old = options.flat(parse(*NEEDED), "recipe")
    moved = options.flat(parse(*NEEDED[:4], "--folder", "g", "--resume", "--quiet"), "recipe")
    assert options.changed(old, moved) is None
    other = options.flat(parse(*NEEDED, "--lr", "0.4"), "recipe")
    assert options.changed(old, other) == "lr was 0.5 and is 0.4"
    # As it comes back from the file.
    assert options.changed(yaml.safe_load(options.dump(old)), old) is None
    earlier = {name: value for name, value in old.items() if name != "muon_embeddings"}
    assert options.changed(earlier, old) is None
    later = old | {"muon_embeddings": True}
    assert options.changed(earlier, later) == "muon_embeddings was None and is True"


def test_every_method_can_be_chosen(capsys):
    """The choices are the registry's, and its summaries are the help."""
    for name in METHODS:
        assert parse(*NEEDED, "--method", name).adapter.method == name
    with pytest.raises(InputError, match=r"--method adalora: choose one of hyperadapt, .*full"):
        parse(*NEEDED, "--method", "adalora")
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, method in METHODS.items():
        assert f"{name}: {method.summary}" in shown


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
        assert f"--{name.replace('_', '-')}" in shown or name.upper() in shown.split()
    assert cls.__doc__.splitlines()[0] in " ".join(shown.split())
    assert "None" not in shown.replace("None does not clip", "").replace("None of", "")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_help_of_a_recipe_ends_with_commands_that_are_read(recipe, capsys):
    import importlib

    cls = importlib.import_module(f"train.recipes.{recipe}").Options
    with pytest.raises(SystemExit):
        options.parse(recipe, cls, ["--help"])
    shown = capsys.readouterr().out
    assert shown.index("common options:") < min(
        (shown.find(f"{group} options:") for group in (recipe, "model", "optimizer", "run")
         if f"{group} options:" in shown), default=len(shown),
    )  # fmt: skip
    examples = shown[shown.rindex("\nexamples:\n") :].replace("\\\n", " ").splitlines()[2:]
    examples = [line for line in examples if not line.strip().startswith("#")]
    assert len(examples) == 3
    for line in examples:
        words = shlex.split(line)
        assert words[:4] == ["python", "-m", "train", recipe]
        if "--config" not in words:
            options.parse(recipe, cls, words[4:])


def _names(cls) -> list[str]:
    kinds, found = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        found += _names(kind) if dataclasses.is_dataclass(kind) else [field.name]
    return found
