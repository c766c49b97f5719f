"""The one place that squares and sums.

Everything rmsjax measures is the root of a mean of squares, rho = sqrt(mean(|x|^2) + epsilon), over some elements of
some arrays. `root_mean_square` computes it for any number of arrays at once: right for every finite input, at the cost
of the naive sum in the common case, and differentiable in both modes. The rest of the package calls it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

# Leaves below this many elements are joined before they are reduced, this many at a time: XLA:CPU compiles one kernel
# for each reduction, and that, not the reading of memory, is the cost of a tree of many small leaves.
_SMALL, _GROUP = 4096, 64

T = TypeVar("T")


class Pool(NamedTuple):
    """Elements whose squares are averaged together.

    `axes=None` pools every element of all `members` (positions in the list of leaves) into a scalar; otherwise the one
    member is reduced over `axes`, which are kept with size 1.
    """

    members: tuple[int, ...]
    axes: tuple[int, ...] | None = None


class PerPool(NamedTuple):
    """An entry for each pool: a vector over the pools without axes (None without any), an array for each other."""

    scalars: Any
    rows: tuple[Any, ...]

    def entries(self, pools: Sequence[Pool]) -> list[Any]:
        """The entries one by one, in the order of the pools."""
        scalars = iter(range(len(pools)))
        rows = iter(self.rows)
        return [self.scalars[next(scalars)] if pool.axes is None else next(rows) for pool in pools]


class Plan(NamedTuple):
    """What is static about one call of `root_mean_square`; `make_plan` makes it."""

    pools: tuple[Pool, ...]
    epsilon: float
    dtype: np.dtype[Any]  # of sums and result
    mapped: tuple[Mapped, ...]  # for each leaf, the mapped axes that it is summed over
    sizes: PerPool  # the number of elements of each pool, over all devices


# ------------------------------------------------------------------------------------------------------ numeric tricks


def accumulator_dtype(*dtypes: Any) -> np.dtype[Any]:
    """float64 where one of the dtypes is float64 or complex128, float32 for all else."""
    return np.dtype(np.float64 if any(d in (np.float64, np.complex128) for d in dtypes) else np.float32)


def real_parts(x: Array, dtype: Any) -> tuple[Array, ...]:
    """x in a real dtype: (x,), or (real part, imaginary part) of a complex x."""
    return tuple(part.astype(dtype) for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,)))


def lift(x: Array, dtype: Any) -> Array:
    """x in the accumulator dtype, or in its complex counterpart if x is complex."""
    return x.astype(np.result_type(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype)


def times(x: Array, *factors: Array) -> Array:
    """The product in the dtype of x, which may be complex where the factors are real."""
    return reduce(jnp.multiply, [factor.astype(x.dtype) for factor in factors], x)


def cpu_barrier(values: T) -> T:
    """Keep XLA:CPU from sharing a computed value between two loops: it would store it in full, in float32.

    On other platforms fusion across the two is what one wants, so there it is the identity.
    """
    return lax.platform_dependent(values, cpu=_barrier, default=lambda v: v)


def _barrier(values: T) -> T:
    # Before jax 0.11 what comes out of one barrier varies over all mapped axes that anything in it varies over.
    alike = len({_varying(value) for value in jax.tree.leaves(values)}) <= 1
    return lax.optimization_barrier(values) if alike else jax.tree.map(lax.optimization_barrier, values)


def split_ratio(numerator: Array | float, denominator: Array) -> tuple[Array, Array]:
    """(a, b), normal numbers with x*a*b = x*numerator/denominator; b = 0 where either is 0.

    The ratio itself can be subnormal, which XLA flushes to zero (1/rho for rho > 2^126 in float32), or overflow: then
    `a` is the smallest normal number or its inverse. An x that this `a` flushes to 0 is one that the ratio would too.
    """
    tiny = float(jnp.finfo(denominator.dtype).tiny)
    nonzero = (denominator != 0) & (numerator != 0)  # 0 is no ratio to scale by: denominator * tiny may be 0 too
    safe = jnp.where(nonzero, denominator, 1)
    ratio = numerator / safe
    a = jnp.where(ratio < tiny, tiny, jnp.where(ratio > 1 / tiny, 1 / tiny, 1)).astype(denominator.dtype)
    return a, jnp.where(nonzero, numerator / (safe * a), 0)


@jax.custom_jvp
def _four_over(root: Array) -> Array:
    """4/root, and 0 where root is 0.

    1/root is subnormal for a root near the top of the range, hence flushed to 0. 4/root never is, and overflows for the
    smallest normal number alone, where the largest number is as good.
    """
    largest = float(jnp.finfo(root.dtype).max)
    return jnp.where(root == 0, 0, jnp.minimum(4 / jnp.where(root == 0, 1, root), largest))


@_four_over.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (root,), (droot,) = primals, tangents
    y = _four_over(root)
    return y, -(droot * (y / 4) * y)  # 4/root^2 would overflow or underflow


@jax.custom_jvp
def divide4(x: Array, root: Array) -> Array:
    """4 x/root without a division for each element, and 0 where root is 0; linear in x.

    Whoever calls divides by 4 what is small. Derivatives, and those of the transpose, multiply in an order that neither
    overflows nor underflows on the way.
    """
    return times(x, cpu_barrier(_four_over(root)))  # computed once a row, not again for each element


@divide4.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, root), (dx, droot) = primals, tangents
    y = divide4(x, root)
    return y, divide4(dx, root) - times(y, divide4(droot, root) / 4)


class _Window(NamedTuple):
    """A mean square between `low` and `high` lost nothing. Beyond, x is first scaled by `scale` or its inverse.

    In float32: 2^-80, 2^124, 2^80. A fixed power of two brings every normal number that matters to where its square is
    normal too, so nobody has to look for the largest element or to divide by it.
    """

    low: float
    high: float
    scale: float


def _window(dtype: np.dtype[Any]) -> _Window:
    info = jnp.finfo(dtype)
    return _Window(
        float(info.tiny) / float(info.eps) ** 2, float(info.max) / 16, 2.0 ** (-5 * int(info.minexp) // 8 + 2)
    )


def _squares_fit(dtype: Any, accumulator: np.dtype[Any]) -> bool:
    """Whether no square of this dtype leaves the accumulator's range: float8, float16 and integers in float32."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return True
    x, acc = jnp.finfo(dtype), jnp.finfo(accumulator)
    return 2 * int(x.maxexp) + 64 < int(acc.maxexp) and 2 * (int(x.minexp) - int(x.nmant)) > int(acc.minexp)


