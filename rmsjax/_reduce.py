"""The one place that squares and sums.

Everything rmsjax measures is the root of a mean of squares, rho = sqrt(mean(|x|^2) + epsilon), over some elements of
some arrays. `root_mean_square` computes it for any number of arrays at once: right for every finite input, at the cost
of the naive sum in the common case, and differentiable in both modes. The rest of the package calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

T = TypeVar("T")


class Pool(NamedTuple):
    """Elements whose squares are averaged together.

    `axes=None` pools every element of all `members` (positions in the list of leaves) into a scalar; otherwise the one
    member is reduced over `axes`, which are kept with size 1.
    """

    members: tuple[int, ...]
    axes: tuple[int, ...] | None = None


class Slot(NamedTuple):
    """A place in a `PerPool`: which pools have their entries there, and which leaves these are computed from.

    A slot with axes holds the array of one pool of one leaf. One without holds a number for a single pool, whose leaves
    are all those in the bundles, or a vector with an entry for each of several pools of one leaf each, the columns of
    one bundle. A bundle is a number of leaves that are handled together.
    """

    pools: tuple[int, ...]
    axes: tuple[int, ...] | None
    bundles: tuple[tuple[int, ...], ...]

    @property
    def is_one_pool(self) -> bool:
        return len(self.pools) == 1

    def members(self, pool: int) -> tuple[int, ...]:
        """The leaves of a pool, those without elements left out."""
        if not self.is_one_pool:
            return (self.bundles[0][self.pools.index(pool)],)
        return tuple(i for bundle in self.bundles for i in bundle)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerPool:
    """An entry for each pool, many of them to an array: so a tree of many leaves takes few operations."""

    values: tuple[Any, ...]
    slots: tuple[Slot, ...] = field(metadata={"static": True})

    def entries(self) -> list[Any]:
        """The entries one by one, in the order of the pools."""
        found: dict[int, Any] = {}
        for value, slot in zip(self.values, self.slots, strict=True):
            found |= zip(slot.pools, [value] if slot.is_one_pool else jnp.unstack(value), strict=True)
        return [found[pool] for pool in range(len(found))]

    def change_axes(self, change: Callable[[Any, tuple[int, ...]], Any]) -> PerPool:
        """The values of slots with axes changed by `lax.squeeze` or `lax.expand_dims`."""
        pairs = zip(self.values, self.slots, strict=True)
        return PerPool(tuple(v if slot.axes is None else change(v, slot.axes) for v, slot in pairs), self.slots)

    def in_slots_of(self, other: PerPool) -> PerPool:
        """The same entries in the slots of another."""
        return self if self.slots == other.slots else in_slots(other.slots, self.entries(), jnp.stack)


def in_slots(slots: tuple[Slot, ...], entries: Sequence[Any], stack: Callable[[list[Any]], Any]) -> PerPool:
    """The entries of all pools in their slots; `stack` makes a vector of some."""
    values = (entries[slot.pools[0]] if slot.is_one_pool else stack([entries[p] for p in slot.pools]) for slot in slots)
    return PerPool(tuple(values), slots)


class Plan(NamedTuple):
    """What is static about one call of `root_mean_square`; `make_plan` makes it."""

    slots: tuple[Slot, ...]
    epsilon: float
    dtype: np.dtype[Any]  # of sums and result
    mapped: tuple[Mapped, ...]  # for each leaf, the mapped axes that it is summed over
    sizes: tuple[float, ...]  # the number of elements of each pool, over all devices; at least 1, to divide by


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
    return reduce(lax.mul, [factor.astype(x.dtype) for factor in factors], x)


def in_order(x: Array, *factors: Array) -> Array:
    """`times` from left to right, for factors of which it matters which ones are multiplied first.

    XLA turns (x c) d into x (c d) where the factors are constants, and that may overflow or underflow. To reduce the
    precision of x c to what it is changes nothing, and prevents it; but reductions do not fuse with that.
    """

    def product(x: Array, factor: Array) -> Array:
        info = jnp.finfo(x.dtype)
        x = times(x, factor)
        return x if jnp.iscomplexobj(x) else lax.reduce_precision(x, int(info.nexp), int(info.nmant))

    return reduce(product, factors, x)


def cpu_barrier(values: T) -> T:
    """Keep XLA:CPU from sharing a computed value between two loops: it would store it in full, in float32.

    On other platforms fusion across the two is what one wants, so there it is the identity.
    """
    return lax.platform_dependent(values, cpu=_barrier, default=lambda v: v)


def _barrier(values: T) -> T:
    # Before jax 0.11 what comes out of one barrier varies over all mapped axes that anything in it varies over.
    alike = len({_varying(value) for value in jax.tree.leaves(values)}) <= 1
    return lax.optimization_barrier(values) if alike else jax.tree.map(lax.optimization_barrier, values)


@jax.custom_jvp
def split_ratio(numerator: Array, denominator: Array) -> tuple[Array, Array]:
    """(a, b) with x*a*b = x*numerator/denominator; b = 1 just where the two are equal, else 0 where either is 0.

    The ratio itself can be subnormal, which XLA flushes to zero (1/rho for rho > 2^126 in float32), or overflow: then
    `a` is near the smallest normal number or its inverse, else 1. An x that it flushes to 0 the ratio would flush too.
    Both end in a division, which XLA:CPU does once: anything cheaper it does again in each loop that uses the result.
    """
    tiny = float(jnp.finfo(denominator.dtype).tiny)
    equal, zero = numerator == denominator, (numerator == 0) | (denominator == 0)
    over = jnp.where(equal, 1, jnp.where(zero, 0, numerator))
    under = jnp.where(equal | zero, 1, denominator)
    is_small, is_large = over < under * tiny, under < over * tiny
    # 4 tiny, since not every platform divides exactly: what is below tiny is 0.
    a = 1 / jnp.where(is_small, 0.25 / tiny, jnp.where(is_large, tiny, 1)).astype(under.dtype)
    return a, over / (under * a)


@split_ratio.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Any, Any]:
    """d(n/d) = (dn - dd n/d)/d, and 0 where d = 0; `a` is chosen, and does not move."""
    (numerator, denominator), (moved, by) = primals, tangents
    a, b = split_ratio(numerator, denominator)
    safe = jnp.where(denominator == 0, 1, denominator) * a
    return (a, b), (jnp.zeros_like(a), jnp.where(denominator == 0, 0, (moved - in_order(by, a, b)) / safe))


@jax.custom_jvp
def _four_over(root: Array) -> Array:
    """4/root, and 0 where root is 0.

    1/root is subnormal for a root near the top of the range, hence flushed to 0. 4/root never is, and overflows for the
    smallest normal number alone, where the largest number is as good.
    """
    largest = float(jnp.finfo(root.dtype).max)
    sharding = jax.typeof(root).sharding.spec
    ones = [a for a, n in enumerate(root.shape) if n == 1 and sharding[a] is None]  # left out, as are those of `_sums`
    root = lax.squeeze(root, ones)
    return lax.expand_dims(jnp.where(root == 0, 0, jnp.minimum(4 / jnp.where(root == 0, 1, root), largest)), ones)


@_four_over.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (root,), (droot,) = primals, tangents
    y = _four_over(root)
    return y, -in_order(droot, y / 4, y)  # 4/root^2 would overflow or underflow


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

    low: np.floating[Any]
    high: np.floating[Any]
    scale: np.floating[Any]


def _window(dtype: np.dtype[Any]) -> _Window:
    info = jnp.finfo(dtype)
    bounds = float(info.tiny) / float(info.eps) ** 2, float(info.max) / 16, 2.0 ** (-5 * int(info.minexp) // 8 + 2)
    return _Window(*map(dtype.type, bounds))


def _squares_fit(dtype: Any, accumulator: np.dtype[Any]) -> bool:
    """Whether no sum of squares of this dtype leaves the accumulator's range: float8, float16, 32-bit integers."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return np.dtype(dtype).itemsize <= 4
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


