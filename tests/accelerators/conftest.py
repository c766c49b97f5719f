"""The devices that are compiled for, each skipped where the compiler for it is not installed."""

import jax
import pytest

from tests.accelerators.compiled import NAMES, missing


@pytest.fixture(autouse=True)
def strict():
    """Implicit promotion, since what is compiled for comparison is not ours."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _available(name):
    if reason := missing(name):
        pytest.skip(f"{NAMES[name]}: {reason}")
    return name


@pytest.fixture(params=NAMES)
def device(request):
    return _available(request.param)


@pytest.fixture
def h100():
    return _available("h100")


@pytest.fixture
def v5e():
    return _available("v5e")
