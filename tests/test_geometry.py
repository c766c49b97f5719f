"""The theorems: known answers in many dimensions, the laws of what is drawn, and what a failed assertion says."""

import math
from decimal import Decimal, getcontext
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rmsjax
from rmsjax import geometry
from rmsjax.testing import assert_norm, assert_orthogonal_invariant, assert_rotation_invariant
from tests.helpers.marks import slow

pytestmark = pytest.mark.usefixtures("quick_compiles")

getcontext().prec = 50

KEY = jax.random.key(7)
# A property holds if its gap is below the one, and is refuted by a gap above the other. The functions that are judged
# add up to 4096 float32 naively.
ROUNDING, SEEN = 1e-4, 1e-3


# ---------------------------------------------------------------------------------------------------- the known answers


class Case(NamedTuple):
    """A function, and what is true of it for n >= 2 (invariant, norm) and for every n (even)."""

    f: Any
    invariant: bool
    even: bool
    norm: bool
    norm_of_one: bool | None = None  # whether it is a norm for n = 1, where that differs
    constant: Any = None  # of c‖x‖₂, as a function of n


def l2(x):
    return jnp.sqrt(jnp.vdot(x, x))


def l1(x):
    return jnp.sum(jnp.abs(x))


@cache
def vectors(n):
    """Some fixed vectors to make functions of."""
    with jax.ensure_compile_time_eval():
        return jnp.asarray(np.random.default_rng(n).normal(size=(4, n)), jnp.float32)


def rotated(x):
    """x after a rotation, the product of two reflections."""
    for v in vectors(x.size)[:2]:
        x = x - 2 * v * (jnp.vdot(v, x) / jnp.vdot(v, v))
    return x


def quadratic(x):
    _, _, v, d = vectors(x.size)
    return jnp.vdot(x, (0.5 + jnp.abs(d)) * x) + jnp.vdot(v, x) ** 2 / x.size


CASES = {
    "L1": Case(l1, False, True, True),
    "L2": Case(l2, True, True, True, constant=lambda n: 1.0),
    "max": Case(lambda x: jnp.max(jnp.abs(x)), False, True, True),
    "RMS": Case(rmsjax.rms, True, True, True, constant=lambda n: n**-0.5),
    "p = 3": Case(lambda x: jnp.sum(jnp.abs(x) ** 3) ** (1 / 3), False, True, True),
    "p = 1/2": Case(lambda x: jnp.sum(jnp.sqrt(jnp.abs(x))) ** 2, False, True, False, norm_of_one=True),
    "x_1^2": Case(lambda x: x[0] ** 2, False, True, False),
    "|x|^2 + x_1": Case(lambda x: jnp.vdot(x, x) + x[0], False, False, False),
    "|x|^2": Case(lambda x: jnp.vdot(x, x), True, True, False),
    "sum": Case(jnp.sum, False, False, False),
    "|sum|": Case(lambda x: jnp.abs(jnp.sum(x)), False, True, False, norm_of_one=True),
    "largest": Case(jnp.max, False, False, False),
    "standard deviation": Case(jnp.std, False, True, False),
    "quadratic form": Case(quadratic, False, True, False),
    "root of a quadratic form": Case(lambda x: jnp.sqrt(quadratic(x)), False, True, True),
    "RMS after a rotation": Case(lambda x: rmsjax.rms(rotated(x)), True, True, True, constant=lambda n: n**-0.5),
    "L1 after a rotation": Case(lambda x: l1(rotated(x)), False, True, True),
    "exp(-RMS)": Case(lambda x: jnp.exp(-rmsjax.rms(x)), True, True, False),
    "L2 + L1": Case(lambda x: l2(x) + l1(x), False, True, True),
    "3 L2": Case(lambda x: 3 * l2(x), True, True, True, constant=lambda n: 3.0),
    "1": Case(lambda x: jnp.ones(()), True, True, False),
    "RMS of what a scaled RMSNorm gives": Case(
        lambda x: rmsjax.rms(rmsjax.rms_normalize(x, jnp.linspace(1.0, 2.0, x.size))), False, True, False
    ),
}


def judge(name: str, what: str, gap: Any, holds: bool) -> list[str]:
    """What is wrong about a judgement."""
    right = float(gap) < ROUNDING if holds else float(gap) > SEEN
    return [] if right else [f"{name}: {what} has the gap {gap}, but holds: {holds}"]


# What differs between versions of JAX shows in one dimension.
ALL_DIMENSIONS = [slow(1), 2, slow(3), slow(64), slow(4096)]


