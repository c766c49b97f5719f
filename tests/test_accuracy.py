"""How exact the numbers are: over the whole range of every type, against the oracle.

The inputs of one type are measured by one compiled function, so that the sweep is a matter of data.
"""

import itertools
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsjax
from tests.helpers import accuracy_table
from tests.helpers.marks import QUICK_ON_CPU, quick_of
from tests.helpers.oracle import DTYPES, LIKELY, WORST, sweep, true_clip, true_normalize, true_rms, ulps

SIZES = [1, 2, 7, 31, 1000, 4096]
EVERY_WAY = 2015  # of all numbers up to 4096 that for which the additions one after the other are the most
pytestmark = pytest.mark.usefixtures("form")
NOTEBOOK = Path(__file__).parents[1] / "notebooks/04_numerics.ipynb"
VERSIONS = 2  # ulp, by which the worst error may differ from one release of XLA to another
FACTORS = (31, 65)
# The quick ones have every way to read and every way to add up.
ALL_DTYPES = pytest.mark.parametrize(
    "dtype", quick_of(DTYPES, "float16", "bfloat16", "float32", "float64", "complex64")
)


def assert_within(bounds, got, want, *case):
    off = ulps(got, want)
    beyond = np.argwhere(off > bounds)
    assert not beyond.size, (*case, "at", beyond[0], "off by", off.max(), "ulp")


def as_row_and_column(rows):
    return {"row": rmsjax.rms(rows, -1), "column": rmsjax.rms(rows.T, 0)}


def in_every_way(rows):
    """The norm of each row, by each way to the sums."""
    blocks = rows.reshape(-1, *FACTORS)
    third = rows.shape[1] // 3
    return as_row_and_column(rows) | {
        "vmap": jax.vmap(rmsjax.rms)(rows),
        "vectors": jax.lax.map(rmsjax.rms, rows),
        "trailing": rmsjax.rms(blocks, (1, 2)),
        "leading": rmsjax.rms(jnp.moveaxis(blocks, 0, 2), (0, 1)),
        "astride": rmsjax.rms(jnp.moveaxis(blocks, 0, 1), (0, 2)),
        "tree": jax.vmap(lambda row: rmsjax.tree_rms({"a": row[:third], "b": row[third:]}))(rows),
    }


@ALL_DTYPES
def test_rms_of_all_sizes(dtype, x64):
    rows, bounds = zip(*(sweep(dtype, n) for n in SIZES), strict=True)

    @jax.jit  # as trees, so that one branch is compiled and not one for each size
    def measured(rows):
        return rmsjax.tree_rms(rows, 1), [x.T for x in rmsjax.tree_rms([x.T for x in rows[3:5]], 0)]

    by_row, by_column = measured(rows)
    wants = [true_rms(x, -1, keepdims=True) for x in rows]
    for got, want, bound in zip(by_row, wants, bounds, strict=True):
        assert_within(bound[:, None], got, want, dtype)
    for got, want, bound in zip(by_column, wants[3:5], bounds[3:5], strict=True):
        assert_within(bound[:, None], got, want, dtype, "columns")


@QUICK_ON_CPU
@ALL_DTYPES
def test_rms_in_every_way(dtype, x64):
    rows, bounds = sweep(dtype, EVERY_WAY)
    want = true_rms(rows, -1)
    # Other types differ from float32 and float64 in how they are read, not in how they are added up.
    for way, got in jax.jit(in_every_way if dtype in ("float32", "float64") else as_row_and_column)(rows).items():
        assert_within(bounds, got, want, way)


def test_each_leaf_by_itself():
    rows, bounds = sweep("float32", EVERY_WAY)
    leaves = list(rows.reshape(-1, *FACTORS)[::9])
    got = jax.jit(lambda leaves: rmsjax.tree_rms(leaves, "block"))(leaves)
    assert_within(bounds[::9], np.stack(got), [true_rms(leaf) for leaf in leaves])


