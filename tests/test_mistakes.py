"""Parameters beside activations: what is recorded of them, and that the cause of a mistake is named.

All of the zoo of right configurations and planted mistakes is run by `python -m tests.benchmarks mistakes`.
"""

import contextlib
import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import rmsjax
from rmsjax import WidthRecord, _parameters, coord_check
from tests.benchmarks import mistakes
from tests.helpers import zoo
from tests.helpers.marks import slow
from tests.helpers.records import cut

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


@contextlib.contextmanager
def promotes():
    """optax's Adam needs it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True)
def promotion(strict):
    with promotes():
        yield


def check(make_model, batch=(X, X[:, :1]), **kwargs):
    given = {"widths": [8, 16], "make_optimizer": lambda width: optax.sgd(0.1), "loss": optax.l2_loss, "steps": 2}
    return coord_check(make_model, batch, **{"seeds": 1, "progress": False} | given | kwargs)


# ------------------------------------------------------------------------------------------------------------ the zoo

NAMED = [
    config
    for config in zoo.MISTAKES
    if (config.model, config.name)
    in [
        ("mlp", "biases' rate divided"),
        ("mlp", "input std over the root"),
        ("mlp", "readout std too large"),
        ("linen", "one rate, +1/2"),
    ]
    and config.half == "tuned"
    and config.optimizer == "adam"
]


def quick(config):
    return config.check(widths=(64, 256), seeds=3, steps=2)


@pytest.mark.parametrize("config", [NAMED[0], *map(slow, NAMED[1:])], ids=lambda config: config.name)
def test_the_cause_is_named(config):
    record = quick(config)
    (planted,) = {abs(power) for offsets in (config.init, config.rate) for power in offsets.values()}
    finding = record.findings[0]
    assert config.is_cause(finding.name), str(record)
    assert abs(finding.power) == pytest.approx(planted, abs=0.2)
    assert record.verdict == ("grows" if finding.power > 0 else "shrinks")
    assert str(finding) in " ".join(str(record).split())


@pytest.mark.slow
@pytest.mark.parametrize("index", [slow(0), 5], ids=["zero readout", "random readout, multiplier after it"])
def test_what_is_right_is_level(index):
    assert not zoo.RIGHT[index].cause
    record = quick(zoo.RIGHT[index])
    assert record.findings == ()
    assert record.verdict == "level"


def test_the_zoo_is_as_large_as_it_says():
    """Both parts have their share of models and optimizers, and every pattern names something that is there."""
    assert (len(zoo.MISTAKES), len(zoo.RIGHT)) == (99, 73)
    everything = [*zoo.MISTAKES, *zoo.RIGHT]
    assert {c.model for c in everything} == zoo.MODELS.keys()
    for half, counts in (("tuned", [42, 22]), ("held-out", [57, 51])):
        mine = [c for c in everything if c.half == half]
        assert [sum(bool(c.cause) == planted for c in mine) for planted in (True, False)] == counts
        assert {"sgd", "adam", "adamw", "muon"} <= {c.optimizer for c in mine}
    assert len({(c.model, c.name, c.optimizer, bool(c.cause)) for c in everything}) == len(everything)
    assert len({mistakes.file_name(c) for c in everything}) == len(everything)
    for config in zoo.MISTAKES:
        if config.model != "linen":
            state = nnx.state(jax.eval_shape(lambda c=config: nnx.state(c.make_model(64, nnx.Rngs(0)), nnx.Param)))
            paths = [zoo.path_of(path) for path, _ in jax.tree.leaves_with_path(state)]
            for pattern in [*config.init, *config.rate]:
                assert any(zoo.power_of({pattern: 1}, path) for path in paths), (config.name, pattern, paths)


@pytest.mark.slow
def test_the_score(capsys, tmp_path, monkeypatch):
    """Of what is found and named, in a table; the second time from the records."""
    monkeypatch.setattr(zoo, "WIDTHS", (64, 256))
    chosen = ["linen one rate*", "linen Adam, Linen"]
    scores = [mistakes.score(1, tmp_path, i) for i, c in enumerate(mistakes.configs()) if mistakes.is_chosen(c, chosen)]
    assert [s.found for s in scores] == [[True], [False]]
    assert [s.named for s in scores] == [[True], [False]]
    assert all(s.seconds > 0 for s in scores)
    mistakes.main([*chosen, "--sets", "1", "--records", str(tmp_path), "--markdown"])
    *lines, _, head, rule, tuned, _, held_out, _ = capsys.readouterr().out.splitlines()
    assert [" | 0 s | " in line for line in lines] == [True, True]
    assert {row.count("|") for row in (head, rule, tuned, held_out)} == {7}
    assert "1 of 1 (100%) | 1 of 1 (100%)" in tuned
    assert "0 of 1 (0%)" in held_out


# --------------------------------------------------------------------------------------------------------- parameters


class Kinds(nnx.Module):
    """Kernels of all kinds, a stacked one, an embedding, vectors, and one that never moves."""

    def __init__(self, width, rngs):
        self.embed = nnx.Embed(4, width, rngs=rngs)
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.conv = nnx.Conv(width, width, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, use_bias=False, rngs=rngs)
        stacked = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(width, width, rngs=rngs)))
        self.stack = stacked(rngs)
        self.frozen = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.attention(self.conv(self.dense(self.embed(tokens))))
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)
        return x + 0 * jax.lax.stop_gradient(jnp.sum(self.frozen(x)))


AXES = {"conv": ((0, 1), 2), "query": (0, (1, 2)), "key": (0, (1, 2)), "value": (0, (1, 2)), "out": ((0, 1), 2)}


def trained(seed, width, steps):
    """The parameters at each step, by a plain loop."""
    model = Kinds(width, nnx.Rngs(jax.random.key(seed)))
    graphdef, params = nnx.split(model)
    tokens = jnp.arange(8).reshape(2, 4) % 4
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)
    found = [params]
    for _ in range(steps):
        grads = jax.grad(lambda params: jnp.mean(optax.l2_loss(nnx.merge(graphdef, params)(tokens))))(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return graphdef, tokens, found


def leaves_of(params):
    return {zoo.path_of(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}


@pytest.fixture(scope="module")
def recorded():
    with promotes():
        tokens = np.arange(8).reshape(2, 4) % 4
        return check(
            Kinds, (tokens, np.zeros(())), loss=lambda output, target: optax.l2_loss(output),
            make_optimizer=lambda width: optax.adam(1e-2), seeds=[3], steps=1, widths=[8, 12],
        )  # fmt: skip


@pytest.mark.slow
def test_norms_of_parameters_and_of_their_changes(recorded):
    _, _, (start, end) = trained(3, 8, 1)
    start, end = leaves_of(start), leaves_of(end)
    seen = set()
    for p, name in enumerate(recorded.parameters):
        path, _, layer = name.partition("[")
        first, last = (tree[path][int(layer[:-1])] if layer else tree[path] for tree in (start, end))
        seen.add(path)
        for norm, x in (
            (recorded.parameter_norms[0, 0, 0, p], first),
            (recorded.parameter_norms[0, 0, 1, p], last),
            (recorded.parameter_changes[0, 0, 1, p], last - first),
        ):
            if path.endswith("kernel"):
                rows, columns = AXES.get(path.split("/")[-2], (-2, -1))
                inputs = math.prod(np.take(x.shape, np.ravel(rows)))
                assert inputs * math.prod(np.take(x.shape, np.ravel(columns))) == x.size
                matrix = np.moveaxis(x, rows, range(np.size(rows))).reshape(inputs, -1)
                want = np.linalg.norm(matrix, 2) * math.sqrt(inputs / matrix.shape[1])
                assert 0.9 * want <= norm <= 1.001 * want, name  # a power iteration comes from below
            else:
                assert norm == pytest.approx(math.sqrt(np.mean(x**2)), rel=1e-4, abs=1e-9), name
    assert seen == start.keys()
    assert np.all(recorded.parameter_changes[:, :, 0] == 0)


@pytest.mark.slow
def test_effects_are_those_of_one_parameter(recorded):
    graphdef, tokens, (start, end) = trained(3, 8, 1)
    flat, treedef = jax.tree.flatten(start)
    moved = jax.tree.leaves(end)
    paths = [zoo.path_of(path) for path, _ in jax.tree.leaves_with_path(start)]

    output = len(recorded.layers) - 1
    assert recorded.layers[output] == "Kinds"
    first = nnx.merge(graphdef, start)(tokens)
    for p, name in enumerate(recorded.parameters):
        path, _, layer = name.partition("[")
        k = paths.index(path)
        mine = list(flat)
        mine[k] = flat[k].at[int(layer[:-1])].set(moved[k][int(layer[:-1])]) if layer else moved[k]
        change = nnx.merge(graphdef, treedef.unflatten(mine))(tokens) - first
        want = math.sqrt(float(jnp.mean(change**2)))
        assert recorded.effects[0, 0, p, output] == pytest.approx(want, rel=1e-3, abs=1e-7), name
    effects = dict(zip(recorded.parameters, recorded.effects[0, 0], strict=True))
    layers = dict(zip(recorded.layers, np.eye(len(recorded.layers), dtype=bool), strict=True))
    assert effects["stack/kernel[1]"][layers["stack[0]"]] == 0
    assert effects["stack/kernel[1]"][layers["stack[1]"]] > 0
    assert effects["dense/kernel"][layers["embed"]] == 0
    assert np.all(effects["frozen/kernel"] == 0)


class FromZero(nnx.Module):
    """A readout of zeros: all else has no gradient before the second step."""

    def __init__(self, width, rngs):
        self.first = nnx.Linear(8, width, rngs=rngs)
        self.last = nnx.Linear(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        return self.last(self.first(x))


@pytest.fixture(scope="module")
def late():
    """Trained at a rate that starts at 0, so that the first step moves nothing."""
    with promotes():
        rate = optax.linear_schedule(0.0, 0.1, 1)
        return check(FromZero, make_optimizer=lambda width: optax.sgd(rate), steps=4)


def test_a_parameter_is_followed_from_its_first_move(late):
    """With a readout of zeros all else moves a step later: that change is taken, not an earlier or the last."""
    effect = late.effects[:, :, late.parameters.index("first/kernel"), late.layers.index("first")]
    change = late.change[:, :, :, late.layers.index("first")]
    assert np.all(change[:, :, :3] == 0)
    assert np.all(effect > 0)
    assert np.all(effect < change[:, :, 4])


def test_descents_are_those_of_the_first_gradient_that_moves(late):
    """Of SGD the step is the gradient times the learning rate; each layer of a stacked leaf counts by itself."""
    gains, gradients, steps = np.moveaxis(late.descents, 2, 0)
    assert np.all(gradients > 0)
    np.testing.assert_allclose(gains, 0.1 * gradients, rtol=1e-4)
    np.testing.assert_allclose(steps, 0.01 * gradients, rtol=1e-4)

    def loss(model):
        return jnp.mean(optax.l2_loss(model(X), X[:, :1]))

    grads = nnx.grad(loss)(FromZero(8, nnx.Rngs(jax.random.key(0))))
    last = late.parameters.index("last/kernel")
    assert gradients[0, 0, last] == pytest.approx(float(jnp.sum(grads["last"]["kernel"][...] ** 2)), rel=1e-4)

    tree, after = ({"blocks": {"kernel": x * jnp.ones((2, 3, 3))}} for x in (jnp.arange(1.0, 3)[:, None, None], 0.5))
    chosen = _parameters.parameters(tree, {"blocks": jnp.ones((2, 1, 3))})
    found = _parameters.descents(chosen, tree, tree, after)
    np.testing.assert_allclose(found, 9 * np.array([[0.5, 3.0], [1.0, 4.0], [0.25, 2.25]]))


@pytest.mark.slow
def test_steps_of_several_gradients():
    optimizer = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    record = check(FromZero, make_optimizer=lambda width: optimizer, steps=4)
    gains, gradients, _ = np.moveaxis(record.descents, 2, 0)
    np.testing.assert_allclose(gains, 0.1 * gradients, rtol=1e-4)
    assert np.all(gains > 0)


def test_descents_in_other_types(x64):
    """Under x64, without promotion; a complex gradient is the conjugate of the direction in which the loss rises."""
    with jax.numpy_dtype_promotion("strict"):
        record = check(lambda width, rngs: nnx.Linear(8, width, param_dtype=jnp.float32, rngs=rngs), (X, X[:, :1]),
                       loss=lambda y, x: jnp.mean((y - x) ** 2, -1))  # fmt: skip
        assert np.all(record.descents > 0)
        z = jnp.array([1 + 2j, 3 - 1j])
        grads = jax.grad(lambda z: jnp.sum(jnp.abs(z - 1) ** 2))(z)
        found = _parameters.descents(_parameters.parameters([z], {}), [grads], [z], [z - 0.1 * grads.conj()])
    np.testing.assert_allclose(found[:, 0], np.array([0.1, 1, 0.01]) * np.sum(np.abs(grads) ** 2))


def test_names_of_parameters_are_their_paths():
    """Of a leaf that is called value as well; boxes are no part of a path."""
    tree = {"attention": {"value": jnp.ones((2, 2)), "key": {"value": jnp.ones(2)}}, "value": jnp.ones(2)}
    names = ["attention/key/value", "attention/value", "value"]
    assert [p.name for p in _parameters.parameters(tree, {})] == names
    assert [p.name for p in _parameters.parameters(jax.tree.map(nnx.Param, tree), {})] == names
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert [p.name for p in _parameters.parameters(state, {})] == ["bias", "kernel"]


def test_parameters_that_are_split_over_devices():
    """Also a stacked kernel, on a mesh with explicit axes."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    rng = np.random.default_rng(0)
    params = {"dense": {"kernel": rng.normal(size=(8, 16))}, "stack": {"kernel": rng.normal(size=(3, 8, 4))}}
    params = jax.tree.map(jnp.float32, params)
    chosen = _parameters.parameters(params, {"stack": jnp.ones((3, 2, 4))})
    assert [p.name for p in chosen] == ["dense/kernel", "stack/kernel[0]", "stack/kernel[1]", "stack/kernel[2]"]
    (want,) = jax.jit(lambda params: _parameters.sizes(chosen, [params]))(params)
    for spec in (P("a", "b"), P(None, "b")):
        with jax.set_mesh(mesh):
            split = {"dense": {"kernel": spec}, "stack": {"kernel": P(None, *spec)}}
            split = jax.tree.map(lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), params, split)
            (found,) = jax.jit(lambda params: _parameters.sizes(chosen, [params]))(split)
        for name in want:
            assert found[name] == pytest.approx(float(want[name]), rel=1e-4), (spec, name)
    assert want["dense/kernel"] == pytest.approx(float(rmsjax.rms_operator_norm(params["dense"]["kernel"])), rel=0.05)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_sizes_of_parameters_of_all_types(dtype, scale, strict):
    kernel = scale * np.random.default_rng(0).normal(size=(12, 4))
    kernel = jnp.asarray(kernel + 1j * kernel[::-1] if dtype == jnp.complex64 else kernel, dtype)
    chosen = _parameters.parameters([kernel], {})
    with jax.numpy_dtype_promotion("strict"):
        ((found,),) = [each.values() for each in _parameters.sizes(chosen, [[kernel]])]
    assert found == pytest.approx(float(rmsjax.rms_operator_norm(kernel)), rel=0.02)


