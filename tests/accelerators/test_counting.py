"""The counting itself: on programs whose kernels and bytes are known, and on lines as XLA writes them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.accelerators.compiled import compiled, counted, size_of

X = jax.ShapeDtypeStruct((1024, 256, 128), jnp.float32)
UNIT = X.size * 4


def program(device, fn, *args):
    found = compiled(device, fn, *args)
    return found._replace(bytes=found.bytes / UNIT)


@pytest.mark.parametrize(
    ("fn", "count", "kernels"),
    [
        pytest.param(lambda x: x * 2, 2, 1, id="read and write"),
        pytest.param(lambda x: jnp.sin(x) * jnp.cos(x) + x, 2, 1, id="a chain is one kernel"),
        pytest.param(lambda x: x.astype(jnp.bfloat16), 1.5, 1, id="half as many bytes"),
        pytest.param(lambda x: lax.optimization_barrier(x * 2) + 1, 4, 2, id="a barrier makes two"),
        pytest.param(lambda x: jnp.sin(x[:256]), 0.5, 1, id="a slice is read alone"),
        pytest.param(lambda x: jnp.zeros(X.shape), 1, 1, id="written alone"),
        pytest.param(lambda x: [x + k for k in range(1, 8)], 8, None, id="a tuple of more than five"),
        pytest.param(lambda x: [jnp.sum(x * k) for k in range(1, 8)], 1, None, id="seven sums in one reading"),
    ],
)
def test_known_programs(device, fn, count, kernels):
    found = program(device, fn, X)
    assert found.bytes == pytest.approx(count, abs=0.01)
    assert kernels in (None, found.kernels)
    assert found.conditionals == 0


def test_sum(device):
    """Read once; a GPU has a second kernel for the sum of the sums of its blocks."""
    found = program(device, jnp.sum, X)
    assert found.bytes == pytest.approx(1, abs=0.01)
    assert found.kernels <= 2


def test_arithmetic_of_single_numbers_is_no_kernel(v5e):
    """A TPU does it in its scalar unit, in an instruction for each operation."""
    plain, more = (
        compiled(v5e, fn, X) for fn in (jnp.sum, lambda x: jnp.sqrt(jnp.maximum(jnp.sum(x) / 3, 2) * 5).reshape(1, 1))
    )
    assert (more.kernels, more.bytes) == (plain.kernels, plain.bytes)


def test_two_readings(device):
    """The sum is wanted before the elements are."""
    assert program(device, lambda x: x / jnp.sum(x), X).bytes == pytest.approx(3, abs=0.01)


def test_loops_count_as_often_as_they_run(device):
    """Each step reads its part and writes its part; before them all, the memory of the results is filled with zeros."""
    assert program(device, lambda x: lax.map(jnp.sin, x), X).bytes == pytest.approx(3, abs=0.01)


def test_unknown_loops_are_refused(device):
    with pytest.raises(ValueError, match="cannot tell how often the loop"):
        program(device, lambda x: lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x / 2, x), X)


def test_conditional(device):
    """A TPU runs one branch of two, and the cheaper one counts; XLA:GPU runs both, and selects."""

    def either(x):
        return lax.cond(jnp.sum(x) > 0, lambda x: jnp.sum(jnp.sin(x)), lambda x: jnp.sum(jnp.cos(x) / jnp.max(x)), x)

    found = program(device, either, X)
    assert found.conditionals == (device == "v5e")
    assert found.bytes == pytest.approx(2, abs=0.01)


def test_seconds_and_temporary_memory(device):
    found = compiled(device, lambda x: jnp.sum(lax.optimization_barrier(x * 2)), X)
    assert found.temporary >= UNIT
    assert found.seconds > 0.001


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,4]{1,0}", 128),
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("bf16[8,4]{1,0:T(8,128)(2,1)}", 64),
        ("f8e4m3fn[5]{0}", 5),
        ("s4[5]{0}", 3),
        ("c64[2]{0}", 16),
        ("f32[8,4]{1,0:T(8,128)S(1)}", 0),
        ("token[]", 0),
        ("(f32[2]{0}, (bf16[4]{0:T(128)}, u32[]{:S(2)}))", 16),
        ("f32[0,4]{1,0}", 0),
    ],
)
def test_size_of(shape, size):
    assert size_of(shape) == size


def entry(*lines, before=()):
    return "\n".join([*before, "ENTRY %main (x: f32[256]) -> f32[256] {", *(f"  {line}" for line in lines), "}"])


PARAMETER = "%x = f32[256]{0} parameter(0)"


def test_asynchronous_copies():
    """What goes to the memory of the chip is read, what comes back is written, and a slice is as long as the slice."""
    text = entry(
        PARAMETER,
        "%in = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%x)",
        "%there = f32[256]{0:S(1)} copy-done(%in)",
        "%part = ((f32[256]{0}), f32[64]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:64]}",
        "%piece = f32[64]{0:S(1)} slice-done(%part)",
        "%negative = f32[256]{0:S(1)} negate(%there)",
        "%out = (f32[256]{0}, f32[256]{0:S(1)}, u32[]{:S(2)}) copy-start(%negative)",
        "ROOT %back = f32[256]{0} copy-done(%out)",
    )
    assert counted(text) == (4, 1024 + 256 + 0 + 1024, 0)


def test_operands_count_once_and_updates_in_place_by_themselves():
    fused = [
        "%fused (p: f32[256], q: f32[8], i: s32[]) -> f32[256] {",
        "  %i = s32[] parameter(2)",
        "  %p = f32[256]{0} parameter(0)",
        "  %q = f32[8]{0} parameter(1)",
        "  ROOT %new = f32[256]{0} dynamic-update-slice(%p, %q, %i)",
        "}",
    ]
    text = entry(
        PARAMETER,
        "%small = f32[8]{0} parameter(1)",
        "%at = s32[] parameter(2)",
        "%square = f32[256]{0} multiply(%x, %x)",
        "ROOT %put = f32[256]{0} fusion(%square, %small, %at), kind=kLoop, calls=%fused",
        before=fused,
    )
    assert counted(text) == (2, 2048 + 32 + 4 + 32, 0)


def test_branches_and_calls():
    """The cheapest branch counts, numbered or not, and what is called counts as if it were here."""
    cheap = ["%cheap (a: f32[256]) -> f32[256] {", "  ROOT %a = f32[256]{0} parameter(0)", "}"]
    dear = [
        "%dear (b: f32[256]) -> f32[256] {",
        "  %b = f32[256]{0} parameter(0)",
        "  ROOT %c = f32[256]{0} sine(%b)",
        "}",
    ]
    text = entry(
        PARAMETER,
        "%p = pred[] parameter(1)",
        "%one = f32[256]{0} conditional(%p, %x, %x), true_computation=%dear, false_computation=%cheap",
        "%two = f32[256]{0} conditional(%p, %one, %one), branch_computations={%dear, %dear}",
        "ROOT %three = f32[256]{0} call(%two), to_apply=%dear",
        before=[*cheap, *dear],
    )
    assert counted(text) == (2, 2 * 2048, 2)
