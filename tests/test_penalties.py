"""The penalty on RMS norms: its values, its derivative, and what it does to models of two widths."""

from functools import partial

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from rmsjax import rms, rms_penalty, tree_rms
from tests.helpers.marks import slow

pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(0)
TREE = {
    "dense": {name: np.float32(RNG.normal(size=shape)) for name, shape in (("kernel", (4, 6)), ("bias", (6,)))},
    "stack": np.float32(3 * RNG.normal(size=(3, 4, 5))),
}
KINDS = ("two_sided", "ceiling")


def mixed(path, leaf):
    return (1, 2) if path == "stack" else "dense"


# How many norms each scope has on the tree.
SCOPES = {"global": ("global", 1), "block": ("block", 3), "axes": (0, 1 + 6 + 20), "callable": (mixed, 1 + 3)}


@pytest.fixture(scope="module", params=SCOPES)
def penalties(request):
    """(a scope, how many norms it has, a function of a tree and a target that gives value and gradient of each kind)"""
    scope, count = SCOPES[request.param]
    of_kind = {kind: jax.value_and_grad(partial(rms_penalty, scope=scope, kind=kind)) for kind in KINDS}
    return scope, count, jax.jit(lambda tree, target: {kind: f(tree, target) for kind, f in of_kind.items()})


def test_mean_over_all_norms(penalties):
    scope, count, f = penalties
    norms = tree_rms(TREE, scope)
    if callable(scope):  # two leaves share a norm, which counts once
        del norms["dense"]["bias"]
    norms = np.concatenate([np.ravel(norm) for norm in jax.tree.leaves(norms)]).astype(np.float64)
    assert norms.size == count
    for target in (0.0, 0.9, 2.5):
        got = f(TREE, target)
        for kind, excess in ("two_sided", norms - target), ("ceiling", np.maximum(norms - target, 0)):
            # A norm is good to 4 units in the last place, and so is the root of the penalty, near the target too.
            np.testing.assert_allclose(np.sqrt(got[kind][0]), np.sqrt(np.mean(excess**2)), rtol=1e-6, atol=5e-7)


def test_gradient_is_finite_at_zero_and_right_elsewhere(penalties):
    f = penalties[2]
    at_zero, here, longer, shorter = (
        f(jax.tree.map(lambda x, s=s: np.float32(s * x), TREE), 0.8) for s in (0, 1, 1.01, 0.99)
    )
    for kind in KINDS:
        assert not any(g.any() for g in jax.tree.leaves(at_zero[kind][1]))
        pairs = zip(jax.tree.leaves(here[kind][1]), jax.tree.leaves(TREE), strict=True)
        slope = sum(np.vdot(g, x) for g, x in pairs)
        np.testing.assert_allclose(slope, (longer[kind][0] - shorter[kind][0]) / 0.02, rtol=1e-3)


def test_norms_over_nothing_do_not_count():
    tree = {"a": jnp.full(3, 3.0), "b": jnp.zeros((0, 2)), "c": None, "d": optax.MaskedNode()}
    for scope in ("global", "block", 0):
        assert rms_penalty(tree, 1.0, scope) == 4
    assert rms_penalty({"a": jnp.zeros((2, 0))}, 1.0, 1) == 0
    assert rms_penalty({}) == 0
    assert jnp.isfinite(jax.grad(rms_penalty)({"a": jnp.ones(3), "b": jnp.zeros((0, 2))})["a"]).all()


def test_range_and_dtypes(x64):
    for dtype, size, result in [
        ("float16", 300, "float32"),
        ("bfloat16", 2e-30, "float32"),
        ("float64", 1e-200, "float64"),
    ]:
        got = rms_penalty(jnp.full(4, size, dtype), target=float(jnp.asarray(size, dtype)))
        assert (got, got.dtype) == (0, result)
    assert rms_penalty(jnp.full(4, 3 + 4j, jnp.complex64), 4.0) == 1
    assert jnp.isnan(rms_penalty(jnp.array([1.0, jnp.nan])))
    assert jax.jit(rms_penalty)(jnp.full(4, 3.0), jnp.float32(1.0)) == 4


def test_axis_name():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.arange(16.0)
    got = jax.shard_map(lambda x: rms_penalty(x, axis_name="x"), mesh=mesh, in_specs=P("x"), out_specs=P())(x)
    np.testing.assert_allclose(got, rms_penalty(x), rtol=1e-6)


NARROW, WIDE, LEVEL = 32, 256, 0.7


def held_activations(width):
    """A function of two coefficients: the RMS of the hidden activations after training on digits, and the loss.

    The first is for `rms_penalty`, the second for a like penalty on the L2 norm, at the level of the narrow model.
    """
    rng, (images, labels) = np.random.default_rng(0), load_digits(return_X_y=True)
    images, labels = np.float32(images[:256] / 16), np.int32(labels[:256])
    params = {
        "hidden": np.float32(rng.normal(size=(64, width)) / 8),
        "out": np.float32(rng.normal(size=(width, 10)) / np.sqrt(width)),
    }
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, 100))

    def loss(params, images, labels, of_rms, of_l2):
        hidden = images @ params["hidden"]
        logits = jnp.tanh(hidden) @ params["out"]
        l2 = jnp.sqrt(jnp.mean(jnp.sum(hidden**2, -1)))
        penalty = of_rms * rms_penalty(hidden, LEVEL) + of_l2 * (l2 - LEVEL * np.sqrt(NARROW)) ** 2
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + penalty, hidden

    @jax.jit
    def train(params, *data):
        def step(carry, _):
            params, state = carry
            (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(params, *data)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), (rms(hidden), value)

        return jax.lax.scan(step, (params, tx.init(params)), None, 100)[1]

    return lambda of_rms, of_l2: [values[-1] for values in train(params, images, labels, of_rms, of_l2)]