@pytest.mark.slow
def test_weight_decay_is_no_first_move():
    """With a readout of zeros it moves the other kernels a step before their gradients do."""

    records = [
        check(FromZero, make_optimizer=lambda width, decay=decay: optax.adamw(1e-2, weight_decay=decay))
        for decay in (1e-2, 0.0)
    ]
    (decayed, _), _ = [[record.parameter_changes[0, 0, step] for step in (1, 2)] for record in records]
    assert np.all(decayed[[name == "first/kernel" for name in records[0].parameters]] > 0)
    np.testing.assert_allclose(records[0].effects, records[1].effects, rtol=0.02, atol=1e-5)


def test_linen_has_parameters():
    record = check(lambda width, rngs: nn.Sequential([nn.Dense(width), nn.Dense(1)]))
    assert set(record.parameters) == {f"layers_{i}/{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")}
    assert np.all(record.parameter_changes[:, :, -1] > 0)


# ------------------------------------------------------------------------------------------------------------- records


def synthetic(effects, *, norms=0.0, sizes=None, widths=(64, 128, 256, 512), seeds=3):
    """Two layers and the model around them, each with a kernel; what is given are exponents of the width."""
    w = np.array(widths, float)[:, None, None, None]
    layers, parameters = ("a", "b", "Model"), ("a/kernel", "b/kernel")
    ones = np.ones((len(widths), seeds, 2, 1))
    change = np.repeat(ones * np.array([0, 1])[:, None], 3, -1)
    moved = np.repeat(ones * np.array([0, 1])[:, None], 2, -1)
    counts = np.stack([np.array(widths), np.full(len(widths), 8), np.full(len(widths), 8)], -1)
    return WidthRecord(
        layers, np.array(widths), np.arange(seeds), np.repeat(ones, 3, -1), change, counts, ones[..., 0],
        parameters, np.repeat(ones, 2, -1) * w**norms, moved, np.where(np.isneginf(effects), 0, 0.1 * w**effects)
        * np.ones((1, seeds, 1, 1)),
    )  # fmt: skip


