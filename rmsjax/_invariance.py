"""A function under each JAX transformation, compared with a plain call of it: the engine of `rmsjax.testing`.

`Subject` holds the function, the arguments, and what is expected: the values of a plain call, gradients, and slopes by
finite differences. Each entry of `TRANSFORMATIONS` is a check: it applies one transformation to a subject and compares;
it raises `AssertionError` where something differs and `NotApplicable` where the transformation has no meaning for the
function. Compiling is nearly all that checks cost, and their programs have most in common. So a check does not compile:
it yields a function with inputs, and `errors_of` compiles the functions of all checks as one program.

Complex arguments are taken apart into real and imaginary parts, so that all derivatives are those of real functions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Arrays = list[Any]
Flat = Callable[..., Arrays]
"""A function from arrays to a list of arrays."""

Steps = Generator[tuple[Callable[..., Any], Sequence[Any]], Any, None]
"""Of a check: it yields a function and inputs, and is sent what the function, compiled, gives for them."""

# Batches are made of this many different examples: a rule that mixes up examples then shows.
_EXAMPLES = 3

_STEPS = 4  # of finite differences
_DOUBT = 0.01  # what they may disagree by, relative to values and slopes
_NARROW = re.compile(r"\b(bf16|f16|f32|c64|f8\w*)\[")  # a type in a program in print that is less than float64


class NotApplicable(Exception):
    """Why a transformation has no meaning for a function."""


def _x64() -> contextlib.AbstractContextManager[None]:
    """Within it, JAX has 64-bit types."""
    enable: Any = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # pyright: ignore
    return enable(True)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _widened(x: Any, dtype: Any) -> Any:
    """A real array in a floating type at least as wide as dtype; others as they are."""
    return jnp.asarray(x, dtype) if _is_inexact(x) and x.dtype.itemsize < np.dtype(dtype).itemsize else x


def _real(arrays: Sequence[Any]) -> Arrays:
    """The inexact arrays as real ones."""
    parts = [(x.real, x.imag) if jnp.iscomplexobj(x) else (x,) for x in arrays if _is_inexact(x)]
    return [part for pair in parts for part in pair]


def _wide(x: Any) -> np.ndarray[Any, Any]:
    """Any array in a dtype that NumPy can subtract and compare in."""
    x = np.asarray(jax.random.key_data(x) if _is_key(x) else x)
    return x.astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def _minus(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x - y, and 0 where both are the same infinity or NaN."""
    with np.errstate(invalid="ignore"):
        return np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, x - y)


def _inner(xs: Sequence[Any], ys: Sequence[Any]) -> float:
    return float(sum(np.sum(_wide(x) * _wide(y)) for x, y in zip(xs, ys, strict=True)))


def _example(inputs: Sequence[Any], k: int) -> Arrays:
    """The inputs, all of them changed if k > 0, in ways that leave an input what it is.

    Floats are multiplied by factors in [1/2, 1], so that signs and zeros stay; integers go k towards zero, so that what
    is an index stays one, and zeros up if there is nothing else; of booleans one is flipped, and a key is another key.
    """
    if k == 0:
        return list(inputs)
    rng = np.random.default_rng(k)

    def vary(x: Any) -> Any:
        if _is_inexact(x):
            return x * jnp.asarray(rng.uniform(0.5, 1.0, x.shape), x.dtype)
        if _is_key(x):
            return jax.random.wrap_key_data(
                jnp.bitwise_xor(jax.random.key_data(x), jnp.uint32(k)), impl=jax.random.key_impl(x)
            )
        if x.dtype == bool:
            return x ^ (np.arange(x.size) == k % max(x.size, 1)).reshape(x.shape)
        return x - jnp.sign(x) * jnp.minimum(jnp.abs(x), k) if np.any(x) else x + k % 2  # of a weak type, if x is

    return [vary(x) for x in inputs]


def _batch(per_example: Sequence[Arrays], numbers: Any) -> Arrays:
    """The arrays of the examples with these numbers, which may have any shape, as leading axes."""
    numbers = np.asarray(numbers)
    if not numbers.shape:
        return per_example[int(numbers)]

    def stacked(arrays: Sequence[Any]) -> Any:
        chosen = [arrays[k] for k in numbers.ravel()]
        if _is_key(chosen[0]):
            return jnp.stack(chosen).reshape(*numbers.shape, *chosen[0].shape)
        # By NumPy, since each new shape would be compiled.
        return np.stack([np.asarray(x) for x in chosen]).reshape(*numbers.shape, *chosen[0].shape)

    return [stacked(arrays) for arrays in zip(*per_example, strict=True)]


# ------------------------------------------------------------------------------------------------------ the comparison


def _require(ok: bool, message: str) -> None:
    """`assert`, that also holds under `python -O`."""
    if not ok:
        raise AssertionError(message)


def _check_count(got: Sequence[Any], want: Sequence[Any]) -> None:
    _require(len(got) == len(want), f"{len(got)} outputs, expected {len(want)}")


