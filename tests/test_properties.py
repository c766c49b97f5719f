"""Properties, for inputs that hypothesis makes up: the axioms of a norm, what leaves it alone, what a clip promises.

Shapes are fixed and functions compiled once, so that an example costs a call.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import rmsjax

N = 12
ROUNDING = 1e-6
settings.register_profile("rmsjax", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("rmsjax")


def vectors(least=2.0**-100, largest=2.0**100, shape=N):
    """Of normal numbers of very different sizes, and zeros."""
    sizes = st.floats(least, largest, width=32)
    return arrays(np.float32, shape, elements=sizes | sizes.map(lambda x: -x) | st.just(0.0))


def clipped(x, max_rms):
    tx = rmsjax.clip_by_rms(max_rms)
    return tx.update(x, tx.init(x))[0]


def to_target(x, target):
    tx = rmsjax.normalize_by_rms(target, epsilon=0.0)
    return tx.update(x, tx.init(x))[0]


rms = jax.jit(rmsjax.rms)
masked_rms = jax.jit(lambda x, where: rmsjax.rms(x, where=where))
normalized = jax.jit(lambda x: rmsjax.rms_normalize(x, epsilon=0.0))
clipped, to_target = jax.jit(clipped), jax.jit(to_target)


def assert_near(got, want):
    np.testing.assert_allclose(got, want, rtol=ROUNDING)


@given(vectors(2.0**-30, 2.0**30), st.integers(-80, 80))
def test_homogeneity_is_exact_for_powers_of_two(x, k):
    assert rms(np.ldexp(x, k)) == np.ldexp(rms(x), k)


@given(vectors(2.0**-40, 2.0**40), st.floats(-(2.0**40), 2.0**40, width=32))
def test_homogeneity(x, c):
    c = np.float32(c)
    assume(c == 0 or abs(c) > 2.0**-40)
    assert_near(rms(c * x), abs(c) * rms(x))


@given(vectors(), vectors())
def test_triangle_inequality(x, y):
    assert rms(x + y) <= (np.float64(rms(x)) + np.float64(rms(y))) * (1 + ROUNDING)


@given(vectors())
def test_positive_unless_zero(x):
    assert (rms(x) > 0) == x.any()


@given(vectors(), st.permutations(range(N)), arrays(bool, N))
def test_order_and_signs_do_not_matter(x, order, negated):
    assert_near(rms(x[np.array(order)]), rms(x))
    assert rms(np.where(negated, -x, x)) == rms(x)


@given(vectors(), arrays(np.float32, N, elements=st.floats(width=32)), arrays(bool, 2 * N))
def test_what_a_mask_hides_does_not_matter(x, junk, order):
    """Padding at any place, with anything: inf and NaN too."""
    places = np.argsort(order, kind="stable")
    padded, where = np.concatenate([x, junk])[places], np.arange(2 * N)[places] < N
    assert_near(masked_rms(padded, where), rms(x))


SPLITS = {"one": [N], "halves": [6, 6], "uneven": [1, 4, 7], "singles": [1] * N, "with none": [0, 5, 0, 7]}
whole_rms = {
    name: jax.jit(lambda x, sizes=sizes: rmsjax.tree_rms(jnp.split(x, np.cumsum(sizes)[:-1])))
    for name, sizes in SPLITS.items()
}


@pytest.mark.parametrize("name", SPLITS)
@given(x=vectors())
def test_a_tree_is_measured_alike_however_it_is_split(name, x):
    assert_near(whole_rms[name](x), rms(x))


@given(vectors(), st.floats(2.0**-60, 2.0**60, width=32))
def test_a_clip_shortens_to_the_bound_and_no_further(x, bound):
    bound = np.float32(bound)
    once = clipped(x, bound)
    assert rms(once) <= bound * (1 + ROUNDING)
    assert rms(once) <= rms(x) * (1 + ROUNDING)
    assert_near(rms(once), min(rms(x), bound))
    assert_near(clipped(once, bound), once)
    if rms(x) <= bound:
        np.testing.assert_array_equal(once, x)


@given(vectors(2.0**-20, 2.0**20))
def test_what_was_normalised_has_the_norm_one(x):
    assume(x.any())
    assert_near(rms(normalized(x)), 1.0)
    assert_near(normalized(normalized(x)), normalized(x))


@given(vectors(2.0**-60, 2.0**60), st.floats(2.0**-20, 2.0**20, width=32))
def test_what_was_brought_to_a_target_has_it(x, target):
    assume(x.any())
    assert_near(rms(to_target(x, np.float32(target))), target)


@given(vectors(2.0**-60, 2.0**60, (3, 4)))
def test_the_axes_of_a_scope_are_those_of_the_array(x):
    assert_near(rmsjax.tree_rms({"x": x}, 1)["x"][:, 0], rmsjax.rms(x, 1))


TRANSFORMS = [
    rmsjax.clip_by_rms(0.1),
    rmsjax.clip_by_relative_rms(0.1),
    rmsjax.normalize_by_rms(),
    rmsjax.record_rms(),
    rmsjax.scale_by_stable_adam(),
]
DTYPES = ["float16", "bfloat16", "float32", "complex64", "float8_e5m2"]


@settings(max_examples=15)
@given(st.recursive(st.sampled_from(DTYPES), lambda tree: st.lists(tree, max_size=3) | st.dictionaries(
    st.sampled_from("abc"), tree, max_size=3), max_leaves=4))  # fmt: skip
def test_structure_shapes_and_dtypes_are_kept(dtypes):
    tree = jax.tree.map(lambda dtype: jnp.ones((2, 3), dtype), dtypes)
    for tx in TRANSFORMS:
        updates, state = jax.eval_shape(lambda tree, tx=tx: tx.update(tree, tx.init(tree), tree), tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        before = jax.eval_shape(tx.init, tree)
        assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == jax.tree.map(lambda s: (s.shape, s.dtype), before)
