"""The benchmarks for a GPU and of broken batches do what they say, in sizes that a CPU can do at once."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.benchmarks import gpu, spikes

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("group", gpu.GROUPS)
def test_every_row_is_measured(group, capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        gpu.main([group, "--tiny"])
    versions, _, head, rule, *rows = capsys.readouterr().out.splitlines()
    assert "jax" in versions
    assert len(rows) > 1
    for row in (head, rule, *rows):
        assert row.count("|") == len(gpu.COLUMNS) + 1
    for row in rows:
        assert float(row.split("|")[2])


def test_no_row_is_begun_too_late(capsys):
    gpu.main(["rms", "--tiny", "--seconds", "0"])
    *_, row = capsys.readouterr().out.splitlines()
    assert "no time left" in row


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.usefixtures("quick_compiles")
def test_training_with_broken_batches(capsys):
    """One spike in 60 steps of a tiny model: without a clip the run ends worse, after a clip by history as well."""
    sizes = "--steps 60 --seeds 2 --share 0.02 --width 16 --heads 2 --depth 1 --context 8 --batch 8 --every 10"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        spikes.main([*sizes.split(), "--test-windows", "16", "--arms", "history()"])
    _, _, head, rule, *rows = capsys.readouterr().out.splitlines()
    assert all(line.count("|") == len(spikes.COLUMNS) + 1 for line in (head, rule, *rows))
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [name for name, *_ in cells] == ["no clip", "clip_by_history()"]
    free, clipped = (float(row[3].split()[0]) for row in cells)
    assert free > 5 > abs(clipped)


def test_spike_score_and_steps_lost():
    """Of losses with a known spike, but for one on a broken batch; and of a run that ends where another one passed."""
    losses, kinds = np.tile(np.sin(np.arange(150.0)), (2, 1)), np.zeros((2, 150), int)
    losses[:, 100] = 9
    kinds[1, 100] = 2
    np.testing.assert_allclose(spikes.spike_score(losses, kinds), [1 / 100, 0])
    clean = np.array([[5.0, 3, 2, 1], [5, 3, 2, 1]])
    ends = np.array([[0, 0, 0, 2.5], [0, 0, 0, 0.5]])
    np.testing.assert_array_equal(spikes.steps_lost(ends, clean, 10), [10, 0])


def test_the_picture_in_the_notebook_is_of_the_table():
    """The notebook on training draws the losses that the table has."""
    table = (ROOT / "tests/benchmarks/README.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) ±([\d.]+) \| ([\d.]+) ±([\d.]+) \|", table, re.M)
    assert [name for name, *_ in rows] == [*spikes.arms(spikes.parsed([]))]
    cells = json.loads((ROOT / "notebooks/02_training.ipynb").read_text("utf-8"))["cells"]
    source = "".join("".join(cell["source"]) for cell in cells)
    assert [name for name, *numbers in rows if f'"{name}": ({", ".join(numbers)})' not in source] == []
