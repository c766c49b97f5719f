"""Norm and clip of trees against optax and PyTorch: many small leaves, and those of GPT-2."""

import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmsjax
from tests.benchmarks import torch_peer
from tests.benchmarks.timing import compile_time, interleaved, row
from tests.helpers.workloads import gpt2_small


def leaves_of(shapes):
    return {f"{i:05d}": jnp.full(shape, 1e-3, jnp.float32) for i, shape in enumerate(shapes)}


def mixed(count):
    """Shapes as in a network with many parts: norms, biases, small and medium kernels, a few large ones."""
    choices = [(64,), (128,), (256,), (3, 3, 16, 16), (64, 64), (32, 96), (16,), (256, 64), (1,), (512,)]
    picks = np.random.default_rng(0).integers(len(choices), size=count)
    return [choices[i] for i in picks]


def of_all_sizes(count):
    """Vectors, as many of each order of magnitude; large ones hardly ever of the same size."""
    return [(int(2**power),) for power in np.random.default_rng(0).uniform(0, 16, size=count)]


def updates_of(tx):
    """A function of updates, and of a state if it is not to be a new one, that gives the updates of `tx` alone."""
    return lambda tree, state=None: tx.update(tree, tx.init(tree) if state is None else state)[0]


def many_leaves():
    norms = {"rmsjax": rmsjax.tree_rms, "optax": optax.tree.norm}
    small = leaves_of([(64,)] * 2000)
    for count in (500, 2000):
        leaves = dict(list(small.items())[:count])
        yield from compiled_and_run(f"norm of {count:,} leaves of 64", norms, leaves, eager=torch_peer.norm(leaves))
    yield from compiled_and_run("norm of 1,000 leaves of ten shapes", norms, leaves_of(mixed(1000)))
    yield from compiled_and_run("norm of 1,000 leaves of all sizes to 2^16", norms, leaves_of(of_all_sizes(1000)))
    only_ours = {"rmsjax": rmsjax.tree_rms}  # optax takes more than a quarter of an hour to compile
    yield from compiled_and_run("norm of 10,000 leaves of ten shapes", only_ours, leaves_of(mixed(10_000)))
    for what, leaves in (("2,000 leaves of 64", small), ("1,000 leaves of ten shapes", leaves_of(mixed(1000)))):
        for scope, peer in (("global", optax.clip_by_global_norm(1.0)), ("block", optax.clip_by_block_rms(1.0))):
            clips = {"rmsjax": rmsjax.clip_by_rms(1.0, scope), "optax": peer}
            states = {name: tx.init(leaves) for name, tx in clips.items()}
            updates = {name: tx.update for name, tx in clips.items()}
            yield from compiled_and_run(f"clip of {what}, {scope}", updates, leaves, states=states)
        # The state of the last one has a norm and a count for each leaf; optax has none.
        stateless = {name: updates_of(tx) for name, tx in clips.items()}
        yield from compiled_and_run(f"clip of {what}, block, without its state", stateless, leaves, states=states)


def compiled_and_run(what, fns, tree, *, states=None, eager=None):
    """Rows for each function of rmsjax against those of peers: seconds to compile, and milliseconds to run.

    Ours are compiled first, so that optax gains if any of what JAX has cached serves both.
    states: a second argument of each function.
    """
    jax.clear_caches()
    jitted = {name: jax.jit(fn) for name, fn in fns.items()}
    args = {name: (tree,) if states is None else (tree, states[name]) for name in fns}
    compiling = {name: compile_time(f, *args[name]) for name, f in jitted.items()}
    yield from against_peers(f"{what}, to compile", compiling, "s")
    calls = {name: partial(f, *args[name]) for name, f in jitted.items()} | (eager or {})
    yield from against_peers(what, interleaved(calls, repeats=51))


def to_compile(what, tree):
    """Rows of the seconds to compile a norm and clips, with their states."""
    clips = {
        "global clip": (rmsjax.clip_by_rms(1.0), optax.clip_by_global_norm(1.0)),
        "block clip": (rmsjax.clip_by_rms(1.0, "block"), optax.clip_by_block_rms(1.0)),
    }
    programs = {"norm": ((rmsjax.tree_rms, tree), (optax.tree.norm, tree))}
    programs |= {name: tuple((tx.update, tree, tx.init(tree)) for tx in pair) for name, pair in clips.items()}
    for name, pair in programs.items():
        times = {library: [] for library in ("rmsjax", "optax")}
        for _ in range(3):
            for found, (fn, *args) in zip(times.values(), pair, strict=True):
                jax.clear_caches()
                found.append(compile_time(jax.jit(fn), *args))
        medians = {library: statistics.median(found) for library, found in times.items()}
        yield row(f"{name} of {what}, to compile", medians, "s")


def against_peers(what, values, unit="ms"):
    theirs = {name: value for name, value in values.items() if "rmsjax" not in name}
    for name in [name for name in values if name not in theirs]:
        scope = name.removeprefix("rmsjax").replace(" ", ", ")
        yield row(f"{what}{scope}", {"rmsjax": values[name], **theirs}, unit, floor="scaling")


def large_leaves():
    """The clip is measured where it changes nothing, and where it scales: then the bound falls from call to call."""
    tree = leaves_of(gpt2_small())
    yield from to_compile("GPT-2 small", tree)
    yield from to_compile("200 of 256x256", leaves_of([(256, 256)] * 200))
    flat = jnp.full(sum(leaf.size for leaf in tree.values()), 1e-3, jnp.float32)
    norms = {
        "rmsjax": partial(jax.jit(rmsjax.tree_rms), tree),
        "optax": partial(jax.jit(optax.tree.norm), tree),
        "reading as much": partial(jax.jit(lambda x: jnp.sum(jnp.square(x))), flat),
        **torch_peer.norm(tree),
    }
    yield row("norm of GPT-2 small, 124M float32", interleaved(norms), floor="reading as much")
    del flat, norms
    size = np.sqrt(124.4e6)
    fns = {
        "rmsjax global": lambda tree, limit: updates_of(rmsjax.clip_by_rms(limit, "global"))(tree),
        "rmsjax block": lambda tree, limit: updates_of(rmsjax.clip_by_rms(limit, "block"))(tree),
        "optax global": lambda tree, limit: updates_of(optax.clip_by_global_norm(limit * size))(tree),
        "optax block": lambda tree, limit: updates_of(optax.clip_by_block_rms(limit))(tree),
        "scaling": lambda tree, limit: jax.tree.map(lambda x: x * (1 + limit), tree),
    }
    for kind, limit, falling in [("too small to clip", 1.0, 1.0), ("clipped", 9e-4, 0.97)]:
        for donate in (True, False):
            calls = {name: clipping(fn, tree, limit, falling, donate=donate) for name, fn in fns.items()}
            if donate:
                calls |= torch_peer.clip(tree, limit * size, falling)
            times = interleaved(calls, repeats=7)
            del calls
            yield from against_peers(f"clip of GPT-2 small, {kind}, {'donated' if donate else 'new memory'}", times)


def clipping(fn, tree, limit, falling, *, donate):
    """Calls with a limit that falls; with donation they hand their updates over, and get them back."""
    jitted = jax.jit(fn, donate_argnums=0 if donate else ())
    kept = [jax.tree.map(lambda x: x + 0, tree) if donate else tree, limit]

    def call():
        updates = jitted(kept[0], kept[1])
        kept[1] *= falling
        if donate:
            kept[0] = updates
        return updates

    return call