def test_additions_that_all_round_in_the_same_direction():
    values = np.sqrt(np.linspace(0.5, 2.0, 64, dtype=np.float32))[:, None] * np.ones(EVERY_WAY, np.float32)
    rows = [values]
    for large in (0, EVERY_WAY // 2):
        for factor in (2**-5.5, 2**-8.5, 2**-11.5):
            rows.append(values * np.float32(factor))
            rows[-1][:, large] = 1
    rows = np.concatenate(rows)
    short = rows[:, :31]
    ways = jax.jit(lambda rows, short: in_every_way(rows) | {"short": jax.lax.map(rmsjax.rms, short)})(rows, short)
    for way, got in ways.items():
        assert_within(WORST, got, true_rms(short if way == "short" else rows, -1), way)


@pytest.mark.parametrize("shape_and_axes", [((3, 125, 8), (1, 2)), ((511, 8, 5), (0, 1)), ((2, 3, 4, 5, 6), None)])
def test_equal_elements_along_several_axes(shape_and_axes):
    # XLA:CPU of jax 0.7 left to itself is up to 72 ulp off here; that of 0.10 is not.
    shape, axes = shape_and_axes
    values = np.sqrt(np.linspace(0.5, 2.0, 64, dtype=np.float32))
    x = values.reshape(-1, *[1] * len(shape)) * np.ones(shape, np.float32)  # as data: XLA sums a constant by a product
    got = jax.jit(jax.vmap(lambda x: rmsjax.rms(x, axes).max()))(x)
    assert_within(WORST, got, values)


@QUICK_ON_CPU
@ALL_DTYPES
def test_rms_of_what_a_mask_keeps(dtype, x64):
    rows, bounds = sweep(dtype, 1000)
    where = np.random.default_rng(1).random(rows.shape) < 0.6
    where[::7] = False
    hidden = np.where(where, rows, np.array(np.nan, rows.dtype))
    want = true_rms(rows, -1, where=where)

    @jax.jit
    def measured(x, where):
        return rmsjax.rms(x, -1, where=where), rmsjax.rms(x.T, 0, where=where.T)

    for got in measured(hidden, where):
        assert_within(bounds, got, want)


@ALL_DTYPES
def test_rms_normalize(dtype, x64, form):
    info = jnp.finfo(dtype)
    sweeps = {n: sweep(dtype, n) for n in (1, 7, 1000)}
    epsilons = [0.0, 1e-6, 2.0 ** (int(info.minexp) // 2), 2.0 ** int(info.minexp), 2.0 ** int(info.maxexp - 4)]
    cases = [(1, 0.0), (7, 0.0), *((1000, epsilon) for epsilon in epsilons)]
    gain = np.asarray(jnp.asarray(np.linspace(0.5, 2.0, 7), info.dtype))

    @jax.jit
    def normalized(rows):
        plain = [rmsjax.rms_normalize(rows[n], epsilon=epsilon) for n, epsilon in cases]
        return plain, rmsjax.rms_normalize(rows[7].T, gain[:, None], axis=0).T

    plain, scaled = normalized({n: rows for n, (rows, _) in sweeps.items()})
    for (n, epsilon), got in zip(cases, plain, strict=True):
        rows, bounds = sweeps[n]
        want = true_normalize(rows, epsilon=epsilon)
        if form == "cuda":  # by the largest element first, which may leave 0 of what is near the smallest normal number
            want = np.where(np.abs(want) < np.sqrt(n) * float(info.tiny), got, want)
        assert_within(once_rounded(dtype, bounds, 1), got, want, n, epsilon)
    rows, bounds = sweeps[7]
    want = true_normalize(rows, epsilon=1e-6, gain=gain.astype(np.float64))
    assert_within(once_rounded(dtype, bounds, 1), scaled, want)


def once_rounded(dtype, bounds, more):
    """The bounds of what is multiplied by a norm: some more roundings; one is all in types narrower than float32."""
    return bounds[:, None] + more if jnp.finfo(dtype).nmant >= 23 else 0.51


@QUICK_ON_CPU
@ALL_DTYPES
def test_clip(dtype, x64):
    info = jnp.finfo(dtype)
    sweeps = {n: sweep(dtype, n) for n in (1, 7, 1000)}
    rows = {n: rows for n, (rows, _) in sweeps.items()}

    @jax.jit
    def clipped(rows, max_rms):
        tx = rmsjax.clip_by_rms(max_rms, 1)
        return tx.update(rows, tx.init(rows))[0]

    wide = np.float64 if info.dtype == np.float64 else np.float32
    for max_rms in np.array([0.0, 1e-3, 1.0, 2.0 ** (int(info.maxexp) - 2)]).astype(info.dtype).astype(wide):
        for n, got in clipped(rows, max_rms).items():
            assert got.dtype == dtype
            want = true_clip(rows[n], float(max_rms), -1)
            assert_within(once_rounded(dtype, sweeps[n][1], 2), got, want, n, max_rms)


def test_tree_of_many_leaves():
    rng = np.random.default_rng(0)
    ones = [rng.normal(size=n) for n in [1, 2, 5, 64, 100, 4095, 5000, 70000] * 12]
    measured = jax.jit(lambda leaves: (rmsjax.tree_rms(leaves), rmsjax.tree_rms(leaves, "block")))
    for scale in (1.0, 1e30, 1e-30):
        leaves = [(x * scale).astype(np.float32) for x in ones]
        pooled, by_leaf = measured(leaves)
        assert_within(LIKELY, pooled, true_rms(np.concatenate(leaves)))
        assert_within(LIKELY, np.stack(by_leaf), [true_rms(leaf) for leaf in leaves])


@QUICK_ON_CPU
@ALL_DTYPES
def test_the_ends_of_the_range(dtype, x64):
    info = jnp.finfo(dtype)
    measured = jax.jit(lambda x: (rmsjax.rms(x), rmsjax.rms_normalize(x, epsilon=0.0)))
    for n in (1, 1000):
        for end in (info.max, info.tiny, -info.max):
            norm, normalized = measured(np.full(n, end, dtype))
            assert_within(WORST, norm, abs(float(end)))
            assert_within(WORST, normalized, np.sign(float(end)))


@pytest.mark.slow
@ALL_DTYPES
def test_the_table_of_the_notebook(dtype, x64, form):
    """Our columns are as the notebook says, and no case is lost."""
    if form != "cpu":
        pytest.skip("the table was made on a CPU")
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    text = "".join(itertools.chain.from_iterable(cell["source"] + ["\n"] for cell in cells))
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    titles = next(line for line in lines if line[0] == "type, cases")
    (row,) = [line for line in lines if line[0].startswith(f"{dtype}, ")]
    ours = [title for title in accuracy_table.COLUMNS if "rmsjax" in title]
    assert [title for title in titles if "rmsjax" in title] == ours
    for title in ours:
        worst, lost, cases = accuracy_table.measure(title, dtype)
        assert lost == 0
        assert row[0] == f"{dtype}, {cases}"
        assert abs(float(row[titles.index(title)]) - worst) <= VERSIONS, (title, worst)


@QUICK_ON_CPU
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a platform may have subnormal numbers")
def test_subnormal_numbers_count_as_zero_where_xla_flushes_them(x64):
    @jax.jit
    def measured(x):
        return rmsjax.rms(x), rmsjax.rms_normalize(x, epsilon=0.0), jax.grad(rmsjax.rms)(x)

    for dtype in ("bfloat16", "float32", "float64"):
        info = jnp.finfo(dtype)
        norm, normalized, gradient = measured(np.array([info.smallest_subnormal, info.tiny / 4], dtype))
        assert norm == 0
        assert not normalized.any()
        assert not gradient.any()
        assert rmsjax.rms(np.array([info.tiny, 0, 0, 0], dtype)) == 0  # tiny/2 is a subnormal result
    # In float32, where these types are measured, their subnormal numbers are normal.
    for dtype in ("float8_e4m3fn", "float8_e5m2", "float16"):
        info = jnp.finfo(dtype)
        x = np.array([info.smallest_subnormal, info.tiny / 2], dtype)
        norm, normalized, _ = measured(x)
        assert_within(LIKELY, norm, true_rms(x))
        assert_within(0.51, normalized, true_normalize(x))


@QUICK_ON_CPU
def test_a_non_finite_element_shows():
    x = np.ones((4, 5), np.float32)
    x[1, 2], x[2, 3], x[3, :2] = np.nan, -np.inf, [np.inf, np.nan]
    np.testing.assert_array_equal(rmsjax.rms(x, -1), [1, np.nan, np.inf, np.nan])
    clipped, _ = optax.with_extra_args_support(rmsjax.clip_by_rms(0.5, 1)).update(x, rmsjax.clip_by_rms(0.5, 1).init(x))
    assert np.isfinite(clipped).all(-1).tolist() == [True, False, False, False]


def many_elements(dtype):
    rng = np.random.default_rng(0)
    for x in (rng.standard_normal(2**24, np.float32), np.full(2**24, 0.7, np.float32)):
        for scale in (1.0, 1e30, 1e-30):
            yield (x * np.float32(scale)).astype(dtype)


@cache
def norms_of_many_elements(dtype):
    """They take longer than what is tested, and are the same for all shapes and forms."""
    return [np.sqrt(np.mean([true_rms(part) ** 2 for part in np.split(x, 64)])) for x in many_elements(dtype)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(-1,), (64, 16, -1), (-1, 32)])
def test_many_elements(dtype, shape):
    for values, want in zip(many_elements(dtype), norms_of_many_elements(dtype), strict=True):
        assert abs(rmsjax.rms(values.reshape(shape)) / want - 1) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(-1,), (-1, 32)])
def test_very_many_elements(shape):
    """All of them alike, so that what is rounded off is of one sign."""
    x = np.full(2**27, 0.7, np.float32)
    assert abs(rmsjax.rms(x.reshape(shape)) / true_rms(x[:1]) - 1) <= 1e-6
