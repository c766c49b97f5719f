"""What the probe adds to the forward pass of a transformer, unrolled and as a scan over stacked layers."""

import jax
from flax import nnx

import rmsjax
from tests.benchmarks.timing import interleaved, row

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


def forward_times(kind, *, batch, length, repeats):
    """The median time of a forward pass in milliseconds, plain and probed, taking turns."""
    graphdef, state = nnx.split(nnx.jit(kind)(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (batch, length, WIDTH))
    plain = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    probed = jax.jit(lambda state, x: rmsjax.activation_rms(nnx.merge(graphdef, state), x))
    return interleaved({"plain": lambda: plain(state, x), "probed": lambda: probed(state, x)}, repeats=repeats)


def run():
    for kind in (Unrolled, Scanned):
        for batch, length in ((8, 128), (1, 1024)):
            times = forward_times(kind, batch=batch, length=length, repeats=11)
            what = f"probed forward of 12 layers of width 512, {kind.__name__.lower()}, batch {batch} x {length}"
            yield row(what, {"rmsjax": times["probed"], "without the probe": times["plain"]})