def _check_shape(where: str, got: Any, want: Any, *, dtype: bool = True) -> None:
    _require(got.shape == want.shape, f"{where} has shape {got.shape}, expected {want.shape}")
    if dtype and _is_inexact(want):  # the default width of integers follows enable_x64
        _require(got.dtype == want.dtype, f"{where} has dtype {got.dtype}, expected {want.dtype}")


def _check_close(
    where: str, got: Any, want: Any, tolerance: float, *, atol: float = 0.0, scale: float = 0.0, dtype: bool = True
) -> None:
    """AssertionError unless |got - want| <= atol + tolerance * max(max |want|, scale), element by element."""
    _check_shape(where, got, want, dtype=dtype)
    got, want = _wide(got), _wide(want)
    if not got.size:
        return
    difference = np.abs(_minus(got, want))
    difference = np.where(np.isnan(difference), np.inf, difference)
    allowed = atol + tolerance * max(float(np.max(np.abs(want), where=np.isfinite(want), initial=0.0)), scale)
    worst = np.unravel_index(np.argmax(difference), difference.shape)
    at = f", at index {tuple(map(int, worst))}" if worst else ""
    _require(
        bool(difference[worst] <= allowed),
        f"{where} is off by {difference[worst]:.3g}, more than {allowed:.3g}{at}: "
        f"got {got[worst]:.8g}, expected {want[worst]:.8g}",
    )


def _digits(dtype: Any) -> float:
    """What two orders of the same sum may differ by: 1.8e-12, 6.4e-6, 5.5e-3 for 64, 32, 16 bits; bfloat16 0.026."""
    return float(jnp.finfo(dtype).eps) ** 0.75 if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _eps(*dtypes: Any) -> float:
    """The machine epsilon of the coarsest of some floating types."""
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


class Slope(NamedTuple):
    """A derivative by differences of values, the coarsest type of the function, and how far steps disagree on it."""

    value: np.ndarray[Any, Any]
    dtype: Any
    doubt: float = 0.0


