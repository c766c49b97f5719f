"""What people's models need of the functions that train or run them at several widths, all alike."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rmsjax import compare_widths, coord_check, lr_sweep
from rmsjax._training import at_same_share
from tests.helpers.marks import slow

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
Y = X[:, :1]
MASK = np.arange(16) % 3 > 0


@pytest.fixture(autouse=True)
def promotion(strict):
    """optax's SGD needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def coordinates(make_model, batch, **kwargs):
    given = {"widths": [8, 16], "make_optimizer": lambda width: optax.sgd(0.1), "loss": optax.l2_loss, "steps": 1}
    return coord_check(make_model, batch, **given | {"seeds": 1, "progress": False} | kwargs)


def rates(make_model, batch, **kwargs):
    """Of several batches, so that they are stacked: twice the same."""
    batches = (lambda width: [batch(width)] * 2) if callable(batch) else [batch] * 2
    given = {"widths": [8, 16], "make_optimizer": lambda width, rate: optax.sgd(rate), "loss": optax.l2_loss}
    given |= {"steps": 3, "learning_rates": [0.1, 0.2], "seeds": 1, "progress": False}
    return lr_sweep(make_model, batches, **given | kwargs)


def norms(make_model, batch, **kwargs):
    """As they are, without a loss."""

    def model(width):
        made = make_model(width, nnx.Rngs(0))
        linen = isinstance(made, nn.Module)
        return (made, made.init(jax.random.key(0), batch[0], train=False)) if linen else made

    args = (lambda width: batch(width)[:-1],) if callable(batch) else batch[:-1]
    return compare_widths({8: model(8), 16: model(16)}, *args, **kwargs)


runs = pytest.mark.parametrize(
    "run", [coordinates, slow(norms), slow(rates)], ids=["coord_check", "compare_widths", "lr_sweep"]
)
trains = pytest.mark.parametrize("run", [coordinates, slow(rates)], ids=["coord_check", "lr_sweep"])


def values(record):
    """What was measured, and the names of layers if they were."""
    layers = getattr(record, "layers", ())
    return layers, [getattr(record, name) for name in ("rms", "change", "loss") if hasattr(record, name)]


def assert_same(record, other):
    (layers, found), (other_layers, wanted) = values(record), values(other)
    assert layers == other_layers
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- arguments


class ByKeyword(nnx.Module):
    def __init__(self, width, rngs):
        self.inner, self.out = nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x, *, mask, cache=None, double=False):
        h = jnp.where(mask[:, None], self.inner(x), 0.0)
        h = h if cache is None else h + cache["h"]
        return self.out(2 * h if double else h)


class ByPosition(ByKeyword):
    def __call__(self, x, mask, cache, double):
        return ByKeyword.__call__(self, x, mask=mask, cache=cache, double=double)


ByPosition.__name__ = ByPosition.__qualname__ = "ByKeyword"


@runs
def test_keyword_arguments(run):
    """As if they were given by position, layers have the names they have, and a flag is no tracer."""
    cache = {"h": np.ones((16, 1), np.float32)}
    found = run(ByKeyword, (X, Y), kwargs={"mask": MASK, "cache": cache, "double": True})
    assert_same(found, run(ByPosition, (X, MASK, cache, True, Y)))
    assert getattr(found, "layers", ("inner", "out", "ByKeyword")) == ("inner", "out", "ByKeyword")


@runs
def test_inputs_of_the_width(run):
    """A layer by itself, whose input and cache are as wide as it is."""

    def make_model(width, rngs):
        return nnx.Linear(width, width, rngs=rngs)

    class Wide(nnx.Module):
        def __init__(self, width, rngs):
            self.layer = make_model(width, rngs)

        def __call__(self, x, *, cache):
            return self.layer(x + cache)

    def batch(width):
        return np.ones((4, width), np.float32), np.zeros((4, width), np.float32)

    found = run(Wide, batch, kwargs=lambda width: {"cache": np.ones(width, np.float32)[None]})
    twice = run(make_model, lambda width: (2 * batch(width)[0], batch(width)[1]))
    if run is not rates:
        assert found.layers == ("layer", "Wide")
        np.testing.assert_allclose(found.rms[..., 0], twice.rms[..., 0], rtol=1e-6)
    np.testing.assert_allclose(found.loss, twice.loss, rtol=1e-6)


