"""What a record of several widths says about the parametrisation: the causes, before what follows from them.

What is judged, each by its exponent of the width:

1. The RMS norm of every activation before training. It is level where the initial scale is right.
2. What the first change of each parameter does, with all other parameters as they were: to the output of its own
   layer, where it is level if the learning rate is right, whatever the learning rates of others are (less what the
   gradient does, for steps that follow it, as those of SGD); and further on, where it stays level if nothing on the way
   enlarges it.
3. Where all this is level, what several steps together do to each activation.

An initial scale that is wrong changes what comes after it, and gradients before it, so it is a cause before any
learning rate. A parameter that moves later than others (since the readout starts at 0, say) follows them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from rmsjax._record import half_interval

if TYPE_CHECKING:
    from jaxtyping import Float

    from rmsjax._coord_check import WidthRecord

# Exponents of width come in halves (Yang and Hu, arXiv 2011.14522), so a slope belongs to the half that is nearest.
LEVEL = 0.25
SURE = 0.125  # and is a finding only if its whole interval is beyond this
_GONE = -0.75  # a sum over the width of random terms shrinks by the root of the width, a mean's change is level
_NOISE = 1e-6  # of the norm of an activation: what rounding does to it

Kind: TypeAlias = Literal["not finite", "initial scale", "learning rate", "passes on", "training"]


class Slopes(NamedTuple):
    """Exponents of width: their means over seeds, and the ends of the 95 % interval of Student's t around them."""

    mean: Float[np.ndarray, "steps layers"]
    low: Float[np.ndarray, "steps layers"]
    high: Float[np.ndarray, "steps layers"]


class Finding(NamedTuple):
    """Something that depends on the width: of which parameter or layer, what about it, as which power, and where.

    The interval is that of the power; the layer is the one at whose output it was seen. The axis is that of the record.
    """

    name: str
    kind: Kind
    power: float
    low: float
    high: float
    layer: str
    axis: str = "width"

    @property
    def word(self) -> str:
        """The verdict on the whole, if this is the first finding."""
        return "not finite" if self.kind == "not finite" else "grows" if self.power > 0 else "shrinks"

    def __str__(self) -> str:
        if self.kind == "not finite":
            return f"{self.name}: not finite"
        nearest = abs(round(2 * self.power) / 2)
        interval = f" ±{self.high - self.power:.2f}" if math.isfinite(self.high) else ""
        power = f"{self.axis}^{self.power:+.2f}{interval}"
        scales = f"{self.word} as {power}"
        does = "divide" if self.power > 0 else "multiply"
        by = f"by {self.axis}^{nearest:g}"
        return (
            f"{self.name}: "
            + {
                "initial scale": f"its initial scale is off by {power}: {does} it {by}",
                "learning rate": f"its learning rate is off by {power}: {does} it {by}",
                "passes on": f"what it makes of changes before it {scales}: {does} its scale {by}",
                "training": f"its change over all steps {scales}",
            }[self.kind]
        )


# ----------------------------------------------------------------------------------------------------------- statistics


def exponents(widths: np.ndarray, values: Any) -> np.ndarray:
    """The least-squares slope of log values against log widths along the first axis; 0 where all are 0."""
    x, y = np.log(widths) - np.mean(np.log(widths)), logs(np.asarray(values))
    return np.tensordot(x, y - y[0], 1) / np.sum(x**2)  # less the first, so that of equal values it is exactly 0


def logs(values: np.ndarray) -> np.ndarray:
    """Logarithms in which 0 counts as the smallest normal number: 0 at some widths only is a steep slope, not NaN."""
    found = np.log(np.maximum(values, np.finfo(np.float32).tiny, dtype=np.float64))
    return np.where(np.isfinite(values), found, np.nan)


def over_seeds(by_seed: np.ndarray) -> Slopes:
    mean, half = np.mean(by_seed, axis=0), half_interval(by_seed)
    return Slopes(mean, mean - half, mean + half)


