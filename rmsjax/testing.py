"""Assertions for tests, about functions of your own as well as rmsjax's.

The geometric ones try random points, the same ones each time unless they are given a key;
`assert_transform_invariant` tries JAX transformations. What fails says where: the worst points, or the transformations.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from rmsjax._checks import as_number
from rmsjax._invariance import TRANSFORMATIONS, NotApplicable, Subject, describe, errors_of
from rmsjax.geometry import Gap, rotation_between, worst_axioms, worst_rotation

__all__ = [
    "TRANSFORMS",
    "TransformationError",
    "assert_norm",
    "assert_orthogonal_invariant",
    "assert_rotation_invariant",
    "assert_transform_invariant",
]


def __dir__() -> list[str]:
    return sorted(__all__)


# ------------------------------------------------------------------------------------------------------------- geometry


def assert_rotation_invariant(
    f: Callable[[jax.Array], Any], n: int, *, key: Any = None, samples: int = 64, tolerance: float | None = None
) -> None:
    """Assert that f(Rx) = f(x) for random vectors x of shape [n] and random rotations R of SO(n).

    By Theorem 1 of `rmsjax.geometry` it says for n >= 2 that f(x) = g(‖x‖₂). For n = 1 the only rotation is the
    identity and any f passes; `assert_orthogonal_invariant` is the one to ask there.

    Args:
        f: a function of a vector that gives a real number, and that `vmap` takes.
        n: the dimension, at least 1.
        key: a random key; always the same one by default, so that a test gives the same result each time.
        samples: how many pairs x, R to try; `rmsjax.geometry.worst_rotation` says how they are drawn.
        tolerance: the largest |f(Rx) - f(x)| that passes, relative to the larger of the two, so that a large constant
            in f hides what varies beside it. By default `rmsjax.geometry.Gap.tolerance`: 3.5e-4 for a float32 result
            of f, 0.03 for bfloat16. A NaN does not pass.

    Raises:
        AssertionError: f is not invariant; the message shows the worst x, R and Rx. (R takes x to Rx in the plane of
            the two; for n above 8 it says how to get it.)
        TypeError, ValueError: what `rmsjax.geometry.rotation_gap` raises; tolerance is not a number, or negative.

    Example:
        >>> import jax.numpy as jnp, rmsjax
        >>> from rmsjax.testing import assert_rotation_invariant
        >>> assert_rotation_invariant(rmsjax.rms, 3)
        >>> assert_rotation_invariant(lambda x: jnp.max(jnp.abs(x)), 3)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        AssertionError: assert_rotation_invariant: ...

    Source: Theorem 1 of `rmsjax.geometry`.
    """
    __tracebackhide__ = True
    _assert_invariant("assert_rotation_invariant", f, n, key, samples, tolerance, reflections=False)


def assert_orthogonal_invariant(
    f: Callable[[jax.Array], Any], n: int, *, key: Any = None, samples: int = 64, tolerance: float | None = None
) -> None:
    """Assert that f(Rx) = f(x) for random vectors x of shape [n] and random R of O(n), reflections included.

    By Theorem 2 of `rmsjax.geometry` it says for every n that f(x) = g(‖x‖₂); for n = 1, that f is even.

    Args:
        f: a function of a vector that gives a real number, and that `vmap` takes.
        n: the dimension, at least 1.
        key: a random key; always the same one by default.
        samples: how many pairs x, R to try.
        tolerance: as in `assert_rotation_invariant`.

    Raises:
        AssertionError: f is not invariant; the message shows the worst x, R and Rx.
        TypeError, ValueError: as in `assert_rotation_invariant`.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax.testing import assert_orthogonal_invariant
        >>> assert_orthogonal_invariant(jnp.linalg.norm, 3)
        >>> assert_orthogonal_invariant(jnp.sum, 1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        AssertionError: assert_orthogonal_invariant: ...

    Source: Theorem 2 of `rmsjax.geometry`.
    """
    __tracebackhide__ = True
    _assert_invariant("assert_orthogonal_invariant", f, n, key, samples, tolerance, reflections=True)


def assert_norm(
    f: Callable[[jax.Array], Any], n: int, *, key: Any = None, samples: int = 64, tolerance: float | None = None
) -> None:
    """Assert that f has the properties of a norm: f(ax) = |a| f(x), f(x + y) <= f(x) + f(y), and f(x) = 0 only at 0.

    They are tried at random points; `rmsjax.geometry.worst_axioms` says which. So f is found to vanish elsewhere than
    at 0 only if a point that was tried is (nearly) a zero of f. On the other hand f must be told from one that
    vanishes: an f(x)/‖x‖ that is smaller than the largest by more than the tolerance, as of the norm
    sqrt(x[0]² + 1e-8 x[1]²), counts as 0.

    Args:
        f: a function of a vector of shape [n] that gives a real number, and that `vmap` takes.
        n: the dimension, at least 1.
        key: a random key; always the same one by default.
        samples: how many points to try, 16 or more to have each kind of x with each kind of y.
        tolerance: the largest relative violation that passes; by default `rmsjax.geometry.Gap.tolerance`: 3.5e-4 for
            a float32 result of f, 0.03 for bfloat16. A NaN does not pass.

    Raises:
        AssertionError: f is no norm; the message shows each property that fails, and where it fails most.
        TypeError, ValueError: what `rmsjax.geometry.norm_axioms_gap` raises; tolerance is not a number, or negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax.testing import assert_norm
        >>> assert_norm(lambda x: jnp.sum(jnp.abs(x)), 3)
        >>> assert_norm(jnp.std, 3)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        AssertionError: assert_norm: ...

    Source: Horn and Johnson, Matrix Analysis, section 5.1.
    """
    __tracebackhide__ = True
    worst = worst_axioms(f, n, _key(key), samples)
    statements = {
        "homogeneity": ("f(ax) = |a| f(x)", "f(ax)", "|a| f(x)"),
        "triangle": ("f(x + y) <= f(x) + f(y)", "f(x + y)", "f(x) + f(y)"),
        "definiteness": ("f(0) = 0 and f(x) > 0 elsewhere", "f(x)", "what counts as 0"),
    }
    failures = [_failure("assert_norm", getattr(worst, a), tolerance, *s) for a, s in statements.items()]
    if any(failures):
        raise AssertionError(f"assert_norm: {_name(f)} is no norm for n = {n}" + "".join(failures))


def _assert_invariant(
    function: str, f: Any, n: int, key: Any, samples: int, tolerance: float | None, *, reflections: bool
) -> None:
    __tracebackhide__ = True
    worst = worst_rotation(f, n, _key(key), samples, reflections=reflections)
    failure = _failure(function, worst, tolerance, "f(Rx) = f(x)", "f(Rx)", "f(x)")
    if failure:
        matrix = (
            _shown("R", rotation_between(worst.at["x"], worst.at["Rx"]))
            if n <= 8
            else "\n  x and Rx: rmsjax.geometry.worst_rotation(f, n, key, samples).at; R: rotation_between(x, Rx)"
        )
        raise AssertionError(f"{function}: {_name(f)} is not invariant for n = {n}{failure}{matrix}")


def _key(key: Any) -> Any:
    return jax.random.key(0) if key is None else key


def _failure(function: str, gap: Gap, tolerance: Any, statement: str, left: str, right: str) -> str:
    """What to say of a gap beyond the tolerance; nothing of another."""
    if isinstance(tolerance, jax.Array):
        tolerance = tolerance.item()
    bound = gap.tolerance if tolerance is None else as_number(function, "tolerance", tolerance, least=0.0)
    if float(gap.size) <= bound:  # a NaN is not
        return ""
    sides = f"\n  {left} = {float(gap.left):.7g}, {right} = {float(gap.right):.7g}"
    where = "".join(_shown(name, gap.at[name]) for name in sorted(gap.at, key=len))
    return f"\n{statement} is off by {float(gap.size):.3g}, tolerance {bound:.3g}:{sides}{where}"


def _shown(name: str, value: Any) -> str:
    text = np.array2string(np.asarray(value) + 0.0, precision=6)  # no -0
    return f"\n  {name} = " + text.replace("\n", "\n" + " " * (len(name) + 5))


# ------------------------------------------------------------------------------------------------------ transformations

TRANSFORMS: tuple[str, ...] = tuple(TRANSFORMATIONS)
"""The names of the transformations of `assert_transform_invariant`."""


class TransformationError(AssertionError):
    """A function is not invariant.

    `failures` says how, for each transformation that it failed under; `not_applicable` why some have no meaning for it.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax.testing import TransformationError, assert_transform_invariant
        >>> try:
        ...     assert_transform_invariant(lambda x: x if x > 0 else -x, jnp.ones(()), transforms=["jit", "eval_shape"])
        ... except TransformationError as error:
        ...     print(sorted(error.failures))
        ['eval_shape', 'jit']

    Source: `assert_transform_invariant` raises it.
    """

    def __init__(
        self, function: str, failures: Mapping[str, str], not_applicable: Mapping[str, str], tried: int
    ) -> None:
        lines = "".join(f"\n  {name}: {text}" for name, text in failures.items())
        super().__init__(
            f"assert_transform_invariant: {function} fails under {len(failures)} of {tried} transformations:{lines}"
        )
        self.failures, self.not_applicable = dict(failures), dict(not_applicable)


def assert_transform_invariant(
    fn: Callable[..., Any],
    *args: Any,
    transforms: Sequence[str] | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    finite_differences: bool = True,
) -> dict[str, str]:
    """Assert that fn has equal values, and equal derivatives, under each JAX transformation.

    Values are compared with those of a plain call `fn(*args)`; batches (`vmap`, `scan`, `shard_map`, ...) are made of
    the arguments and of varied copies, and compared example by example: every float is multiplied by a factor in
    [1/2, 1], integers go one or two towards zero (zeros to one where there is nothing else), one boolean is flipped,
    and keys are other keys. `vmap` also takes each array of the arguments as the only one in a batch.

    Derivatives are compared with finite differences, in one random direction that varies each element by about its own
    size: those of narrow types in float32 too, where a wrong rule shows that their rounding hides. The gradient through
    a transformation is compared with the gradient of fn by itself, but for nested_vmap, aot and eval_shape, which are
    tried for values alone. An error of a derivative is seen if it changes what the direction makes of it by more than
    7e-5 of the larger of value and derivative: not where fn is flat, as tanh is at 7, nor in an element that is small
    beside the others. Differences are taken in float64 if fn computes in it when its arguments are, else in float32, at
    steps from 4 % of each element down (0.07 % in float64); where no two steps agree, their doubt is allowed for, up to
    1 %. Arguments may be anywhere but at a kink of fn; small ones do, since whole Jacobians are formed.

    Args:
        fn: the function; from arrays or pytrees of arrays to a pytree of arrays. Close over what is no array.
        args: its arguments. Floats are differentiated, complex numbers by their real and imaginary parts; integers,
            booleans and keys are not.
        transforms: which ones to try, of `rmsjax.testing.TRANSFORMS`; all of them by default.
        rtol: how far a value may be off, relative to the largest in its array; by default eps^(3/4) of its dtype,
            6e-6 for float32. A gradient through a transformation may be off by twice that, and a derivative from the
            slope by 7e-5 (4e-10 where all is float64) and four roundings of its dtype, or else by 10 rtol.
        atol: how far anything may be off besides.
        finite_differences: False compares derivatives in reverse mode with those in forward mode instead. For a
            function that is not meant to have the slope as its derivative, such as a straight-through estimator.

    Returns:
        The transformations that have no meaning for fn, each with the reason: derivatives where nothing is floating,
        nnx where Flax is not installed. Empty for most functions.

    Raises:
        TransformationError: an AssertionError that says under which transformations fn fails, and for each of them
            which output or gradient is how far off, or what was raised. Its `failures` has that as a mapping.
        ValueError: no array among the arguments, or an unknown transformation.
        TypeError: an argument or an output is not an array.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms
        >>> from rmsjax.testing import assert_transform_invariant
        >>> assert_transform_invariant(rms, jnp.array([3.0, -4.0]), transforms=["vmap", "grad"])
        {}
        >>> import numpy as np
        >>> try:
        ...     assert_transform_invariant(lambda x: np.square(x), jnp.array([3.0, -4.0]), transforms=["jit", "vmap"])
        ... except AssertionError as error:
        ...     print(*error.failures)
        jit vmap

    Source: the transformations are those of https://docs.jax.dev/en/latest/key-concepts.html and the debugging modes
    of https://docs.jax.dev/en/latest/debugging/flags.html.
    """
    name = _name(fn)
    chosen = TRANSFORMS if transforms is None else tuple(transforms)
    for transform in chosen:
        if transform not in TRANSFORMATIONS:
            close = difflib.get_close_matches(transform, TRANSFORMS, n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(TRANSFORMS)}"
            raise ValueError(f"assert_transform_invariant: transforms has an unknown {transform!r}; {meant}")
    if not jax.tree.leaves(args):
        raise ValueError(f"assert_transform_invariant: expected at least one array as an argument of {name}, got none")
    subject = Subject(fn, args, rtol, atol, finite_differences)
    errors = errors_of(subject, chosen)
    not_applicable = {name: str(error) for name, error in errors.items() if isinstance(error, NotApplicable)}
    failures = {name: describe(error) for name, error in errors.items() if name not in not_applicable}
    if failures:
        raise TransformationError(name, failures, not_applicable, len(chosen)) from errors[next(iter(failures))]
    return not_applicable


def _name(fn: Any) -> str:
    return _name(fn.func) if isinstance(fn, partial) else getattr(fn, "__name__", type(fn).__name__)
