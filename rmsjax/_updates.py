"""optax: what all gradient transformations share, states that hold norms, parameters beside their updates, averages.

All take the `axis_name` of `rmsjax.tree_rms` and, but for `clip_by_global_norm`, its `scope`. They keep the dtype and
structure of the updates, and have a state whose structure and types are those of `init` at every step, so they run
inside `lax.scan`, `optax.MultiSteps` and `optax.apply_if_finite`. A field `rms` is the norm of the newest updates that
came in. Each state names its fields of norms in `norm_fields`, by which `rmsjax.rms_states` finds it and
`rmsjax.rms_report` lists them; what clips, clips by the first of them.

States can be serialized by `jax.export`; of those of optax in a chain, register the types for that yourself. Where
params are boxed (`nnx.Param`, `nn.Partitioned`, the `NamedArray` of haliax), norms are not, see `rmsjax.tree_rms`.

Numbers may be set by a schedule with `optax.inject_hyperparams`. A traced number cannot be refused: below 0 it counts
as 0, but for the learning rate of `stable_adamw`, whose sign means what it means in optax.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.core
import jax.export
import jax.numpy as jnp
import optax
from jax import Array, lax

from rmsjax._checks import as_mapped, as_numeric, as_threshold
from rmsjax._pools import PerPool
from rmsjax._reduce import UNMAPPED, Mapped, times
from rmsjax._tree import Grouping, Scope, group, leaf_paths, measure

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import PyTree

T = TypeVar("T")
Transformation = TypeVar("Transformation", bound=optax.GradientTransformation)

# -------------------------------------------------------------------------------------------------------------- states


def serializable(state: type[T]) -> type[T]:
    """Let `jax.export` write and read a state."""
    with contextlib.suppress(ValueError):  # the name is taken where its module is imported again
        jax.export.register_namedtuple_serialization(state, serialized_name=f"rmsjax.{state.__name__}")
    return state


def share_clipped(state: Any) -> PyTree:
    """The share of updates that were clipped, from 0 to 1, for each norm."""
    seen = jnp.maximum(state.num_updates, 1)  # with an axis for each of vmap, or of the states that a scan has stacked
    return jax.tree.map(lambda n: n / seen.reshape(seen.shape + (1,) * (n.ndim - seen.ndim)), state.num_clipped)


def with_state(function: str, tx: Transformation, *, or_new: bool = False) -> Transformation:
    """The transformation, whose update is given a state: None is an error, or a new one (`or_new`).

    New where what is done to updates does not depend on it: code for peers, which keep none there, may pass None.
    Not where the state is what one asked for.
    """

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> tuple[PyTree, Any]:
        if state is None and not or_new:
            raise ValueError(
                f"{function}: update must be given the state, got None; call tx.update(updates, state, params) with "
                "the state of the update before, at first that of tx.init(params)"
            )
        return tx.update(updates, tx.init(updates) if state is None else state, params, **extra_args)

    return tx._replace(update=update)


def mapped_at_init(function: str, axis_name: str | Sequence[str] | None) -> Mapped:
    """The mapped axes in init, which may run outside of the shard_map or pmap around update, where params are whole."""
    try:
        return as_mapped(function, axis_name)
    except ValueError:
        return UNMAPPED


def norm_types(function: str, params: PyTree, scope: Scope, axis_name: str | Sequence[str] | None) -> PyTree:
    """The types of the norms that updates like the params have, as a state holds them; nothing is computed."""
    grouping = group(function, params, scope, kind=jnp.inexact, abstract=True)
    mapped = mapped_at_init(function, axis_name)

    def norms(leaves: list[Array]) -> PyTree:
        of_leaves = grouping._replace(leaves=leaves)
        return as_held(of_leaves.tree(measure(of_leaves, mapped)))

    return jax.eval_shape(norms, grouping.leaves)


def zeros(types: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """New zeros at each call: no two fields may share an array, or else a state cannot be donated."""
    if jax.sharding.get_abstract_mesh().empty:
        return jax.tree.map(lambda t: jnp.zeros(t.shape, dtype or t.dtype), types)
    # Keeps the sharding and the manual axes, which are part of a type, and without a mesh mean nothing.
    return jax.tree.map(lambda t: lax.full_like(t, 0, dtype or t.dtype), types)


def no_updates() -> Array:
    return jnp.zeros((), jnp.int32)


def next_update(num_updates: Array) -> Array:
    return jnp.asarray(optax.safe_increment(num_updates))


def check_alike(function: str, at_init: PyTree, updates: PyTree) -> None:
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
    new = as_held(grouping.tree(entries))
    check_alike(function, old, new)
    return new


def kept(function: str, old: PyTree, grouping: Grouping, norms: PerPool) -> PyTree:
    """Norms, in the dtypes that they had at init."""
    new = _held(function, old, grouping, norms)
    # Copies, since the leaves of one pool share an array, and what is shared cannot be donated.
    return jax.tree.map(lambda o, n: jnp.array(n, o.dtype), old, new)


def added(function: str, old: PyTree, grouping: Grouping, clipped: PerPool) -> PyTree:
    """Counts, with one more where a pool was clipped."""
    new = _held(function, old, grouping, jax.tree.map(lambda c: c.astype(jnp.int32), clipped))
    return jax.tree.map(lambda o, n: lax.add(o, lax.convert_element_type(n, o.dtype)), old, new)


def as_held(norms: PyTree) -> PyTree:
    """Norms in the structure that they have in a state.

    A tree without leaves becomes one zero. `optax.tree_map_params` calls init with such a tree, and takes what it finds
    of it in the state for parameters; norms have neither the shapes nor the shardings of these.
    """
    return norms if jax.tree.leaves(norms) else jnp.zeros(())


# ---------------------------------------------------------------------------------------------------------- parameters


def params_of(function: str, updates: PyTree, params: PyTree | None) -> PyTree:
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


# ------------------------------------------------------------------------------------------------------------- numbers


def as_decay(function: str, argument: str, value: Any) -> Any:
    """The decay of a moving average: a number in [0, 1); a traced one is taken as it is."""
    value = as_threshold(function, argument, value)
    if not isinstance(value, jax.core.Tracer) and not value < 1:
        raise ValueError(f"{function}: {argument} must be below 1, got {value}")
    return value


def newest_weight(decay: Any, step: Array, dtype: Any) -> Array:
    """How much the newest of `step` values counts in their debiased moving average: (1-decay)/(1-decay^step)."""
    newest = jnp.asarray(1 - decay, dtype)  # subtracted first: 0.999 rounded to float32 is off by 1e-5 of 1 - 0.999
    weight = newest / -jnp.expm1(step.astype(dtype) * jnp.log1p(-newest))
    return jnp.where(step > 1, weight, 1)  # exactly


def averaged(average: Array, value: Array, weight: Array) -> Array:
    """The debiased moving average with one more value, which has that weight, in the dtype of the value."""
    return times(average.astype(value.dtype), 1 - weight) + times(value, weight)


@jax.custom_jvp
def hypot(a: Array, b: Array) -> Array:
    """sqrt(a^2 + b^2) of numbers of any size that are not negative.

    `jnp.hypot` is twice as many operations, and has no derivative at 0, nor where 1/a^2 overflows.
    """
    large, small = jnp.maximum(a, b), jnp.minimum(a, b)
    return large * jnp.sqrt(1 + jnp.square(small / jnp.where(large == 0, 1, large)))


@hypot.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (a, b), (da, db) = primals, tangents
    root = hypot(a, b)
    return root, quotient(a, root) * da + quotient(b, root) * db


def quotient(x: Array, root: Array) -> Array:
    """x/root, and 0 where root is 0."""
    safe = jnp.where(root == 0, 1, root)
    return jnp.where(root == 0, 0, x / safe.astype(x.dtype))
