"""What the right answers are, how far off an answer is, and the inputs that are tried.

Float64 holds the square of a float32 exactly, and squares of its whole range, so for types of up to 32 bits the truth
is one line of NumPy. The squares of float64 itself are taken as exact sums of three numbers, added up without rounding.
"""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np


def true_rms(x, axis=None, *, where=None, epsilon=0.0, keepdims=False):
    """sqrt(mean(|x|^2) + epsilon), right to the last bits of float64; 0 elements have the mean 0."""
    x = np.asarray(x)
    axes = tuple(range(x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(a % x.ndim for a in axes)
    mask = np.broadcast_to(True if where is None else where, x.shape)
    if x.dtype in (np.float64, np.complex128):
        root = _exactly(x, axes, mask, epsilon)
    else:
        squares = np.where(mask, _square_in_float64(x), 0.0)
        count = np.maximum(mask.sum(axes, keepdims=True), 1)
        root = np.sqrt(squares.sum(axes, keepdims=True) / count + epsilon)
    return root if keepdims else root.reshape([n for a, n in enumerate(x.shape) if a not in axes])


def true_normalize(x, axis=-1, *, where=None, epsilon=0.0, gain=1.0):
    """x over its RMS, times the gain; 0 where the RMS is 0 or x is masked out."""
    x = np.asarray(x)
    root = true_rms(x, axis, where=where, epsilon=epsilon, keepdims=True)
    kept = x if where is None else np.where(where, x, np.zeros((), x.dtype))
    return in_double(kept) / np.where(root == 0, 1, root) * gain


def true_clip(x, max_rms, axis=None):
    """x times min(1, max_rms / RMS)."""
    x = np.asarray(x)
    root = true_rms(x, axis, keepdims=True)
    clipped = in_double(x) / np.where(root == 0, 1, root) * np.minimum(root, max_rms)
    return np.where(root <= max_rms, in_double(x), clipped)


def in_double(x):
    """x in float64 or complex128, in which every smaller type is exact."""
    return np.asarray(x).astype(
        np.complex128 if jnp.issubdtype(np.asarray(x).dtype, jnp.complexfloating) else np.float64
    )


def _square_in_float64(x):
    x = in_double(x)
    return x.real**2 + x.imag**2


def _exactly(x, axes, mask, epsilon):
    rows = np.moveaxis(np.where(mask, x, 0), axes, range(-len(axes), 0))
    counts = np.moveaxis(mask, axes, range(-len(axes), 0))
    kept = rows.shape[: x.ndim - len(axes)]
    roots = [
        float(_square_root(mean_square(row[count]) + Fraction(epsilon)))
        for row, count in zip(rows.reshape(math.prod(kept), -1), counts.reshape(math.prod(kept), -1), strict=True)
    ]
    return np.reshape(roots, [1 if a in axes else n for a, n in enumerate(x.shape)])


def mean_square(values):
    """The mean of |x|^2 as a fraction, right to the last bit of float64 or more."""
    values = values.astype(np.complex128)
    parts = np.concatenate([values.real, values.imag])
    exponent = int(np.frexp(np.abs(parts).max(initial=0.0))[1])
    x = np.ldexp(parts, -exponent)  # at most 1, so that no square overflows, and none underflows that matters
    high = x * (2.0**27 + 1) - (x * (2.0**27 + 1) - x)  # Veltkamp: two halves of 26 bits, whose products are exact
    low = x - high
    total = math.fsum([*(high * high), *(2 * high * low), *(low * low)])
    return Fraction(total) * Fraction(4) ** exponent / max(1, values.size)


def _square_root(x, digits=80):
    """sqrt of a fraction, cut off after so many bits."""
    shift = max(0, digits + (x.denominator.bit_length() - x.numerator.bit_length()) // 2 + 1)
    return Fraction(math.isqrt((x.numerator << 2 * shift) // x.denominator), 1 << shift)


# ------------------------------------------------------------------------------------------------------ how far off


def ulps(got, want, dtype=None):
    """|got - want| in units in the last place of `dtype`, that of got by default; infinite for a NaN or inf too many.

    What the type has no normal number for may be 0, for that is what XLA flushes it to on a CPU.
    """
    got = np.asarray(got)
    info = jnp.finfo(got.dtype if dtype is None else dtype)
    if np.iscomplexobj(got):
        return np.maximum(ulps(got.real, np.real(want), dtype), ulps(got.imag, np.imag(want), dtype))
    got, want = got.astype(np.float64), np.asarray(want, np.float64)
    exponent = np.maximum(np.frexp(want)[1] - 1, int(info.minexp))
    with np.errstate(invalid="ignore"):
        off = np.abs(got - want) / np.exp2(exponent - int(info.nmant), dtype=np.float64)
    flushed = (np.abs(want) < float(info.tiny)) & (np.abs(got) <= float(info.tiny))
    return np.where(flushed, 0.0, np.where(np.isfinite(got), off, np.inf))


# -------------------------------------------------------------------------------------------------------- what is tried


DTYPES = ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
# In units in the last place of the result, for up to 4096 elements: of random mantissas, and of any.
# XLA:CPU adds up a small array in two stages of at most 32 and 64 terms, one by one if it pleases. Where all terms are
# equal, or one is so much larger than the others that each addition rounds in the same direction, by half a unit at
# most, the sum is off by 31 + 63 halves. The root halves that, and adds its own rounding.
LIKELY, WORST = 4, 24


def exponents_of(dtype, most):
    """The powers of two in the normal range of a type: all of them, or as many as are wanted, with both ends."""
    info = jnp.finfo(dtype)
    every = np.arange(int(info.minexp), int(info.maxexp))
    return every if every.size <= most else np.unique(np.linspace(every[0], every[-1], most).astype(int))


def sweep(dtype, n, seed=0):
    """(rows, bounds): finite rows of n elements, and how far off, in ulp, their norms may be.

    Each power of two, mixed magnitudes, the ends of the range, rows of equal elements.
    """
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
    bounds = np.where(np.arange(len(rows)) < exponents.size + 4, LIKELY, WORST)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return rows.astype(dtype), bounds
    parts = np.where(np.abs(rows) < 4 * tiny, rows, rows / 2)  # modulus and both parts are normal numbers
    return (parts + 1j * parts[:, ::-1]).astype(dtype), bounds