NOT = -np.inf  # no effect at all


@pytest.mark.parametrize(
    ("effects", "names", "kinds"),
    [
        ([[0, 0, 0], [NOT, 0, 0]], [], []),
        ([[0.5, 0.5, 0.5], [NOT, 0, 0]], ["a/kernel"], ["learning rate"]),
        ([[-1, -1, -1], [NOT, 1, 1]], ["a/kernel", "b/kernel"], ["learning rate"] * 2),
        ([[0, 0.5, 0.5], [NOT, 0, 0]], ["b/kernel"], ["initial scale"]),
        ([[0, 0.5, 0.5], [NOT, 1, 1]], ["b/kernel"] * 2, ["initial scale", "learning rate"]),
        ([[0, -0.5, -0.5], [NOT, 0, 0]], [], []),  # a sum of random terms
        ([[0, 1, 0], [NOT, 1, 0]], [], []),  # the model divides what b returns
    ],
)
def test_causes(effects, names, kinds):
    record = synthetic(np.array(effects))
    assert [finding.name for finding in record.findings] == names
    assert [finding.kind for finding in record.findings] == kinds
    assert (record.verdict == "level") == (not names)


def with_descents(record, *, rate=0.0, gradient=0.0, cosine=1.0, spread=0.0):
    """The same with steps of a/kernel of these powers, at an angle to the gradient, and not the same for all seeds."""
    w = np.array(record.widths, float)[:, None, None] * np.ones((1, len(record.seeds), 1))
    rates = w ** np.array([rate, 0]) * (1 + spread * np.array(record.seeds)[:, None])
    squares = w ** np.array([gradient, 0])
    return dataclasses.replace(
        record, descents=np.stack([cosine * rates * squares, squares, rates**2 * squares], 2) * 0.1
    )


