"""RMSNorm in a transformer, where it is used: what it adds to the same model without a norm, against Flax's."""

import pytest

from tests.accelerators.block import UNIT, beyond, model


def at_most(ours, theirs):
    """To half a hundredth of x, which the tables round away: a number more for each row is less than that."""
    return ours <= theirs + 0.005 * UNIT


def test_h100(h100):
    forward, gradient = beyond(h100, "rmsjax")
    assert forward <= 0.1 * UNIT
    assert gradient <= 3 * UNIT


def test_v5e(v5e):
    forward, gradient = beyond(v5e, "rmsjax")
    assert at_most(forward, beyond(v5e, "flax")[0])
    assert gradient <= 7 * UNIT


@pytest.mark.parametrize("part", ["forward", "gradient"])
def test_no_more_than_flax(device, part):
    ours, flax = (getattr(model(device, library), part) for library in ("rmsjax", "flax"))
    assert at_most(ours.bytes, flax.bytes)
    assert at_most(ours.temporary, flax.temporary)
