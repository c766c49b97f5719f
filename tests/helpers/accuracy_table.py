"""The accuracy table of notebooks/04_numerics.ipynb: `python -m tests.helpers.accuracy_table` prints it.

A case is one vector of the sweep of `oracle`. A case is lost by a function that gives 0, inf or NaN where the
answer is a normal number of the type of its result; what it gives elsewhere is measured in ulp of that type.
"""

import jax
import jax.numpy as jnp
import lineax.internal
import numpy as np
import optax
from flax import nnx

import rmsjax
from tests.helpers.oracle import DTYPES, sweep, true_clip, true_normalize, true_rms, ulps

SIZES = [7, 4096]
EPSILON = 1e-6


def layer(cls):
    return lambda x: cls(x.size, epsilon=EPSILON, use_scale=False, rngs=nnx.Rngs(0))(x)


def clip(tx):
    return lambda x: tx.update(x, tx.init(x))[0]


def each(norm):
    """A function of a vector as one of the rows of a matrix, whose results are rows too."""
    return lambda rows: jax.vmap(norm)(rows).reshape(len(rows), -1)


def norms(rows):
    return true_rms(rows, -1, keepdims=True)


def normalized(rows):
    return true_normalize(rows, epsilon=EPSILON)


def clipped(rows):
    return true_clip(rows, 1.0, -1)


# title: (the answer, the function of a vector)
COLUMNS = {
    "`rmsjax.rms`": (norms, rmsjax.rms),
    "`optax.tree.norm` / √n": (norms, lambda x: optax.tree.norm(x) / root_of_size(x)),
    "`jnp.linalg.norm` / √n": (norms, lambda x: jnp.linalg.norm(x) / root_of_size(x)),
    "lineax `rms_norm`": (norms, lineax.internal.rms_norm),
    "`rmsjax.rms_normalize`": (normalized, lambda x: rmsjax.rms_normalize(x, epsilon=EPSILON)),
    "flax `nnx.RMSNorm`": (normalized, layer(nnx.RMSNorm)),
    "`rmsjax.clip_by_rms(1.)`": (clipped, clip(rmsjax.clip_by_rms(1.0))),
    "`optax.clip_by_block_rms(1.)`": (clipped, clip(optax.clip_by_block_rms(1.0))),
}


def root_of_size(x):
    return np.sqrt(x.size).astype(jnp.finfo(x.dtype).dtype)


def real_and_imaginary(x):
    return np.concatenate([x.real, x.imag], -1) if np.iscomplexobj(x) else x


def measure(name, dtype):
    """(worst error in ulp, cases lost, cases), or None where the function does not take the type."""
    answer, function = COLUMNS[name]
    worst, lost, cases = 0.0, 0, 0
    for n in SIZES:
        rows, _ = sweep(dtype, n)
        try:
            got = np.asarray(jax.jit(each(function))(rows))
        except (TypeError, ValueError):
            return None
        got, want = real_and_imaginary(got), real_and_imaginary(answer(rows))
        info = jnp.finfo(got.dtype)
        normal = (np.abs(want) >= float(info.tiny)) & (np.abs(want) <= float(info.max))
        gone = normal & ((got == 0) | ~np.isfinite(got.astype(np.float64)))
        worst = max(worst, ulps(got, want)[normal & ~gone].max(initial=0.0))
        lost += int(gone.any(-1).sum())
        cases += len(rows)
    return worst, lost, cases


def cell(measured):
    if measured is None:
        return "not taken"
    worst, lost, _ = measured
    return f"{worst:.1f}" + (f", {lost} lost" if lost else "") if worst < 1e3 else f"{worst:.0e}, {lost} lost"


def table(columns=tuple(COLUMNS), dtypes=tuple(DTYPES)):
    """The lines of the table in markdown."""
    yield "| type, cases | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for dtype in dtypes:
        measured = [measure(name, dtype) for name in columns]
        yield f"| {dtype}, {measured[0][2]} | " + " | ".join(map(cell, measured)) + " |"


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for line in table():
        print(line, flush=True)