def _may_be_partitioned(x: Array) -> bool:
    """Whether jit may split x over devices. A reshape, or joining it with others, would then gather it.

    Of an array that is yet to be placed the mesh is empty here, and `in_shardings` may still split it.
    """
    mesh: Any = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return jax.device_count() > 1
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit  # the latter counts even with size 1
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(kind == explicit or (kind == auto and size > 1) for size, kind in axes)


# -------------------------------------------------------------------------------------------------- many small leaves

# XLA:CPU compiles a kernel for each reduction, and that, not the reading of memory, is the cost of a tree of many small
# leaves. So leaves up to this size are joined, this many of one size at a time; joints of more take longer to compile
# than they save. What is left of all sizes can be joined by more.
_SMALL, _GROUP, _TINY, _MIXED_GROUP = 4096, 32, 64, 128


def bundles(leaves: Sequence[Array], positions: Sequence[int], *, one_pool: bool) -> tuple[tuple[int, ...], ...]:
    """Which leaves to handle together: large ones alone, small ones with others of their dtype.

    Those of one pool with others of their size, and what is left with what else is left; those of several pools, which
    `join` fills up, with others of about their size.
    """
    alone: list[tuple[int, ...]] = []
    joint: list[tuple[int, ...]] = []
    alike: dict[Any, list[int]] = {}
    left: dict[Any, list[int]] = {}

    def joined(group: list[int], count: int) -> list[tuple[int, ...]]:
        by_size = sorted(group, key=lambda i: leaves[i].size)
        return [tuple(by_size[k : k + count]) for k in range(0, len(group), count)]

    for i in positions:
        leaf = leaves[i]
        if leaf.size > _SMALL or _may_be_partitioned(leaf):
            alone.append((i,))
        else:
            size = leaf.size if one_pool else (leaf.size - 1).bit_length()  # up to a power of two
            alike.setdefault((leaf.dtype, _varying(leaf), size), []).append(i)
    for (*kind, _), group in alike.items():
        for bundle in joined(group, _GROUP):
            if one_pool and len(bundle) < _GROUP:
                left.setdefault(tuple(kind), []).extend(bundle)
            else:
                joint.append(bundle)
    for group in left.values():
        joint += joined(group, _MIXED_GROUP)
    return (*alone, *joint)


