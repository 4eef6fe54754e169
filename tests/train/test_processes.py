"""Several processes on this machine, joined by gloo: the same numbers as one, and a common end."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.train.forks import FORKS
from train import __main__ as program
from train.errors import InputError
from train.options import DeviceOptions
from train.parallel import processes
from train.parallel.mesh import make_layout
from train.run.folder import ADAPTER, CHECKPOINTS, REPORT, RESULT
from train.run.log import METRICS, read_metrics
from train.trainer import loop

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "train/tasks/arithmetic/tiny"
DEVICES = 4  # of all processes together
STEPS = 32
HEARTBEAT = 10  # seconds


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def flags(count: int) -> list[list[str]]:
    """What makes each of some processes one of them, as options."""
    if count == 1:
        return [[]]
    where = f"127.0.0.1:{port()}"
    return [
        ["--coordinator", where, "--num-processes", str(count), "--process-id", str(i)]
        for i in range(count)
    ]


def slurm(count: int) -> list[dict[str, str]]:
    """The same, as srun says it; the port is made of the job's number."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1"}
    step |= {"SLURM_NTASKS": str(count), "SLURM_STEP_NUM_NODES": "1"}
    return [step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]


def open_mpi(count: int) -> list[dict[str, str]]:
    """The same, as mpirun says it."""
    uri = f"{os.getpid() * 4096}.0;tcp://127.0.0.1:1"
    some = {"OMPI_MCA_orte_hnp_uri": uri, "OMPI_COMM_WORLD_SIZE": str(count)}
    return [
        some | {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)}
        for i in range(count)
    ]


class Started:
    """Processes of one run, and what they print."""

    def __init__(
        self,
        folder: Path,
        *more: str,
        options: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]] | None = None,
    ):
        count = len(options)
        given = {name: value for name, value in os.environ.items() if name != "HYPERADAPT_MESH"}
        number = f"device_count={DEVICES // count}"
        given["XLA_FLAGS"] = re.sub(r"device_count=\d+", number, given["XLA_FLAGS"])
        places = environments or [{}] * count
        outputs = Path(tempfile.mkdtemp(dir=folder.parent))
        self.said = [(outputs / f"{i}.out", outputs / f"{i}.err") for i in range(count)]
        self.all = [
            FORKS.Process(target=_run, args=(words(folder, *more, *own), {**given, **place}, files))
            for own, place, files in zip(options, places, self.said, strict=True)
        ]
        for process in self.all:
            process.start()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.all:
            process.kill()

    def until(self, folder: Path, step: int) -> Started:
        """Waits for a checkpoint of this step or a later one, while all run."""
        while max(saved(folder), default=0) < step:
            assert all(process.is_alive() for process in self.all), self.ended()
            time.sleep(0.01)
        return self

    def ended(self, seconds: float = 240) -> list[tuple[int, str, str]]:
        """Status, output and errors of each."""
        deadline, ends = time.monotonic() + seconds, []
        for process, (out, err) in zip(self.all, self.said, strict=True):
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, (out.read_text(), err.read_text())
            # What speaks for a process that could not comes after its end.
            while process.exitcode in (1, -signal.SIGABRT) and time.monotonic() < deadline:
                if "another process died" in err.read_text():
                    break
                time.sleep(0.05)
            ends.append((process.exitcode, out.read_text(), err.read_text()))
        return ends


def _run(words: list[str], environment: Mapping[str, str], files: tuple[Path, Path]) -> None:
    """The program, in a process of its own."""
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    processes.HEARTBEAT = HEARTBEAT
    sys.argv = ["train", *words]
    sys.exit(program.run())


def saved(folder: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return [int(path.name) for path in folder.glob(f"{CHECKPOINTS}/*") if path.name.isdecimal()]


def words(folder: Path, *more: str) -> list[str]:
    rows = folder.parent / "rows.jsonl"
    if not rows.exists():
        given = [
            {"question": f"a bus carries {n} people. {n % 7} get off.", "answer": str(n - n % 7)}
            for n in range(10, 50)
        ]
        rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    return [
        *("sft", "--model", str(TINY), "--data", str(rows), "--folder", str(folder)),
        *("--prompt", "{question}", "--answer", "{answer}", "--score", "exact"),
        *("--eval-rows", "6", "--questions", "3", "--max-new-tokens", "4", "--eval-batch-size=4"),
        *(
            "--mesh",
            "fsdp=2,tensor=2",
            "--steps",
            str(STEPS),
            "--batch-size",
            "6",
            "--max-length=64",
        ),
        *("--max-length=64", "--eval-every", "16", "--save-every", "4", *more),
    ]


def same(folder: Path, other: Path) -> None:
    """Two runs that ended alike: their metrics row by row, and their adapters."""
    rows, others = (read_metrics(run / METRICS) for run in (folder, other))
    assert len(rows) == len(others) > STEPS
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
    arrays, wanted = (
        load_file(run / ADAPTER / "adapter_model.safetensors") for run in (folder, other)
    )
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory, compiled_once) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    with Started(folder, options=flags(1)) as started:
        [(status, _, err)] = started.ended()
    assert status == 0, err
    return folder


