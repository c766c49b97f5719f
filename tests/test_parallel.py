"""One answer on one device and on eight, under jit, shard_map, pmap and vmap; and what the compiled programs send.

Wherever data is hot, one element on the last device alone is 1e30, whose square overflows: the devices see sums that
ask for different branches, and must take the same one.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsjax
from rmsjax import _reduce, clip_by_rms, rms, rms_normalize, tree_rms
from tests.helpers import multiprocess_worker as worker
from tests.helpers.marks import slow
from tests.helpers.oracle import LIKELY

pytestmark = pytest.mark.usefixtures("quick_compiles")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESH_AXES = ("data", "model")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 16)).astype(np.float32)
SCALE = RNG.normal(size=16).astype(np.float32)
WHERE = RNG.random((8, 16)) > 0.3
WHERE[3] = False
# A leaf for every way to lie on the mesh. Their sizes differ, so that counting one of them twice shows.
SPECS = {"replicated": P(), "data": P("data"), "model": P(None, "model"), "both": P("data", "model")}
TREE = {k: RNG.normal(size=(8, 16)).astype(np.float32) * (i + 1) for i, k in enumerate(SPECS)}
HOT_SPOT = (-1, -1)


def hot(x):
    x = np.array(x)
    x[HOT_SPOT] = 1e30
    return x


HOT_TREE = TREE | {"both": hot(TREE["both"])}


@cache
def mesh(kind=AUTO):
    return jax.make_mesh((2, 4), MESH_AXES, axis_types=(kind, kind))


def place(tree, specs, kind=AUTO):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh(kind), spec)), tree, specs)


def shapes(tree, specs, kind=AUTO):
    """For `lower`: arrays without data."""
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh(kind), spec)), tree, specs
    )


def on_mesh(f, in_specs, out_specs, **options):
    return jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, **options))


# Of two numbers that are each within LIKELY units in the last place, and rounded once more behind the norm.
RTOL = 2 * (LIKELY + 1) * np.finfo(np.float32).eps


def assert_same(got, want, condition=1.0):
    """Equal to RTOL or, where a difference cancels, to RTOL of the typical entry.

    condition: how many times as large as the error of a norm that of the entries is before they cancel. The sine of y
    is off by the error of y, which is in proportion to y, so there it is the largest |y|.
    """

    def check(path, g, w):
        g, w = np.asarray(g), np.asarray(w)
        typical = condition * np.median(np.abs(w[w != 0])) if np.any(w) else 0.0
        np.testing.assert_allclose(g, w, rtol=RTOL, atol=RTOL * typical, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, got, want)


def pooled(*leaves):
    return np.sqrt(np.mean(np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64) ** 2))


def layer_outputs(x, scale, **options):
    """Both layers, given the same scale."""
    graph, params = nnx.split(rmsjax.nnx.RMSNorm(scale.shape, rngs=nnx.Rngs(0), **options))
    return {
        "linen": rmsjax.linen.RMSNorm(**options).apply({"params": {"scale": scale}}, x),
        "nnx": nnx.merge(graph, jax.tree.map(lambda _: scale, params))(x),
    }


def clip(updates, scope, **options):
    tx = clip_by_rms(0.5, scope, **options)
    return tx.update(updates, tx.init(updates))


# ----------------------------------------------------------------------------------------------- jit with NamedSharding

AXES = [None, 0, 1, (0, 1)]
SCOPES = ["global", "block", 0, -1, lambda path, leaf: 1 if leaf.ndim > 1 else "label"]


def kept(x, scale, where):
    """What has the shape of x, and is to keep its sharding."""
    return {
        "clip": [clip({"x": x}, scope)[0]["x"] for scope in SCOPES],
        "normalize": rms_normalize(x, scale),
        "normalize all": rms_normalize(x, axis=None),
        "normalize where": rms_normalize(x, scale, where=where),
        **layer_outputs(x, scale),
    }


def gradients(x, scale, where):
    functions = [
        lambda x, scale: rms(x),
        lambda x, scale: rms(x, -1, where=where),
        lambda x, scale: tree_rms([x, scale], "block"),
        lambda x, scale: clip({"x": x, "scale": scale}, "global")[0],
        lambda x, scale: layer_outputs(x, scale),
    ]

    def loss(f, x, scale):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(f(x, scale)))

    return [jax.grad(partial(loss, f), (0, 1))(x, scale) for f in functions]


def clip_everything(tree):
    return clip(tree, "global")


def rms_normalize_each(tree):
    return jax.tree.map(rms_normalize, tree)


def everything(x, scale, where):
    return {
        "rms": [rms(x, axis, keepdims=keepdims) for axis in AXES for keepdims in (True, False)],
        "where": [rms(x, axis, where=where) for axis in AXES],
        "tree": [tree_rms({"x": x, "scale": scale}, scope) for scope in SCOPES],
        "state": [clip({"x": x, "scale": scale}, scope)[1] for scope in SCOPES],
        "kept": kept(x, scale, where),
        "gradients": gradients(x, scale, where),
    }


@cache
def on_one_device(is_hot):
    return jax.jit(everything)(hot(X) if is_hot else X, SCALE, WHERE)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        slow(AUTO, "data"),
        slow(AUTO, "model"),
        slow(AUTO, "both"),
        (EXPLICIT, "both"),
    ],
)
def test_jit_gives_the_values_of_one_device_and_keeps_the_sharding(kind, name):
    spec = SPECS[name]
    program = jax.jit(everything)
    for is_hot in (False, True):
        got = program(*place((hot(X) if is_hot else X, SCALE, WHERE), (spec, P(*spec[1:]), spec), kind))
        assert_same(got, on_one_device(is_hot))
        for path, leaf in jax.tree_util.tree_leaves_with_path(got["kept"]):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh(kind), spec), leaf.ndim), path


@pytest.mark.parametrize(
    "spec", [P("data"), P(None, "model"), P(("data", "model")), P(None, ("model", "data"))], ids=str
)
@pytest.mark.parametrize("scale_is_split", [False, slow(True)])
def test_explicit_axes_have_a_rule_for_every_operation(spec, scale_is_split):
    """With explicit axes JAX raises at trace time where an operation does not know the sharding of its result."""
    specs = (spec, P(*spec[1:]) if scale_is_split else P(), spec)
    traced = jax.jit(kept).trace(*shapes((X, SCALE, WHERE), specs, EXPLICIT))
    for out in jax.tree.leaves(traced.out_info):
        assert tuple(out.sharding.spec) == (*spec, None)[:2]
    jax.jit(everything).trace(*shapes((X, SCALE, WHERE), specs, EXPLICIT))


@pytest.mark.parametrize("sizes", [(1, 1), slow((1, 4))], ids=str)
def test_explicit_axes_of_size_one_are_axes(sizes):
    """What lies on one device has a sharding too, which every derivative keeps."""
    small = jax.make_mesh(sizes, MESH_AXES, axis_types=(EXPLICIT, EXPLICIT))
    x = X.reshape(1, 8, 16)
    with jax.set_mesh(small):
        placed = jax.device_put(x, NamedSharding(small, P("data", "model")))

        def loss(x):
            return jnp.sum(rms_normalize(x) ** 3) + jnp.sum(rms(x, -1)) + tree_rms([x])

        def slope(f):
            return lambda x: jnp.sum(jnp.sin(jax.grad(f)(x)))

        def clipped(x):
            tx = clip_by_rms(0.1)
            return tx.update(x, tx.init(x))[0]

        program = jax.jit(lambda x: [f(x) for f in (jax.grad(loss), jax.grad(slope(loss)), clipped)])
        for got, want in zip(program(placed), program(x), strict=True):
            assert got.sharding.is_equivalent_to(placed.sharding, 3)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- what is sent

COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
)


class Sent(NamedTuple):
    """A collective operation: whether it runs always or only in a branch, and what it sends, such as "f32[4,1]"."""

    operation: str
    always: bool
    arrays: tuple[str, ...]

    def elements(self):
        return sum(math.prod(int(n) for n in re.findall(r"\d+", array.split("[")[1])) for array in self.arrays)


def sent(program, *args):
    """The collective operations of a compiled program. A branch of a conditional is a computation other than ENTRY."""
    found, always = [], False
    for line in program.lower(*args).compile().as_text().splitlines():
        if line.endswith("{"):
            always = line.startswith("ENTRY")
        if match := COLLECTIVE.search(line):
            found.append(Sent(match[2], always, tuple(re.findall(r"\w+\[[\d,]*\]", match[1]))))
    return found


def grid(n):
    """n leaves, laid on the mesh in all four ways by turns."""
    names = list(itertools.islice(itertools.cycle(SPECS), n))
    return {f"{i}": TREE[name] for i, name in enumerate(names)}, {f"{i}": SPECS[name] for i, name in enumerate(names)}


def test_the_search_for_communication_finds_it():
    """What the assertions below rest on: programs with one of each of the operations that they rule out."""
    x = shapes(X, P("data", "model"))

    def resharded(spec):
        return sent(jax.jit(lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh(), spec))), x)

    assert {s.operation for s in resharded(P())} == {"all-gather"}
    assert "all-to-all" in {s.operation for s in resharded(P(("data", "model")))}
    shifted = on_mesh(lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]), P("data"), P("data"))
    assert sent(shifted, X) == [Sent("collective-permute", True, ("f32[4,16]",))]
    assert sent(shifted, X)[0].elements() == 64


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("scope", ["global", "block", 1])
@pytest.mark.parametrize("measure", [tree_rms, clip])
@pytest.mark.parametrize("on_cpu", [True, slow(False)])
def test_nothing_but_sums_is_sent(kind, scope, measure, on_cpu, monkeypatch, request):
    if not on_cpu:
        request.getfixturevalue("fresh_traces")
        monkeypatch.setattr(_reduce.lax, "platform_dependent", lambda *args, default, **platforms: default(*args))
    found = sent(jax.jit(lambda tree: measure(tree, scope)), shapes(*grid(8), kind))
    sums_of_a_leaf = 8 if scope == 1 else 1
    assert {s.operation for s in found} == {"all-reduce"}
    # On accelerators at three scales, and no branch. Numbers of leaves that are stacked cross both axes of the mesh.
    for always, scales in ((True, 1), (False, 1)) if on_cpu else ((True, 3),):
        floats = sum(s.elements() for s in found if s.always == always and "pred" not in s.arrays[0])
        assert 0 < floats <= 2 * 8 * sums_of_a_leaf * scales


@pytest.mark.parametrize(
    "function",
    [tree_rms, partial(tree_rms, scope="block"), clip_everything, rms_normalize_each],
    ids=["tree_rms", "tree_rms block", "clip_by_rms", "rms_normalize"],
)
def test_nothing_is_gathered_of_arrays_that_are_yet_to_be_placed(function):
    """While tracing nothing says how `in_shardings` will split them, so no array is reshaped or joined with others."""
    tree = {k: jax.ShapeDtypeStruct((16, 4, 32), jnp.float32) for k in "abc"}
    split = NamedSharding(mesh(), P("data", None, "model"))
    found = sent(jax.jit(function, in_shardings=split), tree)
    assert {s.operation for s in found} == {"all-reduce"}
    assert max(s.elements() for s in found) <= 3 * 16 * 4


def all_reduces(program, tree):
    """How many all-reduces run always, and how many more in the rescaled path; there is no other communication."""
    found = sent(program, tree)
    assert {s.operation for s in found} == {"all-reduce"}
    return sum(s.always for s in found), sum(not s.always for s in found)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("scope", ["global", "block"])
def test_number_of_all_reduces_under_jit_is_that_of_mesh_axes(kind, scope):
    program = jax.jit(lambda tree: tree_rms(tree, scope))
    assert all_reduces(program, shapes(*grid(10), kind)) == (2, 2)
    assert all_reduces(program, shapes(*grid(100), kind)) == (2, 2)


@pytest.mark.slow
def test_number_of_all_reduces_under_jit_for_1000_leaves():
    """Of leaves of one type those of a stack have their sums in one array, and arrays share a message."""
    assert all_reduces(jax.jit(tree_rms), shapes(*grid(1000))) == (2, 2)


def test_number_of_all_reduces_under_shard_map_is_that_of_ways_to_split():
    """One for the leaves over "data", one for those over "model", one for those over both, however many there are."""

    def lowered(leaves):
        tree, specs = grid(leaves)
        return on_mesh(partial(tree_rms, axis_name=MESH_AXES), (specs,), P()), shapes(tree, specs)

    assert all_reduces(*lowered(10)) == (3, 3)
    assert all_reduces(*lowered(100)) == (3, 3)
    # What XLA is given has no more of them either; compiling it would take ten seconds.
    program, tree = lowered(1000)
    assert program.lower(tree).as_text().count("stablehlo.all_reduce") == 6


ROWS, FLAG = ("f32[4]",), ("pred[]",)  # what a device has of 8 rows split over "data"; whether all sums will do


def test_normalizing_features_on_several_devices_sends_one_number_for_each_row():
    args = shapes((np.zeros((8, 32), np.float32), np.zeros(32, np.float32)), (P("data", "model"), P("model")))
    found = Counter(sent(jax.jit(rms_normalize), *args))
    rows, flag = (Sent("all-reduce", True, arrays) for arrays in (ROWS, FLAG))
    in_rescaled_path = rows._replace(always=False)
    assert found == {rows: 1, flag: 1, in_rescaled_path: 1}
    for layer in ("linen", "nnx"):
        assert Counter(sent(jax.jit(lambda x, s, layer=layer: layer_outputs(x, s)[layer]), *args)) == found

    def loss(x, scale):
        return jnp.sum(jnp.sin(rms_normalize(x, scale)))

    # On the way back the mean of x*dx of each row, and for the scale, as for any parameter, the sum over all rows.
    of_features = rows._replace(arrays=("f32[8]",))
    assert Counter(sent(jax.jit(jax.grad(loss, (0, 1))), *args)) == found + Counter({rows: 1, of_features: 1})


@pytest.mark.slow
def test_on_512_devices_nothing_but_numbers_is_sent():
    """In a process of its own, since it needs as many devices as are asked for at its start."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=512", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.helpers.many_devices"]
    run = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    for name, found in json.loads(run.stdout).items():
        messages = [Sent(operation, always, tuple(arrays)) for operation, always, arrays in found]
        assert {message.operation for message in messages} == {"all-reduce"}, name
        assert [sum(m.always == always for m in messages) for always in (True, False)] == [3, 3], name
        assert max(message.elements() for message in messages) == 96, name