@pytest.mark.parametrize("n", ALL_DIMENSIONS)
def test_known_answers(n):
    wrong: list[str] = []
    for name, case in CASES.items():
        invariant = case.invariant or (name == "standard deviation" and n == 1)  # constant 0
        is_norm = case.norm_of_one if n == 1 and case.norm_of_one is not None else case.norm
        wrong += judge(name, "rotations", geometry.rotation_gap(case.f, n, KEY), invariant or n == 1)
        wrong += judge(name, "O(n)", geometry.orthogonal_gap(case.f, n, KEY), case.even if n == 1 else invariant)
        wrong += judge(name, "evenness", geometry.is_even_gap(case.f, n, KEY), case.even)
        wrong += judge(name, "norm", max(geometry.norm_axioms_gap(case.f, n, KEY)), is_norm)
        if is_norm:
            constant, deviation = geometry.euclidean_constant(case.f, n, KEY, 128)  # as many points as a gap has
            wrong += judge(name, "c|x|", deviation, invariant or n == 1)
            if case.constant:
                wrong += judge(name, "its constant", abs(constant / case.constant(n) - 1), True)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("n", ALL_DIMENSIONS)
def test_equivariance_is_lost_with_a_scale_that_is_not_constant(n):
    uneven = 1 + jnp.arange(n) % 2 / 2
    functions = {"no scale": rmsjax.rms_normalize, "uneven": partial(rmsjax.rms_normalize, scale=uneven)}
    holds = {"no scale": True, "uneven": n == 1}
    if n == 3:
        functions["even"] = partial(rmsjax.rms_normalize, scale=jnp.full(n, 1.5))
        functions |= {"shift": lambda x: x + uneven, "roll": lambda x: jnp.roll(x, 1)}
        holds |= {"even": True, "shift": False, "roll": False}
    gaps = {name: geometry.equivariance_gap(f, n, KEY, 16) for name, f in functions.items()}
    assert not [wrong for name, gap in gaps.items() for wrong in judge(name, "O(n)", gap, holds[name])]


@pytest.mark.slow
def test_the_layer_is_equivariant_until_its_scale_is_trained():
    layer = rmsjax.nnx.RMSNorm(3, rngs=nnx.Rngs(0))
    assert geometry.equivariance_gap(layer, 3, KEY) < ROUNDING
    layer.scale[...] = jnp.array([1.0, 1.0, 1.5])
    assert geometry.equivariance_gap(layer, 3, KEY) > 0.1


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_equivariance_of_any_size(size):
    assert geometry.equivariance_gap(lambda x: x * size, 3, KEY, 16) < ROUNDING
    assert geometry.equivariance_gap(lambda x: jnp.abs(x) * size, 3, KEY, 16) > 0.1


def test_equivariance_tells_rotations_from_reflections():
    quarter_turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])  # commutes with SO(2), not with O(2)
    assert geometry.equivariance_gap(lambda x: quarter_turn @ x, 2, KEY) > 0.5


def test_each_axiom_is_told_apart():
    def failing(f, n=3):
        gaps = geometry.norm_axioms_gap(f, n, KEY)
        return {axiom for axiom, gap in gaps._asdict().items() if gap > SEEN}

    assert failing(l1) == set()
    assert failing(lambda x: jnp.sum(jnp.sqrt(jnp.abs(x))) ** 2) == {"triangle"}
    assert failing(lambda x: jnp.sqrt(l2(x))) == {"homogeneity"}
    assert failing(jnp.std) == failing(lambda x: jnp.abs(x[0])) == {"definiteness"}
    assert failing(lambda x: 0 * x[0]) == {"definiteness"}
    assert failing(jnp.max) == {"homogeneity", "definiteness"}
    assert "definiteness" in failing(lambda x: 1 + l2(x))  # f(0) = 1
    assert "definiteness" in failing(lambda x: -l2(x))


@pytest.mark.parametrize("n", [1, 3])
def test_radial_profile(n):
    radii = jnp.array([[0.0, 0.5], [2.0, 3.0]])
    profile = partial(geometry.radial_profile, lambda x: jnp.vdot(x, x) + 1, n=n)
    assert np.array_equal(profile(radii), radii**2 + 1)
    assert jax.grad(profile)(1.5) == 3.0
    x = jnp.arange(1.0, n + 1)
    assert profile(l2(x)) == pytest.approx(float(jnp.vdot(x, x) + 1))


# ------------------------------------------------------------------------------------------------------------ sampling


