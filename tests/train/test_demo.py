"""The embedded model is what it says it is, and the demo leaves what it promises."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import transformers

import hyperadapt_jax as ha
from hyperadapt_jax import models
from train.__main__ import main
from train.recipes import demo, pretrain
from train.run.log import read_metrics
from train.tasks.arithmetic import exam, problems
from train.tasks.arithmetic.task import OneStep, TwoSteps

TINY = demo.TINY
SHORT = "demo --steps 4 --eval-every 2 --texts 64 --problems 3 --quiet --folder"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def embedded():
    """The embedded model as a function and its parameters."""
    return models.functional(models.load(TINY, progress=False))


def words(command: str, *more: object) -> list[str]:
    return [*command.split(), *map(str, more)]


def test_the_embedded_folder_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sum(files.values()) <= 6e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    config = models.read_config(TINY)
    assert config == pretrain.configuration(len(problems.vocabulary()))
    card = (TINY / "README.md").read_text()
    assert "license: apache-2.0" in card and "python -m train pretrain" in card


def test_the_embedded_tokenizer_is_the_one_that_the_code_makes(tokenizer):
    committed = json.loads((TINY / "tokenizer.json").read_text())
    assert committed == json.loads(problems.tokenizer().to_str())
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ours = problems.tokenizer()
    for problem in problems.draw({**problems.MIXTURE, "ride": 20}, 100, seed=0, held=True):
        ids = tokenizer(problem.text)["input_ids"]
        assert ids == ours.encode(problem.text).ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == problem.text


def test_the_embedded_model_knows_one_step_and_not_two(embedded, tokenizer):
    kinds = [*OneStep.kinds, "ride"]
    asked = exam.exam(kinds, 64, seed=7, tokenizer=tokenizer.backend_tokenizer)
    found = asked.accuracy(asked.generations(*embedded))
    assert found.keys() == set(kinds)
    assert found["equation"] >= 0.95 and found["story_equation"] >= 0.9
    assert found["ride"] == 0


def test_an_exam_scores_each_kind_apart():
    asked = exam.exam(["equation", "ride"], 5, seed=0, tokenizer=problems.tokenizer())
    assert asked.groups == ["equation", "ride"] * 5
    right = asked.references
    assert asked.accuracy(right) == {"equation": 1.0, "ride": 1.0}
    assert asked.accuracy([right[0]] * 10) == {"equation": 0.2, "ride": 0.0}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of a short run of the demo."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(words(SHORT, folder)) == 0
    return folder


def test_a_run_leaves_all_that_it_promises(short):
    assert (short / "config.yaml").is_file() and (short / "adapter").is_dir()
    assert all((short / name).read_bytes()[1:4] == b"PNG" for name in ("curves.png", "rank.png"))
    rows = read_metrics(short / "metrics.jsonl")
    evaluated = [row["step"] for row in rows if "eval/ride" in row]
    assert evaluated == [0, 2, 4]
    report = (short / "report.md").read_text()
    assert all(what in report for what in TwoSteps.kinds.values())
    assert report.count("before:") == 3 and "10,240 of" in report


def test_the_adapter_answers_in_plain_library_code_as_the_report_says(short, embedded, tokenizer):
    fn, params = embedded
    scales = ha.load(short / "adapter", params).scales
    assert ha.count(scales) == 10_240 and any(np.any(x) for x in jax.tree.leaves(scales))
    report = (short / "report.md").read_text()
    asked = re.findall(r"^(a .*)\n  before: .*\n  after:  (.*)  \((?:correct|wrong)", report, re.M)
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in asked]
    answers = models.generate(
        ha.adapt(fn), params, scales, prompts=prompts, max_new_tokens=exam.LONGEST,
        stop_tokens=[tokenizer.eos_token_id],
    )  # fmt: skip
    said = tokenizer.batch_decode(answers, skip_special_tokens=True)
    assert len(asked) == 3 and said == [answer for _, answer in asked]
    merged = models.generate(
        fn, ha.merge(params, scales), prompts=prompts, max_new_tokens=exam.LONGEST,
        stop_tokens=[tokenizer.eos_token_id],
    )  # fmt: skip
    assert merged == answers


def test_a_finished_run_tells_the_same_again_and_another_one_is_refused(short, capsys):
    before = (short / "report.md").read_text()
    assert main(words(SHORT, short)) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(words(SHORT, short, "--resume")) == 0
    assert (short / "report.md").read_text() == before


def test_half_of_the_exam_chooses_and_the_run_is_measured_again(tmp_path):
    """All along, and afterwards, on the same problems: not those that a run without halves sees."""
    folder, file = tmp_path / "run", tmp_path / "metrics.json"
    assert main(words(SHORT, folder, "--problems", 4, "--report-half")) == 0
    result = json.loads((folder / "result.json").read_text())
    kinds = set(TwoSteps.kinds)
    assert result["best"].keys() == kinds | {f"report/{kind}" for kind in kinds}
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "eval/ride" in row]
    assert {"eval/report/ride", "eval/report/story"} <= rows[0].keys()
    assert main(words("evaluate --quiet --metrics", file, "--folder", folder)) == 0
    assert json.loads(file.read_text()) == result["best"]


@pytest.mark.parametrize("method, numbers", [("full", 904_576), ("head", 25_728)])
def test_other_methods_run_too(tmp_path, capsys, method, numbers):
    command = "demo --steps 1 --texts 32 --problems 3 --lr 1e-3 --method"
    assert main(words(command, method, "--folder", tmp_path / "run")) == 0
    shown = capsys.readouterr().out
    assert "two-step problems" in shown and f"{numbers:,} of 904,576 trainable parameters" in shown
    assert not (tmp_path / "run" / "rank.png").exists()  # no vectors, no rank


def test_a_model_of_other_words_is_refused(tmp_path, capsys):
    folder = tmp_path / "other"
    shutil.copytree(TINY, folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"bus"', '"omnibus"'))
    assert main(words("demo --model", folder, "--folder", tmp_path / "run")) == 2
    assert "does not know the words" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pretraining_writes_a_folder_that_others_can_read(tmp_path):
    folder = tmp_path / "run"
    command = "pretrain --steps 2 --eval-every 2 --texts 300 --problems 2 --quiet --folder"
    assert main(words(command, folder)) == 0
    fn, params = models.functional(models.load(folder / "model", progress=False))
    _, fresh = models.functional(models.load(folder / "fresh", progress=False))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), params, fresh)))
    assert main(words("evaluate --quiet --metrics", folder / "again.json", "--folder", folder)) == 0
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "eval/story" in row]
    again = {f"eval/{k}": v for k, v in json.loads((folder / "again.json").read_text()).items()}
    assert again in [{k: v for k, v in row.items() if k != "step"} for row in rows]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.decode(tokenizer("31+12=43")["input_ids"]) == "<bos> 31+12=43"
    assert fn(params, np.ones((1, 3), np.int32)).shape == (1, 3, len(tokenizer))
    assert "| bare equations | 0.0% |" in (folder / "model" / "README.md").read_text()


@pytest.mark.slow
def test_a_shortened_demo_learns(tmp_path, optimized):
    """A few of its steps: the loss falls to a fraction; the answers come later."""
    folder = tmp_path / "run"
    command = "demo --steps 60 --eval-every 60 --problems 32 --quiet --folder"
    assert main(words(command, folder)) == 0
    rows = read_metrics(folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[:5]) > 2.5 and np.mean(losses[-10:]) < 0.8
    first, last = (row for row in rows if "eval/ride" in row)
    assert first["eval/ride"] == 0 and first["eval/equation"] >= 0.95
    assert last["eval/equation"] >= 0.5