class Subject:
    """A function of real arrays to a list of arrays, and what to expect of it."""

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], rtol: float | None, atol: float, finite_differences: bool
    ) -> None:
        self.rtol, self.atol, self.finite_differences = rtol, atol, finite_differences
        check_arrays("an argument", args)
        with_paths, self._treedef = jax.tree_util.tree_flatten_with_path(args)
        self._fn = fn
        leaves = [jnp.asarray(leaf) for _, leaf in with_paths]
        self._is_complex = [jnp.iscomplexobj(leaf) for leaf in leaves]
        names = [f"argument {path[0].idx}{jax.tree_util.keystr(path[1:])}" for path, _ in with_paths]
        self.inputs: Arrays = []
        self.names: list[str] = []
        self.arguments: dict[str, Sequence[int]] = {}  # where the parts of each array are among the inputs
        for name, leaf, is_complex in zip(names, leaves, self._is_complex, strict=True):
            self.arguments[name] = range(len(self.inputs), len(self.inputs) + 1 + is_complex)
            self.inputs += [leaf.real, leaf.imag] if is_complex else [leaf]
            self.names += [f"real part of {name}", f"imaginary part of {name}"] if is_complex else [name]
        self.moving = tuple(i for i, x in enumerate(self.inputs) if _is_inexact(x))
        self.examples = [_example(self.inputs, k) for k in range(_EXAMPLES)]
        self.output = self._call(self.inputs)
        check_arrays("an output", self.output)
        self.values = [[jnp.asarray(y) for y in jax.tree.leaves(self.output)]]
        self.values += [self.flat(*example) for example in self.examples[1:]]
        outputs = _real(self.values[0])
        self.differentiable = bool(self.moving and outputs)
        rng = np.random.default_rng(0)
        # Of two binary digits, which the narrowest types hold as they are.
        self.weights = [rng.choice([-1.5, -1.25, -1.0, -0.75, 0.75, 1.0, 1.25, 1.5], y.shape) for y in outputs]

    # ---------------------------------------------------------------------------------------------------- the function

    def _call(self, inputs: Sequence[Any]) -> Any:
        parts = iter(inputs)
        leaves = [
            lax.complex(next(parts), next(parts)) if is_complex else next(parts) for is_complex in self._is_complex
        ]
        return self._fn(*jax.tree.unflatten(self._treedef, leaves))

    def flat(self, *inputs: Any) -> Arrays:
        return [jnp.asarray(y) for y in jax.tree.leaves(self._call(inputs))]

    def real(self, *moving: Any) -> Arrays:
        """The real outputs as a function of the real inputs, with the others as given."""
        return _real(self.flat(*self.put(moving)))

    def put(self, moving: Sequence[Any]) -> Arrays:
        inputs = list(self.inputs)
        for i, x in zip(self.moving, moving, strict=True):
            inputs[i] = x
        return inputs

    def take(self, inputs: Sequence[Any]) -> Arrays:
        return [inputs[i] for i in self.moving]

    def need_derivative(self) -> None:
        if not self.differentiable:
            which = "output" if self.moving else "argument"
            raise NotApplicable(f"no derivative: no {which} is floating or complex")

    def loss_of(self, flat: Flat, *, batch_dims: int = 0) -> Callable[..., Any]:
        """A scalar that depends on all outputs of `flat`: their sum with fixed weights, the same for each example."""

        def loss(*inputs: Any) -> Any:
            outputs = [_widened(y, jnp.float32) for y in _real(flat(*inputs))]
            weighted = [
                jnp.sum(y * jnp.asarray(w, y.dtype).reshape((1,) * batch_dims + w.shape))
                for y, w in zip(outputs, self.weights, strict=True)
            ]
            widest = max((w.dtype for w in weighted), key=lambda dtype: dtype.itemsize)
            return jnp.sum(jnp.stack([w.astype(widest) for w in weighted]))

        return loss

    def with_gradient(self, flat: Flat, *, batch_dims: int = 0) -> Callable[..., tuple[Arrays, Arrays]]:
        """Values, of a call that is not differentiated, and the gradient of the loss if there is one."""
        gradient = jax.grad(self.loss_of(flat, batch_dims=batch_dims), self.moving)
        return lambda *inputs: (flat(*inputs), list(gradient(*inputs)) if self.has_gradient else [])

    # ------------------------------------------------------------------------------------------------ what is expected

    @cached_property
    def output_names(self) -> list[str]:
        paths = jax.tree_util.tree_flatten_with_path(self.output)[0]
        return [f"output{jax.tree_util.keystr(path)}" for path, _ in paths]

    @cached_property
    def real_output_names(self) -> list[str]:
        names: list[str] = []
        for name, y in zip(self.output_names, self.values[0], strict=True):
            if _is_inexact(y):
                names += [f"real part of {name}", f"imaginary part of {name}"] if jnp.iscomplexobj(y) else [name]
        return names

    @cached_property
    def program(self) -> Any:
        """Values and gradient, compiled once for all that need nothing else."""
        return jax.jit(self.with_gradient(self.flat))

    @cached_property
    def gradients(self) -> list[Arrays]:
        """The gradient of the loss, for each example."""
        if not self.has_gradient:
            jax.grad(self.loss_of(self.flat), self.moving)(*self.inputs)  # raises what there is to raise
        return [self.program(*example)[1] for example in self.examples]

    @cached_property
    def has_gradient(self) -> bool:
        """Whether JAX has a gradient of the plain function; where it fails, that is for the check of `grad` to say."""
        return self.differentiable and _succeeds(
            lambda: jax.eval_shape(jax.grad(self.loss_of(self.flat), self.moving), *self.inputs)
        )

    @cached_property
    def has_tangents(self) -> bool:
        """Whether JAX has the derivative in forward mode, as above."""
        xs, vs = tuple(self.take(self.inputs)), tuple(self.direction)
        return self.differentiable and _succeeds(lambda: jax.jit(lambda: jax.jvp(self.real, xs, vs)).lower())

    @cached_property
    def direction(self) -> Arrays:
        """A direction in which to vary the inputs, each element by at most its own size, so that none changes sign.

        Zeros are varied like the largest element, and what is not finite is not varied.
        """
        rng = np.random.default_rng(0)

        def vary(x: Any) -> Any:
            size = np.where(np.isfinite(_wide(x)), np.abs(_wide(x)), 0.0)
            size = np.where(_wide(x) == 0, np.max(size, initial=0.0) or 1.0, size)
            return jnp.asarray(size * rng.uniform(0.5, 1.0, size.shape) * rng.choice([-1.0, 1.0], size.shape), x.dtype)

        return [vary(x) for x in self.take(self.inputs)]

    @cached_property
    def points(self) -> list[tuple[Arrays, Arrays]]:
        """Where to differentiate, and in which direction: at the inputs, and if some are narrower, in float32 as well.

        There the slope has more digits, and shows a wrong rule that the rounding of a narrow type would hide.
        """
        given = (self.take(self.inputs), self.direction)
        wide: Any = tuple([_widened(x, jnp.float32) for x in arrays] for arrays in given)
        return [given] if [x.dtype for x in given[0]] == [x.dtype for x in wide[0]] else [given, wide]

    @cached_property
    def _jvp(self) -> Callable[..., Any]:
        return jax.jit(lambda f, xs, vs: jax.jvp(f, xs, vs)[1], static_argnums=0)

    def slopes(self, f: Flat, direction: Sequence[Any] | None = None) -> list[Slope]:
        """The derivative of f in a direction: by finite differences, or by JAX where these are not wanted.

        In float64 wherever the function computes in that throughout, or else, since differences of narrow types are
        mostly rounding, in float32. Five points, at steps from one that balances rounding against the fourth power of
        the step down to where rounding takes up the tolerance: a large step may reach a kink, or be large for a
        function that is steep. The two neighbouring steps that agree best are believed.
        """
        xs, vs = self.points[-1] if self.finite_differences else self.points[0]
        if direction is not None:
            vs = [jnp.asarray(v, x.dtype) for x, v in zip(xs, direction, strict=True)]
        if not self.finite_differences:
            return [Slope(_wide(slope), slope.dtype) for slope in self._jvp(f, tuple(xs), tuple(vs))]
        dtypes = [max((y.dtype, *(x.dtype for x in xs)), key=_eps) for y in f(*xs)]
        dtype = np.float64 if self.is_in_float64 else max(dtypes, key=_eps)
        xs, vs = ([np.asarray(x, np.float64 if self.is_in_float64 else x.dtype) for x in each] for each in (xs, vs))

        def differences(step: float) -> list[np.ndarray[Any, Any]]:
            def at(k: int) -> Arrays:
                moved = [x + np.asarray(k * step, x.dtype) * v for x, v in zip(xs, vs, strict=True)]
                return [_wide(y) for y in f(*moved)]

            return [
                _minus(8 * _minus(right, left), _minus(far_right, far_left)) / (12 * step)
                for right, left, far_right, far_left in zip(at(1), at(-1), at(2), at(-2), strict=True)
            ]

        with _x64() if self.is_in_float64 else contextlib.nullcontext():
            tried = [differences(_eps(dtype) ** power) for power in np.linspace(0.2, 0.4, _STEPS)]

        def settled(of_steps: Sequence[np.ndarray[Any, Any]], dtype: Any) -> Slope:
            doubts = [float(np.max(np.abs(_minus(*pair)), initial=0.0)) for pair in pairwise(of_steps)]
            doubts = np.nan_to_num(doubts, nan=np.inf)
            # Two steps may agree by chance, so what the others say counts as doubt; but for the worst, by a kink.
            return Slope(of_steps[int(np.argmin(doubts)) + 1], dtype, float(np.median(doubts)))

        return [settled(of_steps, dtype) for of_steps, dtype in zip(zip(*tried, strict=True), dtypes, strict=True)]

    @cached_property
    def is_in_float64(self) -> bool:
        """Whether the function, given its inputs in float64, computes in that alone, and to the same values."""
        try:
            with _x64():
                inputs = [_widened(x, jnp.float64) for x in self.inputs]
                if _NARROW.search(str(self.program.trace(*inputs).jaxpr)):
                    return False
                values = self.program(*inputs)[0]
            self.check_values(values, self.values[0], dtype=False)
        except Exception:  # then it is not, and another check may have more to say of that
            return False
        return True

    def _values_at(self, *moving: Any) -> Arrays:
        return _real(self.program(*self.put(moving))[0])

    @cached_property
    def tangents(self) -> list[Slope]:
        """How the outputs change in the direction."""
        return self.slopes(self._values_at)

    @cached_property
    def gradient_slopes(self) -> list[Slope]:
        """How the gradient changes in the direction."""
        return self.slopes(lambda *moving: self.program(*self.put(moving))[1])

    @cached_property
    def loss_slopes(self) -> list[Slope]:
        """How the loss changes with each input, in the direction."""

        def along(i: int) -> Slope:
            alone = [v if i == j else jnp.zeros_like(v) for j, v in enumerate(self.direction)]
            slopes = self.slopes(self._values_at, alone)
            value = _inner(self.weights, [slope.value for slope in slopes])
            doubt = sum(float(np.sum(np.abs(w))) * slope.doubt for w, slope in zip(self.weights, slopes, strict=True))
            return Slope(np.asarray(value), max((slope.dtype for slope in slopes), key=_eps), doubt)

        return [along(i) for i in range(len(self.moving))]

    @cached_property
    def loss_size(self) -> float:
        """The size of the terms of the loss, those that are finite."""
        outputs = [np.abs(_wide(y)) for y in _real(self.values[0])]
        return _inner([np.abs(w) for w in self.weights], [np.where(np.isfinite(y), y, 0.0) for y in outputs])

    def gradient_size(self, i: int) -> float:
        """What a gradient may be a small difference of: the loss over the size that elements of the input usually have.

        That is their geometric mean: where sizes are very different, neither the largest nor the least counts alone.
        """
        x = np.abs(_wide(self.inputs[i]))
        x = x[np.isfinite(x) & (x > 0)]
        return self.loss_size / (float(np.exp(np.mean(np.log(x)))) if x.size else 1.0)

    # ------------------------------------------------------------------------------------------------ the checks

    def tolerance(self, dtype: Any) -> float:
        return _digits(dtype) if self.rtol is None else self.rtol

    def check_values(self, got: Sequence[Any], want: Sequence[Any], *, dtype: bool = True) -> None:
        _check_count(got, want)
        for name, g, w in zip(self.output_names, got, want, strict=True):
            _check_close(name, g, w, self.tolerance(w.dtype), atol=self.atol, dtype=dtype)

    def check_real_values(self, got: Sequence[Any]) -> None:
        """The values that come with a derivative."""
        for name, g, want in zip(self.real_output_names, got, _real(self.values[0]), strict=True):
            _check_close(name, g, want, self.tolerance(want.dtype), atol=self.atol)

    def check_gradients(self, got: Sequence[Any], want: Sequence[Any], *, dtype: bool = True) -> None:
        """Gradients of a transformed function against those of the function itself."""
        for i, g, w in zip(self.moving, got, want, strict=True):
            name = f"the gradient with respect to {self.names[i]}"
            tolerance, scale = 2 * self.tolerance(w.dtype), self.gradient_size(i)
            _check_close(name, g, w, tolerance, scale=scale, atol=self.atol, dtype=dtype)

    def check_transformed(self, outputs: tuple[Arrays, Arrays], numbers: Any = 0, *, dtype: bool = True) -> None:
        """Values and gradients of a transformed function, for the examples with these numbers."""
        values, gradients = outputs
        self.check_values(values, _batch(self.values, numbers), dtype=dtype)
        if self.has_gradient:
            self.check_gradients(gradients, _batch(self.gradients, numbers), dtype=dtype)

    def transformed(self, flat: Flat, inputs: Sequence[Any], numbers: Any = 0) -> Steps:
        """The steps of a check of values and gradients."""
        self.check_transformed((yield self.with_gradient(flat, batch_dims=np.ndim(numbers)), inputs), numbers)

    def check_gradient_slopes(self, got: Sequence[Any]) -> None:
        """A gradient against the slopes of the function."""
        for i, g, v, slope in zip(self.moving, got, self.direction, self.loss_slopes, strict=True):
            name = f"the gradient with respect to {self.names[i]}, along a random direction,"
            self._check_slope(name, _inner([g], [v]), slope, self.loss_size, g.dtype)

    def check_tangents(self, got: Sequence[Any], dtypes: Sequence[Any] | None = None) -> None:
        """The derivative of the outputs in the direction, from numbers of these types; by default those of got."""
        dtypes = [g.dtype for g in got] if dtypes is None else dtypes
        outputs = _real(self.values[0])
        for name, g, slope, y, dtype in zip(self.real_output_names, got, self.tangents, outputs, dtypes, strict=True):
            self._check_slope(f"the derivative of {name}, in a random direction,", g, slope, y, dtype)

    def check_hessian(self, hessian: Any) -> None:
        """A matrix of second derivatives of the loss, in the direction."""
        for i, row, slope, g in zip(self.moving, hessian, self.gradient_slopes, self.gradients[0], strict=True):
            name = f"the derivative of the gradient with respect to {self.names[i]}, in a random direction,"
            derivative, dtype = self.contract(row)
            self._check_slope(name, derivative, slope, [*np.ravel(_wide(g)), self.gradient_size(i)], dtype)

    def contract(self, derivatives: Sequence[Any]) -> tuple[np.ndarray[Any, Any], Any]:
        """A row of a Jacobian in the direction, and the coarsest of its types."""
        terms = [_contract(d, v) for d, v in zip(derivatives, self.direction, strict=True)]
        return sum(terms[1:], terms[0]), max((d.dtype for d in derivatives), key=_eps)

    def _check_slope(self, name: str, got: Any, slope: Slope, value: Any, dtype: Any) -> None:
        # The direction is as large as the inputs, so values and derivatives are of one size, and share rounding errors.
        value = _wide(np.asarray(value))
        size = float(np.max(np.abs(value), where=np.isfinite(value), initial=0.0))
        # The error of the differences, and a few roundings on the way to what JAX gives.
        tolerance = max(_eps(slope.dtype) ** 0.6 + 4 * _eps(dtype), 10 * (self.rtol or 0.0))
        size = max(size, float(np.max(np.abs(slope.value), where=np.isfinite(slope.value), initial=0.0)))
        doubt = min(slope.doubt, _DOUBT * size)  # beyond that there is no slope
        _check_close(name, np.asarray(got), slope.value, tolerance, scale=size, atol=self.atol + doubt, dtype=False)


