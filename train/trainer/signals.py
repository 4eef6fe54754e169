"""SIGINT and SIGTERM, which end a run after its state was saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StoppedNow(BaseException):
    """Raised by a signal where the work at hand can be thrown away."""


class Signals:
    """Notes SIGINT and SIGTERM instead of dying of them; the second one kills at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._raises = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
        if self._raises:
            raise StoppedNow

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises :class:`StoppedNow`."""
        self._raises = True
        try:
            if self.received is not None:
                raise StoppedNow
            yield
        finally:
            self._raises = False