def join(leaves: Sequence[Array], *, one_pool: bool) -> Array:
    """Leaves of one dtype as one array; a single one that jit may split keeps its axes.

    Those of one pool become a vector. Those of several are the columns of a matrix, and filled up with zeros if their
    sizes differ.
    """
    if len(leaves) == 1 and _may_be_partitioned(leaves[0]):
        return leaves[0]
    if one_pool and not are_tiny_and_alike(leaves):
        return lax.concatenate([lax.reshape(leaf, (leaf.size,)) for leaf in leaves], 0)
    # XLA:CPU copies columns in loops; copies of tiny rows LLVM would write out, and take its time to put in order.
    columns = [lax.reshape(leaf, (leaf.size, 1)) for leaf in leaves]
    length = max(leaf.size for leaf in leaves)
    columns = [c if len(c) == length else jnp.pad(c, ((0, length - len(c)), (0, 0))) for c in columns]
    joined = lax.concatenate(columns, 1)
    return lax.reshape(joined, (joined.size,)) if one_pool else joined


def are_tiny_and_alike(leaves: Sequence[Array]) -> bool:
    """Whether these are several leaves of one size, not larger than what LLVM copies without a loop."""
    return len(leaves) > 1 and len({leaf.size for leaf in leaves}) == 1 and leaves[0].size <= _TINY


def part(columns: Array, leaves: Sequence[Array]) -> list[Array]:
    """The columns of what `join` made of leaves of one size, in the shapes of these."""
    parts = lax.split(columns, [1] * len(leaves), axis=1)
    return [lax.reshape(column, leaf.shape) for column, leaf in zip(parts, leaves, strict=True)]


# ---------------------------------------------------------------------------------------------------------------- sums


def _sum_of(terms: Callable[..., Array], axes: Sequence[int], x: Array, *others: Array) -> Array:
    """The sum over axes of `terms(x, *others)`, an elementwise function.

    The others have the rank of x, and along each axis size 1 or that of x. XLA:CPU adds up one axis in blocks of 32
    terms, but several in blocks of 32 along each of them: 1024 or 32768 terms one by one, and the sum of equal numbers
    is off by 1e-5. So neighbouring axes become one, and axes that are no neighbours are added up one after the other.
    What is split over devices is left as it is: merged it would be gathered, and partial sums would be sent.
    """
    if sum(x.shape[a] > 1 for a in axes) < 2 or _may_be_partitioned(x):
        return lax.reduce_sum(terms(x, *others), axes)
    extended = [a for a in range(x.ndim) if x.shape[a] != 1]
    groups = [(summed, tuple(group)) for summed, group in groupby(extended, axes.__contains__)]
    # The arrays are reshaped, not the terms, since XLA undoes a reshape right before a sum.
    merged = [[math.prod(array.shape[a] for a in group) for _, group in groups] for array in (x, *others)]
    total = terms(*(array.reshape(sizes) for array, sizes in zip((x, *others), merged, strict=True)))
    last, *rest = [k for k, (summed, _) in reversed([*enumerate(groups)]) if summed]
    total = lax.reduce_sum(total, [last])
    for k in rest:
        total = lax.reduce_sum(cpu_barrier(total), [k])  # or XLA makes one sum of both
    return total.reshape([n for a, n in enumerate(x.shape) if a not in axes])