def test_keyword_arguments_of_each_batch():
    """Step k has the batch k and its keyword arguments: as one model that sees all of them, one after the other."""
    masks = [MASK, ~MASK]
    batches = [(X, Y), (-X, 2 * Y)]
    given = {"widths": [8, 16], "learning_rates": [0.1, 0.2], "loss": optax.l2_loss, "seeds": [3], "progress": False}
    found = lr_sweep(ByKeyword, batches, steps=3, make_optimizer=lambda width, rate: optax.sgd(rate),
                     kwargs=[{"mask": mask} for mask in masks], **given)  # fmt: skip
    model = ByKeyword(16, nnx.Rngs(jax.random.key(3)))
    for step in range(3):

        def loss(model, k=step % 2):
            (x, y), mask = batches[k], masks[k]
            return jnp.mean(optax.l2_loss(model(jnp.asarray(x), mask=jnp.asarray(mask)), jnp.asarray(y)))

        value, grads = nnx.value_and_grad(loss)(model)
        assert found.loss[1, 0, 1, step] == pytest.approx(float(value), rel=1e-5)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.2 * g, nnx.state(model, nnx.Param), grads))


# ------------------------------------------------------------------------------------------- Flax: flags, keys, methods


class Dropped(nnx.Module):
    def __init__(self, width, rngs, keyed=True):
        self.inner, self.out = nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs if keyed else None)

    def __call__(self, x, *, rngs=None):
        return self.out(self.dropout(self.inner(x), rngs=rngs))


def test_evaluation_mode():
    def evaluating(width, rngs):
        model = Dropped(width, rngs)
        model.eval()
        return model

    record = coordinates(evaluating, (X, Y))
    inner, dropout = (record.layers.index(name) for name in ("inner", "dropout"))
    np.testing.assert_array_equal(record.rms[..., inner], record.rms[..., dropout])


@trains
def test_nnx_keys_as_an_argument(run):
    """An Rngs counts what it has given: the same in each run, and at each step of a coordinate check."""

    def make_model(width, rngs):
        return Dropped(width, rngs, keyed=False)

    keys = nnx.Rngs(5)
    found, again = (run(make_model, (X, Y), kwargs={"rngs": keys}) for _ in range(2))
    assert_same(found, again)
    assert run is not coordinates or np.all(found.change[:, :, 0] == 0)


class LinenModel(nn.Module):
    """A dropout with a stream of its own, a running average, an intermediate value, and another method."""

    width: int

    def setup(self):
        self.inner, self.out, self.norm = nn.Dense(self.width), nn.Dense(1), nn.BatchNorm(momentum=0.9)
        self.dropout = nn.Dropout(0.5, rng_collection="noise")

    def encode(self, x):
        return self.inner(x)

    def __call__(self, x, *, train):
        h = self.dropout(self.norm(self.encode(x), use_running_average=not train), deterministic=not train)
        self.sow("intermediates", "size", jnp.mean(h**2))
        return self.out(h)


def linen(width, rngs):
    return LinenModel(width)


def test_linen_flags_and_keys():
    """Another key is another dropout; parameters are those of the seed, whatever the keys."""
    kwargs = [{"train": True, "rngs": {"noise": jax.random.key(k), "params": jax.random.key(9)}} for k in (1, 2)]
    first, other = (coordinates(linen, (X, Y), kwargs=given, seeds=2) for given in kwargs)
    dropout, inner = first.layers.index("dropout"), first.layers.index("inner")
    assert not np.allclose(first.rms[..., dropout], other.rms[..., dropout])
    np.testing.assert_array_equal(first.rms[:, :, 0, inner], other.rms[:, :, 0, inner])
    assert not np.allclose(first.rms[:, 0, 0, inner], first.rms[:, 1, 0, inner])
    still = norms(linen, (X, Y), kwargs={"train": False})
    np.testing.assert_allclose(still.rms[..., dropout], still.rms[..., inner], rtol=1e-4)


