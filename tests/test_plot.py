"""The pictures, rendered and looked at as far as a program can: ink, texts, nothing clipped, nothing overlapping."""

import dataclasses
import itertools
import re
import subprocess
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from rmsjax import SweepRecord, WidthRecord, plot

LAYERS = ("embed", "block0/up", "block0/down", "block1/up", "block1/down", "norm", "readout")
BLOCKS = tuple(
    f"block{i}/{name}" for i in range(6) for name in ("attention/query", "attention/scores", "mlp/up", "mlp")
)


def record(layers=LAYERS, widths=(64, 128, 256, 512, 1024), steps=4, slope=1.0):
    """The layers, but for the first, change like a power of the width."""
    rng, w = np.random.default_rng(0), np.array(widths, float)[:, None, None, None]
    shape = (len(widths), 3, steps + 1, len(layers))
    rms, noise = np.exp(0.05 * rng.normal(size=(2, *shape))) * (1 + 0.3 * np.arange(len(layers)))
    change = 0.02 * noise * np.arange(steps + 1)[:, None] * (w / 64) ** (slope * (np.arange(len(layers)) > 0))
    sizes = np.repeat(np.array(widths)[:, None], len(layers), 1)
    return WidthRecord(tuple(layers), np.array(widths), np.arange(3), rms, change, sizes, np.ones(shape[:3]))


def history(layers=LAYERS, steps=5):
    values = np.exp(np.cumsum(np.random.default_rng(0).normal(size=(len(layers), steps)), 1) * 0.1)
    return dict(zip(layers, values, strict=True))


def render(figure):
    """The pixels, and the texts that were drawn with their boxes in pixels."""
    canvas, drawn, draw = FigureCanvasAgg(figure), {}, Text.draw

    def spy(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent(renderer)

    with mock.patch.object(Text, "draw", spy):
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255, drawn


def assert_readable(figure, lines=0):
    """Ink in every panel, a size that fits a page; texts within the picture, none on another, the legend on nothing.

    Of the first panel so many lines show in the pixels, all different. Returns the texts.
    """
    pixels, texts = render(figure)
    height, width, _ = pixels.shape
    assert width < 16 * figure.dpi
    for ax in figure.axes:
        x0, y0, x1, y1 = (round(v) for v in ax.bbox.extents)
        inside = pixels[height - y1 : height - y0, x0:x1]
        assert np.mean(np.any(inside < 0.95, -1)) > 0.01
    assert texts
    for text, box in texts.items():
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    upright = {text: apart(box) for text, box in texts.items() if text.get_rotation() % 90 == 0}
    for (a, one), (b, other) in itertools.combinations(upright.items(), 2):
        assert not one.overlaps(other), (a, b)
    for legend in figure.legends:
        box, own = legend.get_window_extent(), {*legend.get_texts(), legend.get_title()}
        assert not any(box.overlaps(ax.bbox) for ax in figure.axes)
        assert not [text for text in texts if text not in own and box.overlaps(texts[text])]
    assert_distinct(figure.axes[0].get_lines()[:lines], pixels)
    return {text.get_text() for text in texts}


def apart(box):
    """The space that a text needs: in a line of text, some more than it takes up."""
    return Bbox.from_extents(box.x0 - 1.5, box.y0 + 1, box.x1 + 1.5, box.y1 - 1)


def assert_distinct(lines, pixels):
    """Each line shows in the pixels, none looks like another, and in print neighbours differ in marker and dashes."""
    looks = [(line.get_color(), line.get_marker(), line._unscaled_dash_pattern) for line in lines]
    assert len({str(look) for look in looks}) == len(lines)
    assert len({colour for colour, *_ in looks}) == min(len(lines), 11)
    for one, other in itertools.pairwise(looks):
        assert all(a != b for a, b in zip(one, other, strict=True))
    for line in lines:
        assert np.any(np.all(np.abs(pixels - to_rgb(line.get_color())) < 0.02, -1)), line


# --------------------------------------------------------------------------------------------------------- coord_check


LONG = (
    "model/decoder/layers/attention/query/projection/kernel",
    "model/decoder/layers/attention/key/projection/kernel",
)


@pytest.mark.parametrize(
    "given",
    [
        {"widths": (64, 512), "steps": 1, "layers": ("only",)},
        {"steps": 2, "layers": LONG},
        {"steps": 5, "layers": BLOCKS[:13], "widths": (8, 16, 32, 64, 128, 256, 512, 1024)},
    ],
)
def test_coord_check(given):
    drawn = record(**given)
    figure = plot.coord_check(drawn)
    assert type(figure).__mro__[1] is Figure
    assert len(figure.axes) == drawn.steps
    words = assert_readable(figure, len(drawn.layers))
    assert {f"step {step}" for step in range(1, drawn.steps + 1)} <= words
    assert {str(w) for w in drawn.widths} <= words
    assert {"width", "RMS of the change since step 0"} <= words
    assert any(word in (f"verdict: {drawn.verdict}", f"verdict: {drawn.verdict} ?") for word in words)
    mean, _, high = (values[-1] for values in drawn.slopes("change"))
    for layer, m, h in zip(drawn.layers, mean, high, strict=True):
        name = layer if len(layer) <= 40 else f"{layer[:13]}...{layer[-24:]}"
        mark = ["?"] if layer in drawn.doubtful else []
        assert any(word.split() == [name, f"{m:+z.2f}", f"±{h - m:.2f}", *mark] for word in words)
    for line, values in zip(figure.axes[-1].get_lines(), drawn.over_seeds("change")[:, -1].T, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), drawn.widths)
        np.testing.assert_array_equal(line.get_ydata(), values)


