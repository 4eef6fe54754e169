"""Devices that need not exist: a process of its own, whose CPU XLA takes for as many as are asked.

How many devices there are is settled when JAX first looks for them, so that no process that has run
anything can have more.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..errors import InputError

_COUNT = re.compile(r"--xla_force_host_platform_device_count=\S*")


@contextlib.contextmanager
def fake_devices(count: int, flags: str = "") -> Iterator[Callable[..., Any]]:
    """A function ``call(fn, *args)``, which runs ``fn(*args)`` where there are so many devices.

    Function, arguments and result are pickled; what ``fn`` raises is raised here.

    Args:
      count: of the devices.
      flags: more of XLA's, as the environment variable ``XLA_FLAGS`` has them.

    Raises:
      InputError: the process was killed, as where there is too little memory.

    >>> with fake_devices(3) as call:
    ...     call(jax.device_count)
    3
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, _begin, (count, flags)) as pool:

        def call(fn: Callable[..., Any], *args: Any) -> Any:
            try:
                return pool.submit(fn, *args).result()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise InputError(
                    f"the process that compiles for {count} devices was killed: there may be too"
                    " little memory"
                ) from error

        yield call


def _begin(count: int, flags: str) -> None:
    """Settles what devices the process has, before JAX looks for them."""
    kept = _COUNT.sub("", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{kept} {flags}".strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    # A program out of a cache may lack its text.
    jax.config.update("jax_enable_compilation_cache", False)
