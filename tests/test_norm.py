"""What `rms` and `rms_normalize` mean: axes, masks, scales, dtypes. How exact they are is in test_accuracy.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rmsjax
from rmsjax import rms, rms_normalize

X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def expected_rms(x, axis=None, keepdims=False, where=True):
    return np.sqrt(np.mean(np.square(np.abs(np.asarray(x, np.complex128))), axis, keepdims=keepdims, where=where))


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), [1, 2], (-1, 0), (0, 1, 2)])
def test_axes(axis, keepdims):
    got = rms(X, axis, keepdims=keepdims)
    want = expected_rms(X, tuple(axis) if isinstance(axis, list) else axis, keepdims)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("value", [3.0, -2, 1 + 1j, [3.0, 4.0], np.float32(2), np.arange(4)])
def test_python_and_numpy_values(value):
    np.testing.assert_allclose(rms(value), expected_rms(value), rtol=1e-6)


def test_a_list_of_traced_numbers():
    np.testing.assert_allclose(jax.jit(lambda a, b: rms([a, b]))(3.0, 4.0), expected_rms([3.0, 4.0]), rtol=1e-6)


def test_integers_of_64_bits(x64):
    """A sum of their squares is beyond float32, in which it is taken."""
    for value in (2**59, 2**63 - 1, -(2**63)):
        np.testing.assert_allclose(rms(jnp.full(4000, value)), abs(float(value)), rtol=1e-6)


def test_what_is_to_be_float64_is_computed_in_float64(x64):
    x = jnp.asarray(X)
    want = X / expected_rms(X.astype(np.float64), -1, keepdims=True)
    np.testing.assert_allclose(rms_normalize(x, epsilon=0, dtype=jnp.float64), want, rtol=1e-14)
    layer = rmsjax.nnx.RMSNorm(5, epsilon=0.0, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(x), want, rtol=1e-14)


def test_scalar_is_its_absolute_value():
    assert rms(-3.5) == 3.5


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (jnp.int8, jnp.float32),
        (jnp.int32, jnp.float32),
        (jnp.float8_e4m3fn, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.complex64, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.complex128, jnp.float64),
        (jnp.int64, jnp.float32),
    ],
)
def test_result_dtype(dtype, result, x64):
    assert rms(jnp.asarray([3, 4]).astype(dtype)).dtype == result
    if jnp.issubdtype(dtype, jnp.inexact):
        assert rms_normalize(jnp.asarray([3, 4]).astype(dtype)).dtype == dtype
        wide = jnp.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float64
        assert rms_normalize(jnp.asarray([3, 4]).astype(dtype), dtype=wide).dtype == wide


@pytest.mark.parametrize("shape", [(3, 4, 5), (5,), (4, 1), (1, 1, 5)])
def test_where_counts_only_what_it_keeps(shape):
    where = np.random.default_rng(1).random(shape) < 0.6
    full = np.broadcast_to(where, X.shape)
    np.testing.assert_allclose(rms(X, where=where), expected_rms(X, where=full), rtol=1e-6)
    kept = full.any(-1)
    got = rms(X, axis=-1, where=where)
    np.testing.assert_allclose(got[kept], expected_rms(X[kept], -1, where=full[kept]), rtol=1e-6)
    assert (got[~kept] == 0).all()


@pytest.mark.parametrize("hidden", [np.nan, np.inf, 3e38])
def test_masked_out_elements_touch_nothing(hidden):
    where = np.array([True, False, True, True])
    clean, dirty = np.array([1.0, 0.0, 2.0, 3.0], np.float32), np.array([1.0, hidden, 2.0, 3.0], np.float32)
    for fn in (lambda x: rms(x, where=where), lambda x: rms_normalize(x, where=where).sum()):
        np.testing.assert_array_equal(fn(dirty), fn(clean))
        np.testing.assert_array_equal(jax.grad(fn)(dirty), jax.grad(fn)(clean))
    assert rms_normalize(dirty, where=where)[1] == 0


def test_hidden_elements_do_not_show_even_in_debug_mode():
    x, where = jnp.array([1.0, jnp.nan, 2.0, jnp.inf]), np.array([True, False, True, False])
    with jax.debug_nans(True):
        for f in (lambda x: rms(x, where=where), lambda x: rms_normalize(x, where=where).sum()):
            assert jnp.isfinite(jax.grad(f)(x)).all()


def test_the_count_of_what_is_kept_does_not_overflow():
    """2^32 elements, on 2^16 mapped devices."""
    ones = jnp.ones(2**16)
    everywhere = jax.vmap(lambda _: rms(ones, where=ones > 0, axis_name="i"), axis_name="i")
    np.testing.assert_array_equal(everywhere(ones)[:2], 1)


def test_of_equal_parts_the_norm_of_norms_is_that_of_the_whole():
    x = jnp.asarray(np.random.default_rng(0).normal(size=640) * 1e30, jnp.float32)
    by_parts = jax.jit(lambda x: rms(jax.lax.map(lambda part: rms(part * 2), x.reshape(32, -1))))(x)
    np.testing.assert_allclose(by_parts, 2 * rms(x), rtol=1e-6)


def test_nothing_left_is_zero():
    none = np.zeros(4, bool)
    x = jnp.array([1.0, jnp.nan, jnp.inf, 2.0])
    for epsilon in (0.0, 1e-6):
        np.testing.assert_array_equal(rms_normalize(x, epsilon=epsilon, where=none), np.zeros(4))
    assert rms(x, where=none) == 0
    np.testing.assert_array_equal(jax.grad(lambda x: rms(x, where=none))(x), np.zeros(4))


def test_non_finite_values_stay_visible():
    assert rms(jnp.array([jnp.inf, 1.0])) == jnp.inf
    assert rms(jnp.array([-jnp.inf, 1.0])) == jnp.inf
    assert jnp.isnan(rms(jnp.array([jnp.nan, 1.0])))
    assert jnp.isnan(rms(jnp.array([jnp.nan, jnp.inf])))
    rows = rms(jnp.array([[jnp.nan, 1.0], [3.0, 4.0], [jnp.inf, 1.0]]), axis=-1)
    np.testing.assert_allclose(rows, [np.nan, np.sqrt(12.5), np.inf], rtol=1e-6)
    assert jnp.isnan(rms_normalize(jnp.array([jnp.nan, 1.0]))).all()
    assert not jnp.isfinite(rms_normalize(jnp.array([jnp.inf, 1.0]))).all()


def expected_normalize(x, scale=1.0, axis=-1, epsilon=1e-6, offset=0.0):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(np.square(x), axis, keepdims=True) + epsilon) * (np.asarray(scale, np.float64) + offset)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.3, 1e20])
@pytest.mark.parametrize("axis", [-1, 1, (0, 2), None])
def test_normalize(axis, epsilon):
    got = rms_normalize(X, axis=axis, epsilon=epsilon)
    want = expected_normalize(X, axis=(0, 1, 2) if axis is None else axis, epsilon=epsilon)
    np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "broadcast"),
    [
        ((5,), -1, (1, 1, 5)),
        ((4,), 1, (1, 4, 1)),
        ((3, 5), (2, 0), (3, 1, 5)),  # in the order of the axes in x
        ((3, 4, 5), None, (3, 4, 5)),
        ((1, 4, 1), -1, (1, 4, 1)),
        ((3, 1, 5), -1, (3, 1, 5)),
    ],
)
def test_shapes_of_scale(shape, axis, broadcast):
    scale = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    got = rms_normalize(X, scale, axis=axis, scale_offset=1.0)
    want = expected_normalize(X, scale.reshape(broadcast), (0, 1, 2) if axis is None else axis, offset=1.0)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_half_precision_rounds_once():
    x = jnp.asarray(X, jnp.bfloat16)
    scale = jnp.asarray(np.random.default_rng(3).normal(size=5), jnp.float32)
    once = jnp.asarray(expected_normalize(x.astype(jnp.float32), scale), jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rms_normalize(x, scale).astype(jnp.float32), once.astype(jnp.float32))


def test_result_has_norm_one():
    np.testing.assert_allclose(rms(rms_normalize(X * 1e25, epsilon=0), axis=-1), np.ones((3, 4)), rtol=1e-6)


def test_backward_keeps_x_in_its_own_dtype_the_scale_and_a_number_a_row():
    x, scale = jnp.ones((8, 16, 32), jnp.bfloat16), jnp.ones(32)
    _, vjp = jax.vjp(lambda x, scale: rms_normalize(x, scale), x, scale)
    kept = sorted((leaf.dtype.name, leaf.size) for leaf in jax.tree.leaves(vjp) if leaf.size > 1)
    assert kept == [("bfloat16", 8 * 16 * 32), ("float32", 32), ("float32", 8 * 16)]


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="XLA of jax 0.7 stores x in float32, once")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(8, 512, 768), (4, 1024, 4096), (65536, 128)])
def test_backward_needs_no_memory(shape, dtype):
    """Under 1 MB beside its results: no copy of x in float32, which has up to 67 MB here."""

    def both(x, scale, ct):
        y, vjp = jax.vjp(rms_normalize, x, scale)
        return y, vjp(ct)

    x = jax.ShapeDtypeStruct(shape, dtype)
    compiled = jax.jit(both).lower(x, jax.ShapeDtypeStruct(shape[-1:], jnp.float32), x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1e6


@pytest.mark.parametrize("f", [lambda x: rms(x, -1), rms_normalize], ids=["rms", "rms_normalize"])
def test_norms_of_rows_are_computed_as_a_vector(f):
    """XLA:CPU computes one by one what has a last axis of size 1, and that takes longer than the sums of short rows."""
    if f is rms_normalize and jax.__version_info__ >= (0, 11):
        pytest.skip("XLA of jax 0.12 undoes it for the inverse of the norms")
    text = jax.jit(f).lower(jnp.ones((4096, 128))).compile().as_text()
    assert " fusion(" in text
    assert not re.search(r"\[4096,1\]\S* fusion\(", text)


def test_vmap_keeps_the_branch():
    """Under vmap the rescaled reduction stays in a conditional: it does not run beside the naive one."""
    text = jax.jit(jax.vmap(jax.vmap(rms))).lower(jnp.ones((4, 5, 6))).compile().as_text()
    assert "conditional" in text


def test_small_dtypes_pay_nothing_for_range_safety():
    for dtype in (jnp.float16, jnp.float8_e4m3fn, jnp.int32):
        text = jax.jit(rms).lower(jnp.ones(6, dtype)).compile().as_text()
        assert "conditional" not in text
    assert "conditional" in jax.jit(rms).lower(jnp.ones(6, jnp.bfloat16)).compile().as_text()


def test_masks_of_single_numbers():
    assert rms(3.0, where=True) == 3
    assert rms(3.0, where=False) == 0
    assert rms_normalize(jnp.float32(-3), axis=None, epsilon=0, where=jnp.array(True)) == -1
    x, where = jnp.arange(1.0, 5.0), jnp.array([True, False, True, True])
    np.testing.assert_array_equal(jax.vmap(lambda x, w: rms(x, where=w))(x, where), [1, 0, 3, 4])


@pytest.mark.parametrize(
    "function",
    [
        rms,
        lambda x: rms(x, -1),
        lambda x: rms_normalize(x, axis=None),
        lambda x: rmsjax.tree_rms([x, x, x[0]]),
        lambda x: rmsjax.tree_rms([x, x, x[0]], "block"),
        lambda x: rmsjax.tree_rms([x, x[0]], 0),
        lambda x: rmsjax.clip_by_rms(1.0).update([x, x[0]], None)[0],
        jax.grad(rms),
        jax.grad(lambda x: jnp.sum(jnp.sin(rms_normalize(x)))),
        lambda x: jax.grad(lambda scale: jnp.sum(jnp.sin(rms_normalize(jnp.stack([x, x], -1), scale))))(jnp.ones(2)),
    ],
)
def test_sizes_may_be_symbolic(function):
    """An exported function gives what it gives for arrays of the size that it is called with."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    shape = jax.export.symbolic_shape("rows, columns")
    exported = jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct(shape, x.dtype))
    for got, want in zip(jax.tree.leaves(exported.call(x)), jax.tree.leaves(function(x)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(31, 33), (64, 64), (3, 17, 40), (300, 300)])
def test_digits_do_not_suffer_from_many_devices(shape):
    """Equal numbers, whose additions all round in one direction; eight devices are visible, and x is on one of them."""
    for value in np.float32([0.7, 1.2345, 1.9]):
        got = rms(jnp.full(shape, value))
        assert abs(float(got) - float(value)) <= 24 * np.spacing(value)
