"""Widths side by side: how the RMS norms of activations, and of their changes in training, scale with width.

`coord_check` trains a model at several widths for a few steps; `compare_widths` measures models as they are. Both
return a `WidthRecord`: plain arrays, the slopes in log-log scale with their intervals, and a verdict.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from rmsjax import _parameters
from rmsjax._checks import described
from rmsjax._models import measure_layers, trainable
from rmsjax._record import Record
from rmsjax._reduce import lifted
from rmsjax._tags import blank
from rmsjax._text import counted, text_table, with_interval, wrapped
from rmsjax._training import (
    Batch,
    Call,
    Kwargs,
    Model,
    advance,
    as_call,
    as_kwargs,
    as_optimizer,
    as_seeds,
    as_sizes,
    at_size,
    check_call,
    check_takes,
    for_each,
    integers,
    keys_of,
    learner,
    prepared,
    shared_names,
)
from rmsjax._tree import tree_rms
from rmsjax._verdicts import Finding, Slopes, exponents, is_in_doubt, judge, logs, over_seeds, words

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Float, Int

Quantity: TypeAlias = Literal["rms", "change", "l2"]

_SHOWN = 6  # findings


def _none() -> np.ndarray:
    return np.zeros((0, 0, 0, 0))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WidthRecord(Record):
    r"""The RMS norms of the activations of a model at several widths, and what they say about its parametrisation.

    **Slopes.** A norm that scales as $\text{width}^p$ lies on a line of slope p in log-log scale. `slopes` fits p by
    least squares for each seed, and gives the mean over seeds with the 95 % interval of Student's t.

    **Findings.** In the infinite-width limit exponents are multiples of 1/2. A slope beyond ±1/4 is therefore nearer to
    ±1/2 than to 0, and it is a finding if all of its interval is beyond ±1/8: .3 ± .02 is one, .26 ± .2 is not. Looked
    at, in this order, are

    - the RMS of each activation at step 0: an **initial scale**;
    - what the first change of each parameter alone, with all others as they were, does further on, against what it does
      to the output of its own layer: if it grows on the way, something there passes on too much, as a rule the initial
      scale of a kernel whose inputs are as many as the width;
    - what it does to the output of its own layer: its **learning rate**. With all multipliers of the model taken in
      this is the change of its RMS operator norm, and no mistake in another learning rate bears on it. But steps of
      SGD, with momentum or not, are as large as the gradient, which need not be level: that of queries is a sum of
      random terms over the width, until values and readout agree. Where steps are the same multiple of the gradient
      for all seeds, two at least, how the loss reacts to a change of that output, $\langle g, s \rangle$ over its RMS,
      is therefore divided out, and what is left is the learning rate's;
    - the change of each activation over all steps: beyond ±3/8, as nothing before explains it; the gradients of a
      layer's own parameters do, with SGD, if it shrinks.

    `findings` are those of the first of these that has any, since what comes later may follow from it (but the learning
    rate of what passes on too much): mend them, and check again. Each names a parameter (a layer, if no parameter of it
    is to blame), and the power of the width by which it is off. `verdict` is "level" without a finding, else what the
    first one is: "grows", "shrinks", or "not finite" if the norm of some activation is.

    These are no findings: over widths, an output whose size does not depend on them and which starts at random, such as
    the readout or attention scores, shrinks like $\text{width}^{-1/2}$ towards its change, as a sum of random terms
    does; and an output that a module around it scales is judged as that module returns it.

    `verdicts` say the same of each layer by itself, causes and what follows from them alike. A layer is `doubtful` if
    its verdict would be another at one end of its interval, as happens with few or noisy seeds (always with a single
    one); more seeds make the interval smaller. The record is `in_doubt` if the findings are: then `coord_check` runs
    more seeds by itself.

    **What a few steps do not show.** Weight decay acts over the time 1/(learning rate · decay): with Adam and learning
    rates of hidden kernels that fall as 1/width, multiply their decay by the width, as optax multiplies it by the rate.
    Adam's epsilon bears on gradients that are not far above it, which get smaller with the width and in training:
    compare with `gradient_rms`, or choose 1e-12. And a schedule, or a number of steps, that depends on the width.
    Queries and keys that learn slowly in a wide model at first are still findings, and no mistakes, where steps of SGD
    are more than a multiple of the gradient, by decayed weights or a clip, and where there is a single seed.

    Attributes:
        layers: the names of the activations.
        widths: the widths, ascending.
        seeds: the seeds.
        rms: the RMS norm of each activation, over the whole batch; step 0 is before training.
        change: the RMS norm of the activation minus the same activation at step 0.
        sizes: the number of elements of each activation for one example of the batch.
        loss: the loss at each step; NaN if nothing was trained.
        parameters: the names of the parameters; of a stacked leaf each layer is one. None over depths.
        parameter_norms: the RMS operator norm of each kernel, and the RMS norm of all other parameters.
        parameter_changes: those of the parameter minus the same parameter at step 0.
        effects: the RMS norm of the change of each activation if one parameter alone is as its first update leaves it.
        axis: "width", or "depth" if `widths` are the depths that `coord_check` was given.
        descents: the products g·s, g·g and s·s of the gradient of each parameter and its step downhill, its first.

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
        - dense: its change over all steps grows as width^+0.50 ±0.00
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
        Tensor Programs IV (arXiv 2011.14522); the RMS operator norm of kernels and of their changes: Yang, Simon and
        Bernstein, A Spectral Condition for Feature Learning (arXiv 2310.17813).
    """

    layers: tuple[str, ...]
    widths: Int[np.ndarray, "widths"]
    seeds: Int[np.ndarray, "seeds"]
    rms: Float[np.ndarray, "widths seeds steps layers"]
    change: Float[np.ndarray, "widths seeds steps layers"]
    sizes: Int[np.ndarray, "widths layers"]
    loss: Float[np.ndarray, "widths seeds steps"]
    parameters: tuple[str, ...] = ()
    parameter_norms: Float[np.ndarray, "widths seeds steps parameters"] = dataclasses.field(default_factory=_none)
    parameter_changes: Float[np.ndarray, "widths seeds steps parameters"] = dataclasses.field(default_factory=_none)
    effects: Float[np.ndarray, "widths seeds parameters layers"] = dataclasses.field(default_factory=_none)
    axis: str = "width"
    descents: Float[np.ndarray, "widths seeds products parameters"] = dataclasses.field(default_factory=_none)

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
        values = self._of(quantity)
        means = np.exp(np.mean(logs(values), axis=1))
        return np.where(np.any(values != 0, axis=1), means, 0.0)

    def history(self, width: int, quantity: Quantity = "rms") -> dict[str, Float[np.ndarray, "steps"]]:
        """One width over training: the mean over seeds at each step, by layer; what `plot.over_training` draws."""
        found = np.flatnonzero(self.widths == width)
        if not found.size:
            raise ValueError(f"WidthRecord: {self.axis} must be one of {self.widths.tolist()}, got {width!r}")
        return dict(zip(self.layers, self.over_seeds(quantity)[found[0]].T, strict=True))

    def slopes(self, quantity: Quantity = "rms") -> Slopes:
        """The slopes in log-log scale against width, for each step and layer; of 0 everywhere the slope is 0."""
        return over_seeds(exponents(self.widths, self._of(quantity)))

    def _of(self, quantity: Quantity) -> np.ndarray:
        if quantity not in get_args(Quantity):
            raise ValueError(f"WidthRecord: quantity must be one of {', '.join(get_args(Quantity))}, got {quantity!r}")
        return np.asarray(getattr(self, quantity))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What depends on the width, the causes first; each has a `name`, of a parameter or a layer, and a `power`."""
        return tuple(judge(self))

    @property
    def verdict(self) -> str:
        """The verdict on the whole: "level" without a finding, else what the first one is, such as "grows"."""
        found = self.findings
        return found[0].word if found else "level"

    @property
    def in_doubt(self) -> bool:
        """Whether intervals are too wide for the first finding, or for there being none.

        It would then be another by the mean slopes alone than if whole intervals had to be nearer to ±1/2 than to 0.
        A single seed has no interval, and leaves all but "not finite" in doubt.
        """
        return is_in_doubt(self)

    @property
    def verdicts(self) -> dict[str, str]:
        """What each layer does: "level", "grows", "shrinks" or "not finite"."""
        return dict(zip(self.layers, words(self), strict=True))

    @property
    def doubtful(self) -> tuple[str, ...]:
        """The layers whose verdict would be another at one end of the interval of their slopes."""
        ends = zip(self.layers, words(self, "low"), words(self, "mean"), words(self, "high"), strict=True)
        return tuple(layer for layer, low, mean, high in ends if low != mean or high != mean)

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
        verdicts, doubtful = self.verdicts, self.doubtful
        words = [word + (" ?" if layer in doubtful else "") for layer, word in verdicts.items()]
        rows = zip(["layer", *self.layers], *columns, ["verdict", *words], strict=True)
        seeds = counted(len(self.seeds), "seed")
        return "\n".join(
            [
                wrapped(f"slopes of log RMS against log {self.axis}, mean over {seeds} ± 95 % interval"),
                wrapped(f"{self.axis}s {', '.join(map(str, self.widths))}; {counted(self.steps, 'step')} of training"),
                "",
                text_table(rows),
                "",
                *self._conclusion(verdicts, doubtful),
            ]
        )

    def _conclusion(self, verdicts: dict[str, str], doubtful: tuple[str, ...]) -> list[str]:
        found, verdict = self.findings, self.verdict
        hit = [layer for layer, word in verdicts.items() if word == verdict]
        where = f" ({len(hit)} of {counted(len(self.layers), 'layer')})" if hit and verdict != "level" else ""
        doubts = f"; ? = another verdict within the interval: use more than {counted(len(self.seeds), 'seed')}"
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        mark = " ?" if self.in_doubt else ""
        return [
            wrapped(f"verdict: {verdict}{mark}{where}{doubts if doubtful or mark else ''}"),
            *(wrapped(f"- {line}") for line in [*map(str, found[:_SHOWN]), *more]),
        ]

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
        columns = {k: v[i] for k, v, i in zip((self.axis, "seed", "step", "layer"), labels, indices, strict=True)}
        wide = {"rms": self.rms, "change": self.change, "l2": self.l2, "loss": self.loss[..., None]}
        return columns | {k: np.broadcast_to(v, shape).ravel() for k, v in wide.items()}