def _sum_squares(x: Array, axes: Sequence[int], dtype: np.dtype[Any], scale: Array | None) -> Array:
    def square(part: Array, *scale: Array) -> Array:
        if not scale:
            return lax.square(part)
        scaled = times(part, *scale)
        # The size of it: of a constant, XLA before that of jax 0.12 would make (x x)(scale scale) of a bare square.
        return lax.square(lax.max(scaled, lax.neg(scaled)))

    def squares(x: Array, *scale: Array) -> Array:
        return reduce(jnp.add, [square(part, *scale) for part in real_parts(x, dtype)])

    return _sum_of(squares, axes, x, *([] if scale is None else [lax.expand_dims(scale, axes)]))


def _sums(plan: Plan, joined: Sequence[Sequence[Array]], scales: PerPool | None) -> PerPool:
    """The sums of squares of all pools, over all devices, of `_joined` leaves multiplied by the scale of their pool.

    Axes are not kept: XLA:CPU computes one by one what has a last axis of size 1.
    """
    given = [None] * len(joined) if scales is None else scales.values
    return PerPool(tuple(map(partial(_sum_slot, plan), plan.slots, joined, given)), plan.slots)


def _joined(plan: Plan, leaves: Sequence[Array]) -> list[list[Array]]:
    """For each slot its bundles, each joined into one array; the leaf itself for a slot with axes."""

    def joined(slot: Slot, bundle: tuple[int, ...]) -> Array:
        members = [leaves[i] for i in bundle]
        return join(members, one_pool=slot.is_one_pool) if slot.axes is None else members[0]

    return [[joined(slot, bundle) for bundle in slot.bundles] for slot in plan.slots]


def _sum_slot(plan: Plan, slot: Slot, arrays: Sequence[Array], scale: Array | None) -> Array:
    if slot.axes is not None or not slot.is_one_pool:
        axes = (0,) if slot.axes is None else slot.axes  # those of a leaf, or the columns of the one bundle
        return plan.mapped[slot.bundles[0][0]].psum(_sum_squares(arrays[0], axes, plan.dtype, scale))
    by_way: dict[Mapped, list[Array]] = {}
    for bundle, array in zip(slot.bundles, arrays, strict=True):
        total = _sum_squares(array, range(array.ndim), plan.dtype, scale)
        by_way.setdefault(plan.mapped[bundle[0]], []).append(total)
    sums = [way.psum(_add_up(totals)) for way, totals in by_way.items()]
    return reduce(jnp.add, sums, *([] if sums else [jnp.zeros((), plan.dtype)]))


def _add_up(parts: Sequence[Array]) -> Array:
    """The sum of numbers, none of which is negative.

    XLA rewrites a bare sum of a concatenation into a chain of additions, all in one fusion, and compiling that takes
    time quadratic in the number of leaves. The maximum with 0 changes nothing and prevents it.
    """
    return jnp.sum(jnp.maximum(jnp.stack(parts), 0))


@custom_vmap
def _all_in_batch(flags: list[Array]) -> Array:
    """Whether all flags are set, and under vmap those of all examples: so it stays one.

    A `cond` on one flag stays a branch, where a flag for each example would make it both branches and a select.
    """
    alike: dict[Any, list[Array]] = {}
    for array in flags:
        alike.setdefault(jax.typeof(array), []).append(array)
    all_of = [reduce(lax.bitwise_and, group) for group in alike.values()]
    return reduce(lax.bitwise_and, [lax.reduce_and(each, range(each.ndim)) for each in all_of])


@_all_in_batch.def_vmap
def _(axis_size: int, in_batched: list[Any], flags: list[Array]) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _all_in_batch(flags), False


# ------------------------------------------------------------------------------------------------------------ the root


