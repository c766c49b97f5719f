"""Pictures of records: the coordinate check, loss by learning rate, RMS over training, layer by step, RMS beside L2.

Draws what `coord_check`, `compare_widths`, `lr_sweep` or a training loop recorded, and computes nothing. Lines differ
in colour (Okabe and Ito's and some of Paul Tol's, which colour-blind people can tell apart), in marker and in dashes,
so they survive a black-and-white print. Figures are made without pyplot, so none stays open; a notebook shows one that
a cell ends with.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from cycler import cycler  # matplotlib brings it
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator, NullLocator
from PIL import Image  # matplotlib brings it

from rmsjax._checks import described
from rmsjax._coord_check import WidthRecord
from rmsjax._lr_sweep import SweepRecord
from rmsjax._text import moves, with_interval

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from matplotlib.lines import Line2D

__all__ = ["STYLE", "coord_check", "layer_by_step", "lr_sweep", "over_training", "rms_and_l2"]


def __dir__() -> list[str]:
    return sorted(__all__)


_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#882255", "#808080", "#999933", "#332288"),
)
_MARKERS = "os^Dv<>PX"
STYLE: dict[str, Any] = {
    "axes.prop_cycle": cycler(color=_COLOURS),
    "axes.grid": True,
    "grid.color": "0.9",
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}
"""The look of these pictures as settings of matplotlib, for pictures of your own: `plt.rcParams |= STYLE`."""
_DASHES = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_NAMES = {"rms": "RMS of the activation", "change": "RMS of the change since step 0"}
_READABLE = 12  # steps in a heat map, above which nobody reads the numbers in its cells
_LONGEST = 40  # characters of a name; of longer ones the middle is left out


def coord_check(
    record: WidthRecord,
    *,
    quantity: Literal["rms", "change"] = "change",
    steps: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """The coordinate check: a panel for each step, RMS against width, a line for each layer.

    Lines are geometric means over seeds. The legend gives their slopes at the last step shown, with the 95 % interval
    over seeds. In a width-neutral parametrisation the lines are level. A question mark is that of the table: of a
    layer, that at one end of the interval its verdict would be another, and of the whole, that it is `in_doubt`.

    Args:
        record: what `rmsjax.coord_check` returned.
        quantity: "change", the RMS of the change since step 0, or "rms", that of the activation.
        steps: the steps to show; by default all (of the change, which is 0 at step 0, those after it).
        title: what was checked, such as the parametrisation; it comes before the verdict.

    Returns:
        The figure; `.savefig("check.png")` keeps it, and a notebook shows it.

    Raises:
        TypeError: another record.
        ValueError: a step that was not recorded, or no step to show.

    Example:
        >>> import numpy as np
        >>> import rmsjax
        >>> widths, ones = np.array([64, 256]), np.ones((2, 1, 3, 1))  # two widths, one seed, three steps, one layer
        >>> change = ones * np.sqrt(widths)[:, None, None, None] * np.arange(3)[:, None]
        >>> record = rmsjax.WidthRecord(
        ...     ("dense",), widths, np.array([0]), rms=ones, change=change, sizes=widths[:, None], loss=ones[..., 0])
        >>> figure = rmsjax.plot.coord_check(record, title="A layer that changes like the root of the width")
        >>> print(figure.get_suptitle())
        A layer that changes like the root of the width, verdict: grows ?

    Source: Yang et al. (arXiv 2203.03466), appendix D.1.
    """
    _check_kind("coord_check", "record", record, WidthRecord)
    shown = list(range(0 if quantity == "rms" else 1, record.steps + 1)) if steps is None else list(steps)
    if not shown or not all(0 <= step <= record.steps for step in shown):
        raise ValueError(f"plot.coord_check: steps must be some of 0 to {record.steps}, got {shown}")
    means, slopes, at = record.over_seeds(quantity), record.slopes(quantity), shown[-1]
    names, chosen = _distinct(record.layers, np.moveaxis(means, -1, 0))
    marks = [" ?" if at == record.steps and record.layers[k] in record.doubtful else "" for k in chosen]
    values = [with_interval(slopes.mean[at, k], slopes.high[at, k]) for k in chosen]
    labels = _columns(names, [value + mark for value, mark in zip(values, marks, strict=True)])
    verdict = f"verdict: {record.verdict}{' ?' if record.in_doubt else ''}"
    figure, panels = _panels(len(shown), labels, f"{title}, {verdict}" if title else verdict, record.axis)
    drawn = [
        _over_width(panel, record, means[:, step, chosen], f"step {step}")
        for panel, step in zip(panels, shown, strict=True)
    ]
    _widen(panels[0])
    figure.supylabel(_NAMES[quantity])
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
        TypeError: a history that is no mapping.
        ValueError: an empty history, or values that are not one for each step.

    Example:
        >>> import rmsjax
        >>> history = {"embed": [1.0, 1.1, 1.2], "output": [0.1, 0.4, 0.9]}
        >>> figure = rmsjax.plot.over_training(history, steps=[0, 100, 200])
        >>> print([line.get_ydata().tolist() for line in figure.axes[0].get_lines()])
        [[1.0, 1.1, 1.2], [0.1, 0.4, 0.9]]

    Source: the colours are those of Okabe and Ito, Color Universal Design (2008), and of Tol, Colour Schemes (SRON
        technical note EPS/TN/09-002).
    """
    taken, values = _checked("plot.over_training", history, steps)
    names, chosen = _distinct(list(history), values)
    size = 5 + _legend_width(names), max(3.4, 0.26 * len(names) + 1)
    figure, ax, own = _axes(ax, size)
    drawn = [
        ax.plot(taken, values[k], **style, markevery=max(1, len(taken) // 12))[0]
        for style, k in zip(_styles(), chosen, strict=False)
    ]
    _log_scale(ax, values)
    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if own is not None:
        _legend_beside(own, drawn, names)
    else:
        ax.legend(drawn, names, fontsize="small")
    return figure


def layer_by_step(
    history: Mapping[str, Float[np.ndarray, "steps"]],
    *,
    steps: Sequence[int] | None = None,
    label: str = "RMS",
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """A heat map of norms, layer by step, in a logarithmic scale; grey where there is no positive number.

    The numbers are in the cells, if there are not too many to read.

    Args:
        history: as in `over_training`.
        steps: as in `over_training`.
        label: what the values are.
        ax: where to draw; by default in a new figure.

    Returns:
        The figure.

    Raises:
        TypeError: a history that is no mapping.
        ValueError: an empty history, or values that are not one for each step.

    Example:
        >>> import rmsjax
        >>> history = {"embed": [1.0, 1.1, 1.2], "output": [0.1, 0.4, 0.9]}
        >>> figure = rmsjax.plot.layer_by_step(history)
        >>> print([text.get_text() for text in figure.axes[0].texts])
        ['1', '1.1', '1.2', '0.1', '0.4', '0.9']

    Source: the colours, which grow lighter as the norm grows, for colour-blind people too: cividis, of Nuñez, Anderton
        and Renslow (PLOS ONE 13(7): e0199239).
    """
    taken, values = _checked("plot.layer_by_step", history, steps)
    names = [_shortened(layer) for layer in history]
    columns = min(len(taken), _READABLE)
    size = 0.09 * max(map(len, names)) + max(4.0, 0.65 * columns) + 1, max(3.4, 0.26 * len(names) + 1)
    figure, ax, _ = _axes(ax, size)
    positive = np.isfinite(values) & (values > 0)
    shown = np.ma.array(values, mask=~positive)
    image = ax.imshow(
        shown,
        norm=LogNorm() if positive.any() else Normalize(),
        cmap=colormaps["cividis"].with_extremes(bad="0.85"),
        aspect="auto",
        interpolation="nearest",
    )
    ax.set_yticks(range(len(values)), names)
    ax.set_xlabel("step")
    bar = figure.colorbar(image, ax=ax, label=label)
    if positive.any():
        bar.ax.yaxis.set_minor_formatter(_minor_formatter())
    figure.canvas.figure.draw_without_rendering()  # so that the axes have their size
    _label_steps(ax, taken)
    if len(taken) <= _READABLE:
        lightness = image.to_rgba(shown)[..., :3] @ [0.2126, 0.7152, 0.0722]
        _write_numbers(ax, values, np.where(lightness < 0.5, "white", "black"))
    return figure


def _label_steps(ax: Axes, taken: Sequence[int]) -> None:
    """As many labels as there is room for."""
    inches = ax.bbox.width / ax.figure.dpi
    room = int(inches / (0.12 + 0.09 * max(len(f"{step}") for step in taken)))
    ticks = MaxNLocator(integer=True, nbins=max(1, min(_READABLE, room))).tick_values(0, len(taken) - 1)
    columns = [int(t) for t in ticks if t.is_integer() and 0 <= t < len(taken)]
    ax.set_xticks(columns, [f"{taken[c]}" for c in columns])


def _write_numbers(ax: Axes, values: np.ndarray, inks: np.ndarray) -> None:
    """A number in each cell, if all of them fit."""
    rows, columns = values.shape
    texts = [
        ax.text(column, row, f"{values[row, column]:.2g}", ha="center", va="center", color=ink, fontsize="small")
        for (row, column), ink in np.ndenumerate(inks)
    ]
    boxes = [text.get_window_extent() for text in texts]
    width, height = (max(sizes) for sizes in zip(*((box.width, box.height) for box in boxes), strict=True))
    if width > 0.9 * ax.bbox.width / columns or height > ax.bbox.height / rows:
        for text in texts:
            text.remove()


def rms_and_l2(record: WidthRecord, *, step: int = -1, title: str | None = None) -> Figure:
    """RMS norms over width beside L2 norms over width, in one scale: the first compare across widths.

    Args:
        record: what `rmsjax.compare_widths` or `rmsjax.coord_check` returned.
        step: the step to show; by default the last.
        title: what was measured, such as the parametrisation.

    Returns:
        The figure; over widths, the grey line in the right panel grows as the root of the width.

    Raises:
        TypeError: another record.
        ValueError: a step that was not recorded.

    Example:
        >>> import numpy as np
        >>> import rmsjax
        >>> widths, rms = np.array([64, 256]), np.ones((2, 1, 1, 1))  # one seed, one step, one layer
        >>> record = rmsjax.WidthRecord(
        ...     ("dense",), widths, np.array([0]), rms=rms, change=0 * rms, sizes=widths[:, None], loss=rms[..., 0])
        >>> figure = rmsjax.plot.rms_and_l2(record)
        >>> print([ax.get_lines()[0].get_ydata().tolist() for ax in figure.axes])
        [[1.0, 1.0], [8.0, 16.0]]

    Source: Yang, Simon, Bernstein (arXiv 2310.17813), desideratum 1: features of width n with an L2 norm of order √n.
    """
    _check_kind("rms_and_l2", "record", record, WidthRecord)
    if not -record.rms.shape[2] <= step <= record.steps:
        raise ValueError(f"plot.rms_and_l2: step must be one of 0 to {record.steps}, or -1 for the last, got {step}")
    means = [record.over_seeds(quantity)[:, step] for quantity in ("rms", "l2")]
    slopes = [record.slopes(quantity).mean[step] for quantity in ("rms", "l2")]
    names, chosen = _distinct(record.layers, np.stack(means).transpose(2, 0, 1))
    labels = _columns(names, [f"{slopes[0][k]:+z.2f}  {slopes[1][k]:+z.2f}" for k in chosen])
    figure, panels = _panels(2, labels, title, record.axis)
    drawn = [
        _over_width(panel, record, values[:, chosen], name)
        for panel, values, name in zip(panels, means, ("RMS norm", "L2 norm per example"), strict=True)
    ]
    _widen(panels[0])
    figure.supylabel(f"norm at step {range(record.steps + 1)[step]}" if record.steps else "norm")
    lines = drawn[0]
    if panels[0].get_yscale() == "log" and record.axis == "width":  # over depths no layer changes its size
        bottom, x = panels[0].get_ylim()[0], record.widths
        lines += panels[1].plot(x, 2 * bottom * np.sqrt(x / x[0]), color="0.75", linewidth=5, zorder=0)
        labels.append("as the root of the width")
    _legend_beside(figure, lines, labels, "slopes: RMS, L2")
    return figure


def lr_sweep(records: SweepRecord | Mapping[str, SweepRecord], *, title: str | None = None) -> Figure:
    """The loss against the learning rate: a line for each width, a panel for each record, in one scale.

    A ring marks the best rate of each width. Where the rate transfers, as in muP, the rings are one above the other;
    in standard parametrisation they move to the left. Runs that have diverged are left out, and losses far above that
    of the start are beyond the picture. The scale is logarithmic, if all losses are positive.

    Args:
        records: what `rmsjax.lr_sweep` returned, or several of these by their names, such as
            {"standard": first, "muP": second}.
        title: what was trained.

    Returns:
        The figure.

    Raises:
        TypeError: another record.
        ValueError: no records, or some of widths and some of depths.

    Example:
        >>> import numpy as np
        >>> import rmsjax
        >>> rates, widths = np.array([0.01, 0.02, 0.04, 0.08]), np.array([64, 256])
        >>> loss = 1 + np.log2(rates / np.array([0.04, 0.02])[:, None]) ** 2  # least at 0.04, and at 0.02
        >>> record = rmsjax.SweepRecord(widths, np.array([0]), rates, loss[:, None, :, None])
        >>> figure = rmsjax.plot.lr_sweep({"standard": record})
        >>> print(figure.axes[0].get_title())
        standard: best rate
        falls by a factor of 2

    Source: Yang et al. (arXiv 2203.03466), figure 1.
    """
    named = {"": records} if not isinstance(records, Mapping) else records
    if not named:
        raise ValueError(
            "plot.lr_sweep: records is empty; it must be what lr_sweep returned, or a dict of such records"
        )
    for record in named.values():
        _check_kind("lr_sweep", "records", record, SweepRecord)
    axes = {record.axis for record in named.values()}
    if len(axes) > 1:
        raise ValueError(f"plot.lr_sweep: records must have one axis, got {' and '.join(sorted(axes))}")
    widths = np.unique(np.concatenate([record.widths for record in named.values()]))
    labels = [f"{width}" for width in widths]
    figure, panels = _panels(len(named), labels, title, "learning rate")
    styles = dict(zip(widths.tolist(), _styles(), strict=False))
    lines: dict[int, Line2D] = {}
    final = _finite(record.final for record in named.values())
    for panel, (name, record) in zip(panels, named.items(), strict=True):
        for width, losses, best in zip(record.widths.tolist(), record.final, record.best_rates.values(), strict=True):
            finite = np.where(np.isfinite(losses), losses, np.nan)
            (lines[width],) = panel.plot(record.learning_rates, finite, **styles[width])
            panel.plot(best, np.min(losses), "o", ms=11, mfc="none", mec=styles[width]["color"], mew=1.6)
        panel.set_xscale("log")
        if np.all(final > 0):
            _log_scale(panel, final)
        panel.grid(which="major", color=STYLE["grid.color"])
        panel.set_title(f"{name}{': ' if name else ''}best rate\n{moves(record.drift)}")
    start = _finite(record.loss[..., 0] for record in named.values())
    if final.size and start.size:
        least, worst = np.min(final), np.max(start)
        # As far above the start as 0 is below it or, where losses may be negative, as the best of them is.
        top = 2 * worst - (0 if least > 0 else least)
        if top > least:
            panels[0].set_ylim(top=min(panels[0].get_ylim()[1], top))
    figure.supylabel("final loss")
    _legend_beside(figure, [lines[width] for width in widths.tolist()], labels, axes.pop())
    return figure


# --------------------------------------------------------------------------------------------------------------- pieces


class _Figure(Figure):
    """A figure that a notebook shows; one that pyplot did not make it shows only if pyplot has made another."""

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, Figure.__name__)

    def _repr_png_(self) -> bytes:
        """With a palette, as which it is a third as large in a notebook."""
        drawn, png = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png")
        Image.open(drawn).convert("RGB").quantize(256).save(png, format="png")
        return png.getvalue()


def _styles() -> Any:
    """Line styles of which no two are equal, and neighbours differ in colour, marker and dashes."""
    looks = zip(*map(itertools.cycle, (_COLOURS, _MARKERS, _DASHES)), strict=False)
    sizes = {"linewidth": STYLE["lines.linewidth"], "markersize": STYLE["lines.markersize"]}
    return ({"color": c, "marker": m, "linestyle": d, **sizes} for c, m, d in looks)


def _distinct(layers: Sequence[str], values: np.ndarray) -> tuple[list[str], list[int]]:
    """The lines to draw, as labels and positions among the layers: the layers that coincide share one.

    A module's output is often that of its last child.
    """
    groups: dict[bytes, list[int]] = {}
    for k, row in enumerate(values):
        groups.setdefault(row.tobytes(), []).append(k)
    labels = [_joined([_shortened(layers[k]) for k in group]) for group in groups.values()]
    return labels, [group[0] for group in groups.values()]


def _joined(names: Sequence[str]) -> str:
    return " = ".join(names) if len(names) < 3 else f"{names[0]} = ... = {names[-1]} ({len(names)} layers)"


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 3]}...{name[3 + _LONGEST // 3 - _LONGEST :]}"


def _panels(count: int, labels: Sequence[str], title: str | None, xlabel: str) -> tuple[Figure, list[Axes]]:
    """A figure with panels that share both axes, a title above them, and room for a legend with these labels."""
    columns = min(count, 4)
    rows = -(-count // columns)
    width = max(2.4 * columns, 0.105 * len(title or ""))
    size = width + _legend_width(labels), max(2.8 * rows + 0.6, 0.24 * len(labels) + 1)
    figure = _Figure(figsize=size, layout="constrained")
    if title is not None:
        figure.suptitle(title, x=0.02, ha="left")  # not over the legend
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for above, unused in zip(panels[count - columns :], panels[count:], strict=False):
        unused.remove()
        above.tick_params(labelbottom=True)
    for lowest in panels[max(0, count - columns) : count]:
        lowest.set_xlabel(xlabel)
    return figure, list(panels[:count])


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure | SubFigure, Axes, Figure | None]:
    """The figure, the axes, and the figure once more if it is new: then of this size."""
    if ax is not None:
        return ax.figure, ax, None
    figure = _Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(), figure


def _over_width(ax: Axes, record: WidthRecord, values: np.ndarray, title: str) -> list[Line2D]:
    drawn = [ax.plot(record.widths, line, **style)[0] for style, line in zip(_styles(), values.T, strict=False)]
    ax.set_xscale("log", base=2)
    ax.set_xlim(record.widths[0] / 1.3, record.widths[-1] * 1.3)
    _log_scale(ax, values)
    ax.set_xticks(record.widths, [str(w) for w in record.widths], rotation=45 if len(record.widths) > 4 else 0)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(which="major", color=STYLE["grid.color"])
    ax.set_title(title)
    return drawn


def _log_scale(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic scale, unless there is nothing to show in one; zeros are left out."""
    if np.any(np.isfinite(values) & (values > 0)):
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


def _finite(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """The finite numbers in arrays, as a vector."""
    values = np.concatenate([np.ravel(array) for array in arrays])
    return values[np.isfinite(values)]


def _columns(names: Iterable[str], values: Sequence[str]) -> list[str]:
    extent = max(map(len, names))
    return [f"{name:{extent}}  {value}" for name, value in zip(names, values, strict=True)]


def _legend_width(labels: Sequence[str]) -> float:
    """In inches, in the font of the legend."""
    return 0.0765 * max(map(len, labels)) + 1


def _legend_beside(figure: Figure, lines: Sequence[Line2D], labels: Sequence[str], title: str | None = None) -> None:
    font = {"family": "monospace", "size": 9}
    figure.legend(lines, labels, loc="outside right upper", title=title, prop=font, handlelength=4)


def _check_kind(function: str, argument: str, value: Any, kind: type) -> None:
    """TypeError unless it is a record of this kind."""
    if not isinstance(value, kind):
        raise TypeError(f"plot.{function}: {argument} must be a {kind.__name__}, got {described(value)}")


def _checked(
    function: str, history: Mapping[str, Any], steps: Sequence[int] | None
) -> tuple[Sequence[int], Float[np.ndarray, "layers steps"]]:
    """The steps, and the values as one matrix."""
    if not isinstance(history, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{function}: history must be the values by layer, {{layer: values}}, got {described(history)}")
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
