"""A table of RMS norms to read in a log or a notebook; `rmsjax.rms_by_path` gives the same numbers to a dashboard."""

from __future__ import annotations

import html
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rmsjax._by_path import Layers, Stacked, interleaved, named_norms
from rmsjax._checks import described
from rmsjax._text import text_table
from rmsjax._tree import Scope, is_state, leaf_paths

if TYPE_CHECKING:
    from jaxtyping import PyTree

__all__ = ["RMSReport", "RMSRow", "rms_report"]


class RMSRow(NamedTuple):
    """One line of a report. `rms` has several entries where a leaf has several norms; the rest is None if unknown.

    `clipped`: the share of updates that were clipped, for each norm. `share`: the share of the leaf in the square of
    the norm of the whole tree, so 1 in all lines together: the leaf that makes that norm large has most of it.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms_report
        >>> row = rms_report({"w": jnp.full((2, 2), 3.0)})[0]
        >>> print(row.path, row.shape, row.dtype, row.rms, row.share, row.clipped)
        w (2, 2) float32 [3.] 1.0 None
    """

    path: str
    shape: tuple[int, ...] | None
    dtype: str | None
    rms: np.ndarray[Any, np.dtype[np.float64]]
    clipped: np.ndarray[Any, np.dtype[np.float64]] | None = None
    share: float | None = None


