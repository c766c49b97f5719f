"""optax: any optimizer with parameters that keep their RMS norm and steps of a set size beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from rmsjax._checks import as_mapped, as_threshold, described
from rmsjax._reduce import lifted, times
from rmsjax._tree import Scope, check_scope, counts, excess, group, measure, rescale
from rmsjax._updates import (
    as_held,
    kept,
    mapped_at_init,
    next_update,
    no_updates,
    norm_types,
    params_of,
    quotient,
    serializable,
    with_state,
    zeros,
)

if TYPE_CHECKING:
    from jaxtyping import PyTree

__all__ = ["HyperballState", "hyperball"]

_NAME = "hyperball"


@serializable
class HyperballState(NamedTuple):
    """What `hyperball` keeps of the leaves that it holds; of others there is none.

    `rms`: the norm of the newest updates that the inner optimizer gave. `param_rms`: the norm that the parameters had
    at init, and keep. `num_updates`: how many updates were seen.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = rmsjax.hyperball(optax.sgd(1.0), 0.1)
        >>> params = {"w": jnp.full((2, 2), 3.0), "b": jnp.zeros(2)}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> (state,) = rmsjax.rms_states(state).values()
        >>> print(state.rms["w"], state.param_rms["w"], state.num_updates)
        3.0 3.0 1
    """

    rms: Any
    param_rms: Any
    num_updates: Array

    norm_fields = ("rms", "param_rms")


def hyperball(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    scope: Scope = "block",
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Let an optimizer choose the direction, and keep the RMS norm R of each matrix: none grows, none needs decay.

    With the updates u of the inner optimizer,
    $w \leftarrow R \, \frac{v}{\|v\|_{RMS}}$ where $v = w + \eta R \, \frac{u}{\|u\|_{RMS}}$ and $R = \|w_0\|_{RMS}$.
    So each step moves a matrix by the same share of its size, whatever its shape, width, gradient or age: learning
    rates carry over from a small model to a large one, and weight decay has nothing left to do.

    R is kept in the state and every step is brought back to it, so no rounding adds up: in float32 the norm stays
    within 2 units in its last place for learning rates up to 0.1, and within some more above. In 16 bits each element
    is rounded to the parameters' dtype once, as if it had been computed in float32; one that changes its sign, or by
    more than a factor of 2, once more, as the update is the difference. Updates in 16 bits for parameters in float32
    have the rounding of 16 bits. What is put after it in a chain takes parameters off their norm again; make it the
    last link.

    Args:
        inner: any optax optimizer, such as `optax.adam(1e-3)` or one of `optax.contrib`. What it says of the size of
            updates counts only for the leaves that are not held.
        learning_rate: $\eta$, the norm of a step over that of the parameters, at least 0; a number or a schedule. Where
            AdamW has a learning rate and a weight decay that suit, the root of their product is a first guess.
        mask: which leaves are held, as in `optax.masked`: a tree of booleans, a prefix of one, or a function of the
            params. None for all with two axes or more; leave out embeddings, whose rows have a size of their own, and
            stacked vectors. The others move as the inner optimizer says, as does a pool that starts at zero: it has
            no size to keep.
        scope: what shares an R, see `rmsjax.tree_rms`; for a leaf of stacked layers name the axes of a layer. Under
            `optax.inject_hyperparams` name what is no number in static_args=("inner", "mask", "scope").
        axis_name: under `shard_map` or `pmap`, the mapped axes that leaves are split over, see `rmsjax.tree_rms`.

    Returns:
        An optimizer whose state is that of `inner` and a `HyperballState`; its update needs `params`.

    Raises:
        TypeError: inner is no optax optimizer, or the learning rate neither a number nor a schedule; at init or update,
            a leaf that is held is not floating.
        ValueError: the learning rate is negative or NaN; at update, the state is None, or params are missing or do not
            fit the updates; and what `clip_by_rms` raises.

    Example:
        >>> import jax.numpy as jnp, optax, rmsjax
        >>> tx = rmsjax.hyperball(optax.adam(1e-3), optax.cosine_decay_schedule(0.1, 1000))
        >>> params = {"w": jnp.array([[3.0, -4.0]]), "b": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> grads = {"w": jnp.array([[10.0, 1.0]]), "b": jnp.ones(2)}
        >>> for _ in range(3):
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(*params["w"][0], f"{rmsjax.rms(params['w']):.4f} {params['b'][0]:.3f}")
        2.597 -4.273 3.5355 -0.001
        2.182 -4.499 3.5355 -0.002
        1.763 -4.679 3.5355 -0.003

    Source: Wen et al., hyperball optimization (arXiv 2606.16899); AdamH is `hyperball(optax.adam(...), ...)`, and MuonH
    the same with Muon.
    """
    if not isinstance(inner, optax.GradientTransformation):  # pyright: ignore[reportUnnecessaryIsInstance]
        is_wrapper = hasattr(inner, "gradient_transformation")  # optax.MultiSteps
        fix = "pass its gradient_transformation()" if is_wrapper else "pass one such as optax.adam(1e-3)"
        raise TypeError(f"{_NAME}: inner must be an optax optimizer, got {described(inner)}; {fix}")
    check_scope(_NAME, scope)
    if not callable(learning_rate):
        learning_rate = as_threshold(_NAME, "learning_rate", learning_rate)
    held = optax.masked(_held(learning_rate, scope, axis_name), _matrices if mask is None else mask)

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        return held.update(updates, state, params_of(_NAME, updates, params))

    return with_state(_NAME, optax.chain(inner, optax.GradientTransformation(held.init, update_fn)))


