"""RMSNorm, forward and backward, against Flax, Equinox and PyTorch."""

from functools import partial

import jax
import jax.numpy as jnp

from tests.benchmarks import torch_peer
from tests.benchmarks.timing import interleaved, memory_for, recycled, row, temporary
from tests.helpers.workloads import layers

SHAPES = [(8, 512, 768), (4, 1024, 4096), (65536, 128)]


def forward_and_backward(fn):
    def both(x, scale, ct):
        y, vjp = jax.vjp(fn, x, scale)
        return (y, *vjp(ct))

    return both


def copies(x, ct):
    """Reads and writes as much as the layer must, forward and backward."""
    return x * 2, x + ct


def run():
    for shape in SHAPES:
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.random.normal(jax.random.key(0), shape, dtype)
            ct, scale = x + 1, jnp.ones(shape[-1])
            forward, warm, cold, memory = {}, {}, {}, {}
            output, outputs = memory_for(x), memory_for(x, x, scale)
            for name, fn in layers(shape[-1]).items():
                both = forward_and_backward(fn)
                forward[name] = recycled(fn, x, scale, kept=output)
                warm[name] = recycled(both, x, scale, ct, kept=outputs)
                jitted = jax.jit(both)
                cold[name] = partial(jitted, x, scale, ct)
                memory[name] = temporary(jitted.lower(x, scale, ct).compile())
            cold |= torch_peer.forward_and_backward(x, scale, ct)
            warm["copies"] = recycled(copies, x, ct, kept=memory_for(x, x))
            cold["copies"] = partial(jax.jit(copies), x, ct)
            name = f"RMSNorm {shape} {dtype.__name__}"
            yield row(f"{name}, forward", interleaved(forward))
            yield row(f"{name}, forward and backward", interleaved(warm), floor="copies")
            yield row(f"{name}, the same, into new memory", interleaved(cold), floor="copies")
            yield row(f"{name}, temporary memory", memory, "MB")
