"""How optax, Flax and JAX compose a gradient transformation: one check for each of them, for any transformation.

Every check runs an `Element` inside a composition and compares with the element by itself, called step by step from
Python. What an element computes is no matter here; its own tests say.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import rmsjax
from tests.helpers.marks import slow


class Element(NamedTuple):
    """A transformation; `hyper` is an argument of it that a schedule may set, `values` some values for it."""

    factory: Callable[..., optax.GradientTransformation]
    hyper: str
    values: tuple[float, ...]  # one for each step; bfloat16 holds them exactly

    def make(self, scope):
        return self.factory(**{self.hyper: self.values[0]}, scope=scope)


def clip_by_global_norm(max_norm, scope="global", axis_name=None):
    """Which has a scope of its own."""
    assert scope == "global"
    return rmsjax.clip_by_global_norm(max_norm, axis_name=axis_name)


def clip_by_history(factor, scope="block", axis_name=None):
    """Of which the first update is the warm-up, so that it clips in a few steps, and has no bound of all leaves."""
    return rmsjax.clip_by_history(factor, scope, decay=0.5, warmup_steps=1, warmup_max_norm=None, axis_name=axis_name)


def record_rms(ema_decay, scope="block", axis_name=None):
    """Beside the norms of the parameters."""
    return rmsjax.record_rms(scope, ema_decay=ema_decay, relative=True, axis_name=axis_name)


def hyperball(learning_rate, scope="block", axis_name=None):
    """Of all leaves, vectors as well."""
    inner, everything = optax.scale(-1.0), partial(jax.tree.map, lambda _: True)
    return rmsjax.hyperball(inner, learning_rate, everything, scope=scope, axis_name=axis_name)


ELEMENTS = {
    element.factory.__name__: element
    for element in (
        Element(rmsjax.clip_by_rms, "max_rms", (0.5, 0.25, 2.0, 1.0)),
        Element(rmsjax.clip_by_relative_rms, "max_ratio", (0.5, 0.25, 2.0, 1.0)),
        Element(clip_by_history, "factor", (1.5, 1.25, 2.0, 1.0)),
        Element(rmsjax.normalize_by_rms, "target", (0.5, 0.25, 2.0, 1.0)),
        Element(record_rms, "ema_decay", (0.5, 0.25, 0.75, 0.0)),
        Element(rmsjax.scale_by_stable_adam, "b1", (0.5, 0.25, 0.75, 0.0)),
        Element(rmsjax.stable_adamw, "learning_rate", (0.5, 0.25, 2.0, 1.0)),
        Element(hyperball, "learning_rate", (0.5, 0.25, 2.0, 1.0)),
    )
}


GLOBAL = {"clip_by_global_norm": Element(clip_by_global_norm, "max_norm", (0.5, 0.25, 2.0, 1.0))}
ALL = ELEMENTS | GLOBAL


def mixed_scope(path, leaf):
    """Layers of the stack by themselves, all else together."""
    return tuple(range(1, leaf.ndim)) if path == "stack" else "dense"


SCOPES = {"global": "global", "block": "block", "axes": 0, "callable": mixed_scope}

_RNG = np.random.default_rng(0)
PARAMS = {
    "dense": {
        name: jnp.asarray(_RNG.normal(size=shape), jnp.float32) for name, shape in (("scale", (6,)), ("bias", (6,)))
    },
    "stack": jnp.asarray(_RNG.normal(size=(3, 4, 5)), jnp.float32),
}
# The gradients of some steps are large and of some are small, so that clips act at some steps and not at others.
SIZES = (0.1, 3.0, 1.0, 0.01)
GRADS = jax.tree.map(
    lambda p: np.stack([_RNG.normal(size=p.shape, scale=s).astype(np.float32) for s in SIZES]), PARAMS
)  # in NumPy, like all histories here: what JAX does to an array outside of jit it compiles for each shape


def at(tree, step):
    return jax.tree.map(lambda x: jnp.asarray(x[step]), tree)


def assert_close(got, expected, **kwargs):
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(np.float64(g), np.float64(e), **{"rtol": 1e-5, "atol": 1e-7} | kwargs),
        got,
        expected,
    )


def signature(tree):
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]


def stepped(tx, grads=GRADS, params=PARAMS):
    """(updates, states) of a transformation at each step, called step by step."""
    state, history = tx.init(params), []
    for step in range(len(jax.tree.leaves(grads)[0])):
        updates, state = tx.update(at(grads, step), state, params)
        history.append((updates, state))
    return jax.tree.map(lambda *xs: np.stack(xs), *history)


def scanned(tx, params):
    """The parameters and the state after two steps in `lax.scan`, each with the parameters for gradients.

    A scan demands that all types stay as they were at init: shapes, dtypes, shardings, the manual axes of a shard_map.
    """

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, length=2)[0]


@cache
def reference(name: str, scope: str, part: str | None = None) -> tuple[Any, Any]:
    """(updates, states) of an element by itself at each step, on the whole tree or on a part of it."""
    params, grads = ({part: tree[part]} if part else tree for tree in (PARAMS, GRADS))
    return stepped(ALL[name].make(scope=SCOPES[scope]), grads, params)


# -------------------------------------------------------------------------------------------------------------- checks


def wrapped(tx):
    """Both wrappers that branch: pairs of gradients are averaged, and one that is not finite is left out."""
    pairs = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    return optax.apply_if_finite(pairs, max_consecutive_errors=3)


def scheduled(name, scope):
    """The values of an element, one for each step, in place of a number."""
    element = ALL[name]
    make = optax.inject_hyperparams(element.factory, static_args=("scope",), hyperparam_dtype=jnp.float32)
    return make(**{element.hyper: lambda step: jnp.array(element.values)[step]}, scope=scope)


def half(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def check_types(name, scope):
    """States stay of the structure and types that init gave them, alone and in all that branches or loops."""
    scope = SCOPES[scope]
    tx = ALL[name].make(scope)
    state = tx.init(PARAMS)
    updates, new = jax.eval_shape(tx.update, at(GRADS, 0), state, PARAMS)
    assert signature(new) == signature(state)
    assert signature(updates) == signature(PARAMS)
    for composed, params in ((tx, PARAMS), (wrapped(tx), PARAMS), (scheduled(name, scope), half(PARAMS))):
        with jax.numpy_dtype_promotion("standard"):  # MultiSteps adds float32 and int32
            after, _ = jax.eval_shape(partial(scanned, composed), params)
        assert signature(after) == signature(params)


def check_chain(name, scope):
    tx = optax.chain(ALL[name].make(scope=SCOPES[scope]), optax.scale(-0.5))
    updates, (states, _) = stepped(tx)
    expected, expected_states = reference(name, scope)
    assert_close(updates, jax.tree.map(lambda u: -0.5 * u, expected))
    assert_close(states, expected_states)


def check_masked(name, scope):
    tx = optax.masked(ALL[name].make(scope=SCOPES[scope]), {"dense": True, "stack": False})
    updates, _ = stepped(tx)
    assert_close(updates["stack"], GRADS["stack"], rtol=0)
    assert_close(updates["dense"], reference(name, scope, "dense")[0]["dense"])


def check_partition(name, scope):
    make = partial(ALL[name].make, scope=SCOPES[scope])
    updates, states = stepped(optax.partition({"a": make(), "b": make()}, {"dense": "a", "stack": "b"}))
    for label, part in (("a", "dense"), ("b", "stack")):
        expected, expected_state = reference(name, scope, part)
        assert_close(updates[part], expected[part])
        assert_close(jax.tree.leaves(states.inner_states[label]), jax.tree.leaves(expected_state))


def check_schedules_and_branches(name, scope):
    """Under a schedule, whose numbers are traced, pairs of gradients are averaged, and one with a NaN is left out."""
    element, scope = ALL[name], SCOPES[scope]
    params, grads = ({"dense": tree["dense"]["bias"], "stack": tree["stack"]} for tree in (PARAMS, GRADS))
    composed = wrapped(scheduled(name, scope))
    jitted = composed._replace(update=jax.jit(composed.update))
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps adds float32 and int32
        with_nan = jax.tree.map(lambda g: np.insert(g, 1, np.nan, axis=0), grads)
        updates, states = stepped(jitted, with_nan, params)
    assert states.total_notfinite.tolist() == [0, 1, 1, 1, 1]
    assert not any(u[np.array([0, 1, 3])].any() for u in jax.tree.leaves(updates))
    injected, state = states.inner_state.inner_opt_state, element.make(scope).init(params)
    for pair, step in enumerate((2, 4)):
        mean = jax.tree.map(lambda g, k=2 * pair: jnp.asarray((g[k] + g[k + 1]) / 2), grads)
        tx = element.factory(**{element.hyper: element.values[pair]}, scope=scope)
        expected, state = tx.update(mean, state, params)
        assert_close(injected.hyperparams[element.hyper][step], element.values[pair])
        assert_close((at(updates, step), at(injected.inner_state, step)), (expected, state))


@cache
def trained(name, scope):
    """The parameters after training, by hand."""
    tx = ALL[name].make(scope=SCOPES[scope])
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(len(SIZES)):
        updates, state = tx.update(at(GRADS, step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def check_train_state(name, scope):
    """Linen's TrainState."""
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=ALL[name].make(scope=SCOPES[scope]))
    for step in range(len(SIZES)):
        state = state.apply_gradients(grads=at(GRADS, step))
    assert_close(state.params, trained(name, scope))


class _Dense(nnx.Module):
    def __init__(self):
        self.scale, self.bias = nnx.Param(PARAMS["dense"]["scale"]), nnx.Param(PARAMS["dense"]["bias"])


class _Model(nnx.Module):
    def __init__(self):
        self.dense, self.stack = _Dense(), nnx.Param(PARAMS["stack"])


def check_nnx_optimizer(name, scope):
    model = _Model()
    optimizer = nnx.Optimizer(model, ALL[name].make(scope=SCOPES[scope]), wrt=nnx.Param)

    for step in range(len(SIZES)):
        grads = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(grads, at(GRADS, step))
        optimizer.update(model, grads)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), trained(name, scope))


CHECKS = [
    check_types,
    check_chain,
    check_train_state,
    check_nnx_optimizer,
    *(slow(check_masked), slow(check_partition)),  # of optax alone
]
