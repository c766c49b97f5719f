"""Does the best learning rate of a narrow model serve a wide one? `lr_sweep` trains both at many rates and compares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from rmsjax._checks import as_number, described
from rmsjax._models import Static
from rmsjax._record import Record, half_interval
from rmsjax._tags import is_array
from rmsjax._text import counted, moves, text_table, wrapped
from rmsjax._training import (
    Batch,
    Call,
    Kwargs,
    Model,
    advance,
    as_call,
    as_optimizer,
    as_seeds,
    as_sizes,
    at_size,
    check_takes,
    for_each,
    integers,
    learner,
    noted,
    prepared,
)

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SweepRecord(Record):
    r"""The losses of a model at several widths and learning rates, and what they say about the transfer of the rate.

    The final loss $L(\text{width}, \text{rate})$ of a run is its mean over the last tenth of the steps, and over seeds;
    it is infinite, and the run has diverged, if it is not finite for one of the seeds. The best rate of a width has the
    smallest. Of widths w, the smallest first,

    - the **drift** is the best rate of the last, over that of the first: 1 if the best rate stays;
    - the **regret** is $L(w_{last}, \text{best}(w_{first})) - L(w_{last}, \text{best}(w_{last}))$: what it costs to
      tune the smallest width and train the largest, in units of the loss.

    A best rate is known as exactly as the grid is fine, so a drift by a single step of the grid may be noise: then the
    regret is small. If a best rate lies `at_edge`, a better one may lie beyond, and the drift may be larger.

    Attributes:
        widths: the widths, ascending.
        seeds: the seeds.
        learning_rates: the rates, ascending.
        loss: the loss at each step, before its update.
        axis: "width", or "depth" if `widths` are the depths that `lr_sweep` was given.

    Example:
        >>> import numpy as np
        >>> from rmsjax import SweepRecord
        >>> rates, widths = np.array([0.01, 0.02, 0.04, 0.08]), np.array([64, 256])
        >>> best = np.array([0.04, 0.02])  # of each width, where the loss is 1
        >>> loss = 1 + np.log2(rates / best[:, None]) ** 2
        >>> record = SweepRecord(widths, np.array([0]), rates, loss[:, None, :, None])  # one seed, one step
        >>> record
        final loss by learning rate, of 1 seed
        widths 64, 256; 1 step of training; * = the best rate of a width
        <BLANKLINE>
        learning rate     64   256
        0.01               5     2
        0.02               2   1 *
        0.04             1 *     2
        0.08               2     5
        <BLANKLINE>
        best learning rate: 0.04 at width 64, 0.02 at width 256: it falls by a factor of 2
        at width 256 the best rate of width 64 gives a loss of 2 instead of 1
        >>> record.best_rates, record.drift, record.regret, record.at_edge
        ({64: 0.04, 256: 0.02}, 0.5, 1.0, ())
        >>> print({name: len(column) for name, column in record.to_dict().items()})
        {'width': 8, 'seed': 8, 'learning_rate': 8, 'step': 8, 'loss': 8}

    Source: Yang et al., Tensor Programs V (arXiv 2203.03466), figure 1.
    """

    widths: Int[np.ndarray, "widths"]
    seeds: Int[np.ndarray, "seeds"]
    learning_rates: Float[np.ndarray, "rates"]
    loss: Float[np.ndarray, "widths seeds rates steps"]
    axis: str = "width"

    @property
    def final(self) -> Float[np.ndarray, "widths rates"]:
        """The final losses; inf where a run has diverged."""
        return np.mean(self._final_by_seed, axis=1)

    @property
    def _final_by_seed(self) -> Float[np.ndarray, "widths seeds rates"]:
        final = np.mean(self.loss[..., -self._last :], axis=-1)
        return np.where(np.isfinite(final), final, np.inf)

    @property
    def _last(self) -> int:
        """How many steps the final loss is taken over."""
        return max(1, self.loss.shape[-1] // 10)

    @property
    def _best(self) -> list[int | None]:
        """The place of the best rate of each width, None if all have diverged."""
        return [int(np.argmin(losses)) if np.isfinite(losses).any() else None for losses in self.final]

    @property
    def best_rates(self) -> dict[int, float]:
        """From each width to the rate with the smallest final loss; NaN if the runs of all rates have diverged."""
        rates = [math.nan if best is None else float(self.learning_rates[best]) for best in self._best]
        return dict(zip(self.widths.tolist(), rates, strict=True))

    @property
    def at_edge(self) -> tuple[int, ...]:
        """The widths whose best rate is the smallest or the largest of all, so that a better one may lie beyond."""
        edges = (0, len(self.learning_rates) - 1)
        return tuple(w for w, best in zip(self.widths.tolist(), self._best, strict=True) if best in edges)

    @property
    def drift(self) -> float:
        """The best rate of the largest width, over that of the smallest."""
        first, *_, last = self.best_rates.values()
        return last / first

    @property
    def regret(self) -> float:
        """How much larger the final loss of the largest width is at the best rate of the smallest; inf if diverged."""
        return float(np.mean(self._regret_by_seed))

    @property
    def _regret_by_seed(self) -> Float[np.ndarray, "seeds"]:
        first, *_, last = self._best
        if first is None or last is None:
            return np.full(len(self.seeds), np.nan)
        final = self._final_by_seed[-1]
        return final[:, first] - final[:, last]

    # ---------------------------------------------------------------------------------------------------------- output

    def __repr__(self) -> str:
        steps, seeds = self.loss.shape[-1], counted(len(self.seeds), "seed")
        over = f", mean over the last {self._last} steps and {seeds}" if self._last > 1 else f", of {seeds}"
        rows = [["learning rate", *map(str, self.widths)]]
        for k, rate in enumerate(self.learning_rates):
            losses = [f"{loss:.4g}" if math.isfinite(loss) else "diverged" for loss in self.final[:, k]]
            marks = [" *" if best == k else "" for best in self._best]
            rows.append([f"{rate:.3g}", *map("".join, zip(losses, marks, strict=True))])
        legend = f"{counted(steps, 'step')} of training; * = the best rate of a {self.axis}"
        return "\n".join(
            [
                wrapped(f"final loss by learning rate{over}"),
                wrapped(f"{self.axis}s {', '.join(map(str, self.widths))}; {legend}"),
                "",
                text_table(rows),
                "",
                *map(wrapped, self._conclusions()),
            ]
        )

    def _conclusions(self) -> Iterable[str]:
        axis, (small, *_, large), final = self.axis, self.widths, self.final[-1]
        first, *_, last = self._best
        if first is None or last is None:
            lost = [str(w) for w, best in zip(self.widths, self._best, strict=True) if best is None]
            yield f"no best learning rate: all have diverged at {axis} {', '.join(lost)}; use smaller ones"
            return
        low, high = (f"{self.learning_rates[k]:.3g}" for k in (first, last))
        near = self.learning_rates[max(first - 1, 0) : first + 2]
        gap = float(np.max(near[1:] / near[:-1]))
        coarse = f", as far as rates {gap:.2g} times apart show" if first == last and gap > 3 else ""
        yield f"best learning rate: {low} at {axis} {small}, {high} at {axis} {large}: it {moves(self.drift)}{coarse}"
        if first != last:
            cost = f"gives a loss of {final[first]:.4g} instead of {final[last]:.4g}"
            cost = cost if math.isfinite(final[first]) else "diverges"
            yield f"at {axis} {large} the best rate of {axis} {small} {cost}{self._interval()}"
        for end, word in ((0, "smallest"), (len(self.learning_rates) - 1, "largest")):
            where = [str(w) for w, best in zip(self.widths, self._best, strict=True) if best == end]
            if where:
                side = word.replace("est", "er")
                yield f"the {word} rate is the best at {axis} {', '.join(where)}: try {side} ones too"

    def _interval(self) -> str:
        if len(self.seeds) == 1 or not math.isfinite(self.regret):
            return ""
        half = float(half_interval(self._regret_by_seed))
        return f", a regret of {self.regret:.2g} ±{half:.2g} (95 % interval over seeds)"

    def to_dict(self) -> dict[str, np.ndarray]:
        """Columns of one length, a row for each width, seed, rate and step: `pandas.DataFrame(record.to_dict())`."""
        indices = np.indices(self.loss.shape).reshape(4, -1)
        labels = (self.widths, self.seeds, self.learning_rates, np.arange(self.loss.shape[-1]))
        names = (self.axis, "seed", "learning_rate", "step")
        return {k: v[i] for k, v, i in zip(names, labels, indices, strict=True)} | {"loss": self.loss.ravel()}


# ------------------------------------------------------------------------------------------------------------- running


def lr_sweep(
    make_model: Callable[[int, nnx.Rngs], Model],
    batches: Sequence[Batch] | Callable[[int], Sequence[Batch]],
    *,
    widths: Iterable[int] | None = None,
    depths: Iterable[int] | None = None,
    learning_rates: Iterable[float],
    make_optimizer: Callable[[int, Array], optax.GradientTransformation],
    loss: Callable[[Any, Any], ArrayLike | tuple[ArrayLike, Any]],
    kwargs: Kwargs | Sequence[Kwargs] | Callable[[int], Kwargs | Sequence[Kwargs]] | None = None,
    steps: int = 100,
    seeds: int | Iterable[int] = 3,
    progress: bool = True,
) -> SweepRecord:
    """Train a model at several widths and learning rates, and compare the best rates of the widths.

    In muP the best rate of a narrow model is the best of a wide one too; in standard parametrisation, with Adam, it
    falls about as 1/width. `SweepRecord` gives the drift of the best rate, and the regret of a user who tunes the
    smallest width and trains the largest; `rmsjax.plot.lr_sweep` draws the losses.

    Each width compiles one program that trains all rates and seeds: on a CPU one after the other, elsewhere side by
    side, so that it holds as many copies of the model as there are rates times seeds. The state of the model other than
    parameters (running averages) stays as it is, and random numbers (dropout) are the same at every step, as in
    `coord_check`.

    Args:
        make_model: as in `coord_check`, `(width, rngs)` to a model.
        batches: a list of batches, each as in `coord_check`, (x, labels); or a function of the width that returns one.
            Step k trains on batch k, and after the last comes the first again. All have the same shapes. Training on
            one batch is `[batch]`.
        widths: at least two; what width means is up to make_model and make_optimizer.
        depths: the same, in the place of widths.
        learning_rates: the rates, at least two, such as `np.geomspace(1e-4, 1e-1, 10)`.
        make_optimizer: `(width, learning_rate)` to an optax transformation. The rate is a traced number.
        loss: as in `coord_check`.
        kwargs: the keyword arguments of the model, as in `coord_check`; or a list of them, one for each batch.
        steps: how many steps to train.
        seeds: how many seeds, or which.
        progress: show a bar over widths, if tqdm is installed.

    Returns:
        The record: losses, best rates, drift, regret; print it for a table.

    Raises:
        TypeError: as in `coord_check`; learning_rates or batches of another type; a make_optimizer that needs the value
            of the rate.
        ValueError: as in `coord_check`, but layers may differ; fewer than two rates, one of them twice, or not
            positive; batches that differ in shape.

    All of them come before anything is compiled.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, optax
        >>> from flax import nnx
        >>> import rmsjax
        >>> def make_model(width, rngs):
        ...     return nnx.Sequential(nnx.Linear(8, width, rngs=rngs), jax.nn.relu, nnx.Linear(width, 1, rngs=rngs))
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> record = rmsjax.lr_sweep(
        ...     make_model, [(x, jnp.sin(3 * x[:, :1]))], widths=[16, 256], learning_rates=2.0 ** np.arange(-10, 0),
        ...     make_optimizer=lambda width, learning_rate: optax.adam(learning_rate), loss=optax.l2_loss,
        ...     steps=20, progress=False)
        >>> print(record.drift < 1, record.regret > 0)
        True True

    Source: Yang et al., Tensor Programs V (arXiv 2203.03466), figure 1.
    """
    function = "lr_sweep"
    axis, sizes = as_sizes(function, widths, depths)
    check_takes(function, "make_model", make_model, (axis, "rngs"), f"lambda {axis}, rngs: Model({axis}, rngs=rngs)")
    takes, example = (axis, "learning_rate"), f"lambda {axis}, learning_rate: optax.adam(learning_rate)"
    check_takes(function, "make_optimizer", make_optimizer, takes, example)
    check_takes(function, "loss", loss, ("output", "target"), "lambda output, target: ...")
    rates = _as_rates(function, learning_rates)
    seeds, keys = as_seeds(function, seeds)
    (steps,) = integers(function, "steps", [steps], least=1)
    calls = {
        size: _stacked(
            function, at_size(function, "batches", batches, axis, size), at_size(function, "kwargs", kwargs, axis, size)
        )
        for size in sizes
    }

    def train(size: int, calls: tuple[Call, int], keys: Array, rates: Array) -> Array:
        train_one = partial(_train, partial(make_model, size), partial(make_optimizer, size), loss, steps, *calls)
        return for_each(keys, lambda key: for_each(rates, lambda rate: train_one(key, rate)))

    given = keys, jnp.asarray(rates)
    losses = prepared(function, axis, train, calls, *given, progress=progress)(*given)
    return SweepRecord(np.array(sizes), np.array(seeds), rates, np.stack(losses).astype(float), axis)


def _train(
    make_model: Callable[[nnx.Rngs], Any],
    make_optimizer: Callable[[Array], Any],
    loss: Callable[[Any, Any], Any],
    steps: int,
    calls: Call,
    count: int,
    key: Array,
    rate: Array,
) -> Array:
    """The losses of one width, one seed and one rate."""

    def at(index: int | Array) -> Call:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False) if is_array(leaf) else leaf, calls
        )

    params, objective = learner("lr_sweep", make_model, loss, at(0), key, positional="batches[0]")
    traced = (
        "lr_sweep: learning_rate is traced, since all rates of a width are one program: in make_optimizer compute with "
        "it by jax.numpy, and neither compare it nor make it a float"
    )
    with noted(traced, jax.errors.JAXTypeError):
        optimizer = as_optimizer("lr_sweep", make_optimizer(rate))

    def step(carry: Any, index: Array) -> tuple[Any, Array]:
        params, state = carry
        call = at(index)
        value, grads = jax.value_and_grad(objective)(params, call)
        return advance(optimizer, objective, call, value, grads, params, state), value

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps) % count)
    return losses


def _as_rates(function: str, learning_rates: Any) -> np.ndarray:
    """Distinct positive numbers, in ascending order."""
    if not isinstance(learning_rates, Iterable):
        raise TypeError(
            f"{function}: learning_rates must be numbers such as np.geomspace(1e-4, 1e-1, 10), "
            f"got {described(learning_rates)}"
        )
    rates = sorted(as_number(function, "learning_rates", rate) for rate in cast(Iterable[Any], learning_rates))
    if len(rates) < 2 or len(set(rates)) < len(rates):
        raise ValueError(f"{function}: learning_rates must be 2 or more, none of them twice, got {rates}")
    if rates[0] <= 0:
        raise ValueError(f"{function}: learning_rates must be positive, got {rates[0]}")
    return np.array(rates)


def _stacked(function: str, batches: Any, kwargs: Any) -> tuple[Call, int]:
    """All batches as one call whose arrays have an axis more in front, and their number."""
    if not (isinstance(batches, (list, tuple)) and all(isinstance(b, (list, tuple)) for b in batches) and batches):
        raise TypeError(
            f"{function}: batches must be a list of batches, such as [(x, labels)], got {described(batches)}; to train "
            "on a single one write [batch]"
        )
    has_list = isinstance(kwargs, (list, tuple))
    each: Any = kwargs if has_list else [kwargs] * len(batches)
    if len(each) != len(batches):
        raise ValueError(
            f"{function}: kwargs, if they are a list, must be one for each batch, got {len(each)} for "
            f"{counted(len(batches), 'batch', 'batches')}"
        )
    calls = [
        as_call(function, batch, given, names=(f"batches[{k}]", f"kwargs[{k}]" if has_list else "kwargs"))
        for k, (batch, given) in enumerate(zip(batches, each, strict=True))
    ]
    leaves, treedef = jax.tree.flatten(calls[0])
    for k, call in enumerate(calls):
        others, other_treedef = jax.tree.flatten(call)
        different = [(a, b) for a, b in zip(leaves, others, strict=False) if _form(a) != _form(b)]
        if different or other_treedef != treedef:
            first, other = different[0] if different else (treedef, other_treedef)
            raise ValueError(
                f"{function}: batches must be alike, since one program trains on all of them; batches[{k}] has "
                f"{described(other)} where batches[0] has {described(first)}. Leave out a last one that is smaller"
            )
    return jax.tree.map(lambda *same: jnp.stack(same) if is_array(same[0]) else same[0], *calls), len(calls)


def _form(leaf: Any) -> Any:
    """What the leaves of all batches at one place have in common."""
    return (leaf.shape, leaf.dtype) if is_array(leaf) else Static(leaf)
