"""`python -m rmsjax`: what the ruler is for, on real data.

Trains a small classifier of handwritten digits at several widths, with RMSNorm in every block and gradients clipped by
their RMS, and lays the activations of the widths side by side: the RMS norm is level where the L2 norm grows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jax
import numpy as np
import optax
from flax import nnx

import rmsjax
from rmsjax._coord_check import text_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jax import Array
    from jaxtyping import Float, Int

BATCH = 128
MAX_RMS = (
    2e-3  # about twice the gradient RMS of a width of 256 in mid-training, so that only the early steps are clipped
)


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
    """A residual network of two blocks."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(64, width, rngs=rngs)
        self.first = Block(width, rngs)
        self.second = Block(width, rngs)
        self.norm = rmsjax.nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(self.norm(self.second(self.first(self.embed(x)))))


class Run(NamedTuple):
    """A trained model and what its training showed."""

    model: Classifier
    gradient_rms: float
    share_clipped: float
    accuracy: float


def train(width: int, data: Digits, steps: int, seed: int, advance: Callable[[int], Any]) -> Run:
    """Train one width; `advance` is told of every step that is done."""
    # Adam moves every weight by its learning rate, and a unit adds up as many of them as the width: a rate that falls
    # like 1/width moves the activations equally at all widths.
    schedule = optax.cosine_decay_schedule(3e-3 * 64 / width, steps)
    tx = optax.chain(rmsjax.clip_by_rms(MAX_RMS), optax.adamw(schedule, weight_decay=1e-3))
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
    model = nnx.merge(graph, params)
    accuracy = np.mean(np.argmax(jax.jit(model)(data.x_test), -1) == data.y_test)
    share = int(optax.tree.get(state, "num_clipped")) / steps
    return Run(model, float(np.mean(np.concatenate(gradient_rms))), share, float(accuracy))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help shows the arguments)\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    parser = _Parser(prog="python -m rmsjax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=positive, nargs="+", default=[64, 128, 256, 512], help="two or more widths")
    parser.add_argument("--steps", type=positive, default=300, help="training steps for each width")
    parser.add_argument("--seed", type=int, default=0, help="seed of data split, initialisation and batches")
    parser.add_argument("--out", default="rmsjax.png", help="where the picture goes")
    args = parser.parse_args(argv)
    if len(set(args.widths)) < 2 or len(set(args.widths)) < len(args.widths):
        parser.error(f"argument --widths: expected two or more different widths, got {args.widths}")
    if args.seed < 0:
        parser.error(f"argument --seed: {args.seed} is negative")
    if not Path(args.out).absolute().parent.is_dir():
        parser.error(f"argument --out: no folder {Path(args.out).parent}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the tables, draw the picture."""
    args = parse(argv)
    try:
        import matplotlib as mpl
        import sklearn  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from tqdm import tqdm
    except ImportError as error:
        print(f"python -m rmsjax needs {error.name}: pip install 'rmsjax[demo]'", file=sys.stderr)
        return 2
    mpl.use("Agg")
    data, widths = load_digits(args.seed), sorted(args.widths)
    with tqdm(total=len(widths) * args.steps, unit="step") as bar:
        runs: dict[int, Run] = {}
        for width in widths:
            bar.set_description(f"width {width}")
            runs[width] = train(width, data, args.steps, args.seed, bar.update)
    record = rmsjax.compare_widths({width: run.model for width, run in runs.items()}, data.x_test)
    print(f"\nRMS and L2 norm of activations after {args.steps} steps, on {len(data.x_test)} held-out digits\n")
    print(record.width_table())
    print("\nslope: exponent of the width. 0 is level; an L2 norm that only adds up coordinates has 0.5.\n")
    rows = [["", *(f"width {width}" for width in widths)]]
    for name, values in [
        ("gradient RMS before the clip", [f"{run.gradient_rms:.2e}" for run in runs.values()]),
        (f"steps clipped to {MAX_RMS:g}", [f"{run.share_clipped:.0%}" for run in runs.values()]),
        ("test accuracy", [f"{run.accuracy:.1%}" for run in runs.values()]),
    ]:
        rows.append([name, *values])
    print("\n".join(text_table(rows)))
    rmsjax.plot.rms_and_l2(record).savefig(args.out, dpi=150)
    print(f"\npicture: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