# --------------------------------------------------------------------------------------------------------- mapped axes


def _varying(x: Array) -> frozenset[str]:
    """The manual mesh axes that JAX knows x to vary over: none unless under shard_map(check_vma=True)."""
    aval: Any = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma  # renamed in jax 0.10


class Mapped(NamedTuple):
    """Mapped axes to sum over, each group of devices by itself where groups are given (as in `lax.psum`)."""

    names: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None

    def over(self, x: Array) -> Mapped:
        """Only the axes to sum x over: those it varies over where JAX tracks that, else all, as the caller said.

        Whether JAX tracks is not public, but the index along an axis varies over it by definition, so it tells; only
        of axes of a mesh, since arrays never vary over the axis of a vmap.
        """
        tracks = jax.sharding.get_abstract_mesh().axis_names
        names = (n for n in self.names if n in _varying(x) or n not in tracks or n not in _varying(lax.axis_index(n)))
        return self._replace(names=tuple(names))

    def shards(self) -> int:
        """How many devices are summed over."""
        if self.names and self.groups:
            return len(self.groups[0])
        return math.prod(int(lax.axis_size(n)) for n in self.names)

    def psum(self, x: T) -> T:
        """The sum over these axes; no operation at all where there are none."""
        return lax.psum(x, self.names, axis_index_groups=self.groups) if self.names else x


UNMAPPED = Mapped()


def _is_partitioned(x: Array) -> bool:
    """Whether jit may have split x over a mesh. Such a leaf is not joined with others: that would gather it."""
    mesh: Any = jax.typeof(x).sharding.mesh
    manual = jax.sharding.AxisType.Manual
    return any(size > 1 and kind != manual for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True))


# ----------------------------------------------------------------------------------------------------- sums of squares


