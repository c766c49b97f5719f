"""Pools of leaves: the root of the mean square of each, and leaves scaled by a number of their pool.

A pool is what shares a norm: some leaves of a tree, or the slices of one leaf along some of its axes. The sums of
squares of all leaves are taken bundle by bundle, and go from there into one vector with an entry for each pool; only a
pool with axes has an array of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from rmsjax._reduce import (
    Mapped,
    Range,
    along,
    cpu_barrier,
    divide4,
    divisor,
    four_over,
    hold,
    in_order,
    inverse_root,
    is_known,
    lift,
    range_of,
    recomputed,
    root_of_sums,
    sums_of_squares,
    times,
    varying,
)


class Pool(NamedTuple):
    """Elements whose squares are averaged together.

    `axes=None` pools every element of all `members` (positions in the list of leaves) into a scalar; otherwise the one
    member is reduced over `axes`, which are kept with size 1.
    """

    members: tuple[int, ...]
    axes: tuple[int, ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerPool:
    """A number, or an array of them, for each pool.

    `places` says of each value which pools have it: one pool with axes an array, others, whose numbers vary over the
    same mapped axes, a vector with an entry for each.
    """

    values: tuple[Any, ...]
    places: tuple[tuple[int, ...], ...] = field(metadata={"static": True})

    def entries(self, pools: Sequence[Pool]) -> list[Any]:
        """The values one by one, in the order of the pools."""
        found: dict[int, Any] = {}
        for value, place in zip(self.values, self.places, strict=True):
            entries = [value] if pools[place[0]].axes is not None else _unstacked(value)
            found |= zip(place, entries, strict=True)
        return [found[pool] for pool in range(len(found))]


@jax.custom_jvp
@jax.jit  # traced once for each length
def _unstacked(values: Array) -> list[Array]:
    """The entries of a vector, by indices that compilers do not know.

    XLA compiles what is alike once, such as the scaling of all leaves of one shape. An index that is known would be
    part of each, and make them differ.
    """
    if len(values) == 1:
        return [lax.squeeze(values, [0])]
    indices = lax.optimization_barrier([jnp.uint32(k) for k in range(len(values))])
    return [lax.squeeze(lax.dynamic_slice(values, [k], [1]), [0]) for k in indices]


@_unstacked.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[list[Array], list[Array]]:
    """By indices that are known: on the way back, slices then make one vector without an addition for each."""
    return _unstacked(*primals), list(jnp.unstack(*tangents))


class Plan(NamedTuple):
    """What is static about the norms of some pools."""

    pools: tuple[Pool, ...]
    places: tuple[tuple[int, ...], ...]
    mapped: tuple[Mapped, ...]  # for each leaf, the mapped axes that it is summed over
    span: Range


_SMALL = 70_000  # elements of a leaf, of which a GPU reads several at once
_STACKED = 16  # leaves, read at once
_PLACE, _KEPT = 32, 2**23  # pools with one vector, and the elements of all of them: 32 MB, which a chip keeps


def make_plan(leaves: Sequence[Array], pools: tuple[Pool, ...], mapped: Mapped, *, bounded: bool = False) -> Plan:
    """The plan of `roots(plan, leaves)`; made where the leaves are, since it looks at how they vary.

    bounded: whether the leaves are quotients that no one sees, of which none is so large that squares overflow, and
    none that matters so small that they underflow.

    Pools of a leaf each have a vector for so many of one type: what is done with it is compiled once, and XLA:GPU
    (jax 0.12) puts what is done with its entries, and with the leaves, into few kernels. From one vector for all of
    them it would compile a kernel for each that it takes a number out of; and what was read for these norms is to be
    still on the chip when it is scaled by them.
    """
    over = tuple(map(mapped.of, leaves))
    alike: dict[Any, list[int]] = {}
    for p, pool in enumerate(pools):
        kind: Any = p
        if pool.axes is None and len(pool.members) == 1:
            (i,) = pool.members
            kind = (jax.typeof(leaves[i]), over[i])
        elif pool.axes is None:
            kind = frozenset[str]().union(*(varying(leaves[i]) - {*over[i].names} for i in pool.members))
        alike.setdefault(kind, []).append(p)
    places = [
        tuple(group[k : k + most])
        for kind, group in alike.items()
        for most in [len(group) if isinstance(kind, frozenset) else _most_in_place(leaves, pools[group[0]])]
        for k in range(0, len(group), most)
    ]
    span = range_of(*(leaf.dtype for leaf in leaves))
    return Plan(pools, tuple(places), over, span._replace(fits=True, computed=True) if bounded else span)


def _most_in_place(leaves: Sequence[Array], like: Pool) -> int:
    """How many pools of a leaf each, of the type of this one, share a vector."""
    (i,) = like.members
    size = leaves[i].size
    return max(1, min(_PLACE, _KEPT // max(size, 1))) if is_known(size) else _PLACE


def _is_small(leaf: Array, limit: int) -> bool:
    return is_known(leaf.size) and leaf.size <= limit


def counts(plan: Plan, leaves: Sequence[Array]) -> list[Any]:
    """What the sums in each place are divided by: the number of elements of the pool, over all devices."""

    def count(pool: Pool) -> Any:
        shapes = (
            leaves[i].shape if pool.axes is None else [leaves[i].shape[a] for a in pool.axes] for i in pool.members
        )
        return divisor(
            sum(math.prod(s) * plan.mapped[i].shards() for i, s in zip(pool.members, shapes, strict=True)),
            plan.span.dtype,
        )

    def of_place(place: tuple[int, ...]) -> Any:
        if plan.pools[place[0]].axes is not None:
            return count(plan.pools[place[0]])
        found = [count(plan.pools[p]) for p in place]
        return jnp.stack(found) if any(isinstance(n, Array) for n in found) else np.stack(found)

    return [of_place(place) for place in plan.places]


# --------------------------------------------------------------------------------------------------------------- sums


def _bundles(plan: Plan, leaves: Sequence[Array], members: Sequence[int], on: str) -> list[list[int]]:
    """Which leaves to sum up together: those of one type, as far as they are small.

    Compilers spend their time by reduction, and a GPU one kernel or two, however little there is to add up. Leaves are
    stacked in their own shape: to flatten what is split over devices, or what a TPU has in tiles, is to copy it.
    """
    alike: dict[Any, list[int]] = {}
    for i in members:
        # A GPU reads a stack without making it, which others do not.
        is_small = _is_small(leaves[i], _SMALL if on == "cuda" else 4096)
        alike.setdefault((jax.typeof(leaves[i]), plan.mapped[i]) if is_small else i, []).append(i)
    return [
        group[k : k + most]
        for group in alike.values()
        for most in [4 * _STACKED if _is_small(leaves[group[0]], 4096) else _STACKED]
        for k in range(0, len(group), most)
    ]


def _sums(plan: Plan, leaves: Sequence[Array], factors: list[Any], dtype: Any, on: str) -> list[list[Array]]:
    """The sums of squares in each place for each factor, as `root_of_sums` wants them."""
    found: list[list[Array]] = [[] for _ in factors]
    for k, place in enumerate(plan.places):
        given = [factor[k] if isinstance(factor, list) else factor for factor in factors]
        pool = plan.pools[place[0]]
        if pool.axes is None:
            totals = _sums_of_place(plan, leaves, place, given, dtype, on)
        else:
            (i,) = pool.members
            totals = [plan.mapped[i].psum(total) for total in sums_of_squares(leaves[i], pool.axes, dtype, given, on)]
        for of_factor, total in zip(found, totals, strict=True):
            of_factor.append(total)
    return found


def _sums_of_place(
    plan: Plan, leaves: Sequence[Array], place: tuple[int, ...], factors: list[Any], dtype: Any, on: str
) -> list[Array]:
    """For each factor the vector of the sums of pools without axes."""
    owner = {i: k for k, p in enumerate(place) for i in plan.pools[p].members if leaves[i].size != 0}
    known = tuple(factor for factor in factors if not isinstance(factor, Array))
    varied = [_unstacked(factor) for factor in factors if isinstance(factor, Array)]
    by_way: dict[Mapped, list[tuple[Any, list[Array]]]] = {}
    for bundle in _bundles(plan, leaves, list(owner), on):
        owners = [owner[i] for i in bundle]
        given = [[entries[k] for k in owners] for entries in varied]
        sums = _sums_of_bundle([leaves[i] for i in bundle], given, known, dtype, on)
        by_way.setdefault(plan.mapped[bundle[0]], []).append((owners, sums))
    totals = [jnp.zeros(len(place), dtype)] * len(factors) if not by_way else []
    for way, bundles in by_way.items():
        owners = np.array([k for owned, _ in bundles for k in owned])
        joined = [jnp.concatenate(parts) for parts in zip(*(sums for _, sums in bundles), strict=True)]
        if on != "cpu" and len(place) > 1 and len(bundles) > 1:
            joined = hold(joined)  # XLA:GPU would put them together again for each entry, in a kernel of its own
        summed = [way.psum(_pooled(sums, owners, len(place))) for sums in joined]
        totals = [a + b for a, b in zip(totals, summed, strict=True)] if totals else summed
    return totals


@partial(jax.jit, static_argnums=(2, 3, 4))  # so that leaves of one type are traced once
def _sums_of_bundle(
    leaves: list[Array], factors: list[Any], known: tuple[Any, ...], dtype: Any, on: str
) -> list[Array]:
    """For each factor, of those that are `known` first, the vector of the sums of some leaves of one type."""
    # XLA:CPU copies columns in loops; copies of tiny rows LLVM would write out, and take its time to put in order.
    at = leaves[0].ndim if on == "cpu" and _is_small(leaves[0], 64) else 0
    x = lax.expand_dims(leaves[0], [at]) if len(leaves) == 1 else jnp.stack(leaves, at)
    rest = [a for a in range(x.ndim) if a != at]
    return sums_of_squares(x, rest, dtype, [*known, *map(jnp.stack, factors)], on)


def _pooled(sums: Array, owners: Any, count: int) -> Array:
    """The vector of the sums of those that each of so many pools owns.

    XLA rewrites a bare sum of a concatenation into a chain of additions, all in one fusion, and compiling that takes
    time quadratic in the number of leaves. The maximum with 0 changes nothing and prevents it.
    """
    sums = jnp.maximum(sums, 0)
    if count == 1:
        return jnp.sum(sums, keepdims=True)
    if np.array_equal(owners, np.arange(count)):
        return sums
    return jnp.stack([jnp.sum(sums[np.flatnonzero(owners == k)]) for k in range(count)])


# -------------------------------------------------------------------------------------------------------------- roots


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def roots(plan: Plan, leaves: Sequence[Array]) -> PerPool:
    """rho = sqrt(mean(|x|^2)) of each pool.

    The derivative is mean(Re(conj(x) dx))/rho, and 0 where rho = 0.
    """
    found = root_of_sums(plan.span, partial(_sums, plan), list(leaves), counts(plan, leaves))
    axes = [plan.pools[place[0]].axes or () for place in plan.places]
    return PerPool(tuple(map(lax.expand_dims, found, axes)), plan.places)


@partial(roots.defjvp, symbolic_zeros=True)
def _(plan: Plan, primals: Any, tangents: Any) -> tuple[PerPool, PerPool]:
    (leaves,), (given,) = primals, tangents
    found = roots(plan, leaves)
    moving = {i: t for i, t in enumerate(given) if not isinstance(t, SymbolicZero)}
    return found, along_roots(plan, leaves, found, moving)


@partial(recomputed, static_argnums=(0,))
def along_roots(plan: Plan, leaves: Sequence[Array], found: PerPool, moving: dict[int, Array]) -> PerPool:
    """The derivative of `roots` along the tangents in `moving`: mean(Re(conj(x/rho) dx)), linear in dx."""
    leaves, found = cpu_barrier((leaves, found))

    def of_pool(pool: Pool, rho: Array, count: Any) -> Array:
        terms: list[Array] = []
        for i in (i for i in pool.members if i in moving):
            ones = [1] * leaves[i].ndim
            axes, of_leaf = (tuple(range(leaves[i].ndim)), rho.reshape(ones)) if pool.axes is None else (pool.axes, rho)
            terms.append(
                plan.mapped[i].psum(_along_leaf(leaves[i], of_leaf, moving[i], axes, count).reshape(rho.shape))
            )
        return in_order(_added(terms, rho), inverse_root(count, rho.dtype))

    def of_place(value: Array, counts: Any, place: tuple[int, ...]) -> Array:
        pools = [plan.pools[p] for p in place]
        if pools[0].axes is not None:
            return of_pool(pools[0], value, counts)
        return jnp.stack([of_pool(*each) for each in zip(pools, jnp.unstack(value), counts, strict=True)])

    values = map(of_place, found.values, counts(plan, leaves), plan.places)
    return PerPool(tuple(values), plan.places)


_along_leaf = jax.jit(along, static_argnums=3)  # so that leaves of one type are traced once


def _added(terms: Sequence[Array], like: Array) -> Array:
    """The sum of numbers, or the only array; behind a barrier, as `_pooled` has a maximum, which is not linear."""
    if len(terms) < 2:
        return terms[0] if terms else jnp.zeros_like(like)
    return jnp.sum(hold(jnp.stack(terms)))


def excess(plan: Plan, leaves: Sequence[Array], near: PerPool) -> PerPool:
    """mean(|x|^2)/rho^2 - 1 of each pool, for a rho that is near its norm; 0 where rho is 0. No x + rho may overflow.

    As mean(Re(conj(x - rho) (x + rho)))/rho^2: what is added up is of both signs, and its rounding is in proportion to
    the small result. So it tells the norm from rho to more digits than a norm has.
    """
    less, more = (of_leaves(plan.pools, partial(_added_to, sign=sign), leaves, near) for sign in (-1, 1))
    along = along_roots(plan, less, near, dict(enumerate(more)))
    return jax.tree.map(lambda a, rho: a * (four_over(rho) / 4), along, near)


def _added_to(x: Array, rho: Array, sign: int) -> Array:
    wide = lift(x, rho.dtype)
    return wide + (sign * rho).astype(wide.dtype)


# ------------------------------------------------------------------------------------------------------------ rescaling


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


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def rescale(pools: tuple[Pool, ...], leaves: Sequence[Array], roots: PerPool, targets: PerPool) -> list[Array]:
    """Each leaf multiplied by target/root of its pool, in its own dtype.

    Where target = root a leaf comes back as it was, else where root = 0 as zeros. A root that is NaN or inf makes all
    of its pool non-finite or zero, so that nothing hides it.
    """
    return of_leaves(pools, _scaled, leaves, *_factors(roots, targets))


def _factors(roots: PerPool, targets: PerPool) -> tuple[PerPool, PerPool]:
    """The two numbers of `split_ratio` for each pool."""
    ratios = jax.tree.map(split_ratio, targets, roots)
    first, second = (jax.tree.map(lambda _, ratio, k=k: ratio[k], roots, ratios) for k in (0, 1))
    return first, second


def _product(x: Array, a: Array, b: Array) -> Array:
    """x a b, of which JAX is to see that it is linear in x; XLA is not to make x (a b) of it."""
    return times(in_order(lift(x, a.dtype), a), b).astype(x.dtype)


@jax.jit  # one operation for each leaf to trace
def _scaled(x: Array, a: Array, b: Array) -> Array:
    product = _product(x, a, b)
    # A selection beside the product: a step that changes nothing then need not write, if the leaves were donated.
    return jnp.where(b == 1, x, product) if b.ndim == 0 else product


def of_leaves(
    pools: tuple[Pool, ...], f: Callable[..., Array], leaves: Sequence[Array], *of_pools: PerPool
) -> list[Array]:
    """f(leaf, entries of its pool) of each leaf."""
    found = list(leaves)
    for pool, *entries in zip(pools, *(per_pool.entries(pools) for per_pool in of_pools), strict=True):
        for i in pool.members:
            found[i] = f(leaves[i], *entries)
    return found


@rescale.defjvp
def _(pools: tuple[Pool, ...], primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
    """d(x t/r) = dx t/r + 4x/r (dt - dr t/r)/4, multiplied in an order that stays in range."""
    leaves, roots, targets = primals
    dleaves, droots, dtargets = tangents

    factors = _factors(roots, targets)

    def change(a: Array, b: Array, droot: Array, dtarget: Array) -> Array:
        return (dtarget - in_order(droot, a, b)) / 4

    def moved(x: Array, root: Array, over: Array, by: Array) -> Array:
        return times(divide4(lift(x, root.dtype), root, over), by).astype(x.dtype)

    straight = of_leaves(pools, _product, dleaves, *factors)
    over, by = jax.tree.map(four_over, roots), jax.tree.map(change, *factors, droots, dtargets)
    aside = of_leaves(pools, moved, leaves, roots, over, by)
    return rescale(pools, leaves, roots, targets), jax.tree.map(jnp.add, straight, aside)