def z_score(samples, expected):
    """How many standard errors the mean is from what is expected; none if all are as expected, up to rounding."""
    samples = np.asarray(samples, np.float64)
    error = samples.std() / math.sqrt(len(samples))
    return abs(samples.mean() - expected) / (error + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
def test_matrices_are_orthogonal_with_the_moments_of_haar(n):
    draw = jax.jit(jax.vmap(lambda key: (geometry.random_orthogonal(key, n), geometry.random_rotation(key, n))))
    for R, special in zip(draw(jax.random.split(KEY, 8000)), (False, True), strict=True):
        R = np.asarray(R, np.float64)
        assert np.abs(np.swapaxes(R, 1, 2) @ R - np.eye(n)).max() < 2e-6
        det, trace = np.linalg.det(R), np.trace(R, axis1=1, axis2=2)
        assert np.abs(np.abs(det) - 1).max() < 5e-6
        if special:
            assert det.min() > 0
        else:
            assert z_score(det, 0) < 5
        if special and n == 1:
            assert (R == 1).all()
            continue
        for entry in R[:, 0, 0], R[:, -1, 0], R[:, 0, -1], R[:, -1, -1]:
            assert z_score(entry, 0) < 5
            assert z_score(entry**2, 1 / n) < 5
            assert z_score(entry**4, 3 / (n * (n + 2))) < 5
        # Moments of the trace count the invariants of tensor powers (Diaconis and Shahshahani 1994; for SO(2) it is
        # 2 cos θ). The third of SO(3) is the determinant, which an O(3) matrix does not leave alone.
        moments = {1: (0, 1, 0, 1), 2: (0, 2, 0, 6) if special else (0, 1, 0, 3), 3: (0, 1, int(special), 3)}[n]
        for power, expected in enumerate(moments, 1):
            assert z_score(trace**power, expected) < 5, (power, special)
        if n == 3:  # and the columns know of one another only that they are orthogonal
            assert z_score(R[:, 0, 0] * R[:, 1, 1], 0) < 5
            assert z_score(R[:, 0, 0] ** 2 * R[:, 1, 1] ** 2, 2 / 15) < 5
            assert z_score(R[:, 0, 0] ** 2 * R[:, 1, 0] ** 2, 1 / 15) < 5


@pytest.mark.parametrize("n", [2, 5])
def test_rotation_between(n):
    pairs = np.random.default_rng(0).normal(size=(5, 2, n))
    x, y = pairs[:, 0], pairs[:, 1]
    xs, ys = np.tile(x, (4, 1)), np.concatenate([y, -3 * x, 2 * x, -x + 1e-4 * y])
    rotations = jax.jit(jax.vmap(geometry.rotation_between))(jnp.asarray(xs, jnp.float32), jnp.asarray(ys, jnp.float32))
    for x, y, R in zip(xs, ys, np.asarray(rotations, np.float64), strict=True):
        assert np.abs(R.T @ R - np.eye(n)).max() < 4e-6
        assert np.linalg.det(R) > 0
        assert np.abs(R @ x / np.linalg.norm(x) - y / np.linalg.norm(y)).max() < 4e-6
        if abs(x @ y) < 0.99 * np.linalg.norm(x) * np.linalg.norm(y):  # else they give no plane
            plane = np.linalg.qr(np.stack([x, y], 1))[0]
            assert np.abs((R - np.eye(n)) @ (np.eye(n) - plane @ plane.T)).max() < 4e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 3, 5, 64])
def test_rotation_between_vectors_that_are_nearly_equal_or_opposite(n, dtype, x64):
    """However near: orthogonal, a rotation, and from x to y, as float64 sees it."""
    rng, eps = np.random.default_rng(n), float(np.finfo(dtype).eps)
    x, steps = rng.normal(size=(20, n)), 10.0 ** np.arange(-17, 1)
    pairs = [(x, sign * x + step * rng.normal(size=x.shape)) for sign in (1, -1) for step in steps]
    xs, ys = (np.concatenate(each).astype(dtype) for each in zip(*pairs, strict=True))
    rotations = jax.jit(jax.vmap(geometry.rotation_between))(xs, ys)
    assert rotations.dtype == dtype
    bound = 40 * eps  # some roundings of numbers up to 4
    rotations, xs, ys = (np.float64(each) for each in (rotations, xs, ys))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (xs, ys))
    assert np.abs(rotations.swapaxes(1, 2) @ rotations - np.eye(n)).max() < bound
    assert np.abs(np.linalg.det(rotations) - 1).max() < bound
    assert np.abs(np.einsum("kij,kj->ki", rotations, a) - b).max() < bound
    # Off the plane that the rounded vectors span nothing moves, where that plane is known to some digits.
    known = np.abs(np.abs(np.sum(a * b, 1)) - 1) > 1e-3
    planes = np.linalg.qr(np.stack([a, b], 2)[known])[0]
    off = np.eye(n) - planes @ planes.swapaxes(1, 2)
    assert np.abs((rotations[known] - np.eye(n)) @ off).max() < 100 * bound