def test_normalizing_whole_rows_sends_a_flag_at_most():
    args = shapes((X, SCALE), (P("data"), P()))
    assert sent(jax.jit(rms_normalize), *args) == [Sent("all-reduce", True, FLAG)]


@pytest.mark.usefixtures("fresh_traces")
def test_accelerators_send_one_message_for_each_norm_and_no_flag(monkeypatch):
    """Where there is no branch, the sums for each row at all scales are on their way together.

    That are three, and two where the epsilon is more than what can underflow.
    """
    monkeypatch.setattr(_reduce, "FORM", "tpu")
    args = shapes((X, SCALE), (P("data", "model"), P("model")))
    for epsilon, scales in (1.5e-18, 3), (1.5e-6, 2):
        normalize = jax.jit(partial(rms_normalize, epsilon=epsilon))
        assert sent(normalize, *args) == [Sent("all-reduce", True, ROWS * scales)]
    assert sent(normalize, *shapes((X, SCALE), (P("data"), P()))) == []


# ------------------------------------------------------------------------------------------------------------ shard_map

SUBSETS = [names for n in range(1, 5) for names in itertools.combinations(SPECS, n)]


def of_subsets(tree, **options):
    return {"+".join(names): tree_rms({k: tree[k] for k in names}, **options) for names in SUBSETS}


