"""A run that was stopped at any moment and resumed is, bit for bit, one that never stopped."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.train import tiny
from tests.train.forks import FORKS
from train.data.batches import Batches
from train.run import log
from train.run.folder import ADAPTER
from train.trainer import loop
from train.trainer.checkpoints import Checkpoints
from train.trainer.optimizer import make_optimizer
from train.trainer.signals import Signals
from train.trainer.step import start

STEPS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    tiny.fit(model, folder, steps=STEPS, save_every=3)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """What a run computed: its metrics and its adapter."""
    files = [folder / log.METRICS, *sorted((folder / ADAPTER).iterdir())]
    return {file.name: file.read_bytes() for file in files}


def test_the_adapter_is_the_best_checkpoint(whole):
    rows = log.read_metrics(whole / log.METRICS)
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert list(losses) == list(range(0, STEPS + 1, 5))
    assert min(losses, key=losses.get) > 0
    with Checkpoints(whole) as checkpoints:
        assert set(checkpoints.steps) == {STEPS - 3, STEPS, min(losses, key=losses.get)}


def test_a_checkpoint_holds_no_base(model, whole):
    files = (whole / "checkpoints" / f"{STEPS}").rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    # Three numbers for each that trains, and what Orbax writes around them; here that is more.
    assert size < 12 * tiny.task(model).tuning.count + 60_000


@pytest.mark.parametrize(
    "moment, number",
    [(3, signal.SIGINT), (7, signal.SIGTERM), (10, signal.SIGTERM)],
    ids=["on_a_checkpoint", "between_two", "while_evaluating"],
)
def test_a_signal_saves_and_the_rest_is_equal(model, whole, tmp_path, moment, number):
    folder = tmp_path / "run"
    folder.mkdir()
    plain = tiny.task(model)

    class Stopping(Batches):
        def __getitem__(self, i):
            if i == moment and moment != 10:
                os.kill(os.getpid(), number)
            return super().__getitem__(i)

    def evaluate(trainable):
        if moment == 10 and len(evaluated) == 2:
            os.kill(os.getpid(), number)
        evaluated.append(1)
        return plain.evaluate(trainable)

    evaluated = []
    stopping = Stopping(tiny.examples(), 8, lengths=[8, 16], epochs=100)
    task = tiny.task(model, batches=stopping, evaluate=evaluate)
    before = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match=r"saved after step \d+ of 60") as stopped:
        loop.fit(
            task,
            folder,
            optimizer=tiny.OptimizerOptions(lr=3e-2),
            run=tiny.run(folder, steps=STEPS, save_every=3),
        )
    assert stopped.value.number == number
    assert signal.getsignal(number) is before
    assert not (folder / ADAPTER).exists()
    tiny.fit(model, folder, steps=STEPS, save_every=3, resume=True)
    assert contents(folder) == contents(whole)


def test_a_second_signal_kills_at_once():
    """In a process of its own: the first is noted, the second ends it by that very signal."""
    ready = FORKS.Event()
    child = FORKS.Process(target=_hang, args=(ready,))
    child.start()
    assert ready.wait(60)
    os.kill(child.pid, signal.SIGINT)
    child.join(0.5)
    assert child.exitcode is None
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode == -signal.SIGINT


def _hang(ready) -> None:
    with Signals() as signals:
        ready.set()
        while True:
            time.sleep(0.05 if signals.received else 0.01)


class Deadly(Batches):
    """Batches of which one kills the process, some time after it was asked for."""

    fatal, delay = -1, 0.0

    def __getitem__(self, i):
        if i == self.fatal:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return super().__getitem__(i)


def _run(model: Path, folder: Path, fatal: int, delay: float) -> None:
    folder.mkdir(exist_ok=True)
    batches = Deadly(tiny.examples(), 8, lengths=[8, 16], epochs=100)
    batches.fatal, batches.delay = fatal, delay
    loop.fit(
        tiny.task(model, batches=batches),
        folder,
        optimizer=tiny.OptimizerOptions(lr=3e-2),
        run=tiny.run(folder, steps=STEPS, save_every=3, resume=True),
    )


@pytest.mark.slow
def test_kill_nine_at_ten_random_moments(model, whole, tmp_path):
    """Every checkpoint that a kill leaves can be read, and the last run ends as if none was."""
    folder, rng, reached = tmp_path / "run", random.Random(0), [0]
    like = _state(tiny.task(model))
    for _ in range(10):
        moment = reached[-1] + rng.randint(1, 9), rng.uniform(0.0, 0.5)
        child = FORKS.Process(target=_run, args=(model, folder, *moment))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with Checkpoints(folder) as checkpoints:
            for step in checkpoints.steps:
                assert int(checkpoints.restore(like, step)[0].step) == step
            reached.append(max(checkpoints.steps, default=0))
    assert reached == sorted(reached)
    assert len(set(reached)) > 3
    tiny.fit(model, folder, steps=STEPS, save_every=3, resume=True)
    assert contents(folder) == contents(whole)


def _state(task: loop.Job):
    return start(task.tuning, make_optimizer(tiny.OptimizerOptions(), task.tuning, STEPS), 0)
