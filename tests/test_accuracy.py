"""How exact the numbers are: over the whole range of every type, against the oracle.

The inputs of one type are measured by one compiled function, so that the sweep is a matter of data.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsjax
from tests.oracle import true_clip, true_normalize, true_rms, ulps

DTYPES = ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
# In units in the last place, for up to 4096 elements. Mostly it is 2; but XLA:CPU adds up 32 terms one by one, and
# where the terms are equal, or small ones follow a large one, each addition of a stage may round in the same direction.
BOUND = 8
SIZES = [1, 2, 3, 7, 31, 1000]  # measured in rows and columns
FACTORS = [(8, 8), (64, 64), (63, 65)]  # the sizes 64, 4096 and 4095 are measured in every way


def exponents_of(dtype, most):
    """The powers of two in the normal range of a type: all of them, or as many as are wanted, with both ends."""
    info = jnp.finfo(dtype)
    every = np.arange(int(info.minexp), int(info.maxexp))
    return every if every.size <= most else np.unique(np.linspace(every[0], every[-1], most).astype(int))


def sweep(dtype, n, seed=0):
    """Finite rows of n elements: each power of two, mixed magnitudes, the ends of the range, rows of equal elements."""
    rng = np.random.default_rng([seed, n])
    info = jnp.finfo(dtype)
    tiny, largest = float(info.tiny), float(info.max)
    # What float64 has beyond float32 costs time in the oracle.
    exponents = exponents_of(dtype, 2**12 // n + 12 if info.dtype == np.float64 else 2**20 // n)
    few = exponents[:: max(1, exponents.size // 12)]
    top, bottom = 2.0 ** exponents[-1], 2.0 ** exponents[0]

    def draw(sizes):
        return rng.uniform(1, 2, (len(sizes), n)) * rng.choice([-1.0, 1.0], (len(sizes), n)) * np.exp2(sizes)

    def one_among(value, others):
        row = draw([others])
        row[0, rng.integers(n)] = value
        return row

    rows = [
        draw(exponents[:, None].astype(float)),
        draw(rng.choice(exponents, (4, n)).astype(float)),
        *[one_among(top, e) for e in few],
        *[one_among(bottom, e) for e in few],
        np.where(rng.random((2, n)) < 0.5, top, bottom),
        np.sign(draw([0])) * largest,
        np.sign(draw([0])) * tiny,
        np.sqrt(np.linspace(0.8, 1.0, 8))[:, None] * np.ones(n),
        np.zeros((1, n)),
    ]
    if largest > 1e30:
        rows.append(np.where(rng.random((2, n)) < 0.5, 1e30, 1e-30))
    rows = np.clip(np.concatenate(rows), -largest, largest)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return rows.astype(dtype)
    parts = np.where(np.abs(rows) < 4 * tiny, rows, rows / 2)  # modulus and both parts are normal numbers
    return (parts + 1j * parts[::-1]).astype(dtype)


def along_one_axis(rows):
    return {"row": rmsjax.rms(rows, -1), "column": rmsjax.rms(rows.T, 0)}


def in_every_way(rows, factors):
    """The norm of each row, by each way to the sums."""
    blocks = rows.reshape(-1, *factors)
    third = rows.shape[1] // 3
    return along_one_axis(rows) | {
        "vmap": jax.vmap(rmsjax.rms)(rows),
        "trailing": rmsjax.rms(blocks, (1, 2)),
        "leading": rmsjax.rms(jnp.moveaxis(blocks, 0, 2), (0, 1)),
        "astride": rmsjax.rms(jnp.moveaxis(blocks, 0, 1), (0, 2)),
        "tree": jax.vmap(lambda row: rmsjax.tree_rms({"a": row[:third], "b": row[third:]}))(rows),
        "leaves": jnp.stack(rmsjax.tree_rms([blocks[i] for i in _LEAVES], "block")),
    }


_LEAVES = np.arange(0, 20, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms(dtype, x64):
    short = {(n,): sweep(dtype, n) for n in SIZES}
    full = {factors: sweep(dtype, factors[0] * factors[1]) for factors in FACTORS}
    ways = jax.jit(
        lambda short, full: (
            {n: along_one_axis(rows) for n, rows in short.items()}
            | {factors: in_every_way(rows, factors) for factors, rows in full.items()}
        )
    )(short, full)
    for size, rows in (short | full).items():
        want = true_rms(rows, -1)
        for way, got in ways[size].items():
            of = _LEAVES if way == "leaves" else slice(None)
            off = ulps(got, want[of])
            assert off.max() <= BOUND, (size, way, off.max(), got[off.argmax()], want[of][off.argmax()])


@pytest.mark.parametrize("shape_and_axes", [((3, 125, 8), (1, 2)), ((511, 8, 5), (0, 1)), ((2, 3, 4, 5, 6), None)])
def test_equal_elements_along_several_axes(shape_and_axes):
    # XLA:CPU left to itself is up to 80 ulp off here.
    shape, axes = shape_and_axes
    values = np.sqrt(np.linspace(0.5, 2.0, 64, dtype=np.float32))
    got = jax.jit(jax.vmap(lambda value: rmsjax.rms(jnp.full(shape, value), axes).max()))(values)
    assert ulps(got, values).max() <= BOUND


@pytest.mark.parametrize("dtype", ["float8_e5m2", "bfloat16", "float32", "complex64", "float64"])
def test_rms_of_what_a_mask_keeps(dtype, x64):
    rows = {n: sweep(dtype, n) for n in (1, 7, 1000)}
    where = {n: np.random.default_rng(n).random(r.shape) < 0.6 for n, r in rows.items()}
    hidden = {n: np.where(where[n], r, np.array(np.nan, r.dtype)) for n, r in rows.items()}
    got = jax.jit(
        lambda hidden, where: {
            n: (rmsjax.rms(x, -1, where=where[n]), rmsjax.rms(x.T, 0, where=where[n].T)) for n, x in hidden.items()
        }
    )(hidden, where)
    for n, both in got.items():
        for values in both:
            assert ulps(values, true_rms(rows[n], -1, where=where[n])).max() <= BOUND


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_normalize(dtype, x64):
    info = jnp.finfo(dtype)
    rows = {n: sweep(dtype, n) for n in (1, 7, 1000)}
    gain = np.linspace(0.5, 2.0, 1000)
    epsilons = [0.0, 1e-6, 2.0 ** (int(info.minexp) // 2), 2.0 ** int(info.maxexp - 4)]
    got = jax.jit(
        lambda rows: {
            (n, epsilon): (
                rmsjax.rms_normalize(x, epsilon=epsilon),
                rmsjax.rms_normalize(x.T, jnp.asarray(gain[:n], info.dtype)[:, None], axis=0, epsilon=epsilon).T,
            )
            for n, x in rows.items()
            for epsilon in epsilons
        }
    )(rows)
    # Rounded once at the end: in a type narrower than float32 that is all.
    most = BOUND + 1 if info.nmant >= 23 else 0.51
    for (n, epsilon), (plain, scaled) in got.items():
        scale = np.asarray(jnp.asarray(gain[:n], info.dtype)).astype(np.float64)
        for values, factor in ((plain, 1.0), (scaled, scale)):
            want = true_normalize(rows[n], epsilon=epsilon, gain=factor)
            off = ulps(values, want)
            assert off.max() <= most, (n, epsilon, off.max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip(dtype, x64):
    info = jnp.finfo(dtype)
    rows = {n: sweep(dtype, n) for n in (1, 7, 1000)}
    bounds = np.array([0.0, 1e-3, 1.0, 2.0 ** (int(info.maxexp) - 2)], np.float64)

    @jax.jit
    def clipped(rows, max_rms):
        tx = rmsjax.clip_by_rms(max_rms, 1)
        return tx.update(rows, tx.init(rows))[0]

    most = BOUND + 2 if info.nmant >= 23 else 0.51  # two more roundings
    for max_rms in bounds.astype(info.dtype).astype(np.float64 if info.dtype == np.float64 else np.float32):
        for n, values in clipped(rows, max_rms).items():
            off = ulps(values, true_clip(rows[n], float(max_rms), -1))
            assert off.max() <= most, (n, max_rms, off.max())
            assert values.dtype == dtype


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_tree_of_many_leaves(scale):
    rng = np.random.default_rng(0)
    sizes = [1, 2, 5, 64, 100, 4095, 5000, 70000] * 12
    leaves = [(rng.normal(size=n) * scale).astype(np.float32) for n in sizes]
    got = jax.jit(lambda leaves: (rmsjax.tree_rms(leaves), rmsjax.tree_rms(leaves, "block")))(leaves)
    assert ulps(got[0], true_rms(np.concatenate(leaves))) <= 4
    assert ulps(np.stack(got[1]), [true_rms(leaf) for leaf in leaves]).max() <= 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_the_range(dtype, x64):
    info = jnp.finfo(dtype)
    for end in (info.max, info.tiny, -info.max):
        for n in (1, 3, 1000):
            x = jnp.full(n, end, dtype)
            assert ulps(rmsjax.rms(x), abs(float(end))) <= BOUND
            assert ulps(rmsjax.rms_normalize(x, epsilon=0.0), np.sign(float(end))).max() <= 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a platform may have subnormal numbers")
def test_subnormal_numbers_count_as_zero_where_xla_flushes_them(x64):
    for dtype in ("bfloat16", "float32", "float64"):
        info = jnp.finfo(dtype)
        subnormal = jnp.asarray(np.array([info.smallest_subnormal, info.tiny / 4], dtype))
        assert rmsjax.rms(subnormal) == 0
        assert not rmsjax.rms_normalize(subnormal, epsilon=0.0).any()
        result = rmsjax.rms(jnp.asarray(np.array([info.tiny, 0, 0, 0], dtype)))  # tiny/2
        assert result == 0 if accumulates_alike(dtype) else ulps(result, float(info.tiny) / 2) <= 4
        assert jax.grad(rmsjax.rms)(subnormal).tolist() == [0, 0]
    # In float32, where these types are measured, their subnormal numbers are normal.
    for dtype in ("float8_e4m3fn", "float8_e5m2", "float16"):
        info = jnp.finfo(dtype)
        x = np.array([info.smallest_subnormal, info.tiny / 2], dtype)
        assert ulps(rmsjax.rms(x), true_rms(x)) <= 4
        assert ulps(rmsjax.rms_normalize(x, epsilon=0.0), true_normalize(x)).max() <= 0.51


def accumulates_alike(dtype):
    return jnp.finfo(dtype).minexp == jnp.finfo(rmsjax.rms(jnp.zeros(1, dtype)).dtype).minexp


def test_a_non_finite_element_shows():
    x = np.ones((4, 5), np.float32)
    x[1, 2], x[2, 3], x[3, :2] = np.nan, -np.inf, [np.inf, np.nan]
    np.testing.assert_array_equal(rmsjax.rms(x, -1), [1, np.nan, np.inf, np.nan])
    clipped, _ = optax.with_extra_args_support(rmsjax.clip_by_rms(0.5, 1)).update(x, rmsjax.clip_by_rms(0.5, 1).init(x))
    assert np.isfinite(clipped).all(-1).tolist() == [True, False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "n"), [("float32", 2**24), ("bfloat16", 2**24), ("float32", 2**27), ("bfloat16", 2**27)]
)
@pytest.mark.parametrize("shape", [(-1,), (64, 16, -1), (-1, 32)])
def test_many_elements(dtype, n, shape):
    rng = np.random.default_rng(0)
    for x in (rng.standard_normal(n, np.float32), np.full(n, 0.7, np.float32)):
        for scale in (1.0, 1e30, 1e-30):
            values = (x * np.float32(scale)).astype(dtype)
            want = np.sqrt(np.mean([true_rms(part) ** 2 for part in np.split(values, 64)]))
            assert abs(rmsjax.rms(values.reshape(shape)) / want - 1) <= 1e-6