@pytest.mark.slow
def test_linen_mutable_collections():
    """With `mutable` the loss has what `apply` returns; here it gives a part of that back as its aux."""

    def with_size(output, target):
        out, collections = output
        (size,) = collections["intermediates"]["size"]
        return jnp.mean(optax.l2_loss(out, target)) + size, collections

    kwargs = {"train": True, "mutable": ["intermediates", "batch_stats"]}
    found = coordinates(linen, (X, Y), loss=with_size, kwargs=kwargs)
    without = coordinates(linen, (X, Y), kwargs={"train": True})
    assert np.all(found.loss[..., 0] > without.loss[..., 0] + 0.1)


@pytest.mark.parametrize(
    ("run", "method"), [(coordinates, "encode"), (norms, LinenModel.encode)], ids=["by name", "a function"]
)
def test_linen_methods(run, method):
    given = {} if run is norms else {"loss": lambda h, y: h[:, :1] ** 2}
    assert run(linen, (X, Y), kwargs={"method": method}, **given).layers == ("inner",)


# ----------------------------------------------------------------------------------------------------- several devices


@pytest.mark.slow
@runs
def test_a_sharded_batch(run):
    """Its mesh, though the axes are explicit, need not be set."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x, y, mask = jax.device_put((X, Y, MASK), jax.NamedSharding(mesh, P("data")))
    found = run(ByKeyword, (x, y), kwargs={"mask": mask})
    assert_same(found, run(ByKeyword, (X, Y), kwargs={"mask": MASK}))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def nothing_compiles(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)


def model(width, rngs):
    return ByKeyword(width, rngs)


def too_wide(width, rngs):
    return nnx.Linear(8 if width == 8 else 9, 1, rngs=rngs)


GOOD = {"mask": MASK}


@runs
@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"kwargs": {"msk": MASK}},
            TypeError,
            r"ByKeyword.__call__\(self, x, \*, mask, .* kwargs \(msk\): missing a re",
        ),
        ({"kwargs": {**GOOD, "msk": 1}}, TypeError, r"kwargs \(mask, msk\): got an unexpected keyword argument 'msk'"),
        ({}, TypeError, r"kwargs \(none\): missing a required.* argument: 'mask'"),
        ({"batch": (X, X, Y), "kwargs": GOOD}, TypeError, r"\(2 without the target\) and .*: too many positional"),
        ({"kwargs": MASK}, TypeError, r"kwargs must be .* such as {\"mask\": mask}, got an array of shape \(16,\)"),
        ({"kwargs": {1: MASK}}, TypeError, "kwargs must be .* got a dict with the keys 1$"),
        ({"kwargs": lambda: GOOD}, TypeError, r"kwargs must be a function \(width\), got <lambda>\(\); write lambda w"),
        ({"make_model": too_wide}, TypeError, "incompatible shapes|contracting dim|dot_general"),
    ],
)
def test_errors(run, given, error, message):
    given = {"make_model": model, "batch": (X, Y), **given}
    function = {coordinates: "coord_check", norms: "compare_widths", rates: "lr_sweep"}[run]
    with pytest.raises(error, match=message) as raised:
        run(given.pop("make_model"), given.pop("batch"), **given)
    assert str(raised.value).startswith(f"{function}: ") or "make_model" not in message


@trains
@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"widths": None}, TypeError, r"give widths, such as .*, or depths, .*; got neither$"),
        ({"depths": [1, 2]}, TypeError, "give widths, .*; got both$"),
        ({"widths": None, "depths": [2]}, ValueError, r"depths must be 2 or more, .* got \[2\]$"),
        ({"loss": lambda y, t: {"loss": y}}, TypeError, r"loss must return an array .* \(loss, aux\); got a dict with"),
        ({"loss": lambda y, t: (y, t, t)}, TypeError, r"loss must return .* \(loss, aux\); got a tuple of 3"),
        ({"loss": lambda y, t: jnp.argmax(y)}, TypeError, "loss must return an array of floating-point numbers"),
    ],
)
def test_errors_of_training(run, given, error, message):
    function = {coordinates: "coord_check", rates: "lr_sweep"}[run]
    with pytest.raises(error, match=f"^{function}: {message}"):
        run(model, (X, Y), **{"kwargs": GOOD} | given)


def test_what_differs_between_widths_is_said_before_anything_is_compiled(nothing_compiles):
    def other_layers(width, rngs):
        layer = nnx.Linear(8, 1, rngs=rngs)
        return layer if width == 8 else nnx.Sequential(layer)

    with pytest.raises(ValueError, match=r"coord_check: the model must have the same layers at every width"):
        coordinates(other_layers, (X, Y))
    with pytest.raises(ValueError, match=r"compare_widths: the model must have the same layers at every width"):
        norms(other_layers, (X, Y))

    def other_parameters(width, rngs):
        return nnx.Linear(8, 1, use_bias=width == 8, rngs=rngs)

    message = r"coord_check: the model must have the same parameters at every width; .* they differ in \['bias'\]"
    with pytest.raises(ValueError, match=message):
        coordinates(other_parameters, (X, Y))


def test_of_parameters_nothing_is_measured_over_depths():
    """Neither their norms nor their effects, for which the model would run once more for each of them."""
    runs = []

    class Counted(nnx.Module):
        def __init__(self, size, rngs):
            init = nnx.initializers.normal(1 / size)
            self.layer = nnx.Linear(8, 1, use_bias=size < 3, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            runs.append(x)
            return self.layer(x)

    def runs_over(**sizes):
        runs.clear()
        record = coordinates(Counted, (X, Y), **sizes)
        return len(runs), record.parameters, record.effects.shape[2:]

    over_widths, *named = runs_over(widths=[1, 2])
    over_depths, *unnamed = runs_over(widths=None, depths=[1, 3])
    assert (named, unnamed) == ([("layer/bias", "layer/kernel"), (2, 2)], [(), (0, 2)])
    assert over_depths < over_widths


def test_arguments_as_a_function_that_returns_no_tuple():
    with pytest.raises(
        TypeError, match=r"^compare_widths: args, as a function .* a tuple such as \(x,\), got an array"
    ):
        compare_widths({width: model(width, nnx.Rngs(0)) for width in (8, 16)}, lambda width: X)
    with pytest.raises(ValueError, match=r"^coord_check: batch must be a tuple such as \(x, labels\), .* got an array"):
        coordinates(model, lambda width: X)


def test_arrays_on_several_meshes():
    meshes = [jax.make_mesh((n,), ("data",), axis_types=(AxisType.Explicit,)) for n in (2, 4)]
    x, y = (jax.device_put(a, jax.NamedSharding(mesh, P("data"))) for a, mesh in zip((X, Y), meshes, strict=True))
    with pytest.raises(ValueError, match="coord_check: all arrays must be on one mesh, got some on each of"):
        coordinates(ByKeyword, (x, y), kwargs=GOOD)


# --------------------------------------------------------------------------------------------------------------- depth


# The names at a depth; of two, four and eight, those that are shared; and what they are at depth eight.
STACKS = {
    "suffixes": (lambda n: ["in", *(f"b{i}" for i in range(n)), "out"], "in b0 b1 out", "in b3 b7 out"),
    "paths": (
        lambda n: [f"b/{i}/{part}" for i in range(n) for part in ("up", "down")],
        "b/0/up b/0/down b/1/up b/1/down",
        "b/3/up b/3/down b/7/up b/7/down",
    ),
    "a scan": (lambda n: [*(f"b[{i}]" for i in range(n)), "conv3x3"], "b[0] b[1] conv3x3", "b[3] b[7] conv3x3"),
    "gaps": (lambda n: [f"layers/{2 * i}" for i in range(n)], "layers/0 layers/2", "layers/6 layers/14"),
    "stages": (
        lambda n: [f"stage{s}/b{i}" for s in range(2) for i in range(n)],
        "stage0/b0 stage0/b1 stage1/b0 stage1/b1",
        "stage0/b3 stage0/b7 stage1/b3 stage1/b7",
    ),
    "by turns": (
        lambda n: [f"l/{2 * i + k}/{part}" for i in range(n) for k, part in enumerate(["attention", "mlp"])],
        "l/0/attention l/1/mlp l/2/attention l/3/mlp",
        "l/6/attention l/7/mlp l/14/attention l/15/mlp",
    ),
    "called again": (lambda n: ["tied", *(f"tied#{i}" for i in range(2, n + 1))], "tied tied#2", "tied tied#8"),
    "no stack": (lambda n: ["first", "second"], "first second", "first second"),
}


@pytest.mark.parametrize(("names", "shared", "deepest"), STACKS.values(), ids=STACKS.keys())
def test_layers_at_the_same_share_of_the_depth(names, shared, deepest):
    small, middle, deep = at_same_share([names(n) for n in (2, 4, 8)])
    assert list(small) == list(small.values()) == shared.split()
    assert list(deep) == list(middle) == list(small)
    assert list(deep.values()) == deepest.split()


def test_shares_of_the_depth():
    _, deep = at_same_share([[f"b{i}" for i in range(n)] for n in (3, 10)])
    assert list(deep.items()) == [("b0", "b2"), ("b1", "b6"), ("b2", "b9")]
    assert at_same_share([["b0"], ["b0", "b1", "b2"]])[1] == {"b0": "b2"}
    assert at_same_share([["a", "b0"], ["c", "b0"]]) == [{"a": "a", "b0": "b0"}, {"b0": "b0", "c": "c"}]


class Residual(nnx.Module):
    """Blocks, in a row or in a scan, that return the residual stream."""

    def __init__(self, depth, rngs, *, power, scanned):
        self.depth, self.scanned = depth, scanned
        if scanned:
            self.block = nnx.vmap(lambda key: Block(nnx.Rngs(key), depth**-power))(jax.random.split(rngs(), depth))
        else:
            for i in range(depth):
                setattr(self, f"block{i}", Block(rngs, depth**-power))

    def __call__(self, x):
        if self.scanned:
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.block)
        for i in range(self.depth):
            x = getattr(self, f"block{i}")(x)
        return x


class Block(nnx.Module):
    def __init__(self, rngs, scale):
        self.up, self.scale = nnx.Linear(8, 8, rngs=rngs), scale

    def __call__(self, x):
        return x + self.scale * self.up(jnp.tanh(x))


@pytest.mark.slow
@pytest.mark.parametrize(("power", "verdict", "scanned"), [(0, "grows", False), (1, "level", True)])
def test_depth(power, verdict, scanned):
    """Without a factor the stream and its change grow; with 1/depth both are level, at one learning rate of Adam."""
    record = coordinates(
        lambda depth, rngs: Residual(depth, rngs, power=power, scanned=scanned), (X, Y), widths=None, depths=[2, 8],
        loss=lambda y, t: optax.l2_loss(y[:, :1], t), make_optimizer=lambda depth: optax.adam(1e-3), steps=2, seeds=2,
    )  # fmt: skip
    blocks = ["block/up[{}]", "block[{}]"] if scanned else ["block{}/up", "block{}"]
    assert set(record.layers) == {*(block.format(i) for i in range(2) for block in blocks), "Residual"}
    assert record.verdict == verdict
    assert record.verdicts["Residual"] == verdict
    assert (record.axis, record.widths.tolist()) == ("depth", [2, 8])
    assert "against log depth" in str(record)
    assert "depths 2, 8; 2 steps" in str(record)
    assert {"depth", "layer"} < set(record.to_dict())