SLOW_START = np.array([[-0.5, -0.5, -0.5], [NOT, 0, 0]])  # the gradient of a shrinks, and its change with it


@pytest.mark.parametrize(
    ("effects", "given", "powers"),
    [
        (SLOW_START, {"gradient": -1.0}, []),  # it is SGD, and the gradient is why
        (SLOW_START, {"gradient": -1.0, "cosine": 0.8}, [-0.5]),  # Adam does not follow the size of the gradient
        (SLOW_START, {"gradient": -1.0, "spread": 0.1}, [-0.5]),  # nor does what is divided by its norm
        (SLOW_START, {"rate": -0.5}, [-0.5]),
        (SLOW_START - [[0.5], [0]], {"rate": -0.5, "gradient": -1.0}, [-0.5]),  # of the whole power, that of the rate
        (np.array([[0, 0, 0], [NOT, 0, 0]]), {"rate": 0.5, "gradient": -1.0}, [0.5]),  # which the gradient hides
    ],
)
def test_steps_of_sgd_follow_the_gradient(effects, given, powers):
    """How the loss reacts to a change is (g, s) over the effect; the rest of the effect is the learning rate's."""
    record = synthetic(np.array(effects))
    seen = with_descents(record, **given)
    assert [(f.name, f.kind) for f in seen.findings] == [("a/kernel", "learning rate")] * len(powers)
    assert [f.power for f in seen.findings] == pytest.approx(powers)
    alone = [f.power for f in cut(seen, slice(1)).findings]
    assert alone == pytest.approx([p for p in effects[0, :1] if p])  # a single seed does not tell


