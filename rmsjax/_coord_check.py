"""Widths side by side: how the RMS norms of activations, and of their changes in training, scale with width.

`coord_check` trains a model at several widths for a few steps; `compare_widths` measures models as they are. Both
return a `WidthRecord`: plain arrays, the slopes in log-log scale with their intervals, and a verdict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from scipy.special import stdtrit  # jax brings scipy, as it does numpy

from rmsjax._checks import described
from rmsjax._models import trainable
from rmsjax._reduce import accumulator_dtype, lift
from rmsjax._tags import blank, partition
from rmsjax._text import text_table, with_interval, wrapped
from rmsjax._tree import tree_rms

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Float, Int, PyTree

Quantity: TypeAlias = Literal["rms", "change", "l2"]

# Exponents of width come in halves (Yang and Hu, arXiv 2011.14522), so a slope belongs to the half that is nearest.
_LEVEL = 0.25
_WORDS = ("not finite", "grows", "shrinks", "level")


class Slopes(NamedTuple):
    """Exponents of width: their means over seeds, and the ends of the 95 % interval of Student's t around them."""

    mean: Float[np.ndarray, "steps layers"]
    low: Float[np.ndarray, "steps layers"]
    high: Float[np.ndarray, "steps layers"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WidthRecord:
    r"""The RMS norms of the activations of a model at several widths, and what they say about its parametrisation.

    **Slopes.** A norm that scales as $\text{width}^p$ lies on a line of slope p in log-log scale. `slopes` fits p by
    least squares for each seed, and gives the mean over seeds with the 95 % interval of Student's t.

    **Verdict.** In the infinite-width limit exponents are multiples of 1/2. A slope beyond ±1/4 is therefore nearer to
    ±1/2 than to 0. At the last step, with mean slopes, a layer

    - is **not finite** if one of its norms, or of those of its change, is inf or NaN;
    - else **grows** if its RMS or the RMS of its change has a slope above 1/4;
    - else **shrinks** if its change has a slope below -1/4 (its RMS, if the layer does not change at all);
    - else is **level**.

    The RMS of a layer that changes is not judged for shrinking: it cannot stay below the change for long, and the
    output of a muP model, which starts near 0, is meant to shrink towards its change. `verdict` is the first in this
    list that any layer has. A layer is `doubtful` if its verdict would be another at one end of its interval, as
    happens with few or noisy seeds (always with a single one); more seeds make the interval smaller.

    Seeds do not show what small widths do: there, random parts that vanish like $\text{width}^{-1/2}$ still weigh, and
    the slopes of a right model lean towards -1/2, most of all attention scores and a readout that starts at random.
    Wider models tell, and so does a readout, and query kernels, that start at 0 (appendix D.2 of arXiv 2203.03466).

    Attributes:
        layers: the names of the activations.
        widths: the widths, ascending.
        seeds: the seeds.
        rms: the RMS norm of each activation, over the whole batch; step 0 is before training.
        change: the RMS norm of the activation minus the same activation at step 0.
        sizes: the number of elements of each activation for one example of the batch.
        loss: the loss at each step; NaN if nothing was trained.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from rmsjax import WidthRecord
        >>> widths, ones = np.array([64, 256]), np.ones((2, 3, 2, 1))  # three seeds, steps 0 and 1, one layer
        >>> change = ones * np.sqrt(widths / 64)[:, None, None, None] * np.array([[0.0], [0.5]])
        >>> record = WidthRecord(("dense",), widths, np.arange(3), ones, change, widths[:, None], ones[..., 0])
        >>> record
        slopes of log RMS against log width, mean over 3 seeds ± 95 % interval
        widths 64, 256; 1 step of training
        <BLANKLINE>
        layer  RMS, step 0  RMS, step 1  change, step 1  verdict
        dense  +0.00 ±0.00  +0.00 ±0.00     +0.50 ±0.00    grows
        <BLANKLINE>
        verdict: grows (1 of 1 layer)
        >>> record.verdict, record.verdicts, record.doubtful
        ('grows', {'dense': 'grows'}, ())
        >>> print(record.slopes("change").mean[-1], record.over_seeds("change")[:, -1], record.l2[:, 0, 0])
        [0.5] [[0.5] [1. ]] [[ 8.] [16.]]
        >>> print(record.history(256, "change"))
        {'dense': array([0., 1.])}
        >>> print(record.width_table())
        layer  RMS 64  RMS 256  slope  L2 64  L2 256  slope
        dense       1        1  +0.00      8      16  +0.50
        >>> print({name: len(column) for name, column in record.to_dict().items()})
        {'width': 12, 'seed': 12, 'step': 12, 'layer': 12, 'rms': 12, 'change': 12, 'l2': 12, 'loss': 12}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record.save(f"{folder}/check.npz")
        ...     print(WidthRecord.load(f"{folder}/check.npz").verdict)
        grows

    Source: Yang et al., Tensor Programs V (arXiv 2203.03466), appendix D.1; exponents of width as in Yang and Hu,
        Tensor Programs IV (arXiv 2011.14522).
    """

    layers: tuple[str, ...]
    widths: Int[np.ndarray, "widths"]
    seeds: Int[np.ndarray, "seeds"]
    rms: Float[np.ndarray, "widths seeds steps layers"]
    change: Float[np.ndarray, "widths seeds steps layers"]
    sizes: Int[np.ndarray, "widths layers"]
    loss: Float[np.ndarray, "widths seeds steps"]

    @property
    def steps(self) -> int:
        """How many steps were trained; the arrays have one more, for step 0."""
        return self.rms.shape[2] - 1

    @property
    def l2(self) -> Float[np.ndarray, "widths seeds steps layers"]:
        r"""The L2 norm of an activation for one example, $\|x\|_{RMS}\sqrt n$ (quadratic mean over the batch)."""
        return self.rms * np.sqrt(self.sizes)[:, None, None, :]

    def over_seeds(self, quantity: Quantity = "rms") -> Float[np.ndarray, "widths steps layers"]:
        """The geometric mean over seeds, to which the mean slopes belong; 0 where the norm is 0 for every seed."""
        values = np.asarray(getattr(self, quantity))
        means = np.exp(np.mean(_logs(values), axis=1))
        return np.where(np.any(values != 0, axis=1), means, 0.0)

    def history(self, width: int, quantity: Quantity = "rms") -> dict[str, Float[np.ndarray, "steps"]]:
        """One width over training: the mean over seeds at each step, by layer; what `plot.over_training` draws."""
        found = np.flatnonzero(self.widths == width)
        if not found.size:
            raise ValueError(f"WidthRecord: width must be one of {self.widths.tolist()}, got {width!r}")
        return dict(zip(self.layers, self.over_seeds(quantity)[found[0]].T, strict=True))

    def slopes(self, quantity: Quantity = "rms") -> Slopes:
        """The slopes in log-log scale against width, for each step and layer; of 0 everywhere the slope is 0."""
        by_seed = _fit(self.widths, getattr(self, quantity))
        mean, count = np.mean(by_seed, axis=0), len(by_seed)
        if count == 1:
            return Slopes(mean, np.full_like(mean, -np.inf), np.full_like(mean, np.inf))
        half = stdtrit(count - 1, 0.975) * np.std(by_seed, axis=0, ddof=1) / math.sqrt(count)
        return Slopes(mean, mean - half, mean + half)

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict on each layer: "level", "grows", "shrinks" or "not finite"."""
        return dict(zip(self.layers, self._judge("mean"), strict=True))

    @property
    def verdict(self) -> str:
        """The verdict on the whole: the first of "not finite", "grows", "shrinks", "level" that a layer has."""
        return min(self._judge("mean"), key=_WORDS.index)

    @property
    def doubtful(self) -> tuple[str, ...]:
        """The layers whose verdict would be another at one end of the interval of their slopes."""
        ends = zip(self.layers, self._judge("low"), self._judge("mean"), self._judge("high"), strict=True)
        return tuple(layer for layer, low, mean, high in ends if low != mean or high != mean)

    def _judge(self, which: Literal["mean", "low", "high"]) -> list[str]:
        rms, change = (getattr(self.slopes(quantity), which)[-1] for quantity in ("rms", "change"))
        changes = np.any(self.change[:, :, -1] != 0, axis=(0, 1))
        finite = np.all(np.isfinite(self.rms[:, :, -1] + self.change[:, :, -1]), axis=(0, 1))
        grows = np.maximum(rms, change) > _LEVEL
        shrinks = np.where(changes, change, rms) < -_LEVEL
        return [str(word) for word in np.select([~finite, grows, shrinks], _WORDS[:3], _WORDS[3])]

    # ---------------------------------------------------------------------------------------------------------- output

    def __repr__(self) -> str:
        judged: list[tuple[str, Quantity, int]] = [("RMS, step 0", "rms", 0)]
        if self.steps:
            judged.append((f"RMS, step {self.steps}", "rms", -1))
            judged.append((f"change, step {self.steps}", "change", -1))
        columns: list[list[str]] = []
        for title, quantity, step in judged:
            slopes = Slopes(*(values[step] for values in self.slopes(quantity)))
            columns.append([title, *map(with_interval, slopes.mean, slopes.high)])
        words = [word + (" ?" if layer in self.doubtful else "") for layer, word in self.verdicts.items()]
        rows = zip(["layer", *self.layers], *columns, ["verdict", *words], strict=True)
        seeds = _counted(len(self.seeds), "seed")
        return "\n".join(
            [
                wrapped(f"slopes of log RMS against log width, mean over {seeds} ± 95 % interval"),
                wrapped(f"widths {', '.join(map(str, self.widths))}; {_counted(self.steps, 'step')} of training"),
                "",
                text_table(rows),
                "",
                wrapped(self._conclusion()),
            ]
        )

    def _conclusion(self) -> str:
        hit = [layer for layer, word in self.verdicts.items() if word == self.verdict]
        where = "" if self.verdict == "level" else f" ({len(hit)} of {_counted(len(self.layers), 'layer')})"
        doubts = f"; ? = another verdict within the interval: use more than {_counted(len(self.seeds), 'seed')}"
        return f"verdict: {self.verdict}{where}{doubts if self.doubtful else ''}"

    def width_table(self, step: int = -1) -> str:
        """The RMS norms of each layer at each width, the L2 norms beside them, and the slopes of both, as text.

        Raises:
            ValueError: a step that was not recorded.
        """
        if not -self.rms.shape[2] <= step <= self.steps:
            raise ValueError(f"WidthRecord: step must be one of 0 to {self.steps}, or -1 for the last, got {step}")
        rows = [["layer", *(f"RMS {w}" for w in self.widths), "slope", *(f"L2 {w}" for w in self.widths), "slope"]]
        parts = [(self.over_seeds(q)[:, step], self.slopes(q).mean[step]) for q in ("rms", "l2")]
        for i, layer in enumerate(self.layers):
            cells = [[*(f"{v:.3g}" for v in means[:, i]), f"{slopes[i]:+z.2f}"] for means, slopes in parts]
            rows.append([layer, *cells[0], *cells[1]])
        return text_table(rows)

    def to_dict(self) -> dict[str, np.ndarray]:
        """Columns of one length, a row for each width, seed, step and layer: `pandas.DataFrame(record.to_dict())`."""
        shape = self.rms.shape
        indices = np.indices(shape).reshape(4, -1)
        labels = (self.widths, self.seeds, np.arange(shape[2]), np.array(self.layers))
        columns = {k: v[i] for k, v, i in zip(("width", "seed", "step", "layer"), labels, indices, strict=True)}
        wide = {"rms": self.rms, "change": self.change, "l2": self.l2, "loss": self.loss[..., None]}
        return columns | {k: np.broadcast_to(v, shape).ravel() for k, v in wide.items()}

    def save(self, path: str | PathLike[str]) -> None:
        """Write the record to one .npz file, at exactly this path."""
        arrays: dict[str, Any] = {
            field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)
        }
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> WidthRecord:
        """The record that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {field.name: file[field.name] for field in dataclasses.fields(cls)}
        return cls(tuple(map(str, arrays.pop("layers"))), **arrays)


# ------------------------------------------------------------------------------------------------------------- running


def coord_check(
    make_model: Callable[[int, nnx.Rngs], nnx.Module | MethodType | nn.Module],
    batch: Sequence[PyTree],
    *,
    widths: Iterable[int],
    make_optimizer: Callable[[int], optax.GradientTransformation],
    loss: Callable[[Any, Any], ArrayLike],
    steps: int = 4,
    seeds: int | Iterable[int] = 3,
    progress: bool = True,
) -> WidthRecord:
    """Train a model at several widths for a few steps, and judge how its activations and their changes scale.

    The coordinate check of muP: with a width-neutral parametrisation, the RMS norm of every activation and of its
    change since initialisation is the same at every width, so that hyperparameters found on a small model serve a
    large one. Where one grows, a wider model needs another learning rate or initialisation; where one shrinks, that
    layer stops learning. `WidthRecord` says how the verdict is reached; `rmsjax.plot.coord_check` draws the record.

    Each width compiles one program, in which all seeds train side by side; activations never leave it. The model sees
    the same batch and the same random numbers (dropout) at every step, and its state other than parameters (running
    averages) stays as it is, so that only learning changes an activation.

    Args:
        make_model: `(width, rngs)` to a Flax NNX module or a method of one, or to a Linen module, which is initialised
            here.
        batch: the arguments of the model, and last what the loss compares the output with: (x, labels). Arrays are
            traced, all else, such as a flag, reaches the model as it is. Of arrays on a mesh with explicit axes, call
            this under `jax.set_mesh(mesh)`, as the parameters are made here.
        widths: at least two; what width means is up to make_model and make_optimizer.
        make_optimizer: width to an optax transformation, since the learning rates of muP depend on it. Its update is
            given the extra arguments that some of optax's ask for: value, grad and value_fn.
        loss: `(output, target)` to a loss, which is averaged if it is not a scalar.
        steps: how many steps to train.
        seeds: how many seeds, or which; intervals need two at least, three or more are worth having.
        progress: show a bar over widths, if tqdm is installed.

    Returns:
        The record: norms, slopes, verdicts; print it for a table.

    Raises:
        TypeError: widths, steps or seeds are not integers; make_model, make_optimizer or loss is no function of these
            arguments; make_model does not return a Flax module, or make_optimizer no optax transformation.
        ValueError: fewer than two widths, no step, no seed, one of them twice; a batch without a target; widths at
            which the model has different layers.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> import rmsjax
        >>> def make_model(width, rngs):
        ...     return nnx.Sequential(nnx.Linear(8, width, rngs=rngs), jax.nn.relu, nnx.Linear(width, 1, rngs=rngs))
        >>> x = jax.random.normal(jax.random.key(0), (32, 8))
        >>> record = rmsjax.coord_check(
        ...     make_model, (x, x[:, :1]), widths=[64, 512], progress=False,
        ...     make_optimizer=lambda width: optax.adam(1e-3), loss=optax.l2_loss)
        >>> print(record.verdict, record.verdicts)
        grows {'layers/0': 'level', 'layers/2': 'grows', 'Sequential': 'grows'}

    Source: Yang et al., Tensor Programs V (arXiv 2203.03466), appendix D.1.
    """
    _check_takes("make_model", make_model, ("width", "rngs"), "lambda width, rngs: Model(width, rngs=rngs)")
    _check_takes("make_optimizer", make_optimizer, ("width",), "lambda width: optax.adam(1e-3)")
    _check_takes("loss", loss, ("output", "target"), "lambda output, target: ...")
    widths = _integers("coord_check", "widths", widths, least=1, count=2)
    if not isinstance(seeds, Iterable):
        seeds = range(*_integers("coord_check", "seeds", [seeds], least=1))
    seeds = _integers("coord_check", "seeds", seeds, least=0)
    (steps,) = _integers("coord_check", "steps", [steps], least=1)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        got = f"a {type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else described(batch)
        raise ValueError(f"coord_check: batch must be a tuple such as (x, labels), the target last, got {got}")
    optimizers = {width: make_optimizer(width) for width in widths}
    for optimizer in optimizers.values():
        if not isinstance(optimizer, optax.GradientTransformation):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                "coord_check: make_optimizer must return an optax transformation, such as optax.adam(1e-3), "
                f"got {described(optimizer)}"
            )
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    arrays, join = partition(tuple(batch))

    def trained(width: int) -> _Measured:
        def train(arrays: list[Array], key: Array) -> _Measured:
            return _train(partial(make_model, width), optimizers[width], loss, steps, join(arrays), key)

        return jax.device_get(jax.jit(jax.vmap(train, in_axes=(None, 0)))(arrays, keys))

    return _record("coord_check", widths, seeds, [trained(width) for width in _with_bar(widths, progress)])


