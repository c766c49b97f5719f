"""What range safety costs, against the same without it, and how long things take to compile and to dispatch."""

import statistics
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import rmsjax
from tests.benchmarks.timing import compile_time, interleaved, recycled, table


def naive_rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def naive_row_rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1))


def naive_normalize(x):
    return (x * jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-6)).astype(x.dtype)


def ratio(ours, naive, *args, recycle=None, repeats=21):
    """Our time over the naive one."""
    if recycle is None:
        calls = {"ours": partial(jax.jit(ours), *args), "naive": partial(jax.jit(naive), *args)}
    else:
        calls = {k: recycled(f, *args, outputs=recycle) for k, f in (("ours", ours), ("naive", naive))}
    times = interleaved(calls, repeats=repeats)
    return [f"{times['ours']:.3f}", f"{times['naive']:.3f}", f"{times['ours'] / times['naive']:.2f}"]


def run():
    rows = []
    for power in (6, 10, 14, 17, 20, 22, 24, 27):
        x = jax.random.normal(jax.random.key(0), (2**power,))
        rows.append([f"rms(x), 2^{power} float32", *ratio(rmsjax.rms, naive_rms, x)])
    x = jax.random.normal(jax.random.key(0), (2**24,))
    rows.append(["rms(x * 2), 2^24", *ratio(lambda x: rmsjax.rms(x * 2), lambda x: naive_rms(x * 2), x)])
    batch = x.reshape(64, -1)
    rows.append(
        ["vmap(rms), 64 x 2^18, to rms(axis=-1)", *ratio(jax.vmap(rmsjax.rms), lambda x: rmsjax.rms(x, -1), batch)]
    )
    for shape in [(4096, 768), (4096, 4096), (65536, 128)]:
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.random.normal(jax.random.key(0), shape, dtype)
            name = f"{shape} {dtype.__name__}"
            rows.append([f"rms(axis=-1), {name}", *ratio(lambda x: rmsjax.rms(x, -1), naive_row_rms, x)])
            rows.append([f"rms_normalize, {name}", *ratio(rmsjax.rms_normalize, naive_normalize, x, recycle=x)])
    rows.append(["compile rms, s", *compiled(rmsjax.rms, naive_rms, jnp.ones(1000))])
    x = jnp.ones((4, 64))
    rows.append(
        ["compile gradient of 24 norm layers to flax's, s", *compiled(deep(rmsjax.nnx.RMSNorm), deep(nnx.RMSNorm), x)]
    )
    rows.append(["eager dispatch of rms, ms", *ratio(rmsjax.rms, naive_rms, jnp.ones(64), repeats=201)])
    return table(["range safety: rmsjax, naive", "rmsjax", "naive", "ratio"], rows)


def deep(norm):
    """The gradient of 24 layers with their own parameters, as a function of x."""
    layers = [norm(64, rngs=nnx.Rngs(0)) for _ in range(24)]

    def loss(layers, x):
        for layer in layers:
            x = x + layer(x)
        return x.sum()

    graph, state = nnx.split(nnx.List(layers) if hasattr(nnx, "List") else layers)
    return lambda x: jax.grad(lambda state: loss(nnx.merge(graph, state), x))(state)


def compiled(ours, naive, x):
    pairs = [(compile_time(ours, x)[0], compile_time(naive, x)[0]) for _ in range(5)]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return [*(f"{m:.3f}" for m in medians), f"{medians[0] / medians[1]:.2f}"]


def import_time():
    """Milliseconds that `import rmsjax` takes after `import jax`: the median of ten processes."""
    import subprocess
    import sys

    code = "import jax, time; t = time.perf_counter(); import rmsjax; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(10)
    ]
    return f"`import rmsjax` after `import jax`: {statistics.median(times) * 1e3:.1f} ms\n"