def test_shard_map_counts_every_element_of_every_mixture_once():
    program = on_mesh(partial(of_subsets, axis_name=MESH_AXES), (SPECS,), P())
    for tree in (TREE, HOT_TREE):
        assert_same(program(tree), {"+".join(names): pooled(*(tree[k] for k in names)) for names in SUBSETS})


def test_without_vma_the_caller_is_taken_at_his_word():
    """Summed over both axes, a leaf counts as often as there are copies of it."""
    copies = {"replicated": 8, "data": 4, "model": 2, "both": 1}
    program = on_mesh(partial(of_subsets, axis_name=MESH_AXES), (SPECS,), P(), check_vma=False)
    for tree in (TREE, HOT_TREE):
        want = {"+".join(names): pooled(*(tree[k] for k in names for _ in range(copies[k]))) for names in SUBSETS}
        assert_same(program(tree), want)


def test_shard_map_gradients_of_every_mixture():
    def both(tree):
        return jax.grad(partial(tree_rms, axis_name=MESH_AXES))(tree)

    inside = on_mesh(both, (SPECS,), SPECS)
    outside = jax.jit(jax.grad(on_mesh(partial(tree_rms, axis_name=MESH_AXES), (SPECS,), P())))
    gradient = jax.jit(jax.grad(tree_rms))
    for tree in (TREE, HOT_TREE):
        want = gradient(tree)
        assert_same(inside(tree), want)
        assert_same(outside(tree), want)


