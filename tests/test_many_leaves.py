"""Trees of many small leaves: these are joined before anything is done to them, and nothing is lost or mixed up."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsjax
from rmsjax import _pools, _reduce
from tests.helpers.marks import slow
from tests.helpers.oracle import in_double, true_rms
from tests.helpers.workloads import gpt2_small, tree_of

pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(0)
# Joints of one leaf and of several, alike and not, and more than one joint: of tiny leaves, and of larger ones.
SHAPES = [(), (1,), (5,), (3, 3), *[(8, 8)] * 19, (50,), *[(70,)] * 33, (100,), (4096,), (70, 80), (0, 3)]
DTYPES = ["float32", "bfloat16", "float16", "complex64"]


def by_parity(path, leaf):
    return "odd" if int(path) % 2 else "block"


def pooled(leaves):
    return true_rms(np.concatenate([in_double(leaf).ravel() for leaf in leaves]))


def norms_of(leaves, scope):
    """The norm that belongs to each leaf."""
    odd = pooled(leaves[1::2])
    single = [pooled([leaf]) for leaf in leaves]
    return {
        "global": [pooled(leaves)] * len(leaves),
        "block": single,
        by_parity: [odd if i % 2 else norm for i, norm in enumerate(single)],
    }[scope]


def clipped(scope, leaves, max_rms):
    tx = rmsjax.clip_by_rms(max_rms, scope)
    return tx.update(leaves, tx.init(leaves))


@pytest.mark.parametrize("scope", ["global", "block", by_parity])
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16"), slow("float16"), slow("complex64"), "mixed"])
def test_measured_and_clipped(dtype, scope):
    dtypes = [DTYPES[i % 4] if dtype == "mixed" else dtype for i in range(len(SHAPES))]
    program = jax.jit(partial(clipped, scope))
    for size in (1.0, 1e30, 1e-30) if dtype in ("float32", "bfloat16") else (1.0,):
        leaves = [
            np.asarray(jnp.asarray(RNG.normal(size=s) * size).astype(d)) for s, d in zip(SHAPES, dtypes, strict=True)
        ]
        updates, state = program(leaves, np.float32(0.9 * size))
        got = [state.rms] * len(leaves) if scope == "global" else state.rms
        norms = norms_of(leaves, scope)
        np.testing.assert_allclose(got, norms, rtol=1e-6)
        for update, leaf, norm in zip(updates, leaves, norms, strict=True):
            want = in_double(leaf) * min(1, 0.9 * size / norm if norm else 1)
            precision = {"bfloat16": 2**-8, "float16": 2**-11}.get(str(leaf.dtype), 1e-6)
            assert (update.dtype, update.shape) == (leaf.dtype, leaf.shape)
            np.testing.assert_allclose(in_double(update), want, rtol=precision, atol=1e-7 if size == 1 else 1e-37)


def test_derivatives():
    leaves = [jnp.asarray(RNG.normal(size=s), jnp.float32) for s in SHAPES]
    tangents = [jnp.sin(leaf) for leaf in leaves]
    whole, along = (jnp.concatenate([leaf.ravel() for leaf in tree]) for tree in (leaves, tangents))
    norm, change = jax.jvp(rmsjax.tree_rms, (leaves,), (tangents,))
    want, want_change = jax.jvp(rmsjax.rms, (whole,), (along,))
    np.testing.assert_allclose((norm, change), (want, want_change), rtol=1e-6)
    gradient = jnp.concatenate([leaf.ravel() for leaf in jax.grad(rmsjax.tree_rms)(leaves)])
    np.testing.assert_allclose(gradient, jax.grad(rmsjax.rms)(whole), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scope", ["global", slow("block")])
def test_derivatives_of_the_clip(scope):
    """In both modes those of the same clip of one array, or of one array after the other."""
    some = SHAPES[3::4]  # in joints of one size and of several, and a large one
    leaves = [jnp.asarray(RNG.normal(size=s), jnp.float32) for s in some]
    tangents = [jnp.sin(leaf) for leaf in leaves]

    def flat(tree):
        return jnp.concatenate([leaf.ravel() for leaf in tree])

    def joined(leaves):
        return flat(clipped(scope, leaves, 0.5)[0])

    def apart(leaves):
        arrays = [flat(leaves)] if scope == "global" else leaves
        return flat([clipped("global", array, 0.5)[0] for array in arrays])

    # Terms of about 1 cancel in a change, and each is rounded to 6e-8.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-7)
    for got, want in zip(*(jax.jit(partial(jax.jvp, f))((leaves,), (tangents,)) for f in (joined, apart)), strict=True):
        close(got, want)
    got, want = (jax.jit(jax.grad(lambda x, f=f: f(x) @ jnp.sin(flat(leaves))))(leaves) for f in (joined, apart))
    close(flat(got), flat(want))


@pytest.mark.parametrize("scope", [slow("global"), "block"])
def test_under_vmap(scope):
    leaves = [jnp.asarray(RNG.normal(size=(3, *s)), jnp.float32) for s in SHAPES]
    got, state = jax.jit(jax.vmap(lambda x: clipped(scope, x, 0.5)))(leaves)
    for k in range(3):
        want, want_state = clipped(scope, [leaf[k] for leaf in leaves], 0.5)
        np.testing.assert_allclose(
            [norm[k] for norm in jax.tree.leaves(state.rms)], jax.tree.leaves(want_state.rms), rtol=1e-6
        )
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g[k], w, rtol=1e-6)


def operations(f, *args):
    """How often each primitive occurs in a program, in whatever it calls too."""
    found = {}

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            found[eqn.primitive.name] = found.get(eqn.primitive.name, 0) + 1
            for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                inner = getattr(param, "jaxpr", param)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return found


@pytest.mark.usefixtures("fresh_traces")
def test_few_operations(monkeypatch):
    """Each is traced, lowered and compiled: for an array, and for each further large leaf of a tree."""
    monkeypatch.setattr(_reduce, "FORM", "cpu")  # one form, as that which is lowered
    assert sum(operations(rmsjax.rms, jnp.ones(1000)).values()) < 75
    two, three = (
        sum(operations(rmsjax.tree_rms, [jnp.ones((100, 50 + i)) for i in range(count)]).values()) for count in (2, 3)
    )
    assert three - two <= 18  # two axes, each by itself, naive and rescaled


def test_a_clip_does_little_to_each_leaf():
    """XLA multiplies by two numbers in each loop, and does not compute these again there: that took twice as many."""
    few, more = (
        jax.jit(partial(clipped, "global")).lower([jnp.ones(100)] * count, 1.0).compile().as_text().count(" = ")
        for count in (32, 64)
    )
    assert more - few <= 20 * 32


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA of jax 0.10 makes known indices part of each loop")
def test_what_is_done_to_leaves_of_one_shape_is_compiled_once():
    """XLA compiles alike loops once, so the numbers of the leaves are no part of them."""
    text = jax.jit(partial(clipped, "block")).lower([jnp.ones((70, 70))] * 64, 1.0).compile().as_text()
    text = re.sub(r"metadata=\{.*?\}|[._]\d+\b", "", text)
    loops = re.findall(r"^%\w+ (\([^)]*\) -> f32\[70,70\].*?^\})", text, re.MULTILINE | re.DOTALL)
    assert len(loops) >= 64
    assert len(set(loops)) == 1


@pytest.mark.parametrize("scope", ["global", "block"])
def test_what_is_not_clipped_comes_back_to_the_last_bit(scope):
    """Subnormal numbers too, which any arithmetic would flush to 0 on a CPU."""
    tree = [jnp.array([[0.5, 1e-40], [0.25, -1e-45]])] * 2
    updates, _ = jax.jit(partial(clipped, scope))(tree, 1.0)
    for leaf, out in zip(tree, updates, strict=True):
        np.testing.assert_array_equal(np.asarray(out).view(np.uint32), np.asarray(leaf).view(np.uint32))


@pytest.mark.parametrize(("numerator", "denominator"), [(0.5, 3e38), (2e38, 1e-3), (3.0, 4.0), (1.0, 0.0)])
def test_the_derivative_of_a_ratio_beyond_the_range(numerator, denominator):
    """d(ab) = (dn - dd n/d)/d, of which the first factor takes no part."""
    n, d = np.float32(numerator), np.float32(denominator)
    (a, b), (da, db) = jax.jvp(_pools.split_ratio, (n, d), (0.5 * n, 0.25 * d))
    assert da == 0
    assert db == pytest.approx(0.25 * float(b), rel=1e-6)
    if d:
        assert float(a) * float(b) == pytest.approx(float(n) / float(d), rel=1e-6)


@pytest.mark.parametrize("of", [rmsjax.rms_penalty, jax.grad(rmsjax.rms_penalty)], ids=["norm", "gradient"])
def test_leaves_of_one_type_are_traced_once(of):
    def lines(count):
        return jax.jit(of).lower([jnp.ones((70, 70))] * count).as_text().count(" = ")

    assert lines(24) - lines(16) <= 8 * 30


@pytest.mark.parametrize(
    ("tx", "scope"),
    [
        (rmsjax.clip_by_global_norm(1.0), "global"),
        (rmsjax.clip_by_history(scope="global"), "global"),
        (rmsjax.clip_by_history(), "block"),
    ],
)
def test_no_clip_has_many_more_operations_than_the_plain_one(tx, scope):
    """Of the gradients of GPT-2 small; to compile takes a time in proportion."""
    shapes = tree_of(gpt2_small())

    def size_of(tx):
        state = jax.eval_shape(tx.init, shapes)
        return jax.jit(tx.update).lower(shapes, state, shapes).as_text().count(" = ")

    assert size_of(tx) <= 1.2 * size_of(rmsjax.clip_by_rms(1e-3, scope))


@pytest.mark.parametrize("scope", ["global", "block"])
@pytest.mark.usefixtures("fresh_traces")
def test_few_reductions(scope, monkeypatch):
    """32 leaves to a reduction, in the naive pass and in the rescaled one: alone they take a minute to compile."""
    monkeypatch.setattr(_reduce, "FORM", "cpu")  # one form, as that which is compiled
    leaves = [jnp.ones(64)] * 320
    for f in (partial(rmsjax.tree_rms, scope=scope), lambda leaves: clipped(scope, leaves, 1.0)):
        found = operations(f, leaves)
        assert found["reduce_sum"] <= 2 * (320 // 32 + 1)
        assert found.get("reduce_and", 0) <= 2


READINGS = {
    "float16": {"cpu": 1, "cuda": 1, "tpu": 1},
    "float32": {"cpu": 2, "cuda": 1 if _reduce.KNOWS_DOUBLE else 3, "tpu": 3},
    "float64": {"cpu": 2, "cuda": 3, "tpu": 3},
}


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", READINGS)
@pytest.mark.usefixtures("fresh_traces")
def test_leaves_of_one_type_are_summed_up_together_in_their_own_shape(dtype, platform, monkeypatch, x64):
    """To flatten them would gather what is split over devices, and copy what a TPU holds in tiles.

    On a CPU once in the naive pass and once in the rescaled one, on a TPU for each of three scales, and once only where
    squares fit or are taken in a type in which they do.
    """
    monkeypatch.setattr(_reduce, "FORM", platform)
    shapes = [(4, 16)] * 20 + [(16, 4)] * 20 + [(300, 300)] * 2
    leaves = [jnp.ones(shape, dtype) for shape in shapes]
    found = operations(rmsjax.tree_rms, leaves)
    assert "reshape" not in found
    assert found["reduce_sum"] == READINGS[dtype][platform] * (
        2 + 2 + 1
    )  # two stacks, two large leaves, and all of them


def planned(count, size, *, together=False):
    """Leaves of one size, without data, and the plan of the norm of all of them, or of each."""
    leaves = [jax.ShapeDtypeStruct((size,), jnp.float32)] * count
    pools = [_pools.Pool(tuple(range(count)))] if together else [_pools.Pool((i,)) for i in range(count)]
    return leaves, _pools.make_plan(leaves, tuple(pools), _reduce.UNMAPPED)


@pytest.mark.parametrize(
    ("platform", "size", "most"),
    [
        *(("cpu", 4096, 64), ("cpu", 4097, 1), ("other", 4096, 64), ("other", 4097, 1)),
        *(("cuda", 4096, 64), ("cuda", 4097, 16), ("cuda", 70_000, 16), ("cuda", 70_001, 1)),
    ],
)
def test_how_many_leaves_are_read_at_once(platform, size, most):
    leaves, plan = planned(130, size, together=True)
    bundles = _pools._bundles(plan, leaves, range(130), platform)
    assert max(map(len, bundles)) == most
    assert sorted(i for bundle in bundles for i in bundle) == list(range(130))


@pytest.mark.parametrize(("size", "most"), [(64, 32), (2**18, 32), (2**19, 16), (2**23, 1), (2**24, 1)])
def test_how_many_norms_are_in_one_vector(size, most):
    """As many as leaves that a chip keeps from the reading for the norm to the scaling by it."""
    _, plan = planned(40, size)
    assert max(map(len, plan.places)) == most
    assert sorted(pool for place in plan.places for pool in place) == list(range(40))


@pytest.mark.parametrize(
    ("platform", "size", "shape"), [("cpu", 64, (64, 3)), ("cpu", 65, (3, 65)), ("cuda", 64, (3, 64))]
)
def test_tiny_leaves_are_columns_on_a_cpu(platform, size, shape, monkeypatch):
    monkeypatch.setattr(_pools, "sums_of_squares", lambda x, *_: x.shape)
    assert _pools._sums_of_bundle.__wrapped__([jnp.ones(size)] * 3, [], (None,), jnp.float32, platform) == shape


@pytest.mark.parametrize(
    ("platform", "size", "together", "times"),
    [("cuda", 70_001, False, 1), ("cuda", 64, False, 0), ("cuda", 70_001, True, 0), ("cpu", 70_001, False, 0)],
)
def test_sums_are_put_together_once_on_a_gpu(platform, size, together, times, monkeypatch):
    """Where several bundles have the norms of one vector."""
    held = []
    monkeypatch.setattr(_pools, "hold", lambda values: held.append(values) or values)
    leaves, plan = planned(8, size, together=together)
    jax.eval_shape(
        lambda leaves: _pools._sums_of_place(plan, leaves, plan.places[0], [None], jnp.float32, platform), leaves
    )
    assert len(held) == times


def test_the_sums_of_joints_are_not_added_one_by_one():
    """As XLA would do, at a cost in compiling that grows with the square of their number."""
    text = jax.jit(rmsjax.tree_rms).lower([jnp.ones(64)] * 1600).compile().as_text()
    assert text.count(" add(") < 5 * 1600 / 16


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="XLA of jax 0.7 scales a copy of a leaf that is out of range")
@pytest.mark.parametrize("scope", ["global", "block"])
def test_large_leaves_are_not_copied(scope):
    leaves = [jnp.ones((65, 64)), jnp.ones(5000)]
    compiled = jax.jit(partial(clipped, scope), donate_argnums=0).lower(leaves, 1.0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < leaves[0].nbytes / 4


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="XLA of jax 0.7 stores the squares")
@pytest.mark.parametrize("scope", ["block", "global"])
def test_a_record_in_a_training_step_needs_no_memory(scope):
    """The squares of a gradient are not stored for the norm and for the second moment of Adam to share."""

    def temporary(tx):
        def step(w, state):
            grads = jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.ones((8, 1024)) @ w)))(w)
            updates, state = tx.update(grads, state, w)
            return w + updates, state

        w = jnp.zeros((1024, 1024))
        with jax.numpy_dtype_promotion("standard"):  # adam multiplies floats by integers
            compiled = jax.jit(step, donate_argnums=(0, 1)).lower(w, tx.init(w)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    adam = optax.adam(1e-3)
    assert temporary(optax.chain(rmsjax.record_rms(scope), adam)) < temporary(adam) + 1e6
