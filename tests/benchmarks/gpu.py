"""Times on a GPU: RMSNorm, rms, a transformer, and trees, against peers and a copy of as many bytes.

Device time is wanted, not that of the host. So each measurement enqueues as many programs as take some 60 ms before it
waits, of inputs so large that a program runs for longer than it takes to enqueue. Trees, whose many leaves are slow to
hand over, are worked on in a loop within one program. Competitors take turns. The copy, in the same turns, reads and
writes in all as many bytes as the work must move at least: what it takes is the limit.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import rmsjax
from tests.benchmarks import torch_peer
from tests.benchmarks.timing import interleaved, versions
from tests.helpers.workloads import (
    TREES,
    clips,
    layers,
    naive_rms,
    norms,
    optimizers,
    scale_alone,
    step,
    transformer,
    transformer_shapes,
    tree_of,
)

ENQUEUED = 3  # loops before one waits
ELEMENTS = 2**27  # of x: far more than a cache of 50 MB holds


class Work(NamedTuple):
    """One repetition: step(carry, *args) gives the next carry, which is what the work gives, in the same memory."""

    step: Callable[..., Any]
    carry: Any
    args: tuple[Any, ...]


class Case(NamedTuple):
    """A line of the table: the bytes that must be moved, work by library, and calls of libraries other than JAX's."""

    what: str
    least: int
    works: dict[str, Work]
    calls: dict[str, Callable[[], Any]] = {}  # noqa: RUF012
    beyond: str = ""  # the name of the work whose time is subtracted from all others
    loop: bool = False  # in one program


def once(step):
    """A program that takes a step, whose results go where those of the step before lay."""
    return jax.jit(lambda carry, args: step(carry, *args), donate_argnums=0, keep_unused=True)


def looped(step, times):
    """A program that takes a step as often.

    The barrier ties what a step reads to the count of the loop. Else XLA would see that each step does the same, and
    take the work out of the loop. It costs trees nothing, but breaks a row's norm from what follows it.
    """

    def program(carry, args):
        def body(i, carry):
            held, _ = lax.optimization_barrier((args, i))
            return step(carry, *held)

        return lax.fori_loop(0, times, body, carry)

    return jax.jit(program, donate_argnums=0)


