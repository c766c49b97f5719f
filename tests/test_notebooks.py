"""The notebooks run from a clean kernel, without errors or warnings, and show what the code of today gives."""

import base64
import io
import itertools
import re
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import nbclient
import nbformat
import numpy as np
import pytest
from scipy.ndimage import maximum_filter, minimum_filter

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"-?(?:\d+\.?\d*(?:e[+-]?\d+)?|inf|nan)")

pytestmark = pytest.mark.once


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    """What a cell prints and returns; the pieces in which it arrives are a matter of time."""
    printed = "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")
    returned = [out.data["text/plain"] for out in cell.outputs if "data" in out and "image/png" not in out.data]
    return "\n".join([printed, *returned])


def pictures_of(cell):
    found = [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png")[..., :3] for data in found]


def assert_same_text(stored, fresh):
    """Equal words, and numbers that agree but for rounding: of training, that is 10 %."""
    assert NUMBER.sub("#", stored).split() == NUMBER.sub("#", fresh).split()
    numbers = [np.array([float(n) for n in NUMBER.findall(text)]) for text in (stored, fresh)]
    np.testing.assert_allclose(numbers[1], numbers[0], rtol=0.1, atol=0.03)


def unmatched(picture, other, reach=2):
    """The share of a picture's ink that has no like in the other picture within some pixels."""
    window = (2 * reach + 1, 2 * reach + 1, 1)
    low, high = minimum_filter(other, window), maximum_filter(other, window)
    return np.maximum(low - picture, picture - high).clip(0).mean() / (1 - picture).mean()


def assert_same_picture(stored, fresh):
    """Equal but for shifts of two pixels, both ways: a curve may neither appear nor vanish, thin as it is."""
    assert np.abs(np.subtract(stored.shape, fresh.shape)).max() <= 2
    assert stored.std() > 0.05  # not empty
    height, width = np.minimum(stored.shape, fresh.shape)[:2]
    stored, fresh = stored[:height, :width], fresh[:height, :width]
    assert max(unmatched(stored, fresh), unmatched(fresh, stored)) < 0.002


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_it_gives(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS")  # the kernel starts as a user's does
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.reads(nbformat.writes(stored), as_version=4)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(fresh, timeout=600, kernel_name="python3").execute(cwd=str(path.parent))
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert before.execution_count == after.execution_count
        for out in itertools.chain(before.outputs, after.outputs):
            assert out.output_type != "error"
            assert out.get("name") != "stderr", out.text
        assert_same_text(text_of(before), text_of(after))
        for old, new in zip(pictures_of(before), pictures_of(after), strict=True):
            assert_same_picture(old, new)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    """A badge that opens this very file, an install cell that leaves Colab's jax alone, and a small size."""
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# ")
    assert f"colab.research.google.com/github/rmsjax/rmsjax/blob/main/notebooks/{path.name})" in cells[0].source
    assert "except ImportError:\n    %pip install -q rmsjax\n" in cells[1].source
    assert not re.search(r"pip install.*(jax\[|-U|--upgrade|==)", cells[1].source)
    assert path.stat().st_size < 250e3


def test_there_are_four():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


def test_a_stale_notebook_would_be_noticed():
    with pytest.raises(AssertionError, match="Not equal"):
        assert_same_text("slope 0.51 level", "slope 0.95 level")
    with pytest.raises(AssertionError):
        assert_same_text("verdict: level", "verdict: grows")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stale_figure_would_be_noticed(path):
    """Without its blue curve no figure passes; moved by two pixels each does."""
    blue = matplotlib.colors.to_rgb("C0")
    cells = code_cells(nbformat.read(path, as_version=4))
    for picture in itertools.chain.from_iterable(map(pictures_of, cells)):
        assert_same_picture(picture, np.roll(picture, (2, 2), axis=(0, 1)))
        curve = np.abs(picture - blue).max(-1, keepdims=True) < 0.2
        if curve.sum() > 100:  # a heat map has no curve
            with pytest.raises(AssertionError):
                assert_same_picture(picture, np.where(curve, 1, picture))