class RMSReport(Sequence[RMSRow]):
    """The lines of a report: a sequence of `RMSRow` that prints, and that a notebook shows, as a table.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms_report
        >>> report = rms_report({"b": jnp.zeros(2), "w": jnp.ones(2)})
        >>> len(report), report[-1].path
        (2, 'w')
        >>> report[1:]
        path  shape    dtype  rms   share
        w      (2,)  float32    1  100.0%
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
            "share": [None if row.share is None else f"{row.share:.1%}" for row in self._rows],
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
    tree: PyTree,
    scope: Scope = "block",
    *,
    order: Literal["tree", "worst"] = "tree",
    sep: str = "/",
    stacked: Stacked = (),
    params: PyTree | None = None,
) -> RMSReport:
    """A readable table of the RMS norms in a tree, or of those that an optimizer's state has recorded.

    Args:
        tree: parameters, gradients, an `nnx.State`: its leaves are measured, and the share that each has in the square
            of the norm of the whole says which of them makes that large. If it holds states of rmsjax's
            transformations, such as the state of an optax chain, what these recorded is shown instead, with the share
            of updates that were clipped; scope then has no say.
        scope: as in `tree_rms`. Of a leaf with several norms the table shows the least and the largest.
        order: "tree" keeps the order of the leaves. "worst" puts norms first that are not finite, then those that are
            by the largest factor above or below the median: of all norms of the tree, or of those in the same field of
            the same state, since gradients have another size than parameters or ratios. Leaves without elements, of
            which a norm says nothing, come last (a state has its norm alone, and 0 is far from the median).
        sep: what separates the parts of a path.
        stacked: the path of what holds stacked layers, as in `rms_by_path`: each layer has a line of its own, also of
            norms that were recorded for each layer. Of these it is the path of the parameters, without that of a state.
        params: the parameters, or their shapes, that recorded norms of updates belong to. These then have their shares
            as well; but leaves with exactly the same norm have none, since a label may have pooled them.

    Returns:
        A sequence of lines (path, shape, dtype, rms, share, clipped) that prints as a table, in a notebook as HTML.
        Leaves that the scope pools under a label have one line, with the label as path.

    Raises:
        TypeError: the tree is traced: under `jit` use `rms_by_path`; and what `tree_rms` raises.
        ValueError: order is not one of the two; params, but the tree holds no states; and what `tree_rms` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms_report
        >>> params = {"in": jnp.full((64, 32), 0.1), "out": jnp.full((32, 10), 12.0), "scale": jnp.full(32, 0.2)}
        >>> rms_report(params, order="worst")
        path      shape    dtype  rms   share
        out    (32, 10)  float32   12  100.0%
        in     (64, 32)  float32  0.1    0.0%
        scale     (32,)  float32  0.2    0.0%

    Source: paths as `jax.tree_util.keystr` writes them; one line a tensor as in `flax.linen.tabulate`.
    """
    if order not in ("tree", "worst"):
        raise ValueError(f"rms_report: order must be 'tree' or 'worst', got {order!r}")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError("rms_report: the tree must have values, not tracers; under jit use rms_by_path")
    recorded = [*_recorded(tree, sep, stacked, params)]
    if params is not None and not recorded:
        raise ValueError(
            "rms_report: params go with a tree that holds states of rmsjax's transformations, got "
            f"{described(tree)} without any; pass the optimizer's state, or leave params out"
        )
    alike = recorded or [[*_measured(tree, scope, sep, stacked)]]
    ranked = [(badness, row) for rows in alike for badness, row in zip(_badness(rows), rows, strict=True)]
    if order == "worst":
        ranked.sort(key=lambda entry: entry[0], reverse=True)
    return RMSReport(row for _, row in ranked)


def _measured(tree: PyTree, scope: Scope, sep: str, stacked: Stacked) -> Iterator[RMSRow]:
    norms = [*named_norms("rms_report", tree, scope, sep, stacked)]
    shares = _shares([(_flat(named.norm), named.count) for named in norms])
    for (path, norm, count, leaf), share in zip(norms, shares, strict=True):
        known = (None, None) if leaf is None else (leaf.shape, str(leaf.dtype))
        yield RMSRow(path, *known, _flat(norm if count else ()), share=share)


def _shares(norms: Sequence[tuple[np.ndarray[Any, Any], int]]) -> list[float]:
    """The share of each in the square of all, from norms in units of the largest, since squares may overflow.

    With each norm, or norms, comes the number of elements.
    """
    largest = max((float(np.max(norm)) for norm, count in norms if count), default=0.0) or 1.0
    with np.errstate(invalid="ignore"):  # inf/inf
        parts = [count and count * float(np.mean(np.square(norm / largest))) for norm, count in norms]
    total = math.fsum(parts) or 1.0
    return [part / total for part in parts]


def _recorded(tree: PyTree, sep: str, stacked: Stacked, params: PyTree) -> Iterator[list[RMSRow]]:
    """What the states in a tree have recorded, field by field; a path leads to the state, the field and the leaf."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_state)[0]
    states = [(jax.tree_util.keystr(path, simple=True, separator=sep), node) for path, node in nodes if is_state(node)]
    fields = [(prefix, state, field) for prefix, state in states for field in state.norm_fields]
    everywhere = [path for _, state, field in fields for path in leaf_paths(getattr(state, field), sep)]
    layers = Layers("rms_report", stacked if fields else (), sep, everywhere)
    sizes = dict(zip(leaf_paths(params, sep), map(np.size, jax.tree.leaves(params)), strict=True))
    for prefix, state, field in fields:
        norms = getattr(state, field)
        paths, values = leaf_paths(norms, sep), [np.asarray(norm) for norm in jax.tree.leaves(norms)]
        clipped = jax.tree.leaves(getattr(state, "share_clipped", None)) if field == state.norm_fields[0] else []
        lines = itertools.zip_longest(paths, values, clipped)
        rows = [*interleaved(_by_layer(layers, *line, sizes) for line in lines)]
        known = field == "rms" and all(count is not None for *_, count in rows)  # a ratio has no share in anything
        shares = _shares([(norm, count or 0) for _, norm, _, count in rows]) if known else [None] * len(rows)
        times = Counter(norm.tobytes() for norm in values if norm.any())
        pooled = {path for path, norm in zip(paths, values, strict=True) if times[norm.tobytes()] > 1}
        yield [
            RMSRow(
                sep.join(filter(None, (prefix, field, path))),
                None,
                None,
                norm,
                share_clipped,
                None if path in pooled else share,
            )
            for (path, norm, share_clipped, _), share in zip(rows, shares, strict=True)
        ]


def _by_layer(
    layers: Layers, path: str, norm: Any, clipped: Any, sizes: Mapping[str, int]
) -> tuple[str | None, list[tuple[str, Any, Any, int | None]]]:
    """The stack that a leaf is in, if any; and path, norms, shares clipped and size of the leaf, or of its layers."""
    stack = layers.prefix(path) if jnp.ndim(norm) else None  # one number is that of all layers together
    size = sizes.get(path)
    if stack is None:
        return None, [(path, _flat(norm), None if clipped is None else _flat(clipped), size)]
    axis = layers.axis(path, norm.shape)
    names = [layers.name(path, k) for k in range(norm.shape[axis])]
    norms = map(_flat, np.moveaxis(np.asarray(norm), axis, 0))
    shares = [None] * len(names) if clipped is None else map(_flat, np.moveaxis(np.asarray(clipped), axis, 0))
    each = itertools.repeat(None if size is None else size // max(1, len(names)), len(names))
    return stack, [*zip(names, norms, shares, each, strict=True)]


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
        if row.rms.size == 0:
            return False, -1.0
        finite = bool(np.isfinite(row.rms).all())
        factors = [abs(math.log(r / median)) if r else math.inf for r in row.rms] if finite else []
        return not finite, max(factors, default=0.0)

    return [badness(row) for row in rows]