def copied(size):
    """Work that reads size / 2 bytes and writes as many."""
    x = jnp.ones(max(size // 8, 1), jnp.float32)
    return Work(lambda _, x: -x, x + 0, (x,))


def repeated(program, work, times):
    """A call that runs a compiled program as often; each run hands its memory to the next."""
    kept = [jax.tree.map(lambda x: x + 0, work.carry)]

    def call():
        for _ in range(times):
            kept[0] = program(kept[0], work.args)
        return kept[0]

    return call


def repeated_elsewhere(call, times):
    """The same of a call of PyTorch."""

    def calls():
        for _ in range(times):
            call()
        torch_peer.wait()

    return calls


def measure(case, *, tiny):
    """The median milliseconds of one repetition by name; programs are compiled side by side."""
    in_loop = 2 if tiny else min(max(math.ceil(20e-3 / (case.least / 2.5e12)), 4), 100)
    enqueued = 1 if tiny else ENQUEUED
    times = in_loop * enqueued
    works = case.works | ({} if case.beyond else {"copy": copied(case.least)})
    jitted = {name: looped(work.step, in_loop) if case.loop else once(work.step) for name, work in works.items()}
    lowered = [jitted[name].lower(work.carry, work.args) for name, work in works.items()]
    with ThreadPoolExecutor() as pool:
        programs = dict(zip(works, pool.map(lambda each: each.compile(), lowered), strict=True))
    runs = enqueued if case.loop else times
    calls = {name: repeated(programs[name], work, runs) for name, work in works.items()}
    calls |= {name: repeated_elsewhere(call, times) for name, call in case.calls.items()}
    measured = interleaved(calls, repeats=1 if tiny else 9)
    return {name: value / times for name, value in measured.items()}


COLUMNS = ("what", "rmsjax, ms", "speed of the copy", "others, ms", "gain")


def line(case, measured):
    """A row of the table: ours, how near to the copy it comes, the others, and the gain over the best of them."""
    ours, shown = measured["rmsjax"], dict(measured)
    peers = {name: value for name, value in measured.items() if name not in ("rmsjax", "copy", case.beyond)}
    limit = f"{measured['copy'] / ours:.0%}" if "copy" in measured else ""
    gain = f"{min(peers.values()) / ours:.2f}x"
    if case.beyond:
        shown = {name: value - measured[case.beyond] for name, value in measured.items()} | {
            case.beyond: measured[case.beyond]
        }
        gain = ""
    others = ", ".join(f"{name} {value:.3g}" for name, value in shown.items() if name != "rmsjax")
    return case.what, f"{shown['rmsjax']:.3g}", limit, others, gain


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def ones(shapes):
    return jax.tree.map(lambda x: jnp.full(x.shape, 1e-2, x.dtype), shapes)


def layer_cases(*, tiny):
    """RMSNorm by itself, forward, and backward from what the forward pass keeps."""
    for width, dtype in ((4096, jnp.bfloat16), (4096, jnp.float32), (128, jnp.bfloat16), (128, jnp.float32)):
        shape = ((2**12 if tiny else ELEMENTS) // width, width)
        x, ct = (jax.random.normal(jax.random.key(seed), shape, dtype) for seed in (0, 1))
        scale = jnp.ones(width)
        forward, backward = {}, {}
        for name, fn in layers(width).items():
            y, pull = jax.jit(partial(jax.vjp, fn))(x, scale)
            forward[name] = Work(lambda _, x, scale, fn=fn: fn(x, scale), y, (x, scale))
            backward[name] = Work(lambda _, pull, ct: pull(ct), (x, scale), (pull, ct))
        torch_forward, torch_backward = torch_peer.passes(x, scale, ct)
        what = f"RMSNorm {shape} {x.dtype}"
        yield Case(f"{what}, forward", 2 * x.nbytes, forward, torch_forward)
        yield Case(f"{what}, backward", 3 * x.nbytes, backward, torch_backward)


def block_cases(*, tiny):
    """The transformer, forward, and its loss and gradient, beyond the same without a norm."""
    shapes = transformer_shapes(1, 8, 16, 32) if tiny else transformer_shapes()
    params, x = ones(shapes)
    models = {name: transformer(norm) for name, norm in (layers(x.shape[-1]) | {"without a norm": scale_alone}).items()}
    models.pop("equinox", None)  # Flax's is the better one
    forward = {name: Work(lambda _, p, x, fn=fn: fn(p, x), x, (params, x)) for name, (fn, _) in models.items()}
    gradient = {
        name: Work(lambda _, p, x, ct, fn=fn: fn(p, x, ct), (jnp.zeros(()), (params, x)), (params, x, x))
        for name, (_, fn) in models.items()
    }
    what = f"four norms in a transformer, {x.shape} {x.dtype}"
    least = 50 * x.nbytes  # of matrix products, most of the time is not that of memory: for the number of repetitions
    yield Case(f"{what}, forward", least, forward, beyond="without a norm")
    yield Case(f"{what}, value and gradient", 4 * least, gradient, beyond="without a norm")


def rms_cases(*, tiny):
    """One norm, and a norm of each row."""
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.random.normal(jax.random.key(0), ((2**12 if tiny else ELEMENTS) // 1024, 1024), dtype)
        for axis in (None, -1):
            libraries = {"rmsjax": partial(rmsjax.rms, axis=axis), "naive formula": partial(naive_rms, axis=axis)}
            works = {name: Work(lambda _, x, fn=fn: fn(x), fn(x), (x,)) for name, fn in libraries.items()}
            yield Case(f"rms(x{'' if axis is None else ', axis=-1'}), {x.shape} {x.dtype}", x.nbytes, works)


def tree_cases(*, tiny):
    """Norms, clips and steps of trees; of the optimizers all on the quickest tree, one on GPT-2 small."""
    only_first = {"GPT-2 small": ["AdamW with global clip"], "20 of 1024x1024": list(optimizers())}
    for name in ("GPT-2 small", "200 of 256x256", "20 of 1024x1024"):
        shapes = [tuple(min(n, 8) for n in shape) for shape in TREES[name][-5:]] if tiny else TREES[name]
        grads = ones(tree_of(shapes))
        least = size(grads)
        if name != "20 of 1024x1024":
            works = {lib: Work(lambda _, tree, fn=fn: fn(tree), jnp.zeros(()), (grads,)) for lib, fn in norms().items()}
            yield Case(f"norm of {name}", least, works, torch_peer.norm(grads), loop=True)
            for what, libraries in clips().items():
                works = {lib: clip_work(tx, grads) for lib, tx in libraries.items()}
                calls = torch_peer.clip(grads, 1.0, 1.0) if what == "global clip" else {}
                yield Case(f"{what} of {name}", 3 * least, works, calls, loop=True)
        for what in only_first.get(name, []):
            works = {lib: step_work(tx, grads) for lib, tx in optimizers()[what].items()}
            calls = torch_peer.clipped_adamw(grads, 1.0) if what == "AdamW with global clip" else {}
            yield Case(f"{what}, {name}", (7 + (what != "stable_adamw")) * least, works, calls, loop=True)


def clip_work(tx, grads):
    """The state of a clip goes on from step to step; its updates are written each time."""
    return Work(lambda carry, grads: tx.update(grads, carry[1]), (grads, tx.init(grads)), (grads,))


def step_work(tx, grads):
    return Work(lambda carry, grads: step(tx)(carry[0], grads, carry[1]), (grads, tx.init(grads)), (grads,))


GROUPS = {"layer": layer_cases, "block": block_cases, "trees": tree_cases, "rms": rms_cases}


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks gpu", description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="all without a name")
    parser.add_argument("--tiny", action="store_true", help="small sizes and one round, to try the script on a CPU")
    parser.add_argument("--seconds", type=float, default=225, help="no row is begun after so many (%(default)g)")
    chosen = parser.parse_args(arguments)
    start = time.monotonic()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".6")  # PyTorch wants some too; read as JAX starts
    print(f"{jax.devices()[0].device_kind}, {versions()}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|", flush=True)
    for group in chosen.groups or GROUPS:
        for case in GROUPS[group](tiny=chosen.tiny):
            if time.monotonic() - start > chosen.seconds:
                print(f"| {case.what} | no time left | | | |", flush=True)
                continue
            print("| " + " | ".join(line(case, measure(case, tiny=chosen.tiny))) + " |", flush=True)
