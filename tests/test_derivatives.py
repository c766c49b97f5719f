"""Derivatives of both orders and in both modes, against closed forms in float64: at ordinary points, at zero, at 1e30
and 1e-30, and with masks that hide NaN.

The closed forms are themselves held against finite differences of the oracle, and `check_grads` goes the same way
without any closed form. With n elements kept, rho = sqrt(mean(x^2) + epsilon) and <a, b> the sum of products,

    rho'[v] = <x,v> / (n rho)                   rho''[v,w] = <v,w> / (n rho) - <x,v><x,w> / (n^2 rho^3)
    y'[v] = v / rho - x <x,v> / (n rho^3)       y = x / rho, and y'' below; all are 0 where rho is 0.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from rmsjax import rms, rms_normalize, tree_rms
from rmsjax.nnx import RMSNorm
from tests.oracle import true_normalize, true_rms

N = 7
GAIN = np.linspace(0.5, 2.0, N, dtype=np.float32)
RNG = np.random.default_rng(0)
# A row of each kind; `ordinary` has rows of one size, for which nothing is rescaled.
SCALES = np.array([1.0, 1e30, 1e-30, 0.0, 3e-5, 1.0, 1.0])[:, None]
Z, V, W = (RNG.normal(size=(len(SCALES), N)) for _ in range(3))
COTANGENTS = RNG.normal(size=(len(SCALES), N)).astype(np.float32)
WHERE = RNG.random((len(SCALES), N)) < 0.7
WHERE[:, 0], WHERE[-1] = True, False
POINTS = {"ordinary": np.ones_like(SCALES), "extreme": SCALES}


def at(scales):
    """(x, v, w): a point, and two tangents of its size, or of size 1 where it is zero."""
    sizes = np.where(scales == 0, 1, scales)
    x, v, w = ((z * s).astype(np.float32) for z, s in ((Z, scales), (V, sizes), (W, sizes)))
    if (scales != scales[0]).any():
        x[5] = np.float32(1e30) * np.where(np.arange(N) % 2, 1, 1e-35)  # one row of numbers that are far apart
        v[5], w[5] = np.float32(1e30) * V[5], np.float32(1e30) * W[5]
    return x, v, w


# -------------------------------------------------------------------------------------------------------- closed forms


class Forms:
    """The closed forms at x, in which what a mask hides is zero."""

    def __init__(self, x, where=True, epsilon=0.0):
        self.where = np.broadcast_to(where, x.shape)
        self.x = self.kept(x)
        self.n = np.maximum(self.where.sum(-1, keepdims=True), 1)
        self.rho = np.sqrt((self.x**2).sum(-1, keepdims=True) / self.n + epsilon)

    def kept(self, v):
        return np.where(self.where, v, 0).astype(np.float64)

    def over_rho(self, value, power=1):
        safe = np.where(self.rho == 0, 1, self.rho)
        return np.where(self.rho == 0, 0, value / safe**power)

    def norm_first(self, v):
        return self.over_rho(dot(self.x, self.kept(v)) / self.n)

    def norm_second(self, v, w):
        v, w = self.kept(v), self.kept(w)
        return self.over_rho(dot(v, w) / self.n) - self.over_rho(dot(self.x, v) * dot(self.x, w) / self.n**2, 3)

    def norm_gradient(self, u):
        return self.over_rho(u * self.x / self.n)

    def norm_hessian(self, u, v):
        v = self.kept(v)
        return u * (self.over_rho(v / self.n) - self.over_rho(self.x * dot(self.x, v) / self.n**2, 3))

    def first(self, v):
        """y'[v], a symmetric matrix applied to v."""
        v = self.kept(v)
        return self.over_rho(v) - self.over_rho(self.x * dot(self.x, v) / self.n, 3)

    def second(self, v, w):
        """y''[v,w], symmetric in v, w and what it is multiplied with."""
        x, v, w = self.x, self.kept(v), self.kept(w)
        mixed = v * dot(x, w) + w * dot(x, v) + x * dot(v, w)
        return self.over_rho(3 * x * dot(x, v) * dot(x, w) / self.n**2, 5) - self.over_rho(mixed / self.n, 3)


def dot(a, b):
    return (a * b).sum(-1, keepdims=True)


