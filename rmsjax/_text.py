"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Lines with two spaces between columns, of which the first `left` are flush left and the others flush right."""
    rows = list(rows)
    extents = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        columns = enumerate(zip(row, extents, strict=True))
        return "  ".join(cell.ljust(n) if i < left else cell.rjust(n) for i, (cell, n) in columns).rstrip()

    return "\n".join(map(line, rows))
