"""Fine-tuning on instructions, from the command line to the adapter that is measured again."""

import json
import math
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
import yaml

from train import base, methods
from train.__main__ import main
from train.data import chat
from train.data.examples import Examples
from train.options import AdapterOptions, ModelOptions
from train.run.log import read_metrics
from train.tasks import instructions
from train.tasks.instructions import Instructions
from train.tasks.task import Setting

from . import tiny

WORDS = [f"w{i}" for i in range(22)]
CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def model_folder(folder, template=None):
    """A random two-layer Llama that knows words, with its tokenizer."""
    special = ["<s>", "</s>", "<unk>", "user", "assistant", ":", "is", "what"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate([*special, *WORDS, "yes", "no"])}, unk_token="<unk>"
        )
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tiny.folder(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "plain")


def answer(word):
    return "no" if int(word.strip("w")) % 2 else "yes"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of questions, answered by yes if the number of their last word is even."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = []
    for _ in range(300):
        words = rng.choice(WORDS, rng.integers(1, 5))
        row = {"question": " ".join(words), "answer": answer(words[-1]), "words": "none"}
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines))
    return file


def words_of(**options):
    """A command line."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def train(model, source, folder, **options):
    """The exit status of a short run."""
    defaults = dict(
        model=model,
        data=source,
        folder=folder,
        prompt="what is {question}",
        eval_rows=40,
        questions=20,
        max_new_tokens=4,
        max_length=24,
        eval_batch_size=16,
        batch_size=16,
        remat="none",
    )
    options = {**defaults, **options}
    return main(["sft", *words_of(**{k: v for k, v in options.items() if v is not None})])


@pytest.fixture(scope="module")
def done(model, rows, tmp_path_factory):
    """The folder of a run that learned."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = dict(method="full", lr=2e-2, steps=20, eval_every=20, score="exact", pack=True)
    assert train(model, rows, folder, loss_chunk=100, **options) == 0
    return folder