def beyond(slopes: Slopes, level: float = LEVEL, sure: float = SURE) -> np.ndarray:
    """1 where a slope is a finding that grows, -1 where it is one that shrinks, else 0."""
    nearest = np.maximum(slopes.low, -slopes.high)
    is_sure = (nearest > level - LEVEL + sure) | ~np.isfinite(nearest)  # a single seed says nothing against it
    far = (np.abs(slopes.mean) > level) & is_sure
    return np.where(far, np.sign(slopes.mean), 0).astype(int)


# ------------------------------------------------------------------------------------------------------------ judgement


class _Layers:
    """The layers of a record in the order of the program, and which of them hold one another."""

    def __init__(self, record: WidthRecord) -> None:
        self.names = record.layers
        self.parts = [_parts(name) for name in self.names]
        self.order = _program_order([index for _, index in self.parts])
        self.place = {k: i for i, k in enumerate(self.order)}
        self._keeps_size = np.all(record.sizes == record.sizes[0], axis=0)
        # A sum over the width has a size that shows none; over depths all sizes are the same, and say nothing.
        self.is_sum = self._keeps_size & (record.axis == "width")
        self.outer = list(range(len(self.names)))
        for k, after in reversed(list(zip(self.order, self.order[1:], strict=False))):
            same = np.array_equal(record.sizes[:, k], record.sizes[:, after])
            if same and self._holds(after, k):
                self.outer[k] = self.outer[after]

    def _holds(self, outer: int, inner: int) -> bool:
        (path, index), (inside, other) = self.parts[outer], self.parts[inner]
        # Which has the name of its type, and no path.
        is_model = outer == self.order[-1] and bool(self._keeps_size[outer])
        return is_model or (index == other and inside[: len(path)] == path)

    def judged(self) -> Iterator[int]:
        """Those whose output is used as it is, not by a module around it that only scales it."""
        return (k for k in self.order if self.outer[k] == k)

    def owner(self, parameter: str) -> int | None:
        path, index = _parts(parameter)
        for n in range(len(path) - 1, 0, -1):
            for k, (parts, own) in enumerate(self.parts):
                if parts == path[:n] and own == index:
                    return k
        return None


def _parts(name: str) -> tuple[list[str], tuple[int, ...]]:
    """A path, and the iterations of loops behind it."""
    path, loops = re.fullmatch(r"(.*?)((?:\[\d+\])*)", name, re.DOTALL).groups()  # pyright: ignore
    return path.split("/"), tuple(map(int, re.findall(r"\d+", loops)))


def _program_order(loops: list[tuple[int, ...]]) -> list[int]:
    """Layers of a loop come together: all of its first iteration, then all of its second."""
    order: list[int] = []
    start = 0
    for k in range(1, len(loops) + 1):
        if k == len(loops) or bool(loops[k]) != bool(loops[start]):
            order += sorted(range(start, k), key=lambda i: loops[i])
            start = k
    return order


def judge(record: WidthRecord, sure: float = SURE) -> list[Finding]:
    """The causes, the first one first; none if all is level."""
    layers = _Layers(record)
    values = np.stack([record.rms, record.change])
    for k in layers.order:
        if not np.all(np.isfinite(values[..., -1, k])):
            return [Finding(record.layers[k], "not finite", np.nan, np.nan, np.nan, record.layers[k], record.axis)]
    effects = _Effects(record, layers)
    rates = _rates(record, layers, effects, sure)
    found = _initial(record, layers, effects, sure)
    if not found and (found := _enlarged(record, layers, effects, sure)):
        # What is before that layer has gradients that follow from it; its own learning rate is another matter.
        found += [finding for finding in rates if finding.layer == found[0].layer]
    return found or rates or _training(record, layers, effects, sure)


def is_in_doubt(record: WidthRecord) -> bool:
    """Whether the first finding is another by the means alone than by intervals that are nearer to a half than to 0."""
    if len(record.seeds) == 1:
        return [finding.kind for finding in judge(record)[:1]] != ["not finite"]
    by_mean, by_interval = ([(f.name, f.kind) for f in judge(record, sure)[:1]] for sure in (-math.inf, LEVEL))
    return by_mean != by_interval