def test_rotation_between_numbers():
    one = jnp.ones(1)
    assert geometry.rotation_between(one, 2 * one) == 1
    assert geometry.rotation_between(one, -one) == -1


def test_rotation_between_large_small_and_narrow_vectors():
    x, y = jnp.array([1e30, 0.0], jnp.float32), jnp.array([0, 1e-30], jnp.bfloat16)
    R = geometry.rotation_between(x, y)
    assert R.dtype == jnp.float32
    np.testing.assert_allclose(R, [[0, -1], [1, 0]], atol=1e-6)


def test_no_rotation_starts_or_ends_at_zero():
    one, zero = jnp.ones(3), jnp.zeros(3)
    with pytest.raises(ValueError, match="rotation_between: y must not be zero"):
        geometry.rotation_between(one, zero)
    with pytest.raises(ValueError, match="rotation_between: x must not be zero"):
        jax.jit(lambda y: geometry.rotation_between(zero, y))(one)
    assert np.isnan(jax.jit(geometry.rotation_between)(one, zero)).all()
    assert np.isnan(jax.jit(geometry.rotation_between)(zero, one)).all()


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_pairs_have_the_law_of_a_haar_matrix(n):
    def draw(key):
        worst = geometry.worst_rotation(jnp.sum, n, key, 1, reflections=True)
        x, y = worst.at["x"], worst.at["Rx"]
        # A constant f = e has ‖f(Rx) - R f(x)‖² = 2 - 2 eᵀRe.
        entry = 1 - geometry.equivariance_gap(lambda x: jnp.eye(n)[0], n, key, 1) ** 2 / 2
        return jnp.vdot(x, y) / jnp.vdot(x, x), jnp.vdot(y, y) / jnp.vdot(x, x), y[0] / l2(y), entry

    cosine, length, coordinate, entry = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 4000))
    assert np.abs(length - 1).max() < 1e-5
    for c in cosine, coordinate, entry:
        c = np.asarray(c, np.float64)
        assert z_score(c, 0) < 5
        assert z_score(c**2, 1 / n) < 5
        assert z_score(c**4, 3 / (n * (n + 2))) < 5


def test_no_rotation_moves_anything_in_one_dimension():
    worst = geometry.worst_rotation(jnp.sum, 1, KEY)
    assert np.array_equal(worst.at["x"], worst.at["Rx"])


def test_worst_is_where_it_says():
    worst = geometry.worst_rotation(l1, 3, KEY)
    assert worst.left == pytest.approx(float(l1(worst.at["Rx"])))
    assert worst.right == pytest.approx(float(l1(worst.at["x"])))
    assert worst.size == pytest.approx(float(abs(worst.left - worst.right) / max(worst.left, worst.right)))
    assert worst.size == geometry.rotation_gap(l1, 3, KEY)
    axioms = geometry.worst_axioms(lambda x: jnp.vdot(x, x) + 1, 3, KEY)
    x, a = axioms.homogeneity.at["x"], axioms.homogeneity.at["a"]
    assert axioms.homogeneity.left == pytest.approx(float(jnp.vdot(a * x, a * x) + 1))
    assert axioms.homogeneity.right == pytest.approx(float(abs(a) * (jnp.vdot(x, x) + 1)))
    x, y = axioms.triangle.at["x"], axioms.triangle.at["y"]
    assert axioms.triangle.left == pytest.approx(float(jnp.vdot(x + y, x + y) + 1))
    assert axioms.triangle.right == pytest.approx(float(jnp.vdot(x, x) + jnp.vdot(y, y) + 2))
    assert not axioms.definiteness.at["x"].any()


def test_nan_is_a_violation():
    def broken(x):
        return jnp.where(x[0] > 0, rmsjax.rms(x), jnp.nan)

    assert np.isnan(geometry.rotation_gap(broken, 2, KEY))
    assert np.isnan(geometry.norm_axioms_gap(broken, 2, KEY)).all()
    assert np.isnan(geometry.euclidean_constant(broken, 2, KEY)).all()
    assert np.isnan(geometry.equivariance_gap(lambda x: x / (x[0] - x[0]), 2, KEY))


