"""The benchmark for a GPU does what it says, in sizes that a CPU can do; its times here mean nothing."""

import jax
import pytest

from tests.benchmarks import gpu

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
