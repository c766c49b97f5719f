"""Boxes: nodes of a tree that hold one array and describe it, by how it is sharded or what its axes are called.

Flax boxes parameters (`nnx.Variable`, `nn.Partitioned`), haliax names their axes (`NamedArray`), others add units or
labels. What a box says is true of the array in it, and of nothing that is computed from that: the norm of a matrix has
neither its axes nor its sharding. So a box is no part of a path, a scope sees what is in it, and norms come without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.tree_util import FlattenedIndexKey, GetAttrKey, tree_flatten_with_path

_NO_BOXES = (Array, np.ndarray, np.generic, dict, list, tuple, int, float, complex, str, type(None))
_SAY_NOTHING = (GetAttrKey("value"), GetAttrKey("array"), GetAttrKey("data"))


def is_box(node: Any) -> bool:
    """Whether a node stands for the one array in it; a layer with one parameter, or a dict with one entry, does not.

    It does if Flax says so, if it has the dtype and the shape (or the number of axes) of the array, or if it is neither
    a function nor a container, has something to say besides the array, and no name for it that would say more than
    "value".
    """
    if isinstance(node, _NO_BOXES):
        return False
    if isinstance(node, _of_flax("flax.nnx", "Variable")):
        return True
    inside, treedef = tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    if len(inside) != 1 or not inside[0][0]:  # a leaf has no path
        return False
    ((key,), child) = inside[0]
    if isinstance(node, _of_flax("flax.core.meta", "AxisMetadata")):
        return True
    array = unboxed(child)
    if not jax.tree_util.all_leaves([array]):
        return False
    if _looks_like(node, array):
        return True
    is_nameless = isinstance(key, FlattenedIndexKey) or key in _SAY_NOTHING
    return is_nameless and not isinstance(node, (Callable, Iterable)) and treedef.node_data()[1] is not None


def _of_flax(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, ())  # no tree has one before the import


def _looks_like(node: Any, array: Any) -> bool:
    def agree(attribute: str) -> bool:
        found = getattr(node, attribute, None)
        return found is not None and type(found) is type(of := getattr(array, attribute, None)) and found == of

    return agree("dtype") and (agree("ndim") or agree("shape"))


def content(box: Any) -> Any:
    """What is in a box, which may be another box."""
    return jax.tree.leaves(box, is_leaf=lambda child: child is not box)[0]


def unboxed(tree: Any) -> Any:
    """The tree with what is in its boxes in their place."""
    return jax.tree.map(lambda node: unboxed(content(node)) if is_box(node) else node, tree, is_leaf=is_box)


def key_paths(tree: Any) -> list[tuple[Any, ...]]:
    """The keys that lead to each leaf, but for those within boxes."""
    paths: list[tuple[Any, ...]] = []
    for path, node in tree_flatten_with_path(tree, is_leaf=is_box)[0]:
        inside = key_paths(content(node)) if is_box(node) else [()]
        paths += [(*path, *rest) for rest in inside]
    return paths
