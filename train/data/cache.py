"""The cache of ``datasets``, in which rows and examples are kept."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import datasets

from ..errors import InputError, first_line

VERSION = 3  # of what the cache holds: raise it when rows or examples are made in another way


def unusable(error: OSError) -> InputError:
    where = error.filename or datasets.config.HF_DATASETS_CACHE
    why = error.strerror or first_line(error)
    return InputError(f"the cache {where} cannot be used: {why}; HF_DATASETS_CACHE names another")


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(repr((VERSION, parts)).encode()).hexdigest()[:32]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the bars of ``datasets``, for as long as this lasts."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
