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


class Element(NamedTuple):
    """A transformation; `hyper` is an argument of it that a schedule may set, `values` some values for it."""

    factory: Callable[..., optax.GradientTransformation]
    hyper: str
    values: tuple[float, ...]  # one for each step; bfloat16 holds them exactly

    def make(self, scope):
        return self.factory(**{self.hyper: self.values[0]}, scope=scope)


ELEMENTS = {
    element.factory.__name__: element
    for element in (
        Element(rmsjax.clip_by_rms, "max_rms", (0.5, 0.25, 2.0, 1.0)),
        Element(rmsjax.clip_by_relative_rms, "max_ratio", (0.5, 0.25, 2.0, 1.0)),
        Element(rmsjax.normalize_by_rms, "target", (0.5, 0.25, 2.0, 1.0)),
        Element(rmsjax.record_rms, "ema_decay", (0.5, 0.25, 0.75, 0.0)),
        Element(rmsjax.scale_by_stable_adam, "b1", (0.5, 0.25, 0.75, 0.0)),
        Element(rmsjax.stable_adamw, "learning_rate", (0.5, 0.25, 2.0, 1.0)),
    )
}


def mixed_scope(path, leaf):
    """Layers of the stack by themselves, all else together."""
    return tuple(range(1, leaf.ndim)) if path == "stack" else "dense"


SCOPES = {"global": "global", "block": "block", "axes": 0, "callable": mixed_scope}

_RNG = np.random.default_rng(0)
PARAMS = {
    "dense": {
        name: jnp.asarray(_RNG.normal(size=shape), jnp.float32) for name, shape in (("kernel", (4, 6)), ("bias", (6,)))
    },
    "stack": jnp.asarray(_RNG.normal(size=(3, 4, 5)), jnp.float32),
}
# The gradients of some steps are large and of some are small, so that clips act at some steps and not at others.
SIZES = (0.1, 3.0, 1.0, 0.01)
GRADS = jax.tree.map(
    lambda p: jnp.stack([jnp.asarray(_RNG.normal(size=p.shape, scale=s), jnp.float32) for s in SIZES]), PARAMS
)


def at(tree, step):
    return jax.tree.map(lambda x: x[step], tree)


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
    return jax.tree.map(lambda *xs: jnp.stack(xs), *history)


def scanned(tx, grads=GRADS, params=PARAMS):
    """The same inside `lax.scan`, which demands that a state stays as init made it.

    For compositions with a branch, which would be compiled at each step: the others share what they compile.
    """

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, (updates, state)

    return jax.jit(lambda: jax.lax.scan(step, tx.init(params), grads)[1])()


@cache
def reference(name: str, scope: str, part: str | None = None) -> tuple[Any, Any]:
    """(updates, states) of an element by itself at each step, on the whole tree or on a part of it."""
    params, grads = ({part: tree[part]} if part else tree for tree in (PARAMS, GRADS))
    return stepped(ELEMENTS[name].make(scope=SCOPES[scope]), grads, params)


# -------------------------------------------------------------------------------------------------------------- checks


def check_state(name, scope):
    tx = ELEMENTS[name].make(scope=SCOPES[scope])
    state = tx.init(PARAMS)
    updates, new = jax.eval_shape(tx.update, at(GRADS, 0), state, PARAMS)
    assert signature(new) == signature(state)
    assert signature(updates) == signature(PARAMS)


def check_chain(name, scope):
    tx = optax.chain(ELEMENTS[name].make(scope=SCOPES[scope]), optax.scale(-0.5))
    updates, (states, _) = stepped(tx)
    expected, expected_states = reference(name, scope)
    assert_close(updates, jax.tree.map(lambda u: -0.5 * u, expected))
    assert_close(states, expected_states)


def check_masked(name, scope):
    tx = optax.masked(ELEMENTS[name].make(scope=SCOPES[scope]), {"dense": True, "stack": False})
    updates, _ = stepped(tx)
    assert_close(updates["stack"], GRADS["stack"], rtol=0)
    assert_close(updates["dense"], reference(name, scope, "dense")[0]["dense"])