def make_plan(
    leaves: Sequence[Array],
    pools: Sequence[Pool],
    *,
    epsilon: float = 0.0,
    mapped: Mapped = UNMAPPED,
    result_dtype: Any = np.float32,
) -> Plan:
    """The plan of `root_mean_square(plan, leaves)`; made where the leaves are, since it looks at how they vary.

    result_dtype: the dtype of what is computed with the root, which is not to be less exact than that.
    """
    over = tuple(mapped.over(leaf) for leaf in leaves)

    def size(pool: Pool) -> float:
        shapes = [
            leaves[i].shape if pool.axes is None else [leaves[i].shape[a] for a in pool.axes] for i in pool.members
        ]
        return float(max(1, sum(math.prod(s) * over[i].shards() for i, s in zip(pool.members, shapes, strict=True))))

    def bundled(positions: Sequence[int], *, one_pool: bool) -> tuple[tuple[int, ...], ...]:
        by_way = [[i for i in positions if over[i] == way and leaves[i].size] for way in dict.fromkeys(over)]
        return tuple(bundle for positions in by_way for bundle in bundles(leaves, positions, one_pool=one_pool))

    slots: list[Slot] = []
    single: dict[int, int] = {}  # from a leaf to the pool that has nothing else
    for p, pool in enumerate(pools):
        if pool.axes is not None:
            slots.append(Slot((p,), pool.axes, (pool.members,)))
        elif len(pool.members) == 1 and leaves[pool.members[0]].size:
            single[pool.members[0]] = p
        else:
            slots.append(Slot((p,), None, bundled(pool.members, one_pool=True)))
    slots += [
        Slot(tuple(single[i] for i in bundle), None, (bundle,)) for bundle in bundled(list(single), one_pool=False)
    ]
    dtype = accumulator_dtype(result_dtype, *(leaf.dtype for leaf in leaves))
    return Plan(tuple(slots), epsilon, dtype, over, tuple(map(size, pools)))


def _sizes(plan: Plan) -> PerPool:
    return in_slots(plan.slots, [plan.dtype.type(size) for size in plan.sizes], np.stack)


def _guarded_roots(plan: Plan, leaves: Sequence[Array], counts: PerPool) -> PerPool:
    """The root of each pool, without the axes: from the naive sums, unless some sum left the safe window."""
    # Behind a barrier, or XLA would store float32 copies and squares, to share them with what follows.
    joined = cpu_barrier(_joined(plan, leaves))
    naive = _sums(plan, joined, None)

    def naive_roots(joined: list[list[Array]], naive: PerPool, counts: PerPool) -> PerPool:
        del joined
        return jax.tree.map(lambda total, count: lax.sqrt(total / count + plan.epsilon), naive, counts)

    if all(_squares_fit(leaf.dtype, plan.dtype) for leaf in leaves):
        return naive_roots(joined, naive, counts)
    low, high, scale = _window(plan.dtype)
    sizes, one = _sizes(plan), plan.dtype.type(1)
    outweighed = plan.epsilon >= 1e8 * low  # by epsilon, whatever underflowed

    def pick(total: Array, size: Any, below: Array, inside: Array, above: Array) -> Array:
        if not outweighed:
            inside = lax.select(lax.ge(total, low * size), inside, below)
        return lax.select(lax.lt(total, high), inside, above)  # NaN goes above, and stays NaN

    def at(value: np.floating[Any], naive: PerPool) -> PerPool:
        return jax.tree.map(lambda total: lax.full_like(total, value), naive)

    def scales_of(naive: PerPool) -> PerPool:
        return jax.tree.map(pick, naive, sizes, *(at(value, naive) for value in (scale, one, 1 / scale)))

    def rescaled_roots(joined: list[list[Array]], naive: PerPool, counts: PerPool) -> PerPool:
        scales = scales_of(naive)
        return jax.tree.map(partial(_root, plan), _sums(plan, joined, scales), scales, counts)

    def branch(joined: list[list[Array]], naive: PerPool, counts: PerPool) -> PerPool:
        """Read the leaves again only if some sum demands it."""
        fit = _all_in_batch([lax.eq(s, one) for s in scales_of(naive).values])
        return lax.cond(fit, naive_roots, rescaled_roots, joined, naive, counts)

    def all_scales(joined: list[list[Array]], naive: PerPool, counts: PerPool) -> PerPool:
        """Three sums in one reading of the leaves, and no branch: no more traffic for an accelerator, and no sync."""
        small, large = (_sums(plan, joined, at(value, naive)) for value in (scale, 1 / scale))
        sums = jax.tree.map(pick, naive, sizes, small, naive, large)
        return jax.tree.map(partial(_root, plan), sums, scales_of(naive), counts)

    if len(leaves) == 1:  # an array may be measured hundreds of times in a step, a tree is measured once
        return lax.platform_dependent(joined, naive, counts, cpu=branch, default=all_scales)
    return branch(joined, naive, counts)


