"""The coordinate check: what the records say, how they are judged, and that the verdicts come out right."""

import dataclasses
import functools
import importlib
import math
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from scipy import stats

import rmsjax
from rmsjax import SweepRecord, WidthRecord, _coord_check, _models, _training, compare_widths, coord_check
from rmsjax._verdicts import Finding
from tests.helpers.marks import slow
from tests.helpers.parametrisations import (
    ResidualMLP,
    Transformer,
    adam,
    cross_entropy,
    digits,
    zen_of_python,
)
from tests.helpers.records import cut

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def promotion(strict):
    """optax's Adam needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def check(make_model, batch=(X, X[:, :1]), **kwargs):
    given = {"widths": [8, 16], "make_optimizer": lambda width: optax.sgd(0.1), "loss": optax.l2_loss, "steps": 2}
    return coord_check(make_model, batch, **{"seeds": 2, "progress": False} | given | kwargs)


def record_of(exponents, changes=None, *, noise=0.0, seeds=3, widths=(64, 128, 256, 512)):
    """Norms that are powers of the width, times noise; one step, and one layer for each exponent."""
    rng, w = np.random.default_rng(0), np.array(widths)
    shape = (len(widths), seeds, 2, len(exponents))
    powers = [np.power(w[:, None, None, None], np.asarray(p, float)) for p in (exponents, changes or exponents)]
    rms, change = (0.3 * power * np.exp(noise * rng.normal(size=shape)) for power in powers)
    change[:, :, 0] = 0
    layers = tuple(f"layer{i}" for i in range(len(exponents)))
    sizes = np.repeat(w[:, None], len(exponents), 1)
    return WidthRecord(layers, w, np.arange(seeds), rms, change, sizes, np.ones(shape[:3]))


# ----------------------------------------------------------------------------------------------------------- acceptance


def train(model, mup, widths, seeds, **kwargs):
    make, batch = {"mlp": (ResidualMLP, digits()), "transformer": (Transformer, zen_of_python())}[model]
    return coord_check(
        lambda width, rngs: make(width, rngs, mup=mup, **kwargs),
        batch, widths=widths, seeds=seeds, make_optimizer=functools.partial(adam, mup=mup), loss=cross_entropy,
        progress=False,
    )  # fmt: skip


def seed_sets(record, count):
    """The record cut into records of `count` seeds each."""
    for i in range(0, len(record.seeds), count):
        yield cut(record, slice(i, i + count))


class NumpyMLP:
    """`ResidualMLP` by itself: forward, backward and Adam in float64."""

    def __init__(self, width, seed, *, mup, blocks):
        model = ResidualMLP(width, nnx.Rngs(jax.random.key(seed)), mup=mup, blocks=blocks)
        self.blocks = [f"block{i}" for i in range(blocks)]
        names = ["embed", *(f"{block}/{part}" for block in self.blocks for part in ("up", "down")), "readout/linear"]
        self.kernel, self.bias = {}, {}
        for name in names:
            layer = functools.reduce(getattr, name.split("/"), model)
            self.kernel[name], self.bias[name] = (np.float64(p[...]) for p in (layer.kernel, layer.bias))
        self.multiplier = 64 / width if mup else 1.0
        self.rate = {name: 64 / width if mup and name.startswith("block") else 1.0 for name in names}
        self.moments = {}

    def dense(self, name, x):
        self.inputs[name] = x
        self.outputs[name] = x @ self.kernel[name] + self.bias[name]
        return self.outputs[name]

    def forward(self, x):
        self.inputs, self.outputs = {}, {}
        x = self.dense("embed", x)
        for block in self.blocks:
            branch = self.dense(f"{block}/down", np.maximum(self.dense(f"{block}/up", x), 0))
            self.outputs[block] = branch
            x = x + branch
        self.outputs["ResidualMLP"] = self.outputs["readout"] = self.dense("readout/linear", self.multiplier * x)
        return dict(self.outputs)

    def backward(self, labels):
        logits = self.outputs["ResidualMLP"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        cotangent = (p / p.sum(1, keepdims=True) - np.eye(logits.shape[1])[labels]) / len(labels)
        self.grads = {}
        stream = self.multiplier * self.back("readout/linear", cotangent)
        for block in reversed(self.blocks):
            inner = self.back(f"{block}/down", stream) * (self.inputs[f"{block}/down"] > 0)
            stream = stream + self.back(f"{block}/up", inner)
        self.back("embed", stream)

    def back(self, name, cotangent):
        self.grads[name] = (self.inputs[name].T @ cotangent, cotangent.sum(0))
        return cotangent @ self.kernel[name].T

    def adam(self, step, learning_rate=2e-3):
        for name, grads in self.grads.items():
            rates = (self.rate[name], 1.0)
            for params, g, rate in zip((self.kernel, self.bias), grads, rates, strict=True):
                key = (name, g.ndim)
                m, v = self.moments.get(key, (0.0, 0.0))
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                self.moments[key] = (m, v)
                corrected = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
                params[name] = params[name] - learning_rate * rate * corrected


def numpy_slopes(record, mup, seeds, blocks):
    """Slopes of RMS and of change at each step, by `np.polyfit` on what float64 numpy makes of the same start."""
    x, labels = digits()
    norms = np.zeros((2, *record.rms[:, : len(seeds)].shape))
    for w, width in enumerate(record.widths):
        for s, seed in enumerate(seeds):
            model = NumpyMLP(width, seed, mup=mup, blocks=blocks)
            first = None
            for step in range(record.steps + 1):
                outputs = model.forward(np.float64(x))
                first = first or outputs
                for k, layer in enumerate(record.layers):
                    values = (outputs[layer], outputs[layer] - first[layer])
                    norms[:, w, s, step, k] = [math.sqrt(np.mean(v**2)) for v in values]
                if step < record.steps:
                    model.backward(labels)
                    model.adam(step + 1)

    def slopes(values):
        flat = np.log(np.where(values == 0, 1, values)).reshape(len(record.widths), -1)  # 0 at every width: slope 0
        return np.polyfit(np.log(record.widths), flat, 1)[0].reshape(values.shape[1:])

    return slopes(norms[0]), slopes(norms[1][:, :, 1:])


def assert_slopes_agree(record, mup, seeds, blocks):
    ours = cut(record, slice(len(seeds)))
    rms, change = numpy_slopes(ours, mup, seeds, blocks)
    differences = [ours.slopes("rms").mean - rms.mean(0), ours.slopes("change").mean[1:] - change.mean(0)]
    worst = max(np.max(np.abs(d)) for d in differences)
    assert worst < 0.05, worst
    return worst


VERDICTS = pytest.mark.parametrize(("mup", "verdict"), [(False, "grows"), (True, "level")])


@pytest.mark.slow
@VERDICTS
def test_transformer_on_bytes(mup, verdict):
    record = train("transformer", mup, [64, 256], 15, blocks=1)
    assert [part.verdict for part in seed_sets(record, 3)] == [verdict] * 5


@pytest.mark.slow
@VERDICTS
@pytest.mark.usefixtures("quick_programs")
def test_mlp_on_digits(mup, verdict):
    """Every set of three seeds says so, of five widths, of every other and of two neighbours."""
    trained = train("mlp", mup, [64, 128, 256, 512, 1024], 15, blocks=2)
    assert np.all(trained.loss[:, :, -1] < trained.loss[:, :, 0]) or not mup
    for widths in (slice(None), slice(None, None, 2), slice(2)):
        assert [part.verdict for part in seed_sets(cut(trained, widths=widths), 3)] == [verdict] * 5
    print("worst difference of a slope from numpy's:", assert_slopes_agree(trained, mup, [0, 1, 2], blocks=2))


# --------------------------------------------------------------------------------------------------------------- slopes


def test_slopes_of_powers_are_their_exponents():
    exponents = [-1.0, -0.5, 0.0, 0.3, 2.0]
    slopes = record_of(exponents).slopes("rms")
    for values in slopes:
        np.testing.assert_allclose(values, [exponents] * 2, atol=1e-12)


def test_slopes_are_least_squares_with_students_interval():
    record = record_of([0.0, 1.0], noise=0.3, seeds=5)
    x, layer = np.log(record.widths), 1
    fits = [stats.linregress(x, np.log(record.rms[:, s, 1, layer])).slope for s in range(5)]
    mean, low, high = (values[1, layer] for values in record.slopes("rms"))
    assert mean == pytest.approx(np.mean(fits))
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 4, np.mean(fits), stats.sem(fits)))


def test_one_seed_has_no_interval():
    record = record_of([0.0, 1.0], seeds=1)
    _, low, high = record.slopes()
    assert np.all(low == -np.inf)
    assert np.all(high == np.inf)
    assert record.verdict == "grows"
    assert record.doubtful == record.layers


def test_mean_over_seeds_is_that_of_the_slopes():
    record = record_of([0.5], noise=0.5)
    means = record.over_seeds("change")
    slope = np.polyfit(np.log(record.widths), np.log(means[:, 1, 0]), 1)[0]
    assert slope == pytest.approx(record.slopes("change").mean[1, 0])
    assert np.all(means[:, 0] == 0)


# ------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("rms", "change", "verdict"),
    [
        (0.0, 0.0, "level"),
        (0.24, -0.24, "level"),
        (0.26, 0.0, "grows"),
        (0.0, 0.26, "grows"),
        (0.0, -0.26, "shrinks"),
        (-0.5, 0.0, "shrinks"),
        (-0.5, -0.5, "shrinks"),
        (0.5, -0.5, "grows"),
    ],
)
def test_verdict_of_a_layer(rms, change, verdict):
    record = record_of([rms], [change])
    assert record.verdicts == {"layer0": verdict}
    assert record.verdict == verdict
    assert not record.doubtful


def over_depths(record):
    """The same norms of models whose layers have one size at every depth."""
    return dataclasses.replace(record, axis="depth", sizes=np.full_like(record.sizes, 64))


@pytest.mark.parametrize(("rms", "change"), [(-0.5, 0.0), (0.0, -0.5), (-0.5, -0.5)])
def test_only_over_widths_a_layer_of_one_size_is_a_sum(rms, change):
    """Which may shrink as sums of random terms do; over depths all layers have one size, and none may."""
    deep = over_depths(record_of([rms], [change]))
    assert (deep.verdict, deep.verdicts) == ("shrinks", {"layer0": "shrinks"})
    wide = dataclasses.replace(deep, axis="width")
    assert (wide.verdict, wide.verdicts) == ("level", {"layer0": "level"})


@pytest.mark.parametrize(("rms", "verdict"), [(-0.5, "shrinks"), (0.0, "level"), (0.5, "grows")])
def test_a_layer_that_does_not_change_is_judged_by_its_norm(rms, verdict):
    record = record_of([rms])
    record.change[:] = 0
    assert record.verdict == verdict
    assert np.all(record.slopes("change").mean == 0)


def test_the_whole_is_as_its_worst_layer():
    record = record_of([0.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 0.0])
    assert list(record.verdicts.values()) == ["level", "shrinks", "grows", "level"]
    assert record.verdict == "grows"
    assert record_of([0.0, 0.0], [0.0, -1.0]).verdict == "shrinks"


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("quantities", [["rms"], ["change"], ["rms", "change"]], ids=str)
@pytest.mark.parametrize("where", [np.s_[-1, 0], np.s_[0, :], np.s_[:, :]], ids=str)
def test_what_is_not_finite_is_said(value, quantities, where):
    record = record_of([0.0, 1.0])
    for quantity in quantities:
        getattr(record, quantity)[*where, -1, 0] = value
    assert record.verdicts == {"layer0": "not finite", "layer1": "grows"}
    assert record.verdict == "not finite"
    assert record.doubtful == ()
    assert "not finite" in str(record)


class LogarithmOfZero(nnx.Module):
    """Minus infinity at step 0, finite ever after, with the derivative of the identity."""

    def __init__(self, width, rngs):
        self.layer = nnx.Linear(8, width, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        h = self.layer(x)
        fixed = jax.lax.stop_gradient(h)
        return jnp.log(jnp.abs(fixed)) + h - fixed


def test_a_change_from_infinity_is_not_finite():
    record = check(LogarithmOfZero, loss=lambda output, target: jnp.mean(output))
    assert np.isfinite(record.rms[:, :, -1]).all()
    assert record.verdicts["LogarithmOfZero"] == record.verdict == "not finite"


def test_zero_at_some_widths_is_a_slope():
    record = record_of([0.0, 0.0, 0.0])
    record.change[-1, :, :, 0] = 0
    record.change[0, :, :, 1] = 0
    assert list(record.verdicts.values()) == ["shrinks", "grows", "level"]


def test_noise_makes_doubt_and_seeds_remove_it():
    few, many = (record_of([0.0, 0.4], noise=0.5, seeds=seeds) for seeds in (3, 100))
    assert few.doubtful
    assert not many.doubtful
    assert list(many.verdicts.values()) == ["level", "grows"]
    for row, layer in zip(str(few).splitlines()[4:], few.layers, strict=False):
        assert row.endswith("?") == (layer in few.doubtful)
    assert "use more than 3 seeds" in " ".join(str(few).split())  # it may go over lines


@pytest.mark.parametrize(
    ("exponent", "noise", "seeds", "in_doubt"),
    [
        (0.0, 0.01, 3, False),
        (0.5, 0.01, 3, False),
        (0.27, 0.5, 3, True),  # no finding, as the interval is wide; by the mean it is one
        (0.3, 0.1, 3, True),  # a finding, of which not all is nearer to 1/2 than to 0
        (0.3, 0.1, 100, False),
        (0.0, 0.01, 1, True),  # no interval
    ],
)
def test_a_record_is_in_doubt_if_its_finding_is(exponent, noise, seeds, in_doubt):
    assert record_of([exponent], noise=noise, seeds=seeds).in_doubt == in_doubt


class OfRandomPower(nnx.Module):
    """A layer that scales with the width, with an exponent that depends on the seed, beside one that does not."""

    def __init__(self, width, rngs, mean, spread):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.factor = width ** (mean + spread * jax.random.normal(rngs.params()))

    def __call__(self, x):
        return self.factor * self.linear(x)


@pytest.mark.parametrize(("mean", "spread", "seeds"), [(0.2, 0.3, 6), (0.5, 1e-3, 2)])
def test_more_seeds_where_in_doubt(mean, spread, seeds):
    """The same as if these had been asked for, from programs that are traced once."""
    made = []

    def make_model(width, rngs):
        made.append(width)
        return OfRandomPower(width, rngs, mean, spread)

    batch = (X, X)
    record = check(make_model, batch, seeds=2, max_seeds=7)
    assert record.seeds.tolist() == list(range(seeds))
    once = len(made)
    expected = check(make_model, batch, seeds=range(seeds))  # which are named, and in doubt as well
    assert len(made) == 2 * once
    assert len(expected.seeds) == seeds
    for name in ("rms", "change", "loss", "effects", "parameter_norms", "descents"):
        np.testing.assert_allclose(getattr(record, name), getattr(expected, name), rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- records


def test_text():
    record = record_of([0.0, 1.0], [0.0, -0.5])
    lines = str(record).splitlines()
    assert lines[3].split("  ")[0] == "layer"
    assert lines[5].split() == ["layer1", "+1.00", "±0.00", "+1.00", "±0.00", "-0.50", "±0.00", "grows"]
    assert len({len(line) for line in lines[3:6]}) == 1
    assert lines[-2:] == [
        "verdict: grows (1 of 2 layers)",
        "- layer1: its initial scale is off by width^+1.00 ±0.00: divide it by width^1",
    ]


@pytest.mark.parametrize("layer", [0.0, 0.5])
def test_text_of_a_finding_that_no_layer_shows(layer):
    """What a parameter does by itself may be hidden in the layer, which is level; then no number of layers is given."""
    plain = record_of([0.0], [layer])
    norms, effects = np.ones((*plain.change.shape[:3], 1)), np.ones((4, 3, 1, 1)) * plain.widths[:, None, None, None]
    moved = norms * np.arange(2)[:, None]
    given = {"parameters": ("layer0/kernel",), "parameter_norms": norms, "parameter_changes": moved, "effects": effects}
    record = dataclasses.replace(plain, **given)
    assert [finding.kind for finding in record.findings] == ["learning rate"]
    where = "" if layer == 0 else " (1 of 1 layer)"
    assert f"verdict: grows{where}\n- layer0/kernel: its learning rate is off" in str(record)


@pytest.mark.parametrize("changes", [(0.5, 0.5), (0.0, -0.5), (0.0, np.nan)])
@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5])
def test_text_speaks_of_the_axis_of_the_record(power, changes):
    wide = record_of([0.0, power], changes)
    wide.rms[:] *= np.where(np.isnan(changes), np.nan, 1)
    deep = over_depths(wide)
    assert {finding.axis for finding in deep.findings} <= {"depth"}
    assert "width" in str(wide)
    assert "width" not in str(deep)
    assert "width" not in " ".join(map(str, deep.findings))


@pytest.mark.parametrize("kind", ["not finite", "initial scale", "learning rate", "passes on", "training"])
def test_every_finding_speaks_of_its_axis(kind):
    wide, deep = (str(Finding("w", kind, 0.5, 0.4, 0.6, "layer", axis)) for axis in ("width", "depth"))
    assert deep == wide.replace("width", "depth")
    assert "width" not in deep


def test_width_table():
    record = record_of([0.0], widths=(16, 64))
    header, row = (line.split("  ") for line in record.width_table().splitlines())
    assert [cell.strip() for cell in header if cell] == [
        "layer",
        "RMS 16",
        "RMS 64",
        "slope",
        "L2 16",
        "L2 64",
        "slope",
    ]
    assert [cell.strip() for cell in row if cell] == ["layer0", "0.3", "0.3", "+0.00", "1.2", "2.4", "+0.50"]
    assert record.width_table(-2) == record.width_table(0) == record.width_table()
    for step in (2, -3):
        with pytest.raises(ValueError, match=f"step must be one of 0 to 1, or -1 for the last, got {step}"):
            record.width_table(step)


def test_to_dict_has_a_row_for_each_norm():
    record = record_of([0.0, 1.0], noise=0.1)
    columns = record.to_dict()
    assert {len(column) for column in columns.values()} == {record.rms.size}
    picked = (
        (columns["width"] == 256) & (columns["seed"] == 2) & (columns["step"] == 1) & (columns["layer"] == "layer1")
    )
    assert np.flatnonzero(picked).size == 1
    for name, values in (("rms", record.rms), ("change", record.change), ("l2", record.l2)):
        assert columns[name][picked] == values[2, 2, 1, 1]


def test_history():
    record = record_of([0.0, 1.0], noise=0.1)
    history = record.history(128, "change")
    assert list(history) == list(record.layers)
    np.testing.assert_array_equal(history["layer1"], record.over_seeds("change")[1, :, 1])
    with pytest.raises(ValueError, match=r"width must be one of \[64, 128, 256, 512\], got 100"):
        record.history(100)


def test_save_and_load(tmp_path):
    record = record_of([0.0, 1.0], noise=0.1)
    path = tmp_path / "record"
    record.save(path)
    loaded = WidthRecord.load(path)
    assert str(loaded) == str(record)
    for field in dataclasses.fields(record):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(record, field.name))
    assert [p.name for p in tmp_path.iterdir()] == ["record"]


def test_a_file_that_holds_something_else(tmp_path):
    sweep = SweepRecord(np.array([8, 16]), np.array([0]), np.array([0.1, 0.2]), np.ones((2, 1, 2, 1)))
    sweep.save(tmp_path / "sweep")
    (tmp_path / "text").write_text("no record")
    for name, holds in (("sweep", "one with widths, seeds, learning_rates"), ("text", "another file")):
        with pytest.raises(ValueError, match=f"^WidthRecord: path must be a file that .*, got {holds}.*{name}$"):
            WidthRecord.load(tmp_path / name)


def test_a_quantity_that_there_is_not():
    for of in (WidthRecord.slopes, WidthRecord.over_seeds):
        with pytest.raises(ValueError, match="WidthRecord: quantity must be one of rms, change, l2, got 'chg'"):
            of(record_of([0.0]), "chg")


# -------------------------------------------------------------------------------------------------------------- running


class Frozen(nnx.Module):
    """One layer that no gradient reaches, one behind a dropout, a stack of layers in a loop, and a tree."""

    def __init__(self, width, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def layer(key):
            return nnx.Linear(width, width, rngs=nnx.Rngs(key))

        self.frozen = nnx.Linear(8, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.stack = layer(jax.random.split(rngs.params(), 3))
        self.pair = Pair()
        self.out = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        x = jax.lax.stop_gradient(self.frozen(x))
        x = self.dropout(x)
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)
        return self.out(self.pair(x)["double"])


class Pair(nnx.Module):
    def __call__(self, x):
        return {"double": 2 * x, "largest": jnp.argmax(x, -1), "half": x.astype(jnp.float16)}


@pytest.mark.slow
def test_layers_of_all_kinds():
    calls = []

    def make_model(width, rngs):
        calls.append(width)
        return Frozen(width, rngs)

    record = check(make_model, widths=[32, 16], seeds=[3, 5], steps=3, make_optimizer=lambda width: optax.sgd(1e-4))
    assert calls == [16, 32]
    assert record.rms.shape == (2, 2, 4, len(record.layers))
    assert record.widths.tolist() == [16, 32]
    assert record.seeds.tolist() == [3, 5]
    change = dict(zip(record.layers, np.moveaxis(record.change, -1, 0), strict=True))
    rms = dict(zip(record.layers, np.moveaxis(record.rms, -1, 0), strict=True))
    loops = [layer for layer in record.layers if layer.startswith("stack")]
    pairs = [layer for layer in record.layers if layer.startswith("pair")]
    assert len(loops) == 3, record.layers
    assert len(pairs) == 2, record.layers
    assert np.all(change["frozen"] == 0)
    assert np.all(change["dropout"] == 0)  # the same mask at every step
    assert np.all(rms["frozen"] > 0)
    for layer in (*loops, *pairs, "out"):
        assert np.all(change[layer][:, :, 0] == 0)
        assert np.all(change[layer][:, :, 1:] > 0)
    np.testing.assert_allclose(rms[pairs[0]], 2 * rms[pairs[1]], rtol=1e-3)
    sizes = dict(zip(record.layers, record.sizes.T.tolist(), strict=True))
    assert sizes["frozen"] == sizes[loops[0]] == [16, 32]
    assert sizes["out"] == [1, 1]
    assert np.all(np.diff(record.loss[:, :, [0, -1]]) < 0)


@jax.tree_util.register_pytree_node_class
class Distribution:
    """What is no array is no child, but a part of the structure."""

    def __init__(self, logits):
        self.logits = logits

    def tree_flatten(self):
        return ([self.logits], None) if isinstance(self.logits, jax.Array) else ([], self.logits)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children) if children else cls(aux)


class Policy(nnx.Module):
    def __init__(self, width, rngs):
        self.policy, self.value = nnx.Linear(8, width, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return Distribution(self.policy(x)), self.value(x)


def test_outputs_that_keep_what_is_no_array_in_their_structure():
    record = check(Policy, loss=lambda output, y: jnp.mean(output[0].logits ** 2) + optax.l2_loss(output[1], y))
    assert record.layers == ("policy", "value", "Policy[0][<flat index 0>]", "Policy[1]")
    np.testing.assert_array_equal(record.rms[..., 2:], record.rms[..., :2])
    np.testing.assert_array_equal(record.sizes, [[8, 1, 8, 1], [16, 1, 16, 1]])


class LinenModel(nn.Module):
    sizes: list[int]  # which has no hash

    @nn.compact
    def __call__(self, x):
        for size in self.sizes:
            x = nn.Dense(size)(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(x))


class Resharded(nnx.Module):
    def __init__(self, spec):
        self.spec = spec

    def __call__(self, x):
        return x if self.spec is None else jax.sharding.reshard(x, self.spec)


class SplitModel(nnx.Module):
    """Its hidden layer is split over devices in its own way."""

    def __init__(self, width, rngs, hidden=None, rows=None):
        self.first, self.last = (nnx.Linear(*sizes, rngs=rngs) for sizes in ((8, width), (width, 1)))
        self.split, self.together = Resharded(hidden), Resharded(rows)

    def __call__(self, x):
        return self.last(self.together(self.split(self.first(x))))


BLOCKS = np.stack([X, 2 * X, -X, X + 1], 1)  # of three axes, so that axes are merged
BATCH = BLOCKS, BLOCKS[..., :1]


@functools.cache
def unsplit():
    return check(SplitModel, BATCH)


def check_split(kind, rows, hidden=None):
    """As on one device."""
    want = unsplit()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        arrays = jax.device_put(BATCH, jax.NamedSharding(mesh, rows))
        found = check(functools.partial(SplitModel, hidden=hidden, rows=hidden and rows), arrays)
    assert found.layers == want.layers
    np.testing.assert_allclose(found.rms, want.rms, rtol=1e-5)
    np.testing.assert_allclose(found.change, want.change, rtol=1e-5, atol=1e-7)


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        slow(AUTO, P("data")),
        slow(EXPLICIT, P("data")),
        slow(EXPLICIT, P(("data", "model"))),
        (EXPLICIT, P("data", "model")),
    ],
    ids=str,
)
def test_batches_on_several_devices(kind, rows):
    check_split(kind, rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hidden",
    [P(None, "data", "model"), slow(P("data", None, "model")), slow(P("model", "data"))],
    ids=str,
)
def test_activations_on_several_devices(hidden):
    check_split(EXPLICIT, P("data"), hidden)


@pytest.mark.slow
def test_linen():
    record = check(lambda width, rngs: LinenModel([width]), make_optimizer=lambda width: optax.sgd(0.0))
    assert record.layers == ("Dense_0", "BatchNorm_0", "Dropout_0", "Dense_1", "LinenModel")
    assert np.all(record.change == 0)
    np.testing.assert_allclose(record.rms[..., record.layers.index("BatchNorm_0")], 1, atol=1e-2)


def test_trains_like_a_plain_loop():
    """The norms are those of a model that is trained by hand, one seed at a time; the optimizer takes no extras."""
    record = check(lambda width, rngs: nnx.Linear(8, width, rngs=rngs), batch=(X, X), widths=[8, 9],
                   loss=lambda y, x: jnp.sum(y[:, :8] - x, -1) ** 2, seeds=[7],
                   make_optimizer=lambda width: optax.scale(-0.1))  # fmt: skip
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(jax.random.key(7)))
    kernel, bias = np.float64(layer.kernel[...]), np.zeros(8)
    first = X @ kernel + bias
    for step in range(3):
        y = X @ kernel + bias
        error = np.sum(y - X, -1)
        assert record.loss[0, 0, step] == pytest.approx(np.mean(error**2), rel=1e-4)
        assert record.rms[0, 0, step, 0] == pytest.approx(math.sqrt(np.mean(y**2)), rel=1e-4)
        assert record.change[0, 0, step, 0] == pytest.approx(math.sqrt(np.mean((y - first) ** 2)), rel=1e-4)
        cotangent = np.repeat(2 * error[:, None] / len(X), 8, 1)
        kernel, bias = kernel - 0.1 * X.T @ cotangent, bias - 0.1 * cotangent.sum(0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_changes_are_exact_in_narrow_types(dtype):
    """That of a sign does not overflow, nor is one of a last place lost."""
    info = jnp.finfo(dtype)
    large = 2.0 ** min(int(info.maxexp) - 1, 126)
    x, y = (np.array(values, dtype) for values in ([large, 1 + float(info.eps)], [-large, -1.0]))
    change = _coord_check._difference(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_array_equal(change, np.float64(x) - np.float64(y))


def test_arguments_of_all_kinds(capsys):
    """Several of them, a flag; a method for a model, a count from numpy, an optimizer that asks for more; float16."""

    class Sum(nnx.Module):
        def __init__(self, width, rngs):
            self.layer = nnx.Linear(8, width, rngs=rngs, dtype=jnp.float16)

        def add(self, x, y, double):
            return 3e3 * self.layer(x + y if double else x)

    def update(updates, state, params, *, value, grad, value_fn):
        right = (jnp.abs(value_fn(params) - value) <= 1e-5 * jnp.abs(value)) & (grad is updates)
        return jax.tree.map(lambda g: jnp.where(right, -g, jnp.nan), updates), state

    record = check(
        lambda width, rngs: Sum(width, rngs).add,
        batch=(X, 2 * X, True, X),
        loss=lambda y, x: 1e-4 * y.mean(),
        seeds=np.int64(2),
        make_optimizer=lambda width: optax.GradientTransformationExtraArgs(lambda params: (), update),
        progress=True,
    )
    assert record.layers == ("layer", "Sum.add")
    assert record.seeds.tolist() == [0, 1]
    assert np.all(np.isfinite(record.rms))
    assert np.all(record.change[:, :, 1:] > 0)
    assert np.all(record.rms[..., 1] > 1e3)  # a sum of squares of these is not a float16
    assert "2/2" in capsys.readouterr().err  # the bar reached its end


def test_no_bar(capsys, monkeypatch):
    assert list(_training.with_bar("coord_check", "width", [8, 16], progress=False)) == [8, 16]
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # as if it were not installed
    assert list(_training.with_bar("coord_check", "width", [8, 16], progress=True)) == [8, 16]
    assert capsys.readouterr() == ("", "")


def test_only_norms_leave_the_program():
    call = _training.Call((X,), {}, X[:, :1])
    make_model = functools.partial(Frozen, 64)
    train = functools.partial(_coord_check._train, make_model, optax.adam(1e-3), optax.l2_loss, 4, "width", call)
    leaves = jax.tree.leaves(jax.eval_shape(train, jax.random.key(0)))
    assert max(math.prod(leaf.shape) for leaf in leaves) == 10 * 3  # what ten parameters do to three layers of a loop


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"widths": [8]}, ValueError, r"coord_check: widths must be 2 or more, none of them twice, got \[8\]"),
        ({"widths": [8, 8]}, ValueError, "widths must be .* none of them twice"),
        ({"widths": [0, 8]}, ValueError, "widths must be at least 1, got 0"),
        ({"widths": [8, 16.0]}, TypeError, "widths must be integers"),
        ({"seeds": 0}, ValueError, "seeds must be at least 1, got 0"),
        ({"seeds": []}, ValueError, r"seeds must be 1 or more, .* got \[\]"),
        ({"seeds": 1.5}, TypeError, "seeds must be integers"),
        ({"seeds": [1, 1]}, ValueError, "seeds must be .* none of them twice"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be integers"),
        ({"batch": (X,)}, ValueError, r"batch must be a tuple such as \(x, labels\)"),
        ({"batch": [X]}, ValueError, "batch must be a tuple .* got a list of 1$"),
        ({"batch": {"x": X, "y": X}}, ValueError, "batch must be a tuple .* got a dict with the keys 'x', 'y'$"),
        ({"batch": X}, ValueError, r"batch must be a tuple .* got an array of shape \(16, 8\) and dtype float32$"),
        (
            {"make_optimizer": optax.adam(1e-3)},
            TypeError,
            r"make_optimizer must be a function \(width\), got a GradientTransformation\w*; write lambda width: optax",
        ),
        (
            {"make_optimizer": lambda: optax.sgd(1)},
            TypeError,
            r"make_optimizer must be .*, got <lambda>\(\); write",
        ),
        ({"make_optimizer": lambda width: 1e-3}, TypeError, "make_optimizer must return an optax .*, got 0.001$"),
        (
            {"make_model": nnx.Linear(8, 8, rngs=nnx.Rngs(0))},
            TypeError,
            "make_model must be .*, got a Linear; write",
        ),
        (
            {"make_model": nn.Dense(8)},
            TypeError,
            r"make_model must be .* \(width, rngs\), got a Dense; write",
        ),
        (
            {"make_model": lambda width: nn.Dense(width)},
            TypeError,
            r"make_model must be .*, got <lambda>\(width\); w",
        ),
        (
            {"loss": lambda params, x, y: 0.0},
            TypeError,
            r"loss must be .* \(output, target\), got <lambda>\(params",
        ),
        ({"loss": 1.0}, TypeError, "loss must be a function .*, got 1.0; write lambda output, target"),
        (
            {"make_model": lambda width, rngs: jnp.tanh},
            TypeError,
            "make_model must return a Flax module, got the function tanh",
        ),
        ({"make_model": lambda width, rngs: None}, TypeError, "make_model must return a Flax module, got None"),
        ({"make_optimizer": optax.adam}, TypeError, "make_optimizer must be .*, got adam, which takes a learning rate"),
        (
            {"make_optimizer": functools.partial(optax.adam, b1=0.5)},
            TypeError,
            "make_optimizer must be .*, got partial, which takes a learning rate",
        ),
        ({"max_seeds": 0}, ValueError, "max_seeds must be at least 1, got 0"),
        (
            {"make_model": lambda width, rngs: nnx.Linear(8, 8, rngs=rngs), "batch": (X, X)},
            ValueError,
            "the model must depend on the width, got the same layers with the same norms",
        ),
    ],
)
def test_errors(kwargs, error, message):
    kwargs = {"make_model": lambda width, rngs: nnx.Linear(8, width, rngs=rngs)} | kwargs
    with pytest.raises(error, match=message) as raised:
        check(**kwargs)
    assert str(raised.value).startswith("coord_check: ")


def test_an_error_in_the_loss_says_what_it_was_given():
    with pytest.raises(ValueError, match="mismatch") as raised:
        check(lambda width, rngs: nnx.Linear(8, width, rngs=rngs), loss=optax.l2_loss)
    (note,) = (note for note in raised.value.__notes__ if note.startswith("coord_check"))
    assert "output, an array of shape (16, 8) and dtype float32, and target, an array of shape (16, 1)" in note


@pytest.mark.parametrize(
    ("batch", "kwargs", "given"),
    [
        ((X, X, X), {}, "an array of shape (16, 8) and dtype float32, an array of"),
        ((X[:, :3], X), {"unknown": 1}, "(16, 3) and dtype float32, unknown=1"),
    ],
)
def test_an_error_in_the_model_says_what_it_was_called_with(batch, kwargs, given):
    def make_model(width, rngs):
        return nnx.Sequential(nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, 8, rngs=rngs))

    with pytest.raises((TypeError, ValueError)) as raised:
        check(make_model, batch, kwargs=kwargs)
    (note,) = (note for note in raised.value.__notes__ if note.startswith("coord_check: the model was called with"))
    assert given in note


# ------------------------------------------------------------------------------------------------------- compare_widths


def test_compare_widths_measures_models_as_they_are():
    models = {
        width: [nnx.Sequential(nnx.Linear(8, width, rngs=nnx.Rngs(seed)), nnx.relu) for seed in range(2)]
        for width in (32, 8)
    }
    record = compare_widths(models, X)
    assert record.layers == ("layers/0", "Sequential")
    assert record.rms.shape == (2, 2, 1, 2)
    for w, width in enumerate((8, 32)):
        for seed in range(2):
            y = np.float64(X) @ np.float64(models[width][seed].layers[0].kernel[...])
            norms = [math.sqrt(np.mean(v**2)) for v in (y, np.maximum(y, 0))]
            np.testing.assert_allclose(record.rms[w, seed, 0], norms, rtol=1e-5)
            l2 = [math.sqrt(np.mean(np.sum(v**2, -1))) for v in (y, np.maximum(y, 0))]
            np.testing.assert_allclose(record.l2[w, seed, 0], l2, rtol=1e-5)
    assert np.all(record.change == 0)
    assert np.all(np.isnan(record.loss))


def test_a_shard_has_some_of_the_examples():
    class Split(nnx.Module):
        def __init__(self, width):
            self.layer = linear(width)

        def __call__(self, x):
            mesh, rows = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), P("data")
            return jax.shard_map(self.layer, mesh=mesh, in_specs=rows, out_specs=rows)(x)

    record = compare_widths({8: Split(8), 16: Split(16)}, X)
    assert record.layers == ("layer", "Split")
    np.testing.assert_array_equal(record.sizes, [[8, 8], [16, 16]])
    np.testing.assert_allclose(record.rms[..., 0], record.rms[..., 1], rtol=1e-6)


@pytest.mark.parametrize("axes", [("shard",), ("scan", "shard"), ("shard", "scan"), ("shard", "scan", "shard")])
def test_each_step_of_a_loop_has_the_examples_of_all_shards(axes):
    sizes = (2, 3, 4)[: len(axes)]
    x = np.random.default_rng(0).normal(size=(*sizes, 5, 6)).astype(np.float32)
    pooled = _models._pool_examples(jnp.asarray(x), axes)
    loops = [k for k, axis in enumerate(axes) if axis == "scan"]
    for step in np.ndindex(*(sizes[k] for k in loops)):
        place = tuple(step[loops.index(k)] if k in loops else slice(None) for k in range(len(axes)))
        np.testing.assert_array_equal(pooled[step], x[place].reshape(-1, 6))


def test_compare_widths_takes_linen_models():
    models = {}
    for width in (8, 16):
        module = nn.Dense(width)
        models[width] = (module, module.init(jax.random.key(0), X))
    record = compare_widths(models, X)
    y = X @ models[16][1]["params"]["kernel"]
    assert record.rms[1, 0, 0, 0] == pytest.approx(float(rmsjax.rms(y)), rel=1e-5)


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        (lambda: {8: nnx.relu, 16: nnx.relu}, TypeError, "compare_widths: model must be a flax.nnx module"),
        (lambda: {8: linear(8)}, ValueError, "compare_widths: widths must be 2 or more"),
        (lambda: {"small": linear(8), "large": linear(8)}, TypeError, "compare_widths: widths must be integers"),
        (lambda: {8: [linear(8)], 16: [linear(16)] * 2}, ValueError, r"as many models, got \[1, 2\]"),
        (
            lambda: {8: linear(8), 16: nnx.Sequential(linear(16))},
            ValueError,
            r"same layers at every width; at widths 8 and 16 they differ in \['Linear', 'Sequential', 'layers/0'\]",
        ),
    ],
)
def test_compare_widths_errors(models, error, message):
    with pytest.raises(error, match=message):
        compare_widths(models(), X)


def linear(width):
    return nnx.Linear(8, width, rngs=nnx.Rngs(0))


def test_the_name_is_the_function():
    """No module of the same name takes its place, however it is imported."""
    assert rmsjax.coord_check is _coord_check.coord_check
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rmsjax.coord_check")
    assert callable(rmsjax.coord_check)
