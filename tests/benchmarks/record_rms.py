"""What `record_rms` adds to a training step of an MLP with 10 million parameters."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmsjax
from tests.benchmarks.timing import interleaved, row

WIDTHS, BATCH = (784, 2048, 2048, 2048, 10), 256


def _loss(params, images, labels):
    for i, kernel in enumerate(params):
        images = images @ kernel
        images = jax.nn.relu(images) if i < len(params) - 1 else images
    return optax.softmax_cross_entropy_with_integer_labels(images, labels).mean()


def _training(tx):
    """A call that takes one step further, with the parameters and the state donated as in real training."""
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.normal(size=(BATCH, WIDTHS[0])), jnp.float32), jnp.arange(BATCH) % 10
    shapes = itertools.pairwise(WIDTHS)
    params = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for s in shapes]

    @partial(jax.jit, donate_argnums=0)
    def step(carry):
        params, state = carry
        grads = jax.grad(_loss)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    kept = [(params, tx.init(params))]

    def call():
        kept[0] = step(kept[0])
        return kept[0]

    return call


def step_times(repeats=61):
    """The median time of a step in milliseconds, without and with a record of each kind."""
    adam = optax.adam(1e-3)
    return interleaved(
        {
            "adam": _training(adam),
            "record_rms(), adam": _training(optax.chain(rmsjax.record_rms(), adam)),
            "record_rms('global'), adam": _training(optax.chain(rmsjax.record_rms("global"), adam)),
        },
        repeats=repeats,
    )


def run():
    times = step_times()
    for name in list(times)[1:]:
        what = f"step of an MLP of 10M parameters, batch {BATCH}, {name}"
        yield row(what, {"rmsjax": times[name], "adam alone": times["adam"]})
