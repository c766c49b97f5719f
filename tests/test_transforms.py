"""The optax family: what each transformation computes, at every scale and dtype, in every composition, and training."""

import contextlib
import importlib.util
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import rmsjax
from rmsjax import _clips, _hyperball, _stable_adam, _transforms, penalties, report
from tests.helpers import optax_suite, stable_adamw
from tests.helpers.marks import quick_of, slow
from tests.helpers.optax_suite import ELEMENTS, GRADS, PARAMS, at, scanned
from tests.helpers.oracle import LIKELY

SCOPES = optax_suite.SCOPES
pytestmark = pytest.mark.usefixtures("quick_compiles")
# For what is compiled anew for each: stable_adamw has scale_by_stable_adam in it.
DISTINCT = [name for name in ELEMENTS if name != "scale_by_stable_adam"]
in_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh


EPS = float(np.finfo(np.float32).eps)


def close(got, expected, rtol=2 * LIKELY * EPS, atol=0.0):
    """By default as two norms are that are within LIKELY units in the last place each."""
    jax.tree.map(lambda g, e: np.testing.assert_allclose(np.asarray(g, e.dtype), e, rtol, atol), got, expected)


def cancelled(name, params):
    """An `atol` for updates: those of hyperball are what is left of parameters, new ones less old ones."""
    if name != "hyperball":
        return 0.0
    return 2 * LIKELY * EPS * max((float(np.max(np.abs(p), initial=0)) for p in jax.tree.leaves(params)), default=0.0)


def run(tx, params, *grads):
    """The updates and the state after the last of some steps."""
    state = tx.init(params)
    updates = None
    for grad in grads:
        updates, state = tx.update(grad, state, params)
    return updates, state


# -------------------------------------------------------------------------------------------------------- compositions


@pytest.mark.parametrize("check", optax_suite.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("scope", [slow("global"), slow("block"), slow("axes"), "callable"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_composes(name, scope, check):
    check(name, scope)


@pytest.mark.parametrize("check", optax_suite.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", optax_suite.GLOBAL)
def test_composes_with_a_scope_of_its_own(name, check):
    check(name, "global")


@pytest.mark.parametrize("name", DISTINCT)
def test_composes_under_jit(name):
    """With pools of both kinds: each of these is compiled anew. `check_types` tries them with all scopes."""
    optax_suite.check_schedules_and_branches(name, "callable")


# --------------------------------------------------------------------------------------------------------------- values
#
# What each transformation does to one leaf (scope "block") after the last of some gradients, for parameters that were
# `start` at init, in NumPy and a type whose range and precision suffice.


def root_mean_square(x):
    return np.sqrt(np.mean(np.abs(x) ** 2))


def oracle_clip(grads, params, start):
    return grads[-1] * min(1, 0.5 / root_mean_square(grads[-1]))


def oracle_relative(grads, params, start):
    return grads[-1] * min(1, 0.5 * max(root_mean_square(params), 1e-3) / root_mean_square(grads[-1]))


def oracle_normalize(grads, params, start):
    return grads[-1] * 0.5 / root_mean_square(grads[-1])


def oracle_record(grads, params, start):
    return grads[-1]


def oracle_history(grads, params, start):
    history, clipped = None, None
    for g in grads:
        norm = root_mean_square(g)
        bound = norm if history is None else 1.5 * history
        clipped = g * min(1, bound / norm)
        history = bound if history is None else history / 2 + min(norm, bound) / 2
    return clipped


def oracle_hyperball(grads, params, start):
    radius = root_mean_square(start)
    moved = params - 0.5 * radius * grads[-1] / root_mean_square(grads[-1])
    return moved * radius / root_mean_square(moved) - params


def oracle_stable(grads, params, start, b1=0.5, b2=0.99, eps=1e-6, weight_decay=0.0):
    """Algorithm 2 of arXiv 2304.13013 as it is written there; the step without the learning rate."""
    m, v = np.zeros_like(grads[0]), np.zeros_like(np.abs(grads[0]))
    for t, g in enumerate(grads, 1):
        b1_hat, b2_hat = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        m = b1_hat * m + (1 - b1_hat) * g
        v = b2_hat * v + (1 - b2_hat) * np.abs(g) ** 2
    step = m / (np.sqrt(v) + eps) + weight_decay * params
    return step / max(1, root_mean_square(grads[-1] / np.sqrt(np.maximum(v, eps**2))))


def oracle_adamw(grads, params, start):
    return -0.5 * oracle_stable(grads, params, start, b1=0.9, weight_decay=1e-2)


ORACLES = {
    "clip_by_rms": oracle_clip,
    "clip_by_relative_rms": oracle_relative,
    "clip_by_history": oracle_history,
    "normalize_by_rms": oracle_normalize,
    "record_rms": oracle_record,
    "scale_by_stable_adam": oracle_stable,
    "stable_adamw": oracle_adamw,
    "hyperball": oracle_hyperball,
}
# dtypes with their precision, and factors that take squares out of their range (but for 1).
DTYPES = {
    "float16": (2e-3, (1, 300.0, 3e4)),
    "bfloat16": (1e-2, (1, 1e30, 1e-30)),
    "float32": (2e-6, (1, 1e30, 1e-30)),
    "float64": (1e-12, (1, 1e200, 1e-200)),
    "complex64": (2e-6, (1, 1e30, 1e-30)),
}


def of_dtype(tree, dtype):
    return jax.tree.map(lambda x: x + 1j * x[..., ::-1] if dtype == "complex64" else x, tree)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ORACLES)
def test_values(name, dtype, request):
    """In every dtype, for gradients and parameters of any finite size, and the dtype is kept."""
    rtol, factors = DTYPES[dtype]
    if dtype == "float64":
        request.getfixturevalue("x64")
    shape, rng = (3, 4), np.random.default_rng(0)
    tx = ELEMENTS[name].make("block")
    for factor in factors:
        grads, params = (of_dtype(rng.normal(size=(n, *shape)).clip(-2, 2), dtype) for n in (3, 1))
        grads = [jnp.asarray((g * s * factor).astype(dtype)) for g, s in zip(grads, (0.5, 0.1, 1.0), strict=True)]
        params = jnp.asarray((params[0] * factor).astype(dtype))
        got, state = run(tx, params, *grads)
        assert got.dtype == dtype
        wide = np.complex128 if dtype == "complex64" else np.longdouble
        expected = ORACLES[name]([np.asarray(g, wide) for g in grads], *[np.asarray(params, wide)] * 2)
        np.testing.assert_allclose(np.asarray(got, wide), expected, rtol, rtol * np.abs(expected).max())
        if hasattr(state, "rms"):
            np.testing.assert_allclose(state.rms, root_mean_square(np.asarray(grads[-1], wide)), 1e-6)


@pytest.mark.parametrize("name", DISTINCT)
def test_jit_of_vmap_is_as_one_by_one(name):
    tx = ELEMENTS[name].make("block")
    params = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    grads = 3 * params[:, ::-1]
    states = jax.vmap(tx.init)(params)
    together = jax.jit(jax.vmap(tx.update))(grads, states, params)
    alone = [tx.update(at(grads, k), at(states, k), at(params, k)) for k in range(2)]
    close(together, jax.tree.map(lambda *xs: np.stack(xs), *alone), atol=cancelled(name, params))


def pooled(tree):
    """The elements of each pool of scope "callable", in float64."""
    dense = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree["dense"])])
    return [np.float64(pool) for pool in (dense, *tree["stack"])]