def test_what_several_processes_begin_others_go_on_with_as_one_does(one, tmp_path):
    """Two by SLURM, of which one is killed; four by Open MPI, of which two are signalled; two."""
    folder = tmp_path / "run"
    with Started(folder, options=[[], []], environments=slurm(2)) as started:
        started.until(folder, 8).all[1].kill()
        killed = time.monotonic()
        first, second = started.ended()
        # A program waits longer than the tests for a sign of life, and ends within a minute too.
        assert time.monotonic() - killed < 60 - (processes.HEARTBEAT - HEARTBEAT)
    assert first[0] not in (0, 2) and second[0] == -signal.SIGKILL
    assert "another process died" in first[2] and "--resume" in first[2]
    assert not (folder / RESULT).exists()

    with Started(folder, "--resume", options=[[]] * 4, environments=open_mpi(4)) as started:
        started.until(folder, 16)
        os.kill(started.all[3].pid, signal.SIGTERM)
        os.kill(started.all[1].pid, signal.SIGINT)
        ends = started.ended(60)
    assert [status for status, *_ in ends] == [143, 130, 143, 143], ends
    assert "resumed after step" in ends[0][2]
    [said] = [line for line in ends[0][2].splitlines() if line.startswith("SIGTERM: saved after")]
    assert int(said.split()[4]) == max(saved(folder))
    assert not any("another process" in err for *_, err in ends)

    with Started(folder, "--resume", options=flags(2)) as started:
        first, second = started.ended()
    assert (first[0], second[0]) == (0, 0), (first, second)
    same(folder, one)
    assert {REPORT, RESULT} <= {path.name for path in folder.iterdir()}
    assert "trainable parameters" in first[1] and "loss" in first[2]
    assert "4 x cpu (cpu), in 2 processes" in (folder / REPORT).read_text()
    for said in second[1:]:  # the first one alone prints, but for what connects them
        assert all(line.startswith("[Gloo]") for line in said.splitlines())


def test_what_one_process_cannot_use_ends_all(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    (folder / "notes.txt").write_text("kept")
    with Started(folder, options=flags(2)) as started:
        ends = started.ended(90)
    assert [status for status, *_ in ends] == [2, 2], ends
    assert all("holds no run" in err for *_, err in ends)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]

    options = flags(2)
    options[1] += ["--data", str(tmp_path / "nowhere.jsonl")]
    with Started(other, options=options) as started:
        first, second = started.ended(90)
    assert second[0] == 2 and "nowhere.jsonl" in second[2]
    assert first[0] == 1 and "another process died" in first[2]
    assert not (other / METRICS).exists()


def test_a_mesh_has_all_devices_of_several_processes(monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)
    count = jax.device_count()
    with pytest.raises(InputError, match=f"--mesh data=2: it takes 2 of the {count} devices"):
        make_layout("data=2")


@pytest.mark.parametrize("recipe", ["compare", "export", "pretrain"])
def test_recipes_of_one_process_refuse_several(recipe, monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)
    module = importlib.import_module(f"train.recipes.{recipe}")
    with pytest.raises(InputError, match=f"{recipe} runs in one process"):
        module.run(None)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(coordinator="somewhere"), "--coordinator somewhere: give HOST:PORT"),
        (dict(coordinator="a:1", num_processes=2), "--num-processes needs --process-id too"),
        (dict(coordinator="a:1", process_id=0), "--process-id needs --num-processes too"),
        (dict(coordinator="a:1", num_processes=0, process_id=0), "--num-processes 0: give at"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "--process-id 2: give a number"),
        (dict(num_processes=2, process_id=0), "--num-processes needs --coordinator"),
    ],
)
def test_processes_that_cannot_be_meant_are_refused(given, message, monkeypatch):
    monkeypatch.delenv(processes.ADDRESS, raising=False)
    with pytest.raises(InputError, match=message):
        DeviceOptions(**given)


def test_a_cluster_is_known_by_its_environment():
    known = [*slurm(2), *open_mpi(3), {"TPU_WORKER_HOSTNAMES": "a,b"}, {processes.ADDRESS: "a:1"}]
    assert all(map(processes.in_cluster, known))
    none = [{}, *slurm(1), *open_mpi(1), {"TPU_WORKER_HOSTNAMES": "a"}]
    assert not any(map(processes.in_cluster, none))
    batch = {name: x for name, x in slurm(2)[0].items() if "STEP" not in name}
    assert not processes.in_cluster(batch)  # the script of a job, before srun


def test_several_ask_the_first_one_whether_too_much_would_be_lost(monkeypatch):
    """About once in ten seconds, and do what it says, whatever their own clocks say."""
    said = []

    def agreed(*numbers):
        said.append(numbers)
        return (1, numbers[1])

    def session(done, ask=0, timed=(2.0, 10), since=0.0):
        log = types.SimpleNamespace(timed=timed)
        began = time.monotonic() - since
        return types.SimpleNamespace(done=done, _ask=ask, _saved=began, log=log, steps=1000)

    late = loop._Session._late
    assert not late(session(5)) and late(session(5, since=loop.SAVE_SECONDS))  # alone, at any step
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "agreed", agreed)
    one = session(5)
    assert late(one) and said == [(False, 50)] and one._ask == 55  # 0.2 seconds a step
    assert not late(session(54, ask=55, since=loop.SAVE_SECONDS)) and len(said) == 1
    assert late(session(5, timed=(0.0, 0))) and said[-1] == (False, 1)
    assert late(session(5, timed=(90.0, 3))) and said[-1] == (False, 1)


def test_alone_each_agrees_with_itself():
    said = itertools.count()
    processes.on_first(lambda: next(said) and None)
    processes.wait()
    assert next(said) == 1 and processes.agreed(3, 4) == (3, 4) and processes.first()
    processes.alone("compare")
    with pytest.raises(InputError, match="no"):
        processes.on_first(lambda: (_ for _ in ()).throw(InputError("no")))