@pytest.mark.parametrize(("cosine", "found"), [(1.0, []), (0.8, ["a"])])
@pytest.mark.parametrize("effect", [-0.2, -1.0])
def test_a_gradient_that_shrinks_makes_training_slow(effect, cosine, found):
    """The layer of such a parameter changes less in all steps: with SGD that is explained, also if it catches up."""
    power = effect if cosine == 1 else 0  # else the effect would be a finding before
    record = with_descents(synthetic(np.array([[power] * 3, [NOT, 0, 0]])), gradient=2 * effect, cosine=cosine)
    record.change[:, :, 1, 0] *= (record.widths**-0.45)[:, None]
    assert [finding.name for finding in record.findings] == found
    assert all(finding.kind == "training" for finding in record.findings)


@pytest.mark.parametrize("value", [0.0, 1e300, np.inf, np.nan, -1.0])
@pytest.mark.parametrize("product", range(3))
def test_products_that_leave_the_range_say_nothing(product, value):
    """Nor does one that is 0, as of a parameter that has no gradient for some seed: its effect counts as it is."""
    record = with_descents(synthetic(SLOW_START), gradient=-1.0)
    record.descents[1, 2, product, 0] = value
    assert [finding.power for finding in record.findings] == pytest.approx([-0.5])
    assert "its learning rate is off by width^-0.50 ±0.00: multiply it by width^0.5" in " ".join(str(record).split())