def _root(plan: Plan, total: Array, scale: Array, count: Any) -> Array:
    """sqrt(total/count + epsilon) of a sum that was taken with a scale."""
    mean = total / count
    root = lax.sqrt(mean + in_order(scale, jnp.asarray(plan.epsilon), scale) if plan.epsilon else mean)
    # The RMS of numbers at the top of the range is in the range: do not let the last rounding carry it beyond.
    # A root of numbers that were scaled up is far below.
    largest = lax.mul(lax.min(scale, plan.dtype.type(0.5)), jnp.finfo(plan.dtype).max)
    return lax.div(lax.select(lax.is_finite(root), lax.min(root, largest), root), scale)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def root_mean_square(plan: Plan, leaves: Sequence[Array], counts: PerPool | None = None) -> PerPool:
    """rho = sqrt(mean(|x|^2) + epsilon) of each pool of the plan.

    counts: what the sums are divided by, at least 1, where that is not the number of elements (masks).
    The derivative is mean(Re(conj(x) dx))/rho, and 0 where rho = 0.
    """
    counts = _sizes(plan) if counts is None else counts.change_axes(lax.squeeze)
    return _guarded_roots(plan, leaves, counts).change_axes(lax.expand_dims)


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
    """The derivative of `root_mean_square` along the tangents in `moving`: mean(Re(conj(x/rho) dx)), linear in dx."""
    counts = _sizes(plan) if counts is None else counts

    def of_pool(slot: Slot, pool: int, root: Array, count: Any) -> Array:
        products = [
            along(leaves[i], root, moving[i], slot.axes, plan.mapped[i], count)
            for i in slot.members(pool)
            if i in moving
        ]
        return in_order(_sum_of_all(products, root), _inverse_root(count, root.dtype))

    def of_slot(slot: Slot, roots: Array, counts: Any) -> Array:
        if slot.is_one_pool:
            return of_pool(slot, slot.pools[0], roots, counts)
        return jnp.stack([of_pool(slot, *entry) for entry in zip(slot.pools, roots, counts, strict=True)])

    return PerPool(tuple(map(of_slot, plan.slots, roots.values, counts.values)), plan.slots)


def _sum_of_all(terms: Sequence[Array], like: Array) -> Array:
    """The sum of arrays; behind a barrier, for the reason that `_add_up` has a maximum: it is not linear."""
    if len(terms) < 2:
        return terms[0] if terms else jnp.zeros_like(like)
    return jnp.sum(lax.optimization_barrier(jnp.stack(terms)), 0)


def _inverse_root(count: Any, dtype: Any) -> Array:
    return 1 / jnp.sqrt(jnp.asarray(count, dtype))


def direction(x: Array, root: Array, count: Any) -> Array:
    """v = x/(root sqrt(count)): of the length 1, if root is the RMS norm of x and nothing else; linear in x.

    Derivatives go along v, by v.dx: no sum on the way is larger than the length of dx, nor one on the way back than
    that of the cotangent, and small terms are as far from underflow as that allows.
    """
    return times(divide4(x, root), _inverse_root(count, root.dtype) / 4)


def along(x: Array, root: Array, t: Array, axes: Sequence[int] | None, mapped: Mapped, count: Any) -> Array:
    """Re(v.t), the sum over axes, kept with size 1, of conj(v) t with v = direction(x, root, count); linear in t.

    Without axes the sum of all, as a number.
    """
    shape = [1] * x.ndim if axes is None else root.shape

    def products(x: Array, root: Array, t: Array, count: Array) -> Array:
        pairs = zip(real_parts(x, root.dtype), real_parts(t, root.dtype), strict=True)
        return reduce(jnp.add, [direction(part, root, count) * tangent for part, tangent in pairs])

    count = jnp.broadcast_to(jnp.asarray(count, root.dtype), root.shape).reshape(shape)
    total = _sum_of(products, range(x.ndim) if axes is None else axes, x, root.reshape(shape), t, count)
    return mapped.psum(total if axes is None else lax.expand_dims(total, axes))
