"""What the probe adds to the forward pass of a transformer, unrolled and as a scan over stacked layers."""

import jax
from flax import nnx

import rmsjax
from tests.benchmarks.timing import compile_time, interleaved, row, temporary

LAYERS, WIDTH, HEADS = 12, 512, 8


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention_norm = rmsjax.nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.mlp_norm = rmsjax.nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class Unrolled(nnx.Module):
    def __init__(self, rngs):
        self.blocks = LAYERS
        for k in range(LAYERS):
            setattr(self, f"block{k}", Block(rngs))

    def __call__(self, x):
        for k in range(self.blocks):
            x = getattr(self, f"block{k}")(x)
        return x


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


def programs(kind, batch, length):
    """The forward pass without and with the probe, compiled: calls, seconds to compile, MB of temporary memory."""
    graphdef, state = nnx.split(nnx.jit(kind)(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (batch, length, WIDTH))

    def plain(state, x):
        return nnx.merge(graphdef, state)(x)

    def probed(state, x):
        model = nnx.merge(graphdef, state)
        return rmsjax.activation_rms(model, x)

    compiled = {name: compile_time(fn, state, x) for name, fn in (("plain", plain), ("probed", probed))}
    calls = {name: lambda program=program: program(state, x) for name, (_, program) in compiled.items()}
    return calls, {name: (seconds, temporary(program)) for name, (seconds, program) in compiled.items()}


def forward_times(kind=Unrolled, *, batch=8, length=128, repeats=21):
    """The median time of a forward pass in milliseconds, plain and probed, taking turns."""
    calls, _ = programs(kind, batch, length)
    return interleaved(calls, repeats=repeats)


def run():
    for kind in (Unrolled, Scanned):
        for batch, length in ((8, 128), (1, 1024)):
            calls, costs = programs(kind, batch, length)
            name = f"forward of 12 layers of width 512, {kind.__name__.lower()}, batch {batch} x {length}"
            for k, (what, unit) in enumerate([("compiling", "s"), ("temporary memory of", "MB")]):
                values = {"rmsjax": costs["probed"][k], "without the probe": costs["plain"][k]}
                yield row(f"{what} a probed {name}", values, unit)
            times = interleaved(calls, repeats=11)
            yield row(f"a probed {name}", {"rmsjax": times["probed"], "without the probe": times["plain"]})
