"""What is measured on accelerators, compiled or run: RMSNorm of each library, in a transformer, and trees."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import rmsjax


def layers(width, *, epsilon=1e-6):
    """RMSNorm as functions of x, whose dtype stays, and of a scale if there is one, by the name of their library."""

    def ours(x, *scale):
        return rmsjax.rms_normalize(x, *scale, epsilon=epsilon)

    def flax(x, *scale):
        graph, _ = nnx.split(nnx.RMSNorm(width, epsilon=epsilon, use_scale=bool(scale), rngs=nnx.Rngs(0)))
        state = nnx.State({"scale": nnx.Param(scale[0])} if scale else {})
        return nnx.merge(graph, state)(x).astype(x.dtype)

    return {"rmsjax": ours, "flax": flax} | ({"equinox": _equinox(width, epsilon)} if find_spec("equinox") else {})


def _equinox(width, epsilon):
    import equinox

    def apply(x, *scale):
        layer = equinox.nn.RMSNorm(width, eps=epsilon, use_weight=bool(scale), use_bias=False)
        fn = equinox.tree_at(lambda layer: layer.weight, layer, scale[0]) if scale else layer
        for _ in x.shape[:-1]:
            fn = jax.vmap(fn)
        return fn(x).astype(x.dtype)

    return apply


def scale_alone(x, scale):
    """What a transformer without norms has in place of one, so that no other part of it changes."""
    return x * scale.astype(x.dtype)


def naive_rms(x, axis=None):
    """The formula, read off the page: right for numbers near 1 alone."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis))


def transformer(norm):
    """Forward pass, and loss and gradient, of two blocks in bfloat16 with two norms each, that share their weights.

    Attention is left out: a gate along the features stands for it, which has the same products and neighbours of norms.
    """

    def block(params, x):
        query, key, value = jnp.split(norm(x, params["norm1"]) @ params["qkv"], 3, axis=-1)
        x = x + (jax.nn.silu(query) * key + value) @ params["out"]
        up, gate = jnp.split(norm(x, params["norm2"]) @ params["up"], 2, axis=-1)
        return x + (jax.nn.silu(up) * gate) @ params["down"]

    def forward(params, x):
        return block(params, block(params, x))

    def loss(params, x, target):
        return jnp.sum(forward(params, x).astype(jnp.float32) * target.astype(jnp.float32))

    return forward, jax.value_and_grad(loss, (0, 1))


def transformer_shapes(batch=4, length=2048, width=2048, hidden=5632):
    """Its parameters and its input, as shapes."""
    weights = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 2 * hidden), "down": (hidden, width)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in weights.items()}
    params |= {name: jax.ShapeDtypeStruct((width,), jnp.float32) for name in ("norm1", "norm2")}
    return params, jax.ShapeDtypeStruct((batch, length, width), jnp.bfloat16)


def gpt2_small(depth=12, width=768, vocabulary=50257, length=1024):
    """The shapes of its 148 leaves."""
    affine = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (length, width), *(affine + attention + affine + mlp) * depth, *affine]


TREES = {
    "GPT-2 small": gpt2_small(),
    "200 of 256x256": [(256, 256)] * 200,
    "500 of 64": [(64,)] * 500,
    "20 of 1024x1024": [(1024, 1024)] * 20,
}


def tree_of(shapes):
    """Float32 leaves of these shapes, under names that sort as they come."""
    return {f"{i:05d}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)}


def norms():
    return {"rmsjax": rmsjax.tree_rms, "optax": optax.tree.norm if hasattr(optax, "tree") else optax.global_norm}


def clips():
    """Clips by what they bound, and by library."""
    return {
        "global clip": {"rmsjax": rmsjax.clip_by_rms(1e-3), "optax": optax.clip_by_global_norm(1.0)},
        "block clip": {"rmsjax": rmsjax.clip_by_rms(1e-3, "block"), "optax": optax.clip_by_block_rms(1e-3)},
    }


def optimizers():
    """Optimizers with a clip, by what they do, and by library; those of Optax are the nearest that it has."""
    clip, adamw, record = rmsjax.clip_by_rms(1e-3), optax.adamw(1e-3), rmsjax.record_rms()
    ratio = rmsjax.record_rms(relative=True)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return {
        "AdamW with global clip": {"rmsjax": optax.chain(clip, adamw), "optax": theirs},
        "record, clip, AdamW": {"rmsjax": optax.chain(record, clip, adamw), "optax, no record": theirs},
        "clip, AdamW, record": {"rmsjax": optax.chain(clip, adamw, record), "optax, no record": theirs},
        "record, AdamW": {"rmsjax": optax.chain(record, adamw), "optax, no record": adamw},
        "AdamW, record of the ratio": {"rmsjax": optax.chain(adamw, ratio), "optax, no record": adamw},
        "stable_adamw": {"rmsjax": rmsjax.stable_adamw(1e-3), "optax AdamW, no clip": adamw},
    }


def step(tx):
    """A function of parameters, gradients and state that gives the next parameters and state."""

    def run(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return run
