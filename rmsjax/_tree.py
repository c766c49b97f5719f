"""Pytrees: one notion of scope, and the RMS norm of the elements that it pools.

`Scope` says which elements of a tree are measured together. All functions and transforms that take a tree share it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rmsjax import _pools
from rmsjax._boxes import key_paths, unboxed
from rmsjax._checks import as_axes, as_mapped, as_numeric
from rmsjax._pools import PerPool, Pool
from rmsjax._reduce import Mapped, accumulator_dtype, varying

if TYPE_CHECKING:
    from jaxtyping import PyTree, Real

Axes: TypeAlias = int | Sequence[int]
Scope: TypeAlias = Literal["global", "block"] | Axes | Callable[[str, Array], str | Axes]
"""How the elements of a tree are pooled; `tree_rms` says what each kind means."""


T = TypeVar("T")


class Grouping(NamedTuple):
    """A tree taken apart by a scope."""

    leaves: list[Array]
    treedef: Any
    pools: tuple[Pool, ...]
    is_global: bool
    bare: Any  # the structure of the tree without its boxes

    def tree(self, values: PerPool) -> Any:
        """The norm or count of each pool, at each leaf, without boxes; under scope "global" the one value by itself."""
        entries = [self._by_itself(v, pool) for v, pool in zip(values.entries(self.pools), self.pools, strict=True)]
        if self.is_global:
            return entries[0]
        found = {i: entry for pool, entry in zip(self.pools, entries, strict=True) for i in pool.members}
        return self.bare.unflatten([found[i] for i in range(len(found))])

    def whole(self) -> Grouping:
        """All leaves in one pool."""
        return self._replace(pools=(Pool(tuple(range(len(self.leaves)))),), is_global=True)

    def each(self, f: Callable[..., Array], *of_pools: PerPool) -> list[Array]:
        """f(leaf, entries of its pool) of each leaf."""
        return _pools.of_leaves(self.pools, f, self.leaves, *of_pools)

    def laid_out(self, values: Any, like: PerPool) -> PerPool:
        """Numbers in the layout and the dtypes of others: what `tree` has made, or norms of other leaves, of any dtype.

        The layout goes by the types of leaves, and parameters need not have those of their updates.
        """
        if isinstance(values, PerPool):
            entries = values.entries(self.pools)
        else:
            of_leaves = self.bare.flatten_up_to(values) if self.pools and not self.is_global else [values]
            entries = [of_leaves[0 if self.is_global else pool.members[0]] for pool in self.pools]

        def of_place(old: Array, place: tuple[int, ...]) -> Array:
            has_axes = self.pools[place[0]].axes is not None
            # Each in the dtype first: one float64 leaf need not be in each place.
            given = [entries[p].astype(old.dtype) for p in place]
            return given[0] if has_axes else jnp.stack(given)

        return PerPool(tuple(map(of_place, like.values, like.places)), like.places)

    def merged(self, values: PerPool, like: PerPool) -> PerPool:
        """In as few arrays as may be, for what is computed with them: compilers spend their time by operation.

        Those in one vector vary over the same mapped axes in `like`, which has the layout of the values.
        """
        alike: dict[Any, list[int]] = {}
        for k, (value, place) in enumerate(zip(like.values, like.places, strict=True)):
            alike.setdefault(k if self.pools[place[0]].axes is not None else varying(value), []).append(k)
        given = [[values.values[k] for k in ks] for ks in alike.values()]
        joined = tuple(arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays) for arrays in given)
        return PerPool(joined, tuple(tuple(p for k in ks for p in like.places[k]) for ks in alike.values()))

    def split(self, values: PerPool, like: PerPool) -> PerPool:
        """What `merged` has put together, in the layout that it had."""
        found: dict[tuple[int, ...], Array] = {}
        for value, place in zip(values.values, values.places, strict=True):
            parts = [part for part in like.places if part[0] in place]
            ends = np.cumsum([len(part) for part in parts])[:-1]
            found |= zip(parts, [value] if len(parts) == 1 else jnp.split(value, ends), strict=True)
        return PerPool(tuple(found[place] for place in like.places), like.places)

    def _by_itself(self, value: Array, pool: Pool) -> Array:
        """One float64 leaf makes all sums float64; the norm of a pool without such a leaf is still float32.

        For each number that is only taken out of a vector XLA:GPU (jax 0.12) has a kernel, but one for dozens that are
        computed. So the absolute value is taken, which a norm is already.
        """
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        value = value.astype(accumulator_dtype(*(self.leaves[i].dtype for i in pool.members)))
        return value if self.is_global or value.ndim else jnp.abs(value)


def leaf_paths(tree: Any, sep: str = "/") -> list[str]:
    """The path of each leaf as one string; boxes are no part of it."""
    return [jax.tree_util.keystr(path, simple=True, separator=sep) for path in key_paths(tree)]


def is_state(node: Any) -> bool:
    """Whether this is the state of one of rmsjax's transformations."""
    return isinstance(node, tuple) and hasattr(node, "norm_fields")


