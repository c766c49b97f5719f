"""What `python -m rmsjax` does: the classifier of digits, its coordinate check and its training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import rmsjax
from rmsjax._text import text_table, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jax import Array
    from jaxtyping import Float, Int
    from matplotlib.figure import Figure

BATCH = 128
INPUTS = 64
RATE = 3e-3
MAX_RMS = 2e-3
CHECKED_STEPS, CHECKED_SEEDS = 4, 3


class Digits(NamedTuple):
    """8 x 8 pictures of handwritten digits as vectors, and what they show; a fifth is held out."""

    x: Float[np.ndarray, "train 64"]
    y: Int[np.ndarray, "train"]
    x_test: Float[np.ndarray, "test 64"]
    y_test: Int[np.ndarray, "test"]


def load_digits(seed: int) -> Digits:
    """The UCI handwritten digits that ship with scikit-learn, shuffled, with mean 0 and RMS 1."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order].astype(np.int32)
    held_out = len(x) // 5
    x = x - x[held_out:].mean()
    x = x / float(rmsjax.rms(x[held_out:]))
    return Digits(x[held_out:], y[held_out:], x[:held_out], y[:held_out])


class Block(nnx.Module):
    """A residual block with the norm in front."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm = rmsjax.nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class Classifier(nnx.Module):
    """A residual network of two blocks, with a head that starts at 0, as muP advises."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(INPUTS, width, rngs=rngs)
        self.first = Block(width, rngs)
        self.second = Block(width, rngs)
        self.norm = rmsjax.nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(self.norm(self.second(self.first(self.embed(x)))))


def make_optimizer(rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Adam with clipped gradients, and for each kernel a rate over its fan-in.

    Adam moves every weight by its rate, and an output adds up as many of them as the fan-in: so outputs of all widths
    move equally (Yang et al., arXiv 2203.03466, table 3).
    """

    def over_fan_in(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u: u * (INPUTS / u.shape[0]) if u.ndim == 2 else u, updates)

    return optax.chain(rmsjax.clip_by_rms(MAX_RMS), optax.adam(rate), optax.stateless(over_fan_in))


def check(data: Digits, widths: Sequence[int], seed: int) -> rmsjax.WidthRecord:
    """The coordinate check of the classifier, on one batch."""
    return rmsjax.coord_check(
        Classifier,
        (data.x[:BATCH], data.y[:BATCH]),
        widths=widths,
        make_optimizer=lambda width: make_optimizer(RATE),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        steps=CHECKED_STEPS,
        seeds=range(seed, seed + CHECKED_SEEDS),
    )


def draw(record: rmsjax.WidthRecord) -> Figure:
    """The picture: the changes after the first and after the last step of the check."""
    return rmsjax.plot.coord_check(record, steps=[1, CHECKED_STEPS], title="Residual classifier of digits")


class Run(NamedTuple):
    """What the training of one width showed."""

    gradient_rms: float
    share_clipped: float
    accuracy: float


def train(width: int, data: Digits, steps: int, seed: int, advance: Callable[[int], Any]) -> Run:
    """Train one width; `advance` is told of every step that is done."""
    tx = make_optimizer(optax.cosine_decay_schedule(RATE, steps))
    graph, params = nnx.split(Classifier(width, nnx.Rngs(seed)))

    def loss_fn(params: Any, x: Array, y: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y).mean()

    @jax.jit
    def some_steps(carry: Any, batches: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params)
            return (optax.apply_updates(params, updates), state), optax.tree.get(state, "rms")

        return jax.lax.scan(step, carry, batches)

    rng = np.random.default_rng(seed)
    carry, gradient_rms = (params, tx.init(params)), []
    for done in range(0, steps, 20):
        picks = rng.integers(len(data.x), size=(min(20, steps - done), BATCH))
        carry, norms = some_steps(carry, (data.x[picks], data.y[picks]))
        gradient_rms.append(np.asarray(norms))
        advance(len(picks))
    params, state = carry
    accuracy = np.mean(np.argmax(jax.jit(nnx.merge(graph, params))(data.x_test), -1) == data.y_test)
    share = int(optax.tree.get(state, "num_clipped")) / steps
    return Run(float(np.mean(np.concatenate(gradient_rms))), share, float(accuracy))


def run(widths: Sequence[int], steps: int, seed: int, out: Path) -> None:
    """Check, train, print the tables, draw the picture."""

    def say(text: str) -> None:
        print(f"\n{wrapped(text)}", flush=True)

    data = load_digits(seed)
    record = check(data, widths, seed)
    say("1. Coordinate check: does the classifier learn alike at every width?")
    print(f"\n{record}")
    say(
        "A slope of 0 is level: activations, and what training changes in them, are as large in a wide model as in a "
        "narrow one. Then a learning rate that suits a narrow model suits a wide one."
    )
    say(f"2. The same activations after {record.steps} steps, by two rulers")
    print(f"\n{record.width_table()}")
    say(
        "By the RMS norm, widths compare. The L2 norm of a layer grows like the root of its width, a slope of 0.5, "
        "though nothing is wrong."
    )
    runs = train_all(widths, data, steps, seed)
    rows = [
        ["", *(f"width {width}" for width in widths)],
        ["test accuracy", *(f"{run.accuracy:.1%}" for run in runs)],
        ["mean gradient RMS", *(f"{run.gradient_rms:.1e}" for run in runs)],
        ["steps clipped", *(f"{run.share_clipped:.0%}" for run in runs)],
    ]
    say(f"3. Training: {steps} steps, gradients clipped to an RMS of {MAX_RMS:g}")
    print(f"\n{text_table(rows)}")
    say("All share one learning rate. How gradients scale with width is a matter of the model; Adam undoes it.")
    draw(record).savefig(out, dpi=150)
    say(f"Picture of the coordinate check: {out}")


def train_all(widths: Sequence[int], data: Digits, steps: int, seed: int) -> list[Run]:
    """Train each width, with a bar over all steps."""
    from tqdm import tqdm

    with tqdm(total=len(widths) * steps, unit="step") as bar:
        runs: list[Run] = []
        for width in widths:
            bar.set_description(f"width {width}")
            runs.append(train(width, data, steps, seed, bar.update))
    return runs