def check_arrays(what: str, tree: Any) -> None:
    """TypeError that says where in the tree there is something else."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            where = jax.tree_util.keystr(path) or "the top"
            raise TypeError(
                f"assert_transform_invariant: {what}, at {where}, must be an array, got {leaf!r:.80}; "
                "close over what is none"
            )


def _succeeds(run: Callable[[], Any]) -> bool:
    try:
        run()
    except Exception:
        return False
    return True


def _contract(derivative: Any, direction: Any) -> np.ndarray[Any, Any]:
    return np.tensordot(_wide(derivative), _wide(direction), np.ndim(direction))


@contextlib.contextmanager
def _says(which: str) -> Generator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{which}: {describe(error)}") from error


def describe(error: Exception) -> str:
    """An error in one line."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, AssertionError) else f"{type(error).__name__}: {line:.200}"


# -------------------------------------------------------------------------------------------------- the transformations

Check = Callable[[Subject], Steps | None]
TRANSFORMATIONS: dict[str, Check] = {}


def _transformation(check: Check) -> Check:
    TRANSFORMATIONS[check.__name__.strip("_")] = check
    return check


def _derivative(check: Check) -> Check:
    def checked(subject: Subject) -> Steps | None:
        subject.need_derivative()
        return check(subject)

    TRANSFORMATIONS[check.__name__.strip("_")] = checked
    return checked


