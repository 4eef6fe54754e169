"""Plain-text tables and lists, for the reports and errors that people read."""

from __future__ import annotations

from collections.abc import Sequence


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    right: str = "",
    *,
    markdown: bool = False,
) -> str:
    """Returns a table, aligned or in Markdown; columns whose header is in ``right`` align right.

    >>> print(table(["weight", "n"], [["q", 12], ["gate", 3]], right="n"))
    weight   n
    q       12
    gate     3
    >>> print(table(["weight", "n"], [["q", 12]], right="n", markdown=True))
    | weight | n |
    |---|---:|
    | q | 12 |
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    if markdown:
        marks = ["---:" if name in right.split() else "---" for name in header]
        lines = ["| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in cells]
        return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    to_right = [name in right.split() for name in header]
    lines = []
    for row in cells:
        aligned = zip(row, widths, to_right, strict=True)
        lines.append("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in aligned).rstrip())
    return "\n".join(lines)


def first_few(items: Sequence[object], most: int, separator: str = ", ") -> str:
    """Returns the first items, and how many more there are.

    >>> first_few(["q", "k", "v", "o"], 2)
    'q, k and 2 more'
    """
    shown = separator.join(map(str, items[:most]))
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown
