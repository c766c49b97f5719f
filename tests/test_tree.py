"""Scopes of a tree, and the containers that a tree may be made of."""

import contextlib
import dataclasses
from functools import partial
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from rmsjax import rms, rms_by_path, rms_penalty, rms_report, tree_rms
from rmsjax._boxes import unboxed

pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(0)
W, B, S = (RNG.normal(size=shape).astype(np.float32) for shape in [(4, 6), (6,), (3, 4, 5)])
TREE = {"dense": {"kernel": W, "bias": B}, "stack": S}


def pooled(*leaves):
    return np.sqrt(np.mean(np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64) ** 2))


def test_global_counts_every_element_once():
    np.testing.assert_allclose(tree_rms(TREE), pooled(W, B, S), rtol=1e-6)
    np.testing.assert_allclose(tree_rms(TREE), rms(np.concatenate([np.ravel(x) for x in (W, B, S)])), rtol=1e-6)


def test_block_is_each_leaf_by_itself():
    got = tree_rms(TREE, "block")
    assert jax.tree.structure(got) == jax.tree.structure(TREE)
    jax.tree.map(lambda g, leaf: np.testing.assert_allclose(g, pooled(leaf), rtol=1e-6), got, TREE)


@pytest.mark.parametrize("axes", [0, -1, (0,), [0]])
def test_axes_are_kept_as_size_one(axes):
    got = tree_rms(TREE, axes)
    jax.tree.map(
        lambda g, leaf: np.testing.assert_allclose(
            g, np.sqrt(np.mean(leaf**2, axes[0] if isinstance(axes, (list, tuple)) else axes, keepdims=True)), rtol=1e-6
        ),
        got,
        TREE,
    )


def test_callable_sees_paths_and_mixes_scopes():
    seen = []

    def scope(path, leaf):
        seen.append((path, leaf.shape))
        if path == "stack":
            return (1, 2)
        return "dense" if path.startswith("dense/") else "block"

    got = tree_rms(TREE, scope)
    assert seen == [("dense/bias", (6,)), ("dense/kernel", (4, 6)), ("stack", (3, 4, 5))]
    assert got["stack"].shape == (3, 1, 1)
    np.testing.assert_allclose(got["dense"]["kernel"], pooled(W, B), rtol=1e-6)
    np.testing.assert_allclose(got["dense"]["bias"], pooled(W, B), rtol=1e-6)
    np.testing.assert_allclose(got["stack"][:, 0, 0], np.sqrt((S**2).mean((1, 2))), rtol=1e-6)


@pytest.mark.parametrize("shapes", [[(3,), (3,)], [(2, 3), (4,), (2, 3), ()], [(5000,), (8, 700), (3,)]], ids=str)
def test_callable_that_says_block_for_every_leaf(shapes):
    """Each leaf is by itself, also where leaves are alike; what is called "block" is not one pool of that name."""
    leaves = [(i + 1) * RNG.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)]
    seen = [pooled(leaf) for leaf in leaves]
    for scope in "block", lambda path, leaf: "block":
        np.testing.assert_allclose(tree_rms(leaves, scope), seen, rtol=1e-6)
        np.testing.assert_allclose([*rms_by_path(leaves, scope=scope).values()], seen, rtol=1e-6)
        np.testing.assert_allclose(rms_penalty(leaves, 0.0, scope), np.mean(np.square(seen)), rtol=1e-6)
    some = tree_rms(leaves, lambda path, leaf: "block" if path == "0" else "rest")
    np.testing.assert_allclose(some[:2], [seen[0], pooled(*leaves[1:])], rtol=1e-6)


def test_label_may_take_any_word_and_interleave():
    leaves = [RNG.normal(size=n).astype(np.float32) for n in (3, 5, 7, 2)]
    got = tree_rms(leaves, lambda path, leaf: "even" if int(path) % 2 == 0 else "global")
    np.testing.assert_allclose(got[0], pooled(leaves[0], leaves[2]), rtol=1e-6)
    np.testing.assert_allclose(got[3], pooled(leaves[1], leaves[3]), rtol=1e-6)


def test_one_pool_out_of_range_leaves_the_others_alone():
    tree = {"a": jnp.array([3e30, 4e30]), "b": jnp.array([3e-30, 4e-30]), "c": jnp.array([3.0, 4.0]), "d": jnp.zeros(2)}
    got = tree_rms(tree, "block")
    np.testing.assert_allclose([got["a"] / 1e30, got["b"] * 1e30, got["c"]], [np.sqrt(12.5)] * 3, rtol=1e-6)
    assert got["d"] == 0
    np.testing.assert_allclose(tree_rms(tree), 5e30 / np.sqrt(8), rtol=1e-6)


def test_nan_stays_in_its_pool():
    got = tree_rms({"a": jnp.array([jnp.nan, 1.0]), "b": jnp.ones(2)}, "block")
    assert jnp.isnan(got["a"])
    assert got["b"] == 1
    assert jnp.isnan(tree_rms({"a": jnp.array([jnp.nan, 1.0]), "b": jnp.ones(2)}))


@pytest.mark.parametrize("tree", [{}, [], None, {"a": None}, optax.MaskedNode()])
def test_trees_without_leaves(tree):
    assert tree_rms(tree) == 0
    assert tree_rms(tree).dtype == jnp.float32
    assert jax.tree.structure(tree_rms(tree, "block")) == jax.tree.structure(tree)
    assert rms_by_path(tree) == {}


def test_what_is_not_a_leaf_is_passed_over():
    tree = {"a": W, "none": None, "masked": optax.MaskedNode(), "empty": jnp.zeros((0, 3))}
    np.testing.assert_allclose(tree_rms(tree), pooled(W), rtol=1e-6)
    got = tree_rms(tree, "block")
    assert got["none"] is None
    assert got["masked"] == optax.MaskedNode()
    assert got["empty"] == 0
    assert jax.grad(lambda e: tree_rms({"a": W, "e": e}))(jnp.zeros((0, 3))).shape == (0, 3)


class Pair(NamedTuple):
    first: object
    second: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    weight: object
    value: object


def frozen():
    return flax.core.FrozenDict({"dense": {"kernel": W, "bias": B}})


class Block(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
        self.linear.kernel[...] = jnp.asarray(W)
        self.linear.bias[...] = jnp.asarray(B)


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        (Pair(B, W), ["first", "second"]),
        (Record(B, W), ["weight", "value"]),
        ([B, (W,)], ["0", "1/0"]),
        (frozen(), ["dense/bias", "dense/kernel"]),
        (nnx.state(Block(), nnx.Param), ["linear/bias", "linear/kernel"]),
        (nnx.to_pure_dict(nnx.state(Block(), nnx.Param)), ["linear/bias", "linear/kernel"]),
    ],
    ids=["namedtuple", "dataclass", "sequence", "FrozenDict", "nnx.State", "pure dict"],
)
def test_containers(tree, paths):
    got = rms_by_path(tree)
    assert list(got) == paths
    np.testing.assert_allclose(list(got.values()), [pooled(B), pooled(W)], rtol=1e-6)
    np.testing.assert_allclose(tree_rms(tree), pooled(W, B), rtol=1e-6)
    assert jax.tree.structure(tree_rms(tree, "block")) == jax.tree.structure(unboxed(tree))
    assert list(rms_by_path(tree, sep=".")) == [path.replace("/", ".") for path in paths]


def test_linen_variables():
    variables = linen.Dense(6).init(jax.random.key(0), jnp.ones((1, 4)))
    assert list(rms_by_path(variables["params"])) == ["bias", "kernel"]


def test_by_path_loses_no_leaf():
    with pytest.raises(ValueError, match=r"rms_by_path: two entries have the path 'a/b'.*another sep than '/'"):
        rms_by_path({"a/b": W, "a": {"b": B}})
    assert len(rms_by_path({"a/b": W, "a": {"b": B}}, sep=".")) == 2


def test_by_path_takes_a_scope_and_works_under_jit():
    got = jax.jit(lambda t: rms_by_path(t, scope=0))(TREE)
    assert {k: v.shape for k, v in got.items()} == {"dense/bias": (1,), "dense/kernel": (1, 6), "stack": (1, 4, 5)}