def predictions(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluations(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [row for row in rows if "eval/loss" in row]


def test_a_run_learns_to_answer(done):
    before, *_, last = evaluations(done)
    assert before["step"] == 0 and last["step"] == 20
    assert before["eval/accuracy"] < 0.3 and last["eval/accuracy"] > 0.9
    assert last["eval/loss"] < 0.5 * before["eval/loss"]
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/loss"]))
    answers = predictions(done / "predictions.jsonl")
    assert len(answers) == 20
    for row in answers:
        assert row["correct"] == (row["answer"] == row["reference"])
        assert row["reference"] == answer(row["prompt"].split()[-1])
    best = max(row["eval/accuracy"] for row in evaluations(done))
    assert sum(row["correct"] for row in answers) / 20 == best
    assert "accuracy" in (done / "report.md").read_text()


def test_what_was_learned_is_measured_again(done, tmp_path, capsys):
    files = dict(metrics=tmp_path / "metrics.json", predictions=tmp_path / "predictions.jsonl")
    assert main(["evaluate", *words_of(folder=done, **files)]) == 0
    assert "accuracy" in capsys.readouterr().out
    metrics = json.loads(files["metrics"].read_text())
    best = max(evaluations(done), key=lambda row: (row["eval/accuracy"], -row["step"]))
    assert metrics == {name: best[f"eval/{name}"] for name in metrics} and len(metrics) == 3
    assert predictions(files["predictions"]) == predictions(done / "predictions.jsonl")


def test_other_rows_can_be_measured(done, tmp_path):
    file, metrics = tmp_path / "other.csv", tmp_path / "metrics.json"
    file.write_text("answer,question\nno,w3 w1\nyes,w2\nyes,w8 w1\n")
    options = dict(folder=done, data=file, rows=3, questions=3, metrics=metrics, quiet=True)
    assert main(["evaluate", *words_of(**options)]) == 0
    assert json.loads(metrics.read_text())["accuracy"] == pytest.approx(2 / 3)


def broken(model, folder, *tokens):
    """The model, which knows nothing finite of some tokens."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.embed_tokens.weight"][list(tokens)] = np.nan
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_rows_whose_outputs_are_not_finite_are_counted(model, rows, tmp_path, capsys):
    """The loss is unknown then, and answers that are not there are wrong."""
    held_out = tmp_path / "held.jsonl"
    lines = [{"question": q, "answer": "yes"} for q in ("w0", "w0 w2", "w1 w0", "w3", "w1")]
    held_out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = broken(model, tmp_path / "model", 8)  # w0
    options = dict(eval_data=held_out, eval_rows=5, questions=5, score="exact", steps=1, patience=9)
    folder = tmp_path / "run"
    assert train(source, rows, folder, **options) == 0
    for row in evaluations(folder):
        assert (row["eval/nonfinite"], row["eval/nonfinite_answers"]) == (3, 3)
        assert math.isnan(row["eval/loss"]) and row["eval/accuracy"] <= 2 / 5
    assert [row["answer"] for row in predictions(folder / "predictions.jsonl")][:3] == [None] * 3
    metrics = tmp_path / "metrics.json"
    assert main(["evaluate", *words_of(folder=folder, metrics=metrics, quiet=True)]) == 0
    found = json.loads(metrics.read_text(), parse_constant=pytest.fail)
    assert found["loss"] is None and found["nonfinite"] == 3
    # By the loss alone, no step has a score.
    assert train(source, rows, tmp_path / "other", **options | {"score": None}) == 2
    assert "gave a finite score" in capsys.readouterr().err


def test_a_perplexity_that_no_float_holds_is_infinite(monkeypatch):
    def losses_of(tuning, chunk):
        return lambda trainable, frozen, batch: (
            jnp.full(batch["tokens"].shape, trainable), batch["labels"] >= 0
        )  # fmt: skip

    example = {"tokens": np.arange(3), "labels": np.arange(3)}
    monkeypatch.setattr(instructions.losses, "token_losses", losses_of)
    task = Instructions(data="nowhere", eval_batch_size=1)
    tuning = types.SimpleNamespace(fn=None, frozen={})
    questions = types.SimpleNamespace(correct=None)
    evaluate = task.measure(tuning, Examples([example], 0, 0), questions)
    assert evaluate(2.0) == {"loss": 2.0, "perplexity": math.exp(2.0)}
    assert evaluate(750.0) == {"loss": 750.0, "perplexity": math.inf}


def test_the_report_says_what_the_run_took(done):
    report = (done / "report.md").read_text()
    for fact in ("best step", "duration", "tokens", "training rows", "held-out rows", "peak memory",
                 "device", "versions"):  # fmt: skip
        assert f"\n| {fact} | " in report
    assert "Python" in report and "of 20 |" in report and "cpu" in report
    assert "\npython -m train sft --data " in report and "--method full" in report
    first = predictions(done / "predictions.jsonl")[0]
    for name in ("prompt", "answer", "reference"):
        assert f"{name}: {first[name]}\n" in report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rows=5), "--rows: .* held out rows of its own; give --data"),
        (dict(data="nowhere.jsonl"), "there is no file or folder nowhere.jsonl"),
        (dict(model="nowhere/at-all"), "nowhere/at-all"),
        (dict(folder="nowhere"), "nowhere/config.yaml cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused(done, capsys, options, message):
    refused(["evaluate", *words_of(**{"folder": done, **options})], message, capsys)


def refused(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error), error
    assert error.startswith("error: ") and "\n" not in error


def test_a_run_of_another_recipe_has_no_questions(tmp_path, capsys):
    theirs = {"recipe": "glue", "task": "sst2", "model": "m", "folder": "f"}
    others = ({"recipe": "rank"}, {"recipe": "fit"}, {"recipe": "../sft"}, {"recipe": [1]})
    for config, message in [
        (theirs, "--questions: a run of sst2 has no such thing"),
        *((other, "is of no recipe that trains") for other in others),
    ]:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        refused(["evaluate", *words_of(folder=tmp_path, questions=3)], message, capsys)


def test_the_loss_is_the_mean_over_the_answers_tokens(model, rows):
    settings = dict(eval_rows=7, questions=0, eval_batch_size=4, loss_chunk=9)
    task = Instructions(data=str(rows), prompt="what is {question}", **settings)
    which = ModelOptions(model=str(model))
    loaded, tokenizer = base.load(which, quiet=True), base.tokenizer(which)
    tuning = methods.tune(loaded, AdapterOptions())
    training, held_out = task.rows(seed=0)
    assert len(training) == 293 and len(held_out) == 7
    evaluation = task.evaluation(Setting(loaded, which))
    assert evaluation.generate is None
    found = evaluation.on(tuning)(tuning.trainable)

    losses = []
    for row, prompt in zip(held_out, chat.prompts(held_out, task.form, tokenizer), strict=True):
        answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], 1]
        tokens = np.array([[*prompt, *answer]])
        spoken = jax.nn.log_softmax(loaded.fn(loaded.params, tokens))[0]
        losses += [-spoken[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_whole_chats_are_learned_by_the_tokenizers_template(tmp_path):
    model = model_folder(tmp_path / "model", CHAT)
    turns = [("user", "what is w1"), ("assistant", "w1"), ("user", "w2"), ("assistant", "w2 w3")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"messages": messages}, {"messages": messages[:2]}] * 4))
    options = dict(prompt=None, eval_data=rows, steps=2, batch_size=4, questions=3, quiet=True)
    assert train(model, rows, tmp_path / "run", **options) == 0
    assert [row["eval/perplexity"] > 1 for row in evaluations(tmp_path / "run")] == [True] * 2
    answers = predictions(tmp_path / "run" / "predictions.jsonl")
    assert [row["reference"] for row in answers] == ["w2 w3", "w1", "w2 w3"]
    assert answers[1]["prompt"] == "user : what is w1 </s> assistant :"
    assert "right" not in answers[0]


def rows_of(file, count, answer="yes", start=0):
    """A file of rows, with as many different questions."""
    lines = [{"question": WORDS[i % 22] + f" w{i}", "answer": answer} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in lines[start:]))
    return file


def test_a_run_is_what_its_data_hold(model, tmp_path, capsys, monkeypatch):
    """Measured again or resumed, it needs the rows, the tokenizer and the base that it had."""
    data, run = rows_of(tmp_path / "rows.jsonl", 12), tmp_path / "run"
    options = dict(eval_rows=4, questions=1, batch_size=4, steps=2, save_every=1, eval_every=2)
    assert train(model, data, run, quiet=True, **options) == 0
    evaluate = ["evaluate", *words_of(folder=run, quiet=True)]
    assert main(evaluate) == 0

    def resumed(base=model, **more):
        return ["sft", *words_of(
            **{**dict(model=base, data=data, folder=run, prompt="what is {question}", remat="none",
                      max_new_tokens=4, max_length=24, eval_batch_size=16, resume=True, quiet=True),
               **options, **more})]  # fmt: skip

    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert main(resumed(moved)) == 0
    assert main([*evaluate, "--model", str(moved)]) == 0

    rows_of(data, 13)
    refused(resumed(), "--resume: the (training|held-out) rows changed since the run in", capsys)
    refused(evaluate, "the held-out rows changed since .* or other rows by --data", capsys)
    rows_of(data, 12, answer="no")
    refused(resumed(), "--resume: the training rows changed", capsys)
    assert main([*evaluate, "--data", str(data)]) == 0
    rows_of(data, 12)
    assert main(evaluate) == 0

    tokenizer = moved / "tokenizer.json"
    kept = json.loads(tokenizer.read_text())
    words = kept["model"]["vocab"]
    words["yes"], words["no"] = words["no"], words["yes"]
    tokenizer.write_text(json.dumps(kept))
    refused(resumed(moved), "--resume: the tokenizer changed", capsys)
    refused([*evaluate, "--model", str(moved)], "the tokenizer changed", capsys)

    # Runs of before there were digests are accepted, with a line.
    monkeypatch.setattr("train.recipes.evaluate.SOURCES", "not there")
    assert main(evaluate) == 0
    assert "does not say which data it was made on" in capsys.readouterr().err


def test_what_is_lost_is_told(model, tmp_path, capsys):
    """Of held-out rows as of others, and as a warning where it is much; with the file and line."""
    data, held_out = rows_of(tmp_path / "rows.jsonl", 30), tmp_path / "held.jsonl"
    long = {"question": " ".join(["w1"] * 40), "answer": "yes"}
    lines = [{"question": "w1", "answer": "no"}, *[long] * 9]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in lines))
    with open(data, "a") as file:
        file.write('{"question": "w1", "answer": " "}\n')
    options = dict(eval_data=held_out, questions=0, steps=1, batch_size=4096, accumulate=4)
    assert train(model, data, tmp_path / "run", **options) == 0
    shown = capsys.readouterr()
    assert (
        "training rows: 31 rows, 0 dropped, 0 truncated to 24 tokens, 1 empty answers" in shown.out
    )
    assert "warning: held-out rows: 10 rows, 9 dropped, 0 truncated to 24 tokens" in shown.err
    assert "--batch-size 4096: there are no more than 31" in shown.out
    assert main(["evaluate", *words_of(folder=tmp_path / "run", quiet=True)]) == 0
    assert "warning: held-out rows: 10 rows, 9 dropped" in capsys.readouterr().err
    held_out.write_text("".join(json.dumps(row) + "\n" for row in lines[1:]))
    refused(["evaluate", *words_of(folder=tmp_path / "run")], "none of the 9 rows became", capsys)


def test_a_held_out_chat_without_an_answer_is_named(tmp_path, capsys):
    model = model_folder(tmp_path / "model", CHAT)
    chats = [[("user", "w1"), ("assistant", "w1")], [("user", "w2")]]
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps(rows[0]) + "\n")
    bad.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert train(model, good, tmp_path / "run", prompt=None, eval_data=bad, quiet=True) == 2
    assert "bad.jsonl:2: there is no answer of the assistant" in capsys.readouterr().err


def test_a_name_that_no_question_has_can_be_named(model, tmp_path):
    """The choices are the references of all held-out rows, however few the model answers."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"question": "w1", "answer": "{a}"}}\n' for a in ("yes", "no")))
    which = ModelOptions(model=str(model))
    settings = dict(prompt="{question}", questions=1, score="first-match")
    task = Instructions(data=str(file), eval_data=str(file), **settings)
    questions = task.ask(Setting(base.load_abstract(which), which), task.rows(seed=0)[1])
    assert questions.accuracy(["no, not yes"]) == {"accuracy": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt="{question.text}"), "'{question.text}': {question.text} is no plain column"),
        (dict(reference="{"), "template '{': "),
        (
            dict(prompt="{questions}"),
            "rows.jsonl:1: there is no column 'questions'; nearest: quest",
        ),
        (dict(prompt=None), "rows.jsonl:1: there is no column 'messages'"),
        (dict(chat=True), "no chat template: give --prompt"),
        (dict(max_length=65), "--max-length 65: the model takes 64"),
        (dict(max_length=1), "max_length 1: expected at least 2"),
        (dict(max_length=2), "none of the 260 rows became an example"),
        (dict(max_new_tokens=64), "--max-new-tokens 64: the model takes 64 tokens"),
        (dict(eval_rows=300), "--eval-rows 300 leaves nothing of 300 rows"),
        (dict(eval_rows=0), "--eval-rows 0: give at least 1"),
        (dict(questions=0, score="exact"), "--questions 0: give"),
        (dict(loss_chunk=-1), "--loss-chunk -1: give a number of tokens, or 0"),
        (
            dict(score="last-number", reference="{words}"),
            "--score last-number finds nothing",
        ),
        (dict(data="no/such.jsonl"), "there is no file or folder no/such.jsonl"),
        (dict(split="dev", data="."), "for the split 'dev'"),
    ],
)
def test_what_cannot_be_learned_is_refused(model, rows, tmp_path, capsys, options, message):
    source = options.pop("data", rows)
    status = train(model, source, tmp_path / "run", quiet=True, **options)
    error = capsys.readouterr().err.strip()
    assert status == 2 and message in error and "\n" not in error, error
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_refused(shared, rows, tmp_path, capsys):
    assert train(shared / "weights" / "all-MiniLM-L6-v2", rows, tmp_path / "run") == 2
    assert "is a bert encoder: this recipe needs a decoder" in capsys.readouterr().err


def test_a_pretrained_decoder_learns_text_of_another_kind(shared, tmp_path):
    """Told stories before, it is to write out how problems are solved; held out are other ones."""
    options = dict(
        prompt="{question}\\n",
        eval_data=shared / "data" / "gsm8k" / "test.jsonl",
        eval_rows=16,
        questions=2,
        max_length=160,
        lr=3e-2,
        steps=12,
        eval_every=12,
        batch_size=8,
        quiet=True,
    )
    source = shared / "data" / "gsm8k" / "train.jsonl"
    assert train(shared / "weights" / "stories260K", source, tmp_path / "run", **options) == 0
    before, after = evaluations(tmp_path / "run")
    assert 6 < before["eval/loss"] < 8
    assert after["eval/loss"] < before["eval/loss"] - 1.5