def test_closed_forms_are_the_finite_differences_of_the_oracle():
    forms, h = partial(Forms, where=WHERE, epsilon=0.3), 1e-5
    norm = partial(true_rms, axis=-1, where=WHERE, epsilon=0.3, keepdims=True)
    normalize = partial(true_normalize, where=WHERE, epsilon=0.3)

    def close(fn, derivative):
        np.testing.assert_allclose((fn(Z + h * V) - fn(Z - h * V)) / (2 * h), derivative, rtol=1e-7, atol=1e-8)

    close(norm, forms(Z).norm_first(V))
    close(normalize, forms(Z).first(V))
    close(lambda x: forms(x).norm_first(W), forms(Z).norm_second(W, V))
    close(lambda x: forms(x).norm_gradient(1.0), forms(Z).norm_hessian(1.0, V))
    close(lambda x: forms(x).first(W), forms(Z).second(W, V))


# ------------------------------------------------------------------------------------------------------ against theirs


def derivatives(fn, x, v, w, u):
    """Value, first and second derivatives of fn, in every mode, under names that `norm_wants` and its like share."""

    def forward(x):
        return jax.jvp(fn, (x,), (v,))[1]

    def reverse(x):
        return jax.vjp(fn, x)[1](u)[0]

    return {
        "value": fn(x),
        "jvp": forward(x),
        "vjp": reverse(x),
        "forward over forward": jax.jvp(forward, (x,), (w,))[1],
        "forward over reverse": jax.jvp(reverse, (x,), (v,))[1],
        "reverse over forward": jax.vjp(forward, x)[1](u)[0],
        "reverse over reverse": jax.vjp(reverse, x)[1](v)[0],
    }


def norm_wants(forms, v, w, u):
    hessian = forms.norm_hessian(u, v)
    return {"value": forms.rho, "jvp": forms.norm_first(v), "vjp": forms.norm_gradient(u)} | second_order(
        forms.norm_second(v, w), hessian
    )


def normalize_wants(forms, v, w, u, gain):
    value = forms.over_rho(forms.x) * gain
    return {"value": value, "jvp": forms.first(v) * gain, "vjp": forms.first(u * gain)} | second_order(
        forms.second(v, w) * gain, forms.second(u * gain, v)
    )


def second_order(forward, other):
    return {"forward over forward": forward} | dict.fromkeys(
        ["forward over reverse", "reverse over forward", "reverse over reverse"], other
    )


def assert_close(got, want, *case):
    """To 1e-5 of the largest number of each row; to the last bit where all of a row is 0."""
    want = np.broadcast_to(want, got.shape)
    off, size = np.abs(np.asarray(got, np.float64) - want), np.abs(want).max(-1, keepdims=True)
    assert (off <= 1e-5 * size).all(), (*case, got, want)


def pytree_rms(x):
    return tree_rms({"a": x[:2], "b": [x[2:5], x[5:].reshape(2, 1)]})


