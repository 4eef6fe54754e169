"""SIGINT and SIGTERM, which end a run after its state was saved; of several processes, all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from ..parallel import processes


class StoppedNow(BaseException):
    """Raised by a signal where the work at hand can be thrown away."""


class Signals:
    """Notes SIGINT and SIGTERM instead of dying of them; the second one kills at once.

    Attributes:
      received: the signal by which this process is to stop.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._raises = False
        # Of several processes, JAX notes SIGTERM, and they agree on where to stop.
        self._several, self._asked, self._agreed = processes.several(), 0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *(() if self._several else (signal.SIGTERM,))):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._raises:
            raise StoppedNow

    def due(self) -> bool:
        """Whether to stop here; several processes have to ask at the same places."""
        if not self._several:
            return self.received is not None
        if not self._agreed:
            self._asked += 1
            self._agreed = processes.stop_point(self._asked)
        if self._agreed and self.received is None:
            self.received = signal.SIGTERM
        return self._agreed

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises :class:`StoppedNow`; not in one of several processes."""
        self._raises = True
        try:
            if self.received is not None and not self._several:
                raise StoppedNow
            yield
        finally:
            self._raises = False
