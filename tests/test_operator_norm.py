"""The RMS operator norm against numpy's singular values in float64, and its defining inequality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import rmsjax
from rmsjax import rms_operator_norm, rms_operator_norm_by_path

RNG = np.random.default_rng(0)
SHAPE = (24, 16)


def oracle(kernel):
    """In float64, after a rescale by the largest element."""
    kernel = np.asarray(kernel)
    kernel = kernel.astype(np.complex128 if np.iscomplexobj(kernel) else np.float64)
    largest = np.abs(kernel).max() or 1.0
    fan_in, fan_out = kernel.shape
    return np.sqrt(fan_in / fan_out) * np.linalg.norm(kernel / largest, 2) * largest


def unit_gradient(kernel):
    """Of the norm: the outer product of the singular vectors, times sqrt(fan_in/fan_out)."""
    u, _, vh = np.linalg.svd(np.asarray(kernel, np.float64))
    return np.sqrt(kernel.shape[0] / kernel.shape[1]) * np.outer(u[:, 0], vh[0])


def gaussian(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def make_kernels():
    """[n, 24, 16]: kernels that are hard for an iteration, for a norm, or for both."""
    rows = np.arange(SHAPE[0])[:, None]
    clustered = np.eye(*SHAPE) * np.linspace(0.999, 1, SHAPE[0])[:, None]
    return np.stack(
        [
            gaussian(*SHAPE),
            np.eye(*SHAPE),  # all singular values are equal
            clustered,
            gaussian(SHAPE[0], 1) * gaussian(1, SHAPE[1]),  # rank 1
            (rows == 3) * gaussian(1, SHAPE[1]),  # one row
            np.ones(SHAPE),
            np.zeros(SHAPE),
            gaussian(*SHAPE) * 3.0**-rows,  # badly scaled
            1e30 * gaussian(*SHAPE),
            1e-30 * gaussian(*SHAPE),
            np.where(gaussian(*SHAPE) > 0, 2.0**126, -(2.0**126)) / 8,  # the norm is nearly the largest number
        ]
    ).astype(np.float32)


KERNELS = make_kernels()
BATCHED = jax.jit(rms_operator_norm, static_argnames=("in_axis", "out_axis", "exact", "tolerance"))


@pytest.mark.parametrize("exact", [False, True])
def test_the_norm_is_that_of_numpy(exact):
    found = np.asarray(BATCHED(KERNELS, exact=exact), np.float64)
    np.testing.assert_allclose(found, [oracle(kernel) for kernel in KERNELS], rtol=2e-6)


def test_shapes_with_fewer_inputs_than_vectors():
    found = jax.jit(rms_operator_norm_by_path)({"in": KERNELS[0][:1], "out": KERNELS[0][:7, :1]})
    assert float(found["in"]) == pytest.approx(oracle(KERNELS[0][:1]), rel=1e-6)
    assert float(found["out"]) == pytest.approx(oracle(KERNELS[0][:7, :1]), rel=1e-6)


def test_dtypes(x64):
    half = gaussian(*SHAPE).astype(jnp.bfloat16)
    found = rms_operator_norm(half)
    assert found.dtype == np.float32
    assert float(found) == pytest.approx(oracle(half.astype(np.float32)), rel=1e-6)
    wide = RNG.normal(size=(6, 9)) + 1j * RNG.normal(size=(6, 9))
    for exact in (False, True):
        found = rms_operator_norm(wide, exact=exact, tolerance=1e-9)
        assert found.dtype == np.float64
        assert float(found) == pytest.approx(oracle(wide), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-30, 30), st.booleans())
def test_no_input_gains_more(seed, exponent, towards_maximizer):
    """RMS(xW) <= norm * RMS(x), and some x comes up to it."""
    rng = np.random.default_rng(seed)
    kernel = (10.0**exponent * rng.normal(size=SHAPE) * 10.0 ** rng.uniform(-3, 3, size=SHAPE[1])).astype(np.float32)
    norm = float(BATCHED(kernel))
    u, _, _ = np.linalg.svd(np.float64(kernel))
    x = u[:, 0] if towards_maximizer else rng.normal(size=SHAPE[0])
    gain = float(np.sqrt(np.mean(np.square(x @ np.float64(kernel))) / np.mean(np.square(x))))
    assert gain <= norm * (1 + 2e-6)
    if towards_maximizer:
        assert gain >= norm * (1 - 2e-6)


def test_the_iteration_ends_by_its_tolerance():
    """A loose tolerance gives a lower bound in its distance; a tight one gives all the digits."""
    kernel = gaussian(200, 120)
    loose, tight = (float(rms_operator_norm(kernel, tolerance=t)) for t in (0.1, 1e-5))
    assert loose < tight * (1 - 1e-6)
    assert loose > tight * (1 - 0.1)
    assert tight == pytest.approx(oracle(kernel), rel=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_derivative(exact):
    gradients = jax.jit(jax.grad(lambda ks: jnp.sum(rms_operator_norm(ks, exact=exact, tolerance=1e-6))))(KERNELS)
    np.testing.assert_allclose(gradients[0], unit_gradient(KERNELS[0]), atol=1e-4)
    np.testing.assert_allclose(gradients[3], unit_gradient(KERNELS[3]), atol=1e-5)
    np.testing.assert_array_equal(gradients[6], 0)  # at zero
    for k in (8, 9):  # the derivative does not know the scale
        np.testing.assert_allclose(gradients[k], unit_gradient(KERNELS[k]), atol=1e-4)
    # A norm is homogeneous, so the derivative along the kernel is the norm; that holds where it is not unique too.
    along = np.sum(np.float64(gradients) * KERNELS, (-2, -1))
    np.testing.assert_allclose(along, [oracle(kernel) for kernel in KERNELS], rtol=1e-5)


def test_forward_mode_is_reverse_mode():
    kernel, direction = gaussian(*SHAPE), gaussian(*SHAPE)
    _, change = jax.jvp(rms_operator_norm, (kernel,), (direction,))
    assert float(change) == pytest.approx(np.vdot(unit_gradient(kernel), direction), rel=1e-3)


def test_second_derivative_is_exact_or_an_error(x64):
    kernel, direction = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 4))

    def along(t, exact):
        return rms_operator_norm(kernel + t * direction, exact=exact)

    step = 1e-3
    want = (oracle(kernel + step * direction) - 2 * oracle(kernel) + oracle(kernel - step * direction)) / step**2
    found = jax.jit(jax.grad(jax.grad(lambda t: along(t, True))))(0.0)
    assert float(found) == pytest.approx(want, rel=1e-4)
    with pytest.raises(NotImplementedError, match="first derivative only; set exact=True"):
        jax.grad(jax.grad(lambda t: along(t, False)))(0.0)


def test_not_finite_stays_visible():
    spoilt = KERNELS.copy()
    spoilt[0, 1, 2], spoilt[1, 1, 2] = np.nan, np.inf
    np.testing.assert_array_equal(np.isfinite(BATCHED(spoilt)), [False] * 2 + [True] * (len(KERNELS) - 2))


def test_axes_of_a_kernel():
    heads = gaussian(3, 12, 4, 5)  # layers, features, heads, size of a head
    found = rms_operator_norm(heads, in_axis=1, out_axis=(2, 3))
    np.testing.assert_allclose(found, [oracle(layer.reshape(12, 20)) for layer in heads], rtol=1e-6)


def test_by_path():
    params = {
        "dense": {"kernel": gaussian(6, 8), "bias": gaussian(8)},
        "other": {"kernel": gaussian(6, 8)},
        "stack": gaussian(2, 6, 8),
        "attention": gaussian(6, 2, 4),
        "count": np.ones((2, 2), np.int32),
    }
    want = {
        "dense.kernel": oracle(params["dense"]["kernel"]),
        "other.kernel": oracle(params["other"]["kernel"]),
        "stack": [oracle(layer) for layer in params["stack"]],
        "attention": oracle(params["attention"].reshape(6, 8)),
    }

    def select(path, leaf):
        return (0, (1, 2)) if path == "attention" else leaf.ndim > 1 and path != "count"

    found = jax.jit(lambda tree: rms_operator_norm_by_path(tree, select, sep="."))(params)
    assert found.keys() == want.keys()
    for path, norm in found.items():
        np.testing.assert_allclose(norm, want[path], rtol=1e-6)
    assert list(rms_operator_norm_by_path(params["dense"])) == ["kernel"]
    assert list(rms_operator_norm_by_path(params, lambda path, leaf: False)) == []


def test_by_path_of_a_model():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    found = rms_operator_norm_by_path(nnx.state(model, nnx.Param))
    assert list(found) == ["layers/0/kernel", "layers/2/kernel"]
    assert float(found["layers/0/kernel"]) == pytest.approx(oracle(model.layers[0].kernel[...]), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: rms_operator_norm(jnp.ones((2, 2), int)), TypeError, "kernel must be an array of floating"),
        (lambda: rms_operator_norm(jnp.ones(3)), ValueError, "in_axis -2 is out of range"),
        (lambda: rms_operator_norm(jnp.ones((3, 4)), in_axis=1), ValueError, "in_axis 1 and out_axis -1 share an axis"),
        (lambda: rms_operator_norm(jnp.ones((3, 0))), ValueError, r"shape \(3, 0\) has no elements"),
        (lambda: rms_operator_norm(jnp.ones((3, 4)), tolerance=0), ValueError, "tolerance must be positive, got 0"),
        (lambda: rms_operator_norm_by_path({"a": jnp.ones((2, 2))}, lambda *_: 3), TypeError, "got 3 for 'a'"),
        (
            lambda: rms_operator_norm_by_path({"a": jnp.ones(2)}, lambda *_: True),
            ValueError,
            r"in_axis -2 is out of range .* \(leaf 'a'\)",
        ),
        (
            lambda: rms_operator_norm_by_path({"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}}),
            ValueError,
            "several kernels have the path 'a/b'",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_public_names():
    assert rmsjax.rms_operator_norm is rms_operator_norm
    assert {"rms_operator_norm", "rms_operator_norm_by_path"} <= set(dir(rmsjax))