NORMS = {
    "rms": lambda x: rms(x, -1, keepdims=True),
    "rms of columns": lambda x: rms(x.T, 0)[:, None],
    "tree_rms": lambda x: jax.vmap(pytree_rms)(x)[:, None],
    "tree_rms by row": lambda x: tree_rms([x], 1)[0],
    "tree_rms by leaf": lambda x: jnp.stack(tree_rms(list(x), "block"))[:, None],
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    u = COTANGENTS[:, :1]
    measured = jax.jit(partial(derivatives, NORMS[name]))
    for kind, scales in POINTS.items():
        x, v, w = at(scales)
        wants = norm_wants(Forms(x), v, w, u)
        for what, got in measured(x, v, w, u).items():
            assert_close(got, wants[what], kind, what)


def test_norm_of_what_a_mask_keeps():
    u = COTANGENTS[:, :1]
    measured = jax.jit(partial(derivatives, lambda x: rms(x, -1, where=WHERE, keepdims=True)))
    for kind, scales in POINTS.items():
        x, v, w = at(scales)
        wants = norm_wants(Forms(x, WHERE), v, w, u)
        for what, got in measured(np.where(WHERE, x, np.nan), v, w, u).items():
            assert_close(got, wants[what], kind, what)


def layer(epsilon, scale):
    """`rmsjax.nnx.RMSNorm` as a function of x, the scale and a mask."""
    graphdef, params = nnx.split(RMSNorm(N, epsilon=epsilon, rngs=nnx.Rngs(0)))
    return lambda x, mask=None: nnx.merge(graphdef, jax.tree.map(lambda _: scale, params))(x, mask)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", ["rms_normalize", "RMSNorm"])
def test_normalize(name, masked, epsilon):
    where = WHERE if masked else None

    def fn(scale, x):
        if name == "RMSNorm":
            return layer(epsilon, scale)(x, where)
        return rms_normalize(x, scale, epsilon=epsilon, where=where)

    @jax.jit
    def measured(scale, x, v, w, u):
        def by_scale(x):
            return jax.vjp(lambda scale: fn(scale, x), scale)[1](u)[0]

        along_scale = jax.jvp(lambda scale: fn(scale, x), (scale,), (scale,))[1]
        return derivatives(partial(fn, scale), x, v, w, u), along_scale, jax.jvp(by_scale, (x,), (v,))

    for kind, scales in POINTS.items():
        x, v, w = at(scales)
        forms = Forms(x, WHERE if masked else True, epsilon)
        hidden = np.where(WHERE, x, np.nan) if masked else x
        everywhere, along_scale, (by_scale, by_scale_along_x) = measured(GAIN, hidden, v, w, COTANGENTS)
        wants = normalize_wants(forms, v, w, COTANGENTS, GAIN.astype(np.float64))
        for what, got in everywhere.items():
            if not (epsilon and what.endswith(("forward", "reverse"))):
                assert_close(got, wants[what], kind, what)
            else:  # far below the root of epsilon the second derivative is what is left of larger numbers
                assert_close(got[:1], wants[what][:1], kind, what)
        assert_close(along_scale, wants["value"], kind, "along scale")
        assert_close(by_scale, (forms.over_rho(forms.x) * COTANGENTS).sum(0), kind, "by scale")
        assert_close(by_scale_along_x, (forms.first(v) * COTANGENTS).sum(0), kind, "by scale and x")


# ----------------------------------------------------------------------------------------------------------- identities


def test_euler_the_norm_is_its_gradient_times_x():
    """x . grad rms(x) = rms(x), at every power of two; and the gradient is the same at all of them."""
    exponents = np.arange(-120, 126)
    z = RNG.normal(size=N).astype(np.float32)
    x = np.ldexp(z, exponents[:, None])
    gradients = jax.jit(lambda x: jax.vjp(lambda x: rms(x, -1), x)[1](jnp.ones(len(exponents)))[0])(x)
    want = true_rms(x, -1)
    np.testing.assert_allclose((gradients.astype(np.float64) * x).sum(-1), want, rtol=1e-6)
    np.testing.assert_allclose(gradients, np.broadcast_to(Forms(z).norm_gradient(1.0), x.shape), rtol=1e-6)
    along_itself = jax.jit(lambda x: jax.jvp(lambda x: rms(x, -1), (x,), (x,))[1])(x)
    np.testing.assert_allclose(along_itself, want, rtol=1e-6)


def test_complex_gradient_points_along_the_conjugate():
    for scale in (1.0, 1e30, 1e-30):
        x = ((Z[0] + 1j * V[0]) * scale).astype(np.complex64)
        want = np.conj(x) / (N * true_rms(x))
        np.testing.assert_allclose(jax.grad(rms)(x), want, rtol=1e-5)
        np.testing.assert_allclose(jax.grad(lambda x: tree_rms([x[:3], x[3:]]))(x), want, rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(rms)(np.zeros(3, np.complex64)), 0)


def test_half_precision_gradient_keeps_the_dtype():
    x = Z[0].astype(jnp.bfloat16)
    got = jax.grad(rms)(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), Forms(x).norm_gradient(1.0), rtol=2**-8)


# --------------------------------------------------------------------------------------------------- finite differences


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, scale: rms(x, -1),
        lambda x, scale: rms(x, where=WHERE[:2]),
        lambda x, scale: tree_rms({"a": x[0], "b": x[1]}),
        lambda x, scale: rms_normalize(x, scale, epsilon=1e-6, scale_offset=1.0),
        lambda x, scale: layer(0.0, scale)(x),
    ],
    ids=["rms", "rms where", "tree_rms", "rms_normalize", "RMSNorm"],
)
@pytest.mark.parametrize("factor", [1.0, 1e30, 1e-30])
def test_finite_differences_to_second_order_in_both_modes(fn, factor, x64):
    def of_ordinary_size(z, scale):
        return fn(z * factor, scale) / (factor if fn(z, scale).ndim < 2 else 1)

    scale = GAIN.astype(np.float64)
    check_grads(jax.jit(of_ordinary_size), (Z[:2], scale), order=2, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)