def test_axes_that_are_not_named_are_left_alone():
    def measure(tree):
        over_model = tree_rms({k: tree[k] for k in ("replicated", "both")}, axis_name="model")
        columns = tree_rms({"both": tree["both"]}, 0, axis_name="data")["both"]
        return over_model[None], columns

    program = on_mesh(measure, (SPECS,), (P("data"), P(None, "model")))
    for tree in (TREE, HOT_TREE):
        slices = [pooled(tree["replicated"], half) for half in np.split(tree["both"], 2)]
        assert_same(program(tree), (np.array(slices), rms(tree["both"], 0, keepdims=True)))


def test_a_mask_may_be_the_same_on_devices_that_x_is_split_over():
    def measure(x, rows, columns, axis_name=None):
        return [rms(x, where=where, axis_name=axis_name) for where in (rows, columns, rows & columns)]

    specs = (P("data", "model"), P("data"), P(None, "model"))
    want = jax.jit(measure)
    for check_vma in (True, False):
        program = on_mesh(partial(measure, axis_name=MESH_AXES), specs, P(), check_vma=check_vma)
        for x in (X, hot(X)):
            assert_same(program(x, WHERE[:, :1], WHERE[:1]), want(x, WHERE[:, :1], WHERE[:1]))


def of_arrays(x, scale, where, axis_name=None):
    """Functions of an array whose rows are split over the axis."""
    options = {"axis_name": axis_name}
    return {
        "rms": rms(x, -1, **options),
        "where": rms(x, -1, where=where, **options),
        "tree": tree_rms(x, -1, **options)[:, 0],
        "normalize": rms_normalize(x, scale, **options),
        "normalize where": rms_normalize(x, scale, where=where, **options),
        "clip": clip(x, -1, **options)[0],
        **layer_outputs(x, scale, **options),
    }


