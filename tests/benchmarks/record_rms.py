"""What `record_rms` adds to a training step of an MLP with 10 million parameters."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmsjax
from tests.benchmarks.timing import interleaved, row

WIDTHS, BATCH, STEPS = (784, 2048, 2048, 2048, 10), 256, 4


def _loss(params, images, labels):
    for i, kernel in enumerate(params):
        images = images @ kernel
        images = jax.nn.relu(images) if i < len(params) - 1 else images
    return optax.softmax_cross_entropy_with_integer_labels(images, labels).mean()


def _training(tx, *, read=None):
    """A call that takes some steps further, with the parameters and the state donated as in real training.

    read: whether all norms that are recorded are read at once, "at once", or when the next step is on its way, "later".
    """
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.normal(size=(BATCH, WIDTHS[0])), jnp.float32), jnp.arange(BATCH) % 10
    shapes = itertools.pairwise(WIDTHS)
    params = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for s in shapes]

    @partial(jax.jit, donate_argnums=0)
    def step(carry):
        params, state = carry
        grads = jax.grad(_loss)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        recorded = rmsjax.rms_states(state) if read else {}
        return (optax.apply_updates(params, updates), state), [rmsjax.rms_by_path(s.rms) for s in recorded.values()]

    kept = [(params, tx.init(params))]

    def steps():
        for _ in range(STEPS):
            kept[0], numbers = step(kept[0])
            yield numbers

    def call():
        for now, after in itertools.pairwise(itertools.chain(steps(), [None])):
            jax.device_get(now if read == "later" else after)
        return kept[0]

    return call


def step_times(repeats=15):
    """The median time of a step in milliseconds, without and with a record of each kind."""
    adam, record = optax.adam(1e-3), rmsjax.record_rms()
    times = interleaved(
        {
            "adam": _training(adam),
            "record_rms(), adam": _training(optax.chain(record, adam)),
            "record_rms('global'), adam": _training(optax.chain(rmsjax.record_rms("global"), adam)),
            "adam, record_rms(ema_decay=0.99, relative=True)": _training(
                optax.chain(adam, rmsjax.record_rms(ema_decay=0.99, relative=True))
            ),
            "record_rms(), adam, norms read at once": _training(optax.chain(record, adam), read="at once"),
            "record_rms(), adam, norms read one step later": _training(optax.chain(record, adam), read="later"),
        },
        repeats=repeats,
    )
    return {name: value / STEPS for name, value in times.items()}


def run():
    times = step_times()
    for name in list(times)[1:]:
        what = f"step of an MLP of 10M parameters, batch {BATCH}, {name}"
        yield row(what, {"rmsjax": times[name], "adam alone": times["adam"]})