def _sum_squares(x: Array, axes: tuple[int, ...], dtype: np.dtype[Any], scale: Array | None) -> Array:
    if sum(x.shape[a] > 1 for a in axes) > 1 and not _is_partitioned(x):  # what is split over a mesh would be gathered
        return _sum_squares_merged(x, axes, dtype, scale)
    parts = real_parts(x, dtype)
    if scale is not None:
        parts = tuple(part * scale for part in parts)
    return jnp.sum(reduce(jnp.add, [jnp.square(part) for part in parts]), axes, keepdims=True)


def _sum_squares_merged(x: Array, axes: tuple[int, ...], dtype: np.dtype[Any], scale: Array | None) -> Array:
    """The same, of neighbouring axes as one axis, and of axes that are no neighbours one after the other.

    XLA:CPU adds up one axis in blocks of 32 terms, but several in blocks of 32 along each of them: 1024 or 32768 terms
    one by one, and the sum of equal numbers is off by 1e-5. x is reshaped before it is squared, since XLA undoes a
    reshape right before a sum; to a vector where it can be, whose sum is the fastest.
    """
    extended = [a for a in range(x.ndim) if x.shape[a] != 1]
    groups = [(summed, tuple(group)) for summed, group in groupby(extended, axes.__contains__)]

    def merge(array: Array) -> Array:
        return array.reshape([math.prod(array.shape[a] for a in group) for _, group in groups])

    last, *others = [i for i in reversed(range(len(groups))) if groups[i][0]]
    total = _sum_squares(merge(x), (last,), dtype, None if scale is None else merge(scale))
    for i in others:
        total = jnp.sum(lax.optimization_barrier(total), i, keepdims=True)  # or XLA makes one sum of both
    return total.reshape([1 if a in axes else n for a, n in enumerate(x.shape)])


def _bundles(leaves: Sequence[Array], positions: Sequence[int]) -> list[list[int]]:
    """Which leaves to reduce together: large ones alone, small ones with others of their dtype and about their size."""
    alone: list[list[int]] = []
    buckets: dict[Any, list[int]] = {}
    for i in positions:
        leaf = leaves[i]
        if leaf.size >= _SMALL or _is_partitioned(leaf):
            alone.append([i])
        else:
            buckets.setdefault((leaf.dtype, leaf.size.bit_length(), _varying(leaf)), []).append(i)
    return alone + [bucket[i : i + _GROUP] for bucket in buckets.values() for i in range(0, len(bucket), _GROUP)]


def _as_rows(leaves: Sequence[Array]) -> Array:
    """Leaves of one dtype as the rows of one matrix, filled up with zeros."""
    width = max(leaf.size for leaf in leaves)
    pieces: list[Array] = []
    for leaf in leaves:
        pieces.append(leaf.reshape(-1))
        if leaf.size < width:
            pieces.append(jnp.zeros(width - leaf.size, leaf.dtype))
    return jnp.concatenate(pieces).reshape(len(leaves), width)


def _add_by_pool(sums: Array, pool_of: Sequence[int], pools: int) -> Array:
    """The vector of leaf sums, added up by pool."""
    if list(pool_of) == list(range(pools)):
        return sums
    if pools == 1:
        # XLA rewrites a bare sum of a concatenation into a chain of additions, all in one fusion, and compiling that
        # takes time quadratic in the number of leaves. The maximum with 0 changes no sum of squares and prevents it.
        return jnp.sum(jnp.maximum(sums, 0), keepdims=True)
    return jax.ops.segment_sum(sums, jnp.asarray(pool_of), pools)


def _scalar_sums(leaves: Sequence[Array], plan: Plan, scales: Array | None) -> Array:
    pools = [pool for pool in plan.pools if pool.axes is None]
    pool_of = {i: p for p, pool in enumerate(pools) for i in pool.members if leaves[i].size}
    totals: list[Array] = []
    for mapped in dict.fromkeys(plan.mapped[i] for i in pool_of):
        bundles = _bundles(leaves, [i for i in pool_of if plan.mapped[i] == mapped])
        sums: list[Array] = []
        for bundle in bundles:
            rows = leaves[bundle[0]][None] if len(bundle) == 1 else _as_rows([leaves[i] for i in bundle])
            scale = None
            if scales is not None:
                scale = scales[np.array([pool_of[i] for i in bundle])].reshape(-1, *[1] * (rows.ndim - 1))
            sums.append(_sum_squares(rows, tuple(range(1, rows.ndim)), plan.dtype, scale).reshape(-1))
        order = [pool_of[i] for bundle in bundles for i in bundle]
        totals.append(mapped.psum(_add_by_pool(jnp.concatenate(sums), order, len(pools))))
    return reduce(jnp.add, totals, jnp.zeros(len(pools), plan.dtype)) if len(totals) != 1 else totals[0]