def loss_of_arrays(x, scale, where, axis_name=None):
    """The means of all outputs over all devices, added up."""
    loss = sum(jnp.mean(jnp.sin(y)) for y in of_arrays(x, scale, where, axis_name).values())
    return loss if axis_name is None else lax.pmean(loss, MESH_AXES)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_of_functions_of_arrays(check_vma):
    want, want_gradients = jax.jit(of_arrays), jax.jit(jax.grad(loss_of_arrays, (0, 1)))
    specs = (P("data", "model"), P("model"), P("data", "model"))
    out_specs = {k: P(*MESH_AXES[: y.ndim]) for k, y in want.eval_shape(X, SCALE, WHERE).items()}
    values = on_mesh(partial(of_arrays, axis_name="model"), specs, out_specs, check_vma=check_vma)
    loss = partial(loss_of_arrays, axis_name="model")
    outside = jax.jit(jax.grad(on_mesh(loss, specs, P(), check_vma=check_vma), (0, 1)))

    def gradients(x, scale, where):
        dx, dscale = jax.grad(loss, (0, 1))(x, scale, where)
        # Without vma JAX differentiates the sum of the losses of all 8 devices, and by each copy of scale on its own.
        return (dx, dscale) if check_vma else (dx / 8, lax.psum(dscale, "data") / 8)

    inside = on_mesh(gradients, specs, specs[:2], check_vma=check_vma)
    for x in (X, hot(X)):
        args = (x, SCALE, WHERE)
        assert_same(values(*args), want(*args))
        assert_same(outside(*args), want_gradients(*args))
        assert_same(inside(*args), want_gradients(*args))


