"""Two models, each in standard parametrisation and in muP, and two batches of real data to train them on.

muP is the form of Yang et al. (arXiv 2203.03466) in their table 8, with Adam: hidden kernels have variance 1/fan_in and
a learning rate over fan_in, the readout a multiplier 1/fan_in, all else does not depend on the width, and attention
scores are divided by d instead of its root. Factors are relative to the width BASE. Readout and queries start at 0, as
their appendix D.2 advises: outputs and scores are then those of the infinite width from the start, where random ones
would only approach them, like width^(-1/2).
"""

import codecs
import contextlib
import importlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmsjax

BASE = 64
HEADS = 2
BYTES = 128  # ASCII


def digits(examples=64):
    """Images of handwritten digits, standardised, and their labels."""
    from sklearn.datasets import load_digits  # only here, so that the models do without it

    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    return images[:examples].astype(np.float32), labels[:examples].astype(np.int32)


def zen_of_python(examples=4, length=8):
    """Stretches of the bytes of a text that ships with Python, and the bytes that follow each of them."""
    with contextlib.redirect_stdout(io.StringIO()):  # importing it prints it
        text = codecs.decode(importlib.import_module("this").s, "rot13").encode()
    stretches = np.frombuffer(text[: examples * (length + 1)], np.uint8).reshape(examples, length + 1)
    return stretches[:, :-1].astype(np.int32), stretches[:, 1:].astype(np.int32)


class ResidualMLP(nnx.Module):
    def __init__(self, width, rngs, *, mup, inputs=64, outputs=10, blocks=2):
        self.embed = nnx.Linear(inputs, width, rngs=rngs)
        self.blocks = blocks
        for i in range(blocks):
            setattr(self, f"block{i}", MLPBlock(width, rngs))
        self.readout = Readout(width, outputs, rngs, mup=mup)

    def __call__(self, x):
        x = self.embed(x)
        for i in range(self.blocks):
            x = x + getattr(self, f"block{i}")(x)
        return self.readout(x)


class MLPBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, width, rngs=rngs)
        self.down = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


class Readout(nnx.Module):
    def __init__(self, width, outputs, rngs, *, mup):
        init = nnx.initializers.zeros if mup else nnx.initializers.lecun_normal()
        self.linear = nnx.Linear(width, outputs, kernel_init=init, rngs=rngs)
        self.multiplier = BASE / width if mup else 1.0

    def __call__(self, x):
        return self.linear(self.multiplier * x)


class Transformer(nnx.Module):
    def __init__(self, width, rngs, *, mup, length=8, blocks=2):
        normal = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(BYTES, width, embedding_init=normal, rngs=rngs)
        self.position = nnx.Embed(length, width, embedding_init=normal, rngs=rngs)
        self.blocks = blocks
        for i in range(blocks):
            setattr(self, f"attention{i}", Attention(width, rngs, mup=mup))
            setattr(self, f"mlp{i}", NormedMLPBlock(width, rngs))
        self.norm = rmsjax.nnx.RMSNorm(width, rngs=rngs)
        self.readout = Readout(width, BYTES, rngs, mup=mup)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[-1]))[None]
        for i in range(self.blocks):
            x = x + getattr(self, f"attention{i}")(x)
            x = x + getattr(self, f"mlp{i}")(x)
        return self.readout(self.norm(x))


class NormedMLPBlock(MLPBlock):
    def __init__(self, width, rngs):
        super().__init__(width, rngs)
        self.norm = rmsjax.nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, x):
        return super().__call__(self.norm(x))


class Attention(nnx.Module):
    def __init__(self, width, rngs, *, mup):
        self.norm = rmsjax.nnx.RMSNorm(width, rngs=rngs)
        for name in ("query", "key", "value", "out"):
            init = nnx.initializers.zeros if mup and name == "query" else nnx.initializers.lecun_normal()
            setattr(self, name, nnx.Linear(width, width, use_bias=False, kernel_init=init, rngs=rngs))
        size, base = width // HEADS, BASE // HEADS
        self.scores = Scores(base**0.5 / size if mup else size**-0.5)

    def __call__(self, x):
        y = self.norm(x)
        query, key, value = (self._heads(layer(y)) for layer in (self.query, self.key, self.value))
        earlier = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None, None]
        weights = jax.nn.softmax(self.scores(query, key), where=earlier)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], HEADS, -1)


class Scores(nnx.Module):
    """The attention scores before mask and softmax; a module, so that they are measured."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, query, key):
        return self.scale * jnp.einsum("bqhd,bkhd->bhqk", query, key)


def adam(width, *, mup, learning_rate=2e-3):
    """Adam; in muP the learning rate of a hidden kernel is over its fan_in."""

    def scaled(path, update):
        name = jax.tree_util.keystr(path)
        hidden = "kernel" in name and "embed" not in name and "readout" not in name
        return update * (BASE / update.shape[0]) if mup and hidden else update

    by_layer = optax.stateless(lambda updates, params: jax.tree.map_with_path(scaled, updates))
    return optax.chain(optax.scale_by_adam(), by_layer, optax.scale(-learning_rate))


cross_entropy = optax.softmax_cross_entropy_with_integer_labels