def _sums(leaves: Sequence[Array], plan: Plan, scales: PerPool | None) -> PerPool:
    """The sums of squares of all pools, over all devices, of leaves multiplied by the scale of their pool."""
    with_axes = [pool for pool in plan.pools if pool.axes is not None]
    rows = [
        plan.mapped[i].psum(_sum_squares(leaves[i], pool.axes or (), plan.dtype, scales and scales.rows[k]))
        for k, pool in enumerate(with_axes)
        for i in pool.members
    ]
    scalars = _scalar_sums(leaves, plan, scales and scales.scalars) if len(rows) < len(plan.pools) else None
    return PerPool(scalars, tuple(rows))


@custom_vmap
def _everywhere(ok: Array) -> Array:
    """Whether all are true, in the whole batch: under vmap the answer stays one scalar.

    A `cond` on it stays a branch, where a predicate for each example would turn it into both branches and a select.
    """
    return jnp.all(ok)


@_everywhere.def_vmap
def _(axis_size: int, in_batched: list[bool], ok: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _everywhere(ok), False


# ------------------------------------------------------------------------------------------------------------ the root


def make_plan(
    leaves: Sequence[Array], pools: Sequence[Pool], *, epsilon: float = 0.0, mapped: Mapped = UNMAPPED
) -> Plan:
    """The plan of `root_mean_square(plan, leaves)`; made where the leaves are, since it looks at how they vary."""
    over = tuple(mapped.over(leaf) for leaf in leaves)

    def size(pool: Pool) -> float:
        shapes = [
            leaves[i].shape if pool.axes is None else [leaves[i].shape[a] for a in pool.axes] for i in pool.members
        ]
        return float(sum(math.prod(s) * over[i].shards() for i, s in zip(pool.members, shapes, strict=True)))

    sizes = PerPool(
        tuple(size(pool) for pool in pools if pool.axes is None),
        tuple(size(pool) for pool in pools if pool.axes is not None),
    )
    return Plan(tuple(pools), epsilon, accumulator_dtype(*(leaf.dtype for leaf in leaves)), over, sizes)


def mean_product(x: Array, root: Array, t: Array, axes: tuple[int, ...], mapped: Mapped, count: Any) -> Array:
    """mean(Re(conj(x/root) * t)) over axes, kept with size 1; linear in t."""
    pairs = zip(real_parts(x, root.dtype), real_parts(t, root.dtype), strict=True)
    products = [divide4(part, root) * tangent for part, tangent in pairs]
    return mapped.psum(jnp.sum(reduce(jnp.add, products), axes, keepdims=True)) / (4 * jnp.maximum(count, 1))


def _sizes(plan: Plan) -> PerPool:
    scalars, rows = plan.sizes
    return PerPool(np.array(scalars, plan.dtype) if scalars else None, rows)


def _root(plan: Plan, total: Array, scale: Array | float, count: Any) -> Array:
    """sqrt(total/count + epsilon) of a sum that was taken with a scale."""
    mean = total / jnp.maximum(count, 1)
    root = jnp.sqrt(mean + plan.epsilon * scale * scale) if plan.epsilon else jnp.sqrt(mean)
    if isinstance(scale, float):
        return root
    # The RMS of numbers at the top of the range is in the range: do not let the last rounding carry it beyond.
    info = jnp.finfo(plan.dtype)
    limit = float(info.max) * jnp.minimum(scale, 0.5)
    rounded_up = (scale < 1) & (root > limit) & (root < limit * (1 + 16 * float(info.eps)))
    return jnp.where(rounded_up, limit, root) / scale


def _guarded_roots(plan: Plan, leaves: Sequence[Array], counts: PerPool) -> PerPool:
    """The root of each pool: from the naive sums, unless some sum left the safe window."""
    sizes = _sizes(plan)
    naive = _sums(leaves, plan, None)

    def roots(sums: PerPool, counts: PerPool, scales: PerPool | float = 1.0) -> PerPool:
        scales = jax.tree.map(lambda _: scales, sums) if isinstance(scales, float) else scales
        return jax.tree.map(partial(_root, plan), sums, scales, counts)

    if all(_squares_fit(leaf.dtype, plan.dtype) for leaf in leaves):
        return roots(naive, counts)
    low, high, scale = _window(plan.dtype)
    if plan.epsilon >= 1e8 * low:
        low = -1.0  # whatever underflowed, epsilon outweighs it

    def pick(s: Array, n: Any, below: Any, inside: Any, above: Any) -> Array:
        return jnp.where(s < high, jnp.where(s >= low * n, inside, below), above)  # NaN goes above, and stays NaN

    def rescaled(leaves: Sequence[Array], naive: PerPool, counts: PerPool) -> PerPool:
        scales = jax.tree.map(lambda s, n: pick(s, n, scale, 1.0, 1 / scale).astype(s.dtype), naive, sizes)
        return roots(_sums(leaves, plan, scales), counts, scales)

    def branch(leaves: Sequence[Array], naive: PerPool, counts: PerPool) -> PerPool:
        """Read the leaves again only if some sum demands it."""
        inside = jax.tree.map(lambda s, n: _everywhere((s < high) & (s >= low * n)), naive, sizes)
        return lax.cond(
            reduce(jnp.logical_and, jax.tree.leaves(inside)),
            lambda leaves, naive, counts: roots(naive, counts),
            rescaled,
            *(leaves, naive, counts),
        )

    def all_scales(leaves: Sequence[Array], naive: PerPool, counts: PerPool) -> PerPool:
        """Three sums in one reading of the leaves, and no branch: no more traffic for an accelerator, and no sync."""

        def at(value: float) -> PerPool:
            scales = jax.tree.map(lambda s: jnp.full_like(s, value), naive)
            return roots(_sums(leaves, plan, scales), counts, scales)

        return jax.tree.map(pick, naive, sizes, at(scale), roots(naive, counts), at(1 / scale))

    if len(leaves) == 1:  # an array may be measured hundreds of times in a step, a tree is measured once
        return lax.platform_dependent(leaves, naive, counts, cpu=branch, default=all_scales)
    return branch(leaves, naive, counts)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def root_mean_square(plan: Plan, leaves: Sequence[Array], counts: PerPool | None = None) -> PerPool:
    """rho = sqrt(mean(|x|^2) + epsilon) of each pool of the plan.

    counts: what the sums are divided by, where that is not the number of elements (masks); a count of 0 gives
    sqrt(epsilon). The derivative is mean(Re(conj(x) dx))/rho, and 0 where rho = 0.
    """
    return _guarded_roots(plan, leaves, _sizes(plan) if counts is None else counts)


@partial(root_mean_square.defjvp, symbolic_zeros=True)
def _(plan: Plan, primals: Any, tangents: Any) -> tuple[PerPool, PerPool]:
    leaves, counts = primals
    roots = root_mean_square(plan, leaves, counts)
    moving = {i: t for i, t in enumerate(tangents[0]) if not isinstance(t, SymbolicZero)}
    return roots, _differential(plan, leaves, roots, counts, moving)


# Under checkpoint nothing is kept for the backward pass but the leaves and the roots, which live anyway.
@partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, static_argnums=(0,))
def _differential(
    plan: Plan, leaves: Sequence[Array], roots: PerPool, counts: PerPool | None, moving: dict[int, Array]
) -> PerPool:
    """The derivative of `root_mean_square` along the tangents in `moving`."""
    counts = _sizes(plan) if counts is None else counts
    scalars: list[Array] = []
    rows: list[Array] = []
    for pool, root, count in zip(plan.pools, roots.entries(plan.pools), counts.entries(plan.pools), strict=True):
        total = jnp.zeros_like(root)
        for i in pool.members:
            if i in moving:
                axes = tuple(range(leaves[i].ndim)) if pool.axes is None else pool.axes
                mean = mean_product(leaves[i], root, moving[i], axes, plan.mapped[i], count)
                total = total + mean.reshape(root.shape)
        (scalars if pool.axes is None else rows).append(total)
    return PerPool(jnp.stack(scalars) if scalars else None, tuple(rows))
