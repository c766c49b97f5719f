"""Penalties on RMS norms, to be added to a loss: regularisers that mean the same at every width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
from jax import Array

from rmsjax._checks import as_mapped, as_threshold
from rmsjax._pools import PerPool, Pool
from rmsjax._reduce import Mapped, accumulator_dtype, real_parts
from rmsjax._tree import Scope, group, measure

if TYPE_CHECKING:
    from jaxtyping import PyTree, Real

__all__ = ["rms_penalty"]


def rms_penalty(
    tree: PyTree,
    target: float | Array = 1.0,
    scope: Scope = "block",
    kind: Literal["two_sided", "ceiling"] = "two_sided",
    *,
    axis_name: str | Sequence[str] | None = None,
) -> Real[Array, ""]:
    r"""The mean over all norms of $(\|x\|_{RMS} - \text{target})^2$, or of $\max(0, \|x\|_{RMS} - \text{target})^2$.

    What doubling a tensor costs does not depend on its number of elements, so one coefficient holds a tensor, or an
    activation, to a level at every width. A sum of squares (weight decay in the loss) grows with that number, and a
    mean of squares knows no level but zero. The derivative is finite everywhere, and 0 for a tensor of zeros. With
    target 0 the penalty is the mean square, also in its second derivative.

    Every leaf of the tree counts alike: of all parameters of a model, biases and scales are held to the level as well
    as kernels. So give it the leaves that are meant, such as `nnx.state(model, lambda path, _: path[-1] == "kernel")`,
    or those of a dict of parameters by `jax.tree.map_with_path`, with None for the others; None is passed over. With
    kind "ceiling" what is small, as most biases are, is left alone.

    Args:
        tree: kernels, activations: any pytree of floating or complex arrays.
        target: the level, at least 0, in the unit of the tree.
        scope: what shares a norm, see `rmsjax.tree_rms`; with axes, each entry that is kept counts as one norm.
        kind: "two_sided" pulls norms to the target; "ceiling" leaves those below it alone.
        axis_name: under `shard_map` or `pmap`, the mapped axes that the tree is split over, see `rmsjax.tree_rms`.

    Returns:
        A scalar, float32 (float64 if the tree has such leaves). Norms over no elements do not count; with no norm at
        all it is 0.

    Raises:
        TypeError: target is not a number, or a leaf not floating.
        ValueError: target is negative or NaN, kind is not one of the two; and what `tree_rms` raises for the scope.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rmsjax import rms_penalty
        >>> params = {"w": jnp.full((2, 2), 3.0), "b": jnp.zeros(2)}
        >>> print(rms_penalty(params), rms_penalty(params, kind="ceiling"), rms_penalty(params | {"b": None}))
        2.5 2.0 4.0
        >>> print(jax.grad(rms_penalty)(params)["w"][0])
        [0.5 0.5]

    Source: the squared distance of norms from a level is the penalty of Krueger and Memisevic (arXiv 1511.08400), who
    take L2 norms of activations, and for the level the norm at the time step before.
    """
    name = "rms_penalty"
    target = as_threshold(name, "target", target, for_schedule="target=schedule(step)")
    if kind not in ("two_sided", "ceiling"):
        raise ValueError(f"{name}: kind must be 'two_sided' or 'ceiling', got {kind!r}")
    grouping, mapped = group(name, tree, scope, kind=jnp.inexact), as_mapped(name, axis_name)
    filled = tuple(pool for pool in grouping.pools if any(grouping.leaves[i].size for i in pool.members))
    norms = measure(grouping._replace(pools=filled), mapped) if filled else PerPool((), ())
    total = jnp.zeros((), accumulator_dtype(*(leaf.dtype for leaf in grouping.leaves)))
    for norm in norms.values:
        excess = norm - jnp.asarray(target, norm.dtype)
        excess = jnp.maximum(excess, 0) if kind == "ceiling" else excess
        total += jnp.sum(jnp.square(excess))
    if isinstance(target, Array) or target == 0:
        for pool, norm in zip(filled, norms.entries(filled), strict=True):
            size = norm + jnp.asarray(target, norm.dtype)  # 0 where both are
            total += jnp.sum(_mean_square_at_zero(grouping.leaves, pool, size, mapped))
    return total / max(sum(norm.size for norm in norms.values), 1)


def _mean_square_at_zero(leaves: Sequence[Array], pool: Pool, norm: Array, mapped: Mapped) -> Array:
    """Of a pool of zeros the number 0 with the derivatives of its mean square, of any other the number 0.

    The norm counts as constant at zero, so that its square has no second derivative there; the mean square has 2/n.
    """
    total, count = jnp.zeros_like(norm), 0.0
    for leaf in (leaves[i] for i in pool.members):
        over = mapped.of(leaf)
        parts = real_parts(jnp.where(norm == 0, leaf, 0), norm.dtype)
        squares = sum(map(jnp.square, parts[1:]), jnp.square(parts[0]))
        total += over.psum(jnp.sum(squares, pool.axes, keepdims=pool.axes is not None))
        count += leaf.size / norm.size * over.shards()
    return total / max(count, 1.0)