def test_by_path_has_one_entry_for_each_pool():
    """A label is the key of what it pools: a dashboard needs no curve twice."""
    tree = {"a": W, "b": B, "c": S}
    got = rms_by_path(tree, scope=lambda path, leaf: "ab" if path in "ab" else "block")
    assert list(got) == ["ab", "c"]
    np.testing.assert_allclose([*got.values()], [pooled(W, B), pooled(S)], rtol=1e-6)
    assert {path: float(norm) for path, norm in rms_by_path(tree, scope="global").items()} == {
        "all": float(tree_rms(tree))
    }


def stack(dtype=np.float32, axis=0, depth=3):
    """(a tree with stacked leaves, the same with a tree for each layer); leaves of a layer have 0, 1 and 2 axes."""
    rng = np.random.default_rng(0)
    shapes = {"bias": (5,), "kernel": (4, 5), "scale": ()}
    layers = [{k: np.asarray(rng.normal(size=s) * 3, dtype) for k, s in shapes.items()} for _ in range(depth)]
    rest = {"embed": np.asarray(rng.normal(size=(7, 4)), dtype), "head": np.asarray(rng.normal(size=(4,)), dtype)}
    joined = {k: np.stack([layer[k] for layer in layers], min(axis, layers[0][k].ndim)) for k in shapes}
    if axis:
        del joined["scale"], joined["bias"]
        layers = [{"kernel": layer["kernel"]} for layer in layers]
    return rest | {"blocks": joined}, rest | {"blocks": layers}


@pytest.mark.parametrize(("dtype", "axis"), [(jnp.float32, 0), (jnp.bfloat16, 0), (jnp.complex64, 1), (jnp.float16, 2)])
def test_layers_of_a_stack_are_leaves_by_themselves(dtype, axis):
    """Names, order and norms are those of the tree that has a node for each layer."""
    tree, apart = stack(dtype, axis)
    stacked = {"blocks": axis} if axis else "blocks"
    got, want = jax.jit(lambda tree: rms_by_path(tree, stacked=stacked))(tree), rms_by_path(apart)
    assert [*rms_by_path(tree, stacked=stacked)] == [*want]
    assert all(norm.shape == () for norm in got.values())
    for path, norm in want.items():
        np.testing.assert_allclose(got[path], norm, rtol=1e-6)
    assert [*rms_by_path({"net": tree}, stacked=["net.blocks"] if axis == 0 else {"net.blocks": axis}, sep=".")] == [
        f"net.{path.replace('/', '.')}" for path in want
    ]


@pytest.mark.parametrize("axis", [np.int64(1), np.array(1), jnp.int32(1), -1, np.int8(-1)])
def test_the_axis_of_a_stack_is_any_integer(axis):
    assert [*rms_by_path({"w": jnp.ones((2, 3))}, stacked={"w": axis})] == ["w/0", "w/1", "w/2"]


def test_the_whole_tree_may_be_a_stack():
    assert [*rms_by_path(stack()[0]["blocks"], stacked="")][:4] == ["0/bias", "0/kernel", "0/scale", "1/bias"]
    assert [*rms_by_path(jnp.ones((2, 3)), stacked="")] == ["0", "1"]
    assert [*rms_by_path({"w": jnp.ones((2, 3)), "x": jnp.ones((0, 3))}, stacked=["w", "x"])] == ["w/0", "w/1"]


@pytest.mark.parametrize("size", [1.0, 1e37, 1e-37, np.inf, np.nan])
def test_leaves_of_a_layer_may_be_pooled(size):
    """Layer by layer, also at the ends of the range, though the parts have weights that differ by much."""
    tree, apart = stack()
    big = {"kernel": np.ones((3, 300, 40), np.float32), "scale": np.full(3, 2, np.float32)}
    tree["blocks"] |= big
    for k in range(3):
        apart["blocks"][k] |= {name: leaf[k] for name, leaf in big.items()}
    tree, apart = (jax.tree.map(lambda x: np.float32(x * np.float32(size)), each) for each in (tree, apart))
    got = rms_by_path(tree, stacked="blocks", scope=lambda path, leaf: path.split("/")[0])
    want = rms_by_path(apart, scope=lambda path, leaf: "/".join(path.split("/")[:2]))
    assert [*got] == [*want] == ["blocks/0", "blocks/1", "blocks/2", "embed", "head"]
    np.testing.assert_allclose([*got.values()], [*want.values()], rtol=1e-6)