def check_scope(function: str, scope: Any) -> None:
    """An error for what is no scope of any tree."""
    expected = f"{function}: scope must be 'global', 'block', axes or a callable"
    if isinstance(scope, str):
        if scope not in ("global", "block"):
            close = difflib.get_close_matches(scope, ("global", "block"), n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{expected}, got {scope!r}{meant}")
    elif not callable(scope) and not isinstance(scope, (int, np.integer, tuple, list)):
        hint = "; under optax.inject_hyperparams name it in static_args" if isinstance(scope, jax.Array) else ""
        raise TypeError(f"{expected}, got {scope!r:.80}{hint}")


def group(function: str, tree: Any, scope: Scope, *, kind: Any = jnp.number, abstract: bool = False) -> Grouping:
    """The leaves of a tree, which may be shapes without data, and the pools that the scope makes of them."""
    given, treedef = jax.tree.flatten(tree)
    paths, bare = leaf_paths(tree), jax.tree.structure(unboxed(tree))
    leaves: list[Array] = []
    for path, leaf in zip(paths, given, strict=True):
        name = f"leaf {path!r}" if path else "the tree"
        leaves.append(as_numeric(function, name, leaf, kind=kind, hint=_leaf_hint(leaf), abstract=abstract))
    check_scope(function, scope)
    if isinstance(scope, str):
        everything = tuple(range(len(leaves)))
        pools = [Pool(everything)] if scope == "global" else [Pool((i,)) for i in everything]
        return Grouping(leaves, treedef, tuple(pools), scope == "global", bare)
    members: dict[Hashable, list[int]] = {}
    axes: dict[Hashable, tuple[int, ...]] = {}
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        choice: Any = scope(path, leaf) if callable(scope) else scope
        key: Hashable = i
        if isinstance(choice, str):
            key = i if choice == "block" else choice
        else:
            axes[i] = _scope_axes(function, choice, path, leaf, from_callable=callable(scope))
        members.setdefault(key, []).append(i)
    return Grouping(leaves, treedef, tuple(Pool(tuple(m), axes.get(k)) for k, m in members.items()), False, bare)


def _leaf_hint(leaf: Any) -> str:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return " A shape has no values: apply the function by jax.eval_shape."
    if jnp.issubdtype(getattr(leaf, "dtype", np.dtype(object)), jax.dtypes.prng_key):
        return " Random keys are not numbers: leave them out, for instance with nnx.state(model, nnx.Param)."
    cast = "Cast it, or" if hasattr(leaf, "dtype") or isinstance(leaf, (bool, int)) else "Numbers only:"
    return f" {cast} leave it out of the tree with optax.masked or None."


def _scope_axes(function: str, choice: Any, path: str, leaf: Array, *, from_callable: bool) -> tuple[int, ...]:
    try:
        if choice is None:
            raise TypeError(f"{function}: scope must give axes, 'block' or a label, got None")
        return as_axes(function, choice, leaf.shape, argument="scope axis")
    except (TypeError, ValueError) as error:
        hint = "" if from_callable else (
            "; a callable scope can choose for each leaf, such as "
            f"lambda path, leaf: {choice!r} if leaf.ndim > 1 else 'block'"
        )  # fmt: skip
        raise type(error)(f"{error} (leaf {path!r}){hint}") from None


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(grouping: Grouping, mapped: Mapped, *, bounded: bool = False) -> PerPool:
    """The norm of each pool; an array of norms, with the reduced axes kept, for a pool with axes.

    bounded: see `_pools.make_plan`.
    """
    return _measure(grouping.leaves, grouping.pools, mapped, bounded)


@partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _measure(leaves: Sequence[Array], pools: tuple[Pool, ...], mapped: Mapped, bounded: bool) -> PerPool:
    return _pools.roots(_pools.make_plan(leaves, pools, mapped, bounded=bounded), leaves)


def excess(grouping: Grouping, near: PerPool, mapped: Mapped) -> PerPool:
    """By what share the mean square of each pool is above the square of a number near its norm; see `_pools.excess`."""
    return _pools.excess(_pools.make_plan(grouping.leaves, grouping.pools, mapped), grouping.leaves, near)


def counts(grouping: Grouping, mapped: Mapped) -> PerPool:
    """The number of elements of each pool, over all devices; at least 1."""
    plan = _pools.make_plan(grouping.leaves, grouping.pools, mapped)
    return PerPool(tuple(_pools.counts(plan, grouping.leaves)), plan.places)


@overload
def tree_rms(
    tree: PyTree, scope: Literal["global"] = "global", *, axis_name: str | Sequence[str] | None = None
) -> Real[Array, ""]: ...


@overload
def tree_rms(
    tree: T,
    scope: Literal["block"] | Axes | Callable[[str, Array], str | Axes],
    *,
    axis_name: str | Sequence[str] | None = None,
) -> T: ...


def tree_rms(
    tree: PyTree, scope: Scope = "global", *, axis_name: str | Sequence[str] | None = None
) -> Real[Array, ""] | PyTree:
    r"""The RMS norms of the pools of a tree, $\sqrt{\sum_{l} \|x_l\|_2^2 / \sum_l n_l}$ over the leaves l of each pool.

    Every element counts once, whatever leaf it is in. Numerics, and the derivative at zero, are those of `rms`.

    Args:
        tree: any pytree of numeric arrays: parameters, gradients, an `nnx.State`. None and `optax.MaskedNode` hold no
            leaves and are passed over; leaves without elements contribute nothing. A box that says something about one
            array (`nnx.Param`, `nn.Partitioned`, a `NamedArray` of haliax) counts as that array, also in paths.
        scope: how the elements are pooled.
            - `"global"`: all elements of all leaves together.
            - `"block"`: each leaf by itself.
            - an int or a tuple of ints: each leaf is reduced over these axes and keeps the others, so a leaf of stacked
              layers [L, m, n] has one norm per layer under `(1, 2)`, a kernel [in, out] one per output unit under `0`.
            - a callable `(path, leaf)`, with a path such as "layers/0/kernel", that returns for each leaf `"block"`,
              axes, or a label of its own; leaves with the same label are pooled together.
        axis_name: under `shard_map` or `pmap`, the mapped axes that leaves are split over. Each leaf is summed only
            over those that it varies over, so replicated leaves count once; with `check_vma=False`, and under `pmap`,
            JAX does not know, and each leaf is summed over all of them.

    Returns:
        For "global" a scalar, else a tree of the same structure, but for boxes, in which each leaf is the norm of its
        pool: a scalar, or for axes an array with the reduced axes kept as size 1. float32 (float64 if the pool holds
        such leaves). A pool without elements has norm 0.

    Raises:
        TypeError: a leaf is not numeric, or the scope not of a known kind.
        ValueError: an unknown scope, or an axis that a leaf does not have; the message names the leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import tree_rms
        >>> grads = {"w": jnp.full((2, 3), 2.0), "b": jnp.zeros(2)}
        >>> print(tree_rms(grads))
        1.7320508
        >>> print({k: float(v) for k, v in tree_rms(grads, "block").items()})
        {'b': 0.0, 'w': 2.0}
        >>> print(tree_rms(grads, lambda path, leaf: 0 if leaf.ndim == 2 else "block")["w"])
        [[2. 2. 2.]]

    Source: the pooled form of Zhang and Sennrich (arXiv 1910.07467); "block" is optax's word for a leaf.
    """
    grouping = group("tree_rms", tree, scope)
    return grouping.tree(measure(grouping, as_mapped("tree_rms", axis_name)))


# ------------------------------------------------------------------------------------------------------------ rescaling


def rescale(grouping: Grouping, roots: PerPool, targets: PerPool) -> Any:
    """The tree with each leaf multiplied by target/root of its pool; see `_pools.rescale`."""
    return grouping.treedef.unflatten(_rescale(grouping.pools, grouping.leaves, roots, targets))


_rescale = jax.jit(_pools.rescale, static_argnums=0, inline=True)