def test_steps_and_title_of_a_coord_check():
    words = assert_readable(plot.coord_check(record(), steps=[4], title="Standard parametrisation"))
    assert {"step 4", "Standard parametrisation, verdict: grows"} <= words
    figure = plot.coord_check(record(steps=1), quantity="rms")
    words = assert_readable(figure)
    assert {"step 0", "step 1", "RMS of the activation", "slope at step 1"} <= words
    bottom, top = figure.axes[0].get_ylim()
    assert top / bottom >= 100 * (1 - 1e-9)  # or noise would look like a slope


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.coord_check("rec.npz"), "plot.coord_check: record must be a WidthRecord, got 'rec.npz'"),
        (lambda: plot.rms_and_l2(None), "plot.rms_and_l2: record must be a WidthRecord, got None"),
        (lambda: plot.lr_sweep({"standard": record()}), "plot.lr_sweep: records must be a SweepRecord, got a WidthRec"),
        (lambda: plot.over_training(3), "plot.over_training: history must be the values by layer, .*, got 3"),
        (lambda: plot.layer_by_step([1.0]), r"plot.layer_by_step: history must be .*, got \[1.0\]"),
    ],
)
def test_what_is_no_record(draw, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        draw()


@pytest.mark.parametrize(
    ("slopes", "title"),
    [
        ([[0.0, 0.0, 0.0], [0.2, 0.3, 0.2]], "verdict: level"),
        ([[0.0, 0.0, 0.0], [0.1, 0.6, 0.1]], "verdict: level ?"),
        ([[0.0, 0.0, 0.0], [0.25, 0.3, 0.35]], "verdict: grows ?"),
        ([[0.5, 0.5, 0.5], [0.2, 0.3, 0.2]], "verdict: grows"),
        ([[0.0, 0.0, 0.0], [0.1, 0.1, 0.1]], "verdict: level"),
    ],
)
def test_what_is_doubtful_in_the_table_is_so_in_the_picture(slopes, title):
    """Two widths, three seeds, two layers with these slopes of their change."""
    widths, shape = np.array([64, 256]), (2, 3, 2, 2)
    change = np.broadcast_to(4.0 ** np.array(slopes).T[:, None], (3, 2, 2)).copy()
    change[:, 0] = 0
    change = np.stack([np.where(change > 0, 1.0, 0.0), change])
    drawn = WidthRecord(
        ("a", "b"), widths, np.arange(3), np.ones(shape), change, widths[:, None] * np.ones(2), np.ones(shape[:3])
    )
    words = assert_readable(plot.coord_check(drawn))
    assert title in words
    in_table = {line.split()[0] for line in repr(drawn).splitlines() if line.endswith(" ?")}
    assert {word.split()[0] for word in words if word.endswith(" ?") and "verdict" not in word} == in_table
    assert bool(in_table) == bool(drawn.doubtful)


def test_layers_that_coincide_share_a_line():
    drawn = record()
    drawn.change[..., 2] = drawn.change[..., 1]
    drawn.change[..., 3:] = 0
    figure = plot.coord_check(drawn, steps=[4])
    words = {word.rsplit("  ", 1)[0].strip() for word in assert_readable(figure)}
    assert {"embed", "block0/up = block0/down", "block1/up = ... = readout (4 layers)"} <= words
    assert len(figure.axes[0].get_lines()) == 3


def test_what_never_changes_or_is_not_finite_leaves_the_rest():
    drawn = record(steps=1)
    drawn.change[..., 1] = 0
    drawn.change[-1, ..., 2] = np.inf
    drawn.rms[-1, ..., 2] = np.inf
    assert "verdict: not finite" in assert_readable(plot.coord_check(drawn))


@pytest.mark.parametrize("steps", [[], [5], [-1]])
def test_coord_check_errors(steps):
    with pytest.raises(ValueError, match=r"plot.coord_check: steps must be some of 0 to 4, got"):
        plot.coord_check(record(), steps=steps)


# ------------------------------------------------------------------------------------------------------------- lr_sweep


RATES = np.geomspace(1e-4, 1e-1, 7)


def swept(best, *, widths=(64, 256, 1024), steps=20):
    """Losses that are least at the rates of these places, and far larger at the largest rate."""
    final = 0.1 * 4.0 ** np.abs(np.arange(7) - np.array(best)[:, None])
    loss = np.repeat(np.repeat(final[:, None, :, None], 2, 1), steps, 3)
    loss[..., 0], loss[..., -1, 1:] = 2.3, 1e6
    return SweepRecord(np.array(widths), np.arange(2), RATES, loss)


def test_lr_sweep():
    """Rings are at the best rates; what explodes does not press the rest flat."""
    records = {"standard": swept([4, 3, 1]), "muP": swept([4, 4, 4])}
    figure = plot.lr_sweep(records, title="Some model")
    words = assert_readable(figure)
    assert {"learning rate", "final loss", "width", "64", "256", "1024", "Some model"} <= words
    assert {"standard: best rate\nfalls by a factor of 31.6", "muP: best rate\nstays"} <= words
    for ax, record in zip(figure.axes, records.values(), strict=True):
        lines, rings = ax.get_lines()[::2], ax.get_lines()[1::2]
        assert len(lines) == len(rings) == 3
        for line, ring, losses, best in zip(lines, rings, record.final, record.best_rates.values(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), RATES)
            np.testing.assert_array_equal(line.get_ydata(), losses)
            assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (best, losses.min())
        assert 2.3 <= ax.get_ylim()[1] < 10
        assert ax.get_ylim() == figure.axes[0].get_ylim()
    assert_distinct(figure.axes[0].get_lines()[::2], render(figure)[0])


def test_lr_sweep_of_other_widths_and_of_what_diverges():
    """Each width has one look in all panels; a run that diverged is left out."""
    first, second = swept([4, 3, 1]), swept([3, 2], widths=(32, 256))
    second.loss[0, 0, 5:, -1] = np.nan
    second.loss[1] = np.inf
    figure = plot.lr_sweep({"first": first, "second": second})
    words = assert_readable(figure)
    assert {"32", "64", "256", "1024", "second: best rate\nis not known"} <= words
    left, right = (ax.get_lines()[::2] for ax in figure.axes)
    assert left[1].get_color() == right[1].get_color() != left[0].get_color()
    assert np.isnan(right[0].get_ydata()).tolist() == [False] * 5 + [True] * 2
    assert np.isnan(right[1].get_ydata()).all()
    single = assert_readable(plot.lr_sweep(dataclasses.replace(first, axis="depth")))
    assert {"depth", "best rate\nfalls by a factor of 31.6"} <= single


@pytest.mark.parametrize("shift", [0.0, 1.0, 5.0, 1e7])
def test_lr_sweep_of_losses_of_any_sign(shift):
    """Larger losses are higher up; the best of each width is in the picture, and what explodes is not."""
    records = {"a": swept([4, 3, 1]), "b": swept([4, 4, 4])}
    figure = plot.lr_sweep({k: dataclasses.replace(each, loss=each.loss - shift) for k, each in records.items()})
    assert_readable(figure)
    for ax, each in zip(figure.axes, records.values(), strict=True):
        bottom, top = ax.get_ylim()
        assert bottom < each.final.min() - shift < 2.3 - shift < top < 1e6 - shift
        assert ax.get_yscale() == ("linear" if shift else "log")


def test_lr_sweep_that_learns_nothing():
    """What starts below all that comes later is no bound of the picture."""
    worse = swept([1, 1, 1])
    worse.loss[..., 0] = 1e-3
    bottom, top = plot.lr_sweep(worse).axes[0].get_ylim()
    assert bottom < worse.final.min() < top


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_lr_sweep_of_nothing_finite(value):
    gone = swept([1, 1, 1])
    gone.loss[:] = value
    with warnings.catch_warnings(action="error"):
        figure = plot.lr_sweep(gone)
        assert {"best rate\nis not known", "final loss"} <= {text.get_text() for text in render(figure)[1]}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({}, "records is empty; it must be what lr_sweep returned"),
        ({"a": swept([1, 1, 1]), "b": dataclasses.replace(swept([1, 1, 1]), axis="depth")}, "got depth and width"),
    ],
)
def test_lr_sweep_errors(records, message):
    with pytest.raises(ValueError, match=f"plot.lr_sweep: .*{message}"):
        plot.lr_sweep(records)


