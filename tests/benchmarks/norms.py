"""What range safety costs, against the same without it, and how long things take to compile and to dispatch."""

import re
import statistics
import subprocess
import sys
from functools import partial
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import lineax.internal
from flax import nnx

import rmsjax
from rmsjax import _reduce
from tests.benchmarks.timing import compile_time, interleaved, memory_for, recycled, row, trace_time


def naive_rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def naive_row_rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1))


def naive_with_norms(x):
    """x by its norms, and their inverses, which a backward pass needs: XLA:CPU makes two loops of it, as of ours."""
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1) + 1e-6)
    return (x * inverse[..., None]).astype(x.dtype), inverse


def naive_normalize(x):
    """The first alone, of which XLA:CPU makes one loop."""
    return naive_with_norms(x)[0]


def against_naive(what, ours, naive, *args, repeats=21, **others):
    calls = {"rmsjax": ours, "naive": naive, **others}
    return row(what, interleaved({name: partial(jax.jit(fn), *args) for name, fn in calls.items()}, repeats=repeats))


def without_guard(fn, x):
    """fn as a program that takes the naive sums for granted, as it does of dtypes whose squares cannot overflow."""
    jax.clear_caches()
    with mock.patch.object(_reduce, "squares_fit", return_value=True):
        program = jax.make_jaxpr(fn)(x)
    jax.clear_caches()
    return lambda x: jax.extend.core.jaxpr_as_fun(program)(x)[0]


def in_parts(x):
    """The norm of 2x by parts that stay in the cache: the RMS of the norms of parts of one size."""
    return rmsjax.rms(jax.lax.map(lambda part: rmsjax.rms(part * 2), x.reshape(32, -1)))


def run():
    for power in (6, 10, 17, 20, 24, 27):
        x = jax.random.normal(jax.random.key(0), (2**power,))
        yield against_naive(f"rms(x), 2^{power} float32", rmsjax.rms, naive_rms, x, lineax=lineax.internal.rms_norm)
    x = jax.random.normal(jax.random.key(0), (2**24,))
    yield against_naive("rms(x * 2), 2^24", lambda x: rmsjax.rms(x * 2), lambda x: naive_rms(x * 2), x)
    yield against_naive("the same in 32 parts", in_parts, lambda x: naive_rms(x * 2), x)
    by_row = {"rmsjax": jax.vmap(rmsjax.rms), "rms(x, axis=-1)": partial(rmsjax.rms, axis=-1)}
    batch = x.reshape(64, -1)
    yield row("vmap(rms), 64 x 2^18", interleaved({k: partial(jax.jit(f), batch) for k, f in by_row.items()}))
    for shape in [(4096, 768), (4096, 4096), (65536, 128)]:
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.random.normal(jax.random.key(0), shape, dtype)
            name = f"{shape} {dtype.__name__}"
            yield against_naive(f"rms(x, axis=-1), {name}", lambda x: rmsjax.rms(x, -1), naive_row_rms, x)
            output = memory_for(x)
            calls = {
                "rmsjax": recycled(rmsjax.rms_normalize, x, kept=output),
                "naive": recycled(naive_normalize, x, kept=output),
                "naive with norms": recycled(naive_with_norms, x, kept=memory_for(*naive_with_norms(x))),
            }
            yield row(f"rms_normalize(x), {name}", interleaved(calls, repeats=21))
            for what, fn, like in [
                ("rms(x, axis=-1)", lambda x: rmsjax.rms(x, -1), naive_row_rms(x)),
                ("rms_normalize(x)", rmsjax.rms_normalize, x),
            ]:
                variants = {"without it": without_guard(fn, x), "rmsjax": fn}
                output = memory_for(like)
                calls = {kind: recycled(variant, x, kept=output) for kind, variant in variants.items()}
                yield row(f"the guard of {what}, {name}", interleaved(calls, repeats=51))
    alone = {"rmsjax": rmsjax.rms, "naive": naive_rms}
    yield row("tracing rms", anew(trace_time, alone, jnp.ones(1000)), "s")
    yield row("compiling rms", anew(compile_time, alone, jnp.ones(1000)), "s")
    layers = {"rmsjax": deep(rmsjax.nnx.RMSNorm), "flax": deep(nnx.RMSNorm)}
    yield row("compiling the gradient of 24 norm layers", anew(compile_time, layers, jnp.ones((4, 64))), "s")
    yield against_naive("calling rms, jitted, of 64 numbers", rmsjax.rms, naive_rms, jnp.ones(64), repeats=201)


def deep(norm):
    """The gradient of 24 layers with their own parameters, as a function of x."""
    layers = [norm(64, rngs=nnx.Rngs(0)) for _ in range(24)]

    def loss(layers, x):
        for layer in layers:
            x = x + layer(x)
        return x.sum()

    graph, state = nnx.split(nnx.List(layers) if hasattr(nnx, "List") else layers)
    return lambda x: jax.grad(lambda state: loss(nnx.merge(graph, state), x))(state)


def anew(stage, functions, x):
    """The median time of a stage of five rounds, with nothing in JAX's caches."""

    def once(fn):
        jax.clear_caches()
        return stage(jax.jit(fn), x)

    rounds = [{name: once(fn) for name, fn in functions.items()} for _ in range(5)]
    return {name: statistics.median(times[name] for times in rounds) for name in functions}


def import_time():
    """What `import rmsjax` takes beyond `import jax` by `python -X importtime`: the median of ten processes."""
    command = [sys.executable, "-X", "importtime", "-c", "import jax; import rmsjax"]
    lines = [subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines() for _ in range(10)]
    (last,) = {re.split(r"\|\s*", each[-1])[-1] for each in lines}
    assert last == "rmsjax", last
    times = [int(each[-1].split("|")[1]) / 1e3 for each in lines]  # cumulative, so with all that rmsjax imports
    yield row("`import rmsjax` after `import jax`", {"rmsjax": statistics.median(times)})