# ------------------------------------------------------------------------------------------------ norms at every width


@pytest.mark.slow
def test_growth_of_the_norms_with_width():
    ns = (16, 256, 4096)
    norms = {"rms": rmsjax.rms, "l2": l2, "l1": l1, "max": lambda x: jnp.max(jnp.abs(x))}
    K = {name: geometry.family_constant(norm, ns, KEY) for name, norm in norms.items()}
    for name, slope in ("rms", 0.0), ("l2", 0.5), ("l1", 1.0):
        assert K[name].slope == pytest.approx(slope, abs=5 * float(K[name].slope_error) + 1 / 256)
    exact = np.asarray(geometry.gaussian_mean_rms(ns))
    assert (np.abs(K["rms"].mean - exact) < 5 * K["rms"].standard_error).all()
    largest = K["max"]
    ratio = np.asarray(largest.mean) / np.sqrt(2 * np.log(2 * np.asarray(largest.n)))
    assert (np.diff(ratio) > 0).all()  # up to 1, slowly
    assert 0.75 < ratio[0] < ratio[-1] < 1
    slopes = np.diff(np.log(largest.mean)) / np.diff(np.log(largest.n))
    assert (np.diff(slopes) < 0).all()
    assert 0.05 < largest.slope < 0.2


@pytest.mark.parametrize(
    ("distribution", "fourth"),
    [("normal", 3.0), ("rademacher", 1.0), ("uniform", 1.8), ("laplace", 6.0), (jax.random.normal, 3.0)],
)
def test_distributions_have_mean_zero_and_variance_one(distribution, fourth):
    # One function for two moments: each dimension asks for another.
    def moment(x):
        return {4000: jnp.mean(x + x**2), 4001: jnp.mean(x**4)}[x.size]

    estimate = geometry.family_constant(moment, (4000, 4001), KEY, distribution, 100)
    for mean, error, expected in zip(estimate.mean, estimate.standard_error, (1, fourth), strict=True):
        assert abs(mean - expected) < 5 * error + 1e-5
        assert error < 0.1


def test_batches(monkeypatch):
    """The same law, drawn a batch at a time, by a program that does not grow with the number of batches."""
    monkeypatch.setattr(geometry, "_BATCH", 64)

    def estimate(samples):
        return geometry.family_constant(l1, (4, 8), KEY, samples=samples)

    found = estimate(101)  # batches of 16 and 8, of which the last is not full
    exact = np.sqrt(2 / np.pi) * np.array([4, 8])
    assert (np.abs(found.mean - exact) < 5 * found.standard_error).all()
    assert found.standard_error == pytest.approx(np.sqrt(np.array([4, 8]) * (1 - 2 / np.pi) / 101), rel=0.4)
    few, many = (len(jax.make_jaxpr(estimate, static_argnums=0)(n).jaxpr.eqns) for n in (101, 1001))
    assert few == many


def test_a_family_without_a_logarithm_has_no_slope():
    estimate = geometry.family_constant(lambda x: jnp.float32(x.size - 4), (4, 8), KEY)
    assert np.array_equal(estimate.mean, [0, 4])
    assert np.isnan(geometry.family_constant(lambda x: -l1(x), (4, 8), KEY).slope)


def test_standard_errors_and_slope():
    estimate = geometry.family_constant(l1, (4, 8, 32), KEY, samples=50)
    n, mean, error = (np.asarray(v, np.float64) for v in estimate[:3])
    slope, _ = np.polyfit(np.log(n), np.log(mean), 1)
    assert estimate.slope == pytest.approx(slope, rel=1e-4)
    assert error == pytest.approx(np.sqrt(n * (1 - 2 / np.pi) / 50), rel=0.4)
    rng = np.random.default_rng(0)
    slopes = [np.polyfit(np.log(n), np.log(rng.normal(mean, error)), 1)[0] for _ in range(400)]
    assert estimate.slope_error == pytest.approx(np.std(slopes), rel=0.15)


