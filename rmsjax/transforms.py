"""optax: gradient transformations that read or set the RMS norm of updates.

All take the `scope` and `axis_name` of `rmsjax.tree_rms`, keep the dtype and structure of the updates, and have a state
whose structure and types are those of `init` at every step, so they run inside `lax.scan`, `optax.MultiSteps` and
`optax.apply_if_finite`. A field `rms` is the norm of the newest updates that came in; where several states of a chain
have one, `rmsjax.rms_states` finds each, and `rmsjax.rms_report` lists them all.

States can be serialized by `jax.export`; of those of optax in a chain, register the types for that yourself. Where
params are boxed (`nnx.Param`, `nn.Partitioned`, the `NamedArray` of haliax), norms are not, see `rmsjax.tree_rms`.

Numbers may be set by a schedule with `optax.inject_hyperparams`. A traced number cannot be refused: below 0 it counts
as 0, but for a learning rate, whose sign means what it means in optax.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.core
import jax.export
import jax.numpy as jnp
import optax
from jax import Array, lax

from rmsjax._boxes import unboxed
from rmsjax._checks import as_mapped, as_number, as_numeric, as_threshold
from rmsjax._pools import PerPool
from rmsjax._reduce import UNMAPPED, accumulator_dtype, lift, times
from rmsjax._tree import Grouping, Scope, check_scope, group, is_state, leaf_paths, measure, rescale

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import PyTree

__all__ = [
    "ClipByRMSState",
    "ClipByRelativeRMSState",
    "NormalizeByRMSState",
    "RecordRMSState",
    "ScaleByStableAdamState",
    "clip_by_relative_rms",
    "clip_by_rms",
    "normalize_by_rms",
    "record_rms",
    "rms_states",
    "scale_by_stable_adam",
    "stable_adamw",
]

# --------------------------------------------------------------------------------------------------------------- state


def _share_clipped(state: Any) -> PyTree:
    """The share of updates that were clipped, from 0 to 1, for each norm."""
    seen = jnp.maximum(state.num_updates, 1)  # with an axis for each of vmap, or of the states that a scan has stacked
    return jax.tree.map(lambda n: n / seen.reshape(seen.shape + (1,) * (n.ndim - seen.ndim)), state.num_clipped)


# Each state names its fields of norms in `norm_fields`, for `rms_report`; what clips, clips by the first of them.


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
    share_clipped = property(_share_clipped)


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
    share_clipped = property(_share_clipped)


class NormalizeByRMSState(NamedTuple):
    """`rms`: the norm of the newest updates before `normalize_by_rms`, as `tree_rms(updates, scope)` gives it.

    Example:
        >>> import jax.numpy as jnp, rmsjax
        >>> tx = rmsjax.normalize_by_rms()
        >>> print(tx.update(jnp.full(2, 7.0), tx.init(jnp.zeros(2)))[1].rms)
        7.0
    """

    rms: Any

    norm_fields = ("rms",)


class RecordRMSState(NamedTuple):
    """What `record_rms` has seen.

    `rms`: the norm of the newest updates, as `tree_rms(updates, scope)` gives it. `ema_rms`: its moving average, None
    without `ema_decay`. `num_updates`: how many updates were seen.

    Example:
        >>> import jax.numpy as jnp, rmsjax
        >>> tx = rmsjax.record_rms(ema_decay=0.5)
        >>> state = tx.init(jnp.zeros(2))
        >>> for size in (1.0, 4.0):
        ...     _, state = tx.update(jnp.full(2, size), state)
        >>> print(state.rms, state.ema_rms, state.num_updates)  # (0.5 * 1 + 4) / 1.5
        4.0 3.0 2
    """

    rms: Any
    ema_rms: Any
    num_updates: Array

    norm_fields = ("rms", "ema_rms")


class ScaleByStableAdamState(NamedTuple):
    """What `scale_by_stable_adam` has seen.

    `grad_mean` and `grad_rms`: for each element, the debiased moving average of the gradient, and the root of that of
    its square. `ratio_rms`: the norm of the newest gradient over `grad_rms`; where it was above 1 the step was divided
    by it. `num_updates`, `num_clipped`, `share_clipped`: as in `ClipByRMSState`.

    These are not the fields `count`, `mu` and `nu` of optax's Adam, and so do not have their names: code that asks for
    those would compute with other numbers than it thinks. After t updates mu is `grad_mean * (1 - b1**t)`, and nu is
    `grad_rms**2 * (1 - b2**t)`.

    Example:
        >>> import jax.numpy as jnp, rmsjax
        >>> tx = rmsjax.scale_by_stable_adam()
        >>> params = jnp.zeros(2)
        >>> _, state = tx.update(jnp.array([3.0, -4.0]), tx.init(params), params)
        >>> print(state.grad_mean, state.grad_rms, state.ratio_rms, state.share_clipped)
        [ 3. -4.] [3. 4.] 1.0 0.0
    """

    grad_mean: Any
    grad_rms: Any
    ratio_rms: Any
    num_updates: Array
    num_clipped: Any

    norm_fields = ("ratio_rms",)
    share_clipped = property(_share_clipped)


for _state in (
    ClipByRMSState,
    ClipByRelativeRMSState,
    NormalizeByRMSState,
    RecordRMSState,
    ScaleByStableAdamState,
):
    with contextlib.suppress(ValueError):  # the name is taken where this module is imported again
        jax.export.register_namedtuple_serialization(_state, serialized_name=f"rmsjax.{_state.__name__}")


def _norm_types(function: str, params: PyTree, scope: Scope, axis_name: str | Sequence[str] | None) -> PyTree:
    """The types of the norms that updates like the params have, as a state holds them; nothing is computed."""
    grouping = group(function, params, scope, kind=jnp.inexact, abstract=True)
    try:
        mapped = as_mapped(function, axis_name)
    except ValueError:  # init may run outside of the shard_map or pmap around update
        mapped = UNMAPPED

    def norms(leaves: list[Array]) -> PyTree:
        of_leaves = grouping._replace(leaves=leaves)
        return _as_held(of_leaves.tree(measure(of_leaves, mapped)))

    return jax.eval_shape(norms, grouping.leaves)


def _zeros(types: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """New zeros at each call: no two fields may share an array, or else a state cannot be donated."""
    if jax.sharding.get_abstract_mesh().empty:
        return jax.tree.map(lambda t: jnp.zeros(t.shape, dtype or t.dtype), types)
    # Keeps the sharding and the manual axes, which are part of a type, and without a mesh mean nothing.
    return jax.tree.map(lambda t: lax.full_like(t, 0, dtype or t.dtype), types)


def _no_updates() -> Array:
    return jnp.zeros((), jnp.int32)


def _next(num_updates: Array) -> Array:
    return jnp.asarray(optax.safe_increment(num_updates))


def _check_alike(function: str, at_init: PyTree, updates: PyTree) -> None:
    """Raise unless two trees are alike, one made of the params at init, the other of updates."""
    old, new = jax.tree.structure(at_init), jax.tree.structure(updates)
    if old != new:
        raise ValueError(
            f"{function}: updates must have the structure of the params that init was given: the state is for {old}, "
            f"the updates have {new}"
        )
    for path, o, n in zip(leaf_paths(at_init), jax.tree.leaves(at_init), jax.tree.leaves(updates), strict=True):
        if jnp.shape(o) != jnp.shape(n):
            raise ValueError(
                f"{function}: updates must have the shapes of the params that init was given: the state at {path!r} "
                f"has shape {jnp.shape(o)}, that of the updates {jnp.shape(n)}"
            )


def _held(function: str, old: PyTree, grouping: Grouping, entries: PerPool) -> PyTree:
    """Entries as a state holds them, in the structure that they had at init."""
    new = _as_held(grouping.tree(entries))
    _check_alike(function, old, new)
    return new


def _kept(function: str, old: PyTree, grouping: Grouping, norms: PerPool) -> PyTree:
    """Norms, in the dtypes that they had at init."""
    new = _held(function, old, grouping, norms)
    # Copies, since the leaves of one pool share an array, and what is shared cannot be donated.
    return jax.tree.map(lambda o, n: jnp.array(n, o.dtype), old, new)


def _added(function: str, old: PyTree, grouping: Grouping, clipped: PerPool) -> PyTree:
    """Counts, with one more where a pool was clipped."""
    new = _held(function, old, grouping, jax.tree.map(lambda c: c.astype(jnp.int32), clipped))
    return jax.tree.map(lambda o, n: lax.add(o, lax.convert_element_type(n, o.dtype)), old, new)


def _as_held(norms: PyTree) -> PyTree:
    """Norms in the structure that they have in a state.

    A tree without leaves becomes one zero. `optax.tree_map_params` calls init with such a tree, and takes what it finds
    of it in the state for parameters; norms have neither the shapes nor the shardings of these.
    """
    return norms if jax.tree.leaves(norms) else jnp.zeros(())


# ------------------------------------------------------------------------------------------------------------ clipping


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
        norms = _norm_types(name, params, scope, axis_name)
        return ClipByRMSState(_zeros(norms), _no_updates(), _zeros(norms, jnp.int32))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ClipByRMSState]:
        del params
        state = init_fn(updates) if state is None else state  # as of peers, which keep none
        grouping = group(name, updates, scope, kind=jnp.inexact)
        norms = measure(grouping, as_mapped(name, axis_name))
        updates, clipped = _clip(grouping, norms, jax.tree.map(lambda r: jnp.asarray(max_rms, r.dtype), norms))
        return updates, ClipByRMSState(
            rms=_kept(name, state.rms, grouping, norms),
            num_updates=_next(state.num_updates),
            num_clipped=_added(name, state.num_clipped, grouping, clipped),
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
        norms = _norm_types(name, params, scope, axis_name)
        return ClipByRelativeRMSState(_zeros(norms), _zeros(norms), _no_updates(), _zeros(norms, jnp.int32))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ClipByRelativeRMSState]:
        state = init_fn(updates) if state is None else state  # as of peers, which keep none
        grouping, mapped = group(name, updates, scope, kind=jnp.inexact), as_mapped(name, axis_name)
        # In the pools of the updates, even if the scope would choose otherwise by the dtype of the parameters.
        of_params = grouping._replace(leaves=jax.tree.leaves(_params_of(name, updates, params)))
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
            rms=_kept(name, state.rms, grouping, norms),
            param_rms=_kept(name, state.param_rms, grouping, sizes),
            num_updates=_next(state.num_updates),
            num_clipped=_added(name, state.num_clipped, grouping, clipped),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _params_of(function: str, updates: PyTree, params: PyTree | None) -> PyTree:
    """The parameters in the structure of the updates.

    As in optax, where an update is None the parameter may be anything, so that params may be a whole Equinox model.
    """
    if params is None:
        raise ValueError(f"{function}: update needs the parameters: call tx.update(updates, state, params)")
    slots, treedef = jax.tree.flatten(updates, is_leaf=lambda node: node is None)
    try:
        found = treedef.flatten_up_to(params)
    except ValueError:
        alone = sorted({*leaf_paths(updates)} ^ {*leaf_paths(params)})
        raise ValueError(
            f"{function}: params must have the structure of the updates: "
            + (f"leaf {alone[0]!r} is in one of them alone" if alone else f"expected {treedef}, got {params!r:.80}")
        ) from None
    leaves: list[Array] = []
    pairs = [(update, param) for update, param in zip(slots, found, strict=True) if update is not None]
    for path, (update, param) in zip(leaf_paths(updates), pairs, strict=True):
        leaves.append(as_numeric(function, f"leaf {path!r} of params", param))
        if leaves[-1].shape != jnp.shape(update):
            raise ValueError(
                f"{function}: params must have the shapes of the updates: expected {path!r} of shape "
                f"{jnp.shape(update)}, got {path!r} of shape {leaves[-1].shape}"
            )
    return jax.tree.unflatten(jax.tree.structure(updates), leaves)


# --------------------------------------------------------------------------------------------------------- normalizing


def normalize_by_rms(
    target: float | Array = 1.0,
    scope: Scope = "block",
    *,
    epsilon: float | Array = 0.0,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    r"""Scale updates to an RMS norm of target: $u \cdot \text{target} / \sqrt{\|u\|_{RMS}^2 + \epsilon}$.

    Steps then have the same size per element in every tensor and at every width. A zero update stays zero, and a
    non-finite one does not become finite. After an optimizer whose updates are orthogonal matrices, target=0.2 gives
    them the scale that AdamW's usually have, so that learning rate and weight decay carry over.

    Args:
        target: the norm of the result, at least 0; a traced value (`optax.inject_hyperparams`) may do.
        scope: what shares a norm and a factor, see `rmsjax.tree_rms`. Under `optax.inject_hyperparams` name it in
            static_args=("scope",), or else a callable is taken for a schedule.
        epsilon: what is added to the mean square, inside the root, as in `rms_normalize`; at least 0. Updates well
            below its root are not blown up to the target.
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates are split over, see `rmsjax.tree_rms`.

    Returns:
        A transformation with state `NormalizeByRMSState`, the norm before.

    Raises:
        TypeError: target or epsilon is not a number; at init or update, a leaf is not floating.
        ValueError: target or epsilon is negative or NaN; and what `clip_by_rms` raises.

    Example:
        >>> import jax, jax.numpy as jnp, optax, rmsjax
        >>> matrices = lambda params: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)
        >>> tx = optax.chain(
        ...     optax.contrib.scale_by_muon(weight_dimension_numbers=matrices),
        ...     rmsjax.normalize_by_rms(0.2),
        ...     optax.add_decayed_weights(0.1),
        ...     optax.scale_by_learning_rate(1e-3),
        ... )
        >>> params = {"w": jnp.zeros((4, 64))}
        >>> grads = {"w": jax.random.normal(jax.random.key(0), (4, 64))}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> print(f"{rmsjax.rms(updates['w']):.4g}")
        0.0002

    Source: Liu et al., Muon is Scalable for LLM Training (arXiv 2502.16982), section 2.2, for the target 0.2.
    """
    name = "normalize_by_rms"
    check_scope(name, scope)
    target = as_threshold(name, "target", target)
    epsilon = as_threshold(name, "epsilon", epsilon)

    def init_fn(params: PyTree) -> NormalizeByRMSState:
        return NormalizeByRMSState(_zeros(_norm_types(name, params, scope, axis_name)))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, NormalizeByRMSState]:
        del params
        state = init_fn(updates) if state is None else state  # as of peers, which keep none
        grouping = group(name, updates, scope, kind=jnp.inexact)
        norms = measure(grouping, as_mapped(name, axis_name))
        roots = jax.tree.map(lambda r: _hypot(r, jnp.sqrt(jnp.asarray(epsilon, r.dtype))), norms)
        updates = rescale(grouping, roots, jax.tree.map(lambda r: jnp.full_like(r, target), norms))
        return updates, NormalizeByRMSState(_kept(name, state.rms, grouping, norms))

    return optax.GradientTransformation(init_fn, update_fn)


@jax.custom_jvp
def _hypot(a: Array, b: Array) -> Array:
    """sqrt(a^2 + b^2) of numbers of any size; `jnp.hypot` has no derivative at 0, nor where 1/a^2 overflows."""
    return jnp.hypot(a, b)


@_hypot.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (a, b), (da, db) = primals, tangents
    root = _hypot(a, b)
    return root, _quotient(a, root) * da + _quotient(b, root) * db


# ----------------------------------------------------------------------------------------------------------- recording


def record_rms(
    scope: Scope = "block",
    *,
    ema_decay: float | Array | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    r"""Pass updates through and keep their RMS norm $\|u\|_{RMS}$ in the state.

    One before and one after a transformation show what it did. The moving average counts from the first update
    without a bias towards zero. As in `optax.ema`, one update that is not finite makes it NaN or infinite for good:
    where batches may break, put the optimizer in `optax.apply_if_finite`, whose skipped steps it then does not see.

    Args:
        scope: what shares a norm, see `rmsjax.tree_rms`. Under `optax.inject_hyperparams` name it in
            static_args=("scope",), or else a callable is taken for a schedule.
        ema_decay: also keep the exponential moving average of the norm with this decay, in [0, 1).
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates are split over, see `rmsjax.tree_rms`.

    Returns:
        A transformation with state `RecordRMSState`.

    Raises:
        TypeError: ema_decay is not a number; at init or update, a leaf is not floating.
        ValueError: ema_decay is not in [0, 1); and what `clip_by_rms` raises.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = optax.named_chain(
        ...     ("before", rmsjax.record_rms()), ("sign", optax.scale_by_sign()), ("after", rmsjax.record_rms())
        ... )
        >>> params = {"w": jnp.zeros(3)}
        >>> _, state = tx.update({"w": jnp.array([4.0, -4.0, 4.0])}, tx.init(params))
        >>> print(state["before"].rms["w"], state["after"].rms["w"])
        4.0 1.0

    Source: Wortsman et al. (arXiv 2304.13013), section 3, watch a norm of each tensor, which rises before the loss
    spikes: that of the gradient over Adam's root of v. The average is debiased as in Kingma and Ba (arXiv 1412.6980),
    section 3.
    """
    name = "record_rms"
    check_scope(name, scope)
    if ema_decay is not None:
        ema_decay = _as_decay(name, "ema_decay", ema_decay)

    def init_fn(params: PyTree) -> RecordRMSState:
        norms = _norm_types(name, params, scope, axis_name)
        return RecordRMSState(_zeros(norms), None if ema_decay is None else _zeros(norms), _no_updates())

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, RecordRMSState]:
        del params
        grouping = group(name, updates, scope, kind=jnp.inexact)
        norms = _kept(name, state.rms, grouping, measure(grouping, as_mapped(name, axis_name)))
        step, average = _next(state.num_updates), None
        if ema_decay is not None:
            average = jax.tree.map(lambda a, r: _averaged(a, r, ema_decay, step), state.ema_rms, norms)
        return updates, RecordRMSState(norms, average, step)

    return optax.GradientTransformation(init_fn, update_fn)


def _as_decay(function: str, argument: str, value: Any) -> Any:
    """The decay of a moving average: a number in [0, 1); a traced one is taken as it is."""
    value = as_threshold(function, argument, value)
    if not isinstance(value, jax.core.Tracer) and not value < 1:
        raise ValueError(f"{function}: {argument} must be below 1, got {value}")
    return value


def _newest_weight(decay: Any, step: Array, dtype: Any) -> Array:
    """How much the newest of `step` values counts in their debiased moving average: (1-decay)/(1-decay^step)."""
    newest = jnp.asarray(1 - decay, dtype)  # subtracted first: 0.999 rounded to float32 is off by 1e-5 of 1 - 0.999
    weight = newest / -jnp.expm1(step.astype(dtype) * jnp.log1p(-newest))
    return jnp.where(step > 1, weight, 1)  # exactly


def _averaged(average: Array, value: Array, decay: Any, step: Array) -> Array:
    """The debiased moving average with one more value, in the dtype of the value."""
    weight = _newest_weight(decay, step, value.real.dtype)
    return times(average.astype(value.dtype), 1 - weight) + times(value, weight)


# --------------------------------------------------------------------------------------------------------- stable adam


def scale_by_stable_adam(
    b1: float | Array = 0.9,
    b2: float | Array = 0.99,
    eps: float | Array = 1e-6,
    *,
    weight_decay: float | Array = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    mu_dtype: DTypeLike | None = None,
    scope: Scope = "block",
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    r"""Adam with update clipping: $\left(\frac{m}{\sqrt v + \epsilon} + \lambda w\right) / \max(1, \text{RMS}_t)$.

    m and v are Adam's debiased moving averages of the gradient g and its square, and
    $\text{RMS}_t = \|g / \sqrt{\max(v, \epsilon^2)}\|_{RMS}$ says how far the newest gradients outgrow the average that
    Adam divides them by. Where v is out of date, the step is shortened instead of spoilt. A spike still enters v, and
    steps stay short until v has forgotten it: against broken batches put `clip_by_rms` before this transformation.

    The root of v is kept instead of v, so no square overflows or underflows: right for every finite gradient, where
    v in float16 knows nothing below 2e-4 or above 256. Both averages are in float32 (float64 for float64) unless
    mu_dtype says otherwise. Where 0 would be divided by 0 the step is 0, so eps=0 is legal.

    Args:
        b1: the decay of the average of the gradient, in [0, 1).
        b2: the decay of the average of its square, in [0, 1). Numbers may be traced (`optax.inject_hyperparams`); with
            bfloat16 params pass hyperparam_dtype=jnp.float32 there, since 0.999 is 1 in bfloat16.
        eps: added to the root of v, and the least root in RMS_t; at least 0.
        weight_decay: the share $\lambda$ of the parameters w that is added before the clip, so that decay slows with
            the step, as in the paper. `optax.add_decayed_weights` after this transformation decays at full speed.
        mask: where to decay, as in `optax.adamw`: a tree of booleans, a prefix of one, or a function of the params.
        mu_dtype: the dtype to keep the average of the gradient in.
        scope: what shares an RMS_t, see `rmsjax.tree_rms`. The default is that of the paper; for a leaf of stacked
            layers name the axes of a layer. Under `optax.inject_hyperparams` name it in static_args=("scope",), or else
            a callable is taken for a schedule.
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates are split over, see `rmsjax.tree_rms`.

    Returns:
        A transformation with state `ScaleByStableAdamState`.

    Raises:
        TypeError: a number is none; at init or update, a leaf is not floating.
        ValueError: a decay is not in [0, 1), eps or weight_decay is negative or NaN; at update, params are missing and
            weight_decay is not 0; and what `clip_by_rms` raises.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = rmsjax.scale_by_stable_adam()
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> for grad in [1.0, 1.0, 1e4]:
        ...     updates, state = tx.update({"w": jnp.full(2, grad)}, state)
        ...     print(f"{updates['w'][0]:.3f} {state.ratio_rms['w']:.3f} {state.share_clipped['w']:.2f}")
        1.000 1.000 0.00
        1.000 1.000 0.00
        0.369 1.723 0.33

    Source: Wortsman et al., Stable and low-precision training for large-scale vision-language models
    (arXiv 2304.13013), Algorithm 2 (StableAdamW).
    """
    name = "scale_by_stable_adam"
    check_scope(name, scope)
    b1, b2 = _as_decay(name, "b1", b1), _as_decay(name, "b2", b2)
    eps = as_threshold(name, "eps", eps)
    weight_decay = as_threshold(name, "weight_decay", weight_decay)
    if mu_dtype is not None and not jnp.issubdtype(mu_dtype, jnp.inexact):
        raise TypeError(f"{name}: mu_dtype must be a floating-point or complex dtype, got {mu_dtype!r}")
    decays = isinstance(weight_decay, jax.core.Tracer) or weight_decay != 0

    def init_fn(params: PyTree) -> ScaleByStableAdamState:
        norms = _norm_types(name, params, scope, axis_name)
        lifted = jax.tree.map(lambda p: jax.eval_shape(_lifted, p), params)
        return ScaleByStableAdamState(
            grad_mean=jax.tree.map(lambda p, s: jnp.zeros_like(p, dtype=mu_dtype or s.dtype), params, lifted),
            grad_rms=jax.tree.map(lambda p, s: jnp.zeros_like(p, dtype=jnp.finfo(s.dtype).dtype), params, lifted),
            ratio_rms=_zeros(norms),
            num_updates=_no_updates(),
            num_clipped=_zeros(norms, jnp.int32),
        )

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ScaleByStableAdamState]:
        grouping = group(name, updates, scope, kind=jnp.inexact)
        _check_alike(name, state.grad_mean, updates)
        count = _next(state.num_updates)
        updates = grouping.treedef.unflatten(grouping.leaves)  # arrays, also where a number was given
        grads = jax.tree.map(_lifted, updates)
        mean = jax.tree.map(lambda m, g: _averaged(m, g, b1, count), state.grad_mean, grads)
        root = jax.tree.map(lambda r, g: _root_averaged(r, g, b2, count), state.grad_rms, grads)
        ratio = jax.tree.map(lambda g, r: _quotient(g, jnp.maximum(r, jnp.asarray(eps, r.dtype))), grads, root)
        norms = measure(grouping._replace(leaves=jax.tree.leaves(ratio)), as_mapped(name, axis_name))
        step = jax.tree.map(lambda m, r: _quotient(m, r + jnp.asarray(eps, r.dtype)), mean, root)
        if decays:
            step = _decayed(step, _params_of(name, updates, params), weight_decay, mask)
        ones = jax.tree.map(jnp.ones_like, norms)
        step = rescale(grouping._replace(leaves=jax.tree.leaves(step)), jax.tree.map(jnp.maximum, norms, ones), ones)
        return jax.tree.map(lambda s, u: s.astype(u.dtype), step, updates), ScaleByStableAdamState(
            grad_mean=jax.tree.map(lambda old, new: new.astype(old.dtype), state.grad_mean, mean),
            grad_rms=jax.tree.map(lambda old, new: new.astype(old.dtype), state.grad_rms, root),
            ratio_rms=_kept(name, state.ratio_rms, grouping, norms),
            num_updates=count,
            num_clipped=_added(name, state.num_clipped, grouping, jax.tree.map(jnp.greater, norms, ones)),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _lifted(x: Array) -> Array:
    return lift(x, accumulator_dtype(x.dtype))


def _root_averaged(root: Array, value: Array, decay: Any, step: Array) -> Array:
    """The root of the debiased moving average of squares with one more value, without squaring it."""
    weight = _newest_weight(decay, step, value.real.dtype)
    return _hypot(jnp.sqrt(1 - weight) * root.astype(weight.dtype), jnp.sqrt(weight) * jnp.abs(value))


def _quotient(x: Array, root: Array) -> Array:
    """x/root, and 0 where root is 0."""
    safe = jnp.where(root == 0, 1, root)
    return jnp.where(root == 0, 0, x / safe.astype(x.dtype))


def _decayed(step: PyTree, params: PyTree, weight_decay: Any, mask: Any) -> PyTree:
    """The step with its share of the parameters, where the mask says so; optax knows what a mask may be."""
    decay = optax.stateless(
        lambda step, params: jax.tree.map(
            lambda s, p: s + times(lift(p, s.real.dtype), jnp.asarray(weight_decay)), step, params
        )
    )
    decay = decay if mask is None else optax.masked(decay, mask)
    return decay.update(step, decay.init(params), params)[0]


def stable_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.99,
    eps: float | Array = 1e-6,
    weight_decay: float | Array = 1e-2,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    mu_dtype: DTypeLike | None = None,
    scope: Scope = "block",
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""StableAdamW: AdamW that divides its learning rate by $\max(1, \text{RMS}_t)$ for each pool of the scope.

    $w \leftarrow w - \eta_t \left(\frac{m}{\sqrt v + \epsilon} + \lambda w\right)$ with
    $\eta_t = \eta / \max(1, \text{RMS}_t)$. A cure without a threshold for the loss spikes of AdamW, which come when v
    is out of date. Three options of torch-optimi's are not offered: decouple_lr and max_lr, by which decay does not
    follow the learning rate, and Kahan summation for parameters in 16 bit.

    Args:
        learning_rate: $\eta$, a number or a schedule. As in optax its sign is not checked: below 0 the step ascends.
        b1, b2, eps, weight_decay, mask, mu_dtype, scope, axis_name: as in `scale_by_stable_adam`.

    Returns:
        An optimizer with the state of `scale_by_stable_adam` in it.

    Raises:
        TypeError, ValueError: as `scale_by_stable_adam`; the learning rate is neither a finite number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = rmsjax.stable_adamw(optax.cosine_decay_schedule(1e-2, 1000), weight_decay=0.1)
        >>> params = {"w": jnp.ones(2)}
        >>> updates, state = tx.update({"w": jnp.array([0.3, -20.0])}, tx.init(params), params)
        >>> print(updates["w"], optax.tree.get(state, "ratio_rms")["w"])
        [-0.01099997  0.009     ] 1.0

    Source: Wortsman et al. (arXiv 2304.13013), Algorithm 2; the defaults are those of torch-optimi's StableAdamW.
    """
    return optax.chain(
        scale_by_stable_adam(
            b1, b2, eps, weight_decay=weight_decay, mask=mask, mu_dtype=mu_dtype, scope=scope, axis_name=axis_name
        ),
        _by_learning_rate(learning_rate),
    )


