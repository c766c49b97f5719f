"""Derivatives against closed forms in float64: at ordinary points, at zero, at both ends of the range, behind masks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import rmsjax
from rmsjax import rms, rms_normalize, tree_rms
from tests.helpers.marks import QUICK_ON_CPU, quick_of
from tests.helpers.oracle import LIKELY

pytestmark = pytest.mark.usefixtures("form", "quick_compiles")
RNG = np.random.default_rng(5)
N = 6
X, T, C = RNG.normal(size=(3, N))
SCALE = RNG.uniform(0.5, 2.0, N)
KEPT = np.array([True, False, True, True, False, True])


# -------------------------------------------------------------------------------------------------------- closed forms


class Norm:
    """sqrt(mean(x^2) + epsilon), in float64."""

    def __init__(self, x, epsilon=0.0):
        self.x, self.n = x, x.size
        self.value = np.sqrt(np.mean(x**2) + epsilon)
        self.gradient = x / (self.n * self.value)
        self.hessian = (np.eye(self.n) / self.n - np.outer(self.gradient, self.gradient)) / self.value


def normalized(x, scale, epsilon):
    """(y, dy/dx, d2y/dx2, dy/dscale) of y = scale * x / rho."""
    norm = Norm(x, epsilon)
    rho, d, h = norm.value, norm.gradient, norm.hessian
    eye = np.eye(x.size)
    jacobian = eye / rho - np.outer(x, d) / rho**2
    second = (
        -np.einsum("ij,k->ijk", eye, d) / rho**2
        - np.einsum("ik,j->ijk", eye, d) / rho**2
        - np.einsum("i,jk->ijk", x, h) / rho**2
        + 2 * np.einsum("i,j,k->ijk", x, d, d) / rho**3
    )
    return scale * x / rho, scale[:, None] * jacobian, scale[:, None, None] * second, np.diag(x / rho)


def everything(f, x, t):
    """The value of f and all its first and second derivatives, in both modes and their mixtures."""
    value, forward = jax.jvp(f, (x,), (t,))
    return {
        "value": value,
        "jvp": forward,
        "jacfwd": jax.jacfwd(f)(x),
        "jacrev": jax.jacrev(f)(x),
        "fwd over rev": jax.jacfwd(jax.jacrev(f))(x),
        "rev over fwd": jax.jacrev(jax.jacfwd(f))(x),
        "rev over rev": jax.jacrev(jax.jacrev(f))(x),
        "fwd over fwd": jax.jacfwd(jax.jacfwd(f))(x),
    }


def assert_everything(found, value, jacobian, hessian, t, size=1.0, degree=1, rtol=2e-5):
    """`found` at size * x, where f(size * x) = size^degree f(x): then derivatives scale with lower powers of size."""
    want = {"value": value, "jvp": jacobian @ t}
    want |= dict.fromkeys(("jacfwd", "jacrev"), jacobian) | {k: hessian for k in found if "over" in k}
    for name, expected in want.items():
        order = 0 if name == "value" else 2 if "over" in name else 1
        scaled = np.asarray(found[name], np.float64) * size ** float(order - degree)
        np.testing.assert_allclose(scaled, expected, rtol=rtol, atol=rtol * np.abs(expected).max(), err_msg=name)


def as_tree(x):
    return {"a": x[:1], "b": x[1:].reshape(-1, 1)}


NORMS = {
    "rms": rms,
    "tree_rms": lambda x: tree_rms(as_tree(x)),
    "tree_rms by label": lambda x: tree_rms(as_tree(x), lambda path, leaf: "all")["a"],
    "rms_by_path": lambda x: rmsjax.rms_by_path({"x": x})["x"],
    "rms_by_path of a layer": lambda x: rmsjax.rms_by_path(
        jax.tree.map(lambda leaf: leaf[None], as_tree(x)), stacked="", scope=lambda path, leaf: "all"
    )["all/0"],
}
SIZES = [1.0, 1e30, 1e-30]


@pytest.mark.parametrize("name", quick_of(NORMS, "rms", "tree_rms", "tree_rms by label"))
def test_norms(name):
    norm = Norm(X)
    program = jax.jit(partial(everything, NORMS[name]))
    for size in SIZES:
        found = program(jnp.asarray(size * X, jnp.float32), jnp.asarray(T, jnp.float32))
        assert_everything(found, norm.value, norm.gradient, norm.hessian, T, size)


@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
def test_normalize(epsilon):
    f = jax.jit(partial(everything, lambda x: rms_normalize(x, jnp.asarray(SCALE, jnp.float32), epsilon=epsilon)))
    value, jacobian, hessian, _ = normalized(X, SCALE, epsilon)
    found = f(jnp.asarray(X, jnp.float32), jnp.asarray(T, jnp.float32))
    assert_everything(found, value, jacobian, hessian, T, degree=0)
    if epsilon == 0:  # second derivatives by elements, of the order of 1e-60 and 1e60, are beyond float32
        for size in SIZES[1:]:
            found = f(jnp.asarray(size * X, jnp.float32), jnp.asarray(T, jnp.float32))
            np.testing.assert_allclose(found["value"], value, rtol=1e-5)
            for mode in ("jacfwd", "jacrev"):
                got = np.asarray(found[mode], np.float64) * size
                np.testing.assert_allclose(got, jacobian, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradient_of_normalize_in_16_bits(dtype):
    x, c = (jnp.asarray(a, dtype) for a in (X, C))
    _, jacobian, _, by_scale = normalized(np.float64(x), SCALE, 1e-6)
    y, vjp = jax.vjp(partial(rms_normalize, epsilon=1e-6), x, jnp.asarray(SCALE, jnp.float32))
    found = vjp(c.astype(y.dtype))
    for got, want in zip(found, (np.float64(c) @ jacobian, np.float64(c) @ by_scale), strict=True):
        eps = float(jnp.finfo(dtype).eps)  # that to which the results are rounded, beside terms in float32
        np.testing.assert_allclose(np.float64(got), want, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_second_derivatives_of_normalize_along_tangents_of_the_size_of_x(size):
    """These are in range, so nothing on the way may leave it, such as 1/rho^2."""
    x, t, scale, c = (jnp.asarray(a, jnp.float32) for a in (size * X, size * T, SCALE, C))
    f = partial(rms_normalize, scale=scale, epsilon=0.0)

    def forward(x):
        return jax.jvp(f, (x,), (t,))[1]

    def reverse(x):
        return jax.vjp(f, x)[1](c)[0]

    @jax.jit
    def second(x):
        mixed = jax.jvp(reverse, (x,), (t,))[1], jax.vjp(forward, x)[1](c)[0], jax.vjp(reverse, x)[1](t)[0]
        return jax.jvp(forward, (x,), (t,))[1], mixed

    hessian = normalized(X, SCALE, 0.0)[2]
    twice_forward, mixed = second(x)
    np.testing.assert_allclose(twice_forward, hessian @ T @ T, rtol=2e-5, atol=2e-5)
    for got in mixed:
        np.testing.assert_allclose(np.asarray(got, np.float64) * size, C @ (hessian @ T), rtol=2e-5, atol=2e-5)


@QUICK_ON_CPU
@pytest.mark.parametrize("size", SIZES)
def test_layer(size):
    """Cotangents of the input and of the parameter, and all mixed second derivatives at an ordinary size."""
    layer = rmsjax.nnx.RMSNorm(N, epsilon=0.0, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def f(scale, x):
        return nnx.merge(graph, jax.tree.map(lambda _: scale, state))(x)

    scale, x, c = (jnp.asarray(a, jnp.float32) for a in (SCALE, size * X, C))
    value, jacobian, _, by_scale = normalized(X, SCALE, 0.0)
    y, vjp = jax.vjp(f, scale, x)
    dscale, dx = vjp(c)
    np.testing.assert_allclose(y, value, rtol=1e-5)
    np.testing.assert_allclose(dscale, C @ by_scale, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(dx, np.float64) * size, C @ jacobian, rtol=2e-5, atol=2e-6)
    if size == 1:
        mixed = jax.jit(jax.jacrev(jax.grad(lambda scale, x: jnp.vdot(c, f(scale, x))), argnums=1))(scale, x)
        np.testing.assert_allclose(mixed, C[:, None] * jacobian / SCALE[:, None], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(256, 5), (129, 5), (128, 3, 5), (2, 3, 4, 5)], ids=str)
def test_gradient_of_a_scale_over_many_rows(shape):
    """Rows are added up in stages, by blocks of them where there are as many as blocks hold, or by axes."""
    x, c = np.random.default_rng(8).normal(size=(2, *shape)).astype(np.float32)
    got = jax.jit(jax.grad(lambda scale: jnp.vdot(c, rms_normalize(x, scale, epsilon=0.0))))(jnp.ones(5))
    terms = np.float64(c) * x / np.sqrt(np.mean(np.float64(x) ** 2, -1, keepdims=True))
    rows = tuple(range(len(shape) - 1))
    # Each term is off by its norm and two roundings, and the sum by one of them for each doubling of the rows.
    bound = (LIKELY + 2 + np.log2(terms[..., 0].size)) * np.finfo(np.float32).eps * np.abs(terms).sum(rows)
    assert (np.abs(got - terms.sum(rows)) <= bound).all()


FAR = [1e34, 1e-34]
RELATIVE = {
    "rms": lambda x: rms(x)[None],
    "tree_rms": lambda x: tree_rms(as_tree(x))[None],
    "rms_normalize": partial(rms_normalize, epsilon=0.0),
    "clip_by_rms": lambda x: updated(rmsjax.clip_by_rms(rms(x) / 2), x),
    "normalize_by_rms": lambda x: updated(rmsjax.normalize_by_rms(), x),
}


def updated(tx, x):
    return tx.update(x, tx.init(x))[0]


@pytest.mark.parametrize("name", RELATIVE)
def test_derivatives_of_many_elements_stay_in_range(name):
    """A sum of 4096 terms of the size of x is divided by 64 before it leaves the range, and by 64 after that."""
    x, t, c = np.random.default_rng(3).normal(size=(3, 4096))
    f = RELATIVE[name]

    @jax.jit
    def both_modes(x, t, c):
        y, pull = jax.vjp(f, x)
        return jax.jvp(f, (x,), (t,))[1], pull(c[: y.size])[0]

    def at(size, degree):
        """With a tangent of the size of x, and a cotangent of about 1."""
        forward, backward = both_modes(*(jnp.asarray(a, jnp.float32) for a in (size * x, size * t, c)))
        return np.float64(forward) / size**degree, np.float64(backward) * size ** (1 - degree)

    degree = 0 if "normalize" in name else 1
    want = at(1.0, degree)
    for size in FAR:
        for got, expected in zip(at(size, degree), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", quick_of(["rms", "tree_rms", "rms_normalize", "clip_by_rms"], "rms", "rms_normalize"))
def test_constants(name):
    """XLA multiplies constants first where it can, and what is in range in one order may not be in another."""
    clip = rmsjax.clip_by_rms(1e-31)

    def clipped(x):
        return clip.update(x, clip.init(x))[0] * 1e31

    f = {"clip_by_rms": clipped, "rms_normalize": partial(rms_normalize, epsilon=0.0)}.get(name, getattr(rmsjax, name))
    x, t = (jnp.asarray(a * 1e30, jnp.float32) for a in (X, T))
    want = jax.jit(lambda x, t: jax.jvp(f, (x,), (t,)))(x, t)
    for found in (
        jax.jit(lambda: jax.jvp(f, (x,), (t,)))(),
        jax.jit(lambda t: jax.jvp(f, (x,), (t,)))(t),
        jax.jit(lambda x: jax.jvp(f, (x,), (t,)))(x),
        jax.jvp(f, (x,), (t,)),
    ):
        for value, expected in zip(found, want, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-5)


@QUICK_ON_CPU
def test_zero():
    """The norm has a kink there, and its derivative is 0 by definition, of all orders and in both modes."""
    zero, t = jnp.zeros(N), jnp.asarray(T, jnp.float32)
    for name, norm in NORMS.items():
        for found in jax.tree.leaves(jax.jit(partial(everything, norm))(zero, t)):
            assert not np.asarray(found).any(), name
    for found in jax.tree.leaves(jax.jit(partial(everything, partial(rms_normalize, epsilon=0.0)))(zero, t)):
        assert not np.asarray(found).any()
    np.testing.assert_allclose(jax.jacrev(partial(rms_normalize, epsilon=0.25))(zero), 2 * np.eye(N), rtol=1e-6)
    clip = rmsjax.clip_by_rms(1.0)
    np.testing.assert_array_equal(jax.jacrev(lambda x: clip.update(x, clip.init(x))[0])(zero), np.eye(N))


@QUICK_ON_CPU
def test_what_a_mask_hides_has_no_part_in_a_derivative():
    hidden = jnp.asarray(np.where(KEPT, X, np.nan), jnp.float32)
    t = jnp.asarray(T, jnp.float32)
    norm = Norm(X[KEPT])

    def spread(derivative):
        """With zeros for the hidden entries."""
        for axis in range(derivative.ndim):
            derivative = np.apply_along_axis(lambda v: np.bincount(np.flatnonzero(KEPT), v, N), axis, derivative)
        return derivative

    found = jax.jit(partial(everything, lambda x: rms(x, where=KEPT)))(hidden, t)
    assert_everything(found, norm.value, spread(norm.gradient), spread(norm.hessian), T)
    found = jax.jit(partial(everything, lambda x: rms_normalize(x, where=KEPT, epsilon=0.0)))(hidden, t)
    value, jacobian, hessian, _ = normalized(X[KEPT], np.ones(KEPT.sum()), 0.0)
    assert_everything(found, spread(value), spread(jacobian), spread(hessian), T, degree=0)
    dscale = jax.grad(lambda s: jnp.sum(rms_normalize(hidden, s, where=KEPT)))(jnp.ones(N))
    assert np.isfinite(dscale).all()
    assert not dscale[~KEPT].any()


@QUICK_ON_CPU
@pytest.mark.parametrize("size", [1.0, 1e37, 1e-37])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_euler(size, dtype):
    """A function that is homogeneous of degree 1 is x times its gradient; one of degree 0 does not change along x."""
    x = jnp.asarray(size * X, dtype)
    gradient = jax.grad(rms)(x).astype(jnp.float32)
    rtol = 1e-6 if dtype == "float32" else 2**-8  # the gradient has the dtype of x
    np.testing.assert_allclose(np.vdot(np.float64(x), np.float64(gradient)), rms(x), rtol=rtol)
    _, change = jax.jvp(partial(rms_normalize, epsilon=0.0), (x,), (x,))
    np.testing.assert_allclose(change.astype(jnp.float32), 0, atol=2e-6 if dtype == "float32" else 2**-6)


FUNCTIONS = {
    "rms": rms,
    "rms of rows": lambda x: rms(x.reshape(2, 3), -1),
    "rms, complex": lambda x: rms(jax.lax.complex(x, x[::-1])),
    "rms_normalize": lambda x: rms_normalize(x, 1 + x**2, epsilon=1e-3, scale_offset=0.5),
    "tree_rms": lambda x: tree_rms(as_tree(x), "block"),
    "rms_penalty": lambda x: rmsjax.rms_penalty(as_tree(x), 0.3),
    "clip_by_rms": lambda x: rmsjax.clip_by_rms(0.5).update(x, rmsjax.clip_by_rms(0.5).init(x))[0],
    "normalize_by_rms": lambda x: rmsjax.normalize_by_rms().update(x, rmsjax.normalize_by_rms().init(x))[0],
}


@QUICK_ON_CPU
@pytest.mark.parametrize("name", quick_of(FUNCTIONS, "rms, complex", "rms_normalize", "normalize_by_rms"))
def test_finite_differences_to_second_order_in_both_modes(name, x64):
    check_grads(jax.jit(FUNCTIONS[name]), (jnp.asarray(X),), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)