def exact_mean_rms(n: int) -> tuple[Decimal, Decimal]:
    """sqrt(2/n) Γ((n+1)/2)/Γ(n/2) and its derivative, to 30 digits and more."""
    if n > 2000:
        x = 1 / Decimal(n)
        value = 1 - x / 4 + x**2 / 32 + 5 * x**3 / 128 - 21 * x**4 / 2048 - 399 * x**5 / 8192
        return value, x**2 / 4 - x**3 / 16 - 15 * x**4 / 128 + 21 * x**5 / 512 + 1995 * x**6 / 8192
    pi = Decimal("3.14159265358979323846264338327950288419716939937510")
    ratio, psi = 1 / pi.sqrt(), 2 * Decimal(2).ln()  # Γ(1)/Γ(1/2) and ψ(1) - ψ(1/2)
    for k in range(1, n):
        ratio, psi = Decimal(k) / 2 / ratio, Decimal(2) / k - psi
    value = (Decimal(2) / n).sqrt() * ratio
    return value, value * (psi - 1 / Decimal(n)) / 2


def check_mean_rms(dtype):
    ns = [*range(1, 130), 255, 1000, 2000, 2001, 4096, 10**5, 10**6, 2**24, 10**9, 10**12]
    x = jnp.array(ns, dtype)
    value = jax.jit(geometry.gaussian_mean_rms)(x)
    slope = jax.jit(jax.vmap(jax.grad(geometry.gaussian_mean_rms)))(x)
    assert value.dtype == slope.dtype == x.dtype == dtype
    got = np.asarray([value, slope], np.float64).T
    want = np.asarray([exact_mean_rms(int(n)) for n in np.asarray(x, np.float64)], np.float64)  # as x was rounded
    errors = np.abs(got / want - 1).max(axis=0) / float(jnp.finfo(dtype).eps)
    assert errors[0] < 2, errors
    assert errors[1] < 8, errors


def test_mean_rms_of_a_normal_vector():
    check_mean_rms(jnp.float32)


@pytest.mark.slow
def test_mean_rms_of_a_normal_vector_in_float64(x64):
    check_mean_rms(jnp.float64)
    check_mean_rms(jnp.float32)


def test_mean_rms_takes_integers_and_grows_to_one():
    assert geometry.gaussian_mean_rms(10**12) == geometry.gaussian_mean_rms(10**20) == 1
    assert geometry.gaussian_mean_rms(np.int64(1)) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-6)
    values = geometry.gaussian_mean_rms(jnp.arange(1, 1000))
    assert values.shape == (999,)
    assert (np.diff(values) > 0).all()
    assert values[-1] < 1
    assert np.array_equal(geometry.gaussian_mean_rms([1, 10**20]), geometry.gaussian_mean_rms([1.0, 1e20]))
    narrow = geometry.gaussian_mean_rms(jnp.ones((2, 3), jnp.bfloat16))
    assert (narrow.dtype, narrow.shape) == (jnp.float32, (2, 3))


# ------------------------------------------------------------------------------------------------ under transformations


def test_a_batch_of_keys_gives_as_many_worst_cases():
    keys = jax.random.split(KEY, 3)
    batch = jax.jit(jax.vmap(partial(geometry.worst_rotation, l1, 3)))(keys)
    plain = [geometry.worst_rotation(l1, 3, key) for key in keys]
    jax.tree.map(lambda b, *p: np.testing.assert_allclose(b, np.stack(p), rtol=1e-5, atol=1e-6), batch, *plain)
    assert len(np.unique(batch.at["Rx"], axis=0)) == 3


@pytest.mark.slow
def test_a_gap_can_be_trained_away():
    def gap(scale):
        return geometry.rotation_gap(lambda x: l2(scale * x), 2, KEY, 16)

    step = jax.jit(lambda s: s - 0.1 * jax.grad(gap)(s))
    scale = jnp.array([1.0, 1.3])
    before = gap(scale)
    for _ in range(5):
        scale = step(scale)
    assert gap(scale) < 0.7 * before


@pytest.mark.slow
def test_in_float64(x64):
    assert geometry.rotation_gap(l2, 3, KEY) < 1e-14
    assert geometry.random_rotation(KEY, 3).dtype == jnp.float64
    assert geometry.random_rotation(KEY, 3, jnp.float32).dtype == jnp.float32
    with pytest.raises(AssertionError, match=r"tolerance 1\.49e-08"):
        assert_rotation_invariant(lambda x: l2(x) + 1e-6 * x[0], 3)
    assert_rotation_invariant(lambda x: l2(x.astype(jnp.float32)), 3)  # judged as the float32 that it is


# ------------------------------------------------------------------------------------------------------- the assertions


