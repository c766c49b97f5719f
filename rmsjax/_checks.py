"""Arguments as the functions want them, or an error that names function, argument, what was expected and what came."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from rmsjax._reduce import Mapped
from rmsjax._text import counted

_CONVERTIBLE = (np.ndarray, np.generic, bool, int, float, complex, list, tuple)
_KINDS = {
    jnp.bool_: "booleans",
    jnp.number: "numbers",
    jnp.floating: "floating-point numbers",
    jnp.complexfloating: "complex numbers",
    jnp.inexact: "floating-point or complex numbers",
}


def described(value: Any) -> str:
    """An argument in a few words of one line, for a message."""
    kind = "array" if isinstance(value, (Array, np.ndarray)) else type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if isinstance(value, (list, tuple)) and any(isinstance(x, (Array, np.ndarray)) for x in cast(Sequence[Any], value)):
        return f"a {kind} of {len(cast(Sequence[Any], value))} with arrays"
    if isinstance(value, (str, bytes, numbers.Number, np.generic)) or type(value) in (list, tuple) or value is None:
        return " ".join(f"{value!r:.80}".split())
    kind = f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"{kind} of shape {tuple(cast(tuple[int, ...], shape))} and dtype {dtype}"
    if isinstance(value, Mapping):
        return f"{kind} with the keys {', '.join(map(repr, cast(Mapping[Any, Any], value)))}"
    return kind


def as_numeric(
    function: str, argument: str, x: Any, *, kind: Any = jnp.number, hint: str = "", abstract: bool = False
) -> Array:
    """x as an array; TypeError unless its dtype is of the kind, one of `_KINDS`. A shape without data may pass."""
    if isinstance(x, Array) or (abstract and isinstance(x, jax.ShapeDtypeStruct)):
        array: Any = x  # as it is: a conversion would be one more operation, and see what a mask is to hide
    else:
        array = None
        if isinstance(x, _CONVERTIBLE) or hasattr(x, "__jax_array__"):
            with contextlib.suppress(TypeError, ValueError, OverflowError):  # a string, a ragged list, 2**40
                array = jnp.asarray(x)
    if array is None or not jnp.issubdtype(array.dtype, kind):
        held = _held_by(x) if array is None else None
        got = described(x) if array is None else f"dtype {array.dtype}"
        hint = f" Pass the array that it holds, its .{held}." if held else hint
        raise TypeError(f"{function}: {argument} must be an array of {_KINDS[kind]}, got {got}.{hint}")
    return array


def _held_by(x: Any) -> str | None:
    """The name of the first array among the attributes of an object, such as a `NamedArray` of haliax."""
    held = (name for name, value in getattr(x, "__dict__", {}).items() if isinstance(value, (Array, np.ndarray)))
    return next(held, None)


def as_axes(
    function: str, axis: int | Sequence[int] | None, shape: tuple[int, ...], *, argument: str = "axis"
) -> tuple[int, ...]:
    """The axes as sorted non-negative integers; None means all of them."""
    ndim = len(shape)
    if axis is None:
        return tuple(range(ndim))
    given: tuple[Any, ...] = (axis,)
    with contextlib.suppress(TypeError):  # one number, of Python, NumPy or JAX
        given = tuple(axis)  # pyright: ignore[reportArgumentType]
    try:
        if any(isinstance(a, bool) for a in given):
            raise TypeError
        given = tuple(operator.index(a) for a in given)
    except TypeError:
        raise TypeError(f"{function}: {argument} must be an integer or a tuple of integers, got {axis!r}") from None
    if not given:
        raise ValueError(f"{function}: {argument} is empty; name at least one axis of shape {shape}")
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"{function}: {argument} {a} is out of range for shape {shape}, of {counted(ndim, 'axis', 'axes')}"
            )
    axes = tuple(sorted(a % ndim for a in given))
    if len(set(axes)) < len(axes):
        raise ValueError(f"{function}: {argument} {axis!r} names an axis of shape {shape} more than once")
    return axes


def as_mapped(function: str, axis_name: str | Sequence[str] | None, groups: Any = None) -> Mapped:
    """The mapped axes of an `axis_name` argument; ValueError for one that is not bound here."""
    names: tuple[Any, ...] = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    names = () if axis_name is None else names
    groups = None if groups is None else _as_groups(function, groups)
    if groups and not names:
        raise ValueError(f"{function}: axis_index_groups needs an axis_name, of the devices that it groups; got none")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{function}: axis_name must be a string or a tuple of strings, got {axis_name!r:.80}")
        try:
            jax.lax.axis_index(name)
        except NameError:
            raise ValueError(
                f"{function}: axis_name {name!r} is not bound; it must name an axis of a surrounding shard_map, pmap "
                "or vmap(axis_name=...). Under plain jit leave it out: sharded arrays need no axis name."
            ) from None
    return Mapped(names, groups)


def _as_groups(function: str, groups: Any) -> tuple[tuple[int, ...], ...]:
    try:
        found = tuple(tuple(map(operator.index, group)) for group in groups)
    except TypeError:
        raise TypeError(f"{function}: axis_index_groups must be groups of integers, got {groups!r:.80}") from None
    if len(set(map(len, found))) != 1:
        raise ValueError(f"{function}: axis_index_groups must be of equal size, got {groups!r:.80}")
    return found


def as_mask(function: str, where: Any, shape: tuple[int, ...], *, argument: str = "where") -> Array | None:
    """A `where` argument as an array of booleans of the given shape."""
    if where is None:
        return None
    where = as_numeric(function, argument, where, kind=jnp.bool_, hint=f" From numbers make one by {argument} != 0.")
    missing = len(shape) - where.ndim
    if missing < 0 or any(g not in (1, s) for g, s in zip(where.shape, shape[missing:], strict=True)):
        raise ValueError(f"{function}: {argument} must broadcast to the shape of x, {shape}, got shape {where.shape}")
    return jnp.broadcast_to(where.reshape((1,) * missing + where.shape), shape)


def as_number(function: str, argument: str, value: Any, *, least: float = -math.inf) -> float:
    """A finite number, known at trace time, that is not below `least`."""
    is_array = isinstance(value, (Array, np.ndarray, np.generic)) and np.ndim(value) == 0 and value.dtype != bool
    if isinstance(value, (bool, Tracer)) or not (is_array or isinstance(value, numbers.Real)):
        raise TypeError(f"{function}: {argument} must be a number known at trace time, got {value!r:.80}")
    if not (math.isfinite(float(value)) and float(value) >= least):
        bound = "finite" if least == -math.inf else f"finite and at least {least:g}"
        raise ValueError(f"{function}: {argument} must be {bound}, got {value!r}")
    return float(value)


def as_full_rank(function: str, argument: str, value: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """A per-feature array as one of the rank of x: it has the shape of the given axes, or the rank of x already."""
    extents = tuple(shape[a] for a in axes)
    if value.shape == extents:
        return value.reshape([n if a in axes else 1 for a, n in enumerate(shape)])
    if value.ndim == len(shape) and all(v in (1, n) for v, n in zip(value.shape, shape, strict=True)):
        return value
    raise ValueError(
        f"{function}: {argument} must have shape {extents}, that of axis {axes} of x with shape {shape} "
        f"(or the rank of x with each axis of size 1 or that of x), got shape {value.shape}"
    )


def as_threshold(function: str, argument: str, value: Any, *, for_schedule: str = "") -> Any:
    """A number that is at least 0; a traced one, of which nothing is known, is brought to at least 0 (or stays NaN).

    A schedule that runs below zero would otherwise turn the sign of what it scales. A known one is a Python number
    from here on: of a JAX array under jit, even one with a value, whatever is computed or asked is traced.
    `for_schedule`: what to write for a function of the step, if it is not what an optax transformation takes.
    """
    if callable(value):
        injected = f'optax.inject_hyperparams({function}, static_args=("scope",))({argument}=...)'
        fix = f"for a schedule write {for_schedule or injected}"
        raise TypeError(f"{function}: {argument} must be a number, got {described(value)}; {fix}")
    is_traced = isinstance(value, Tracer)
    array = value if is_traced else np.asarray(value)
    if array.ndim or not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{function}: {argument} must be a number, got {described(value)}")
    if is_traced:
        return jnp.where(value < 0, 0, value)  # not `maximum`, whose derivative at 0 is 1/2
    number = int(array) if jnp.issubdtype(array.dtype, jnp.integer) else float(array)
    if not number >= 0:
        raise ValueError(f"{function}: {argument} must be at least 0, got {value}")
    return number


def as_dtype(function: str, argument: str, dtype: Any, kind: Any, *, of: str = "") -> np.dtype[Any]:
    """A dtype of the kind, one of `_KINDS`."""
    with contextlib.suppress(TypeError):  # no name of a dtype
        result = np.dtype(dtype)
        if jnp.issubdtype(result, kind):
            return result
    raise TypeError(f"{function}: {argument} must be one of {_KINDS[kind]}{of}, got {dtype!r}")


def as_result_dtype(function: str, dtype: Any, x: Array, *, argument: str = "dtype", name: str = "x") -> np.dtype[Any]:
    """The dtype of a result; that of x for None."""
    kind = jnp.complexfloating if jnp.issubdtype(x.dtype, jnp.complexfloating) else jnp.floating
    return as_dtype(function, argument, x.dtype if dtype is None else dtype, kind, of=f" for {name} of dtype {x.dtype}")