# ------------------------------------------------------------------------------------------------------------- running


def coord_check(
    make_model: Callable[[int, nnx.Rngs], Model],
    batch: Batch | Callable[[int], Batch],
    *,
    widths: Iterable[int] | None = None,
    depths: Iterable[int] | None = None,
    make_optimizer: Callable[[int], optax.GradientTransformation],
    loss: Callable[[Any, Any], ArrayLike | tuple[ArrayLike, Any]],
    kwargs: Kwargs | Callable[[int], Kwargs] | None = None,
    steps: int = 4,
    seeds: int | Iterable[int] = 3,
    max_seeds: int = 12,
    progress: bool = True,
) -> WidthRecord:
    r"""Train a model at several widths for a few steps, and judge how its activations and their changes scale.

    The coordinate check of muP: with a width-neutral parametrisation, the RMS norm of every activation and of its
    change since initialisation is the same at every width, so that hyperparameters found on a small model serve a
    large one. Where one grows, a wider model needs another learning rate or initialisation; where one shrinks, that
    layer stops learning. `WidthRecord` says how the verdict is reached, and its `findings` name the parameter whose
    learning rate or initial scale is to blame; `rmsjax.plot.coord_check` draws the record.

    **Depth.** With `depths` instead of widths the same is asked of deeper models, and slopes are exponents of the
    depth. A residual stream $x \leftarrow x + f(x)$ grows like $\sqrt{\text{depth}}$ at the start, and its change like
    the depth; with branches $f(x) / \text{depth}$ it is level, at the learning rate of all depths. Layers whose number
    depends on the depth, such as "blocks/3/up" or one of a scan, are compared where they are at the same share of the
    depth, under the names of the shallowest model. A block that returns the stream shows how it grows; norms hide it.
    A module that returns its branch times the factor shrinks, as it should: multiply where the branch is added.
    Findings then name layers alone, for the share that each parameter has in a change rightly falls with the depth.

    Each width compiles one program, in which one seed trains after another; activations and parameters never leave it.
    It keeps two more copies of the parameters, and runs the model once more for each of them. The model sees
    the same batch and the same random numbers (dropout) at every step, and its state other than parameters (running
    averages) stays as it is, so that only learning changes an activation.

    Args:
        make_model: `(width, rngs)` to a Flax NNX module or a method of one, or to a Linen module, which is initialised
            here. This is also the place for `model.eval()` and the like.
        batch: the arguments of the model, and last what the loss compares the output with: (x, labels); or a function
            of the width that returns these. Arrays are traced, all else, such as a flag, reaches the model as it is.
            Arrays may be sharded, also over explicit axes.
        widths: at least two; what width means is up to make_model and make_optimizer.
        depths: the same, in the place of widths. All functions of the width are then given the depth.
        make_optimizer: width to an optax transformation, since the learning rates of muP depend on it. Its update is
            given the extra arguments that some of optax's ask for: value, grad and value_fn.
        loss: `(output, target)` to a loss, which is averaged if it is not a scalar, or to a tuple `(loss, aux)`, of
            which aux is not used.
        kwargs: the keyword arguments of the model, such as {"mask": mask}, or a function of the width that returns
            them. In Linen those of `module.apply`: `rngs`, `method` and `mutable` too. With `mutable` the output that
            the loss is given is what `apply` returns, a tuple of the output and the collections.
        steps: how many steps to train.
        seeds: how many seeds, or which; intervals need two at least, three or more are worth having.
        max_seeds: where `seeds` is a number, as many more are run while the record is `in_doubt`, up to this number.
            Nothing more is compiled for these. A single seed stays alone.
        progress: show a bar over widths, if tqdm is installed.

    Returns:
        The record: norms, slopes, verdicts; print it for a table.

    Raises:
        TypeError: widths, steps or seeds are not integers; neither widths nor depths, or both; make_model,
            make_optimizer, loss, or batch or kwargs as functions, do not take these arguments, and the model not what
            batch and kwargs have; make_model does not return a Flax module, make_optimizer no optax transformation, or
            the loss no floating-point number.
        ValueError: fewer than two widths, no step, no seed, one of them twice; a batch without a target; widths at
            which the model has different layers or parameters, or the very same; arrays on several meshes with
            explicit axes.

    All of them but "the very same" come before anything is compiled.

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
        >>> for finding in record.findings:
        ...     print(finding.name, finding.kind, round(2 * finding.power) / 2)
        layers/2/kernel initial scale 0.5
        layers/2/kernel learning rate 1.0

    Source: Yang et al., Tensor Programs V (arXiv 2203.03466), appendix D.1. Depth: Dey et al., CompleteP
        (arXiv 2505.01618).
    """
    function = "coord_check"
    axis, sizes = as_sizes(function, widths, depths)
    check_takes(function, "make_model", make_model, (axis, "rngs"), f"lambda {axis}, rngs: Model({axis}, rngs=rngs)")
    check_takes(function, "make_optimizer", make_optimizer, (axis,), f"lambda {axis}: optax.adam(1e-3)")
    check_takes(function, "loss", loss, ("output", "target"), "lambda output, target: ...")
    (steps,) = integers(function, "steps", [steps], least=1)
    (max_seeds,) = integers(function, "max_seeds", [max_seeds], least=1)
    most = 0 if isinstance(seeds, Iterable) else max_seeds  # seeds that were named are those that were wanted
    seeds, keys = as_seeds(function, seeds)
    calls = {
        size: as_call(
            function, at_size(function, "batch", batch, axis, size), at_size(function, "kwargs", kwargs, axis, size)
        )
        for size in sizes
    }
    optimizers = {size: as_optimizer(function, make_optimizer(size)) for size in sizes}

    def train(size: int, call: Call, keys: Array) -> _Measured:
        train_one = partial(_train, partial(make_model, size), optimizers[size], loss, steps, axis, call)
        return for_each(keys, train_one)

    check = partial(_shared, function, axis, sizes)
    measure = prepared(function, axis, train, calls, keys, check=check, progress=progress)
    measured = measure(keys)
    record = _record(function, axis, sizes, seeds, measured)
    if axis == "width" and all(np.all(x == x[0]) for x in (record.sizes, record.rms[:, :, 0])):
        raise ValueError(
            f"{function}: the model must depend on the width, got the same layers with the same norms at every one; "
            "make_model is given it: lambda width, rngs: Model(width, rngs=rngs)"
        )
    while len(seeds) > 1 and record.in_doubt and len(record.seeds) + len(seeds) <= most:
        further = range(record.seeds[-1] + 1, record.seeds[-1] + 1 + len(seeds))
        measured = [_joined(*of_size) for of_size in zip(measured, measure(keys_of(further)), strict=True)]
        record = _record(function, axis, sizes, [*record.seeds, *further], measured)
    return record


