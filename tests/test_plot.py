"""The pictures, rendered and looked at as far as a program can: ink, texts, nothing clipped, nothing overlapping."""

import itertools
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from rmsjax import WidthRecord, plot

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


def assert_readable(figure):
    """Ink in every panel, all texts within the picture, none on another, none of the legend over a panel."""
    pixels, texts = render(figure)
    height, width, _ = pixels.shape
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
    upright = {text: box for text, box in texts.items() if text.get_rotation() % 90 == 0}
    for (a, one), (b, other) in itertools.combinations(upright.items(), 2):
        assert not one.padded(-1).overlaps(other.padded(-1)), (a, b)
    for legend in figure.legends:
        for ax in figure.axes:
            assert not legend.get_window_extent().overlaps(ax.bbox)
    return {text.get_text() for text in texts}


def assert_distinct(ax, count):
    """Each line shows in the pixels, none looks like another, and in print neighbours differ in marker and dashes."""
    lines = ax.get_lines()[:count]
    looks = [(line.get_color(), line.get_marker(), line._unscaled_dash_pattern) for line in lines]
    assert len({str(look) for look in looks}) == count
    for one, other in itertools.pairwise(looks):
        assert all(a != b for a, b in zip(one, other, strict=True))
    pixels, _ = render(ax.figure)
    for line in lines:
        assert np.any(np.all(np.abs(pixels - to_rgb(line.get_color())) < 0.02, -1)), line


# --------------------------------------------------------------------------------------------------------- coord_check


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"widths": (64, 512), "steps": 1, "layers": ("only",)},
        {"steps": 6, "layers": BLOCKS},
        {"steps": 9, "widths": (8, 16, 32, 64, 128, 256, 512, 1024)},
    ],
)
def test_coord_check(given):
    drawn = record(**given)
    figure = plot.coord_check(drawn)
    assert type(figure).__mro__[1] is Figure
    assert len(figure.axes) == drawn.steps
    words = assert_readable(figure)
    assert {f"step {step}" for step in range(1, drawn.steps + 1)} <= words
    assert {str(w) for w in drawn.widths} <= words
    assert {"width", "RMS of the change since step 0", f"verdict: {drawn.verdict}"} <= words
    mean, _, high = (values[-1] for values in drawn.slopes("change"))
    for layer, m, h in zip(drawn.layers, mean, high, strict=True):
        assert any(word.split() == [layer, f"{m:+z.2f}", f"±{h - m:.2f}"] for word in words)
    assert_distinct(figure.axes[0], len(drawn.layers))
    for line, values in zip(figure.axes[-1].get_lines(), drawn.over_seeds("change")[:, -1].T, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), drawn.widths)
        np.testing.assert_array_equal(line.get_ydata(), values)


def test_coord_check_of_the_activations_themselves():
    figure = plot.coord_check(record(), quantity="rms", steps=[0, 4])
    words = assert_readable(figure)
    assert {"step 0", "step 4", "RMS of the activation", "slope at step 4"} <= words
    bottom, top = figure.axes[0].get_ylim()
    assert top / bottom >= 100 * (1 - 1e-9)  # or noise would look like a slope


def test_layers_that_coincide_share_a_line():
    drawn = record()
    drawn.change[..., 2] = drawn.change[..., 1]
    figure = plot.coord_check(drawn)
    assert any(word.startswith("block0/up = block0/down ") for word in assert_readable(figure))
    assert len(figure.axes[0].get_lines()) == len(LAYERS) - 1


def test_what_never_changes_or_is_not_finite_leaves_the_rest():
    drawn = record()
    drawn.change[..., 1] = 0
    drawn.change[-1, ..., 2] = np.inf
    drawn.rms[-1, ..., 2] = np.inf
    assert "verdict: not finite" in assert_readable(plot.coord_check(drawn))


@pytest.mark.parametrize("steps", [[], [5], [-1]])
def test_coord_check_errors(steps):
    with pytest.raises(ValueError, match=r"plot.coord_check: steps must be some of 0 to 4, got"):
        plot.coord_check(record(), steps=steps)


# ----------------------------------------------------------------------------------------------- training and heat map


@pytest.mark.parametrize("given", [{}, {"steps": 400}, {"layers": BLOCKS}, {"steps": 1, "layers": ("only",)}])
def test_over_training(given):
    values = history(**given)
    figure = plot.over_training(values, ylabel="RMS of updates")
    assert {"step", "RMS of updates", *values} <= assert_readable(figure)
    assert_distinct(figure.axes[0], len(values))
    for line, row in zip(figure.axes[0].get_lines(), values.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), row)


@pytest.mark.parametrize("given", [{}, {"steps": 400}, {"layers": BLOCKS}, {"steps": 1, "layers": ("only",)}])
def test_layer_by_step(given):
    values = history(**given)
    figure = plot.layer_by_step(values, label="RMS of updates")
    words = assert_readable(figure)
    assert {"step", "RMS of updates", *values} <= words
    few = given.get("steps", 5) < 100
    assert (f"{values[next(iter(values))][0]:.2g}" in words) == few
    np.testing.assert_array_equal(figure.axes[0].get_images()[0].get_array(), np.stack(list(values.values())))


def test_numbers_of_a_heat_map_stand_out_from_their_cells():
    values = {f"layer{i}": np.geomspace(1e-3, 1e3, 7) for i in range(3)}
    figure = plot.layer_by_step(values)
    image = figure.axes[0].get_images()[0]
    render(figure)
    for text in figure.axes[0].texts:
        cell = image.cmap(image.norm(values["layer0"][int(text.get_position()[0])]))[:3]
        assert abs(_lightness(cell) - _lightness(to_rgb(text.get_color()))) > 0.35


def _lightness(colour):
    return float(np.dot([0.2126, 0.7152, 0.0722], np.power(colour, 2.2))) ** (1 / 2.2)


def test_steps_are_those_given():
    values, steps = history(steps=4), [0, 100, 200, 300]
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


@pytest.mark.parametrize("given", [{}, {"layers": BLOCKS}, {"widths": (64, 512), "layers": ("only",)}])
def test_rms_and_l2(given):
    drawn = record(**given)
    figure = plot.rms_and_l2(drawn)
    words = assert_readable(figure)
    assert {"RMS norm", "L2 norm for one example", "slopes: RMS, L2", "as the root of the width", "width"} <= words
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    for ax, quantity in ((left, "rms"), (right, "l2")):
        for line, values in zip(ax.get_lines(), drawn.over_seeds(quantity)[:, -1].T, strict=False):
            np.testing.assert_array_equal(line.get_ydata(), values)
    guide = right.get_lines()[-1].get_ydata()
    assert np.log(guide[-1] / guide[0]) / np.log(drawn.widths[-1] / drawn.widths[0]) == pytest.approx(0.5)


# ----------------------------------------------------------------------------------------------------------- the figure


def test_a_notebook_shows_the_figure():
    assert plot.rms_and_l2(record())._repr_png_().startswith(b"\x89PNG")


def test_pyplot_is_not_needed():
    code = "import sys, rmsjax.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