@pytest.mark.parametrize("n", [1, 3, 64])
def test_assertions_pass_for_the_rms_norm(n):
    assert_rotation_invariant(rmsjax.rms, n)
    assert_orthogonal_invariant(rmsjax.rms, n)
    assert_norm(rmsjax.rms, n)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_narrow_types_are_judged_by_what_they_can_show(dtype):
    def narrow(f):
        return lambda x: f(x.astype(dtype).astype(jnp.float32)).astype(dtype)

    eight_bits = dtype.startswith("float8")
    for n in 2, 64:
        assert_rotation_invariant(narrow(rmsjax.rms), n)
        assert_norm(narrow(rmsjax.rms), n)
        with pytest.raises(AssertionError, match=r"tolerance 0\.25" if eight_bits else r"tolerance 0\.0"):
            assert_rotation_invariant(narrow(l1), n)
    if not eight_bits:
        assert_rotation_invariant(lambda x: jnp.linalg.norm(x.astype(dtype)), 64)
        with pytest.raises(AssertionError, match=r"is off by 0\.0"):
            assert_rotation_invariant(narrow(lambda x: l2(x) + 0.05 * x[0]), 3)


def test_a_large_constant_hides_what_varies():
    assert_rotation_invariant(lambda x: 1e5 + x[0], 3)
    with pytest.raises(AssertionError, match="is off by"):
        assert_rotation_invariant(lambda x: 1 + x[0], 3)


def test_failures_show_the_worst_x_and_R():
    with pytest.raises(AssertionError) as caught:
        assert_rotation_invariant(l1, 2)
    message = str(caught.value)
    worst = geometry.worst_rotation(l1, 2, jax.random.key(0))
    assert "assert_rotation_invariant: l1 is not invariant for n = 2" in message
    text = message.split(" x = ")[1].replace("[", " ").replace("]", " ")
    shown = {name: np.array(text.split(f"{name} =")[-1].split()[:size], float) for name, size in (("Rx", 2), ("R", 4))}
    shown["x"] = np.array(text.split()[:2], float)
    assert shown["x"] == pytest.approx(np.asarray(worst.at["x"]), abs=1e-5)
    assert shown["Rx"] == pytest.approx(np.asarray(worst.at["Rx"]), abs=1e-5)
    assert shown["R"].reshape(2, 2) @ shown["x"] == pytest.approx(shown["Rx"], abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: assert_orthogonal_invariant(jnp.sum, 1), r"(?s)sum is not invariant for n = 1.*  R = \[\[-1"),
        (lambda: assert_rotation_invariant(l1, 4096), r"(?s)n = 4096.*x = \[.* \.\.\. .*Rx = \[.*R: rotation_between"),
        (lambda: assert_norm(lambda x: jnp.sqrt(x[0] ** 2 + 1e-8 * x[1] ** 2), 2), r"f\(x\) = .*, what counts as 0 = "),
        (lambda: assert_norm(jnp.std, 3), r"std is no norm for n = 3\nf\(0\) = 0 and f\(x\) > 0 elsewhere is"),
        (lambda: assert_norm(lambda x: l2(x) ** 2, 3), r"(?s)f\(ax\) = \|a\| f\(x\) is off by.*a = .*x = \[.*x \+ y"),
        (lambda: assert_norm(lambda x: l2(x) * jnp.nan, 3), r"is off by nan"),
        (lambda: assert_rotation_invariant(lambda x: l2(x) + 1e-3 * x[0], 3), r"tolerance 0\.000345"),
        (lambda: assert_rotation_invariant(l2, 3, tolerance=0.0), r"tolerance 0:"),
    ],
)  # fmt: skip
def test_failures(call, message):
    with pytest.raises(AssertionError, match=message):
        call()