@pytest.mark.parametrize("name", DISTINCT)
def test_derivatives(name):
    """In pools of both kinds: along a direction, against differences of the oracle; and at zero, which stays zero."""
    tx, zeros = ELEMENTS[name].make(SCOPES["callable"]), jax.tree.map(jnp.zeros_like, PARAMS)
    first, grads, dgrads, weights = (at(GRADS, step) for step in (1, 2, 0, 3))
    dparams = jax.tree.map(lambda p: p[::-1], PARAMS)

    def weighted(grads, params, state, weights):
        updates, _ = tx.update(grads, state, params)
        return sum(
            jnp.vdot(w, u) for w, u in zip(jax.tree.leaves(weights), jax.tree.leaves(updates), strict=True)
        ), updates

    slopes_of = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))
    slopes, updates = slopes_of(zeros, zeros, tx.init(zeros), weights)
    assert all(jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes))
    assert not any(u.any() for u in jax.tree.leaves(updates))

    state = tx.update(first, tx.init(PARAMS), PARAMS)[1]
    slopes, _ = slopes_of(grads, PARAMS, state, weights)
    got = sum(np.vdot(s, d) for s, d in zip(jax.tree.leaves(slopes), jax.tree.leaves((dgrads, dparams)), strict=True))

    def oracle(h):
        trees = zip(*map(pooled, (first, grads, dgrads, PARAMS, dparams, weights)), strict=True)
        return sum(np.vdot(w, ORACLES[name]([f, g + h * dg], p + h * dp, p)) for f, g, dg, p, dp, w in trees)

    np.testing.assert_allclose(got, (oracle(1e-5) - oracle(-1e-5)) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("outer", [slow(jax.jacfwd), jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("scope", ["block", slow(0)])
def test_second_derivatives_where_there_is_nothing_to_scale(scope, inner, outer):
    """Of updates that have the norm already, and of zero; and where they have another, for comparison."""
    tx, weights = rmsjax.normalize_by_rms(1.0, scope), jnp.array([1.0, 2.0])

    def normalized(u):
        return weights @ tx.update(u, tx.init(u))[0]

    def naive(u):
        return weights @ (u / jnp.sqrt(jnp.mean(jnp.square(u))))

    hessian = jax.jit(outer(inner(normalized)))
    for u in (jnp.array([1.0, -1.0]), jnp.array([0.5, 2.0])):
        np.testing.assert_allclose(hessian(u), jax.hessian(naive)(u), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hessian(jnp.zeros(2)), np.zeros((2, 2)))


@pytest.mark.parametrize("scope", ["global", "block", 0, 1, (0, 1)])
@pytest.mark.parametrize("clip", [rmsjax.clip_by_rms, rmsjax.clip_by_relative_rms])
def test_around_zero_a_clip_is_the_identity(clip, scope):
    tx, params = clip(1.0, scope), jnp.ones((3, 4))
    direction = jnp.asarray(np.random.default_rng(0).normal(size=params.shape), jnp.float32)
    state, zeros = tx.init(params), jnp.zeros_like(params)
    _, moved = jax.jvp(lambda u: tx.update(u, state, params)[0], (zeros,), (direction,))
    np.testing.assert_array_equal(moved, direction)


@pytest.mark.parametrize(
    "tx",
    [
        rmsjax.clip_by_rms(0.0, "block"),
        rmsjax.clip_by_relative_rms(0.0),
        rmsjax.clip_by_relative_rms(1.0, min_rms=0.0),
        rmsjax.normalize_by_rms(0.0),
        rmsjax.scale_by_stable_adam(eps=0.0),
    ],
)
def test_zero_is_a_legal_number(tx):
    zeros = jnp.zeros(3)
    for grad in (zeros, jnp.ones(3)):
        updates, _ = run(tx, zeros, grad)
        expected = float(grad[0]) if tx.init(zeros)._fields[0] == "grad_mean" else 0
        assert updates.tolist() == [expected] * 3


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", ELEMENTS)
def test_what_is_not_finite_stays_visible(name, bad):
    grads = {"bad": jnp.array([1.0, bad, 2.0]), "good": jnp.ones(3)}
    updates, _ = run(ELEMENTS[name].make("block"), jax.tree.map(jnp.ones_like, grads), grads)
    assert not jnp.isfinite(updates["bad"]).all()
    assert jnp.isfinite(updates["good"]).all()


# --------------------------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("name", ELEMENTS)
def test_callable_that_says_block_for_every_leaf(name):
    """Is scope "block"."""
    by_name, by_call = (
        run(ELEMENTS[name].make(scope), PARAMS, at(GRADS, 1)) for scope in ("block", lambda path, leaf: "block")
    )
    close(by_call, by_name)


@pytest.mark.parametrize("name", optax_suite.ALL)
def test_no_state_is_a_new_one_or_an_error(name):
    """Code for optax's clips, which keep no state, may have None for it; not where updates or records depend on it."""
    tx = optax_suite.ALL[name].make("global")
    if name in ("clip_by_rms", "clip_by_global_norm", "clip_by_relative_rms", "normalize_by_rms"):
        close(tx.update(at(GRADS, 1), None, PARAMS), run(tx, PARAMS, at(GRADS, 1)))
    else:
        with pytest.raises(ValueError, match=rf"^{name}: update must be given the state, got None; .*tx\.init"):
            tx.update(at(GRADS, 1), None, PARAMS)


TREES = {
    "array": lambda x: x,
    "no leaves": lambda x: {"a": None, "b": optax.MaskedNode(), "c": ()},
    "nested": lambda x: ({"a": x, "b": None}, [2 * x, optax.MaskedNode()]),
    "empty leaf": lambda x: {"a": jnp.zeros((0, 3)), "b": x},
    "frozen": lambda x: linen.FrozenDict({"a": x}),
    "linen boxes": lambda x: {"a": linen.Partitioned(x, names=("in", "out"))},
    "nnx state": lambda x: nnx.State({"a": nnx.Param(x)}),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_containers(name, tree):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4)), jnp.float32)
    grads = TREES[tree](x)
    tx = ELEMENTS[name].make("block")
    updates, _ = run(tx, grads, grads, grads)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    leaves = [run(tx, leaf, leaf, leaf)[0] for leaf in jax.tree.leaves(grads)]
    close(jax.tree.leaves(updates), leaves, atol=cancelled(name, grads))


@pytest.mark.parametrize("name", DISTINCT)
def test_states_of_sharded_parameters(name):
    """Flax's boxes say how a parameter is sharded. The norm of a matrix is a scalar and cannot be sharded like it."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tx = ELEMENTS[name].make("block")

    def model():
        init = nnx.with_partitioning(nnx.initializers.ones_init(), ("a", "b"))
        bias_init = nnx.with_partitioning(nnx.initializers.ones_init(), ("b",))
        return nnx.Linear(4, 8, kernel_init=init, bias_init=bias_init, rngs=nnx.Rngs(0))

    def step():
        optimizer = nnx.Optimizer(module := model(), tx, wrt=nnx.Param)
        optimizer.update(module, nnx.state(module, nnx.Param))
        state = nnx.state(optimizer)
        return jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))

    dense = linen.Dense(
        8, kernel_init=linen.with_partitioning(linen.initializers.ones_init(), ("a", "b")), use_bias=False
    )

    def init():
        params = dense.init(jax.random.key(0), jnp.ones((1, 4)))
        state = TrainState.create(apply_fn=None, params=params, tx=tx)
        return state.apply_gradients(grads=params)

    with in_mesh(mesh):
        nnx.eval_shape(step)
        shardings = linen.get_sharding(jax.eval_shape(init), mesh)
        state = jax.jit(init, out_shardings=shardings)()
    kernel = state.params["params"]["kernel"].value
    assert kernel.sharding.spec == P("a", "b")
    close(kernel, run(tx, jnp.ones((4, 8)), jnp.ones((4, 8)))[0] + 1)


def mesh_of(kind, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


# Leaves that are split over both axes of a mesh, over one, and over none.
LAYOUTS = {"both": P("a", "b"), "columns": P(None, "a"), "whole": P()}
LAID = {
    name: jnp.asarray(np.random.default_rng(4).normal(size=shape), jnp.float32)
    for name, shape in (("both", (4, 8)), ("columns", (3, 4)), ("whole", (3,)))
}


def pooled_across_layouts(path, leaf):
    return 1 if path == "columns" else "pool"


def each_by_itself(path, leaf):
    return 1 if path == "columns" else "block"


@pytest.mark.parametrize(
    ("name", "scope", "check_vma"),
    [*((name, pooled_across_layouts, True) for name in DISTINCT), ("clip_by_rms", each_by_itself, False)],
)
def test_axis_name_gives_what_one_device_gives(name, scope, check_vma):
    """Where JAX does not track what varies, copies of a leaf may not share a pool with what is split."""
    make = partial(ELEMENTS[name].factory, **{ELEMENTS[name].hyper: ELEMENTS[name].values[0]}, scope=scope)
    tx, grads = make(), at(jax.tree.map(lambda p: 3 * np.asarray(p)[None, ::-1], LAID), 0)
    state = tx.update(LAID, tx.init(LAID), LAID)[1]
    states = optax.tree_map_params(tx, lambda _, spec: spec, state, LAYOUTS, transform_non_params=lambda _: P())
    update = jax.shard_map(
        make(axis_name=("a", "b")).update,
        mesh=mesh_of(jax.sharding.AxisType.Auto, a=2, b=4),
        in_specs=(LAYOUTS, states, LAYOUTS),
        out_specs=(LAYOUTS, states),
        check_vma=check_vma,
    )
    close(jax.jit(update)(grads, state, LAID), tx.update(grads, state, LAID), rtol=1e-5)


@pytest.mark.parametrize("axis_name", [None, "x"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_scans_of_replicas_under_shard_map(name, axis_name):
    """Each replica with its own norms, or all with one: either way the types of the state stay."""
    mesh, params = mesh_of(jax.sharding.AxisType.Auto, x=8), {"a": jnp.ones((8, 4, 3)), "b": jnp.ones((8, 2))}
    for scope in ("global", "block", -1, lambda path, leaf: "one"):
        tx = ELEMENTS[name].factory(
            **{ELEMENTS[name].hyper: ELEMENTS[name].values[0]}, scope=scope, axis_name=axis_name
        )
        train = jax.shard_map(lambda p, tx=tx: scanned(tx, p)[0], mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        jax.eval_shape(train, params)


@pytest.mark.parametrize("name", quick_of(ELEMENTS, "clip_by_rms", "scale_by_stable_adam"))
def test_scans_on_a_mesh_with_explicit_sharding(name):
    mesh = mesh_of(jax.sharding.AxisType.Explicit, x=4, y=2)
    with in_mesh(mesh):
        params = {
            "a": jax.device_put(jnp.ones((4, 2, 3)), P("x")),
            "b": jax.device_put(jnp.ones((4, 2, 2)), P("x", "y")),
        }
        for scope in ("global", "block", (1, 2), 0, lambda path, leaf: "one"):
            tx = ELEMENTS[name].make(scope)
            _, state = jax.eval_shape(partial(scanned, tx), params)
            again = jax.eval_shape(tx.update, params, tx.init(params), params)[1]  # init outside of jit
            assert [s.sharding for s in jax.tree.leaves(state)] == [s.sharding for s in jax.tree.leaves(again)]
    ELEMENTS[name].make((1, 2)).init(params)  # without the mesh there is nothing for its sharding to refer to


@pytest.mark.parametrize("name", ELEMENTS)
def test_stacked_layers_are_as_layers_by_themselves(name):
    grads = [g["stack"] for g in (at(GRADS, 0), at(GRADS, 1))]
    stacked, _ = run(ELEMENTS[name].make((1, 2)), PARAMS["stack"], *grads)
    tx = ELEMENTS[name].make("block")
    layers = [run(tx, PARAMS["stack"][k], *[g[k] for g in grads])[0] for k in range(3)]
    close(stacked, jnp.stack(layers), atol=cancelled(name, PARAMS))


@pytest.mark.parametrize("name", ELEMENTS)
def test_gradients_of_another_dtype_than_the_parameters(name, x64):
    """Also where a scope goes by the dtype: parameters are pooled as the updates are."""
    for scope in ("block", lambda path, leaf: "half" if leaf.dtype == jnp.bfloat16 else "block"):
        tx = ELEMENTS[name].make(scope)
        for grad_dtype, param_dtype in (("bfloat16", "float32"), ("float32", "float64")):
            params = {"a": jnp.full(3, 2.0, param_dtype), "b": jnp.full(3, 4.0, param_dtype)}
            grads = {key: (p * 8).astype(grad_dtype) for key, p in params.items()}
            state = tx.init(params)
            updates, new = jax.eval_shape(tx.update, grads, state, params)
            assert {u.dtype for u in updates.values()} == {jnp.dtype(grad_dtype)}
            assert optax_suite.signature(new) == optax_suite.signature(state)


@pytest.mark.parametrize("name", ELEMENTS)
def test_numbers_for_leaves(name):
    tx = ELEMENTS[name].make("block")
    got, expected = (run(tx, {"a": leaf}, {"a": leaf}) for leaf in (3.0, jnp.float32(3)))
    close(got, expected)


# -------------------------------------------------------------------------------------------------------------- states


def test_the_state_of_a_clip_is_found_in_a_chain():
    tx = optax.chain(rmsjax.clip_by_rms(1.0, "block"), optax.sgd(0.1, momentum=0.9))
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    _, state = run(tx, params, {"a": jnp.full(3, 2.0), "b": jnp.ones(3)}, {"a": jnp.ones(3), "b": jnp.ones(3)})
    assert optax.tree.get(state, "rms") == {"a": 1, "b": 1}
    assert optax.tree.get(state, "num_updates") == 2
    assert optax.tree.get(state, "num_clipped") == {"a": 1, "b": 0}
    assert state[0].share_clipped == {"a": 0.5, "b": 0}
    assert tx.init(params)[0].share_clipped == {"a": 0, "b": 0}


@pytest.mark.parametrize(("scope", "rest"), [("global", ()), (-1, (4, 1)), (0, (1, 3))])
def test_shares_of_the_states_of_a_vmap(scope, rest):
    """Or of those that a scan has stacked: their axes come in front, those of a norm behind."""
    states = jax.vmap(rmsjax.clip_by_rms(1.0, scope).init)(jnp.ones((5, 4, 3)))
    states = states._replace(num_updates=jnp.arange(5), num_clipped=states.num_clipped + 2)
    expected = np.broadcast_to(np.reshape([2, 2, 1, 2 / 3, 1 / 2], (5,) + (1,) * len(rest)), (5, *rest))
    np.testing.assert_allclose(states.share_clipped, expected, rtol=1e-6)


@pytest.mark.parametrize("scope", [*SCOPES.values(), lambda path, leaf: "one"])
@pytest.mark.parametrize("name", quick_of(ELEMENTS, "clip_by_rms", "clip_by_history", "scale_by_stable_adam"))
def test_no_two_leaves_of_a_state_share_an_array(name, scope):
    """Or else a state cannot be donated."""
    tx = ELEMENTS[name].make(scope)
    state = tx.init(PARAMS)
    for states in (state, tx.update(at(GRADS, 0), state, PARAMS)[1]):
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(states)]
        assert len(set(buffers)) == len(buffers)


def test_a_state_can_be_donated():
    tx = optax.chain(rmsjax.record_rms(ema_decay=0.9), rmsjax.clip_by_relative_rms(0.1))
    params = {"a": jnp.ones(3)}
    state = tx.init(params)
    jax.jit(lambda p, s: tx.update(p, s, p)[1], donate_argnums=1, keep_unused=True)(params, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_norms_in_a_state_count_as_no_parameters(name, scope):
    """`optax.tree_map_params` makes shardings for a state; a norm has not the shape that its parameter has."""
    tx = ELEMENTS[name].make(SCOPES[scope])
    state = tx.init(PARAMS)
    marked = optax.tree_map_params(tx, lambda s, p: s.shape == p.shape, state, PARAMS, transform_non_params=lambda _: 0)
    moments = 2 * len(jax.tree.leaves(PARAMS)) if "stable" in name else 0
    assert jax.tree.leaves(marked).count(True) == moments
    assert not any(value is False for value in jax.tree.leaves(marked))


def test_every_state_says_what_its_norms_are():
    states = [getattr(rmsjax, name) for name in dir(rmsjax) if name.endswith("State")]
    assert len(states) == 7
    for state in states:
        assert state.norm_fields
        assert all(hasattr(state, name) for name in state.norm_fields)


def test_what_is_not_clipped_comes_back_as_it_was():
    """To the bit, also where the norm is the bound."""
    grads = at(GRADS, 0)
    norms = rmsjax.tree_rms(grads)
    for tx in (rmsjax.clip_by_rms(norms), rmsjax.clip_by_relative_rms(1e3)):
        updates, state = run(tx, PARAMS, grads)
        jax.tree.map(np.testing.assert_array_equal, updates, grads)
        assert not any(jax.tree.leaves(state.num_clipped))


@pytest.mark.parametrize("scope", SCOPES)
def test_relative_clip_bounds_the_norm_by_that_of_the_parameters(scope):
    scope = SCOPES[scope]
    params = PARAMS | {"stack": PARAMS["stack"] * 1e-6}
    updates, state = run(rmsjax.clip_by_relative_rms(0.1, scope), params, at(GRADS, 1))
    close(state.param_rms, rmsjax.tree_rms(params, scope))
    close(state.rms, rmsjax.tree_rms(at(GRADS, 1), scope))
    bounds = jax.tree.map(lambda p: 0.1 * jnp.maximum(p, 1e-3), state.param_rms)
    close(rmsjax.tree_rms(updates, scope), bounds)
    assert all((share == 1).all() for share in jax.tree.leaves(state.share_clipped))


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_normalize_is_rms_normalize_with_a_target(epsilon):
    grads = at(GRADS, 1)["stack"]
    updates, _ = run(rmsjax.normalize_by_rms(0.2, -1, epsilon=epsilon), grads, grads)
    close(updates, 0.2 * rmsjax.rms_normalize(grads, epsilon=epsilon))


def test_record_keeps_the_norm_and_its_moving_average():
    tx = rmsjax.record_rms("block", ema_decay=0.9)
    norms, state = [], tx.init(PARAMS)
    for step in range(4):
        updates, state = tx.update(at(GRADS, step), state)
        jax.tree.map(np.testing.assert_array_equal, updates, at(GRADS, step))
        norms.append(np.array(jax.tree.leaves(rmsjax.tree_rms(updates, "block")), np.float64))
        weights = 0.9 ** np.arange(step, -1, -1)
        np.testing.assert_array_equal(jax.tree.leaves(state.rms), norms[-1])
        np.testing.assert_allclose(jax.tree.leaves(state.ema_rms), weights @ norms / weights.sum(), rtol=1e-6)
    assert state.num_updates == 4
    state = rmsjax.record_rms().init(PARAMS)
    assert [state.ema_rms, state.param_rms, state.ratio] == [None] * 3


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_record_relative_to_the_parameters(scope):
    """Pooled as the updates are; where both are 0 the ratio is 0, of a step away from 0 it is infinite."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    updates, state = run(rmsjax.record_rms(scope, relative=True), params, at(GRADS, 1))
    jax.tree.map(np.testing.assert_array_equal, updates, at(GRADS, 1))
    close(state.param_rms, rmsjax.tree_rms(params, scope))
    close(state.ratio, jax.tree.map(jnp.divide, state.rms, state.param_rms))
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    _, state = run(rmsjax.record_rms(scope, relative=True), zero, zero)
    assert all((ratio == 0).all() for ratio in jax.tree.leaves(state.ratio))
    _, state = run(rmsjax.record_rms(scope, relative=True), zero, PARAMS)
    assert all(jnp.isinf(ratio).all() for ratio in jax.tree.leaves(state.ratio))
    with pytest.raises(ValueError, match=r"record_rms: update needs the parameters: call tx.update"):
        rmsjax.record_rms(scope, relative=True).update(PARAMS, state)


def test_one_broken_update_breaks_the_average():
    """`optax.apply_if_finite` skips it: tests/helpers/optax_suite.py."""
    _, state = run(rmsjax.record_rms(ema_decay=0.5), jnp.zeros(1), *(jnp.array([g]) for g in (1.0, np.nan, 4.0)))
    assert state.rms == 4
    assert jnp.isnan(state.ema_rms)


# --------------------------------------------------------------------------------------------------- in optax's place


def test_block_clip_is_that_of_optax():
    for step in range(4):
        for max_rms in (1e-3, 0.5, 10.0):
            expected, _ = run(optax.clip_by_block_rms(max_rms), PARAMS, at(GRADS, step))
            close(run(rmsjax.clip_by_rms(max_rms, "block"), PARAMS, at(GRADS, step))[0], expected)


def test_global_clip_is_that_of_optax_over_the_root_of_the_count():
    count = sum(p.size for p in jax.tree.leaves(PARAMS))
    for step in range(4):
        expected, _ = run(optax.clip_by_global_norm(1.0), PARAMS, at(GRADS, step))
        close(run(rmsjax.clip_by_rms(1 / np.sqrt(count)), PARAMS, at(GRADS, step))[0], expected)


def mlp():
    rng = np.random.default_rng(0)
    kernels = (jnp.asarray(rng.normal(size=shape) / 8, jnp.float32) for shape in ((64, 32), (32, 10)))
    return {
        layer: {"kernel": k, "bias": jnp.zeros(k.shape[1])} for layer, k in zip(("hidden", "out"), kernels, strict=True)
    }


def loss_of(params, images, labels):
    hidden = jnp.tanh(images @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def training(tx, steps, dtype=jnp.float32):
    """A function that trains on digits and gives (losses, states).

    The gradient of the step that it is given is 10^4 times too large.
    """

    @jax.jit
    def train(images, labels, spike_at):
        def step(carry, k):
            params, state = carry
            batch = (k * 64 + jnp.arange(64)) % len(labels)
            loss, grads = jax.value_and_grad(loss_of)(params, images[batch], labels[batch])
            grads = jax.tree.map(lambda g: (g * jnp.where(k == spike_at, 1e4, 1.0)).astype(dtype), grads)
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
            return (params, state), (loss, state)

        params = mlp()
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[1]

    def call(spike_at=None):
        images, labels = load_digits(return_X_y=True)
        # Optax adds moments and gradients of different dtypes.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return train(np.float32(images / 16), np.int32(labels), np.int32(-1 if spike_at is None else spike_at))

    return call


def adafactor(clip):
    """The chain of `optax.adafactor`."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=16),
        clip,
        optax.scale_by_learning_rate(0.05, flip_sign=False),
        optax.scale_by_param_block_rms(),
        optax.scale(-1),
    )


def big_vision(clip):
    """A chain as in google-research/big_vision: its Adafactor under a global clip, weight decay, a schedule.

    The average is in float32: bfloat16 may round updates that differ by an ulp to numbers that differ by 0.4 %.
    """
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_factored_rms(min_dim_size_to_factor=32),
        clip,
        optax.ema(0.9, debias=False),
        optax.scale(0.03),
        optax.add_decayed_weights(1e-4, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.scale_by_schedule(optax.warmup_cosine_decay_schedule(0.0, 1.0, 5, 40)),
        optax.scale(-1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("chain", [adafactor, big_vision])
def test_drop_in_for_the_block_clip_of_optax(chain):
    """Equal training curves, where the clip acts at some steps."""
    theirs = optax.clip_by_block_rms(1.0)
    expected, _ = training(optax.adafactor(0.05, 16) if chain is adafactor else chain(theirs), 40)()
    got, states = training(chain(rmsjax.clip_by_rms(1.0, "block")), 40)()
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    assert expected[-1] < 0.8 * expected[0]
    clipped = optax.tree.get(at(states, -1), "num_clipped")
    assert any(0 < n < 40 for n in jax.tree.leaves(clipped))


# -------------------------------------------------------------------------------------------------------------- spikes


MAX_NORM, SPIKE, STEPS = 1.0, 40, 100
COUNT = 64 * 32 + 32 + 32 * 10 + 10
MAX_RMS = MAX_NORM / np.sqrt(COUNT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_spike(dtype):
    """One batch x 10^4 under AdamW. Without a clip training stalls; with ours it recovers, and the state tells."""

    def with_clip(clip):
        to_float32 = optax.stateless_with_tree_map(lambda u, _: u.astype(jnp.float32))  # AdamW squares what it is given
        return training(optax.chain(clip, to_float32, optax.adamw(3e-3)), STEPS, dtype)

    unclipped = with_clip(optax.identity())
    calm, _ = unclipped()
    bare, _ = unclipped(SPIKE)
    theirs, _ = with_clip(optax.clip_by_global_norm(MAX_NORM))(SPIKE)
    ours, (state, *_) = with_clip(rmsjax.clip_by_rms(MAX_RMS))(SPIKE)

    last = slice(-10, None)
    assert bare[last].mean() > 1.5 * calm[last].mean()
    assert theirs[last].mean() < 1.1 * calm[last].mean()
    assert ours[last].mean() < 1.1 * calm[last].mean()

    # The step, the norm, and the share clipped.
    before = state.rms[SPIKE - 10 : SPIKE].mean()
    assert state.rms.argmax() == SPIKE
    assert 3e3 < state.rms[SPIKE] / before < 3e4
    assert state.num_clipped[SPIKE - 1] == 0
    assert state.num_clipped[SPIKE] == 1
    assert state.share_clipped[SPIKE] == np.float32(1 / (SPIKE + 1))


def test_a_spike_in_float16_is_clipped_and_not_erased():
    """The sum of its squares overflows: optax takes the step for infinite, divides by it, and reports no fault."""
    grads = jnp.array([300, -30000, 3000], jnp.float16)
    erased, state = run(optax.apply_if_finite(optax.clip_by_global_norm(MAX_NORM), 3), grads, grads)
    assert erased.tolist() == [0, 0, 0]
    assert state.total_notfinite == 0
    clipped, state = run(rmsjax.clip_by_rms(MAX_RMS), grads, grads)
    norm = root_mean_square(np.float64(grads))
    np.testing.assert_allclose(np.float64(clipped), np.float64(grads) * MAX_RMS / norm, rtol=1e-3)
    np.testing.assert_allclose(state.rms, norm, rtol=1e-6)
    assert state.num_clipped == 1


# --------------------------------------------------------------------------------------------------------- stable adam


@pytest.fixture(scope="module")
def stable_trajectory():
    tx = rmsjax.stable_adamw(stable_adamw.LEARNING_RATE, weight_decay=stable_adamw.WEIGHT_DECAY)
    params = jax.tree.map(jnp.asarray, stable_adamw.start())
    state, history = tx.init(params), []

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(stable_adamw.STEPS):
        params, state = update(stable_adamw.gradient(params, step), state, params)
        history.append(jax.tree.map(np.asarray, (params, state[0].num_clipped)))
    return jax.tree.map(lambda *xs: np.stack(xs), *history)


def assert_same_trajectory(got, expected):
    """To 1e-5 of the largest element of each tensor at each step: an element that crosses zero has no relative error.

    Measured against torch 2.13 with torch-optimi 0.3.3 over all 200 steps: 3.1e-6.
    """
    for name, values in expected.items():
        for g, e in zip(got[name], values, strict=True):
            np.testing.assert_allclose(g, e, rtol=0, atol=1e-5 * np.abs(e).max())


def test_stable_adamw_follows_the_recorded_trajectory_of_torch_optimi(stable_trajectory):
    got, clipped = stable_trajectory
    with np.load(stable_adamw.FIXTURE) as recorded:
        assert_same_trajectory({name: values[stable_adamw.RECORDED] for name, values in got.items()}, dict(recorded))
    assert all(n[-1] > 1 and n[stable_adamw.SPIKE] == n[stable_adamw.SPIKE - 1] + 1 for n in clipped.values())


def test_stable_adamw_follows_torch_optimi(stable_trajectory):
    pytest.importorskip("optimi")
    assert_same_trajectory(stable_trajectory[0], stable_adamw.torch_trajectory())


def test_stable_adam_without_a_spike_is_adam():
    """Constant gradients do not outgrow their average."""
    params, grads = jnp.zeros(3), [jnp.array([3.0, -0.1, 1e-5])] * 3
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = run(optax.scale_by_adam(b2=0.99, eps=1e-6), params, *grads)
    updates, state = run(rmsjax.scale_by_stable_adam(), params, *grads)
    close(updates, expected, rtol=1e-4)
    assert state.num_clipped == 0


def test_decay_slows_with_the_step_and_keeps_to_its_mask():
    params = {"kernel": jnp.full(3, 2.0), "bias": jnp.full(3, 2.0)}
    grads = [jax.tree.map(lambda p, s=s: s * p, params) for s in (0.0, 1.0)]
    mask = {"kernel": True, "bias": False}
    _, state = run(plain := rmsjax.scale_by_stable_adam(), params, *grads)
    step, _ = run(plain, params, *grads)
    for given in (mask, lambda params: mask):
        decayed, _ = run(rmsjax.scale_by_stable_adam(weight_decay=0.5, mask=given), params, *grads)
        np.testing.assert_array_equal(decayed["bias"], step["bias"])
        assert state.ratio_rms["kernel"] > 1.4
        np.testing.assert_allclose(decayed["kernel"] - step["kernel"], 0.5 * 2 / state.ratio_rms["kernel"], rtol=1e-5)


def test_moments_of_low_precision_parameters_are_in_float32_unless_told():
    params = jnp.ones(3, jnp.bfloat16)
    state = rmsjax.scale_by_stable_adam().init(params)
    assert (state.grad_mean.dtype, state.grad_rms.dtype) == (jnp.float32, jnp.float32)
    tx = rmsjax.stable_adamw(0.1, mu_dtype=jnp.bfloat16)
    _, (state, _) = run(tx, params, params, params)
    assert (state.grad_mean.dtype, state.grad_rms.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 0.9999])
def test_decays_near_one_are_not_rounded(decay):
    """1 - 0.9999 in float32, as 1 - float32(0.9999), is off by 1e-4 of it; after many steps so would be the average."""
    grad = jnp.array([3.0])
    tx, ema = rmsjax.scale_by_stable_adam(b1=decay, b2=decay), rmsjax.record_rms(ema_decay=decay)
    _, state = run(tx, grad, grad)
    assert (state.grad_mean, state.grad_rms) == (3.0, 3.0)
    for step in (2, 100, 10**4, 10**6):
        weight = (1 - decay) / (1 - decay**step)
        after = {"num_updates": jnp.int32(step - 1)}
        _, state = tx.update(grad, tx.init(grad)._replace(**after))
        _, recorded = ema.update(grad, ema.init(grad)._replace(**after))
        # The difference, its logarithm, that times the step, its exponential, less 1: with a root, each rounds once.
        close((state.grad_mean, recorded.ema_rms), (np.array([3 * weight]), np.array(3 * weight)), rtol=8 * EPS)
        close(state.grad_rms, np.array([3 * np.sqrt(weight)]), rtol=8 * EPS)


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("scope", ["global", "block"])
@pytest.mark.parametrize("name", quick_of(DISTINCT, "clip_by_rms", "hyperball"))
def test_steps_export(name, scope):
    """init and update through bytes and back, with their states as they are; another process has the same names."""
    for state in optax.EmptyState, optax.MaskedState, optax.ScaleState:
        with contextlib.suppress(ValueError):  # in another test already
            jax.export.register_namedtuple_serialization(state, serialized_name=f"optax.{state.__name__}")
    tx = ELEMENTS[name].make(scope)

    def exported(f, *args):
        shapes = jax.eval_shape(lambda *args: args, *args)
        return jax.export.deserialize(jax.export.export(jax.jit(f))(*shapes).serialize()).call

    state = exported(tx.init, PARAMS)(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))
    grads = at(GRADS, 1)
    got = exported(tx.update, grads, state, PARAMS)(grads, state, PARAMS)
    # An update may be the difference of two parameters, each of which is rounded.
    largest = max(float(jnp.max(jnp.abs(p))) for p in jax.tree.leaves(PARAMS))
    close(got, run(tx, PARAMS, grads), atol=2 * EPS * largest)


def test_importing_the_transformations_again():
    """As in a notebook that reloads what was edited."""
    again = importlib.util.module_from_spec(spec := importlib.util.find_spec("rmsjax._transforms"))
    spec.loader.exec_module(again)
    tx = again.record_rms()
    assert tx.update(PARAMS, tx.init(PARAMS))[1].num_updates == 1


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_averages_of_adam_from_ours(dtype, steps):
    """As the docs of the state say."""
    b1, b2 = 0.9, 0.99
    grads = [
        at(GRADS, step)["stack"].astype(dtype) * (1 + 1j if dtype == jnp.complex64 else 1) for step in range(steps)
    ]
    with jax.numpy_dtype_promotion("standard"):
        _, adam = run(optax.scale_by_adam(b1, b2), grads[0], *grads)
    _, ours = run(rmsjax.scale_by_stable_adam(b1, b2), grads[0], *grads)
    close(ours.grad_mean * (1 - b1**steps), adam.mu, rtol=1e-5, atol=1e-6)
    close(ours.grad_rms**2 * (1 - b2**steps), adam.nu, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- numbers


def with_number(factory, argument, **rest):
    def use(number):
        tx = factory(**{argument: number}, **rest)
        return run(tx, PARAMS, at(GRADS, 1))

    return use


NUMBERS = {
    f"{factory.__name__} {argument}": with_number(factory, argument, **rest)
    for factory, argument, rest in (
        (rmsjax.clip_by_rms, "max_rms", {}),
        (rmsjax.clip_by_relative_rms, "max_ratio", {}),
        (rmsjax.clip_by_relative_rms, "min_rms", {"max_ratio": 0.5}),
        (rmsjax.normalize_by_rms, "target", {}),
        (rmsjax.normalize_by_rms, "epsilon", {}),
        (rmsjax.record_rms, "ema_decay", {}),
        *((rmsjax.stable_adamw, name, {"learning_rate": 0.5}) for name in ("b1", "b2", "eps", "weight_decay")),
        (rmsjax.stable_adamw, "learning_rate", {}),
    )
} | {
    "rms_penalty target": lambda number: rmsjax.rms_penalty(PARAMS, number),
    "rms_normalize epsilon": lambda number: rmsjax.rms_normalize(PARAMS["stack"], epsilon=number),
    "rms_normalize scale_offset": lambda number: rmsjax.rms_normalize(
        PARAMS["stack"], jnp.ones(5), scale_offset=number
    ),
}
KINDS_OF_NUMBERS = (np.float32, np.array, jnp.bfloat16, jnp.asarray)


@pytest.mark.parametrize("use", NUMBERS)
def test_a_known_number_may_be_of_any_kind(use):
    """Under jit a JAX array may be known, and yet nothing that is computed with it."""
    numbers = [0.25, *(kind(0.25) for kind in KINDS_OF_NUMBERS)]
    expected, *got = jax.jit(lambda: [NUMBERS[use](number) for number in numbers])()
    for result in got:
        close(result, expected)
    for bad in jnp.float32(jnp.nan), jnp.ones(2):
        with pytest.raises((ValueError, TypeError), match="must be"):
            jax.eval_shape(lambda bad=bad: NUMBERS[use](bad))


@pytest.mark.parametrize("use", [name for name in NUMBERS if not name.startswith("rms_normalize")])
def test_a_traced_number_may_be_of_another_dtype(use):
    close(jax.jit(NUMBERS[use])(jnp.bfloat16(0.25)), NUMBERS[use](0.25))


@pytest.mark.parametrize("name", ELEMENTS)
def test_injected_arrays_under_jit(name):
    """`inject_hyperparams` calls the factory within init and update, there with what is traced."""
    hyper = {ELEMENTS[name].hyper: jnp.float32(ELEMENTS[name].values[1])} | (
        {"b2": jnp.float32(0.75)} if "stable" in name else {}
    )
    tx = optax.inject_hyperparams(ELEMENTS[name].factory)(**hyper)
    state = jax.jit(tx.init)(PARAMS)
    updates, state = jax.jit(tx.update)(at(GRADS, 1), state, PARAMS)
    plain = ELEMENTS[name].factory(**jax.tree.map(float, hyper))
    close((updates, state.inner_state), run(plain, PARAMS, at(GRADS, 1)), atol=cancelled(name, PARAMS))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rmsjax.clip_by_rms(-1.0), ValueError, "clip_by_rms: max_rms must be at least 0, got -1.0"),
        (lambda: rmsjax.clip_by_rms(np.nan), ValueError, "clip_by_rms: max_rms must be at least 0, got nan"),
        (lambda: rmsjax.clip_by_rms("1"), TypeError, "clip_by_rms: max_rms must be a number, got '1'"),
        (lambda: rmsjax.clip_by_relative_rms(-0.1), ValueError, "clip_by_relative_rms: max_ratio must be at least 0"),
        (lambda: rmsjax.clip_by_relative_rms(0.1, min_rms=-1), ValueError, "min_rms must be at least 0, got -1"),
        (
            lambda: rmsjax.clip_by_rms(optax.linear_schedule(1.0, 0.1, 10)),
            TypeError,
            r'max_rms must be .* optax.inject_hyperparams\(clip_by_rms, static_args=\("scope",\)\)\(max_rms=...\)$',
        ),
        (lambda: rmsjax.clip_by_rms(1.0, "layers"), ValueError, "clip_by_rms: scope must be .*, got 'layers'"),
        (lambda: rmsjax.clip_by_relative_rms(1.0, "globl"), ValueError, "got 'globl'; did you mean 'global'"),
        (lambda: rmsjax.normalize_by_rms(1.0, 1.5), TypeError, "normalize_by_rms: scope must be .*, got 1.5"),
        (lambda: rmsjax.record_rms(None), TypeError, "record_rms: scope must be .*, got None"),
        (lambda: rmsjax.scale_by_stable_adam(scope="blocks"), ValueError, "scale_by_stable_adam: scope must be"),
        (lambda: rmsjax.stable_adamw(0.1, scope="blocks"), ValueError, "scope must be .*did you mean 'block'"),
        (lambda: rmsjax.clip_by_relative_rms(None), TypeError, "max_ratio must be a number, got None"),
        (lambda: rmsjax.normalize_by_rms(-1), ValueError, "normalize_by_rms: target must be at least 0"),
        (lambda: rmsjax.normalize_by_rms(epsilon=-1), ValueError, "normalize_by_rms: epsilon must be at least 0"),
        (lambda: rmsjax.record_rms(relative=0.1), TypeError, "record_rms: relative must be True or False, got 0.1"),
        (lambda: rmsjax.record_rms(ema_decay=1.0), ValueError, "record_rms: ema_decay must be below 1, got 1.0"),
        (lambda: rmsjax.record_rms(ema_decay=-0.1), ValueError, "record_rms: ema_decay must be at least 0"),
        (lambda: rmsjax.scale_by_stable_adam(1.0), ValueError, "scale_by_stable_adam: b1 must be below 1"),
        (lambda: rmsjax.stable_adamw(1e-3, b2=1), ValueError, "scale_by_stable_adam: b2 must be below 1"),
        (lambda: rmsjax.stable_adamw(1e-3, eps=-1e-8), ValueError, "scale_by_stable_adam: eps must be at least 0"),
        (lambda: rmsjax.stable_adamw(1e-3, weight_decay=-1), ValueError, "weight_decay must be at least 0"),
        (lambda: rmsjax.stable_adamw("1e-3"), TypeError, "stable_adamw: learning_rate must be a number known .*'1e-3'"),
        (lambda: rmsjax.stable_adamw(np.nan), ValueError, "stable_adamw: learning_rate must be finite, got nan"),
    ],
)
def test_bad_numbers(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", ELEMENTS)
def test_bad_trees_and_scopes(name):
    function = "scale_by_stable_adam" if name == "stable_adamw" else name
    tx = ELEMENTS[name].make("block")
    with pytest.raises(TypeError, match=f"{function}: leaf 'count' must be an array of floating-point"):
        tx.init({"count": jnp.arange(3)})
    with pytest.raises(ValueError, match=f"{function}: scope must be 'global', 'block', .*did you mean 'block'"):
        ELEMENTS[name].make("blok").init(jnp.ones(3))
    with pytest.raises(ValueError, match=rf"{function}: scope axis 1 is out of range .*\(leaf 'b'\)"):
        ELEMENTS[name].make(1).init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match=f"{function}: axis_name 'x' is not bound"):
        run(
            ELEMENTS[name].factory(**{ELEMENTS[name].hyper: ELEMENTS[name].values[0]}, axis_name="x"),
            jnp.ones(3),
            jnp.ones(3),
        )
    with pytest.raises(TypeError, match=r"under optax\.inject_hyperparams name it in static_args"):
        optax.inject_hyperparams(ELEMENTS[name].factory)(
            **{ELEMENTS[name].hyper: ELEMENTS[name].values[0]}, scope=0
        ).init(jnp.ones(3))


@pytest.mark.parametrize("name", ELEMENTS)
def test_updates_of_another_structure_than_at_init(name):
    function = "scale_by_stable_adam" if name == "stable_adamw" else name
    tx, given = ELEMENTS[name].make("block"), {"a": jnp.ones((1, 3)), "b": jnp.ones(3)}
    for updates in ({"a": jnp.ones((1, 3))}, given | {"b": None}, given | {"c": jnp.ones(3)}):
        with pytest.raises(ValueError, match=f"{function}: updates must have the structure of the params that init"):
            jax.eval_shape(tx.update, updates, tx.init(given), updates)
    tx, updates = ELEMENTS[name].make(0), given | {"a": jnp.ones((3, 1))}
    with pytest.raises(ValueError, match=f"{function}: updates must have the shapes .* at 'a' has shape"):
        jax.eval_shape(tx.update, updates, tx.init(given), updates)


@pytest.mark.parametrize("name", ["clip_by_relative_rms", "stable_adamw", "hyperball"])
def test_missing_params(name):
    tx = ELEMENTS[name].make("block")
    with pytest.raises(ValueError, match=r"update needs the parameters: call tx.update\(updates, state, params\)"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


@pytest.mark.parametrize("name", ["clip_by_relative_rms", "stable_adamw", "hyperball"])
def test_params_that_do_not_fit_the_updates(name):
    tx, grads = ELEMENTS[name].make("block"), {"a": jnp.ones(3), "b": jnp.ones(2)}
    for params, error, message in (
        (
            {"a": jnp.ones(3), "b": jnp.ones(4)},
            ValueError,
            r"shapes of the updates: expected 'b' of shape \(2,\), got 'b' of shape \(4,\)",
        ),
        (
            {"a": jnp.ones(3), "b": {"c": jnp.ones(2)}},
            TypeError,
            "leaf 'b' of params must be an array of numbers, got a dict with the keys 'c'",
        ),
        ({"a": jnp.ones(3), "b": None}, TypeError, "leaf 'b' of params must be an array of numbers, got None"),
        ({"a": jnp.ones(3)}, ValueError, "structure of the updates: leaf 'b' is in one of them alone"),
        (
            {"a": jnp.ones(3), "c": jnp.ones(2)},
            ValueError,
            "structure of the updates: leaf 'b' is in one of them alone",
        ),
        (grads | {"c": jnp.ones(1)}, ValueError, "structure of the updates: leaf 'c' is in one of them alone"),
        (linen.FrozenDict(grads), ValueError, r"structure of the updates: expected .*, got FrozenDict"),
    ):
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda params=params: tx.update(grads, tx.init(grads), params))


@pytest.mark.parametrize("name", ["clip_by_relative_rms", "stable_adamw", "hyperball"])
def test_params_may_be_a_whole_model(name):
    """As in optax and Equinox: what has None for its update is no parameter."""
    tx, params = ELEMENTS[name].make("block"), {"a": jnp.full(3, 4.0), "b": None, "c": None}
    got = run(tx, params, params)
    state = tx.init(params)
    close(tx.update(params, state, params | {"b": jnp.tanh, "c": jnp.arange(2)}), got)


def test_a_learning_rate_has_its_sign_however_it_is_given():
    """As in optax: below zero it ascends."""
    params = {"a": jnp.ones(3)}
    expected, _ = run(optax.chain(rmsjax.scale_by_stable_adam(weight_decay=1e-2), optax.scale(0.5)), params, params)
    injected = optax.inject_hyperparams(rmsjax.stable_adamw)
    for tx in (
        rmsjax.stable_adamw(-0.5),
        rmsjax.stable_adamw(lambda step: -0.5),
        injected(-0.5),
        (traced := injected(lambda step: -0.5))._replace(update=jax.jit(traced.update)),
    ):
        close(run(tx, params, params)[0], expected)


@pytest.mark.parametrize("module", [_clips, _hyperball, _stable_adam, _transforms, penalties, report])
def test_all_that_is_public_is_named_as_such(module):
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    assert {name for name in own if not name.startswith("_")} == set(module.__all__)
