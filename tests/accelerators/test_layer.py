"""RMSNorm and rms by themselves: as many kernels and bytes as the naive formula, or fewer."""

import pytest

from tests.accelerators import layer
from tests.accelerators.layer import DTYPES, SHAPES, arguments, bytes_of
from tests.helpers.marks import slow

ODD = (37, 113, 768)  # 4,181 rows: no block of any size divides them


def unit(shape, dtype):
    return bytes_of(arguments(shape, dtype)[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("epsilon", "scaled"), [(1e-6, True), (0.0, True), (1e-6, False), (0.0, False)])
def test_forward_h100(h100, shape, dtype, epsilon, scaled):
    program = layer.forward(h100, "rmsjax", shape, dtype, epsilon, scaled=scaled)
    assert program.kernels == 1
    assert program.bytes <= 2.05 * unit(shape, dtype)


@pytest.mark.parametrize("shape", [*SHAPES, slow(ODD)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("epsilon", "scaled"), [(1e-6, True), slow(0.0, True), slow(1e-6, False)])
def test_forward_v5e(v5e, shape, dtype, epsilon, scaled):
    assert layer.forward(v5e, "rmsjax", shape, dtype, epsilon, scaled=scaled).bytes <= 3.05 * unit(shape, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES[:2], slow("float16")])
def test_backward_h100(h100, shape, dtype):
    passes = layer.passes(h100, "rmsjax", shape, dtype)
    assert passes.forward_for_grad.bytes <= 2.05 * unit(shape, dtype)
    assert passes.backward.bytes <= 5.3 * unit(shape, dtype)
    assert passes.backward.temporary < 0.15 * unit(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_backward_of_an_odd_number_of_rows_h100(h100, dtype):
    passes = layer.passes(h100, "rmsjax", ODD, dtype)
    assert passes.forward_for_grad.bytes <= 2.05 * unit(ODD, dtype)
    assert passes.backward.bytes <= 7.1 * unit(ODD, dtype)


@pytest.mark.parametrize("shape", [*SHAPES, ODD], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES[:2], slow("float16")])
def test_backward_v5e(v5e, shape, dtype):
    assert layer.passes(v5e, "rmsjax", shape, dtype).backward.bytes <= 5.1 * unit(shape, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_keeps_x_and_a_number_a_row(device, shape, dtype):
    """And the scale, which is no more than a row."""
    rows, row = unit(shape[:-1], "float32"), unit(shape[-1:], "float32")
    assert layer.passes(device, "rmsjax", shape, dtype).kept <= unit(shape, dtype) + rows + row


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("axis", [None, -1])
def test_rms_reads_once(device, shape, dtype, axis):
    """As the naive formula does; what a kernel hands to the next is less than a tenth of x."""
    ours, naive = (layer.rms(device, library, shape, dtype, axis) for library in ("rmsjax", "naive"))
    assert ours.kernels <= naive.kernels + 1
    assert ours.bytes <= naive.bytes + 0.1 * unit(shape, dtype)
    assert naive.bytes < 1.1 * unit(shape, dtype)
