"""optax: Adam with update clipping, which shortens the steps that its moving average knows too little of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import Array

from rmsjax._checks import as_dtype, as_mapped, as_number, as_result_dtype, as_threshold
from rmsjax._reduce import accumulator_dtype, lift, lifted, times
from rmsjax._tree import Scope, check_scope, group, leaf_paths, measure
from rmsjax._updates import (
    added,
    as_decay,
    averaged,
    check_alike,
    hypot,
    kept,
    newest_weight,
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
    from jax.typing import DTypeLike
    from jaxtyping import PyTree

__all__ = ["ScaleByStableAdamState", "scale_by_stable_adam", "stable_adamw"]


@serializable
class ScaleByStableAdamState(NamedTuple):
    """What `scale_by_stable_adam` has seen.

    `grad_mean` and `grad_rms`: for each element, the debiased moving average of the gradient, and the root of that of
    its square. `ratio_rms`: the norm of the newest gradient over `grad_rms`; where it was above 1 the step was divided
    by it, and where it was so by more than roundings that was counted. `num_updates`, `num_clipped`, `share_clipped`:
    as in `ClipByRMSState`.

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
    share_clipped = property(share_clipped)


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
        mu_dtype: the dtype to keep the average of the gradient in, complex where that is.
        scope: what shares an RMS_t, see `rmsjax.tree_rms`. The default is that of the paper; for a leaf of stacked
            layers name the axes of a layer. Under `optax.inject_hyperparams` name it in static_args=("scope",), or else
            a callable is taken for a schedule.
        axis_name: under `shard_map` or `pmap`, the mapped axes that updates are split over, see `rmsjax.tree_rms`.

    Returns:
        A transformation with state `ScaleByStableAdamState`.

    Raises:
        TypeError: a number is none, or mu_dtype no floating or complex dtype; at init or update, a leaf is not
            floating; at init, a leaf is complex and mu_dtype not, or the other way round.
        ValueError: a decay is not in [0, 1), eps or weight_decay is negative or NaN; at update, the state is None, or
            params are missing and weight_decay is not 0; and what `clip_by_rms` raises.

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
    b1, b2 = as_decay(name, "b1", b1), as_decay(name, "b2", b2)
    eps = as_threshold(name, "eps", eps)
    weight_decay = as_threshold(name, "weight_decay", weight_decay)
    if mu_dtype is not None:
        as_dtype(name, "mu_dtype", mu_dtype, jnp.inexact)
    decays = isinstance(weight_decay, jax.core.Tracer) or weight_decay != 0

    def init_fn(params: PyTree) -> ScaleByStableAdamState:
        norms = norm_types(name, params, scope, axis_name)
        leaves = group(name, params, scope, kind=jnp.inexact, abstract=True).leaves
        for path, leaf in zip(leaf_paths(params), leaves, strict=True):
            as_result_dtype(name, mu_dtype, leaf, argument="mu_dtype", name=f"leaf {path!r} of params")
        wide = jax.tree.map(lambda p: jax.eval_shape(lifted, p), params)
        return ScaleByStableAdamState(
            grad_mean=jax.tree.map(lambda p, s: jnp.zeros_like(p, dtype=mu_dtype or s.dtype), params, wide),
            grad_rms=jax.tree.map(lambda p, s: jnp.zeros_like(p, dtype=jnp.finfo(s.dtype).dtype), params, wide),
            ratio_rms=zeros(norms),
            num_updates=no_updates(),
            num_clipped=zeros(norms, jnp.int32),
        )

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, ScaleByStableAdamState]:
        grouping = group(name, updates, scope, kind=jnp.inexact)
        check_alike(name, state.grad_mean, updates)
        count = next_update(state.num_updates)
        weights = {
            dtype: (newest_weight(b1, count, dtype), newest_weight(b2, count, dtype))
            for dtype in {accumulator_dtype(leaf.dtype) for leaf in grouping.leaves}
        }
        leaves = zip(grouping.leaves, jax.tree.leaves(state.grad_mean), jax.tree.leaves(state.grad_rms), strict=True)
        found = [_moments(g, m, r, *weights[accumulator_dtype(g.dtype)], eps) for g, m, r in leaves]
        mean, root, ratio, step = ([of_leaf[k] for of_leaf in found] for k in range(4))
        # No ratio is above 1/sqrt(1 - b2), and one whose square underflows shortens no step.
        norms = measure(grouping._replace(leaves=ratio), as_mapped(name, axis_name), bounded=True)
        if decays:
            trees = grouping.treedef.unflatten(step), params_of(name, updates, params)
            step = jax.tree.leaves(_decayed(*trees, weight_decay, mask))
        factors = jax.tree.map(lambda norm: 1 / jnp.maximum(norm, 1), norms)
        step = grouping._replace(leaves=step).each(times, factors)
        return _as_before(grouping.treedef.unflatten(grouping.leaves), step), ScaleByStableAdamState(
            grad_mean=_as_before(state.grad_mean, mean),
            grad_rms=_as_before(state.grad_rms, root),
            ratio_rms=kept(name, state.ratio_rms, grouping, norms),
            num_updates=count,
            num_clipped=added(name, state.num_clipped, grouping, jax.tree.map(_shortens, norms)),
        )

    return with_state(name, optax.GradientTransformation(init_fn, update_fn))


def _shortens(norm: Array) -> Array:
    """Whether a norm of ratios is above 1 by more than roundings, which for a steady gradient are on either side."""
    return norm > 1 + 16 * jnp.finfo(norm.dtype).eps


def _as_before(tree: PyTree, leaves: list[Array]) -> PyTree:
    """New leaves, in the structure and the dtypes of a tree."""
    old, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([new.astype(o.dtype) for o, new in zip(old, leaves, strict=True)])


@jax.jit  # so that leaves of one type are traced once
def _moments(grad: Array, mean: Array, root: Array, w1: Array, w2: Array, eps: Any) -> tuple[Array, ...]:
    """One leaf: the moving average of the gradient, the root of that of its square, and the gradient and the step of
    Adam over that root. No square is taken of a number that may be large or small.
    """
    grad = lifted(grad)
    mean = averaged(mean, grad, w1)
    root = hypot(jnp.sqrt(1 - w2) * root.astype(w2.dtype), jnp.sqrt(w2) * jnp.abs(grad))
    eps = jnp.asarray(eps, root.dtype)
    return mean, root, quotient(grad, jnp.maximum(root, eps)), quotient(mean, root + eps)


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
    adam = scale_by_stable_adam(
        b1, b2, eps, weight_decay=weight_decay, mask=mask, mu_dtype=mu_dtype, scope=scope, axis_name=axis_name
    )
    return with_state("stable_adamw", optax.chain(adam, _by_learning_rate(learning_rate)))


def _by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    if callable(learning_rate):
        return optax.scale_by_learning_rate(learning_rate)
    if not isinstance(learning_rate, jax.core.Tracer) or learning_rate.ndim:
        as_number("stable_adamw", "learning_rate", learning_rate)
    # Not optax.scale: by a traced float32 number it turns bfloat16 updates into float32.
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: times(u, -jnp.asarray(learning_rate)), updates))
