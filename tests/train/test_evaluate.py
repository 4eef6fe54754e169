"""A run of GLUE is measured again as it was, from its folder alone."""

import json
import shutil

import pytest

from train.__main__ import main
from train.run.log import read_metrics

from .test_cli import bert, command, refused  # noqa: F401


@pytest.mark.parametrize("more", [[], ["--full", "layers/.*/bias", "--method", "row"]])
def test_a_run_of_glue_is_measured_again(command, tmp_path, capsys, more):  # noqa: F811
    assert main([*command, *more]) == 0
    run, metrics = tmp_path / "run", tmp_path / "metrics.json"
    rows = read_metrics(run / "metrics.jsonl")
    best = max(row["eval/accuracy"] for row in rows if "eval/accuracy" in row)
    assert main(["evaluate", "--folder", str(run), "--metrics", str(metrics)]) == 0
    assert json.loads(metrics.read_text()) == {"accuracy": best}
    assert f"accuracy  {best:.4f}" in capsys.readouterr().out

    # Other rows, under the names of the hub's columns; the whole set is then of one class.
    other = tmp_path / "other.csv"
    other.write_text("sentence,label\nthe cat sat,1\nthe dog is bad,1\nnot good,1\n")
    words = ["evaluate", "--folder", str(run), "--data", str(other), "--metrics", str(metrics)]
    assert main([*words, "--quiet"]) == 0
    assert json.loads(metrics.read_text())["accuracy"] in (0.0, 1 / 3, 2 / 3, 1.0)
    assert "column 'label'" in refused(capsys, *words[:3], "--data", write(other, "sentence\na"))

    shutil.rmtree(run / "adapter")
    assert "let the run come to its end" in refused(capsys, *words)


def write(file, text):
    file.write_text(text)
    return str(file)
