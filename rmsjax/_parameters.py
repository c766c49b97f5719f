"""Parameters in training: the size of each and of its change, and what its change alone does to every activation.

A parameter is a leaf of the tree, or one layer of a leaf that a loop over layers has stacked.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rmsjax._operator_norm import partitioned_by_xla
from rmsjax._reduce import lifted
from rmsjax._tags import blank
from rmsjax._tree import leaf_paths, tree_rms

_POWERS = 8  # of the power iteration: exponents of the width need few digits


class Parameter(NamedTuple):
    name: str
    leaf: int  # its number in the tree
    layer: int | None  # its index in a stacked leaf
    in_axes: int | None  # how many of its axes, the first ones, are multiplied by the input; None if it is no matrix


def parameters(params: Any, activations: Mapping[str, Any]) -> list[Parameter]:
    """The parameters of a tree; activations, with the axes (*loops, examples, elements), tell which are stacked."""
    found: list[Parameter] = []
    for k, (path, leaf) in enumerate(zip(leaf_paths(params), jax.tree.leaves(params), strict=True)):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact) or not leaf.size:
            continue
        parts = path.split("/")
        stacked = _is_stacked(parts, leaf, activations)
        rank = leaf.ndim - stacked
        matrix = rank >= 2 and parts[-1] != "embedding"
        # Projections to the heads of an attention are the only kernels of Flax with several axes for the output.
        heads = rank == 3 and len(parts) > 1 and parts[-2] in ("query", "key", "value")
        in_axes = (1 if heads else rank - 1) if matrix else None
        if stacked:
            found += [Parameter(f"{path}[{layer}]", k, layer, in_axes) for layer in range(leaf.shape[0])]
        else:
            found.append(Parameter(path, k, None, in_axes))
    return found


def _is_stacked(parts: list[str], leaf: Any, activations: Mapping[str, Any]) -> bool:
    for n in range(len(parts) - 1, 0, -1):
        inside = activations.get("/".join(parts[:n]))
        if inside is not None:
            return inside.ndim == 3 and leaf.ndim > 1 and inside.shape[0] == leaf.shape[0]
    return False


def sizes(chosen: list[Parameter], trees: Sequence[Any]) -> list[OrderedDict[str, Array]]:
    """The RMS operator norm of each matrix of each tree, and the RMS norm of all else, by name."""
    arrays = [_of(p, leaves) for leaves in map(jax.tree.leaves, trees) for p in chosen]
    norms = tree_rms(arrays, "block")
    rows = {k: p.in_axes for k, p in enumerate(chosen * len(trees)) if p.in_axes is not None}

    def gains(matrices: list[Array]) -> list[Array]:
        """Those of matrices of the same shape share a loop, since compiling it is what this costs."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, (x, in_axes) in enumerate(zip(matrices, rows.values(), strict=True)):
            alike[math.prod(x.shape[:in_axes]), math.prod(x.shape[in_axes:]), x.dtype].append(i)
        found = list(matrices)
        for (*shape, _), members in alike.items():
            stack = _gains(jnp.stack([matrices[i].reshape(shape) for i in members]))
            for i, gain in zip(members, stack, strict=True):
                found[i] = gain
        return found

    scaled = [arrays[k] / jnp.where(norms[k] > 0, norms[k], 1).astype(arrays[k].dtype) for k in rows]
    for k, gain in zip(rows, partitioned_by_xla(gains, scaled) if rows else [], strict=True):
        norms[k] = norms[k] * gain
    names = [p.name for p in chosen]
    ends = [k * len(names) for k in range(len(trees) + 1)]
    return [OrderedDict(zip(names, norms[i:j], strict=True)) for i, j in itertools.pairwise(ends)]


def _of(parameter: Parameter, leaves: list[Array]) -> Array:
    leaf = leaves[parameter.leaf]
    return lifted(leaf if parameter.layer is None else leaf[parameter.layer])


def _gains(matrices: Array) -> Array:
    """The RMS operator norms of matrices [matrices, in, out], whose elements are neither large nor small.

    By power iteration: of a random matrix it finds some percent too little, at every width.
    """

    def multiply(x: Array, y: Array, axis: int) -> Array:
        return lax.dot_general(x, y, (((1,), (axis,)), ((0,), (0,))))

    def power(_: Any, x: Array) -> Array:
        return _unit(multiply(_unit(multiply(x, matrices, 1)), matrices.conj(), 2))

    start = jnp.asarray(np.random.default_rng(0).normal(size=matrices.shape[1]), matrices.dtype)
    x = lax.fori_loop(0, _POWERS, power, _unit(jnp.broadcast_to(start, matrices.shape[:2])))
    return _plain_rms(multiply(x, matrices, 1))[:, 0]


def _unit(x: Array) -> Array:
    norm = _plain_rms(x)
    return x / jnp.where(norm > 0, norm, 1).astype(x.dtype)


def _plain_rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(jnp.abs(x)), -1, keepdims=True))


def first_moves(start: Any, moved: Any, grads: Any, before: Any, after: Any) -> Any:
    """Each leaf moved from the start as it is moved by the first step in which it has a gradient.

    Before that a parameter may move as well: weight decay does not wait for a gradient.
    """

    def first(start: Array, moved: Array, grad: Array, before: Array, after: Array) -> Array:
        now = jnp.where(jnp.any(grad != 0), start + (after - before), start)
        return jnp.where(jnp.any(moved != start), moved, now)

    return jax.tree.map(first, start, moved, grads, before, after)


def descents(chosen: list[Parameter], grads: Any, before: Any, after: Any) -> Array:
    """Of the gradient g of each parameter and its step s, before - after: g.s, g.g and s.s, [3, parameters].

    g.s is by how much the loss falls, to first order; JAX has the gradient of a complex parameter conjugated.
    """
    grads, before, after = map(jax.tree.leaves, (grads, before, after))

    def products(p: Parameter) -> Array:
        g, step = _of(p, grads), _of(p, before) - _of(p, after)
        found = [jnp.sum(jnp.real(g * step)), *(jnp.sum(jnp.square(jnp.abs(x))) for x in (g, step))]
        return jnp.stack(found).astype(jnp.zeros(()).dtype)

    return jnp.stack([products(p) for p in chosen], 1)


def effects(
    chosen: list[Parameter],
    activations_of: Callable[[Any], Any],
    norms_of_change: Callable[[Any, Any], OrderedDict[str, Array]],
    start: Any,
    moved: Any,
) -> OrderedDict[str, Array]:
    """By how much activations change if one parameter alone is as moved: for each activation [parameters, *loops]."""
    leaves, treedef = jax.tree.flatten(start)
    others = jax.tree.leaves(moved)
    units = jnp.asarray([(-1, -1), *((p.leaf, -1 if p.layer is None else p.layer) for p in chosen)])

    def with_one(unit: Array) -> Any:
        def chosen_in(k: int, x: Array) -> Array:
            leaf, layer = unit
            layers = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1)) if x.ndim else layer
            return (leaf == k) & ((layer < 0) | (layers == layer))

        return treedef.unflatten([jnp.where(chosen_in(k, x), others[k], x) for k, x in enumerate(leaves)])

    def run(first: Any, unit: Array) -> tuple[Any, Any]:
        now = activations_of(with_one(unit))
        # As in training, the first is that of the same program: what is not reached changes by 0, not by rounding.
        first = jax.tree.map(lambda new, old: jnp.where(unit[0] < 0, new, old), now, first)
        return first, norms_of_change(now, first)

    _, norms = lax.scan(run, blank(jax.eval_shape(activations_of, start)), units)
    return jax.tree.map(lambda x: x[1:], norms)
