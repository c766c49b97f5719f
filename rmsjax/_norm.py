"""Arrays: `rms` measures, `rms_normalize` divides by the measure."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from rmsjax import _reduce
from rmsjax._checks import as_axes, as_full_rank, as_mapped, as_mask, as_number, as_numeric, as_result_dtype
from rmsjax._reduce import (
    Mapped,
    PerPool,
    Plan,
    Pool,
    accumulator_dtype,
    along,
    cpu_barrier,
    direction,
    divide4,
    lift,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Bool, Inexact, Num, Real


def _check_extent(function: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    if math.prod(shape[a] for a in axes) == 0:
        raise ValueError(f"{function}: cannot average over no elements: shape {shape} has 0 of them along axis {axes}")


def _keep(x: Array, where: Array | None) -> Array:
    """x with zeros where it is masked out."""
    return x if where is None else jnp.where(where, x, jnp.zeros((), x.dtype))


def _counts(plan: Plan, x: Array, where: Array | None, axes: tuple[int, ...], mapped: Mapped) -> PerPool | None:
    """How many elements a mask leaves to average over, on all devices; 1 for none, whose mean is 0 all the same."""
    if where is None:
        return None
    *others, last = axes
    kept = jnp.sum(where, last, keepdims=True, dtype=jnp.uint32)  # exact, and along one axis it cannot overflow
    kept = jnp.sum(kept.astype(plan.dtype), others, keepdims=True)
    over_x, over_kept = mapped.over(x), mapped.over(kept)  # a mask may be the same on devices that x is split over
    kept = over_kept.psum(kept) * (over_x.shards() // over_kept.shards())
    return PerPool((jnp.maximum(kept, 1),), plan.slots)


# ----------------------------------------------------------------------------------------------------------------- rms


def rms(
    x: Num[ArrayLike, "..."],
    axis: int | Sequence[int] | None = None,
    *,
    keepdims: bool = False,
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> Real[Array, "..."]:
    r"""The root-mean-square norm $\|x\|_{RMS} = \|x\|_2/\sqrt n = \sqrt{\tfrac1n\sum_i |x_i|^2}$.

    A vector with iid coordinates of mean 0 and variance 1 has $E\|x\|_{RMS}^2 = 1$ at every n. Up to a constant it is
    the only rotation-invariant norm with such a property, which makes it a ruler for comparing layers of any width.

    Right for every finite input, also where the squares overflow or underflow: for up to 4096 elements within 4 units
    in the last place (on a CPU 24 at worst, if the elements are such that all additions round in the same direction).
    Zero has the norm 0 and there the derivative 0, in both modes. NaN gives NaN, inf gives inf. Subnormal numbers
    count as 0 on platforms where XLA flushes them (CPU among them), and so does a subnormal result.

    Args:
        x: integers, floats or complex numbers of any shape.
        axis: the axis or axes to reduce; None reduces all of them.
        keepdims: keep the reduced axes with size 1.
        where: booleans that broadcast to x; elements at False are left out of sum and count, NaN or not.
            If none is left the result is 0.
        axis_name: under `shard_map`, `pmap` or `vmap(axis_name=...)`, the mapped axes that x is split over. Needless
            (and not bound) under plain `jit`, where the norm of a sharded array is global as it is.

    Returns:
        The norms, float32 (float64 for float64 and complex128), in the unit of x.

    Raises:
        TypeError: x is not numeric, `axis` not integral, `where` not boolean.
        ValueError: `axis` is out of range, repeated, or has no elements; `where` does not broadcast to x; `axis_name`
            is not bound.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms
        >>> print(rms(jnp.array([3.0, 4.0])))
        3.535534
        >>> print(rms(jnp.array([[3e30, 4e30], [0.0, 0.0]]), axis=-1))
        [3.535534e+30 0.000000e+00]

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467), section 4.
    """
    x = as_numeric(
        "rms", "x", x, hint=" For a tree of arrays there is tree_rms." if isinstance(x, (dict, list, tuple)) else ""
    )
    axes = as_axes("rms", axis, x.shape)
    _check_extent("rms", x.shape, axes)
    where = as_mask("rms", where, x.shape)
    return _rms(x, where, axes, bool(keepdims), as_mapped("rms", axis_name))


# Inline, so that the caller's jit sees the operations; jitted, since an eager `cond` would compile at each call.
@partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _rms(x: Array, where: Array | None, axes: tuple[int, ...], keepdims: bool, mapped: Mapped) -> Array:
    x = _keep(x, where)
    plan = _reduce.make_plan([x], [Pool((0,), axes)], mapped=mapped)
    (norms,) = _reduce.root_mean_square(plan, [x], _counts(plan, x, where, axes, mapped)).values
    return norms if keepdims else norms.reshape([n for a, n in enumerate(x.shape) if a not in axes])


# ------------------------------------------------------------------------------------------------------- rms_normalize


def rms_normalize(
    x: Inexact[ArrayLike, "..."],
    scale: Real[ArrayLike, "..."] | None = None,
    *,
    axis: int | Sequence[int] | None = -1,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    where: Bool[ArrayLike, "..."] | None = None,
    axis_name: str | Sequence[str] | None = None,
    dtype: DTypeLike | None = None,
) -> Inexact[Array, "..."]:
    r"""x divided by its RMS norm: $y = \frac{x}{\sqrt{\|x\|_{RMS}^2 + \epsilon}} \odot (\text{scale} + \text{offset})$.

    Without a scale, and up to epsilon, every normalised group has the norm 1. Computed in float32 (in float64 for
    float64), right for every finite x, and rounded once at the end. Zeros give zeros, also with `epsilon=0`, and a
    derivative of 0 there. The backward pass keeps x in its own dtype, the scale, and one number for each group.

    Args:
        x: floats or complex numbers of any shape with at least one axis.
        scale: the gain, either of the shape of the normalised axes, in the order that they have in x, or of the rank of
            x with each axis of size 1 or that of x.
        axis: the axis or axes to pool; None pools all of them.
        epsilon: what is added to the mean square, inside the root.
        scale_offset: added to the scale. 1.0 is the convention of Gemma, with a scale that starts at zero.
        where: booleans that broadcast to x; elements at False are left out of the norm and come out as 0, NaN or not.
        axis_name: under `shard_map`, `pmap` or `vmap(axis_name=...)`, the mapped axes that each group is split over.
        dtype: the dtype of the result; that of x by default.

    Returns:
        An array of the shape of x.

    Raises:
        TypeError: x or scale is not floating, `where` is not boolean, `epsilon` or `scale_offset` not a number.
        ValueError: `epsilon` is negative or not finite, the shape of `scale` or `where` does not fit, `axis` is out of
            range, repeated or has no elements, `axis_name` is not bound.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms_normalize
        >>> print(rms_normalize(jnp.array([2.0, -2.0]), epsilon=0))
        [ 1. -1.]
        >>> print(rms_normalize(jnp.array([1e30, -1e30]), jnp.array([1.0, 0.5])))
        [ 1.  -0.5]

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467), equation 4.
    """
    return normalize(
        "rms_normalize", x, scale, axis=axis, feature_axes=axis, epsilon=epsilon, scale_offset=scale_offset,
        where=where, mapped=as_mapped("rms_normalize", axis_name), dtype=dtype,
    )  # fmt: skip


def normalize(
    function: str,
    x: Any,
    scale: Any,
    *,
    axis: Any,
    feature_axes: Any,
    epsilon: float,
    scale_offset: float,
    where: Any,
    mapped: Mapped,
    dtype: Any,
    axis_argument: str = "axis",
    where_argument: str = "where",
) -> Array:
    """`rms_normalize` with a scale for other axes than those it pools, under the names that its errors go by."""
    x = as_numeric(function, "x", x, kind=jnp.inexact, hint=" Cast integers first: x.astype(jnp.float32).")
    axes = as_axes(function, axis, x.shape, argument=axis_argument)
    _check_extent(function, x.shape, axes)
    if scale is not None:
        features = as_axes(function, feature_axes, x.shape, argument="feature_axes")
        scale = as_full_rank(
            function, "scale", as_numeric(function, "scale", scale, kind=jnp.floating), x.shape, features
        )
    elif scale_offset:
        raise ValueError(f"{function}: scale_offset {scale_offset!r} needs a scale to be added to, got none")
    spec = _Spec(
        axes,
        as_number(function, "epsilon", epsilon, least=0.0),
        as_number(function, "scale_offset", scale_offset),
        as_result_dtype(function, dtype, x),
        mapped,
    )
    return _normalize(x, scale, as_mask(function, where, x.shape, argument=where_argument), spec)


class _Spec(NamedTuple):
    """What is static about one call of `normalize`."""

    axes: tuple[int, ...]
    epsilon: float
    scale_offset: float
    dtype: np.dtype[Any]
    mapped: Mapped


@partial(jax.jit, static_argnums=3, inline=True)
def _normalize(x: Array, scale: Array | None, where: Array | None, spec: _Spec) -> Array:
    x = _keep(x, where)
    plan = _reduce.make_plan(
        [x], [Pool((0,), spec.axes)], epsilon=spec.epsilon, mapped=spec.mapped, result_dtype=spec.dtype
    )
    return _divided(spec, plan, x, scale, _counts(plan, x, where, spec.axes, spec.mapped))


# Up to here it is ordinary JAX code. The derivative is given by hand for the sake of the backward pass: left to itself,
# autodiff keeps float32 copies of x. It is given as a linear map of plain operations, which JAX transposes, so both
# modes and all orders follow from it. Under checkpoint it keeps its arguments and nothing else.
_keeps_its_arguments = partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, static_argnums=(0, 1))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _divided(spec: _Spec, plan: Plan, x: Array, scale: Array | None, counts: PerPool | None) -> Array:
    return _divide(spec, x, scale, _root(plan, x, counts))


@partial(_divided.defjvp, symbolic_zeros=True)
def _(spec: _Spec, plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, scale, counts = primals
    dx, dscale, _ = tangents
    root = _root(plan, x, counts)
    y = _divide(spec, x, scale, root)
    dy: Array | None = None
    if not isinstance(dx, SymbolicZero):
        dy = _along_x(spec, plan, x, scale, root, counts, dx)
    if scale is not None and not isinstance(dscale, SymbolicZero):
        along_scale = _along_scale(spec, plan, x, root, dscale)
        dy = along_scale if dy is None else dy + along_scale
    return y, jnp.zeros_like(y) if dy is None else dy


def _root(plan: Plan, x: Array, counts: PerPool | None) -> Array:
    return _reduce.root_mean_square(plan, [x], counts).values[0]


def _lift(spec: _Spec, x: Array) -> Array:
    return lift(x, accumulator_dtype(x.dtype, spec.dtype))


def _times_quarter_gain(spec: _Spec, y: Array, scale: Array | None) -> Array:
    gain = jnp.ones((), y.real.dtype) if scale is None else scale.astype(y.real.dtype) + spec.scale_offset
    return times(y, cpu_barrier(gain / 4)).astype(spec.dtype)


def _divide(spec: _Spec, x: Array, scale: Array | None, root: Array) -> Array:
    x, root, scale = cpu_barrier((x, root, scale))  # split off from the statistics
    return _times_quarter_gain(spec, divide4(_lift(spec, x), root), scale)


@_keeps_its_arguments
def _along_x(
    spec: _Spec, plan: Plan, x: Array, scale: Array | None, root: Array, counts: PerPool | None, dx: Array
) -> Array:
    """dy = (w - v (v.w)) gain, with w = dx/rho and v = x/(rho sqrt(n)).

    In this order, since w is about 1 where dx is about x, as is the cotangent that the way back begins with.
    """
    x, root, scale = cpu_barrier((x, root, scale))
    count = plan.sizes[0] if counts is None else counts.values[0]
    across = divide4(_lift(spec, dx), root)
    product = along(x, root, across, spec.axes, plan.mapped[0], count)
    across = across - times(direction(_lift(spec, x), root, count), product)
    return _times_quarter_gain(spec, across, scale)


@_keeps_its_arguments
def _along_scale(spec: _Spec, plan: Plan, x: Array, root: Array, dscale: Array) -> Array:
    """dy = x/rho * dscale. The last barrier is for the way back, where it keeps the cotangent from being shared."""
    x, root = cpu_barrier((x, root))
    return cpu_barrier(times(divide4(_lift(spec, x), root), dscale / 4).astype(spec.dtype))