def errors_of(subject: Subject, names: Sequence[str]) -> dict[str, Exception]:
    """What the checks of these names raise, of those that do; what a transformed function may raise is theirs too."""
    errors: dict[str, Exception] = {}
    waiting: dict[Any, dict[str, _Waiting]] = {}  # by devices, since a program has one set of them
    for name in names:
        with _kept(errors, name):
            steps = TRANSFORMATIONS[name](subject)
            if steps is not None:
                function, inputs = next(steps)
                function = jax.jit(function, inline=True)
                function.trace(*inputs)  # here, where an error has a name
                waiting.setdefault(_devices(inputs), {})[name] = _Waiting(steps, function, inputs)
    for checks in waiting.values():
        for name, outputs in _outputs(checks):
            with _kept(errors, name), contextlib.suppress(StopIteration):
                checks[name].steps.send(outputs())
    return {name: errors[name] for name in names if name in errors}


class _Waiting(NamedTuple):
    """A check that waits for what its function gives."""

    steps: Steps
    function: Any
    inputs: Sequence[Any]


def _outputs(checks: dict[str, _Waiting]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What the functions give, each as a function that raises what goes wrong with it."""
    inputs = {name: check.inputs for name, check in checks.items()}
    try:
        found = jax.jit(lambda inputs: {name: checks[name].function(*xs) for name, xs in inputs.items()})(inputs)
    except Exception:  # of one or more, so each by itself
        for name, check in checks.items():
            yield name, partial(check.function, *check.inputs)
    else:
        for name in checks:
            yield name, partial(found.__getitem__, name)


def _devices(inputs: Sequence[Any]) -> Any:
    return frozenset().union(*(x.devices() for x in jax.tree.leaves(inputs) if isinstance(x, jax.Array)))


@contextlib.contextmanager
def _kept(errors: dict[str, Exception], name: str) -> Generator[None]:
    try:
        yield
    except Exception as error:
        errors[name] = error


@_transformation
def _jit(s: Subject) -> Steps:
    return s.transformed(jax.jit(s.flat), s.inputs)


@_transformation
def _vmap(s: Subject) -> Steps:
    """Over the last axes, and over each argument alone if there are several; leading axes are for `nested_vmap`."""
    numbers = np.arange(_EXAMPLES)
    batch = _batch(s.examples, numbers)
    over_last = "with in_axes=-1 and out_axes=-1"
    alone = {f"over {name} alone": places for name, places in s.arguments.items()} if len(s.arguments) > 1 else {}

    def last(*batch: Any) -> Arrays:
        outputs = jax.vmap(s.flat, in_axes=-1, out_axes=-1)(*[jnp.moveaxis(x, 0, -1) for x in batch])
        return [jnp.moveaxis(y, -1, 0) for y in outputs]

    def only(places: Sequence[int], batch: Sequence[Any], inputs: Sequence[Any]) -> Arrays:
        """With what is in these places taken from the batch."""
        return [batch[i] if i in places else x for i, x in enumerate(inputs)]

    def run(batch: Any, inputs: Any) -> Any:
        with _says(over_last):
            outputs = s.with_gradient(last, batch_dims=1)(*batch)
        values: dict[str, Arrays] = {}
        for which, places in alone.items():
            with _says(which):
                axes = [0 if i in places else None for i in range(len(inputs))]
                values[which] = jax.vmap(s.flat, in_axes=axes)(*only(places, batch, inputs))
        return outputs, values

    outputs, values = yield run, (batch, s.inputs)
    with _says(over_last):
        s.check_transformed(outputs, numbers)
    for which, places in alone.items():
        with _says(which):
            wanted = [s.flat(*only(places, example, s.inputs)) for example in s.examples]
            s.check_values(values[which], _batch(wanted, numbers))


@_transformation
def _nested_vmap(s: Subject) -> Steps:
    """Values; the gradient through a batch is for `vmap`."""
    numbers = np.add.outer(np.arange(2), np.arange(_EXAMPLES)) % _EXAMPLES
    values = yield jax.vmap(jax.vmap(s.flat), in_axes=1, out_axes=1), _batch(s.examples, numbers)
    s.check_values(values, _batch(s.values, numbers))


@_derivative
def _grad(s: Subject) -> None:
    s.check_gradient_slopes(s.gradients[0])
    for moving, _ in s.points[1:]:
        with _says("with float32 arguments"):
            s.check_gradient_slopes(s.program(*s.put(moving))[1])


@_derivative
def _value_and_grad(s: Subject) -> Steps:
    loss = s.loss_of(s.flat)
    value, gradients = yield jax.value_and_grad(loss, s.moving), s.inputs
    want = jnp.asarray(_inner(s.weights, _real(s.values[0])), value.dtype)
    tolerance = max(s.tolerance(y.dtype) for y in s.values[0])
    _check_close("the weighted sum of the outputs", value, want, tolerance, scale=s.loss_size, atol=s.atol)
    s.check_gradient_slopes(gradients)


@_derivative
def _jvp(s: Subject) -> Steps:
    def run(*points: Any) -> Any:
        return [jax.jvp(s.real, tuple(moving), tuple(direction)) for moving, direction in points]

    given, *wide = yield run, s.points
    values, tangents = given
    s.check_real_values(values)
    s.check_tangents(tangents)
    for _, tangents in wide:
        with _says("with float32 arguments"):
            s.check_tangents(tangents)


@_derivative
def _vjp(s: Subject) -> Steps:
    def run(*moving: Any) -> tuple[Arrays, Any]:
        values, pull = jax.vjp(s.real, *moving)
        return values, pull([jnp.asarray(w, y.dtype) for w, y in zip(s.weights, values, strict=True)])

    values, gradients = yield run, s.take(s.inputs)
    s.check_real_values(values)
    s.check_gradient_slopes(gradients)


@_derivative
def _linearize(s: Subject) -> Steps:
    def run(moving: Any, direction: Any) -> tuple[Arrays, Arrays]:
        values, push = jax.linearize(s.real, *moving)
        return values, push(*direction)

    values, tangents = yield run, s.points[0]
    s.check_real_values(values)
    s.check_tangents(tangents)


def _mixed_dtypes(s: Subject, transform: Callable[[Callable[[Flat], Flat]], Callable[..., Any]]) -> Callable[..., Any]:
    """JAX's Jacobians mix the dtypes of all arguments, which strict promotion forbids: have it inside functions alone.

    transform: gives the derivative, of a function that it is to take through what it is given.
    """
    config: Any = jax.config
    mode = config.jax_numpy_dtype_promotion

    def strict(f: Flat) -> Flat:
        def in_its_mode(*inputs: Any) -> Arrays:
            with jax.numpy_dtype_promotion(mode):
                return f(*inputs)

        return in_its_mode

    def run(*inputs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return transform(strict)(*inputs)

    return run


def _jacobian(s: Subject, transform: Callable[..., Any]) -> Steps:
    arguments = tuple(range(len(s.moving)))
    rows = yield _mixed_dtypes(s, lambda strict: transform(strict(s.real), arguments)), s.take(s.inputs)
    tangents, dtypes = zip(*map(s.contract, rows), strict=True)
    s.check_tangents(tangents, dtypes)


@_derivative
def _jacfwd(s: Subject) -> Steps:
    return _jacobian(s, jax.jacfwd)


@_derivative
def _jacrev(s: Subject) -> Steps:
    return _jacobian(s, jax.jacrev)


@_derivative
def _hessian_fwd_over_rev(s: Subject) -> Steps:
    def transform(strict: Callable[[Flat], Flat]) -> Callable[..., Any]:
        return jax.hessian(s.loss_of(strict(s.flat)), s.moving)

    s.check_hessian((yield _mixed_dtypes(s, transform), s.inputs))


@_derivative
def _hessian_rev_over_rev(s: Subject) -> Steps:
    def transform(strict: Callable[[Flat], Flat]) -> Callable[..., Any]:
        return jax.jacrev(jax.grad(s.loss_of(strict(s.flat)), s.moving), s.moving)

    s.check_hessian((yield _mixed_dtypes(s, transform), s.inputs))


@_transformation
def _checkpoint(s: Subject) -> Steps:
    return s.transformed(jax.checkpoint(s.flat), s.inputs)


@_transformation
def _scan(s: Subject) -> Steps:
    def scan(*batch: Any) -> Arrays:
        return lax.scan(lambda step, xs: (step + 1, s.flat(*xs)), 0, batch)[1]

    numbers = np.arange(_EXAMPLES)
    return s.transformed(scan, _batch(s.examples, numbers), numbers)


@_transformation
def _while_loop(s: Subject) -> Steps:
    """Values, and the derivative in forward mode, which is the only one that JAX has for this loop."""

    def loop(*batch: Any) -> Arrays:
        def body(state: Any) -> Any:
            k, outputs = state
            new = s.flat(*[lax.dynamic_index_in_dim(x, k, keepdims=False) for x in batch])
            return k + 1, [lax.dynamic_update_index_in_dim(ys, y, k, 0) for ys, y in zip(outputs, new, strict=True)]

        start = [jnp.zeros((_EXAMPLES, *y.shape), y.dtype) for y in s.values[0]]
        return lax.while_loop(lambda state: state[0] < _EXAMPLES, body, (jnp.int32(0), start))[1]

    def real_loop(*moving: Any) -> Arrays:
        """The examples with these as the floats of the first one."""
        return _real(loop(*map(jnp.stack, zip(s.put(moving), *s.examples[1:], strict=True))))

    def run(moving: Any, direction: Any) -> Any:
        return loop(*map(jnp.stack, zip(*s.examples, strict=True))), jax.jvp(
            real_loop, tuple(moving), tuple(direction)
        )[1] if s.has_tangents else []

    numbers = np.arange(_EXAMPLES)
    values, tangents = yield run, s.points[0]
    s.check_values(values, _batch(s.values, numbers))
    if s.has_tangents:
        s.check_tangents([y[0] for y in tangents])


@_transformation
def _cond(s: Subject) -> Steps:
    def other(*inputs: Any) -> Arrays:
        del inputs
        return [jnp.zeros(y.shape, y.dtype) for y in s.values[0]]

    def chosen(*inputs: Any) -> Arrays:
        # Behind a barrier, or the branch would be chosen before the program runs.
        return lax.cond(lax.optimization_barrier(jnp.asarray(True)), s.flat, other, *inputs)

    return s.transformed(chosen, s.inputs)


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("devices",))


def _put(x: Any, sharding: NamedSharding) -> Any:
    return jax.device_put(x if _is_key(x) else np.asarray(x), sharding)  # to cut up a JAX array would be compiled


@_transformation
def _shard_map(s: Subject) -> Steps:
    """One example on each device."""
    mesh = _mesh()
    numbers = np.arange(mesh.size) % _EXAMPLES
    spec = PartitionSpec("devices")

    def on_device(*inputs: Any) -> Arrays:
        return [y[None] for y in s.flat(*[x[0] for x in inputs])]

    batch = [_put(x, NamedSharding(mesh, spec)) for x in _batch(s.examples, numbers)]
    return s.transformed(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec), batch, numbers)


@_transformation
def _named_sharding(s: Subject) -> Steps:
    """Each input split along the first axis that the number of devices divides, or else on all devices."""
    mesh = _mesh()

    def put(x: Any) -> Any:
        axes = [axis for axis, n in enumerate(x.shape) if n and n % mesh.size == 0]
        spec = PartitionSpec(*[None] * axes[0], "devices") if axes else PartitionSpec()
        return _put(x, NamedSharding(mesh, spec))

    return s.transformed(s.flat, [put(x) for x in s.inputs])


@_transformation
def _eval_shape(s: Subject) -> None:
    _check_shapes(s)


def _check_shapes(s: Subject) -> None:
    shapes = jax.eval_shape(s.flat, *s.inputs)
    _check_count(shapes, s.values[0])
    for name, got, want in zip(s.output_names, shapes, s.values[0], strict=True):
        _check_shape(name, got, want)


@_transformation
def _make_jaxpr(s: Subject) -> Steps:
    return s.transformed(jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(s.flat)(*s.inputs)), s.inputs)


@_transformation
def _aot(s: Subject) -> None:
    """Lowered and compiled for shapes alone. Values: a compiled function has no derivative."""
    compiled = jax.jit(s.flat).lower(*map(_shape_of, s.inputs)).compile()
    s.check_values(compiled(*s.inputs), s.values[0])


@_transformation
def _export(s: Subject) -> Steps:
    """Through serialized StableHLO and back, with the gradient."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise NotApplicable("flatbuffers, which jax.export needs to serialize, is not installed")
    exported = jax.export.export(jax.jit(s.flat))(*map(_shape_of, s.inputs))
    loaded = jax.export.deserialize(exported.serialize(vjp_order=int(s.has_gradient)))
    return s.transformed(lambda *inputs: list(loaded.call(*inputs)), s.inputs)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _nnx() -> Any:
    if importlib.util.find_spec("flax") is None:
        raise NotApplicable("flax is not installed")
    from flax import nnx

    return nnx


@_transformation
def _nnx_jit(s: Subject) -> Steps:
    return s.transformed(_nnx().jit(s.flat), s.inputs)


@_derivative
def _nnx_grad(s: Subject) -> Steps:
    nnx = _nnx()
    gradients = yield nnx.jit(nnx.grad(s.loss_of(s.flat), argnums=s.moving)), s.inputs
    s.check_gradients(gradients, s.gradients[0])


@_transformation
def _enable_x64(s: Subject) -> None:
    """With the inputs as they are, for dtypes, and with them in 64 bits."""
    _ = s.has_gradient and s.gradients  # now, not within the mode
    with _x64():
        _check_shapes(s)
        with _says("with float64 arguments"):
            s.check_transformed(s.program(*[_widened(x, jnp.float64) for x in s.inputs]), dtype=False)


def _trace(s: Subject) -> None:
    """A mode that only can make tracing fail needs no compiling: the program, once traced, is the same."""
    jax.make_jaxpr(s.flat)(*s.inputs)
    if s.has_gradient:
        jax.make_jaxpr(jax.grad(s.loss_of(s.flat), s.moving))(*s.inputs)


@_transformation
def _strict_dtype_promotion(s: Subject) -> None:
    with jax.numpy_dtype_promotion("strict"):
        _trace(s)


@_transformation
def _rank_promotion_raise(s: Subject) -> None:
    with jax.numpy_rank_promotion("raise"):
        _trace(s)


@_transformation
def _checking_leaks(s: Subject) -> None:
    with jax.checking_leaks():
        _trace(s)


@_transformation
def _debug_nans(s: Subject) -> None:
    if any(np.isnan(_wide(y)).any() for y in s.values[0]):
        raise NotApplicable("the value itself has a NaN")
    with jax.debug_nans(True):
        s.flat(*s.inputs)  # one operation at a time, which shows a NaN that is not kept
        values, gradients = s.program(*s.inputs)
    s.check_values(values, s.values[0])
    if s.has_gradient:
        s.check_gradients(gradients, s.gradients[0])