def test_a_wide_leaf_widens_its_layer(x64):
    tree = {"wide": jnp.full((2, 3), 1e200), "narrow": jnp.ones((2, 3), jnp.float32)}
    got = rms_by_path(tree, stacked="", scope=lambda path, leaf: "layer")
    np.testing.assert_allclose(got["layer/1"], 1e200 / np.sqrt(2), rtol=1e-15)
    assert rms_by_path(tree, stacked="")["0/narrow"].dtype == jnp.float32


def test_layers_of_an_nnx_model():
    @nnx.vmap(in_axes=(0, None))
    def blocks(key, width):
        return nnx.Linear(width, width, rngs=nnx.Rngs(key))

    state = nnx.state(blocks(jax.random.split(jax.random.key(0), 2), 4), nnx.Param)
    got = rms_by_path({"blocks": state}, stacked="blocks")
    assert [*got] == ["blocks/0/bias", "blocks/0/kernel", "blocks/1/bias", "blocks/1/kernel"]
    np.testing.assert_allclose(got["blocks/1/kernel"], pooled(np.asarray(state["kernel"][...])[1]), rtol=1e-6)


def test_layers_that_are_split_over_devices():
    """Each leaf counts as large as it is on all devices together."""
    tree = {"split": RNG.normal(size=(3, 8, 2)).astype(np.float32), "whole": RNG.normal(size=(3, 5)).astype(np.float32)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"split": P(None, "data"), "whole": P()}

    def norms(tree):
        return rms_by_path(tree, stacked="", scope=lambda path, leaf: "layer", axis_name="data")

    got = jax.shard_map(norms, mesh=mesh, in_specs=(specs,), out_specs=P())(tree)
    want = [pooled(tree["split"][k], tree["whole"][k]) for k in range(3)]
    np.testing.assert_allclose([got[f"layer/{k}"] for k in range(3)], want, rtol=1e-6)


@pytest.mark.parametrize(("kinds", "is_set"), [("Explicit Explicit", True), ("Explicit Auto", False)])
def test_layers_that_lie_on_different_devices(kinds, is_set):
    """Split over layers, over another axis, over both, and not: one by one, and joined under a label."""
    types = tuple(getattr(jax.sharding.AxisType, kind) for kind in kinds.split())
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=types)
    specs = {"layers": P("data"), "rows": P(None, "data"), "all": P("model", "data"), "scale": P("data"), "whole": P()}
    tree = {k: RNG.normal(size=(4, 8, 2) if k != "scale" else 4).astype(np.float32) for k in specs}
    placed = {k: jax.device_put(x, jax.sharding.NamedSharding(mesh, specs[k])) for k, x in tree.items()}
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        for scope in ("block", lambda path, leaf: "layer"):
            norms = partial(rms_by_path, stacked="", scope=scope)
            want = norms(tree)
            for got in (norms(placed), jax.jit(norms)(placed)):
                assert {*got} == {*want}
                np.testing.assert_allclose([got[k] for k in want], [*want.values()], rtol=1e-6)
        rows = rms_report(placed, stacked="")
    np.testing.assert_allclose([row.rms[0] for row in rows], [*rms_by_path(tree, stacked="").values()], rtol=1e-6)


def test_a_stack_is_not_cut_into_layers():
    """One reduction for all of them: a slice for each would be copied on a CPU, and gathered where it is split."""
    text = str(jax.make_jaxpr(partial(rms_by_path, stacked="w"))({"w": jnp.ones((64, 8, 8))}))
    assert text.count("reduce_sum") < 8


def test_wide_leaves_widen_only_their_own_pool(x64):
    tree = {"wide": jnp.array([1e200, 1e200], jnp.float64), "narrow": jnp.ones(2, jnp.float32)}
    got = tree_rms(tree, "block")
    assert got["wide"].dtype == jnp.float64
    assert got["narrow"].dtype == jnp.float32
    np.testing.assert_allclose(got["wide"], 1e200, rtol=1e-15)
    np.testing.assert_allclose(tree_rms(tree), np.sqrt(0.5) * 1e200, rtol=1e-15)