def test_tolerance_key_and_samples():
    def slanted(x):
        return l2(x) + 1e-3 * x[0]

    assert_rotation_invariant(slanted, 3, tolerance=0.1, samples=3, key=KEY)
    assert_rotation_invariant(slanted, 3, tolerance=jnp.float32(0.1))
    assert_orthogonal_invariant(slanted, 3, tolerance=0.1)
    assert_norm(lambda x: l2(x) ** 1.001, 3, tolerance=0.1)
    assert_rotation_invariant(jnp.sum, 1)  # SO(1) is trivial


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: geometry.random_rotation(KEY, 0), ValueError, "random_rotation: n must be at least 1, got 0"),
        (lambda: geometry.random_orthogonal(KEY, 2.0), TypeError, "random_orthogonal: n must be an integer known at"),
        (lambda: jax.jit(geometry.random_orthogonal)(KEY, 2), TypeError, "n must be an integer known at trace time"),
        (lambda: geometry.random_rotation(KEY, 2, jnp.float16), TypeError, "must be float32 or float64, got float16"),
        (lambda: geometry.random_orthogonal(KEY, 2, "int32"), TypeError, "random_orthogonal: dtype must be float32 or"),
        (lambda: geometry.random_orthogonal(0, 2), TypeError, "random_orthogonal: key must be a random key such as"),
        (lambda: geometry.rotation_gap(l1, 3, 0), TypeError, r"rotation_gap: key must be a random key .* got 0"),
        (lambda: geometry.rotation_gap(np.linalg.norm, 3, KEY), TypeError, "rotation_gap: f must be a function"),
        (lambda: assert_norm(lambda x: x[0] if x[0] > 0 else -x[0], 3), TypeError, "axioms: f must be a function"),
        (lambda: geometry.rotation_gap(l1, 0, KEY), ValueError, "rotation_gap: n must be at least 1, got 0"),
        (lambda: geometry.orthogonal_gap(l1, 3, KEY, 0), ValueError, "orthogonal_gap: samples must be at least 1"),
        (lambda: geometry.rotation_gap(jnp.abs, 3, KEY), ValueError, r"gap: f must give a number, got shape \(3,\)"),
        (lambda: geometry.is_even_gap(lambda x: x[0] > 0, 3, KEY), TypeError, "is_even_gap: what f returns must be"),
        (lambda: geometry.is_even_gap(lambda x: x[0].astype(complex), 3, KEY), TypeError, "must be real, got dtype"),
        (lambda: geometry.euclidean_constant(lambda x: None, 3, KEY), TypeError, "what norm returns must be an array"),
        (lambda: geometry.euclidean_constant(l1, 3, KEY, 1), ValueError, "constant: samples must be at least 2"),
        (lambda: geometry.norm_axioms_gap(l1, "3", KEY), TypeError, "norm_axioms_gap: n must be an integer"),
        (lambda: geometry.equivariance_gap(l1, 3, KEY), ValueError, r"must keep the shape of a vector, got shape \(\)"),
        (lambda: geometry.equivariance_gap(lambda x: x > 0, 3, KEY), TypeError, "gap: what f returns must be an array"),
        (lambda: geometry.radial_profile(l1, jnp.arange(3), 3), TypeError, "radial_profile: radii must be an array"),
        (lambda: geometry.rotation_between(jnp.ones(2), jnp.ones(3)), ValueError, r"one shape, got \(2,\) and \(3,\)"),
        (lambda: geometry.rotation_between(jnp.arange(2), jnp.ones(2)), TypeError, "x must be an array of floating"),
        (lambda: geometry.family_constant(l1, (3, 3), KEY), ValueError, r"two different dimensions, got \(3, 3\)"),
        (lambda: geometry.family_constant(l1, (3, 0), KEY), ValueError, "an entry of ns must be at least 1, got 0"),
        (lambda: geometry.family_constant(l1, 4, KEY), TypeError, "ns must be a sequence of integers, got 4"),
        (lambda: geometry.family_constant(l1, (2, 3), KEY, lambda k, shape: jax.random.normal(k, shape[::-1])),
         ValueError, r"distribution must give the shape \(256, 2\), got \(2, 256\)"),
        (lambda: geometry.family_constant(l1, (2, 3), KEY, lambda key, shape: jnp.ones(shape, int)), TypeError,
         "what distribution gives must be an array of floating"),
        (lambda: geometry.family_constant(l1, (2, 3), KEY, "cauchy"), ValueError, "or a function, got 'cauchy'"),
        (lambda: geometry.family_constant(l1, (2, 3), KEY, samples=1), ValueError, "samples must be at least 2, got 1"),
        (lambda: geometry.family_constant(jnp.abs, (2, 3), KEY), ValueError, "norm_family must give a number"),
        (lambda: geometry.gaussian_mean_rms([1, 0]), ValueError, "gaussian_mean_rms: n must be at least 1, got"),
        (lambda: geometry.gaussian_mean_rms(0.5), ValueError, "gaussian_mean_rms: n must be at least 1, got 0.5"),
        (lambda: geometry.gaussian_mean_rms("3"), TypeError, "gaussian_mean_rms: n must be an array of floating-point"),
        (lambda: assert_norm(l1, 3, tolerance=-1.0), ValueError, "assert_norm: tolerance must be finite and at"),
    ],
)  # fmt: skip
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_geometry_loads_on_first_use():
    assert {"geometry", "testing"} <= set(dir(rmsjax))
    assert rmsjax.geometry is geometry
