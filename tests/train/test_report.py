"""The log of a run: what it writes, what it shows, and what a killed run leaves behind."""

import contextlib
import io
import json
import math
import re
import resource
import struct
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from hyperadapt_jax.tables import table
from train.errors import InputError
from train.files import write
from train.run.log import CURVES, EVENTS, METRICS, Log, read_metrics
from train.run.plots import curves


def train(folder, first, last, total=12, **options):
    """A run's calls: a step each, an evaluation after every fourth, numbers of the step alone."""
    with Log(folder, total, start_step=first, **options) as log:
        for step in range(first + 1, last + 1):
            log.step(step, {"loss": 1 / step, "lr": 1e-3 / step}, tokens=100)
            if step % 4 == 0:
                log.evaluation(step, {"accuracy": step / 7, "eval/loss": math.pi * step})


def events(folder):
    """All TensorBoard events, by the record format: length, checksum, data, checksum."""
    found = []
    for file in sorted((folder / EVENTS).iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


class Terminal(io.StringIO):
    isatty = staticmethod(lambda: True)


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond this many bytes: the system refuses as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_are_what_was_logged(tmp_path):
    train(tmp_path, 0, 4)
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert rows[:2] == [
        {"step": 1, "loss": 1.0, "lr": 1e-3},
        {"step": 2, "loss": 0.5, "lr": 5e-4},
    ]
    assert rows[-1] == {"step": 4, "eval/accuracy": 4 / 7, "eval/loss": math.pi * 4}
    assert read_metrics(tmp_path / METRICS) == rows


def test_rows_are_on_disk_when_the_call_returns(tmp_path):
    with Log(tmp_path, 3) as log:
        log.step(1, {"loss": np.float32(0.1)}, tokens=5)
        assert read_metrics(tmp_path / METRICS) == [{"step": 1, "loss": float(np.float32(0.1))}]


@pytest.mark.parametrize("torn", ["", '{"step": 9, "lo', '{"step": 9, "loss": 1.0}'])
@pytest.mark.parametrize("checkpoint", [1, 4, 6, 8])
def test_a_resumed_run_writes_the_same_bytes(tmp_path, checkpoint, torn):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    train(one, 0, 12)
    train(two, 0, 8)
    with open(two / METRICS, "a") as file:
        file.write(torn)
    train(two, checkpoint, 12)
    assert (two / METRICS).read_bytes() == (one / METRICS).read_bytes()


@pytest.mark.parametrize("loss", [math.pi, math.nan, math.inf])
def test_an_evaluation_that_is_done_again_is_one_row(tmp_path, loss):
    for start in (0, 8):
        with Log(tmp_path, 12, start_step=start) as log:
            log.evaluation(8, {"accuracy": 8 / 7, "eval/loss": loss})
    with Log(tmp_path, 12, start_step=8) as log:
        log.evaluation(8, {"accuracy": 8 / 7, "eval/loss": loss})
        log.step(9, {"loss": 1 / 9}, tokens=1)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == [8, 9]


def test_a_run_that_starts_anew_begins_an_empty_file(tmp_path):
    train(tmp_path, 0, 8)
    train(tmp_path, 0, 2)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == [1, 2]


def test_a_resumed_run_without_its_metrics_goes_on(tmp_path):
    train(tmp_path, 3, 5)
    assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == [4, 4, 5]


def test_what_is_not_finite_is_kept_as_json(tmp_path):
    with Log(tmp_path, 3) as log:
        log.step(1, {"loss": math.nan, "lr": math.inf}, tokens=5)
        log.step(2, {"loss": 0.25}, tokens=5)
    assert (tmp_path / METRICS).read_text().splitlines()[0] == (
        '{"step": 1, "loss": null, "lr": null}'
    )
    first, second = read_metrics(tmp_path / METRICS)
    assert math.isnan(first["loss"]) and second["loss"] == 0.25


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "one"}', "3"])
def test_a_damaged_line_is_named(tmp_path, line):
    file = tmp_path / METRICS
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2 is no row of metrics"):
        read_metrics(file)