@pytest.mark.parametrize(("noise", "found"), [(0.0, True), (0.5, False)])
def test_a_finding_has_a_sure_interval(noise, found):
    """A slope of 0.3 is one with a small interval, and none with a large one."""
    record = synthetic(np.array([[0.3, 0.3, 0.3], [NOT, 0, 0]]))
    record.effects[...] *= np.exp(
        noise * np.array([-1, 0, 1])[:, None, None] * np.log(record.widths / 64)[:, None, None, None]
    )
    assert [finding.name for finding in record.findings] == (["a/kernel"] if found else [])


def test_what_moves_later_follows():
    record = synthetic(np.array([[0.5, 0.5, 0.5], [NOT, 1.0, 1.0]]))
    steps = np.array([[0, 0], [0, 1], [1, 1]])  # b moves first
    changes = np.broadcast_to(steps.astype(float), (4, 3, 3, 2))
    late = dataclasses.replace(
        record, parameter_changes=changes, parameter_norms=np.ones(changes.shape),
        **{name: getattr(record, name)[:, :, [0, 1, 1]] for name in ("rms", "change", "loss")},
    )  # fmt: skip
    assert [finding.name for finding in late.findings] == ["b/kernel"]


def test_files_of_older_versions_load(tmp_path):
    record = synthetic(np.zeros((2, 3)))
    old = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    for name in ("parameters", "parameter_norms", "parameter_changes", "effects", "descents"):
        del old[name]
    np.savez(tmp_path / "old.npz", **old)
    loaded = WidthRecord.load(tmp_path / "old.npz")
    assert loaded.parameters == ()
    assert loaded.findings == ()
    assert str(loaded) == str(record)
    record.save(tmp_path / "new.npz")
    again = WidthRecord.load(tmp_path / "new.npz")
    assert again.parameters == record.parameters
    np.testing.assert_array_equal(again.effects, record.effects)
