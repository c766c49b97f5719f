r"""The theorems behind the RMS norm, as functions to run on any norm, penalty or layer of your own.

- Theorem 1. For n >= 2, f(Rx) = f(x) for all rotations R in SO(n) if and only if f(x) = g(‖x‖₂) for some g.
  SO(1) holds only the identity, so for n = 1 every f is invariant, and f(x) = g(|x|) if and only if f is even.
- Corollary 1.1. A rotation-invariant norm is c‖x‖₂ for some c > 0.
- Theorem 2. For every n >= 1, f(Rx) = f(x) for all R in O(n), reflections included, if and only if f(x) = g(‖x‖₂).
- Corollary 2.1. If such norms N_n have E[N_n(X)²] = 1 at every n, for X of iid coordinates of mean 0 and variance 1,
  then N_n is the RMS norm. With E[N_n(X)] = 1 it holds in the limit n → ∞ only, see `gaussian_mean_rms`.

A function called a gap takes random points and gives the largest relative violation that it found, 0 for none. Rounding
alone gives a gap of some units of machine epsilon, more where f cancels; `Gap.tolerance` is a bar above it. A gap over
the bar refutes, with `worst_rotation` and `worst_axioms` showing where; one below does not prove, since f was seen at
some points only. And it is relative to |f|: a large constant in f, as in f(x) = 1000 + x[0], hides what varies beside
it. NaN is a violation that stays NaN.

The points x have an RMS norm between 1/4 and 4 and either sign, and lie in turn somewhere in a cube, on one coordinate
axis, on the difference of two axes, and on the diagonal: on the last three many a function is far from its value at a
typical point, and in high dimension a random point is a typical one. Points have JAX's default dtype, so float64 under
x64; what f makes of them is its own matter. f must be a JAX function that `vmap` takes. All functions here work under
`jit` (f and integers static) and `vmap` (over keys). They hold up to ten arrays of samples × n numbers at a time,
besides what f needs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rmsjax._checks import as_numeric
from rmsjax._norm import rms_normalize
from rmsjax._reduce import accumulator_dtype

if TYPE_CHECKING:
    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Float, PRNGKeyArray, Real

__all__ = [
    "EuclideanConstant",
    "FamilyConstant",
    "Gap",
    "NormAxioms",
    "equivariance_gap",
    "euclidean_constant",
    "family_constant",
    "gaussian_mean_rms",
    "is_even_gap",
    "norm_axioms_gap",
    "orthogonal_gap",
    "radial_profile",
    "random_orthogonal",
    "random_rotation",
    "rotation_between",
    "rotation_gap",
    "worst_axioms",
    "worst_rotation",
]


def __dir__() -> list[str]:
    return sorted(__all__)


T = TypeVar("T")

_KINDS = 4  # of points, see `_points`
_BATCH = 2**22  # numbers that `family_constant` draws at a time, 16 MB in float32
_ROUNDINGS = 32  # of f near a zero, in units of machine epsilon times the largest f(x)/‖x‖, that are no violation


class Gap(NamedTuple):
    """The worst violation that was found of `left = right` (of `left <= right` for the triangle inequality).

    `size`: how far off, relative to the larger side. `left`, `right`: the two sides, in the dtype of f. `at`: the
    arrays at which it happened, by name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> gap = geometry.worst_rotation(jnp.max, 2, jax.random.key(0))
        >>> bool(gap.size > gap.tolerance), sorted(gap.at)
        (True, ['Rx', 'x'])

    Source: `worst_rotation` and `worst_axioms` give it.
    """

    size: Array
    left: Array
    right: Array
    at: dict[str, Array]

    @property
    def tolerance(self) -> float:
        """A size that rounding may reach, by the dtype of f: the root of machine epsilon, 3.5e-4 for float32.

        A type of 16 bits has too few digits for that, and allows four roundings: 0.004 for float16, 0.03 for bfloat16;
        one of 8 bits allows 1/4, and can refute nothing finer.
        """
        return _tolerance(self.left.dtype)


class NormAxioms(NamedTuple, Generic[T]):
    """An entry for each axiom of a norm.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> gaps = geometry.norm_axioms_gap(jnp.std, 3, jax.random.key(0))
        >>> {axiom: bool(gap < 1e-5) for axiom, gap in gaps._asdict().items()}
        {'homogeneity': True, 'triangle': True, 'definiteness': False}

    Source: `norm_axioms_gap` gives numbers, `worst_axioms` a `Gap` for each.
    """

    homogeneity: T
    triangle: T
    definiteness: T


class EuclideanConstant(NamedTuple):
    """`constant`: the c of c‖x‖₂. `deviation`: the largest |N(x)/(c‖x‖₂) - 1| over the points.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> print(geometry.euclidean_constant(lambda x: 3 * jnp.linalg.norm(x), 4, jax.random.key(0)).constant)
        3.0

    Source: `euclidean_constant` gives it.
    """

    constant: Array
    deviation: Array


class FamilyConstant(NamedTuple):
    """K(n) = E[N_n(X)], estimated.

    `n`: the dimensions. `mean`, `standard_error`: of N_n(X) at each n. `slope`, `slope_error`: of the line of least
    squares through log K(n) against log n, with the standard error that those of K give it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> K = geometry.family_constant(jnp.linalg.norm, (4, 16), jax.random.key(0), "rademacher")
        >>> print(K.n, K.mean, K.slope)
        [ 4 16] [2. 4.] 0.5

    Source: `family_constant` gives it.
    """

    n: Array
    mean: Array
    standard_error: Array
    slope: Array
    slope_error: Array


# ------------------------------------------------------------------------------------------------------------ matrices


def random_orthogonal(key: PRNGKeyArray, n: int, dtype: DTypeLike = float) -> Float[Array, "n n"]:
    r"""A random matrix of O(n), $R^T R = I$, with Haar's law: QR and RQ have the law of R for every fixed Q of O(n).

    Its determinant is +1 or -1, each with probability 1/2. Costs a QR decomposition: n = 4096 takes seconds and 64 MB.
    No gap in this module needs it: see `worst_rotation`.

    Args:
        key: a random key.
        n: the dimension, at least 1.
        dtype: float32 or float64; by default the wider of them that JAX has enabled.

    Returns:
        The matrix.

    Raises:
        TypeError: n is not an integer, key no random key, or dtype another.
        ValueError: n is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> R = geometry.random_orthogonal(jax.random.key(0), 3)
        >>> bool(jnp.allclose(R.T @ R, jnp.eye(3), atol=1e-6))
        True

    Source: Mezzadri, How to generate random matrices from the classical compact groups (arXiv math-ph/0609050).
    """
    return _orthogonal("random_orthogonal", key, n, dtype)


def random_rotation(key: PRNGKeyArray, n: int, dtype: DTypeLike = float) -> Float[Array, "n n"]:
    r"""A random matrix of SO(n), $R^T R = I$ and $\det R = 1$, with Haar's law. For n = 1 it is [[1]].

    A matrix of `random_orthogonal` with its first column negated if its determinant is -1.

    Args:
        key: a random key.
        n: the dimension, at least 1.
        dtype: float32 or float64; by default the wider of them that JAX has enabled.

    Returns:
        The matrix.

    Raises:
        TypeError: n is not an integer, key no random key, or dtype another.
        ValueError: n is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> R = geometry.random_rotation(jax.random.key(0), 3)
        >>> bool(jnp.allclose(jnp.linalg.det(R), 1.0))
        True
        >>> print(geometry.random_rotation(jax.random.key(0), 1))
        [[1.]]

    Source: as `random_orthogonal`.
    """
    matrix = _orthogonal("random_rotation", key, n, dtype)
    return matrix.at[:, 0].multiply(jnp.linalg.slogdet(matrix)[0])


def _orthogonal(function: str, key: Any, n: Any, dtype: Any) -> Array:
    if np.dtype(dtype).name not in ("float32", "float64"):  # of which there are QR decompositions
        raise TypeError(f"{function}: dtype must be float32 or float64, got {np.dtype(dtype)}")
    return jax.random.orthogonal(_as_key(function, key), _as_count(function, "n", n), dtype=dtype)


def rotation_between(x: Float[ArrayLike, " n"], y: Float[ArrayLike, " n"]) -> Float[Array, "n n"]:
    r"""The rotation R with $Rx/\|x\| = y/\|y\|$ in the plane of x and y: what is orthogonal to the plane stays.

    The reason why Theorem 1 holds: rotations carry x to every y of the same length, so an invariant f is constant on
    spheres. With the unit vectors a = x/‖x‖ and h halfway between x and y it is the product of two reflections,
    $(I - 2hh^T)(I - 2aa^T)$, and so orthogonal to rounding wherever y is.

    Args:
        x: a vector other than zero.
        y: a vector other than zero, of the same shape.

    Returns:
        The matrix, in SO(n), float32 (float64 for float64). For y = -x the plane is one of the many that hold x, and
        for n = 1, where no rotation takes x to -x, the result is the reflection [[-1]]. NaN if x or y is zero and that
        is not known before the program runs.

    Raises:
        TypeError: x or y is not floating.
        ValueError: x and y are not vectors of one shape, or one of them is zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> R = geometry.rotation_between(jnp.array([2.0, 0.0]), jnp.array([0.0, 3.0]))
        >>> bool(jnp.allclose(R, jnp.array([[0.0, -1.0], [1.0, 0.0]]), atol=1e-6))
        True

    Source: Golub and Van Loan, Matrix Computations, section 5.1.2 (Householder reflections).
    """
    x = as_numeric("rotation_between", "x", x, kind=jnp.floating)
    y = as_numeric("rotation_between", "y", y, kind=jnp.floating)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"rotation_between: x and y must be vectors of one shape, got {x.shape} and {y.shape}")
    for name, v in ("x", x), ("y", y):
        if not isinstance(v, jax.core.Tracer) and not np.asarray(v).any():
            raise ValueError(f"rotation_between: {name} must not be zero, which no rotation moves")
    return _rotation_between(x, y)


@partial(jax.jit, inline=True)
def _rotation_between(x: Array, y: Array) -> Array:
    n, dtype = x.shape[0], accumulator_dtype(x.dtype, y.dtype)
    directions = rms_normalize(jnp.stack([x.astype(dtype), y.astype(dtype)]), epsilon=0)
    a, b = jnp.where(jnp.any(directions, axis=1, keepdims=True), directions, jnp.nan)
    if n == 1:
        return jnp.outer(b, a)
    # A difference that may be all rounding: computed once, or XLA computes it twice, each time with another rounding.
    toward_b = lax.optimization_barrier(_reject(b, a))
    elsewhere = jax.nn.one_hot(jnp.argmin(jnp.abs(a)), n, dtype=dtype)
    w = jnp.where(jnp.max(jnp.abs(toward_b)) > 8 * jnp.finfo(dtype).eps, toward_b, elsewhere)
    for _ in range(2):  # once more, since what is left of a after one time is not small where b is nearly a or -a
        w = _unit(_reject(w, a))
    cosine, sine = jnp.mean(a * b), jnp.mean(w * b)
    # Halfway between a and b, where a + b may be all rounding.
    halfway = _unit(jnp.where(cosine > 0, a + b, w + sine / jnp.maximum(1 - cosine, 1) * a))
    turned = 2 * jnp.mean(halfway * a) * jnp.outer(halfway, a) - jnp.outer(a, a) - jnp.outer(halfway, halfway)
    return jnp.eye(n, dtype=dtype) + 2 / n * turned


# ------------------------------------------------------------------------------------------------- theorems 1 and 2


def worst_rotation(
    f: Callable[[Array], ArrayLike], n: int, key: PRNGKeyArray, samples: int = 64, *, reflections: bool = False
) -> Gap:
    r"""Where f(Rx) differs most from f(x): the `Gap` behind `rotation_gap` and `orthogonal_gap`, with its x and Rx.

    Samples are x (see the head of this module) and y, uniform on the sphere of radius ‖x‖₂. For a matrix R with
    Haar's law that does not depend on x, the pair (x, Rx) has that very law, on SO(n) for n >= 2 and on O(n) for every
    n; so no matrix is made, and a sample costs O(n). One R for a pair is `rotation_between(x, Rx)`.

    Args:
        f: a function of a vector of shape [n] that gives a real number.
        n: the dimension, at least 1.
        key: a random key.
        samples: how many pairs to try.
        reflections: draw R from O(n) in place of SO(n). It makes a difference for n = 1 only.

    Returns:
        A `Gap` with left = f(Rx), right = f(x), and at = {"x": x, "Rx": Rx}.

    Raises:
        TypeError: n or samples is not an integer, key no random key, f no JAX function or not of real numbers.
        ValueError: n or samples is below 1, f gives an array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> worst = geometry.worst_rotation(lambda x: jnp.sum(jnp.abs(x)), 3, jax.random.key(0))
        >>> R = geometry.rotation_between(worst.at["x"], worst.at["Rx"])
        >>> bool(jnp.allclose(R @ worst.at["x"], worst.at["Rx"], atol=1e-5))
        True

    Source: Muller, A note on a method for generating points uniformly on n-dimensional spheres (CACM 2, 1959).
    """
    return _worst_pair("worst_rotation", f, n, key, samples, _turned if reflections else _rotated)


def _worst_pair(function: str, f: Any, n: Any, key: Any, samples: Any, image: Callable[[Array, Array], Array]) -> Gap:
    """Where f differs most between points and their images."""
    n, samples = _as_count(function, "n", n), _as_count(function, "samples", samples)
    for_x, for_image = jax.random.split(_as_key(function, key))
    x = _points(for_x, n, _kinds(samples))
    y = image(for_image, x)
    left, right = _values(_scalar(function, f), y, x)
    return _worst(_relative(left, right), left, right, {"x": x, "Rx": y})


def rotation_gap(f: Callable[[Array], ArrayLike], n: int, key: PRNGKeyArray, samples: int = 64) -> Float[Array, ""]:
    r"""Theorem 1: the largest $|f(Rx) - f(x)|/\max(|f(Rx)|, |f(x)|)$ over random x and rotations R of SO(n).

    For n >= 2, f is invariant under rotations if and only if $f(x) = g(\|x\|_2)$; `radial_profile` gives that g. For
    n = 1 the only rotation is the identity and the gap is 0 for every f: there g exists if and only if f is even, and
    that is what `is_even_gap` and `orthogonal_gap` tell.

    Args:
        f: a function of a vector of shape [n] that gives a real number.
        n: the dimension, at least 1.
        key: a random key.
        samples: how many pairs x, R to try; `worst_rotation` says how they are drawn.

    Returns:
        The gap: 0 where the sides are equal, 2 (up to rounding) where they are opposite.

    Raises:
        TypeError: n or samples is not an integer, key no random key, f no JAX function or not of real numbers.
        ValueError: n or samples is below 1, f gives an array.

    Example:
        >>> import jax, jax.numpy as jnp, rmsjax
        >>> key = jax.random.key(0)
        >>> bool(rmsjax.geometry.rotation_gap(rmsjax.rms, 3, key) < 1e-5)
        True
        >>> bool(rmsjax.geometry.rotation_gap(lambda x: jnp.max(jnp.abs(x)), 3, key) > 0.1)
        True

    Source: SO(n) acts transitively on spheres, see `rotation_between`.
    """
    return _worst_pair("rotation_gap", f, n, key, samples, _rotated).size


def orthogonal_gap(f: Callable[[Array], ArrayLike], n: int, key: PRNGKeyArray, samples: int = 64) -> Float[Array, ""]:
    r"""Theorem 2: the largest $|f(Rx) - f(x)|/\max(|f(Rx)|, |f(x)|)$ over random x and R of O(n), reflections included.

    At every n >= 1, f is invariant under O(n) if and only if $f(x) = g(\|x\|_2)$. For n >= 2 that is what invariance
    under rotations says too, and the gap is that of `rotation_gap`; for n = 1, where O(1) = {1, -1}, it is evenness.

    Args:
        f: a function of a vector of shape [n] that gives a real number.
        n: the dimension, at least 1.
        key: a random key.
        samples: how many pairs x, R to try; `worst_rotation` says how they are drawn.

    Returns:
        The gap: 0 where the sides are equal, 2 (up to rounding) where they are opposite.

    Raises:
        TypeError: n or samples is not an integer, key no random key, f no JAX function or not of real numbers.
        ValueError: n or samples is below 1, f gives an array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> key = jax.random.key(0)
        >>> print(geometry.rotation_gap(jnp.sum, 1, key), geometry.orthogonal_gap(jnp.sum, 1, key))
        0.0 2.0

    Source: as `rotation_gap`.
    """
    return _worst_pair("orthogonal_gap", f, n, key, samples, _turned).size


def is_even_gap(f: Callable[[Array], ArrayLike], n: int, key: PRNGKeyArray, samples: int = 64) -> Float[Array, ""]:
    r"""The largest $|f(-x) - f(x)|/\max(|f(-x)|, |f(x)|)$ over random x: 0 for an even f.

    For n = 1 this is the condition of Theorem 1: f(x) = g(|x|) if and only if f is even.

    Args:
        f: a function of a vector of shape [n] that gives a real number.
        n: the dimension, at least 1.
        key: a random key.
        samples: how many x to try.

    Returns:
        The gap: 0 where the sides are equal, 2 (up to rounding) where they are opposite.

    Raises:
        TypeError: n or samples is not an integer, key no random key, f no JAX function or not of real numbers.
        ValueError: n or samples is below 1, f gives an array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> key = jax.random.key(0)
        >>> print(geometry.is_even_gap(jnp.max, 1, key), geometry.is_even_gap(lambda x: jnp.max(x) ** 2, 1, key))
        2.0 0.0

    Source: Theorem 1 at n = 1.
    """
    return _worst_pair("is_even_gap", f, n, key, samples, lambda _, x: -x).size


def equivariance_gap(f: Callable[[Array], Array], n: int, key: PRNGKeyArray, samples: int = 64) -> Float[Array, ""]:
    r"""The largest $\|f(Rx) - R f(x)\|/\max(\|f(Rx)\|, \|f(x)\|)$ over random x and R of O(n).

    Here f takes vectors to vectors. f(Rx) = R f(x) for all R of O(n) if and only if $f(x) = h(\|x\|_2)\,x$. RMSNorm
    without a scale, or with the same scale for all features, has this form; a scale that differs between features
    breaks it. For n = 1 it says that f is odd.

    As in `worst_rotation` no matrix is made. With $f(x) = \alpha x + p$, p orthogonal to x, the pair (Rx, R f(x)) has
    the law of $(y, \alpha y + \|p\| u)$ with y uniform on the sphere of radius ‖x‖₂ and u uniform among the unit
    vectors orthogonal to y.

    Args:
        f: a function of a vector of shape [n] that gives one of the same shape.
        n: the dimension, at least 1.
        key: a random key.
        samples: how many pairs x, R to try.

    Returns:
        The gap: 0 where the sides are equal, 2 (up to rounding) where they are opposite.

    Raises:
        TypeError: n or samples is not an integer, key no random key, f no JAX function or not of floats.
        ValueError: n or samples is below 1, f gives another shape.

    Example:
        >>> import jax, jax.numpy as jnp, rmsjax
        >>> key, scale = jax.random.key(0), jnp.array([1.0, 2.0, 3.0])
        >>> bool(rmsjax.geometry.equivariance_gap(rmsjax.rms_normalize, 3, key) < 1e-5)
        True
        >>> bool(rmsjax.geometry.equivariance_gap(lambda x: rmsjax.rms_normalize(x, scale), 3, key) > 0.1)
        True

    Source: R with Rx = x leaves only multiples of x fixed, so p = 0.
    """
    n, samples = _as_count("equivariance_gap", "n", n), _as_count("equivariance_gap", "samples", samples)
    for_x, for_R, for_aside = jax.random.split(_as_key("equivariance_gap", key), 3)
    x = _points(for_x, n, _kinds(samples))
    y = _turned(for_R, x)
    aside = jax.random.normal(for_aside, x.shape, x.dtype)
    fx, fy = _values(partial(_vector, "equivariance_gap", f), x, y)
    return jnp.max(_equivariance_gap(x, y, fx, fy, aside))


@partial(jax.jit, inline=True)
def _equivariance_gap(x: Array, y: Array, fx: Array, fy: Array, aside: Array) -> Array:
    """The gap of each row; aside: a direction for what f(x) has beside x."""
    largest = jnp.max(jnp.maximum(jnp.abs(fx), jnp.abs(fy)), axis=-1, keepdims=True)
    fx, fy = _ratio(fx, largest), _ratio(fy, largest)  # whose squares are in range
    x, y = _unit(x), _unit(y)
    turned = jnp.mean(x * fx, axis=-1, keepdims=True) * y + _size(_reject(fx, x)) * _unit(_reject(aside, y))
    return _ratio(_size(fy - turned), jnp.maximum(_size(fx), _size(fy)))


def radial_profile(f: Callable[[Array], ArrayLike], radii: Float[ArrayLike, "*radii"], n: int) -> Real[Array, "*radii"]:
    r"""The g of $f(x) = g(\|x\|_2)$ at the given radii, read off along the first axis: $g(r) = f(r e_1)$.

    It stands for f everywhere if `orthogonal_gap` is 0. Differentiable in the radii where f is.

    Args:
        f: a function of a vector of shape [n] that gives a real number.
        radii: lengths, of any shape. A negative one gives f at the opposite point.
        n: the dimension, at least 1.

    Returns:
        The values of f, of the shape of the radii and the dtype of f.

    Raises:
        TypeError: n is not an integer, radii are not floating, f does not give a real number.
        ValueError: n is below 1, f gives an array.

    Example:
        >>> import jax.numpy as jnp, rmsjax
        >>> print(rmsjax.geometry.radial_profile(rmsjax.rms, jnp.array([0.0, 1.0, 2.0]), 4))
        [0.  0.5 1. ]

    Source: Theorems 1 and 2.
    """
    radii = as_numeric("radial_profile", "radii", radii, kind=jnp.floating)
    axis = jax.nn.one_hot(0, _as_count("radial_profile", "n", n), dtype=radii.dtype)
    return jax.vmap(lambda r: _scalar("radial_profile", f)(r * axis))(radii.reshape(-1)).reshape(radii.shape)


# --------------------------------------------------------------------------------------------------------------- norms


def euclidean_constant(
    norm: Callable[[Array], ArrayLike], n: int, key: PRNGKeyArray, samples: int = 64
) -> EuclideanConstant:
    r"""Corollary 1.1: the c for which norm(x) is nearest to $c\|x\|_2$, and how far from that it gets.

    A norm that is invariant under rotations is $c\|x\|_2$, and its deviation is rounding. Other norms, L1 and max among
    them, deviate. (For n = 1 every norm is c|x|.)

    Args:
        norm: a norm on vectors of shape [n].
        n: the dimension, at least 1.
        key: a random key.
        samples: how many x to try, at least 2.

    Returns:
        An `EuclideanConstant`: c, the mean of norm(x)/‖x‖₂ over the points, and the largest |norm(x)/(c‖x‖₂) - 1|.

    Raises:
        TypeError: n or samples is not an integer, key no random key, norm no JAX function or not of real numbers.
        ValueError: n is below 1, samples below 2, norm gives an array.

    Example:
        >>> import jax, jax.numpy as jnp, rmsjax
        >>> constant, deviation = rmsjax.geometry.euclidean_constant(rmsjax.rms, 4, jax.random.key(0))
        >>> print(constant.round(5), deviation < 1e-5)
        0.5 True
        >>> bool(rmsjax.geometry.euclidean_constant(lambda x: jnp.abs(x).sum(), 4, jax.random.key(0)).deviation > 0.1)
        True

    Source: Theorem 1 and homogeneity: g(r) = r g(1).
    """
    n, samples = _as_count("euclidean_constant", "n", n), _as_count("euclidean_constant", "samples", samples, least=2)
    x = _points(_as_key("euclidean_constant", key), n, _kinds(samples))
    (values,) = map(_wide, _values(_scalar("euclidean_constant", norm, "norm"), x))
    ratios = values / (math.sqrt(n) * _size(x)[:, 0])
    constant = jnp.mean(ratios)
    return EuclideanConstant(constant, jnp.max(_ratio(jnp.abs(ratios - constant), jnp.abs(constant))))


def worst_axioms(f: Callable[[Array], ArrayLike], n: int, key: PRNGKeyArray, samples: int = 64) -> NormAxioms[Gap]:
    r"""Where f violates each axiom of a norm most: the three `Gap`s behind `norm_axioms_gap`, with their points.

    - homogeneity: f(ax) = |a| f(x), for a of either sign. at = {"a": a, "x": x}.
    - triangle: f(x + y) <= f(x) + f(y). at = {"x": x, "y": y}.

      Both sizes are relative to the larger side. Where f is nearly 0 rounding may be all there is, so there they are
      relative to the largest f(x)/‖x‖ that was found, times the length of the argument and 32 ε/t (at most 1), with ε
      the machine epsilon of f's dtype and t the `Gap.tolerance`.
    - definiteness: f(0) = 0, with the size |f(0)| relative to the largest |f(x)|; and f(x) > 0 for x ≠ 0. Here the
      least f(x)/‖x‖ that counts as positive is t times the largest of these ratios: from there up the size is 0, from
      there down it rises to 1 at f(x) = 0, and beyond where f(x) is negative. right is 0, or the least f(x) that
      counts. at = {"x": x}.

    Two limits: a norm with ratios farther apart than t, such as $\sqrt{x_0^2 + 10^{-8} x_1^2}$ in float32, is taken for
    a seminorm; and a seminorm is found out only if a point that was tried is (nearly) one of its zeros.

    Args:
        f: a function of a vector of shape [n] that gives a real number.
        n: the dimension, at least 1.
        key: a random key.
        samples: how many points to try; 16 give each kind of x (see the head of this module) with each kind of y.

    Returns:
        A `NormAxioms` of `Gap`s.

    Raises:
        TypeError: n or samples is not an integer, key no random key, f no JAX function or not of real numbers.
        ValueError: n or samples is below 1, f gives an array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import geometry
        >>> worst = geometry.worst_axioms(jnp.std, 3, jax.random.key(0)).definiteness
        >>> bool(worst.size > 0.9), bool(jnp.ptp(worst.at["x"]) == 0)
        (True, True)

    Source: Horn and Johnson, Matrix Analysis, section 5.1.
    """
    return _worst_axioms("worst_axioms", f, n, key, samples)


def _worst_axioms(function: str, f: Any, n: Any, key: Any, samples: Any) -> NormAxioms[Gap]:
    n, samples = _as_count(function, "n", n), _as_count(function, "samples", samples)
    for_x, for_y, for_a = jax.random.split(_as_key(function, key), 3)
    x, y = _points(for_x, n, _kinds(samples)), _points(for_y, n, jnp.arange(samples) // _KINDS % _KINDS)
    a = _factor(_uniform(for_a, (samples,)))
    return _violations(x, y, a, *_values(_scalar(function, f), x, y, a[:, None] * x, x + y, jnp.zeros_like(x[:1])))


@partial(jax.jit, inline=True)
def _violations(
    x: Array, y: Array, a: Array, f_x: Array, f_y: Array, f_ax: Array, f_sum: Array, f_origin: Array
) -> NormAxioms[Gap]:
    size_x, size_y, size_a = _size(x)[:, 0], _size(y)[:, 0], jnp.abs(a)
    largest = jnp.max(jnp.abs(_wide(f_x)) / size_x)
    tolerance = _tolerance(f_x.dtype)
    least = tolerance * largest
    floor = min(_ROUNDINGS * float(jnp.finfo(f_x.dtype).eps) / tolerance, 1.0) * largest

    af_x = size_a.astype(f_x.dtype) * f_x
    homogeneity = _relative(f_ax, af_x, floor * size_a * size_x)
    total = f_x + f_y
    triangle = jnp.where(f_sum <= total, 0, _relative(f_sum, total, floor * (size_x + size_y)))
    positive = jnp.maximum(1 - _ratio(_wide(f_x), least * size_x), 0)
    zero = _ratio(jnp.abs(_wide(f_origin)), jnp.max(jnp.abs(_wide(f_x)), keepdims=True))
    return NormAxioms(
        _worst(homogeneity, f_ax, af_x, {"a": a, "x": x}),
        _worst(triangle, f_sum, total, {"x": x, "y": y}),
        _worst(
            jnp.concatenate([zero, positive]),
            jnp.concatenate([f_origin, f_x]),
            jnp.concatenate([jnp.zeros_like(f_origin), (least * size_x).astype(f_x.dtype)]),
            {"x": jnp.concatenate([jnp.zeros_like(x[:1]), x])},
        ),
    )


def norm_axioms_gap(
    f: Callable[[Array], ArrayLike], n: int, key: PRNGKeyArray, samples: int = 64
) -> NormAxioms[Float[Array, ""]]:
    r"""The largest violation of each axiom of a norm: f(ax) = |a| f(x), f(x + y) <= f(x) + f(y), f(x) = 0 only at 0.

    `worst_axioms` says what is tried, what each size is relative to, and at which points the worst was found.

    Args:
        f: a function of a vector of shape [n] that gives a real number.
        n: the dimension, at least 1.
        key: a random key.
        samples: how many points to try.

    Returns:
        A `NormAxioms` of numbers.

    Raises:
        TypeError: n or samples is not an integer, key no random key, f no JAX function or not of real numbers.
        ValueError: n or samples is below 1, f gives an array.

    Example:
        >>> import jax, jax.numpy as jnp, rmsjax
        >>> gaps = rmsjax.geometry.norm_axioms_gap(rmsjax.rms, 3, jax.random.key(0))
        >>> all(gap < 1e-5 for gap in gaps)
        True
        >>> gaps = rmsjax.geometry.norm_axioms_gap(lambda x: jnp.vdot(x, x), 3, jax.random.key(0))
        >>> bool(gaps.homogeneity > 0.5), bool(gaps.triangle > 0.4), bool(gaps.definiteness > 0)
        (True, True, False)

    Source: as `worst_axioms`.
    """
    return NormAxioms(*(gap.size for gap in _worst_axioms("norm_axioms_gap", f, n, key, samples)))


# ------------------------------------------------------------------------------------------------- norms at every width


def family_constant(
    norm_family: Callable[[Array], ArrayLike],
    ns: Sequence[int],
    key: PRNGKeyArray,
    distribution: str | Callable[[PRNGKeyArray, tuple[int, ...]], Array] = "normal",
    samples: int = 256,
) -> FamilyConstant:
    r"""Corollary 2.1: $K(n) = E[N_n(X)]$ for X of n iid coordinates of mean 0 and variance 1, and its growth with n.

    The slope of log K(n) against log n is 0 for a norm that means the same at every width. RMS has 0 in the limit (see
    `gaussian_mean_rms` for how fast), L2 1/2, L1 1. The max norm of normal X grows as $\sqrt{2 \log n}$, with a slope
    that falls to 0 while K does not settle.

    Args:
        norm_family: the norms $N_n$ as one function, of a vector of any length.
        ns: the dimensions, at least two different ones.
        key: a random key.
        distribution: of the coordinates: "normal", "rademacher" (1 or -1), "uniform" or "laplace", each of mean 0 and
            variance 1, or a function of a key and a shape.
        samples: how many X at each n, at least 2. They are drawn in batches of some 16 MB.

    Returns:
        A `FamilyConstant`. The slope is NaN if some mean is not positive and has no logarithm.

    Raises:
        TypeError: ns is no sequence, an n or samples no integer, key no random key, norm_family no JAX function or not
            of real numbers, or the distribution not of floats.
        ValueError: an n is below 1, samples below 2, fewer than two different ns, the distribution is not known or
            gives another shape than it is asked for, norm_family gives an array.

    Example:
        >>> import jax, jax.numpy as jnp, rmsjax
        >>> for norm in rmsjax.rms, jnp.linalg.norm:
        ...     print(rmsjax.geometry.family_constant(norm, (16, 256), jax.random.key(0), "rademacher").slope)
        0.0
        0.5

    Source: for the max norm, Leadbetter, Lindgren, Rootzén, Extremes and Related Properties of Random Sequences,
    theorem 1.5.3.
    """
    try:
        given = list(ns)
    except TypeError:
        raise TypeError(f"family_constant: ns must be a sequence of integers, got {ns!r:.80}") from None
    sizes = [_as_count("family_constant", "an entry of ns", n) for n in given]
    samples = _as_count("family_constant", "samples", samples, least=2)
    if len(set(sizes)) < 2:
        raise ValueError(f"family_constant: ns must hold at least two different dimensions, got {ns!r}")
    draw = _distribution(distribution)
    norm = _scalar("family_constant", norm_family, "norm_family")
    key = _as_key("family_constant", key)

    def estimate(n: int, key: PRNGKeyArray) -> tuple[Array, Array]:
        batch = min(samples, max(1, _BATCH // n))

        def values_of(key: PRNGKeyArray) -> Array:
            return _wide(jax.vmap(norm)(draw(key, (batch, n))))

        if batch == samples:  # of operations that are compiled for every norm, which a loop is not
            values = values_of(key)
        else:
            keys = jax.random.split(key, -(-samples // batch))
            values = jax.lax.map(values_of, keys).reshape(-1)[:samples]
        return jnp.mean(values), jnp.std(values, ddof=1) / math.sqrt(samples)

    mean, error = map(jnp.stack, zip(*map(estimate, sizes, jax.random.split(key, len(sizes))), strict=True))
    logs = np.log(sizes) - np.mean(np.log(sizes))
    weights = jnp.asarray(logs / np.sum(logs**2), mean.dtype)
    return FamilyConstant(
        jnp.asarray(sizes),
        mean,
        error,
        jnp.sum(weights * jnp.log(mean)),
        jnp.linalg.norm(weights * error / mean),
    )


def gaussian_mean_rms(n: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
    r"""The mean RMS norm of a normal vector, $E\|X\|_{RMS} = \sqrt{2/n}\,\Gamma(\frac{n+1}2)/\Gamma(\frac n2)$.

    X has n independent coordinates of mean 0 and variance 1. The mean expands to
    $1 - \frac{1}{4n} + \frac{1}{32n^2} + \frac{5}{128n^3} - \dots$, so it is below 1 at every n and 1 in the limit
    only, while $E\|X\|_{RMS}^2 = 1$ at every n, and that for any distribution of the coordinates.

    Corollary 2.1 is at times derived from the hypothesis $E\|X\|_2 = \sqrt n$. That is true of the mean square,
    $E\|X\|_2^2 = n$; of the mean it is true only as n → ∞, or for coordinates 1 and -1, where $\|X\|_2 = \sqrt n$
    always. So invariant norms with E[N_n(X)²] = 1 at every n are the RMS norm; those with E[N_n(X)] = 1 at every n, for
    normal X, are the RMS norm divided by this function: 1.25 times as large at n = 1, 1.004 times at n = 64. Another
    distribution gives another factor, and for all of them it tends to 1.

    The value and its derivative are good to a few units of machine epsilon, relative to themselves, for n from 1 to
    10^12, in float32 and float64 alike. It is a smooth function of a real n >= 1.

    Args:
        n: dimensions, numbers of any shape, at least 1; float32 holds integers up to 2^24 exactly.

    Returns:
        The means, of the shape of n; float64 for float64, else float32 (integers count as JAX's default float).

    Raises:
        TypeError: n is not real numbers.
        ValueError: an n known at trace time is below 1.

    Example:
        >>> from rmsjax import geometry
        >>> print(geometry.gaussian_mean_rms([1, 4, 10**12]))
        [0.7978846 0.9399856 1.       ]

    Source: the mean of the chi distribution. Γ(z+1) = zΓ(z) turns its square at n into that at n + 2 times
    1 - 1/(n+1)² (Wallis's product); far enough up, the asymptotic series of log Γ (DLMF 5.11.8) takes over.
    """
    # Integers as floats, before JAX makes them 32 bits wide, or NumPy objects, where they do not fit.
    n = jax.tree.map(lambda v: float(v) if isinstance(v, int) else v, n)
    n = n if isinstance(n, Array) else np.asarray(n)
    if jnp.issubdtype(n.dtype, jnp.integer):
        n = n.astype(float)
    n = as_numeric("gaussian_mean_rms", "n", n, kind=jnp.floating)
    n = n.astype(accumulator_dtype(n.dtype))
    if not isinstance(n, jax.core.Tracer) and not np.all(np.asarray(n) >= 1):
        raise ValueError(f"gaussian_mean_rms: n must be at least 1, got {n}")
    # A sum of small logarithms loses nothing; a difference of two log Γ of about n log n would lose all digits.
    odd = jnp.arange(1, 25, 2, dtype=n.dtype)
    product = jnp.sum(jax.vmap(lambda k: jnp.log1p(-((1 / (n + k)) ** 2)))(odd), 0)
    inverse = 1 / (n + 24)
    series = jnp.zeros_like(n)
    for coefficient in (691 / 88, -31 / 36, 17 / 112, -1 / 20, 1 / 24, -1 / 4):
        series = series * inverse**2 + coefficient
    return jnp.exp(product / 2 + series * inverse)


# ------------------------------------------------------------------------------------------------------------ sampling


def _factor(u: Array) -> Array:
    """A number of either sign, with a magnitude between 1/4 and 4, from one that is uniform between -1 and 1."""
    return jnp.where(u < 0, -1, 1) * jnp.exp2(4 * jnp.abs(u) - 2)


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def _kinds(samples: int) -> Array:
    """The kind of each point, in turn."""
    return jnp.arange(samples) % _KINDS


def _points(key: PRNGKeyArray, n: int, kinds: Array) -> Array:
    """Points [samples, n] as the head of this module describes them."""
    return _draw_points(key, n, kinds)


# Jitted, as are other helpers, for calls outside of jit: compiled as one program rather than operation by operation.
# Inline, so that a program around them sees operations, not calls.
@partial(jax.jit, static_argnums=1, inline=True)
def _draw_points(key: PRNGKeyArray, n: int, kinds: Array) -> Array:
    u = _uniform(key, (len(kinds), n + 1))  # one draw for everything: the generator is what takes long to compile
    dense = u[:, 1:]
    one, other = (jax.nn.one_hot(pick(dense, -1), n, dtype=u.dtype) for pick in (jnp.argmax, jnp.argmin))
    shapes = [dense, one, one - other if n > 1 else one, jnp.ones_like(dense)]
    return _unit(jnp.select([kinds[:, None] == kind for kind in range(_KINDS)], shapes)) * _factor(u[:, :1])


@partial(jax.jit, inline=True)
def _turned(key: PRNGKeyArray, x: Array) -> Array:
    """Rx for each row x, with R of O(n)."""
    return _unit(jax.random.normal(key, x.shape, x.dtype)) * _size(x)


def _rotated(key: PRNGKeyArray, x: Array) -> Array:
    """Rx for each row x, with R of SO(n)."""
    return x if x.shape[-1] == 1 else _turned(key, x)


def _distribution(choice: str | Callable[..., Array]) -> Callable[..., Array]:
    known: dict[str, Callable[..., Array]] = {
        "normal": jax.random.normal,
        "rademacher": partial(jax.random.rademacher, dtype=float),
        "uniform": partial(jax.random.uniform, minval=-math.sqrt(3), maxval=math.sqrt(3)),
        "laplace": lambda key, shape: jax.random.laplace(key, shape) * math.sqrt(0.5),
    }
    draw = known.get(choice) if isinstance(choice, str) else choice
    if not callable(draw):
        names = ", ".join(map(repr, known))
        raise ValueError(f"family_constant: distribution must be one of {names}, or a function, got {choice!r:.80}")

    def checked(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        x = as_numeric("family_constant", "what distribution gives", draw(key, shape), kind=jnp.floating)
        if x.shape != shape:
            raise ValueError(f"family_constant: distribution must give the shape {shape}, got {x.shape}")
        return x

    return checked


# ------------------------------------------------------------------------------------------------------------- helpers


def _as_count(function: str, argument: str, value: Any, least: int = 1) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{function}: {argument} must be an integer known at trace time, got {value!r:.80}") from None
    if count < least:
        raise ValueError(f"{function}: {argument} must be at least {least}, got {count}")
    return count


def _as_key(function: str, key: Any) -> Array:
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise TypeError(f"{function}: key must be a random key such as jax.random.key(0), got {key!r:.80}")
    return key


def _called(function: str, f: Callable[[Array], Any], x: Array, argument: str) -> Any:
    try:
        return f(x)
    except jax.errors.JAXTypeError as error:  # NumPy on a tracer, or a branch on its value
        line = str(error).splitlines()[0]
        raise TypeError(f"{function}: {argument} must be a function that jax.vmap takes, but: {line}") from error


def _scalar(function: str, f: Callable[[Array], Any], argument: str = "f") -> Callable[[Array], Array]:
    """f with a result that is known to be one real number, of a floating dtype."""

    def value(x: Array) -> Array:
        y = as_numeric(function, f"what {argument} returns", _called(function, f, x, argument))
        if jnp.iscomplexobj(y):
            raise TypeError(f"{function}: what {argument} returns must be real, got dtype {y.dtype}")
        if y.shape:
            raise ValueError(
                f"{function}: {argument} must give a number, got shape {y.shape} from a vector of shape {x.shape}"
            )
        return y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(x.dtype)

    return value


def _vector(function: str, f: Callable[[Array], Any], x: Array) -> Array:
    y = as_numeric(function, "what f returns", _called(function, f, x, "f"), kind=jnp.floating)
    if y.shape != x.shape:
        raise ValueError(f"{function}: f must keep the shape of a vector, got shape {y.shape} from {x.shape}")
    return y.astype(x.dtype)


def _values(value: Callable[[Array], Array], *points: Array) -> list[Array]:
    """What a function gives at the rows of some arrays; called once for all, since it may take long to compile."""
    found = jax.vmap(value)(jnp.concatenate(points))
    return jnp.split(found, np.cumsum([len(rows) for rows in points])[:-1].tolist())


def _tolerance(dtype: Any) -> float:
    info = jnp.finfo(dtype)
    return math.sqrt(float(info.eps)) if info.bits >= 32 else min(4 * float(info.eps), 0.25)


def _wide(x: Array) -> Array:
    """x in JAX's default float, that of all points, so that no more rounding comes in."""
    return x.astype(float)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """numerator/denominator, and 0 where the denominator is 0."""
    return jnp.where(denominator == 0, 0, numerator / jnp.where(denominator == 0, 1, denominator))


@partial(jax.jit, inline=True)
def _relative(left: Array, right: Array, floor: ArrayLike = 0.0) -> Array:
    """How far apart the sides are, relative to the larger one, or to the floor if that is larger still."""
    left, right = _wide(left), _wide(right)
    return _ratio(jnp.abs(left - right), jnp.maximum(jnp.maximum(jnp.abs(left), jnp.abs(right)), floor))


def _size(x: Array) -> Array:
    """The RMS norm of each row, for points of a size about 1; `rms`, with its guards, takes longer to compile."""
    return jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))


def _unit(x: Array) -> Array:
    """Each row divided by its RMS norm; zeros stay zeros."""
    return _ratio(x, _size(x))


def _reject(v: Array, unit: Array) -> Array:
    """The part of each row that is orthogonal to a row whose RMS norm is 1."""
    return v - jnp.mean(unit * v, axis=-1, keepdims=True) * unit


@partial(jax.jit, inline=True)
def _worst(sizes: Array, left: Array, right: Array, at: dict[str, Array]) -> Gap:
    """The entry of the largest size, or of the first that is NaN."""
    worst = jnp.argmax(sizes)
    return jax.tree.map(lambda values: values[worst], Gap(sizes, left, right, at))
