"""Norm and clip of trees against optax: many small leaves, and those of GPT-2."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmsjax
from tests.benchmarks.timing import compile_time, interleaved, table, temporary


def leaves_of(shapes):
    return {f"{i:05d}": jnp.full(shape, 1e-3) for i, shape in enumerate(shapes)}


def mixed(count):
    """Shapes as in a network with many parts: norms, biases, small and medium kernels, a few large ones."""
    choices = [(64,), (128,), (256,), (3, 3, 16, 16), (64, 64), (32, 96), (16,), (256, 64), (1,), (512,)]
    picks = np.random.default_rng(0).integers(len(choices), size=count)
    return [choices[i] for i in picks]


def gpt2_small():
    block = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


def ours_clip(max_rms, scope):
    tx = rmsjax.clip_by_rms(max_rms, scope)
    return lambda tree: tx.update(tree, tx.init(tree))[0]


def optax_clip(tx):
    return lambda tree: tx.update(tree, tx.init(tree))[0]


def many_leaves():
    rows = []
    for name, shapes, with_optax in [
        ("2,000 x (64,)", [(64,)] * 2000, True),
        ("1,000 mixed", mixed(1000), True),
        ("10,000 mixed", mixed(10_000), False),
    ]:
        tree = leaves_of(shapes)
        ours, compiled = compile_time(rmsjax.tree_rms, tree)
        calls = {"ours": partial(compiled, tree)}
        theirs = float("nan")
        if with_optax:
            theirs, other = compile_time(optax.tree.norm, tree)
            calls["optax"] = partial(other, tree)
        times = interleaved(calls)
        rows.append(
            [f"norm of {name}", f"{ours:.2f}", *seconds(theirs, ours), f"{times['ours']:.2f}", *milliseconds(times)]
        )
    tree = leaves_of([(64,)] * 2000)
    theirs, other = compile_time(optax_clip(optax.clip_by_global_norm(1.0)), tree)
    for scope in ("global", "block"):
        ours, compiled = compile_time(ours_clip(1.0, scope), tree)
        times = interleaved({"ours": partial(compiled, tree), "optax": partial(other, tree)})
        rows.append(
            [
                f"clip of 2,000 x (64,), {scope}, to optax's global",
                f"{ours:.2f}",
                *seconds(theirs, ours),
                f"{times['ours']:.2f}",
                *milliseconds(times),
            ]
        )
    return table(["many leaves", "compile s", "optax", "gain", "run ms", "optax", "gain"], rows)


def seconds(theirs, ours):
    return [f"{theirs:.2f}", f"{theirs / ours:.1f}x"] if theirs == theirs else ["over 900", "-"]


def milliseconds(times):
    return [f"{times['optax']:.2f}", f"{times['optax'] / times['ours']:.1f}x"] if "optax" in times else ["-", "-"]


def large_leaves():
    tree = leaves_of(gpt2_small())
    flat = jnp.full(sum(leaf.size for leaf in tree.values()), 1e-3)
    times = interleaved(
        {
            "tree_rms": partial(jax.jit(rmsjax.tree_rms), tree),
            "optax.tree.norm": partial(jax.jit(optax.tree.norm), tree),
            "read of as much": partial(jax.jit(lambda x: jnp.sum(jnp.square(x))), flat),
        }
    )
    rows = [[f"{name}", f"{ms:.1f}", "", ""] for name, ms in times.items()]
    del flat
    copy = jax.jit(lambda t: jax.tree.map(lambda x: x * 0.5, t))
    fns = {
        "rmsjax global": lambda limit: ours_clip(limit, "global"),
        "rmsjax block": lambda limit: ours_clip(limit, "block"),
        "optax global": lambda limit: optax_clip(optax.clip_by_global_norm(limit * np.sqrt(124.4e6))),
        "optax block": lambda limit: optax_clip(optax.clip_by_block_rms(limit)),
    }
    results = {}
    for kind, limit in [("not clipped", 1.0), ("clipped", 1e-4)]:
        undonated = interleaved(
            {name: partial(jax.jit(make(limit)), tree) for name, make in fns.items()}
            | {"scaling pass": partial(copy, tree)},
            repeats=5,
        )
        donated = {}
        for name, make in fns.items():
            donated[name] = donating(make(limit), tree)
        donated["scaling pass"] = donating(lambda t: jax.tree.map(lambda x: x * 1.0001, t), tree)
        results[kind] = undonated, interleaved(donated, repeats=5)
    memory = {name: temporary(compile_time(make(1.0), tree)[1]) for name, make in fns.items()}
    for name in [*fns, "scaling pass"]:
        row = [f"clip, {name}"]
        for kind in ("not clipped", "clipped"):
            undonated, donated = results[kind]
            row.append(f"{kind}: {donated[name]:.1f} donated, {undonated[name]:.1f} not")
        rows.append([*row, f"{memory[name]:.2f}" if name in memory else ""])
    return table(["GPT-2 small, 124M float32", "ms", "ms", "temporary MB"], rows)


def donating(fn, tree):
    """Calls that hand their updates over, and get them back."""
    jitted = jax.jit(fn, donate_argnums=0)
    kept = [jax.tree.map(lambda x: x + 0, tree)]

    def call():
        kept[0] = jitted(kept[0])
        return kept[0]

    return call
