"""optax: gradient transformations that set or record the RMS norm of updates, and what all have recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rmsjax._boxes import unboxed
from rmsjax._checks import as_mapped, as_threshold, described
from rmsjax._tree import Scope, check_scope, group, is_state, measure, rescale
from rmsjax._updates import (
    as_decay,
    averaged,
    hypot,
    kept,
    newest_weight,
    next_update,
    no_updates,
    norm_types,
    params_of,
    serializable,
    with_state,
    zeros,
)

if TYPE_CHECKING:
    from jaxtyping import PyTree

__all__ = ["NormalizeByRMSState", "RecordRMSState", "normalize_by_rms", "record_rms", "rms_states"]


@serializable
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


@serializable
class RecordRMSState(NamedTuple):
    """What `record_rms` has seen.

    `rms`: the norm of the newest updates, as `tree_rms(updates, scope)` gives it. `param_rms`: the norm of the
    parameters, and `ratio`: rms over it; None without `relative`. `ema_rms`: the moving average of rms, None without
    `ema_decay`. `num_updates`: how many updates were seen.

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
    param_rms: Any
    ema_rms: Any
    num_updates: Array

    norm_fields = ("rms", "param_rms", "ratio", "ema_rms")

    @property
    def ratio(self) -> Any:
        """The size of the newest updates in that of what they update; 0 of updates that are 0."""
        return None if self.param_rms is None else jax.tree.map(_ratio, self.rms, self.param_rms)


def _ratio(update: Any, param: Any) -> Array:
    return update / jnp.where((update == 0) & (param == 0), 1, param)


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
        return NormalizeByRMSState(zeros(norm_types(name, params, scope, axis_name)))

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, NormalizeByRMSState]:
        del params
        grouping = group(name, updates, scope, kind=jnp.inexact)
        norms = measure(grouping, as_mapped(name, axis_name))
        roots = jax.tree.map(lambda r: hypot(r, jnp.sqrt(jnp.asarray(epsilon, r.dtype))), norms)
        updates = rescale(grouping, roots, jax.tree.map(lambda r: jnp.full_like(r, target), norms))
        return updates, NormalizeByRMSState(kept(name, state.rms, grouping, norms))

    return with_state(name, optax.GradientTransformation(init_fn, update_fn), or_new=True)


# ----------------------------------------------------------------------------------------------------------- recording


def record_rms(
    scope: Scope = "block",
    *,
    ema_decay: float | Array | None = None,
    relative: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    r"""Pass updates through and keep their RMS norm $\|u\|_{RMS}$ in the state.

    One before and one after a transformation show what it did. The last link of a chain sees the step itself: with
    relative=True it also keeps $\|w\|_{RMS}$, and so the ratio of the two, the share of its size by which a step
    changes each tensor.

    The moving average counts from the first update without a bias towards zero. As in `optax.ema`, one update that is
    not finite makes it NaN or infinite for good: where batches may break, put the optimizer in
    `optax.apply_if_finite`, whose skipped steps it then does not see.

    Args:
        scope: what shares a norm, see `rmsjax.tree_rms`. Under `optax.inject_hyperparams` name it in
            static_args=("scope",), or else a callable is taken for a schedule.
        ema_decay: also keep the exponential moving average of the norm with this decay, in [0, 1).
        relative: also keep the norm of the parameters, pooled as the updates are; its update then needs `params`.
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates are split over, see `rmsjax.tree_rms`.

    Returns:
        A transformation with state `RecordRMSState`.

    Raises:
        TypeError: ema_decay is not a number, or relative not a boolean; at init or update, a leaf is not floating.
        ValueError: ema_decay is not in [0, 1); at update, the state is None, or relative is True and params are
            missing or do not fit the updates; and what `clip_by_rms` raises.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = optax.named_chain(
        ...     ("before", rmsjax.record_rms()), ("sign", optax.scale_by_sign()), ("after", rmsjax.record_rms())
        ... )
        >>> params = {"w": jnp.zeros(3)}
        >>> _, state = tx.update({"w": jnp.array([4.0, -4.0, 4.0])}, tx.init(params))
        >>> print(state["before"].rms["w"], state["after"].rms["w"])
        4.0 1.0
        >>> tx = optax.chain(optax.sgd(0.5), rmsjax.record_rms(relative=True))
        >>> params = {"w": jnp.full(3, 100.0)}
        >>> _, state = tx.update({"w": jnp.array([4.0, -4.0, 4.0])}, tx.init(params), params)
        >>> print(rmsjax.rms_report(state))
        path             rms
        1/rms/w            2
        1/param_rms/w    100
        1/ratio/w       0.02

    Source: Wortsman et al. (arXiv 2304.13013), section 3, watch a norm of each tensor, which rises before the loss
    spikes: that of the gradient over Adam's root of v. The average is debiased as in Kingma and Ba (arXiv 1412.6980),
    section 3.
    """
    name = "record_rms"
    check_scope(name, scope)
    if ema_decay is not None:
        ema_decay = as_decay(name, "ema_decay", ema_decay)
    if not isinstance(relative, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name}: relative must be True or False, got {described(relative)}")

    def init_fn(params: PyTree) -> RecordRMSState:
        norms = norm_types(name, params, scope, axis_name)
        of_params = zeros(norms) if relative else None
        return RecordRMSState(zeros(norms), of_params, None if ema_decay is None else zeros(norms), no_updates())

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, RecordRMSState]:
        grouping, mapped = group(name, updates, scope, kind=jnp.inexact), as_mapped(name, axis_name)
        norms = kept(name, state.rms, grouping, measure(grouping, mapped))
        step, of_params, average = next_update(state.num_updates), None, None
        if relative:
            given = grouping._replace(leaves=jax.tree.leaves(params_of(name, updates, params)))
            of_params = kept(name, state.param_rms, grouping, measure(given, mapped))
        if ema_decay is not None:
            average = jax.tree.map(
                lambda a, r: averaged(a, r, newest_weight(ema_decay, step, r.dtype)), state.ema_rms, norms
            )
        return updates, RecordRMSState(norms, of_params, average, step)

    return with_state(name, optax.GradientTransformation(init_fn, update_fn))


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
        What another transformation holds has the name of its field there as well, as in "1/inner_state" of
        `optax.inject_hyperparams`.
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
        raise ValueError(
            "rms_states: opt_state must hold the state of one of rmsjax's transformations, such as clip_by_rms or "
            f"record_rms, got {type(opt_state).__name__} without any"
        )
    return found