def compare_widths(models: Mapping[int, Any], *args: Any) -> WidthRecord:
    """Measure models of several widths as they are: the RMS norm of every activation, side by side.

    Args:
        models: from width to a Flax NNX module, a method of one, or a tuple (Linen module, variables); or to a list of
            these (seeds).
        args: what the models are called with, as in `rmsjax.activation_rms`.

    Returns:
        A record with step 0 only; `print(record.width_table())` shows RMS beside L2 norms.

    Raises:
        TypeError: a width is not an integer, a model not a Flax module.
        ValueError: fewer than two widths, lists of different lengths, widths at which the model has different layers.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import rmsjax
        >>> models = {width: nnx.Linear(8, width, rngs=nnx.Rngs(0)) for width in (64, 1024)}
        >>> print(rmsjax.compare_widths(models, jnp.ones((32, 8))).width_table())
        layer   RMS 64  RMS 1024  slope  L2 64  L2 1024  slope
        Linear   0.971      1.03  +0.02   7.77     32.9  +0.52

    Source: the first step of a coordinate check, Yang et al. (arXiv 2203.03466), appendix D.1.
    """
    widths = _integers("compare_widths", "widths", models, least=1, count=2)
    by_width = [list(models[w]) if isinstance(models[w], list) else [models[w]] for w in widths]
    if len(set(map(len, by_width))) > 1 or not by_width[0]:
        raise ValueError(f"compare_widths: each width must have as many models, got {list(map(len, by_width))}")
    measured = [
        jax.tree.map(lambda *leaves: np.stack(leaves), *map(partial(_measure, args), group)) for group in by_width
    ]
    return _record("compare_widths", widths, list(range(len(by_width[0]))), measured)


