"""The RMS operator norm against numpy's singular values in float64, and its defining inequality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import rmsjax
from rmsjax import rms_operator_norm, rms_operator_norm_by_path
from tests.helpers.marks import slow

pytestmark = pytest.mark.usefixtures("quick_compiles")

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


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-30, 30))
def test_no_input_gains_more(seed, exponent):
    """RMS(xW) <= norm * RMS(x), and some x comes up to it."""
    rng = np.random.default_rng(seed)
    size = 10.0**exponent * 10.0 ** rng.uniform(-3, 3, size=(len(KERNELS), 1, SHAPE[1]))
    kernels = (size * rng.normal(size=KERNELS.shape)).astype(np.float32)
    norms = np.asarray(BATCHED(kernels), np.float64)
    maximizers = np.linalg.svd(np.float64(kernels))[0][:, :, 0]
    for x, least in ((rng.normal(size=maximizers.shape), 0), (maximizers, 1 - 2e-6)):
        y = np.einsum("ki,kio->ko", x, np.float64(kernels))
        gains = np.sqrt(np.mean(y**2, -1) / np.mean(x**2, -1))
        assert np.all(gains <= norms * (1 + 2e-6))
        assert np.all(gains >= norms * least)


def test_the_iteration_ends_by_its_tolerance():
    """A loose tolerance gives a lower bound within it."""
    kernel = gaussian(200, 120)
    found = float(rms_operator_norm(kernel, tolerance=0.1))
    assert oracle(kernel) * (1 - 0.1) < found < oracle(kernel) * (1 - 1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_derivative(exact):
    directions = gaussian(*KERNELS.shape)

    @jax.jit
    def derivatives(kernels, directions):
        norms = lambda kernels: rms_operator_norm(kernels, exact=exact, tolerance=1e-6)  # noqa: E731
        _, forwards = jax.jvp(norms, (kernels,), (directions,))
        return jax.grad(lambda kernels: jnp.sum(norms(kernels)))(kernels), forwards

    gradients, forwards = derivatives(KERNELS, directions)
    np.testing.assert_allclose(gradients[0], unit_gradient(KERNELS[0]), atol=1e-4)
    np.testing.assert_allclose(gradients[3], unit_gradient(KERNELS[3]), atol=1e-5)
    np.testing.assert_array_equal(gradients[6], 0)  # at zero
    for k in (8, 9):  # the derivative does not know the scale
        np.testing.assert_allclose(gradients[k], unit_gradient(KERNELS[k]), atol=1e-4)
    # A norm is homogeneous, so the derivative along the kernel is the norm; that holds where it is not unique too.
    along = np.sum(np.float64(gradients) * KERNELS, (-2, -1))
    np.testing.assert_allclose(along, [oracle(kernel) for kernel in KERNELS], rtol=1e-5)
    np.testing.assert_allclose(forwards, np.sum(np.float64(gradients) * directions, (-2, -1)), rtol=1e-4, atol=1e-5)


def test_second_derivative_is_exact_or_an_error(x64):
    kernel, direction = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 4))

    def along(t, kernel, exact):
        return rms_operator_norm(kernel + t * direction, exact=exact)

    step = 1e-3
    want = (oracle(kernel + step * direction) - 2 * oracle(kernel) + oracle(kernel - step * direction)) / step**2
    second = jax.jit(jax.grad(jax.grad(lambda t, kernel: along(t, kernel, True))))
    assert float(second(0.0, kernel)) == pytest.approx(want, rel=1e-4)
    for singular in (np.eye(5, 4), np.zeros((5, 4))):  # there the largest singular value repeats
        assert np.isnan(second(0.0, singular))
    with pytest.raises(NotImplementedError, match="first derivative only; set exact=True"):
        jax.grad(jax.grad(lambda t: along(t, kernel, False)))(0.0)


def test_not_finite_stays_visible():
    spoilt = KERNELS.copy()
    spoilt[0, 1, 2], spoilt[1, 1, 2] = np.nan, np.inf
    np.testing.assert_array_equal(np.isnan(BATCHED(spoilt)), [True] * 2 + [False] * (len(KERNELS) - 2))


def test_by_path():
    """Kernels, batches of them, axes of all kinds, and shapes with fewer inputs than the iteration has vectors."""
    params = {
        "dense": {"kernel": gaussian(6, 8), "bias": gaussian(8)},
        "other": {"kernel": gaussian(6, 8)},
        "stack": gaussian(2, 6, 8),
        "attention": gaussian(6, 2, 4),
        "heads": gaussian(2, 2, 6, 4),
        "narrow": gaussian(1, 8),
        "column": gaussian(7, 1),
        "count": np.ones((2, 2), np.int32),
    }
    want = {
        "dense.kernel": oracle(params["dense"]["kernel"]),
        "other.kernel": oracle(params["other"]["kernel"]),
        "stack": [oracle(layer) for layer in params["stack"]],
        "attention": oracle(params["attention"].reshape(6, 8)),
        "heads": [oracle(np.swapaxes(layer, 0, 1).reshape(6, 8)) for layer in params["heads"]],
        "narrow": oracle(params["narrow"]),
        "column": oracle(params["column"]),
    }
    axes = {"attention": (0, (1, 2)), "heads": (2, (1, 3))}

    def select(path, leaf):
        return axes.get(path, leaf.ndim > 1 and path != "count")

    found = jax.jit(lambda tree: rms_operator_norm_by_path(tree, select, sep="."))(params)
    assert found.keys() == want.keys()
    for path, norm in found.items():
        np.testing.assert_allclose(norm, want[path], rtol=1e-6, err_msg=path)
    assert list(rms_operator_norm_by_path(params, lambda path, leaf: False)) == []
    assert list(rms_operator_norm_by_path(params, lambda path, leaf: np.bool_(path == "stack"))) == ["stack"]


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
AXES = {"kernel": (-2, -1), "stack": (-2, -1), "out_of_heads": ((0, 1), 2), "into_heads": (0, (1, 2))}


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, slow(True)])
@pytest.mark.parametrize("kinds", [(EXPLICIT, EXPLICIT), slow((AUTO, EXPLICIT))], ids=str)
def test_kernels_on_several_devices(kinds, exact):
    """Split along any axes: the input, the output, some heads, the batch; beside one that is on no mesh."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    rows, columns, both = P("data"), P(None, "data"), P("model", "data")
    specs = {"kernel": both, "rows": rows, "columns": columns, "stack": both, "into_heads": both, "out_of_heads": both}
    shapes = {"stack": (2, 8, 12), "into_heads": (8, 4, 3), "out_of_heads": (2, 4, 12)}  # one loop for all
    kernels = {name: gaussian(*shapes.get(name, (8, 12))) for name in specs}
    split = {name: jax.device_put(kernel, jax.NamedSharding(mesh, specs[name])) for name, kernel in kernels.items()}

    def norms(tree):
        return rms_operator_norm_by_path(tree, lambda path, _: AXES.get(path, (-2, -1)), exact=exact)

    def total(tree):
        return sum(jnp.sum(norm) for norm in norms(tree).values())

    alone = {"alone": gaussian(8, 12)}
    want, wanted = jax.jit(norms)(kernels | alone), jax.jit(jax.grad(total))(kernels | alone)
    for found in (norms(split | alone), jax.jit(norms)(split | alone)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, want)
    gradients = jax.jit(jax.grad(total))(split | alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients, wanted)
    if AUTO not in kinds:
        assert {name: g.sharding.spec for name, g in gradients.items() if name in split} == {
            name: P(*spec, *[None] * (kernels[name].ndim - len(spec))) for name, spec in specs.items()
        }


def test_kernels_of_a_model():
    """By default the floating leaves of two axes or more."""
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    found = jax.eval_shape(rms_operator_norm_by_path, nnx.state(model, nnx.Param))
    assert list(found) == ["layers/0/kernel", "layers/2/kernel"]


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
