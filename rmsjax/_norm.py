"""Arrays: `rms` measures, `rms_normalize` divides by the measure."""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from rmsjax._checks import as_axes, as_full_rank, as_mapped, as_mask, as_number, as_numeric, as_result_dtype
from rmsjax._reduce import (
    KNOWS_DOUBLE,
    Mapped,
    Rows,
    accumulator_dtype,
    along_root,
    by_platform,
    cpu_barrier,
    divide4,
    divisor,
    factor_near_inverse,
    four_over,
    four_over_root_in_double,
    hold,
    is_known,
    lift,
    range_of,
    real_parts,
    recomputed,
    root,
    sum_of,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jax.typing import ArrayLike, DTypeLike
    from jaxtyping import Bool, Inexact, Num, Real


def _check_extent(function: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    if math.prod(shape[a] for a in axes) == 0:
        raise ValueError(f"{function}: cannot average over no elements: shape {shape} has 0 of them along axis {axes}")


def _keep(x: Array, where: Array | None) -> Array:
    """x with zeros where it is masked out."""
    return x if where is None else jnp.where(where, x, jnp.zeros((), x.dtype))


def _count(rows: Rows, x: Array, where: Array | None, over: Mapped) -> Any:
    """How many elements are averaged over, on all devices; 1 for none, whose mean is 0 all the same.

    over: the mapped axes that the caller named, of which a mask may vary over others than x does.
    """
    dtype = rows.span.dtype
    if where is None:
        return divisor(math.prod(x.shape[a] for a in rows.axes) * rows.mapped.shards(), dtype)
    *others, last = rows.axes or (None,)  # a single number has no axes
    kept = jnp.sum(where, last, keepdims=True, dtype=jnp.uint32)  # exact, and along one axis it cannot overflow
    kept = jnp.sum(kept.astype(dtype), tuple(others), keepdims=True)
    over_kept = over.of(kept)  # a mask may be the same on devices that x is split over
    kept = over_kept.psum(kept) * (rows.mapped.shards() // over_kept.shards())
    return jnp.maximum(kept, 1)


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
            (and not bound) under plain `jit`, where the norm of a sharded array is global as it is. A `shard_map` under
            `vmap(spmd_axis_name=...)` needs check_vma=False.

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
    rows = Rows(axes, range_of(x.dtype), mapped.of(x))
    norms = root(rows, x, _count(rows, x, where, mapped))
    return norms if keepdims else lax.squeeze(norms, axes)


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
    span = range_of(x.dtype, epsilon=spec.epsilon, result_dtype=spec.dtype)
    rows = Rows(spec.axes, span, spec.mapped.of(x))
    return _normalized(spec, rows, x, scale, _count(rows, x, where, spec.mapped))[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalized(spec: _Spec, rows: Rows, x: Array, scale: Array | None, count: Any) -> tuple[Array, Array]:
    """x over its root, and the root for the backward pass, or 0 where that is to compute it again."""
    forms = {"cuda": partial(in_one_kernel, spec, rows)} if _is_one_kernel(rows, x, count) else {}
    return by_platform(x, scale, count, default=partial(by_root, spec, rows), **forms)


def by_root(spec: _Spec, rows: Rows, x: Array, scale: Array | None, count: Any) -> tuple[Array, Array]:
    """The root of each row, then x over it."""
    rho = root(rows, x, count)
    x, over, scale = cpu_barrier((x, hold(four_over(rho)), scale))  # split off from the statistics
    return _times_quarter_gain(spec, times(_lift(spec, x), over), scale), rho


def _is_one_kernel(rows: Rows, x: Array, count: Any) -> bool:
    """Whether `in_one_kernel` serves: XLA:GPU fuses rows that are the last axis, have no mask and lie on one device."""
    is_real = rows.span.dtype == np.float32 and not jnp.iscomplexobj(x)
    return KNOWS_DOUBLE and is_real and rows.axes == (x.ndim - 1,) and not rows.mapped.names and not jnp.ndim(count)


def in_one_kernel(spec: _Spec, rows: Rows, x: Array, scale: Array | None, count: Any) -> tuple[Array, Array]:
    """For NVIDIA GPUs: each row is read once, by one kernel, which has a sum and an elementwise end.

    XLA:GPU (jax 0.12) fuses such a chain, as that of softmax, but neither three sums nor several numbers of a row that
    are used behind the sum. (A chain of a maximum and a sum is fused too, but on an H200 took twice as long.)
    """
    over = four_over_root_in_double(rows, x, count)
    y = _times_quarter_gain(spec, times(_lift(spec, x), over), scale)
    return y, lax.full_like(over, 0)  # the root would be a second output, and break the fusion


def _lift(spec: _Spec, x: Array) -> Array:
    return lift(x, accumulator_dtype(x.dtype, spec.dtype))


def _gain(spec: _Spec, scale: Array, dtype: Any) -> Array:
    return scale.astype(dtype) + spec.scale_offset


def _times_quarter_gain(spec: _Spec, y: Array, scale: Array | None) -> Array:
    gain = jnp.ones((), y.real.dtype) if scale is None else _gain(spec, scale, y.real.dtype)
    return times(y, cpu_barrier(gain / 4)).astype(spec.dtype)


# The derivative is given by hand for the sake of the backward pass: left to itself, autodiff keeps float32 copies of x.
# It is given as a linear map of plain operations, which JAX transposes, so both modes and all orders follow from it.


@partial(_normalized.defjvp, symbolic_zeros=True)
def _(spec: _Spec, rows: Rows, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, _, count = primals
    dx, dscale = (None if isinstance(t, SymbolicZero) else t for t in tangents[:2])
    y, rho = _normalized(spec, rows, *primals)
    dy = _differential(spec, rows, primals, rho, (dx, dscale))
    return (y, rho), (dy, jnp.zeros_like(rho) if dx is None else along_root(rows, x, rho, count, dx))


@partial(recomputed, static_argnums=(0, 1))
def _differential(spec: _Spec, rows: Rows, primals: Any, rho: Array, tangents: Any) -> Array:
    """The derivative of x over its root, linear in the tangents of x and scale, each of which may be missing."""
    along = partial(_along, spec, rows, _over_known_root)

    def again(primals: Any, rho: Array, tangents: Any) -> Array:
        """For what `in_one_kernel` has normalised."""
        del rho
        # Behind a barrier XLA:GPU sees that all sums read one array; where x is the result of a product of matrices it
        # would take them one by one.
        x = hold(primals[0])
        return _along(spec, rows, _over_root, (x, *primals[1:]), root(rows, x, primals[2]), tangents)

    # XLA:CPU is not to share anything with the forward pass, since it would store that in full.
    forms = {"cpu": partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)(along)}
    if _is_one_kernel(rows, primals[0], primals[2]):
        forms["cuda"] = again
    return by_platform(primals, rho, tangents, default=along, **forms)


def _along(spec: _Spec, rows: Rows, over_root: Callable[..., Array], primals: Any, rho: Array, tangents: Any) -> Array:
    x, (dx, dscale) = primals[0], tangents
    parts: list[Array] = []
    if dx is not None:
        parts.append(_along_x(spec, rows, over_root, primals, rho, dx))
    if dscale is not None:
        parts.append(_along_scale(spec, x, rho, dscale))
    return sum(parts[1:], parts[0]) if parts else jnp.zeros(x.shape, spec.dtype)


def _along_x(spec: _Spec, rows: Rows, over_root: Callable[..., Array], primals: Any, rho: Array, dx: Array) -> Array:
    """dy = (w - y mean(y w)) gain, with w = dx/rho and y = x/rho."""
    (x, scale, count), rho = cpu_barrier((primals, rho))
    over = hold(four_over(rho))
    w = divide4(_lift(spec, dx), rho, over)

    def products(x: Array, rho: Array, over: Array, w: Array) -> list[Array]:
        pairs = zip(real_parts(x, rho.dtype), real_parts(w, rho.dtype), strict=True)
        return [reduce(lax.add, [divide4(p, rho, over) * t for p, t in pairs])]

    (total,) = sum_of(products, rows.axes, x, rho, over, w)
    mean = rows.mapped.psum(lax.expand_dims(total / 4, rows.axes)) / count
    return _times_quarter_gain(spec, w - over_root(rows, _lift(spec, x), rho, over, mean), scale)


def _over_known_root(rows: Rows, x: Array, rho: Array, over: Array, number: Array) -> Array:
    """x/rho times a number of each row, linear in that number."""
    del rows
    return times(divide4(x, rho, over), number / 4)


def _over_root(rows: Rows, x: Array, rho: Array, over: Array, number: Array) -> Array:
    """The same where rho is still to be found out while x is read for it.

    On the way back it is the sum of x/rho times the cotangent. Not to read both again, all sums of x times a factor
    that may be near 1/rho are taken, of which one is chosen.
    """
    del over
    factor = factor_near_inverse(rows.span, rho)
    number, largest = divide4(number / factor, rho, four_over(rho)) / 4, jnp.finfo(x.dtype).max
    terms = [lax.clamp(-largest, x * f, largest) * jnp.where(factor == f, number, 0) for f in rows.span.factors]
    return sum(terms[1:], terms[0])


def _along_scale(spec: _Spec, x: Array, rho: Array, dscale: Array) -> Array:
    """dy = x/rho dscale. The last barrier is for the way back, where it keeps the cotangent from being shared."""
    x, rho = cpu_barrier((x, rho))
    over = hold(four_over(rho))
    spread = _expanded(dscale / 4, x.shape)
    return cpu_barrier(times(divide4(_lift(spec, x), rho, over), spread).astype(spec.dtype))


_BLOCK = 128


def _expanded(scale: Array, shape: tuple[int, ...]) -> Array:
    """A scale in the shape of x: on the way back the sum over the rows, which takes two stages.

    In one stage, XLA:GPU (jax 0.12) would write all terms out in float32 before it adds them up. Stages are axes, or
    blocks of the only one: to merge axes would gather what is split over devices.
    """

    def at_once(scale: Array) -> Array:
        return jnp.broadcast_to(scale, shape)

    def in_stages(scale: Array) -> Array:
        added = [a for a, n in enumerate(shape) if scale.shape[a] != n]
        added.sort(key=lambda a: shape[a] if is_known(shape[a]) else math.inf)  # symbolic sizes do not compare
        for a in added[:-1]:
            scale = hold(jnp.broadcast_to(scale, [shape[b] if b == a else n for b, n in enumerate(scale.shape)]))
        if len(added) == 1 and shape[added[0]] % _BLOCK == 0:
            a = added[0]
            blocks = [*scale.shape[:a], shape[a] // _BLOCK, 1, *scale.shape[a + 1 :]]
            scale = hold(jnp.broadcast_to(jnp.expand_dims(scale, a), blocks))
            blocks[a + 1] = _BLOCK
            return jnp.broadcast_to(scale, blocks).reshape(shape)
        return jnp.broadcast_to(scale, shape)

    return by_platform(scale, cpu=at_once, default=in_stages)
