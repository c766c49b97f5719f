"""The notebooks run from a clean kernel, without errors or warnings, and show what the code of today gives."""

import base64
import io
import itertools
import json
import re
import shlex
import subprocess
import venv
from decimal import Decimal
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
TRAINED = {"02_training", "03_width"}
SECONDS = 90  # that a notebook may take
# What Colab has, and must keep; see also .ci/run.
COLAB = {"jax": "0.7.2", "jaxlib": "0.7.2", "flax": "0.11.2", "optax": "0.2.8"}

pytestmark = pytest.mark.slow


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


def last_digit(number):
    """What one more in the last decimal of a number as printed adds to it; 0 if it has no decimals."""
    exponent = Decimal(number).as_tuple().exponent
    return 10.0**exponent if isinstance(exponent, int) and exponent < 0 else 0.0


def assert_same_text(stored, fresh, *, trained=False):
    """Equal words, and numbers that agree but for rounding. Training multiplies its errors: there 10 % may differ."""
    assert NUMBER.sub("#", stored).split() == NUMBER.sub("#", fresh).split()
    share, digits = (0.1, 3) if trained else (0.01, 1)
    for before, after in zip(NUMBER.findall(stored), NUMBER.findall(fresh), strict=True):
        tolerance = max(1e-6, digits * last_digit(before))  # 1e-6 is what rounding leaves of a 0
        np.testing.assert_allclose(float(after), float(before), rtol=share, atol=tolerance)


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
    fresh.cells.append(nbformat.v4.new_code_cell("import time\nprint(time.process_time())"))
    nbclient.NotebookClient(fresh, timeout=600, kernel_name="python3").execute(cwd=str(path.parent))
    # All that the kernel does is computing, so whatever else runs meanwhile, alone it takes no longer than that.
    assert float(text_of(fresh.cells.pop())) < SECONDS
    for before, after in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert before.execution_count == after.execution_count
        for out in itertools.chain(before.outputs, after.outputs):
            assert out.output_type != "error"
            assert out.get("name") != "stderr", out.text
        assert_same_text(text_of(before), text_of(after), trained=path.stem in TRAINED)
        for old, new in zip(pictures_of(before), pictures_of(after), strict=True):
            assert_same_picture(old, new)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    """A title, headings of which none comes twice, one cell for all that installs rmsjax if need be, a small size."""
    cells = nbformat.read(path, as_version=4).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    headings = [line for text in texts for line in text.splitlines() if line.startswith("#")]
    assert len(set(headings)) == len(headings)
    assert cells[0].source.startswith("# ")
    assert cells[1].source == nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    assert re.match(r'SOURCE = "\.\."  # ', cells[1].source)
    assert path.stat().st_size < 250e3


def installing(source, folder):
    """What the first cell prints where rmsjax is not installed and cannot be, with this SOURCE."""
    cell = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    hide = nbformat.v4.new_code_cell("import sys\nsys.modules['rmsjax'] = None\n%env PIP_NO_INDEX=1")
    first = nbformat.v4.new_code_cell(cell.replace('SOURCE = ".."', f"SOURCE = {source!r}"))
    notebook = nbformat.v4.new_notebook(cells=[hide, first])
    nbclient.NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute(cwd=str(folder))
    return first.outputs


@pytest.mark.parametrize("source", ["..", "no/such.whl", "git+file:///no/such/repository"])
def test_an_install_that_fails_says_what_to_set(source, tmp_path):
    (tmp_path / "alone").mkdir()
    (error,) = [out for out in installing(source, tmp_path / "alone") if out.output_type == "error"]
    assert error.evalue == f"No rmsjax at SOURCE = {source!r}: set it to a folder, a wheel or git+https://..."


def installs():
    """What the %pip lines of all notebooks give to pip, in Colab, where SOURCE is this checkout."""
    sources = ["\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4))) for path in NOTEBOOKS]
    for line in sorted({line for source in sources for line in re.findall(r"^ *%pip install -q (.+)$", source, re.M)}):
        for name in ("jax", "jaxlib"):
            line = line.replace(f"{{{name}.__version__}}", COLAB[name])
        yield shlex.split(line.replace("{address}", ROOT.as_uri()))


@pytest.fixture(scope="module")
def would_install(tmp_path_factory):
    """A function from what pip is given to the packages that it would install where Colab's versions are installed."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name, version in COLAB.items():
        info = packages / f"{name}-{version}.dist-info"  # to pip that is an installed package
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    report = folder / "report.json"

    def pip(*given):
        command = [folder / "bin/pip", "install", "-q", "--dry-run", "--report", report, *given]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def would_install(*given):
        done = pip(*given)
        assert done.returncode == 0, done.stderr
        return {package["metadata"]["name"] for package in json.loads(report.read_text())["install"]}

    if pip("--no-deps", "lineax").returncode:
        pytest.skip("no package index can be reached")
    return would_install


@pytest.mark.parametrize("given", list(installs()), ids=lambda given: given[0])
def test_install_cells_leave_the_versions_of_colab_alone(given, would_install):
    assert would_install(*given) & COLAB.keys() == set()


def test_a_package_that_needs_a_newer_jax_would_be_noticed(would_install):
    assert "jax" in would_install("--no-deps", "jax>0.7.2")


def test_there_are_five():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("trained", [False, True])
def test_a_stale_notebook_would_be_noticed(trained):
    for stored, fresh in [("slope 0.51 level", "slope 0.95 level"), ("rms 0.00072", "rms 0.025"), ("[1.]", "[0.]")]:
        assert_same_text(stored, stored, trained=trained)
        with pytest.raises(AssertionError, match="Not equal"):
            assert_same_text(stored, fresh, trained=trained)
    with pytest.raises(AssertionError):
        assert_same_text("verdict: level", "verdict: grows", trained=trained)


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