def _finding(name: str, kind: Kind, slopes: Slopes, layer: int, record: WidthRecord) -> Finding:
    mean, low, high = (float(values[layer] if values.ndim else values) for values in map(np.asarray, slopes))
    return Finding(name, kind, mean, low, high, record.layers[layer], record.axis)


class _Effects:
    """What the first change of each parameter does to each layer, as exponents; and where its own layer is."""

    def __init__(self, record: WidthRecord, layers: _Layers) -> None:
        count = len(record.parameters)
        self.by_seed = exponents(record.widths, record.effects) if count else np.zeros((1, 0, len(layers.names)))
        reaches = record.effects > _NOISE * record.rms[:, :, :1] if count else np.zeros((1, *self.by_seed.shape), bool)
        self.reaches = np.all(reaches, axis=(0, 1))
        self.own = [self._own(layers, p, layers.owner(name)) for p, name in enumerate(record.parameters)]
        changes = record.parameter_changes
        # Weight decay moves a little what has no gradient yet.
        moves = np.any(changes > 0.05 * np.max(changes, 2, keepdims=True, initial=0), axis=(0, 1))
        self.step = [int(np.argmax(moves[:, p])) if moves[:, p].any() else record.steps + 1 for p in range(count)]
        self.seen = [None if own is None else self._seen(layers, p, own) for p, own in enumerate(self.own)]
        places = np.array([k or 0 for k in self.seen], int)
        self.on_own = self.by_seed[:, np.arange(count), places]
        self.reaction = self._reaction(record)

    def _own(self, layers: _Layers, p: int, owner: int | None) -> int | None:
        """The layer of a parameter: the one of its name or, if that has no output of its own, the first it reaches."""
        reached = [k for k in layers.order if self.reaches[p, k]]
        return owner if owner in reached or not reached else reached[0]

    def _seen(self, layers: _Layers, p: int, own: int) -> int | None:
        """Where the output of its layer is used, which a module around that may scale."""
        return next((k for k in (layers.outer[own], own) if self.reaches[p, k]), None)

    def _reaction(self, record: WidthRecord) -> np.ndarray:
        """How the loss reacts to a change of the output of each parameter's layer, as exponents [seeds, parameters].

        Of steps that are a multiple of the gradient, as those of SGD; else 0. They are as small as it is, and it need
        not be level: that of queries is a sum of random terms, until values and readout agree. This is no matter of the
        learning rate.
        """
        none = np.zeros_like(self.on_own)
        if len(record.seeds) == 1 or not record.descents.size:
            return none
        is_step = np.all(np.isfinite(record.descents) & (record.descents > 0), axis=2)
        gains, gradients, steps = np.moveaxis(np.where(is_step[:, :, None], record.descents, 1), 2, 0)
        rates, lengths = gains / gradients, steps / gains  # both are the learning rate, if the directions are the same
        spread = np.ptp(rates, axis=1, keepdims=True)
        follows = is_step & (lengths < 1.02 * rates) & (spread < 0.02 * rates)  # but for rounding
        return np.where(np.all(follows, axis=(0, 1)), exponents(record.widths, gains) - self.on_own, none)

    def owned(self, layers: _Layers, layer: int) -> list[int]:
        """The parameters of a layer, or of one in it whose output it scales."""
        return [p for p, own in enumerate(self.own) if own is not None and layers.outer[own] == layers.outer[layer]]


def _blamed(record: WidthRecord, layers: _Layers, effects: _Effects, layer: int) -> str | None:
    """The parameter of a layer whose initial values there are: no bias, and not 0 at the start."""
    own = [record.parameters[p] for p in effects.owned(layers, layer) if np.all(record.parameter_norms[:, :, 0, p] > 0)]
    return next((name for name in own if _parts(name)[0][-1] != "bias"), None)


def _initial(record: WidthRecord, layers: _Layers, effects: _Effects, sure: float) -> list[Finding]:
    slopes = over_seeds(exponents(record.widths, record.rms[:, :, 0]))
    signs = beyond(slopes, sure=sure)
    for k in layers.judged():
        # Sums over the width of what is random at the start are meant to vanish: a readout, attention scores.
        if signs[k] > 0 or (signs[k] < 0 and not layers.is_sum[k]):
            name = _blamed(record, layers, effects, k) or record.layers[k]
            return [_finding(name, "initial scale", slopes, k, record)]
    return []