_Activations: TypeAlias = "OrderedDict[str, Array]"  # each with the axes (*loops, examples, elements)


class _Measured(NamedTuple):
    """What one width gives, by activation: arrays over (seeds, steps, *loops); loops are those of an `nnx.scan`."""

    rms: OrderedDict[str, Any]
    change: OrderedDict[str, Any]
    sizes: OrderedDict[str, Any]
    loss: Any


def _train(
    make_model: Callable[[nnx.Rngs], Any],
    optimizer: optax.GradientTransformation,
    loss: Callable[[Any, Any], Any],
    steps: int,
    batch: tuple[Any, ...],
    key: Array,
) -> _Measured:
    """One width, one seed."""
    *args, target = batch
    model = make_model(nnx.Rngs(key))
    if isinstance(model, nn.Module):
        model = (model, model.init(key, *args))
    params, program = trainable("coord_check", model, key)
    optimizer = optax.with_extra_args_support(optimizer)

    def objective(params: Any) -> tuple[Array, _Activations]:
        output, activations = program(params, *args)
        try:
            return jnp.mean(loss(output, target)), activations
        except Exception as error:
            error.add_note(f"coord_check: loss was given output, {described(output)}, and target, {described(target)}")
            raise

    def step(carry: Any, index: Array) -> tuple[Any, Any]:
        params, state, first = carry
        (value, now), grads = jax.value_and_grad(objective, has_aux=True)(params)
        # Step 0 is run by the same program as all others, so what did not learn has changed by 0, not by rounding.
        first = jax.tree.map(lambda new, old: jnp.where(index == 0, new, old), now, first)
        # Some optimizers ask for more than the gradient: a schedule for the loss, a line search for the function.
        more = {"value": value, "grad": grads, "value_fn": lambda params: objective(params)[0]}
        updates, state = optimizer.update(grads, state, params, **more)
        norms = _norms((now, jax.tree.map(_difference, now, first)))
        return (optax.apply_updates(params, updates), state, first), (norms, value)

    _, shapes = jax.eval_shape(objective, params)
    start = params, optimizer.init(params), blank(shapes)
    _, ((rms, change), losses) = jax.lax.scan(step, start, jnp.arange(steps + 1))
    return _Measured(rms, change, _sizes(shapes), losses)


