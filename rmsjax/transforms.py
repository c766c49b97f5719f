"""optax: gradient transformations that read or set the RMS norm of updates.

All take the `scope` and `axis_name` of `rmsjax.tree_rms`, keep the dtype and structure of the updates, and have a state
whose structure and dtypes are those of `init` at every step, so they run inside `lax.scan`, `optax.MultiSteps` and
`optax.apply_if_finite`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rmsjax._checks import as_mapped, as_threshold
from rmsjax._reduce import UNMAPPED
from rmsjax._tree import Scope, group, measure, rescale

if TYPE_CHECKING:
    from jaxtyping import PyTree


class ClipByRMSState(NamedTuple):
    """What `clip_by_rms` has seen.

    `rms`: the norm of the newest updates before the clip, as `tree_rms(updates, scope)` gives it. `num_updates`: how
    many updates were seen. `num_clipped`: how many of them were clipped, for each norm in `rms`.
    """

    rms: Any
    num_updates: Array
    num_clipped: Any


def clip_by_rms(
    max_rms: float | Array, scope: Scope = "global", *, axis_name: str | Sequence[str] | None = None
) -> optax.GradientTransformation:
    r"""Scale updates down to an RMS norm of at most max_rms: $u \cdot \min(1, \text{max\_rms}/\|u\|_{RMS})$.

    The width-neutral form of clipping by norm: max_rms is a bound on the size of a typical element, so one value
    serves a model at every width, where a bound on the L2 norm has to grow with the root of the number of elements.
    `optax.clip_by_global_norm(c)` is `clip_by_rms(c / sqrt(n))` for n elements, and `optax.clip_by_block_rms(c)` is
    `clip_by_rms(c, "block")`; unlike these it is right for every finite update (float16 300, float32 1e30), has a
    derivative at zero, and keeps dtypes. A non-finite update stays non-finite.

    Args:
        max_rms: the bound, at least 0, in the unit of an update; a traced value (`optax.inject_hyperparams`) may do.
        scope: what shares a norm and a factor, see `rmsjax.Scope`.
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates are split over, see `rmsjax.tree_rms`.

    Returns:
        A transformation with state `ClipByRMSState`; `optax.tree.get(opt_state, "rms")` finds the norm before the clip.

    Raises:
        TypeError: max_rms is not a number; at init or update, a leaf is not floating.
        ValueError: max_rms is negative or NaN; at init or update, what `tree_rms` raises for the scope.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = optax.chain(rmsjax.clip_by_rms(1.0), optax.sgd(0.1))
        >>> state = tx.init({"w": jnp.zeros(2)})
        >>> updates, state = tx.update({"w": jnp.array([30.0, -40.0])}, state)
        >>> print(updates["w"], optax.tree.get(state, "rms"), optax.tree.get(state, "num_clipped"))
        [-0.08485281  0.11313709] 35.35534 1

    Source: Pascanu, Mikolov, Bengio (arXiv 1211.5063), section 3.2, with the RMS norm; Shazeer and Stern
    (arXiv 1804.04235), section 6, for scope "block".
    """
    max_rms = as_threshold("clip_by_rms", "max_rms", max_rms)

    def init_fn(params: PyTree) -> ClipByRMSState:
        zeros = _zeros("clip_by_rms", params, scope)
        return ClipByRMSState(zeros, jnp.zeros((), jnp.int32), jax.tree.map(lambda r: r.astype(jnp.int32), zeros))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ClipByRMSState]:
        del params
        grouping = group("clip_by_rms", updates, scope, kind=jnp.inexact)
        norms = measure(grouping, as_mapped("clip_by_rms", axis_name))
        clipped = rescale(grouping, norms, jax.tree.map(lambda r: jnp.minimum(r, jnp.asarray(max_rms, r.dtype)), norms))
        above = jax.tree.map(lambda r: r > jnp.asarray(max_rms, r.dtype), norms)
        return clipped, ClipByRMSState(
            _like(state.rms, grouping.tree(norms)),
            jnp.asarray(optax.safe_increment(state.num_updates)),
            jax.tree.map(lambda n, over: n + over.astype(n.dtype), state.num_clipped, grouping.tree(above)),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _zeros(function: str, params: PyTree, scope: Scope) -> PyTree:
    """Zeros of the shapes and dtypes that `tree_rms(params, scope)` has."""
    grouping = group(function, params, scope, kind=jnp.inexact)
    shapes = jax.eval_shape(
        lambda leaves: grouping._replace(leaves=leaves).tree(measure(grouping._replace(leaves=leaves), UNMAPPED)),
        grouping.leaves,
    )
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _like(state: PyTree, values: PyTree) -> PyTree:
    """Values in the dtypes of the state, which are those of init."""
    return jax.tree.map(lambda s, v: v.astype(s.dtype), state, values)
