"""``python -m train`` as a user meets it: what it does, and what it says of input it cannot use."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from hyperadapt_jax import models
from train.__main__ import RECIPES, main
from train.run import log

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the cat dog sat ran on mat is not a good bad film".split()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """The Hugging Face folder of a random two-layer BERT that knows a few words."""
    folder = tmp_path_factory.mktemp("model") / "bert"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    config = models.config_from_dict(
        dict(
            model_type="bert", vocab_size=len(special) + len(WORDS), hidden_size=16,
            intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=40, type_vocab_size=2, pad_token_id=0,
        )
    )  # fmt: skip
    models.export(folder, models.create(config), progress=False)
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]",
             "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def write_glue(folder: Path, rows: list[str] | None = None) -> Path:
    """SST-2 as GLUE lays it out, with the given training rows."""
    good = [f"the {animal} {verb}\t{i % 2}" for animal in ("cat", "dog")
            for i, verb in enumerate(("sat", "ran", "is good", "is bad"))]  # fmt: skip
    task = folder / "SST-2"
    task.mkdir(parents=True)
    for name, lines in (("train", good if rows is None else rows), ("dev", good)):
        (task / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return folder


@pytest.fixture
def command(bert, tmp_path):
    """The words of a short run of GLUE; others are put behind them, and so win."""
    data = write_glue(tmp_path / "glue")
    return [
        "glue", "--task", "sst2", "--model", str(bert), "--data", str(data), "--folder",
        str(tmp_path / "run"), "--steps", "2", "--batch-size", "4", "--max-length", "16",
        "--schedule", "constant", "--warmup", "0",  # runs of any length are one program
    ]  # fmt: skip


def refused(capsys, *words: str) -> str:
    """The one line that a command is refused with."""
    status = main(list(words))
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert status == 2
    assert error.startswith("error: ")
    assert "Traceback" not in captured.err
    return error


def test_a_run_of_glue(command, tmp_path, capsys):
    """Plan first, table last; all files are there; again it is refused, elsewhere equal."""
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out.index("trainable parameters of") < shown.out.index("best after step")
    assert "train: 8 rows, 0 dropped, 0 truncated" in shown.out
    run = tmp_path / "run"
    made = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert made == {"adapter", "checkpoints", "config.yaml", "curves.png", "metrics.jsonl",
                    "report.md", "result.json", "tensorboard"}  # fmt: skip
    assert "| accuracy |" in (run / "report.md").read_text()
    assert "holds a run already" in refused(capsys, *command)
    assert "lr was 0.01 and is 0.5" in refused(capsys, *command, "--resume", "--lr", "0.5")
    again = tmp_path / "again"
    # From the file that the run wrote, with another folder.
    assert main(["glue", "--config", str(run / "config.yaml"), "--folder", str(again)]) == 0
    assert (again / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        one, other = (folder / "adapter" / name for folder in (run, again))
        assert one.read_bytes() == other.read_bytes()


def test_quiet_says_nothing(command, capfd):
    assert main([*command, "--quiet"]) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "no/such/folder"], "--model: no folder 'no/such/folder'"),
        (["--targets", "qkx"], "preset='qkx': expected one of qv"),
        (["--targets", ".*/kernal=in out"], "nearest: "),
        (["--targets", ".*/q/kernel=in out"], "layers/q/kernel"),
        (["--exclude", "nothing"], "nothing"),
        (["--full", "("], "--full '(' is no pattern"),
        (["--max-length", "41"], "--max-length 41: the model takes 40"),
        (["--max-length", "2"], "max_length 2: expected at least 3"),
        (["--data", "no-such-folder/"], "no-such-folder"),
        (["--task", "cola"], "holds neither CoLA/train.tsv nor train.tsv"),
    ],
)
def test_options_that_cannot_be_meant(command, capsys, words, message):
    assert message in refused(capsys, *command, *words)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "train.tsv"),
        (["the cat\t1", "the dog\t1"], "all 2 training rows have the label 'positive'"),
        (["the cat\t1", "the dog\t2"], "train.tsv:3"),
        (["the cat\t1", "the dog\tgood"], "train.tsv:3"),
        (["the cat\t1", "the dog"], "train.tsv:3"),
    ],
    ids=["empty", "one_class", "out_of_range", "no_label", "short"],
)
def test_data_that_cannot_be_used(command, capsys, tmp_path, rows, message):
    data = write_glue(tmp_path / "bad", rows)
    assert message in refused(capsys, *command, "--data", str(data))
    # Nothing was trained, so the folder can be used once the data is right.
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_missing_column(command, capsys, tmp_path):
    data = write_glue(tmp_path / "bad")
    file = data / "SST-2" / "train.tsv"
    file.write_text(file.read_text().replace("sentence\tlabel", "sentence\tlable"))
    error = refused(capsys, *command, "--data", str(data))
    assert "label" in error and "lable" in error and str(file) in error


def test_long_rows_are_cut_and_counted(command, capsys, tmp_path):
    rows = ["the cat sat on the mat\t1", "the dog\t0"]
    data = write_glue(tmp_path / "long", rows)
    assert main([*command, "--data", str(data), "--max-length", "6"]) == 0
    assert "train: 2 rows, 0 dropped, 1 truncated to 6 tokens" in capsys.readouterr().out


def test_a_decoder_has_no_head_for_glue(command, capsys, tmp_path):
    from tests.train import tiny

    assert "this recipe needs an encoder" in refused(
        capsys, *command, "--model", str(tiny.folder(tmp_path / "llama"))
    )


def test_a_model_without_a_tokenizer(command, capsys, tmp_path, bert):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((bert / name).read_bytes())
    assert "holds no tokenizer: copy its files there" in refused(
        capsys, *command, "--model", str(tmp_path / "bare")
    )


def broken(bert: Path, folder: Path, *words: str) -> Path:
    """The model, which knows nothing finite of some words."""
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(bert, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith("word_embeddings.weight"))
    for word in words:
        tensors[name][4 + WORDS.index(word)] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_outputs_that_are_not_finite_are_wrong_and_counted(command, bert, tmp_path, capsys):
    """Four of eight rows have the word: no more than the others can be right, of either label."""
    words = [*command, "--model", str(broken(bert, tmp_path / "broken", "dog")), "--patience", "9"]
    assert main(words) == 0
    rows = [r for r in log.read_metrics(tmp_path / "run/metrics.jsonl") if "eval/accuracy" in r]
    assert all(row["eval/nonfinite"] == 4 and row["eval/accuracy"] <= 0.5 for row in rows)
    assert "nonfinite" in capsys.readouterr().out
    metrics = tmp_path / "metrics.json"
    again = ["evaluate", "--folder", str(tmp_path / "run"), "--metrics", str(metrics)]
    assert main(again) == 0
    assert json.loads(metrics.read_text())["nonfinite"] == 4
    assert "nonfinite" in capsys.readouterr().out


def test_a_model_without_any_finite_output_is_refused(command, bert, tmp_path, capsys):
    model = broken(bert, tmp_path / "broken", "the")
    error = refused(capsys, *command, "--model", str(model))
    assert "evaluation after step 0: the model's outputs are NaN or infinite for all 8" in error
    assert not (tmp_path / "run").exists()


def test_a_correlation_with_outputs_that_are_not_finite_is_unknown(command, bert, tmp_path, capsys):
    """So no step is the best one, and the run says so."""
    task = tmp_path / "glue" / "STS-B"
    task.mkdir()
    lines = [f"the {animal} {verb}\tthe film\t{i}" for animal in ("cat", "dog")
             for i, verb in enumerate(("sat", "ran", "is good"))]  # fmt: skip
    for name in ("train", "dev"):
        text = "\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n"
        (task / f"{name}.tsv").write_text(text)
    model = broken(bert, tmp_path / "broken", "dog")
    words = [*command, "--task", "stsb", "--model", str(model), "--patience", "9"]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "the score after step 2 is nan: this step is never the best one" in shown
    assert "gave a finite score, the last nan" in shown.splitlines()[-1]
    rows = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"eval/pearson": null' in rows and '"eval/nonfinite": 3.0' in rows


@pytest.mark.parametrize("method", ["hyperadapt", "head", "col"])
def test_a_new_head_trains_whatever_else_is_named(command, tmp_path, method):
    """It is in the adapter, and the exported model is the one that was measured."""
    assert main([*command, "--full", "embed/norm/.*", "--method", method, "--quiet"]) == 0
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["full"]
    assert {"classifier/out/kernel", "classifier/out/bias", "embed/norm/scale"} <= set(saved)
    merged = str(tmp_path / "merged")
    assert main(["export", "--adapter", str(tmp_path / "run"), "--folder", merged, "--quiet"]) == 0
    assert models.read_config(merged).num_labels == 2


def test_the_labels_of_an_adapter_are_its_own(command, tmp_path, capsys):
    """Not those of a path in it: one whose head stayed is exported with as many."""
    from hyperadapt_jax import save
    from train import base, methods
    from train.options import AdapterOptions, ModelOptions

    loaded = base.load(ModelOptions(model=command[4]), 3, quiet=True)
    tuning = methods.tune(loaded, AdapterOptions())
    config = models.config_to_dict(loaded.config)
    full = {k: v for k, v in tuning.trainable["full"].items() if not k.endswith("out/bias")}
    rest = {k: v for k, v in loaded.params.items()}
    save(tmp_path / "adapter", tuning.trainable["scales"], rest, full=full,
         base_model=command[4], base_config=config)  # fmt: skip
    from train.run.trained import TrainedOptions, load_run

    assert load_run(TrainedOptions(adapter=tmp_path / "adapter")).base.config.num_labels == 3


def test_what_is_no_recipe(capsys):
    assert "there is no recipe 'tune': choose one of demo, glue" in refused(capsys, "tune")
    assert main([]) == 2
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in RECIPES)


@pytest.mark.parametrize("reason", ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: a fault"])
def test_too_little_memory(command, capsys, monkeypatch, reason):
    """It says what helps; another error of the runtime is shown as it is."""

    def run(_):
        raise jax.errors.JaxRuntimeError(reason)

    monkeypatch.setattr("train.recipes.glue.run", run)
    if "RESOURCE" in reason:
        assert "raise --accumulate, lower --batch-size" in refused(capsys, *command)
    else:
        with pytest.raises(jax.errors.JaxRuntimeError):
            main(command)


# -------------------------------------------------------------------------- a process of its own


def start(words: list[str], largest_file: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    script = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, [%d] * 2);"
        " runpy.run_module('train', run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script % largest_file, *words],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_full_disk_is_one_line_and_loses_no_checkpoint(command, tmp_path):
    """The system refuses files beyond a size, as it would on a full disk."""
    words = [*command, "--method", "full", "--steps", "4", "--eval-every", "2"]
    # A checkpoint's arrays are larger than that, and all that is written before is smaller.
    process = start(words, largest_file=30_000)
    _, shown = process.communicate(timeout=240)
    assert process.returncode == 2, shown
    assert shown.strip().splitlines()[-1].startswith("error: "), shown
    assert "cannot be written" in shown.splitlines()[-1]
    assert "Traceback" not in shown, shown
    # With room again, the run goes on.
    assert main([*words, "--resume", "--quiet"]) == 0


def test_ctrl_c_saves_and_says_how_to_go_on(command, tmp_path):
    """In words that a shell reads, whatever the folder is called."""
    words = [*command, "--steps", "100000", "--eval-every", "50000"]
    words += ["--folder", str(tmp_path / "it's (my) run")]
    process = start(words)
    metrics = tmp_path / "it's (my) run" / log.METRICS
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=120)
    last = shown.strip().splitlines()[-1]
    assert process.returncode == 130, shown
    assert last.startswith("SIGINT: saved after step ")
    said = last.partition("; resume with: ")[2]
    assert shlex.split(said) == ["python", "-m", "train", *words, "--resume"]
    assert "Traceback" not in shown, shown


def test_a_run_that_is_stopped_before_it_began_leaves_nothing(command, tmp_path):
    """By SIGTERM as by Ctrl-C: the folder is free, and was not there before."""
    process = start([*command, "--steps", "100000"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/config.yaml").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 143, shown
    assert "Traceback" not in shown
    if not (tmp_path / "run" / log.METRICS).exists():  # else it had just begun
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_python_drops_is_not_lost(command, tmp_path, name, status):
    """One that comes within a callback of the garbage collector, where no exception gets out."""
    run = tmp_path / "run"
    script = f"""
import gc, os, runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
def callback(*_):
    if os.path.exists({str(run / "config.yaml")!r}):
        gc.callbacks.remove(callback)
        os.kill(os.getpid(), signal.{name})
gc.callbacks.append(callback)
runpy.run_module("train", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--steps", "100000"],
        cwd=ROOT, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert not run.exists()


@pytest.mark.parametrize("redirected", ["| true", ">&-", "2>&-", "> /dev/full"])
def test_nobody_reads_what_is_printed(redirected):
    """The status says so, and no traceback does."""
    line = f"set -o pipefail; '{sys.executable}' -m train demo --help {redirected}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, text=True, capture_output=True)
    expected = {"| true": (0, 141), "> /dev/full": (2,)}.get(redirected, (0,))
    assert done.returncode in expected
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
