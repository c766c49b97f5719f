"""Norms by name, for a log: of each leaf of a tree, each layer of stacked leaves, each pool that a scope labels."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from rmsjax._checks import as_axes, as_mapped
from rmsjax._norm import rms
from rmsjax._reduce import divisor
from rmsjax._tree import Scope, group, leaf_paths, measure

if TYPE_CHECKING:
    from jaxtyping import PyTree

T = TypeVar("T")
Stacked: TypeAlias = str | Sequence[str] | Mapping[str, int]


class Layers:
    """Which leaves of a tree hold layers, along which axis, and how the layers are called."""

    def __init__(self, function: str, stacked: Any, sep: str, paths: Sequence[str]) -> None:
        self._axes = _as_stacked(function, stacked)
        self._function, self._sep = function, sep
        self._counts: dict[str, tuple[int, str]] = {}
        for prefix in self._axes.keys() - {self.prefix(path) for path in paths}:
            parts = [path.split(sep) for path in paths]
            nodes = {sep.join(part[:k]) for part in parts for k in range(1, len(part) + 1)}
            close = difflib.get_close_matches(str(prefix), nodes, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{function}: stacked must be paths in the tree, got {prefix!r}{meant}")

    def prefix(self, path: str) -> str | None:
        """The longest path in `stacked` that leads to this leaf."""
        found = (p for p in self._axes if p in ("", path) or path.startswith(f"{p}{self._sep}"))
        return max(found, key=len, default=None)

    def axis(self, path: str, shape: tuple[int, ...]) -> int:
        """Along which axis a stacked leaf holds its layers; ValueError if it cannot."""
        prefix = self.prefix(path) or ""
        (axis,) = as_axes(self._function, self._axes[prefix], shape, argument=f"the axis of stacked leaf {path!r},")
        count, first = self._counts.setdefault(prefix, (shape[axis], path))
        if shape[axis] != count:
            raise ValueError(
                f"{self._function}: stacked leaves must have as many layers: expected {count} at {path!r}, as "
                f"{first!r} has, got {shape[axis]} along axis {axis} of shape {shape}; a leaf whose layers lie along "
                "another axis needs a path of its own in a dict from path to axis"
            )
        return axis

    def name(self, path: str, layer: int) -> str:
        """The number of a layer stands behind the path in `stacked`."""
        prefix = self.prefix(path) or ""
        rest = path[len(prefix) :].removeprefix(self._sep)
        return self._sep.join(part for part in (prefix, str(layer), rest) if part)


def _as_stacked(function: str, stacked: Any) -> dict[str, int]:
    """The paths of what is stacked, and along which axis."""
    pairs: Any = stacked.items() if isinstance(stacked, Mapping) else None
    if isinstance(stacked, str | list | tuple):
        pairs = [(path, 0) for path in ([stacked] if isinstance(stacked, str) else stacked)]
    axes: dict[str, int] = {}
    try:
        for path, axis in pairs:
            if not isinstance(path, str) or isinstance(axis, bool):
                raise TypeError
            axes[path] = operator.index(axis)
    except TypeError:
        raise TypeError(
            f"{function}: stacked must be a path, several, or a dict from path to axis, got {stacked!r:.80}; write "
            "stacked='blocks', or stacked={'blocks': 1} if layers lie along axis 1"
        ) from None
    return axes


class Named(NamedTuple):
    """The norm of what has this name: one number, or an array of those that a scope with axes gives."""

    path: str
    norm: Array
    count: Any  # of how many elements in all
    leaf: jax.ShapeDtypeStruct | None  # the leaf, or the layer of one; None for a pool of several


def named_norms(
    function: str, tree: PyTree, scope: Scope, sep: str, stacked: Stacked, axis_name: Any = None
) -> Iterator[Named]:
    """The norms of a tree in the order of its leaves, those of stacked leaves layer by layer."""
    mapped, paths = as_mapped(function, axis_name), leaf_paths(tree, sep)
    layers = Layers(function, stacked, sep, paths)
    prefixes = [layers.prefix(path) for path in paths]
    labels: list[str | None] = []

    def noted(path: str, leaf: Array) -> Any:
        i = len(labels)
        choice: Any = scope(path, leaf) if callable(scope) else scope
        labels.append(choice if isinstance(choice, str) and choice != "block" else None)
        if prefixes[i] is None:
            return choice
        if not isinstance(choice, str):
            raise ValueError(
                f"{function}: scope must give 'block' or a label for a stacked leaf, whose layers have one norm each, "
                f"got {choice!r:.80} (leaf {path!r})"
            )
        axis = layers.axis(paths[i], leaf.shape)
        return [a for a in range(leaf.ndim) if a != axis] or axis

    is_noted = callable(scope) or (scope != "global" and any(prefix is not None for prefix in prefixes))
    grouping = group(function, tree, noted if is_noted else scope)
    leaves, measured = grouping.leaves, grouping.tree(measure(grouping, mapped))
    counts = [leaf.size * mapped.of(leaf).shards() for leaf in leaves]
    if grouping.is_global:
        yield Named("all", measured, sum(counts), None)
        return
    norms = grouping.bare.flatten_up_to(measured)
    pools: dict[int | str, list[int]] = {}
    for i, label in enumerate(labels or [None] * len(leaves)):
        pools.setdefault(i if label is None else label, []).append(i)

    def of_pool(key: int | str) -> Named:
        members = pools[key]
        if isinstance(key, str):
            return Named(key, norms[members[0]], sum(counts[i] for i in members), None)
        return Named(paths[key], norms[key], counts[key], jax.ShapeDtypeStruct(leaves[key].shape, leaves[key].dtype))

    def of_layer(i: int) -> Array:
        """The norms of the layers of a stacked leaf as a vector; of a leaf of numbers they are the numbers' sizes."""
        return _whole(norms[i].ravel() if leaves[i].ndim > 1 else rms(leaves[i][:, None], 1, axis_name=axis_name))

    def of_layers(key: int | str) -> list[Named]:
        members = pools[key]
        if isinstance(key, str):
            each = _together([of_layer(i) for i in members], [counts[i] for i in members])
            count = sum(counts[i] for i in members) // max(1, len(each))
            return [Named(f"{key}{sep}{k}", norm, count, None) for k, norm in enumerate(jnp.unstack(each))]
        shape = list(leaves[key].shape)
        number = shape.pop(layers.axis(paths[key], leaves[key].shape))
        layer = jax.ShapeDtypeStruct(shape, leaves[key].dtype)
        each = enumerate(jnp.unstack(of_layer(key)))
        return [Named(layers.name(paths[key], k), norm, counts[key] // number, layer) for k, norm in each]

    for key, members in pools.items():
        if len({prefixes[i] for i in members}) > 1:
            alone = next(i for i in members if prefixes[i] != prefixes[members[0]])
            raise ValueError(
                f"{function}: leaves with one label must be in one stack, or in none, got the label {key!r} for leaf "
                f"{paths[members[0]]!r} and for leaf {paths[alone]!r}"
            )
    in_stack = ((prefixes[members[0]], key) for key, members in pools.items())
    yield from interleaved((stack, [of_pool(key)] if stack is None else of_layers(key)) for stack, key in in_stack)


def interleaved(parts: Iterable[tuple[str | None, list[T]]]) -> Iterator[T]:
    """What belongs to leaves, by the stack that these are in: in one stack it comes layer by layer."""
    for stack, found in itertools.groupby(parts, key=lambda part: part[0]):
        lists = [each for _, each in found]
        yield from itertools.chain.from_iterable(lists if stack is None else zip(*lists, strict=True))


def _whole(norms: Array) -> Array:
    """Norms that each device has all of: where axes are explicit, JAX takes no entry out of a vector that is split."""
    sharding: Any = jax.typeof(norms).sharding
    return jax.sharding.reshard(norms, sharding.update(spec=P())) if any(sharding.spec) else norms


def _together(norms: Sequence[Array], counts: Sequence[Any]) -> Array:
    """The norm of all elements from the norms of parts of them: the root of the mean square, by their counts.

    Weights are at most 1, so nothing overflows; norms that one could push below the range are first moved away from it.
    """
    dtype = np.result_type(*(norm.dtype for norm in norms))
    parts = jnp.stack([norm.astype(dtype) for norm in norms])
    sizes = jnp.stack([jnp.asarray(divisor(count, dtype)) for count in counts])
    most, total = jnp.max(sizes), divisor(sum(counts), dtype)
    small = jnp.max(parts, 0, keepdims=True) < 2.0**21 * float(jnp.finfo(dtype).tiny)
    move = jnp.where(small, 2.0**20, 1).astype(dtype)
    return rms(parts * move * jnp.sqrt(sizes / most)[:, None], 0) * jnp.sqrt(len(counts) * most / total) / move[0]


def rms_by_path(
    tree: PyTree,
    *,
    sep: str = "/",
    scope: Scope = "block",
    stacked: Stacked = (),
    axis_name: str | Sequence[str] | None = None,
) -> dict[str, Array]:
    """The RMS norm of each leaf by its path, ready for TensorBoard or W&B. Works under `jit`.

    Args:
        tree: as in `tree_rms`.
        sep: what separates the parts of a path.
        scope: as in `tree_rms`; "block", the default, gives one scalar for each leaf. What is pooled under a label has
            one entry, with the label as its key; "global" gives one entry, "all".
        stacked: the path of what holds layers stacked along the first axis of each leaf, as `nnx.vmap` and `nn.scan`
            make them, or several paths; a dict from path to axis if it is another one. Each layer then counts as a
            leaf by itself: of "blocks/kernel" under "blocks" the layers are "blocks/0/kernel", "blocks/1/kernel", ...,
            one scalar each. What the scope pools under a label it pools layer by layer: "label/0", "label/1", ...
            "" means the whole tree.
        axis_name: as in `tree_rms`.

    Returns:
        A dict from path to norm, in the order of the leaves.

    Raises:
        TypeError: sep is not a string, stacked neither paths nor a dict from paths to integers.
        ValueError: two entries have the same path; a path in stacked is not one of the tree, its leaves have no such
            axis or not as many layers as each other, the scope gives axes for them, or a label to them and to others;
            and all that `tree_rms` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms_by_path
        >>> rms_by_path({"dense": {"kernel": jnp.full((2, 2), 3.0)}})
        {'dense/kernel': Array(3., dtype=float32)}
        >>> grads = {"blocks": {"kernel": jnp.ones((2, 8, 8)), "scale": jnp.zeros((2, 8))}, "head": jnp.ones((8, 4))}
        >>> print({path: float(norm) for path, norm in rms_by_path(grads, stacked="blocks").items()})
        {'blocks/0/kernel': 1.0, 'blocks/0/scale': 0.0, 'blocks/1/kernel': 1.0, 'blocks/1/scale': 0.0, 'head': 1.0}
        >>> layers = rms_by_path(grads, stacked="blocks", scope=lambda path, leaf: path.split("/")[0])
        >>> print({path: round(float(norm), 3) for path, norm in layers.items()})  # all leaves of a layer together
        {'blocks/0': 0.943, 'blocks/1': 0.943, 'head': 1.0}

    Source: keys as `jax.tree_util.keystr` writes them.
    """
    if not isinstance(sep, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"rms_by_path: sep must be a string, got {sep!r:.80}")
    found = [*named_norms("rms_by_path", tree, scope, sep, stacked, axis_name)]
    path, times = Counter(named.path for named in found).most_common(1)[0] if found else ("", 0)
    if times > 1:
        raise ValueError(
            f"rms_by_path: two entries have the path {path!r}; choose another sep than {sep!r}, or another label"
        )
    return {named.path: named.norm for named in found}