# ----------------------------------------------------------------------------------------------- training and heat map


KINDS = pytest.mark.parametrize("given", [{"steps": 400, "layers": BLOCKS}, {"steps": 1, "layers": ("only",)}])


@KINDS
def test_over_training(given):
    values = history(**given)
    figure = plot.over_training(values, ylabel="RMS of updates")
    assert {"step", "RMS of updates", *values} <= assert_readable(figure, len(values))
    for line, row in zip(figure.axes[0].get_lines(), values.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), row)


@KINDS
def test_layer_by_step(given):
    values = history(**given)
    figure = plot.layer_by_step(values, label="RMS of updates")
    words = assert_readable(figure)
    assert {"step", "RMS of updates", *values} <= words
    few = given["steps"] == 1
    assert (f"{values[next(iter(values))][0]:.2g}" in words) == few
    np.testing.assert_array_equal(figure.axes[0].get_images()[0].get_array(), np.stack(list(values.values())))


def test_numbers_of_a_heat_map_are_there_if_they_fit():
    """Whatever their length, in a figure of its own; not in a small one of the caller, nor if there are too many."""
    values = {name: np.geomspace(1.2e-5, 1.2e-3, 12) for name in LAYERS}
    assert {f"{value:.2g}" for value in values["embed"]} <= assert_readable(plot.layer_by_step(values))
    small = Figure(figsize=(6, 4), layout="constrained")
    plot.layer_by_step(values, ax=small.subplots())
    assert "1.2e-05" not in assert_readable(small)
    assert not plot.layer_by_step({"one": np.geomspace(1, 2, 13)}).axes[0].texts


