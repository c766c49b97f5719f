"""Gradients on which to compare `hyperball` with AdamH of Marin's Levanter, and where that took the parameters.

`pip install marin-levanter`, and `python -m tests.helpers.hyperball` runs it and records the fixture.
"""

from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).parents[1] / "fixtures" / "adamh.npz"
STEPS = 200
RECORDED = [0, 1, 2, 10, 50, 100, 150, 199]
LEARNING_RATE, B1, B2, EPS = 0.02, 0.9, 0.95, 1e-8
SHAPES = {"matrix": (8, 12), "stack": (3, 4, 5)}  # of which AdamH takes each layer of the stack by itself


def start():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape, scale=0.3).astype(np.float32) for name, shape in SHAPES.items()}


def gradient(step):
    """One direction, and noise whose size changes from step to step by two orders of magnitude."""
    steady, rng = np.random.default_rng(1), np.random.default_rng(2 + step)
    size = 10 ** rng.uniform(-1, 1)
    return {
        name: (size * (0.3 * steady.normal(size=shape) + rng.normal(size=shape))).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def trajectory(tx):
    """The parameters after each step of an optax optimizer."""
    import jax
    import optax

    update, params = jax.jit(tx.update), start()
    state, history = tx.init(params), []
    for step in range(STEPS):
        updates, state = update(gradient(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return {name: np.stack([params[name] for params in history]) for name in params}


if __name__ == "__main__":
    from levanter.optim.adamh import scale_by_adamh

    theirs = trajectory(scale_by_adamh(B1, B2, EPS, LEARNING_RATE))
    np.savez_compressed(FIXTURE, **{name: values[RECORDED] for name, values in theirs.items()})