def test_tensorboard_has_the_rows_and_the_speed(tmp_path):
    train(tmp_path, 0, 4)
    scalars = {(e.step, v.tag): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    for row in read_metrics(tmp_path / METRICS):
        for name in row.keys() - {"step"}:
            assert scalars.pop((row["step"], name)) == np.float32(row[name])
    assert {tag for _, tag in scalars} == {"speed/tokens_per_second"}
    assert min(scalars.values()) > 0


def test_tensorboard_is_told_where_a_run_was_resumed(tmp_path):
    train(tmp_path, 0, 8)
    train(tmp_path, 4, 8)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [1, 5]


def test_a_terminal_has_a_bar(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    train(tmp_path, 4, 12, label="cola")
    shown = terminal.getvalue()
    assert re.search(r"cola: 100% \|.*\| 12/12 \[.*\], loss 0.08333, [\d,]+ tokens/s", shown)
    assert "step 8/12: accuracy 1.143, loss 25.13\n" in shown


@pytest.mark.parametrize("kernel", [True, False])
def test_a_notebook_has_a_bar_and_a_shell_has_none(tmp_path, monkeypatch, capsys, kernel):
    shell = SimpleNamespace(**{"kernel": None} if kernel else {})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    train(tmp_path, 0, 12, label="cola")
    assert ("100% |" in capsys.readouterr().err) is kernel


def test_elsewhere_there_are_plain_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", None)  # as with what runs notebooks elsewhere
    train(tmp_path, 0, 8, label="cola")
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        f"cola: step {step}/12: accuracy {step / 7:.4g}, loss {math.pi * step:.4g}"
        for step in (4, 8)
    ]
    monkeypatch.setattr("train.run.log._EVERY", 0.0)
    train(tmp_path, 0, 2)
    for line, loss in zip(capsys.readouterr().err.splitlines(), ["1", "0.5"], strict=True):
        assert re.fullmatch(rf"step \d/12: loss {loss}, [\d,]+ tokens/s, \d\d:\d\d left", line)


def test_quiet_shows_warnings_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.run.log._EVERY", 0.0)
    train(tmp_path, 0, 8, quiet=True)
    with Log(tmp_path, 2, quiet=True) as log:
        log.note("a note")
        log.warn("a warning")
    assert capsys.readouterr().err == "a warning\n"


def test_the_curves_are_drawn_however_the_run_ends(tmp_path):
    with pytest.raises(KeyboardInterrupt), Log(tmp_path, 9) as log:
        log.step(1, {"loss": 1.0}, tokens=1)
        raise KeyboardInterrupt
    assert (tmp_path / CURVES).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyboardInterrupt), Log(tmp_path / "..", 9):
        raise KeyboardInterrupt  # before the first row: nothing to draw, and nothing goes wrong
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("room", [0, 100, 2000])
def test_a_full_disk_is_one_clear_error(tmp_path, room):
    with full_disk(room), pytest.raises(InputError) as caught:
        train(tmp_path, 0, 1000, total=1000, quiet=True)
    assert re.fullmatch(
        r".*/(metrics\.jsonl|tensorboard|curves\.png) cannot be written: File too large; make .*",
        str(caught.value),
    )
    read_metrics(tmp_path / METRICS)  # whole, but for a last line


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_disk(tmp_path):
    with full_disk(400), pytest.raises(KeyboardInterrupt), Log(tmp_path, 9) as log:
        log.step(1, {"loss": 1.0}, tokens=1)
        raise KeyboardInterrupt  # and there is no room for the curves


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="gone/metrics.jsonl cannot be written: No such file"):
        train(tmp_path / "gone", 0, 1)


def test_write_leaves_the_old_file_where_it_fails(tmp_path):
    write(tmp_path / "file", "old")
    with full_disk(3), pytest.raises(InputError, match="file cannot be written"):
        write(tmp_path / "file", "newer")
    assert (tmp_path / "file").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def lines(figure):
    return {
        ax.get_title(loc="left"): {line.get_label(): line.get_xydata() for line in ax.get_lines()}
        for ax in figure.axes
        if ax.axison
    }


def test_curves_have_one_panel_for_each_kind_of_number():
    rows = [
        {"step": 1, "loss": 2.0, "grad_norm": 3.0, "lr/row": 0.1, "lr/head": 0.2},
        {"step": 1, "eval/loss": 1.5, "eval/accuracy": 0.5, "eval/f1": 0.6, "eval/perplexity": 9},
        {"step": 3, "loss": 1.0, "grad_norm": 2.0, "lr/row": 0.1, "lr/head": 0.2},
    ]
    drawn = lines(curves(rows))
    assert {title: list(found) for title, found in drawn.items()} == {
        "loss": ["training", "evaluation"],
        "evaluation": ["accuracy", "f1"],
        "evaluation: perplexity": ["perplexity"],
        "learning rate": ["row", "head"],
        "grad norm": ["grad_norm"],
    }
    np.testing.assert_array_equal(drawn["loss"]["training"], [[1, 2], [3, 1]])
    np.testing.assert_array_equal(drawn["evaluation"]["f1"], [[1, 0.6]])