def test_long_names_and_many_steps():
    """Names are shortened in the middle, and steps have as many labels as there is room for."""
    steps = range(0, 200_000, 1000)
    for name in ("decoder/layers/attention/xy", "x" * 60 + "y" * 60):
        words = assert_readable(plot.layer_by_step({name: np.ones(200)}, steps=steps))
        assert len(words & set(map(str, steps))) > 3
        assert name in words or "xxxxxxxxxxxxx...yyyyyyyyyyyyyyyyyyyyyyyy" in words
    words = assert_readable(plot.over_training({"x" * 60 + "y" * 60: [1, 2], "x" * 70 + "y" * 50: [2, 3]}))
    assert "xxxxxxxxxxxxx...yyyyyyyyyyyyyyyyyyyyyyyy" in words


def test_numbers_of_a_heat_map_stand_out_from_their_cells():
    ax = plot.layer_by_step({"one": np.geomspace(1e-3, 1e3, 7)}).axes[0]
    (image,) = ax.get_images()
    assert len(ax.texts) == 7
    for text, value in zip(ax.texts, image.get_array()[0], strict=True):
        cell = image.cmap(image.norm(value))[:3]
        assert abs(_lightness(cell) - _lightness(to_rgb(text.get_color()))) > 0.35


def _lightness(colour):
    return float(np.dot([0.2126, 0.7152, 0.0722], np.power(colour, 2.2))) ** (1 / 2.2)


