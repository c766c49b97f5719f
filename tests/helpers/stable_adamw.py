"""A small problem on real data on which to compare with torch-optimi's StableAdamW, and what that did there.

`python -m tests.helpers.stable_adamw` runs it (with the `bench` extra) and records the fixture.
"""

from functools import cache
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

FIXTURE = Path(__file__).parents[1] / "fixtures" / "stable_adamw.npz"
STEPS, SPIKE = 200, 100
RECORDED = [0, 1, 2, 10, 50, 99, 100, 101, 150, 199]
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.1


@cache
def _digits():
    images, labels = load_digits(return_X_y=True)
    return images / 16, np.eye(10)[labels]


def start():
    kernel = np.random.default_rng(0).normal(size=(64, 10), scale=1 / 8)
    return {"bias": np.zeros(10, np.float32), "kernel": kernel.astype(np.float32)}


def gradient(params, step):
    """Of softmax regression on the batch of a step, in float64, so that both sides have the same; one batch spikes."""
    images, labels = _digits()
    batch = slice(step % 28 * 64, step % 28 * 64 + 64)
    logits = images[batch] @ np.float64(params["kernel"]) + np.float64(params["bias"])
    odds = np.exp(logits - logits.max(1, keepdims=True))
    error = (odds / odds.sum(1, keepdims=True) - labels[batch]) / 64 * (1e4 if step == SPIKE else 1)
    return {"bias": np.float32(error.sum(0)), "kernel": np.float32(images[batch].T @ error)}


def torch_trajectory():
    """The parameters after each step."""
    import optimi
    import torch

    params = {name: torch.tensor(value) for name, value in start().items()}
    optimizer = optimi.StableAdamW(
        list(params.values()), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=False, triton=False
    )
    history = []
    for step in range(STEPS):
        for name, value in gradient({name: p.numpy() for name, p in params.items()}, step).items():
            params[name].grad = torch.tensor(value)
        optimizer.step()
        history.append({name: p.numpy().copy() for name, p in params.items()})
    return {name: np.stack([params[name] for params in history]) for name in params}


if __name__ == "__main__":
    np.savez_compressed(FIXTURE, **{name: values[RECORDED] for name, values in torch_trajectory().items()})
