"""RMSNorm, forward and backward, against Flax and Equinox."""

from functools import partial

import equinox
import jax
import jax.numpy as jnp
from flax import nnx

import rmsjax
from tests.benchmarks.timing import compile_time, interleaved, recycled, table, temporary

SHAPES = [(8, 512, 768), (4, 1024, 4096), (65536, 128)]


def layers(width):
    """Functions of (x, scale) by the name of their library."""
    graph, _ = nnx.split(nnx.RMSNorm(width, rngs=nnx.Rngs(0)))
    theirs = equinox.nn.RMSNorm(width, use_bias=False)

    def flax(x, scale):
        layer = nnx.merge(graph, nnx.State({"scale": nnx.Param(scale)}))
        return layer(x).astype(x.dtype)

    def eqx(x, scale):
        layer = equinox.tree_at(lambda layer: layer.weight, theirs, scale)
        apply = layer
        for _ in x.shape[:-1]:
            apply = jax.vmap(apply)
        return apply(x).astype(x.dtype)

    return {"rmsjax": lambda x, scale: rmsjax.rms_normalize(x, scale), "flax": flax, "equinox": eqx}


def forward_and_backward(fn):
    def both(x, scale, ct):
        y, vjp = jax.vjp(fn, x, scale)
        return (y, *vjp(ct))

    return both


def floor(x, ct):
    """Reads and writes as much as the layer must."""
    return x * 2, x + ct


def run():
    rows = []
    for shape in SHAPES:
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.random.normal(jax.random.key(0), shape, dtype)
            ct, scale = x + 1, jnp.ones(shape[-1])
            fns = layers(shape[-1])
            memory = {
                name: temporary(compile_time(forward_and_backward(fn), x, scale, ct)[1]) for name, fn in fns.items()
            }
            forward, cold, warm = {}, {}, {}
            for name, fn in fns.items():
                both = forward_and_backward(fn)
                forward[name] = recycled(fn, x, scale, outputs=x)
                cold[name] = partial(jax.jit(both), x, scale, ct)
                warm[name] = recycled(both, x, scale, ct, outputs=(x, x, scale))
            warm["floor"] = recycled(floor, x, ct, outputs=(x, x))
            cold["floor"] = partial(jax.jit(floor), x, ct)
            times = [interleaved(calls) for calls in (forward, warm, cold)]
            ours, best = zip(*((t["rmsjax"], min(t["flax"], t["equinox"])) for t in times), strict=True)
            rows.append(
                [f"{shape} {dtype.__name__}"]
                + [f"{t['rmsjax']:.1f} / {t['flax']:.1f} / {t['equinox']:.1f}" for t in times]
                + [f"{b / o:.1f}x" for o, b in zip(ours, best, strict=True)]
                + [f"{times[1]['floor']:.1f} / {times[2]['floor']:.1f}"]
                + [" / ".join(f"{memory[name]:.2f}" for name in fns)]
            )
    return table(
        ["RMSNorm, ms: rmsjax / flax / equinox", "forward", "forward+backward, warm", "the same, cold",
         "gain fwd", "gain warm", "gain cold", "floor warm / cold", "temporary MB"],
        rows,
    )  # fmt: skip
