"""Best-fit packing of several examples into each row."""

from __future__ import annotations

import bisect

import numpy as np


def pack(sizes: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Examples of each row, ``[N, n]`` filled up with -1: the longest first, where it fits best."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (tokens that a row can still take, its number), sorted
    order = np.random.default_rng(seed).permutation(len(sizes))
    for example in order[np.argsort(-sizes[order], kind="stable")].tolist():
        at = bisect.bisect_left(spaces, (sizes[example], 0))
        space, row = spaces.pop(at) if at < len(spaces) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(spaces, (space - int(sizes[example]), row))
    members = np.full((len(rows), max(map(len, rows))), -1)
    for row, examples in enumerate(rows):
        members[row, : len(examples)] = examples
    return members