def _measure(args: tuple[Any, ...], model: Any) -> _Measured:
    """One model as it is."""
    params, program = trainable("compare_widths", model, jax.random.key(0))

    def measure(params: Any) -> _Measured:
        _, activations = program(params, *args)
        rms = _norms(activations)
        return _Measured(rms, jax.tree.map(jnp.zeros_like, rms), _sizes(activations), jnp.full((), jnp.nan))

    return jax.tree.map(lambda x: np.asarray(x)[None], jax.jit(measure)(params))


def _norms(activations: Any) -> Any:
    """A tree of norms of a tree of activations."""
    return jax.tree.map(lambda norm: norm.reshape(norm.shape[:-2]), tree_rms(activations, (-2, -1)))


def _difference(x: Array, y: Array) -> Array:
    """x - y in float32 at least, in which float16 does not overflow."""
    dtype = accumulator_dtype(x.dtype)
    return lift(x, dtype) - lift(y, dtype)


def _sizes(activations: _Activations) -> OrderedDict[str, Array]:
    return OrderedDict((name, jnp.asarray(x.shape[-1])) for name, x in activations.items())


def _record(function: str, widths: list[int], seeds: list[int], measured: list[_Measured]) -> WidthRecord:
    """What was measured at each width, as arrays; each iteration of a loop is a layer of its own."""
    tables: list[dict[str, tuple[Any, Any, int]]] = []
    for at_width in measured:
        table: dict[str, tuple[Any, Any, int]] = {}
        for name, rms in at_width.rms.items():
            for i in np.ndindex(rms.shape[2:]):
                label = name + "".join(f"[{k}]" for k in i)
                table[label] = (rms[:, :, *i], at_width.change[name][:, :, *i], at_width.sizes[name].flat[0])
        tables.append(table)
    layers = tuple(tables[0])
    for width, table in zip(widths, tables, strict=True):
        if different := set(layers) ^ set(table):
            raise ValueError(
                f"{function}: the model must have the same layers at every width; "
                f"at widths {widths[0]} and {width} they differ in {sorted(different)}"
            )
    columns = [[np.stack(column, -1) for column in zip(*map(table.get, layers), strict=True)] for table in tables]
    rms, change, sizes = (np.stack(parts) for parts in zip(*columns, strict=True))
    losses = np.stack([at_width.loss for at_width in measured])
    return WidthRecord(
        layers, np.array(widths), np.array(seeds), rms.astype(float), change.astype(float), sizes, losses.astype(float)
    )