def _enlarged(record: WidthRecord, layers: _Layers, effects: _Effects, sure: float) -> list[Finding]:
    judged = list(layers.judged())
    found: dict[int, list[np.ndarray]] = {}
    for p, own in enumerate(effects.own):
        if own is None or not effects.reaches[p, own]:
            continue
        start = layers.outer[own]
        for k in judged:
            if layers.place[k] <= layers.place[start] or not effects.reaches[p, k]:
                continue
            gain = effects.by_seed[:, p, k] - effects.by_seed[:, p, start]
            if beyond(over_seeds(gain), sure=sure) > 0:
                found.setdefault(k, []).append(gain)
                break
    if not found:
        return []
    k = min(found, key=layers.place.__getitem__)
    slopes = over_seeds(max(found[k], key=np.mean))
    name = _blamed(record, layers, effects, k)
    kind: Kind = "initial scale" if name else "passes on"
    return [_finding(name or record.layers[k], kind, slopes, k, record)]


def _rates(record: WidthRecord, layers: _Layers, effects: _Effects, sure: float) -> list[Finding]:
    found: list[tuple[int, int, Finding]] = []
    for p, (name, k) in enumerate(zip(record.parameters, effects.seen, strict=True)):
        if k is None:
            continue
        slopes = over_seeds(effects.on_own[:, p] - effects.reaction[:, p])
        if beyond(slopes, sure=sure):
            finding = _finding(name, "learning rate", slopes, k, record)
            found.append((effects.step[p], layers.place[k], finding))
    found.sort(key=lambda entry: entry[:2])
    return [finding for step, _, finding in found if step == found[0][0]]


def _training(record: WidthRecord, layers: _Layers, effects: _Effects, sure: float) -> list[Finding]:
    by_seed = exponents(record.widths, record.change[:, :, -1])
    slopes = over_seeds(by_seed)
    # Where parameters are known to move as they should, only what is plain speaks against it.
    level = LEVEL + SURE if record.parameters else LEVEL
    signs = beyond(slopes, level, sure)
    slow = np.zeros_like(by_seed)  # for a gradient that shrinks
    for p, k in enumerate(effects.seen):
        if k is not None:
            slow[:, k] = np.minimum(slow[:, k], effects.reaction[:, p])
    is_slow = beyond(over_seeds(by_seed - slow), level, sure) >= 0
    for k in layers.judged():
        sign = signs[k]
        if sign > 0 or (sign < 0 and not is_slow[k] and not (layers.is_sum[k] and slopes.mean[k] > _GONE)):
            return [_finding(record.layers[k], "training", slopes, k, record)]
    return []


# --------------------------------------------------------------------------------------------------------------- layers


def words(record: WidthRecord, at: Literal["mean", "low", "high", None] = None) -> list[str]:
    """What each layer does at the last step, by the rule for findings, or with slopes as they are at one end.

    A layer whose output a module around it scales does what that module does.
    """
    layers = _Layers(record)
    start, rms, change = (
        over_seeds(exponents(record.widths, values))
        for values in (record.rms[:, :, 0], record.rms[:, :, -1], record.change[:, :, -1])
    )
    if at is not None:
        start, rms, change = (Slopes(*[getattr(slopes, at)] * 3) for slopes in (start, rms, change))
    changes = np.any(record.change[:, :, -1] != 0, axis=(0, 1))
    finite = np.all(np.isfinite(record.rms[:, :, -1] + record.change[:, :, -1]), axis=(0, 1))
    grows = (beyond(rms) > 0) | (beyond(change) > 0)
    vanishes = np.where(layers.is_sum, changes & (change.mean < _GONE), True)
    shrinks = vanishes & ((beyond(start) < 0) | (changes & (beyond(change) < 0)))
    found = np.select([~finite, grows, shrinks], ["not finite", "grows", "shrinks"], "level")
    return [str(found[k if not finite[k] else layers.outer[k]]) for k in range(len(found))]