CLIP_SCOPES = ["global", "block", (0, 1), lambda path, leaf: path if path == "both" else "others"]


def test_shard_map_of_the_clip_in_every_scope():
    def clipped(tree, **options):
        return [clip(tree, scope, **options) for scope in CLIP_SCOPES]

    out_specs = [(SPECS, P())] * len(CLIP_SCOPES)
    program, want = on_mesh(partial(clipped, axis_name=MESH_AXES), (SPECS,), out_specs), jax.jit(clipped)
    for tree in (TREE, HOT_TREE):
        assert_same(program(tree), want(tree))


def test_shard_map_gradient_through_the_clip():
    def loss(tree, axis_name=None):
        """Over all elements, whatever device they are on; replicated ones count once."""
        total = 0.0
        for k, leaf in clip(tree, "global", axis_name=axis_name)[0].items():
            axes = tuple(name for name in MESH_AXES if name in SPECS[k])
            part = jnp.sum(jnp.sin(leaf))
            total += lax.psum(part, axes) if axis_name and axes else part
        return total

    program = on_mesh(jax.grad(partial(loss, axis_name=MESH_AXES)), (SPECS,), SPECS)
    want = jax.jit(jax.grad(loss))
    for tree in (TREE, HOT_TREE):
        assert_same(program(tree), want(tree))


def test_shard_map_may_leave_axes_to_jit():
    """Manual over "model", while the compiler splits over "data"."""

    def measure(x, scale, axis_name=None):
        return tree_rms([x, scale], axis_name=axis_name), rms_normalize(x, scale, axis_name=axis_name)

    specs = (P(None, "model"), P("model"))
    program = on_mesh(partial(measure, axis_name="model"), specs, (P(), specs[0]), axis_names={"model"})
    for x in (X, hot(X)):
        got = program(*place((x, SCALE), (P("data", "model"), P("model"))))
        assert_same(got, measure(x, SCALE))


# -------------------------------------------------------------------------------------------------------- pmap and vmap

MAPS = {
    "pmap": partial(jax.pmap, axis_name="i"),
    "vmap": lambda f, **options: jax.jit(jax.vmap(f, axis_name="i", **options)),
}
PARTS = RNG.normal(size=(8, 3, 16)).astype(np.float32)
HOT_PARTS = PARTS.copy()
HOT_PARTS[5, 1, 2] = 1e30


@pytest.mark.parametrize("name", MAPS)
def test_mapped_axis_is_pooled_like_an_axis_of_the_array(name):
    def of_part(x, scale):
        """The gradient is that of the sum of what all devices have."""
        return {
            "rms": rms(x, axis_name="i"),
            "rows": rms(x, -1, axis_name="i"),
            "tree": tree_rms({"x": x, "row": x[0]}, axis_name="i"),
            "normalize": rms_normalize(x, scale, axis_name="i"),
            "gradient": jax.grad(lambda x: rms(x, axis_name="i"))(x) / 8,
            "gradient of a local loss": jax.grad(lambda x: jnp.sum(jnp.sin(rms_normalize(x, scale, axis_name="i"))))(x),
        }

    def of_whole(x, scale):
        scale = scale[None, None]
        return {
            "rms": jnp.broadcast_to(rms(x), 8),
            "rows": jnp.broadcast_to(rms(x, (0, 2)), (8, 3)),
            "tree": jnp.broadcast_to(tree_rms({"x": x, "row": x[:, 0]}), 8),
            "normalize": rms_normalize(x, scale, axis=(0, 2)),
            "gradient": jax.grad(rms)(x),
            "gradient of a local loss": jax.grad(lambda x: jnp.sum(jnp.sin(rms_normalize(x, scale, axis=(0, 2)))))(x),
        }

    program, want = MAPS[name](of_part, in_axes=(0, None)), jax.jit(of_whole)
    for x in (PARTS, HOT_PARTS):
        assert_same(program(x, SCALE), want(x, SCALE))