@pytest.mark.slow
def test_same_strength_at_every_width():
    """One coefficient holds the activations of a narrow and a wide model to one level, and both learn.

    A level of the L2 norm, right for the narrow one, squeezes the wide one to a third.
    """
    with jax.numpy_dtype_promotion("standard"):
        narrow, wide = (held_activations(width) for width in (NARROW, WIDE))
        for train in (narrow, wide):
            norm, loss = train(10.0, 0.0)
            assert abs(norm / LEVEL - 1) < 0.05
            assert loss < 0.3
        assert narrow(0.0, 0.0)[0] > 1.3 * wide(0.0, 0.0)[0]
        assert wide(0.0, 1.0)[0] < 0.4 * LEVEL


def mean_squares(tree, scope):
    """The mean of all mean squares; the pools of the scope are those of `SCOPES`."""
    if scope == "global":
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        return jnp.mean(flat**2)
    if scope == "block":
        means = [jnp.mean(leaf**2) for leaf in jax.tree.leaves(tree)]
    elif scope == 0:
        means = [jnp.mean(leaf**2, 0) for leaf in jax.tree.leaves(tree)]
    else:
        dense = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree["dense"])])
        means = [jnp.mean(dense**2), jnp.mean(tree["stack"] ** 2, (1, 2))]
    return jnp.mean(jnp.concatenate([jnp.ravel(mean) for mean in means]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["block", slow("callable"), slow("global"), slow("axes")])
def test_with_target_zero_it_is_the_mean_square(scope, kind):
    """In its second derivative too, at zero, where the norm has none, and elsewhere, for a traced target as well."""
    scope = SCOPES[scope][0]
    tree = TREE | {"stack": TREE["stack"][:, :2, :2]}
    stack_and_zeros = jax.tree.map(np.zeros_like, tree) | {"stack": tree["stack"] * np.float32([[[0]], [[1]], [[2]]])}
    points, unflatten = [], jax.flatten_util.ravel_pytree(tree)[1]
    for point in (jax.tree.map(np.zeros_like, tree), stack_and_zeros, tree):
        np.testing.assert_allclose(rms_penalty(point, 0.0, scope, kind), mean_squares(point, scope), rtol=1e-6)
        points.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(point)]))

    def penalty(x, target):
        return rms_penalty(unflatten(x), target, scope, kind)

    expected = jax.jit(jax.hessian(lambda x: mean_squares(unflatten(x), scope)))(points[0])
    known = jax.jit(jax.vmap(jax.hessian(partial(penalty, target=0))))(np.stack(points))
    traced = jax.jit(jax.vmap(jax.jacrev(jax.grad(penalty)), (0, None)))(np.stack(points), 0.0)
    for got in (*known, *traced):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [slow(jnp.float32), jnp.complex64])
def test_second_derivative_at_zero(dtype):
    """2/n with target 0; above it a pool of zeros stays a point of its own, and one of numbers out of range finite."""

    def penalty(x, target=0.0):
        return rms_penalty(jax.lax.complex(x, x) if dtype == jnp.complex64 else x, target)

    n = 3
    factor = 2 if dtype == jnp.complex64 else 1
    np.testing.assert_allclose(jax.hessian(penalty)(jnp.zeros(n)), factor * 2 / n * np.eye(n), rtol=1e-6)
    for target in (0.0, 1.0):
        derivatives = jax.jit(lambda x, t=target: (jax.hessian(penalty)(x, t), jax.grad(penalty)(x, t)))
        for x in (jnp.zeros(n), jnp.full(n, 1e-30), jnp.full(n, 1e15)):
            assert all(np.isfinite(derivative).all() for derivative in derivatives(x))


@pytest.mark.parametrize("check_vma", [True, False])
def test_second_derivative_over_devices(check_vma):
    """A leaf that is split counts all its elements, one that is whole is counted once."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.shard_map(
        lambda split, whole: rms_penalty(split, 0.0, axis_name="x") + rms_penalty(whole, 0.0),
        mesh=mesh,
        in_specs=(P("x"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    v = jnp.arange(8.0), jnp.arange(3.0)

    def along(f):
        zeros = jax.tree.map(jnp.zeros_like, v)
        return jax.jit(lambda: jax.jvp(jax.grad(lambda pair: f(*pair)), (zeros,), (v,))[1])()

    got, want = along(f), along(lambda split, whole: jnp.mean(split**2) + jnp.mean(whole**2))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, want)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": -1.0}, ValueError, "rms_penalty: target must be at least 0, got -1.0"),
        ({"target": "1"}, TypeError, "rms_penalty: target must be a number, got '1'"),
        ({"kind": "both"}, ValueError, "rms_penalty: kind must be 'two_sided' or 'ceiling', got 'both'"),
        ({"scope": "blocks"}, ValueError, "rms_penalty: scope must be .*did you mean 'block'"),
        ({"scope": 2}, ValueError, r"rms_penalty: scope axis 2 is out of range .*\(leaf 'dense/bias'\)"),
        ({"axis_name": "x"}, ValueError, "rms_penalty: axis_name 'x' is not bound"),
        ({"tree": {"a": jnp.arange(3)}}, TypeError, "rms_penalty: leaf 'a' must be an array of floating-point"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_penalty(**{"tree": TREE} | arguments)
