"""A table of RMS norms to read in a log or a notebook; `rmsjax.rms_by_path` gives the same numbers to a dashboard."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rmsjax._reduce import UNMAPPED
from rmsjax._text import text_table
from rmsjax._tree import Scope, group, is_state, leaf_paths, measure

if TYPE_CHECKING:
    from jaxtyping import PyTree

__all__ = ["RMSReport", "RMSRow", "rms_report"]


class RMSRow(NamedTuple):
    """One line of a report. `rms` has several entries where a leaf has several norms; the rest is None if unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms_report
        >>> row = rms_report({"w": jnp.full((2, 2), 3.0)})[0]
        >>> print(row.path, row.shape, row.dtype, row.rms, row.clipped)
        w (2, 2) float32 [3.] None
    """

    path: str
    shape: tuple[int, ...] | None
    dtype: str | None
    rms: np.ndarray[Any, np.dtype[np.float64]]
    clipped: np.ndarray[Any, np.dtype[np.float64]] | None = None


class RMSReport(Sequence[RMSRow]):
    """The lines of a report: a sequence of `RMSRow` that prints, and that a notebook shows, as a table.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms_report
        >>> report = rms_report({"b": jnp.zeros(2), "w": jnp.ones(2)})
        >>> len(report), report[-1].path
        (2, 'w')
        >>> report[1:]
        path  shape    dtype  rms
        w      (2,)  float32    1
    """

    def __init__(self, rows: Iterable[RMSRow]) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return RMSReport(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def _table(self) -> list[list[str]]:
        """Header and lines; a column that is None everywhere is left out."""
        columns = {
            "path": [row.path for row in self._rows],
            "shape": [None if row.shape is None else str(row.shape) for row in self._rows],
            "dtype": [row.dtype for row in self._rows],
            "rms": [_range("{:.3g}", row.rms) for row in self._rows],
            "clipped": [None if row.clipped is None else _range("{:.1%}", row.clipped) for row in self._rows],
        }
        kept = {name: cells for name, cells in columns.items() if name in ("path", "rms") or any(cells)}
        return [list(kept), *([cell or "" for cell in line] for line in zip(*kept.values(), strict=True))]

    def __repr__(self) -> str:
        return "\n".join(map(str.rstrip, text_table(self._table()).splitlines()))

    def _repr_html_(self) -> str:
        head, *body = [[html.escape(cell) for cell in line] for line in self._table()]
        header = "".join(f"<th>{cell}</th>" for cell in head)
        lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in body)
        return f"<table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table>"


def rms_report(
    tree: PyTree, scope: Scope = "block", *, order: Literal["tree", "worst"] = "tree", sep: str = "/"
) -> RMSReport:
    """A readable table of the RMS norms in a tree, or of those that an optimizer's state has recorded.

    Args:
        tree: parameters, gradients, an `nnx.State`: its leaves are measured. If it holds states of rmsjax's
            transformations, such as the state of an optax chain, what these recorded is shown instead, with the share
            of updates that were clipped; scope then has no say.
        scope: as in `tree_rms`. Of a leaf with several norms the table shows the least and the largest.
        order: "tree" keeps the order of the leaves. "worst" puts norms first that are not finite, then those that are
            by the largest factor above or below the median: of all norms of the tree, or of those in the same field of
            the same state, since gradients have another size than parameters or ratios. Leaves without elements, of
            which a norm says nothing, come last (a state has its norm alone, and 0 is far from the median).
        sep: what separates the parts of a path.

    Returns:
        A sequence of lines (path, shape, dtype, rms, clipped) that prints as a table, in a notebook as HTML.

    Raises:
        TypeError: the tree is traced: under `jit` use `rms_by_path`; and what `tree_rms` raises.
        ValueError: order is not one of the two; and what `tree_rms` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms_report
        >>> params = {"in": jnp.full((64, 32), 0.1), "out": jnp.full((32, 10), 12.0), "scale": jnp.full(32, 0.2)}
        >>> rms_report(params, order="worst")
        path      shape    dtype  rms
        out    (32, 10)  float32   12
        in     (64, 32)  float32  0.1
        scale     (32,)  float32  0.2

    Source: paths as `jax.tree_util.keystr` writes them; one line a tensor as in `flax.linen.tabulate`.
    """
    if order not in ("tree", "worst"):
        raise ValueError(f"rms_report: order must be 'tree' or 'worst', got {order!r}")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError("rms_report: the tree must have values, not tracers; under jit use rms_by_path")
    alike = [*_recorded(tree, sep)] or [[*_measured(tree, scope, sep)]]
    ranked = [(badness, row) for rows in alike for badness, row in zip(_badness(rows), rows, strict=True)]
    if order == "worst":
        ranked.sort(key=lambda entry: entry[0], reverse=True)
    return RMSReport(row for _, row in ranked)


def _measured(tree: PyTree, scope: Scope, sep: str) -> Iterator[RMSRow]:
    grouping = group("rms_report", tree, scope)
    norms = grouping.tree(measure(grouping, UNMAPPED))
    if grouping.is_global:
        yield RMSRow("all", None, None, _flat(norms))
        return
    for path, leaf, norm in zip(leaf_paths(tree, sep), jax.tree.leaves(tree), jax.tree.leaves(norms), strict=True):
        yield RMSRow(path, jnp.shape(leaf), str(jnp.result_type(leaf)), _flat(norm))


def _recorded(tree: PyTree, sep: str) -> Iterator[list[RMSRow]]:
    """What the states in a tree have recorded, field by field; a path leads to the state, the field and the leaf."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_state)[0]
    for path, state in nodes:
        if not is_state(state):
            continue
        prefix = jax.tree_util.keystr(path, simple=True, separator=sep)
        for i, field in enumerate(state.norm_fields):
            norms = getattr(state, field)
            paths = [sep.join(part for part in (prefix, field, leaf) if part) for leaf in leaf_paths(norms, sep)]
            shares = jax.tree.leaves(getattr(state, "share_clipped", None)) if i == 0 else []
            yield [
                RMSRow(path, None, None, _flat(norm), None if share is None else _flat(share))
                for path, norm, share in itertools.zip_longest(paths, jax.tree.leaves(norms), shares)
            ]


def _flat(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.ravel(np.asarray(values, np.float64))


def _range(form: str, values: np.ndarray[Any, Any]) -> str:
    """The one value, or the least and the largest; NaN if there is one among them."""
    if not values.size:
        return "-"
    least, largest = (form.format(bound) for bound in (values.min(), values.max()))
    return least if least == largest else f"{least} to {largest}"


def _badness(rows: Sequence[RMSRow]) -> list[tuple[bool, float]]:
    """For each row whether a norm is not finite, and the logarithm of the largest factor to the median of all rows.

    -1 for a leaf without elements: below the 0 of a norm that is the median.
    """
    norms = np.concatenate([row.rms for row in rows]) if rows else np.zeros(0)
    usual = norms[np.isfinite(norms) & (norms > 0)]
    median = float(np.median(usual)) if usual.size else 1.0

    def badness(row: RMSRow) -> tuple[bool, float]:
        if row.rms.size == 0 or 0 in (row.shape or ()):
            return False, -1.0
        finite = bool(np.isfinite(row.rms).all())
        factors = [abs(math.log(r / median)) if r else math.inf for r in row.rms] if finite else []
        return not finite, max(factors, default=0.0)

    return [badness(row) for row in rows]