def check_partition(name, scope):
    make = partial(ELEMENTS[name].make, scope=SCOPES[scope])
    updates, states = stepped(optax.partition({"a": make(), "b": make()}, {"dense": "a", "stack": "b"}))
    for label, part in (("a", "dense"), ("b", "stack")):
        expected, expected_state = reference(name, scope, part)
        assert_close(updates[part], expected[part])
        assert_close(jax.tree.leaves(states.inner_states[label]), jax.tree.leaves(expected_state))


def check_inject_hyperparams(name, scope):
    """A schedule in place of a number; under jit it comes traced. Updates stay in bfloat16."""
    element, scope = ELEMENTS[name], SCOPES[scope]
    params, grads = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree) for tree in (PARAMS, GRADS))
    values = jnp.array(element.values)
    make = optax.inject_hyperparams(element.factory, static_args=("scope",), hyperparam_dtype=jnp.float32)
    run = scanned if callable(scope) else stepped
    updates, states = run(make(**{element.hyper: lambda step: values[step]}, scope=scope), grads, params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(states.hyperparams[element.hyper], values)
    state = element.make(scope=scope).init(params)
    for step, value in enumerate(element.values):
        tx = element.factory(**{element.hyper: value}, scope=scope)
        expected, state = tx.update(at(grads, step), state, params)
        assert_close((at(updates, step), at(states.inner_state, step)), (expected, state), rtol=1e-2)


def check_multi_steps_and_apply_if_finite(name, scope):
    """Pairs of gradients are averaged; one with a NaN is left out, and the others do not know of it.

    Both wrappers branch; one scan has them both, for the sake of compiling.
    """
    make = partial(ELEMENTS[name].make, scope=SCOPES[scope])
    grads = jax.tree.map(lambda g: jnp.insert(g, 1, g[1].at[..., 0].set(jnp.nan), axis=0), GRADS)
    pairs = optax.MultiSteps(make(), every_k_schedule=2).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps adds float32 and int32
        updates, states = scanned(optax.apply_if_finite(pairs, max_consecutive_errors=3), grads)
    means = jax.tree.map(lambda g: (g[::2] + g[1::2]) / 2, GRADS)
    full, rest = np.array([2, 4]), np.array([0, 1, 3])
    inner = states.inner_state.inner_opt_state
    assert_close((at(updates, full), at(inner, full)), stepped(make(), means))
    assert not any(u[rest].any() for u in jax.tree.leaves(updates))
    assert states.total_notfinite.tolist() == [0, 1, 1, 1, 1]


@cache
def trained(name, scope):
    """The parameters after training, by hand."""
    tx = ELEMENTS[name].make(scope=SCOPES[scope])
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(len(SIZES)):
        updates, state = tx.update(at(GRADS, step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def check_train_state(name, scope):
    """Linen's TrainState."""
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=ELEMENTS[name].make(scope=SCOPES[scope]))
    for step in range(len(SIZES)):
        state = state.apply_gradients(grads=at(GRADS, step))
    assert_close(state.params, trained(name, scope))


class _Dense(nnx.Module):
    def __init__(self):
        self.kernel, self.bias = nnx.Param(PARAMS["dense"]["kernel"]), nnx.Param(PARAMS["dense"]["bias"])


class _Model(nnx.Module):
    def __init__(self):
        self.dense, self.stack = _Dense(), nnx.Param(PARAMS["stack"])


def check_nnx_optimizer(name, scope):
    model = _Model()
    optimizer = nnx.Optimizer(model, ELEMENTS[name].make(scope=SCOPES[scope]), wrt=nnx.Param)

    for step in range(len(SIZES)):
        grads = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(grads, at(GRADS, step))
        optimizer.update(model, grads)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), trained(name, scope))


CHECKS = [
    check_state,
    check_chain,
    check_masked,
    check_partition,
    check_inject_hyperparams,
    check_multi_steps_and_apply_if_finite,
    check_train_state,
    check_nnx_optimizer,
]