def _matrices(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)


def _held(
    learning_rate: optax.ScalarOrSchedule, scope: Scope, axis_name: str | Sequence[str] | None
) -> optax.GradientTransformation:
    """From directions to the updates that take parameters there, on the sphere that they started on."""

    def init_fn(params: PyTree) -> HyperballState:
        types = norm_types(_NAME, params, scope, axis_name)
        grouping, mapped = group(_NAME, params, scope, kind=jnp.inexact), mapped_at_init(_NAME, axis_name)
        wide = grouping._replace(leaves=list(map(lifted, grouping.leaves)))
        norms = measure(wide, mapped)
        units = jax.tree.map(_unit, norms)
        scaled = wide._replace(leaves=wide.each(times, units))
        above = excess(scaled, jax.tree.map(lax.mul, norms, units), mapped)
        norms = jax.tree.map(lambda r, e: r + r * (e / 2), norms, above)
        # Copies, as no two fields of a state may share an array.
        return HyperballState(zeros(types), jax.tree.map(jnp.array, as_held(wide.tree(norms))), no_updates())

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, HyperballState]:
        grouping, mapped = group(_NAME, updates, scope, kind=jnp.inexact), as_mapped(_NAME, axis_name)
        old = jax.tree.leaves(params)
        norms = measure(grouping, mapped)
        rms = kept(_NAME, state.rms, grouping, norms)  # which says so if the updates do not fit the state
        rate = learning_rate(state.num_updates) if callable(learning_rate) else learning_rate

        def length(r: Array, target: Array) -> Array:
            return jnp.where(target == 0, r, target * jnp.maximum(jnp.asarray(rate, target.dtype), 0))

        wide = grouping._replace(leaves=list(map(lifted, old)))
        sphere = wide.laid_out(state.param_rms, counts(wide, mapped))
        units = jax.tree.map(_unit, sphere)
        sphere = jax.tree.map(lax.mul, sphere, units)
        directions = grouping._replace(leaves=list(map(lifted, grouping.leaves)))
        lengths = jax.tree.map(length, norms, grouping.laid_out(sphere, norms))
        steps = jax.tree.leaves(rescale(directions, norms, lengths))
        moved = grouping._replace(leaves=list(map(_moved, wide.each(times, units), steps)))
        sphere = moved.laid_out(sphere, counts(moved, mapped))
        shares = jax.tree.map(_share_to_sphere, excess(moved, sphere, mapped))
        inverses = jax.tree.map(lambda unit: 1 / unit, units)
        new = moved.each(lambda v, share, inverse: times(v + times(v, share), inverse), shares, inverses)
        changes = [_change(q, p, u.dtype) for q, p, u in zip(new, old, grouping.leaves, strict=True)]
        return grouping.treedef.unflatten(changes), HyperballState(rms, state.param_rms, next_update(state.num_updates))

    return optax.GradientTransformation(init_fn, update_fn)


def _unit(norm: Array) -> Array:
    """What to multiply numbers of this size by: a power of two, so that no sum overflows, nor small step underflows."""
    info = jnp.finfo(norm.dtype)
    far, eps = float(info.max) ** 0.5, float(info.eps)
    return jnp.where(norm > far, eps, jnp.where((norm > 0) & (norm < 1 / far), 1 / eps, 1)).astype(norm.dtype)


def _moved(old: Array, step: Array) -> Array:
    return lax.add(old, step.astype(old.dtype))


def _share_to_sphere(above: Array) -> Array:
    """1/sqrt(1 + above) - 1: a factor near 1 would be rounded as such."""
    square = jnp.maximum(1 + above, 0)  # rounding may take that of a zero below 0
    return -quotient(above, square + jnp.sqrt(square))


def _change(new: Array, old: Array, dtype: Any) -> Array:
    """What to add to the old parameters for the new ones, rounded to their dtype.

    They are rounded before they are subtracted: the difference of two numbers of one dtype within a factor of 2 of each
    other is one of that dtype, and adds up to the new one exactly.
    """
    wide = lifted(old)
    return lax.sub(new.astype(old.dtype).astype(wide.dtype), wide).astype(dtype)
