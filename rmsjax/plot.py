"""Pictures of records: the coordinate check, RMS over training, layer by step, RMS beside L2 over width.

Draws what `coord_check`, `compare_widths` or a training loop recorded, and computes nothing. Lines differ in colour
(Okabe and Ito's, which colour-blind people can tell apart), in marker and in dashes, so they survive a black-and-white
print. Figures are made without pyplot, so none stays open; a notebook shows one that a cell ends with.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from matplotlib.lines import Line2D

    from rmsjax._coord_check import WidthRecord

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "os^Dv<>PX"
_DASHES = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_NAMES = {"rms": "RMS of the activation", "change": "RMS of the change since step 0"}
_READABLE = 12  # steps in a heat map, above which numbers in its cells would overlap


def coord_check(
    record: WidthRecord, *, quantity: Literal["rms", "change"] = "change", steps: Sequence[int] | None = None
) -> Figure:
    """The coordinate check: a panel for each step, RMS against width, a line for each layer.

    Lines are geometric means over seeds. The legend gives their slopes at the last step shown, with the 95 % interval
    over seeds. In a width-neutral parametrisation the lines are level.

    Args:
        record: what `rmsjax.coord_check` returned.
        quantity: "change", the RMS of the change since step 0, or "rms", that of the activation.
        steps: the steps to show; by default all (of the change, which is 0 at step 0, those after it).

    Returns:
        The figure.

    Raises:
        ValueError: a step that was not recorded, or no step to show.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmsjax
        >>> record = rmsjax.WidthRecord.load("check.npz")  # doctest: +SKIP
        >>> rmsjax.plot.coord_check(record).savefig("check.png")  # doctest: +SKIP

    Source: Yang et al. (arXiv 2203.03466), appendix D.1.
    """
    shown = list(range(0 if quantity == "rms" else 1, record.steps + 1)) if steps is None else list(steps)
    if not shown or not all(0 <= step <= record.steps for step in shown):
        raise ValueError(f"plot.coord_check: steps must be some of 0 to {record.steps}, got {shown}")
    means, slopes = record.over_seeds(quantity), record.slopes(quantity)
    lines, at = _distinct(record.layers, np.moveaxis(means, -1, 0)), shown[-1]
    ends = [(slopes.mean[at, k], slopes.high[at, k]) for k in lines.values()]
    labels = _columns(lines, [f"{mean:+z.2f} ±{high - mean:.2f}" for mean, high in ends])
    figure, panels = _panels(len(shown), labels)
    chosen = means[:, :, list(lines.values())]
    drawn = [
        _over_width(panel, record, chosen[:, step], f"step {step}") for panel, step in zip(panels, shown, strict=True)
    ]
    _widen(panels[0])
    figure.supylabel(_NAMES[quantity])
    figure.suptitle(f"verdict: {record.verdict}")
    _legend_beside(figure, drawn[0], labels, f"slope at step {at}")
    return figure


def over_training(
    history: Mapping[str, Float[np.ndarray, "steps"]],
    *,
    steps: Sequence[int] | None = None,
    ylabel: str = "RMS",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Norms over training: a line for each layer.

    Args:
        history: the values at each step by layer, such as `WidthRecord.history(width)`, or the results of
            `rms_by_path` at each step, joined.
        steps: the steps at which they were taken; by default 0, 1, 2, ...
        ylabel: what the values are.
        ax: where to draw; by default in a new figure.

    Returns:
        The figure.

    Raises:
        ValueError: an empty history, or values that are not one for each step.

    Example:
        >>> import rmsjax
        >>> history = {"embed": [1.0, 1.1, 1.2], "output": [0.1, 0.4, 0.9]}
        >>> rmsjax.plot.over_training(history).savefig("training.png")  # doctest: +SKIP
    """
    taken, values = _checked("plot.over_training", history, steps)
    lines = _distinct(list(history), values)
    figure, ax, own = _axes(ax, list(lines))
    drawn = [
        ax.plot(taken, values[k], **style, markevery=max(1, len(taken) // 12))[0]
        for style, k in zip(_styles(), lines.values(), strict=False)
    ]
    _log_scale(ax, values)
    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if own is not None:
        _legend_beside(own, drawn, list(lines))
    else:
        ax.legend(drawn, list(lines), fontsize="small")
    return figure


def layer_by_step(
    history: Mapping[str, Float[np.ndarray, "steps"]],
    *,
    steps: Sequence[int] | None = None,
    label: str = "RMS",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """A heat map of norms, layer by step, in a logarithmic scale; grey where there is no positive number.

    Args:
        history: as in `over_training`.
        steps: as in `over_training`.
        label: what the values are.
        ax: where to draw; by default in a new figure.

    Returns:
        The figure.

    Raises:
        ValueError: an empty history, or values that are not one for each step.

    Example:
        >>> import rmsjax
        >>> history = {"embed": [1.0, 1.1, 1.2], "output": [0.1, 0.4, 0.9]}
        >>> rmsjax.plot.layer_by_step(history).savefig("layers.png")  # doctest: +SKIP
    """
    taken, values = _checked("plot.layer_by_step", history, steps)
    figure, ax, _ = _axes(ax, [""] * len(values))
    positive = np.isfinite(values) & (values > 0)
    norm = LogNorm() if positive.any() else Normalize()
    image = ax.imshow(
        np.ma.array(values, mask=~positive),
        norm=norm,
        cmap=colormaps["cividis"].with_extremes(bad="0.85"),
        aspect="auto",
        interpolation="nearest",
    )
    ax.set_yticks(range(len(values)), list(history))
    ax.set_xlabel("step")
    ticks = MaxNLocator(integer=True, nbins=_READABLE).tick_values(0, len(taken) - 1)
    columns = [int(t) for t in ticks if t.is_integer() and 0 <= t < len(taken)]
    ax.set_xticks(columns, [f"{taken[c]}" for c in columns])
    bar = figure.colorbar(image, ax=ax, label=label)
    if positive.any():
        bar.ax.yaxis.set_minor_formatter(_minor_formatter())
    if len(taken) <= _READABLE:
        for row, column in itertools.product(*map(range, values.shape)):
            shade = float(norm(values[row, column])) if positive[row, column] else 1.0
            ink = "white" if shade < 0.5 else "black"
            ax.text(column, row, f"{values[row, column]:.2g}", ha="center", va="center", color=ink, fontsize="small")
    return figure


def rms_and_l2(record: WidthRecord, *, step: int = -1) -> Figure:
    """RMS norms over width beside L2 norms over width, in one scale: the first compare across widths.

    Args:
        record: what `rmsjax.compare_widths` or `rmsjax.coord_check` returned.
        step: the step to show; by default the last.

    Returns:
        The figure; the grey line in the right panel grows as the root of the width.

    Example:
        >>> import rmsjax
        >>> record = rmsjax.WidthRecord.load("check.npz")  # doctest: +SKIP
        >>> rmsjax.plot.rms_and_l2(record).savefig("widths.png")  # doctest: +SKIP
    """
    means = [record.over_seeds(quantity)[:, step] for quantity in ("rms", "l2")]
    slopes = [record.slopes(quantity).mean[step] for quantity in ("rms", "l2")]
    lines = _distinct(record.layers, np.stack(means).transpose(2, 0, 1))
    labels = _columns(lines, [f"{slopes[0][k]:+z.2f}  {slopes[1][k]:+z.2f}" for k in lines.values()])
    figure, panels = _panels(2, labels)
    drawn = [
        _over_width(panel, record, values[:, list(lines.values())], title)
        for panel, values, title in zip(panels, means, ("RMS norm", "L2 norm for one example"), strict=True)
    ]
    _widen(panels[0])
    bottom, x = panels[0].get_ylim()[0], record.widths
    guide = panels[1].plot(x, 2 * bottom * np.sqrt(x / x[0]), color="0.75", linewidth=5, zorder=0)
    _legend_beside(figure, [*drawn[0], *guide], [*labels, "as the root of the width"], "slopes: RMS, L2")
    return figure


# --------------------------------------------------------------------------------------------------------------- pieces


class _Figure(Figure):
    """A figure that a notebook shows; one that pyplot did not make it shows only if pyplot has made another."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def _styles() -> Any:
    """Line styles of which no two are equal, and neighbours differ in colour, marker and dashes."""
    looks = zip(*map(itertools.cycle, (_COLOURS, _MARKERS, _DASHES)), strict=False)
    return ({"color": c, "marker": m, "linestyle": d, "markersize": 5, "linewidth": 1.6} for c, m, d in looks)


def _distinct(layers: Sequence[str], values: np.ndarray) -> dict[str, int]:
    """The lines to draw, as positions among the layers, by label: the layers that coincide share one.

    A module's output is often that of its last child.
    """
    names: dict[bytes, list[str]] = {}
    positions: dict[bytes, int] = {}
    for k, layer in enumerate(layers):
        key = values[k].tobytes()
        names.setdefault(key, []).append(layer)
        positions.setdefault(key, k)
    return {" = ".join(names[key]): k for key, k in positions.items()}


def _panels(count: int, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with panels that share both axes, and room for a legend with these labels."""
    columns = min(count, 4)
    rows = -(-count // columns)
    size = 2.4 * columns + _legend_width(labels), max(2.8 * rows + 0.6, 0.22 * len(labels) + 1)
    figure = _Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for above, unused in zip(panels[count - columns :], panels[count:], strict=False):
        unused.remove()
        above.tick_params(labelbottom=True)
    for lowest in panels[max(0, count - columns) : count]:
        lowest.set_xlabel("width")
    return figure, list(panels[:count])


def _axes(ax: Axes | None, labels: Sequence[str]) -> tuple[Figure | SubFigure, Axes, Figure | None]:
    """The figure, the axes, and the figure once more if it is new: then with room for these labels."""
    if ax is not None:
        return ax.figure, ax, None
    figure = _Figure(figsize=(5 + _legend_width(labels), max(3.4, 0.26 * len(labels) + 1)), layout="constrained")
    return figure, figure.subplots(), figure


def _over_width(ax: Axes, record: WidthRecord, values: np.ndarray, title: str) -> list[Line2D]:
    drawn = [ax.plot(record.widths, line, **style)[0] for style, line in zip(_styles(), values.T, strict=False)]
    ax.set_xscale("log", base=2)
    _log_scale(ax, values)
    ax.set_xticks(record.widths, [str(w) for w in record.widths], rotation=45 if len(record.widths) > 4 else 0)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(which="major", color="0.9")
    ax.set_title(title)
    return drawn


def _log_scale(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic scale, unless there is nothing to show in one; zeros are left out."""
    if np.any(values > 0):
        ax.set_yscale("log", nonpositive="mask")
        ax.yaxis.set_minor_formatter(_minor_formatter())


def _minor_formatter() -> LogFormatterSciNotation:
    """Numbers between the powers of ten, where matplotlib would leave a scale with a single number."""
    return LogFormatterSciNotation(minor_thresholds=(1.3, 0.6))


def _widen(ax: Axes) -> None:
    """Show two decades at least, so that noise does not look like a slope."""
    bottom, top = ax.get_ylim()
    if ax.get_yscale() == "log" and top < 100 * bottom:
        middle = np.sqrt(bottom * top)
        ax.set_ylim(middle / 10, middle * 10)


def _columns(names: Iterable[str], values: Sequence[str]) -> list[str]:
    extent = max(map(len, names))
    return [f"{name:{extent}}  {value}" for name, value in zip(names, values, strict=True)]


def _legend_width(labels: Sequence[str]) -> float:
    """In inches, in the font of the legend."""
    return 0.068 * max(map(len, labels)) + 0.9


def _legend_beside(figure: Figure, lines: Sequence[Line2D], labels: Sequence[str], title: str | None = None) -> None:
    font = {"family": "monospace", "size": 8}
    figure.legend(lines, labels, loc="outside right upper", title=title, prop=font, handlelength=4)


def _checked(
    function: str, history: Mapping[str, Any], steps: Sequence[int] | None
) -> tuple[Sequence[int], Float[np.ndarray, "layers steps"]]:
    """The steps, and the values as one matrix."""
    if not history:
        raise ValueError(f"{function}: history is empty; it must hold the values of at least one layer")
    rows = [np.asarray(values, np.float64) for values in history.values()]
    length = len(rows[0]) if steps is None and rows[0].ndim else len(steps or ())
    for layer, row in zip(history, rows, strict=True):
        if row.shape != (length,):
            raise ValueError(
                f"{function}: {layer!r} must have {length} values, one for each step, got shape {row.shape}"
            )
    return range(length) if steps is None else steps, np.stack(rows)