def _by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    if callable(learning_rate):
        return optax.scale_by_learning_rate(learning_rate)
    if not isinstance(learning_rate, jax.core.Tracer) or learning_rate.ndim:
        as_number("stable_adamw", "learning_rate", learning_rate)
    # Not optax.scale: by a traced float32 number it turns bfloat16 updates into float32.
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: times(u, -jnp.asarray(learning_rate)), updates))


# ------------------------------------------------------------------------------------------------------------- reading


def rms_states(opt_state: PyTree, *, sep: str = "/") -> dict[str, Any]:
    """The states of rmsjax's transformations in the state of an optimizer, by their path. Works under `jit`.

    It finds them however many there are and however deep (`optax.tree.get` finds a field that only one state has).
    `rmsjax.rms_report` shows the same as a table.

    Args:
        opt_state: the state of any optax transformation, of a `TrainState` or of an `nnx.Optimizer`.
        sep: what separates the parts of a path.

    Returns:
        A dict, in the order of the chain, such as `{"0": RecordRMSState(...), "1": ClipByRMSState(...)}`: a link of
        `optax.chain` has its place in it as path, a link of `optax.named_chain` its name, a transformation alone "".
        Boxes, such as the variables of Flax NNX, are replaced by their arrays.

    Raises:
        ValueError: there is no such state.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = optax.chain(rmsjax.record_rms(), rmsjax.clip_by_rms(1.0), optax.adam(1e-3))
        >>> updates, state = tx.update({"w": jnp.array([3.0, -3.0])}, tx.init({"w": jnp.zeros(2)}))
        >>> recorded, clip = rmsjax.rms_states(state).values()
        >>> print(recorded.rms["w"], clip.rms, clip.num_clipped)
        3.0 3.0 1

    Source: paths as `jax.tree_util.keystr` writes them.
    """
    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_state)[0]
    found = {
        jax.tree_util.keystr(path, simple=True, separator=sep): unboxed(node) for path, node in nodes if is_state(node)
    }
    if not found:
        made = ", ".join(name for name in __all__ if name[0].islower() and name != "rms_states")
        raise ValueError(
            f"rms_states: opt_state must hold the state of one of rmsjax's transformations ({made}), "
            f"got {type(opt_state).__name__} without any"
        )
    return found