def compare_widths(
    models: Mapping[int, Any], *args: Any, kwargs: Kwargs | Callable[[int], Kwargs] | None = None
) -> WidthRecord:
    """Measure models of several widths as they are: the RMS norm of every activation, side by side.

    Args:
        models: from width to a Flax NNX module, a method of one, or a tuple (Linen module, variables); or to a list of
            these (seeds).
        args: what the models are called with, as in `rmsjax.activation_rms`; or a single function of the width that
            returns a tuple of them.
        kwargs: their keyword arguments, as in `coord_check`.

    Returns:
        A record with step 0 only; `print(record.width_table())` shows RMS beside L2 norms.

    Raises:
        TypeError: a width is not an integer, a model not a Flax module, or not one that takes these arguments.
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
    function = "compare_widths"
    widths = integers(function, "widths", models, least=1, count=2)
    by_width = [list(models[w]) if isinstance(models[w], list) else [models[w]] for w in widths]
    if len(set(map(len, by_width))) > 1 or not by_width[0]:
        raise ValueError(f"{function}: each width must have as many models, got {list(map(len, by_width))}")

    def call(width: int) -> Call:
        given: Any = at_size(function, "args", args[0], "width", width) if _is_function(args) else args
        if not isinstance(given, tuple):
            got = described(given)
            raise TypeError(f"{function}: args, as a function (width), must return a tuple such as (x,), got {got}")
        return Call(given, as_kwargs(function, at_size(function, "kwargs", kwargs, "width", width)), None)

    calls = {width: call(width) for width in widths}
    for width, group in zip(widths, by_width, strict=True):
        for model in group:
            check_call(function, model, calls[width], positional="args")
    trained = {
        width: [trainable(function, model, jax.random.key(0)) for model in group]
        for width, group in zip(widths, by_width, strict=True)
    }

    def measure(width: int, given: tuple[Call, list[Any]]) -> _Measured:
        programs = [program for _, program in trained[width]]
        each = [_measure(program, params, given[0]) for program, params in zip(programs, given[1], strict=True)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    given = {width: (calls[width], [params for params, _ in trained[width]]) for width in widths}
    check = partial(_shared, function, "width", widths)
    measured = prepared(function, "width", measure, given, check=check)()
    return _record(function, "width", widths, list(range(len(by_width[0]))), measured)


def _is_function(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and callable(args[0]) and not isinstance(args[0], (nnx.Module, nn.Module))


_Activations: TypeAlias = "OrderedDict[str, Array]"  # each with the axes (*loops, examples, elements)


class _Measured(NamedTuple):
    """What one width gives, by activation: arrays over (seeds, steps, *loops); loops are those of an `nnx.scan`.

    Those of parameters are by parameter, over (seeds, steps).
    """

    rms: OrderedDict[str, Any]
    change: OrderedDict[str, Any]
    sizes: OrderedDict[str, Any]
    loss: Any
    parameter_norms: OrderedDict[str, Any]
    parameter_changes: OrderedDict[str, Any]
    effects: OrderedDict[str, Any]  # by activation: arrays over (seeds, parameters, *loops)
    descents: Any  # an array over (seeds, 3, parameters)


def _train(
    make_model: Callable[[nnx.Rngs], Any],
    optimizer: optax.GradientTransformationExtraArgs,
    loss: Callable[[Any, Any], Any],
    steps: int,
    axis: str,
    call: Call,
    key: Array,
) -> _Measured:
    """One size, one seed."""
    params, objective = learner("coord_check", make_model, loss, call, key)

    def measured(params: Any) -> tuple[Array, _Activations]:
        return measure_layers(objective, params, call)

    _, shapes = jax.eval_shape(measured, params)
    initial = params
    # Over depths none: the share of each parameter in a change rightly falls.
    chosen = _parameters.parameters(params, shapes) if axis == "width" else []

    def step(carry: Any, index: Array) -> tuple[Any, Any]:
        params, state, first, moved, descent = carry
        (value, now), grads = jax.value_and_grad(measured, has_aux=True)(params)
        # Step 0 is run by the same program as all others, so what did not learn has changed by 0, not by rounding.
        first = jax.tree.map(lambda new, old: jnp.where(index == 0, new, old), now, first)
        norms = _norms(now), _norms_of_change(now, first)
        own = _parameters.sizes(chosen, [params, jax.tree.map(_difference, params, initial)])
        after, state = advance(optimizer, objective, call, value, grads, params, state)
        if chosen:
            moved = _parameters.first_moves(initial, moved, grads, params, after)
            is_known = jnp.all(descent[1:] > 0, axis=0)  # of a step that moved it
            descent = jnp.where(is_known, descent, _parameters.descents(chosen, grads, params, after))
        return (after, state, first, moved, descent), (norms, own, value)

    start = params, optimizer.init(params), blank(shapes), initial, jnp.zeros((3, len(chosen)))
    carry, ((rms, change), (norms, changes), losses) = jax.lax.scan(step, start, jnp.arange(steps + 1))
    *_, moved, descent = carry
    effects: OrderedDict[str, Any] = OrderedDict()
    if chosen:
        effects = _parameters.effects(chosen, lambda params: measured(params)[1], _norms_of_change, initial, moved)
    return _Measured(rms, change, _sizes(shapes), losses, norms, changes, effects, descent)


def _measure(program: Callable[..., Any], params: Any, call: Call) -> _Measured:
    """One model as it is."""
    _, activations = measure_layers(program, params, call.args, call.kwargs)
    rms = jax.tree.map(lambda norm: norm[None], _norms(activations))  # of a single step
    none: OrderedDict[str, Any] = OrderedDict()
    unchanged = jax.tree.map(jnp.zeros_like, rms)
    return _Measured(rms, unchanged, _sizes(activations), jnp.full(1, jnp.nan), none, none, none, jnp.zeros((3, 0)))


def _joined(measured: _Measured, more: _Measured) -> _Measured:
    """Of further seeds as well."""
    return jax.tree.map(lambda *of_seeds: np.concatenate(of_seeds), measured, more)


def _norms(activations: Any) -> Any:
    """A tree of norms of a tree of activations."""
    return jax.tree.map(lambda norm: norm.reshape(norm.shape[:-2]), tree_rms(activations, (-2, -1)))


def _norms_of_change(activations: Any, first: Any) -> Any:
    return _norms(jax.tree.map(_difference, activations, first))


def _difference(x: Array, y: Array) -> Array:
    """x - y in float32 at least, in which float16 does not overflow."""
    return lifted(x) - lifted(y)


def _sizes(activations: _Activations) -> OrderedDict[str, Array]:
    return OrderedDict((name, jnp.asarray(x.shape[-1])) for name, x in activations.items())


def _layers(function: str, axis: str, sizes: list[int], measured: list[_Measured]) -> list[dict[str, _Place]]:
    """Where the layers that are compared are at each size, by the name that they share.

    Each iteration of a loop is a layer of its own. Of deeper models some are chosen, at the same share of the depth.
    """
    places = [
        {
            name + "".join(f"[{k}]" for k in i): (name, i)
            for name, x in each.rms.items()
            for i in np.ndindex(x.shape[2:])
        }
        for each in measured
    ]
    names = shared_names(function, axis, sizes, "layers", places)
    return [{shared: at[own] for shared, own in own_names.items()} for at, own_names in zip(places, names, strict=True)]


_Place: TypeAlias = tuple[str, tuple[int, ...]]  # the name of an activation, and the iterations of loops


def _shared(
    function: str, axis: str, sizes: list[int], measured: list[_Measured]
) -> tuple[list[dict[str, _Place]], list[dict[str, str]]]:
    """The layers and the parameters that are compared, by the names that they share; ValueError if these differ."""
    layers = _layers(function, axis, sizes, measured)
    return layers, shared_names(function, axis, sizes, "parameters", [each.parameter_norms for each in measured])


def _record(function: str, axis: str, sizes: list[int], seeds: list[int], measured: list[_Measured]) -> WidthRecord:
    """What was measured at each size, as arrays."""
    places, names = _shared(function, axis, sizes, measured)
    layers, parameters = tuple(places[0]), tuple(names[0])
    chosen = [[at[layer] for layer in layers] for at in places]

    def by_layer(quantity: Literal["rms", "change"]) -> np.ndarray:
        return np.stack(
            [
                np.stack([np.asarray(getattr(each, quantity)[name][:, :, *i], float) for name, i in at], -1)
                for each, at in zip(measured, chosen, strict=True)
            ]
        )

    def by_parameter(quantity: Literal["parameter_norms", "parameter_changes"]) -> np.ndarray:
        none = np.zeros((len(seeds), measured[0].loss.shape[1], 0))
        rows = [
            [np.asarray(getattr(each, quantity)[own[name]], float)[..., None] for name in parameters]
            for each, own in zip(measured, names, strict=True)
        ]
        return np.stack([np.concatenate([none, *row], -1) for row in rows])

    # The place of each parameter in what was measured at each size.
    rows = [
        [list(each.parameter_norms).index(own[name]) for name in parameters]
        for each, own in zip(measured, names, strict=True)
    ]

    def effects(each: _Measured, rows: list[int], at: list[_Place]) -> np.ndarray:
        none = np.zeros((len(seeds), 0))
        found = [np.asarray(each.effects[name][:, :, *i])[:, rows] if rows else none for name, i in at]
        return np.stack(found, -1).astype(float)

    counts = [[each.sizes[name].flat[0] for name, _ in at] for each, at in zip(measured, chosen, strict=True)]
    losses = np.stack([each.loss for each in measured]).astype(float)
    descents = [each.descents[..., of_size] for each, of_size in zip(measured, rows, strict=True)]
    return WidthRecord(
        layers, np.array(sizes), np.array(seeds), by_layer("rms"), by_layer("change"), np.array(counts), losses,
        parameters, by_parameter("parameter_norms"), by_parameter("parameter_changes"),
        np.stack([effects(*each) for each in zip(measured, rows, chosen, strict=True)]), axis,
        np.stack(descents).astype(float),
    )  # fmt: skip
