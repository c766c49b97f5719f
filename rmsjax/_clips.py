"""optax: clips, which scale updates down to a bound on their norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import Array

from rmsjax._checks import as_mapped, as_threshold
from rmsjax._pools import PerPool
from rmsjax._reduce import Mapped, cpu_barrier, four_over, hold
from rmsjax._tree import Grouping, Scope, check_scope, counts, group, measure, rescale
from rmsjax._updates import (
    added,
    as_decay,
    kept,
    next_update,
    no_updates,
    norm_types,
    params_of,
    quotient,
    serializable,
    share_clipped,
    with_state,
    zeros,
)

if TYPE_CHECKING:
    from jaxtyping import PyTree

__all__ = [
    "ClipByHistoryState",
    "ClipByRMSState",
    "ClipByRelativeRMSState",
    "clip_by_global_norm",
    "clip_by_history",
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


@serializable
class ClipByHistoryState(NamedTuple):
    """What `clip_by_history` has seen.

    `rms`, `num_updates`, `num_clipped`, `share_clipped`: as in `ClipByRMSState`, with the warm-up. `ema_rms`: the
    history of each norm, that the next one is compared with; 0 where there is none yet. `num_nonfinite`: how many
    updates had a norm of NaN or inf, wherever in the tree; such a norm is not among the clipped.

    Example:
        >>> import jax.numpy as jnp, rmsjax
        >>> tx = rmsjax.clip_by_history(warmup_steps=1)
        >>> state = tx.init({"w": jnp.zeros(2)})
        >>> for size in (0.5, jnp.inf, 3.0):
        ...     _, state = tx.update({"w": jnp.full(2, size)}, state)
        >>> print(f"{state.rms['w']} {state.ema_rms['w']:.4f} {state.num_clipped['w']} {state.num_nonfinite}")
        3.0 0.5005 1 1
    """

    rms: Any
    ema_rms: Any
    num_updates: Array
    num_clipped: Any
    num_nonfinite: Array

    norm_fields = ("rms", "ema_rms")
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
    max_rms = as_threshold(name, "max_rms", max_rms)

    def bounds(grouping: Grouping, mapped: Mapped, norms: PerPool) -> PerPool:
        del grouping, mapped
        return jax.tree.map(lambda r: jnp.asarray(max_rms, r.dtype), norms)

    return _clip_to(bounds, name, scope, axis_name)


def clip_by_global_norm(
    max_norm: float | Array, *, axis_name: str | Sequence[str] | None = None
) -> optax.GradientTransformation:
    r"""Scale updates down to an L2 norm of at most max_norm, all together: $u \cdot \min(1, \text{max\_norm}/\|u\|_2)$.

    Takes the place of `optax.clip_by_global_norm`: the same bound gives the same updates. It is
    `clip_by_rms(max_norm / sqrt(n))` for the n elements of all leaves, which nobody has to count, with what that has
    beyond optax's: right for every finite update, a derivative at zero, dtypes that stay, a state, an axis_name. A
    bound in this unit has to grow with the root of n, so from one model to a larger one that of `clip_by_rms` carries
    over.

    Args:
        max_norm: the bound on the L2 norm, at least 0; a traced value (`optax.inject_hyperparams`) may do.
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates are split over, see `rmsjax.tree_rms`.

    Returns:
        A transformation with state `ClipByRMSState`, whose `rms` is the RMS norm before the clip.

    Raises:
        TypeError, ValueError: what `clip_by_rms` raises.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = optax.chain(rmsjax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, state = tx.update({"w": jnp.array([30.0, -40.0])}, tx.init(params), params)
        >>> print(optax.tree.get(state, "rms"), optax.tree.get(state, "num_clipped"))
        35.35534 1
        >>> tx = rmsjax.clip_by_global_norm(1.0)
        >>> print(tx.update({"w": jnp.array([30.0, -40.0])}, tx.init(params))[0]["w"])
        [ 0.6 -0.8]

    Source: Pascanu, Mikolov, Bengio (arXiv 1211.5063), section 3.2.
    """
    name = "clip_by_global_norm"
    max_norm = as_threshold(name, "max_norm", max_norm)

    def bounds(grouping: Grouping, mapped: Mapped, norms: PerPool) -> PerPool:
        return jax.tree.map(lambda r, n: _as_rms(max_norm, n, r.dtype), norms, counts(grouping, mapped))

    return _clip_to(bounds, name, "global", axis_name)


def _as_rms(norm: Any, count: Any, dtype: Any) -> Array:
    """The RMS norm of so many elements that have an L2 norm."""
    return jnp.asarray(norm, dtype) / jnp.sqrt(jnp.asarray(count, dtype))


def _clip_to(
    bounds: Callable[[Grouping, Mapped, PerPool], PerPool],
    name: str,
    scope: Scope,
    axis_name: str | Sequence[str] | None,
) -> optax.GradientTransformation:
    """A clip to bounds that do not change."""
    check_scope(name, scope)

    def init_fn(params: PyTree) -> ClipByRMSState:
        norms = norm_types(name, params, scope, axis_name)
        return ClipByRMSState(zeros(norms), no_updates(), zeros(norms, jnp.int32))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ClipByRMSState]:
        del params
        grouping, mapped = group(name, updates, scope, kind=jnp.inexact), as_mapped(name, axis_name)
        norms = measure(grouping, mapped)
        updates, clipped = _clip(grouping, norms, bounds(grouping, mapped, norms))
        return updates, ClipByRMSState(
            rms=kept(name, state.rms, grouping, norms),
            num_updates=next_update(state.num_updates),
            num_clipped=added(name, state.num_clipped, grouping, clipped),
        )

    return with_state(name, optax.GradientTransformation(init_fn, update_fn), or_new=True)


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
        grouping, mapped = group(name, updates, scope, kind=jnp.inexact), as_mapped(name, axis_name)
        # In the pools of the updates, even if the scope would choose otherwise by the dtype of the parameters.
        of_params = grouping._replace(leaves=jax.tree.leaves(params_of(name, updates, params)))
        norms = measure(grouping, mapped)
        sizes = measure(of_params, mapped)
        bounds = jax.tree.map(
            lambda size: jnp.asarray(max_ratio, size.dtype) * jnp.maximum(size, jnp.asarray(min_rms, size.dtype)),
            grouping.laid_out(sizes, norms),
        )
        updates, clipped = _clip(grouping, norms, bounds)
        return updates, ClipByRelativeRMSState(
            rms=kept(name, state.rms, grouping, norms),
            param_rms=kept(name, state.param_rms, grouping, sizes),
            num_updates=next_update(state.num_updates),
            num_clipped=added(name, state.num_clipped, grouping, clipped),
        )

    return with_state(name, optax.GradientTransformation(init_fn, update_fn), or_new=True)


# --------------------------------------------------------------------------------------------------------- by history


def clip_by_history(
    factor: float | Array = 1.05,
    scope: Scope = "block",
    *,
    decay: float | Array = 0.98,
    warmup_steps: int | Array = 100,
    warmup_max_norm: float | Array | None = 1.0,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    r"""Scale updates down to at most factor times what their norm has been: no bound to find, and it moves along.

    With $r_t = \|u_t\|_{RMS}$ of a pool, and its history $a_t$, the result has the norm
    $\hat r_t = \min(r_t, \text{factor} \cdot a_{t-1})$, and
    $a_t = \text{decay} \cdot a_{t-1} + (1 - \text{decay}) \, \hat r_t$. A spike moves the history by no more than an
    update at the bound, whatever its size, while norms that grow for good raise it by (1 - decay) (factor - 1) a step.

    The first updates are a warm-up: all together are scaled down to an L2 norm of warmup_max_norm, and the history is
    the least norm seen, $a_t = \min(a_{t-1}, \hat r_t)$. The same holds later for a pool that has no history yet. Zero
    norms are no history: a leaf without a gradient, as an expert that no token was sent to, keeps the one it has.

    Updates that are not finite stay so, for `optax.apply_if_finite` to see, and are no history; the state counts them.

    Args:
        factor: by how much a norm may exceed its history, at least 1.
        scope: what shares a norm, a history and a factor, see `rmsjax.tree_rms`. "block", a history for each tensor, is
            the paper's; "global" has one for all. Under `optax.inject_hyperparams` name it in static_args=("scope",),
            or else a callable is taken for a schedule.
        decay: that of the moving average, in [0, 1).
        warmup_steps: how many updates are the warm-up, a whole number below 2^31.
        warmup_max_norm: the bound on the L2 norm of all updates in the warm-up, as of `clip_by_global_norm`; None for
            no bound. All these numbers may be traced (`optax.inject_hyperparams`).
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates are split over, see `rmsjax.tree_rms`.

    Returns:
        A transformation with state `ClipByHistoryState`.

    Raises:
        TypeError: a number is none; at init or update, a leaf is not floating.
        ValueError: factor is below 1, decay not in [0, 1), warmup_steps not whole or too large, or another number
            negative or NaN; at update, the state is None; and what `clip_by_rms` raises.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = rmsjax.clip_by_history(1.5, decay=0.5, warmup_steps=2)
        >>> state = tx.init({"w": jnp.zeros(4)})
        >>> for size in (0.3, 0.2, 0.2, 1e30):
        ...     updates, state = tx.update({"w": jnp.full(4, size)}, state)
        ...     print(f"{updates['w'][0]:.3f} {state.ema_rms['w']:.3f} {state.num_clipped['w']}")
        0.300 0.300 0
        0.200 0.200 0
        0.200 0.200 0
        0.300 0.250 1

    Source: AdaGC (Wang et al., arXiv 2502.11034), Algorithm 1, as a link before any optimizer; with scope "global" what
    ZClip (Kumar et al., arXiv 2504.02507) does with standard deviations in place of a factor.
    """
    name = "clip_by_history"
    check_scope(name, scope)
    factor, decay = as_threshold(name, "factor", factor), as_decay(name, "decay", decay)
    if not isinstance(factor, jax.core.Tracer) and factor < 1:
        raise ValueError(f"{name}: factor must be at least 1, or each clip would lower the next bound, got {factor}")
    warmup_steps = _as_steps(name, "warmup_steps", warmup_steps)
    if warmup_max_norm is not None:
        warmup_max_norm = as_threshold(name, "warmup_max_norm", warmup_max_norm)

    def init_fn(params: PyTree) -> ClipByHistoryState:
        norms = norm_types(name, params, scope, axis_name)
        whole = norm_types(name, params, "global", axis_name)
        return ClipByHistoryState(
            rms=zeros(norms),
            ema_rms=zeros(norms),
            num_updates=no_updates(),
            num_clipped=zeros(norms, jnp.int32),
            num_nonfinite=zeros(whole, jnp.int32),
        )

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ClipByHistoryState]:
        del params
        grouping, mapped = group(name, updates, scope, kind=jnp.inexact), as_mapped(name, axis_name)
        norms = measure(grouping, mapped)
        rms = kept(name, state.rms, grouping, norms)  # which says so if the updates do not fit the state
        every = grouping.merged(norms, norms)
        is_finite = jax.tree.map(jnp.isfinite, every)
        history = grouping.laid_out(state.ema_rms, every)
        is_early = state.num_updates < jnp.asarray(warmup_steps).astype(state.num_updates.dtype)
        is_warmup = jax.tree.map(lambda a: is_early | (a == 0), history)
        share: Any = 1
        if warmup_max_norm is not None and every.values:
            sizes = grouping.merged(counts(grouping, mapped), norms)
            share = _share_within(warmup_max_norm, every, sizes, counts(grouping.whole(), mapped).values[0][0])

        def bound(norm: Array, history: Array, is_warmup: Array, is_finite: Array) -> Array:
            most = jnp.where(is_warmup, norm * share, jnp.asarray(factor, norm.dtype) * history)
            return jnp.where(is_finite, most, norm)  # which is not clipped then

        bounds = jax.tree.map(bound, every, history, is_warmup, is_finite)
        history = jax.tree.map(next_history, history, every, bounds, is_warmup, is_finite)
        # Behind barriers, or XLA:CPU would compute them again for each leaf.
        bounds, history = (cpu_barrier(grouping.split(values, norms)) for values in hold((bounds, history)))
        updates, clipped = _clip(grouping, norms, bounds)
        broken = jnp.logical_not(reduce(jnp.logical_and, map(jnp.all, is_finite.values), True))
        return updates, ClipByHistoryState(
            rms=rms,
            ema_rms=kept(name, state.ema_rms, grouping, history),
            num_updates=next_update(state.num_updates),
            num_clipped=added(name, state.num_clipped, grouping, clipped),
            num_nonfinite=state.num_nonfinite + broken.astype(state.num_nonfinite.dtype),
        )

    def next_history(history: Array, norm: Array, bound: Array, is_warmup: Array, is_finite: Array) -> Array:
        norm = jnp.minimum(norm, bound)
        newest = jnp.asarray(1 - decay, history.dtype)
        least = jnp.where(history == 0, norm, jnp.minimum(history, norm))
        new = jnp.where(is_warmup, least, history * (1 - newest) + norm * newest)
        return jnp.where(is_finite & (norm > 0), new, history)

    return with_state(name, optax.GradientTransformation(init_fn, update_fn))


def _as_steps(function: str, argument: str, value: Any) -> Any:
    """How many updates, in the dtype that they are counted in; a traced number is cut to a whole one."""
    value, most = as_threshold(function, argument, value), jnp.iinfo(no_updates().dtype).max
    if isinstance(value, jax.core.Tracer):
        return value
    if value % 1 or value > most:
        raise ValueError(f"{function}: {argument} must be a whole number of at most {most}, got {value}")
    return int(value)


def _share_within(max_norm: Any, norms: PerPool, sizes: PerPool, total: Any) -> Array:
    """What to multiply all updates by so that their L2 norm is within max_norm; those that are not finite left out.

    From the norms of the pools, the numbers of elements behind each, and that of all: the updates are not read again.
    """

    def weighted(norm: Array, count: Any) -> Array:
        return jnp.where(jnp.isfinite(norm), norm, 0) * jnp.sqrt(jnp.asarray(count / total, norm.dtype))

    every = jax.tree.map(weighted, norms, sizes).values
    # Numbers as few as these are better divided by their largest than measured by `tree_rms`, which is more to compile.
    largest = reduce(jnp.maximum, [jnp.max(norm, initial=0) for norm in every])
    over = four_over(largest)
    mean = largest * (jnp.sqrt(reduce(jnp.add, [jnp.sum(jnp.square(norm * over)) for norm in every])) / 4)
    bound = _as_rms(max_norm, total, mean.dtype)
    return jnp.where(mean > bound, quotient(bound, mean), 1)
