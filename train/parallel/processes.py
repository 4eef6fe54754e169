"""Several processes that run one program on one mesh: JAX's own multi-controller SPMD.

Each holds some of the devices, and all do the same in the same order, on the same data, of which
each device gets its own slices. The first process alone writes files and prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..errors import InputError, first_line

START = 300  # seconds in which all processes have to come
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
LEAVE = 20  # seconds in which all have to leave after the first one did

ADDRESS = "JAX_COORDINATOR_ADDRESS"  # in the environment; JAX reads it too

_ERROR_BYTES = 4096  # of an error's text that the others hear


def check(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Refuses what :func:`join` cannot use.

    Raises:
      InputError: says which option, and what to give.
    """
    if coordinator is not None and not re.fullmatch(r"auto|[^\s/]+:[0-9]{1,5}", coordinator):
        raise InputError(
            f"--coordinator {coordinator}: give HOST:PORT of the first process, or auto"
        )
    if (count is None) != (index is None):
        one, other = "--num-processes", "--process-id"
        given, lacks = (one, other) if index is None else (other, one)
        raise InputError(f"{given} needs {lacks} too")
    if count is None or index is None:
        return
    if count < 1:
        raise InputError(f"--num-processes {count}: give at least 1")
    if not 0 <= index < count:
        raise InputError(f"--process-id {index}: give a number from 0 to {count - 1}")
    if coordinator is None and ADDRESS not in os.environ and count > 1:
        raise InputError("--num-processes needs --coordinator HOST:PORT of the first process")


@dataclasses.dataclass(frozen=True)
class Member:
    """This process, as one of several.

    Attributes:
      witness: a small process that speaks where this one could not: JAX ends a process from inside,
        at once, when another one is dead, and nothing in Python runs then. But a pipe to a child
        closes.
    """

    witness: subprocess.Popen[bytes]

    def leave(self, status: int) -> None:
        """Ends this process's part with an exit status, with the others where they end too."""
        self.dismiss()
        if status == 0 or status > 128:  # done, or stopped by a signal, as all are
            with contextlib.suppress(RuntimeError):
                jax.distributed.shutdown()
            return
        # It may be this one's alone: the others would be waited for in vain. What they are
        # connected to ends with the first one, so they say first why they end.
        self._end(status, seconds=2 if first() else 0)

    def dismiss(self) -> None:
        """Lets the witness go, without a word."""
        with contextlib.suppress(OSError):
            self.witness.communicate(b"done\n")

    def fall(self) -> NoReturn:
        """Ends this process, which cannot go on without another; the witness says so."""
        self._end(1, seconds=0)

    def _end(self, status: int, seconds: float) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(seconds)
        os._exit(status)


def join(
    coordinator: str | None, count: int | None, index: int | None, *, saves: bool, farewell: str
) -> Member | None:
    """Makes this process one of several, where the options or the environment say that it is one.

    Call it before JAX knows its devices, with what :func:`check` takes.

    Args:
      coordinator: ``HOST:PORT`` of the first process; "auto" lets JAX find all by itself, as on a
        TPU pod slice. If not given, the environment of SLURM, Open MPI or GKE says it.
      count: of processes, if the environment does not say it.
      index: of this one, from 0 on.
      saves: whether a SIGTERM to one of them is noted, for :func:`stop_point`; it ends this process
        at once if not.
      farewell: what to print where this process ends without a word, since another one died.

    Raises:
      InputError: the processes do not find each other.
    """
    if jax.distributed.is_initialized() or not (coordinator or in_cluster(os.environ)):
        return None
    jax.config.update("jax_enable_preemption_service", saves)
    script = f"trap '' INT TERM; read -r done || printf '%s\\n' {shlex.quote(farewell)} >&2"
    member = Member(subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE))
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            count,
            index,
            initialization_timeout=START,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LEAVE,
        )
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        member.dismiss()
        raise InputError(
            f"--coordinator: the processes do not find each other: {first_line(error)} Start all"
            " of them with one --coordinator HOST:PORT and --num-processes, and each with its own"
            " --process-id"
        ) from error
    return member


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of one of several processes, as JAX can read it.

    >>> in_cluster({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})  # of a batch script, not of srun
    False
    """

    def above_one(name: str) -> bool:
        return environment.get(name, "1").strip() not in ("", "0", "1")

    slurm = above_one("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment
    mpi = above_one("OMPI_COMM_WORLD_SIZE")
    gke = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    return slurm or mpi or gke or ADDRESS in environment


def several() -> bool:
    """Whether this is one of several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes and prints: the only one, or the first of several."""
    return not several() or jax.process_index() == 0


def alone(recipe: str) -> None:
    """Refuses several processes.

    Raises:
      InputError: there are several.
    """
    if several():
        raise InputError(f"{recipe} runs in one process: start it once, without --coordinator")


def on_first(action: Callable[[], None]) -> None:
    """Does something in the first process, for which all others wait.

    Raises:
      InputError: the action did; in all processes.
    """
    error: InputError | None = None
    if first():
        try:
            action()
        except InputError as found:
            error = found
    if several():
        text = np.frombuffer(str(error or "").encode()[:_ERROR_BYTES], np.uint8)
        text = np.pad(text, (0, _ERROR_BYTES - len(text)))
        heard = np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8)
        if heard.any() and error is None:
            error = InputError(bytes(heard[heard > 0]).decode(errors="replace"))
    if error is not None:
        raise error


def wait() -> None:
    """Waits until all processes are here."""
    if several():
        multihost_utils.sync_global_devices("wait")


def agreed(*numbers: int) -> tuple[int, ...]:
    """The first process's numbers, in all of them."""
    if not several():
        return numbers
    heard = multihost_utils.broadcast_one_to_all(np.asarray(numbers, np.int32))
    return tuple(np.asarray(heard).tolist())


def stop_point(number: int) -> bool:
    """Whether a SIGTERM came to one of several processes, and they are to stop here.

    All of them have to ask, with the same numbers, from 1 on: it is true at one and the same
    number, which none of them has gone beyond.
    """
    return multihost_utils.reached_preemption_sync_point(number)


def fetch(tree: Any) -> Any:
    """A tree's arrays on the host, whole, whichever processes hold them; all have to call it.

    >>> fetch({"x": jax.numpy.ones(2)})
    {'x': array([1., 1.], dtype=float32)}
    """
    return multihost_utils.process_allgather(tree, tiled=True)
