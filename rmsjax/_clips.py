"""optax: clips, which scale updates down to a bound on their norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rmsjax._checks import as_mapped, as_threshold
from rmsjax._pools import PerPool
from rmsjax._tree import Grouping, Scope, check_scope, group, measure, rescale
from rmsjax._updates import (
    added,
    kept,
    next_update,
    no_updates,
    norm_types,
    params_of,
    serializable,
    share_clipped,
    zeros,
)

if TYPE_CHECKING:
    from jaxtyping import PyTree

__all__ = [
    "ClipByRMSState",
    "ClipByRelativeRMSState",
    "clip_by_relative_rms",
    "clip_by_rms",
]


@serializable
class ClipByRMSState(NamedTuple):
    """What `clip_by_rms` has seen.

    `rms`: the norm of the newest updates before the clip, as `tree_rms(updates, scope)` gives it. `num_updates`: how
    many updates were seen. `num_clipped`: how many of them were clipped, for each norm in `rms`. `share_clipped`: the
    quotient of these two; the axes of `vmap`, or of states that a scan has stacked, come first.

    Example:
        >>> import jax.numpy as jnp, rmsjax
        >>> tx = rmsjax.clip_by_rms(1.0, "block")
        >>> state = tx.init({"w": jnp.zeros(2)})
        >>> for size in (0.5, 3.0):
        ...     _, state = tx.update({"w": jnp.full(2, size)}, state)
        >>> print(state.rms["w"], state.num_updates, state.num_clipped["w"], state.share_clipped["w"])
        3.0 2 1 0.5
    """

    rms: Any
    num_updates: Array
    num_clipped: Any

    norm_fields = ("rms",)
    share_clipped = property(share_clipped)


@serializable
class ClipByRelativeRMSState(NamedTuple):
    """What `clip_by_relative_rms` has seen: as in `ClipByRMSState`, and `param_rms`, the norm of the parameters.

    Example:
        >>> import jax.numpy as jnp, rmsjax
        >>> tx = rmsjax.clip_by_relative_rms(0.1)
        >>> params = {"w": jnp.full(2, 5.0)}
        >>> _, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
        >>> print(state.rms["w"], state.param_rms["w"], state.share_clipped["w"])
        1.0 5.0 1.0
    """

    rms: Any
    param_rms: Any
    num_updates: Array
    num_clipped: Any

    norm_fields = ("rms", "param_rms")
    share_clipped = property(share_clipped)


def clip_by_rms(
    max_rms: float | Array, scope: Scope = "global", *, axis_name: str | Sequence[str] | None = None
) -> optax.GradientTransformation:
    r"""Scale updates down to an RMS norm of at most max_rms: $u \cdot \min(1, \text{max\_rms}/\|u\|_{RMS})$.

    max_rms bounds the size of a typical element, whatever their number, so bounds for tensors and trees of any size
    compare, where one on the L2 norm has to grow with the root of that number. How gradients scale with the width, and
    so whether one bound serves every width, is a matter of the parametrisation.

    `optax.clip_by_global_norm(c)` is `clip_by_rms(c / sqrt(n))` for n elements, and `optax.clip_by_block_rms(c)` is
    `clip_by_rms(c, "block")`; unlike these it is right for every finite update (float16 300, float32 1e30), has a
    derivative at zero, and keeps dtypes. A non-finite update stays non-finite.

    Args:
        max_rms: the bound, at least 0, in the unit of an update; a traced value (`optax.inject_hyperparams`) may do.
        scope: what shares a norm and a factor, see `rmsjax.tree_rms`. Under `optax.inject_hyperparams` name it in
            static_args=("scope",), or else a callable is taken for a schedule.
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates are split over, see `rmsjax.tree_rms`.

    Returns:
        A transformation with state `ClipByRMSState`; `optax.tree.get(opt_state, "rms")` finds the norm before the clip.

    Raises:
        TypeError: max_rms is not a number; at init or update, a leaf is not floating.
        ValueError: max_rms is negative or NaN; at init or update, what `tree_rms` raises for the scope; at update, the
            updates have another structure than the params at init.

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
    name = "clip_by_rms"
    check_scope(name, scope)
    max_rms = as_threshold(name, "max_rms", max_rms)

    def init_fn(params: PyTree) -> ClipByRMSState:
        norms = norm_types(name, params, scope, axis_name)
        return ClipByRMSState(zeros(norms), no_updates(), zeros(norms, jnp.int32))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ClipByRMSState]:
        del params
        state = init_fn(updates) if state is None else state  # as of peers, which keep none
        grouping = group(name, updates, scope, kind=jnp.inexact)
        norms = measure(grouping, as_mapped(name, axis_name))
        updates, clipped = _clip(grouping, norms, jax.tree.map(lambda r: jnp.asarray(max_rms, r.dtype), norms))
        return updates, ClipByRMSState(
            rms=kept(name, state.rms, grouping, norms),
            num_updates=next_update(state.num_updates),
            num_clipped=added(name, state.num_clipped, grouping, clipped),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _clip(grouping: Grouping, norms: PerPool, bounds: PerPool) -> tuple[PyTree, PerPool]:
    """(updates, clipped): the updates scaled down to the bounds of their pools, and where that changed them."""
    return rescale(grouping, norms, jax.tree.map(jnp.minimum, norms, bounds)), jax.tree.map(jnp.greater, norms, bounds)


def clip_by_relative_rms(
    max_ratio: float | Array,
    scope: Scope = "block",
    *,
    min_rms: float | Array = 1e-3,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    r"""Scale updates down to at most max_ratio times the RMS norm of what they update.

    Then $\|u\|_{RMS} \le \text{max\_ratio} \cdot \max(\|w\|_{RMS}, \text{min\_rms})$ for the parameters w of each
    pool. No step changes a tensor by more than that share of its size, whatever the width. After the optimizer's own
    scaling and the learning rate it bounds the step itself; before them, it is adaptive gradient clipping.

    Args:
        max_ratio: the bound, at least 0, without unit; a traced value (`optax.inject_hyperparams`) may do.
        scope: what shares a norm and a factor, see `rmsjax.tree_rms`; the parameters are pooled as the updates are.
            Under `optax.inject_hyperparams` name it in static_args=("scope",), or else a callable is taken for a
            schedule.
        min_rms: what counts as the size of smaller parameters, at least 0, so that those that start at zero can move.
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates and parameters are split over, see
            `rmsjax.tree_rms`.

    Returns:
        A transformation with state `ClipByRelativeRMSState`; its update needs `params`.

    Raises:
        TypeError: max_ratio or min_rms is not a number; at init or update, a leaf is not floating.
        ValueError: max_ratio or min_rms is negative or NaN; at update, params are missing or do not fit the updates;
            and what `clip_by_rms` raises.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = optax.chain(optax.scale(-1.0), rmsjax.clip_by_relative_rms(0.1))
        >>> params = {"w": jnp.full(4, 2.0), "b": jnp.zeros(2)}
        >>> updates, state = tx.update({"w": jnp.ones(4), "b": jnp.ones(2)}, tx.init(params), params)
        >>> print(updates["w"], updates["b"])
        [-0.2 -0.2 -0.2 -0.2] [-0.0001 -0.0001]

    Source: adaptive gradient clipping, Brock et al. (arXiv 2102.06171), section 4.1, with RMS norms, which makes the
    ratio one of typical elements; the floor is epsilon_2 of Shazeer and Stern (arXiv 1804.04235), section 8.
    """
    name = "clip_by_relative_rms"
    check_scope(name, scope)
    max_ratio = as_threshold(name, "max_ratio", max_ratio)
    min_rms = as_threshold(name, "min_rms", min_rms)

    def init_fn(params: PyTree) -> ClipByRelativeRMSState:
        norms = norm_types(name, params, scope, axis_name)
        return ClipByRelativeRMSState(zeros(norms), zeros(norms), no_updates(), zeros(norms, jnp.int32))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ClipByRelativeRMSState]:
        state = init_fn(updates) if state is None else state  # as of peers, which keep none
        grouping, mapped = group(name, updates, scope, kind=jnp.inexact), as_mapped(name, axis_name)
        # In the pools of the updates, even if the scope would choose otherwise by the dtype of the parameters.
        of_params = grouping._replace(leaves=jax.tree.leaves(params_of(name, updates, params)))
        norms = measure(grouping, mapped)
        sizes = measure(of_params, mapped)
        bounds = jax.tree.map(
            lambda r, size: (
                jnp.asarray(max_ratio, r.dtype) * jnp.maximum(size.astype(r.dtype), jnp.asarray(min_rms, r.dtype))
            ),
            norms,
            sizes,
        )
        updates, clipped = _clip(grouping, norms, bounds)
        return updates, ClipByRelativeRMSState(
            rms=kept(name, state.rms, grouping, norms),
            param_rms=kept(name, state.param_rms, grouping, sizes),
            num_updates=next_update(state.num_updates),
            num_clipped=added(name, state.num_clipped, grouping, clipped),
        )

    return optax.GradientTransformation(init_fn, update_fn)