def test_steps_are_those_given():
    values, steps = history(("only",), steps=4), [0, 100, 200, 300]
    assert set(map(str, steps)) <= assert_readable(plot.layer_by_step(values, steps=steps))
    for line in plot.over_training(values, steps=steps).axes[0].get_lines():
        assert list(line.get_xdata()) == steps


@pytest.mark.parametrize("draw", [plot.over_training, plot.layer_by_step])
def test_zeros_and_what_is_not_finite(draw):
    values = history()
    values["embed"] = np.zeros(5)
    values["norm"][2] = np.nan
    values["readout"][-1] = np.inf
    assert set(LAYERS) <= assert_readable(draw(values))
    assert_readable(draw({"a": np.zeros(3), "b": np.zeros(3)}))


def test_axes_of_the_caller():
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    right.plot([0, 1], [1, 1])
    assert plot.layer_by_step(history(), ax=left) is figure
    assert plot.over_training(history(), ax=right) is figure
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(LAYERS)
    pixels, texts = render(figure)
    assert pixels.min() < 0.5
    assert set(LAYERS) <= {text.get_text() for text in texts}


@pytest.mark.parametrize("draw", [plot.over_training, plot.layer_by_step])
@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        ({}, None, "history is empty"),
        ({"a": [1.0, 2.0], "b": [1.0]}, None, r"'b' must have 2 values, one for each step, got shape \(1,\)"),
        ({"a": [1.0, 2.0]}, [0, 1, 2], r"'a' must have 3 values, one for each step, got shape \(2,\)"),
        ({"a": 1.0}, None, r"'a' must have 0 values, one for each step, got shape \(\)"),
    ],
)
def test_history_errors(draw, values, steps, message):
    with pytest.raises(ValueError, match=f"plot.{draw.__name__}: {message}"):
        draw(values, steps=steps)


# ---------------------------------------------------------------------------------------------------------- rms_and_l2


@pytest.mark.parametrize("given", [{"layers": BLOCKS[:13]}, {"widths": (64, 512), "layers": ("only",), "steps": 0}])
def test_rms_and_l2(given):
    drawn = record(**given)
    figure = plot.rms_and_l2(drawn, title="Some model")
    words = assert_readable(figure, len(drawn.layers))
    assert {"RMS norm", "L2 norm per example", "slopes: RMS, L2", "as the root of the width", "width"} <= words
    assert {"Some model", "norm at step 4" if drawn.steps else "norm"} <= words
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    for ax, quantity in ((left, "rms"), (right, "l2")):
        for line, values in zip(ax.get_lines(), drawn.over_seeds(quantity)[:, -1].T, strict=False):
            np.testing.assert_array_equal(line.get_ydata(), values)
    guide = right.get_lines()[-1].get_ydata()
    assert np.log(guide[-1] / guide[0]) / np.log(drawn.widths[-1] / drawn.widths[0]) == pytest.approx(0.5)


def test_pictures_over_depths_do_not_speak_of_widths():
    deep = dataclasses.replace(record(), axis="depth")
    for figure in (plot.rms_and_l2(deep), plot.coord_check(deep)):
        words = assert_readable(figure)
        assert "depth" in words
        assert not [text for text in words if "width" in text]


def test_rms_and_l2_of_nothing_finite():
    drawn = record(steps=0)
    drawn.rms[:] = np.nan
    figure = plot.rms_and_l2(drawn)
    assert "as the root of the width" not in assert_readable(figure)
    assert not any(np.isfinite(line.get_ydata()).any() for ax in figure.axes for line in ax.get_lines())


def test_step_of_rms_and_l2():
    assert plot.rms_and_l2(record(), step=-2).get_supylabel() == "norm at step 3"
    with pytest.raises(ValueError, match=r"plot\.rms_and_l2: step must be one of 0 to 4, or -1 for the last, got 7"):
        plot.rms_and_l2(record(), step=7)


# ----------------------------------------------------------------------------------------------------------- the figure


def test_a_notebook_shows_the_figure():
    figure = plot.over_training({"a": [1.0, 2.0]})
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert re.fullmatch(r"<Figure size \S+ with 1 Axes>", repr(figure))  # beside the picture in a stored notebook


def test_pyplot_is_not_needed():
    code = "import sys, rmsjax.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
