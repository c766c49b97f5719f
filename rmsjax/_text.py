"""Numbers and tables in plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Lines with two spaces between columns, of which the first is flush left and the others flush right."""
    rows = list(rows)
    extents = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        columns = enumerate(zip(row, extents, strict=True))
        return "  ".join(cell.rjust(n) if i else cell.ljust(n) for i, (cell, n) in columns)

    return "\n".join(map(line, rows))


def with_interval(mean: float, high: float) -> str:
    """A slope and its interval, which is symmetric."""
    return f"{mean:+z.2f} ±{high - mean:.2f}"