GROUPS = [[0, 2, 4, 6], [1, 3, 5, 7]]


def of_groups(x, scale):
    """What a layer over GROUPS is to give: parts with even and odd numbers each share a norm."""
    pairs = x.reshape(4, 2, 3, 16)
    return rms_normalize(pairs, scale[None, None, None], axis=(0, 3)).reshape(x.shape)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_pmap_of_layers_over_groups_of_devices(name):
    """In the hot data one group of devices takes the rescaled path and the other does not."""

    def loss(x, scale):
        y = layer_outputs(x, scale, axis_name="i", axis_index_groups=GROUPS)[name]
        return jnp.sum(jnp.sin(y)), y

    program = jax.pmap(jax.grad(loss, has_aux=True), axis_name="i", in_axes=(0, None))
    want = jax.jit(jax.grad(lambda x, scale: jnp.sum(jnp.sin(of_groups(x, scale)))))
    for x in (PARTS, HOT_PARTS):
        gradient, y = program(x, SCALE)
        assert_same(y, of_groups(x, SCALE))
        expected, largest = want(x, SCALE), float(np.abs(y).max())
        for group in GROUPS:  # one by one, since beside the gradients of the others those of the hot one are nothing
            assert_same(gradient[np.array(group)], expected[np.array(group)], condition=largest)


def test_shard_map_of_layers_over_groups_of_devices():
    """Without vma; JAX itself has no groups under check_vma=True, nor under vmap."""
    devices = jax.make_mesh((8,), ("i",), axis_types=(AUTO,))
    program = jax.jit(
        jax.shard_map(
            partial(layer_outputs, axis_name="i", axis_index_groups=GROUPS),
            mesh=devices, in_specs=(P("i"), P()), out_specs=P("i"), check_vma=False,
        )
    )  # fmt: skip
    for x in (PARTS, HOT_PARTS):
        for y in program(x, SCALE).values():
            assert_same(y, of_groups(x, SCALE))


def test_groups_of_different_size_are_refused():
    layer = rmsjax.linen.RMSNorm(axis_name="i", axis_index_groups=[[0], [1, 2, 3, 4, 5, 6, 7]], use_scale=False)
    with pytest.raises(ValueError, match=r"RMSNorm: axis_index_groups must be of equal size, got \(\(0,\), \(1, 2"):
        jax.pmap(partial(layer.apply, {}), axis_name="i")(PARTS)


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_is_the_same_on_one_device_on_eight_by_jit_and_by_shard_map():
    """20 steps with RMSNorm and clip_by_rms. With several processes: test_multiprocess.py."""
    one = worker.train(worker.make_mesh((1, 1), jax.devices()[:1]))
    assert 0 < one["history"]["clip"].num_clipped[-1] < worker.STEPS  # some updates are clipped and others are not
    for by_hand in (False, True):
        eight = worker.train(worker.make_mesh(), by_hand=by_hand)
        jax.tree_util.tree_map_with_path(worker.assert_alike, eight, one)
        for name, spec in worker.SPECS.items():
            momentum = optax.tree.get(eight["state"], "trace")[name]
            for leaf in (eight["params"][name], momentum):
                assert leaf.sharding.is_equivalent_to(NamedSharding(worker.make_mesh(), spec), leaf.ndim)