def _check_takes(argument: str, function: Any, takes: tuple[str, ...], example: str) -> None:
    """TypeError unless this is a function that takes these arguments by position."""
    expected = f"coord_check: {argument} must be a function ({', '.join(takes)})"
    if not callable(function) or isinstance(function, (nnx.Module, nn.Module)):  # a model can be called too
        raise TypeError(f"{expected}, got {described(function)}; write {example}")
    with contextlib.suppress(ValueError):  # some builtins have no signature
        signature = inspect.signature(function)
        try:
            signature.bind(*takes)
        except TypeError:
            name = getattr(function, "__name__", type(function).__name__)
            raise TypeError(f"{expected}, got {name}{signature}; write {example}") from None


def _integers(function: str, argument: str, values: Iterable[int], *, least: int, count: int = 1) -> list[int]:
    """Distinct integers, in ascending order."""
    try:
        found = sorted(operator.index(value) for value in values)
    except TypeError:
        raise TypeError(f"{function}: {argument} must be integers, got {values!r:.80}") from None
    if len(found) < count or len(set(found)) < len(found):
        raise ValueError(f"{function}: {argument} must be {count} or more, none of them twice, got {found}")
    if found[0] < least:
        raise ValueError(f"{function}: {argument} must be at least {least}, got {found[0]}")
    return found


def _with_bar(widths: list[int], progress: bool) -> Iterable[int]:
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm.auto import tqdm

            return tqdm(widths, desc="coord_check", unit="width")
    return widths


# ----------------------------------------------------------------------------------------------------------- statistics


def _logs(values: np.ndarray) -> np.ndarray:
    """Logarithms in which 0 counts as the smallest normal number: 0 at some widths only is a steep slope, not NaN."""
    logs = np.log(np.maximum(values, np.finfo(np.float32).tiny, dtype=np.float64))
    return np.where(np.isfinite(values), logs, np.nan)


def _fit(widths: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The least-squares slope of log values against log widths along the first axis."""
    x, y = np.log(widths) - np.mean(np.log(widths)), _logs(values)
    return np.tensordot(x, y - y[0], 1) / np.sum(x**2)  # less the first, so that of equal values it is exactly 0


# ----------------------------------------------------------------------------------------------------------------- text


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
