"""Parameters in training: the size of each and of its change, and what its change alone does to every activation.

A parameter is a leaf of the tree, or one layer of a leaf that a loop over layers has stacked.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

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
        parts = path.removesuffix("/value").split("/")
        name, stacked = "/".join(parts), _is_stacked(parts, leaf, activations)
        rank = leaf.ndim - stacked
        matrix = rank >= 2 and parts[-1] != "embedding"
        # Projections to the heads of an attention are the only kernels of Flax with several axes for the output.
        heads = rank == 3 and len(parts) > 1 and parts[-2] in ("query", "key", "value")
        in_axes = (1 if heads else rank - 1) if matrix else None
        if stacked:
            found += [Parameter(f"{name}[{layer}]", k, layer, in_axes) for layer in range(leaf.shape[0])]
        else:
            found.append(Parameter(name, k, None, in_axes))
    return found


def _is_stacked(parts: list[str], leaf: Any, activations: Mapping[str, Any]) -> bool:
    for n in range(len(parts) - 1, 0, -1):
        inside = activations.get("/".join(parts[:n]))
        if inside is not None:
            return inside.ndim == 3 and leaf.ndim > 1 and inside.shape[0] == leaf.shape[0]
    return False


def sizes(chosen: list[Parameter], trees: Sequence[Any]) -> list[OrderedDict[str, Array]]:
    """The RMS operator norm of each matrix of trees, and the RMS norm of all else, by name.

    All matrices share one power iteration; of a random matrix it finds some percent too little, at every width.
    """
    arrays = [_of(p, leaves) for leaves in map(jax.tree.leaves, trees) for p in chosen]
    norms = tree_rms(arrays, "block")
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for k, (p, x) in enumerate(zip(chosen * len(trees), arrays, strict=True)):
        if p.in_axes is not None:
            alike[math.prod(x.shape[: p.in_axes]), math.prod(x.shape[p.in_axes :])].append(k)
    for shape, members in alike.items():
        scale = jnp.stack([norms[k] for k in members])[:, None, None]
        stack = jnp.stack([arrays[k].reshape(shape) for k in members]).astype(scale.dtype)
        gains = _gains(stack / jnp.where(scale > 0, scale, 1))
        for k, gain in zip(members, gains, strict=True):
            norms[k] = norms[k] * gain
    names = [p.name for p in chosen]
    return [OrderedDict(zip(names, norms[i : i + len(names)], strict=True)) for i in range(0, len(norms), len(names))]


def _gains(matrices: Array) -> Array:
    """The RMS operator norms of matrices [matrices, in, out], whose elements are neither large nor small."""

    def multiply(x: Array, y: Array, axis: int) -> Array:
        return _unit(lax.dot_general(x, y, (((1,), (axis,)), ((0,), (0,)))))

    def power(_: Any, x: Array) -> Array:
        return multiply(multiply(x, matrices, 1), matrices.conj(), 2)

    start = np.random.default_rng(0).normal(size=matrices.shape[1])
    start = _unit(jnp.broadcast_to(jnp.asarray(start, matrices.dtype), matrices.shape[:2]))
    x = lax.fori_loop(0, _POWERS, power, start)
    return _plain_rms(lax.dot_general(x, matrices, (((1,), (1,)), ((0,), (0,)))))[:, 0]


def _unit(x: Array) -> Array:
    norm = _plain_rms(x)
    return x / jnp.where(norm > 0, norm, 1)


def _plain_rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.abs(x) ** 2, -1, keepdims=True))


def _of(parameter: Parameter, leaves: list[Array]) -> Array:
    leaf = leaves[parameter.leaf]
    return leaf if parameter.layer is None else leaf[parameter.layer]


def first_moves(start: Any, moved: Any, grads: Any, before: Any, after: Any) -> Any:
    """Each leaf moved from the start as it is moved by the first step in which it has a gradient.

    Before that a parameter may move as well: weight decay does not wait for a gradient.
    """

    def first(start: Array, moved: Array, grad: Array, before: Array, after: Array) -> Array:
        now = jnp.where(jnp.any(grad != 0), start + (after - before), start)
        return jnp.where(jnp.any(moved != start), moved, now)

    return jax.tree.map(first, start, moved, grads, before, after)


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
        leaf, layer = unit
        return treedef.unflatten([jnp.where(_picked(k, x, leaf, layer), others[k], x) for k, x in enumerate(leaves)])

    def _picked(k: int, x: Array, leaf: Array, layer: Array) -> Array:
        own = leaf == k
        if x.ndim == 0:
            return own
        rows = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))
        return own & ((layer < 0) | (rows == layer))

    def run(first: Any, unit: Array) -> tuple[Any, Any]:
        now = activations_of(with_one(unit))
        # As in training, the first is that of the same program: what is not reached changes by 0, not by rounding.
        first = jax.tree.map(lambda new, old: jnp.where(unit[0] < 0, new, old), now, first)
        return first, norms_of_change(now, first)

    _, norms = lax.scan(run, blank(jax.eval_shape(activations_of, start)), units)
    return jax.tree.map(lambda x: x[1:], norms)
