"""Numbers, tables and sentences in plain text, no wider than the terminal that they are printed to."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterable, Sequence


def _columns() -> int | None:
    """How many characters a line of the terminal has; None if it is no terminal, such as a pipe or a notebook."""
    return shutil.get_terminal_size(fallback=(0, 0)).columns or None


def wrapped(sentences: str) -> str:
    """Lines of at most 100 characters, fewer in a narrow terminal."""
    return textwrap.fill(sentences, min(100, _columns() or 100), break_on_hyphens=False)


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Lines with two spaces between columns, of which the first is flush left and the others flush right.

    Columns that do not fit into the terminal go below, beside the first column once more.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    extents = [max(map(len, column)) for column in columns]
    head, rest = columns[0], list(zip(columns[1:], extents[1:], strict=True))
    room = _columns()
    parts: list[list[tuple[list[str], int]]] = [[]]
    for column, extent in rest:
        taken = extents[0] + sum(2 + n for _, n in parts[-1])
        if parts[-1] and room and taken + 2 + extent > room:
            parts.append([])
        parts[-1].append((column, extent))

    def line(part: list[tuple[list[str], int]], i: int) -> str:
        return "  ".join([head[i].ljust(extents[0]), *(column[i].rjust(n) for column, n in part)])

    return "\n\n".join("\n".join(line(part, i) for i in range(len(head))) for part in parts)


def with_interval(mean: float, high: float) -> str:
    """A slope and its interval, which is symmetric."""
    return f"{mean:+z.2f} ±{high - mean:.2f}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def moves(factor: float) -> str:
    """What a value does that becomes so many times what it was."""
    if factor == 1 or math.isnan(factor):
        return "stays" if factor == 1 else "is not known"
    return f"{'falls' if factor < 1 else 'rises'} by a factor of {max(factor, 1 / factor):.3g}"