def test_a_long_curve_is_smoothed_and_a_short_one_is_not():
    assert list(lines(curves([{"step": i, "loss": i} for i in range(1, 30)]))["loss"]) == [
        "training"
    ]
    rows = [{"step": i, "loss": float(i)} for i in range(1, 101)]
    rows[49]["loss"] = math.nan
    raw, smooth = lines(curves(rows))["loss"].values()
    assert len(raw) == len(smooth) == 100 and np.isnan(raw[49, 1])
    whole = np.r_[2:47, 53:97]  # places whose window of five holds neither an end nor the gap
    np.testing.assert_allclose(smooth[whole, 1], raw[whole, 1])
    assert smooth[49, 1] == pytest.approx((48 + 49 + 51 + 52) / 4)


def test_the_best_step_is_marked_where_there_are_evaluations():
    rows = [{"step": 1, "loss": 2.0, "lr": 1.0}, {"step": 2, "eval/loss": 1.5, "eval/f1": 0.5}]
    drawn = lines(curves(rows, best=2))
    assert {title for title, found in drawn.items() if "best step, 2" in found} == {
        "loss", "evaluation"
    }  # fmt: skip
    np.testing.assert_array_equal(drawn["loss"]["best step, 2"][:, 0], [2, 2])
    assert not any("best step" in str(list(found)) for found in lines(curves(rows)).values())


def test_what_is_not_finite_can_be_seen():
    """A cross at its step, whatever the axis; the curve has a gap."""
    rows = [
        {"step": step, "eval/loss": loss, "eval/perplexity": np.exp(loss), "eval/pearson": math.nan}
        for step, loss in ((0, 3.0), (2, math.nan), (4, math.inf), (6, 1.0))
    ]
    figure = curves(rows, best=6)
    drawn = lines(figure)
    for title, name in (("loss", "evaluation"), ("evaluation: perplexity", "perplexity")):
        np.testing.assert_array_equal(drawn[title][f"{name}, not finite"][:, 0], [2, 4])
        finite = drawn[title][name]
        assert np.isfinite(finite[:, 1]).tolist() == [True, False, False, True]
    assert len(drawn["evaluation"]["pearson, not finite"]) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO())


def test_a_perplexity_has_a_logarithmic_axis():
    rows = [{"step": i, "eval/loss": i, "eval/perplexity": math.exp(i)} for i in range(9)]
    scales = {ax.get_title(loc="left"): ax.get_yscale() for ax in curves(rows).axes if ax.axison}
    assert scales == {"loss": "linear", "evaluation: perplexity": "log"}


def test_the_time_left_counts_no_compilation(tmp_path, monkeypatch, capsys):
    """Nor an evaluation, nor a checkpoint: what the log is told to leave out."""
    now = [0.0]
    monkeypatch.setattr("train.run.log.time.monotonic", lambda: now[0])
    with Log(tmp_path, 100) as log:
        for step in range(1, 13):
            if step in (1, 5):
                with log.paused():
                    now[0] += 300.0
            now[0] += 1.0
            log.step(step, {"loss": 1.0}, tokens=50)
    line = r"step (\d+)/100: loss 1, (\d+) tokens/s, (.*) left"
    shown = re.findall(line, capsys.readouterr().err)
    assert shown and all(speed == "50" for _, speed, _ in shown)
    assert ("1", "50", "01:39") in shown


@pytest.mark.parametrize("count", [1, 400])
def test_curves_fit_their_axes(count):
    rows = [{"step": i, "loss": 1.0, "lr": 0.0} for i in range(1, count + 1)]
    figure = curves(rows)
    with io.BytesIO() as png:
        figure.savefig(png)
    for ax in figure.axes:
        assert ax.get_xlim()[0] < 1 and count < ax.get_xlim()[1] < 2 * count
    with pytest.raises(ValueError, match="no rows"):
        curves([])


def test_markdown_cells_cannot_break_the_table():
    assert table(["a|b"], [["c|d"]], markdown=True).splitlines() == [
        r"| a\|b |",
        "|---|",
        r"| c\|d |",
    ]
