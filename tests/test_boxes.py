"""Boxes around arrays, those of Flax and haliax and of nobody known: no function sees them, and no layer is one."""

import dataclasses
import warnings
from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx

import rmsjax
from rmsjax._boxes import is_box, unboxed
from tests.helpers.marks import quick_of
from tests.helpers.optax_suite import ELEMENTS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what newer versions of JAX and Equinox have instead
    import haliax as hax

pytestmark = pytest.mark.usefixtures("quick_compiles")


@jax.tree_util.register_pytree_node_class
class Quantity:
    """An array with a unit, that presents itself as an array."""

    def __init__(self, magnitude, unit):
        self.magnitude, self.unit = magnitude, unit

    dtype = property(lambda self: self.magnitude.dtype)
    shape = property(lambda self: self.magnitude.shape)

    def __call__(self):
        return self.magnitude

    def tree_flatten(self):
        return (self.magnitude,), self.unit

    @classmethod
    def tree_unflatten(cls, unit, children):
        return cls(*children, unit)


@jax.tree_util.register_pytree_node_class
class Checked:
    """An array with a name for each axis, that cannot be rebuilt around an array of another rank."""

    def __init__(self, inner, names):
        if hasattr(inner, "ndim") and inner.ndim != len(names):
            raise ValueError(f"{names} do not name the axes of shape {inner.shape}")
        self.inner, self.names = inner, names

    def tree_flatten(self):
        return (self.inner,), self.names

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(*children, names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Labelled:
    value: Any
    label: str = dataclasses.field(metadata={"static": True})


def axes_of(x):
    return tuple(hax.Axis(f"axis{a}", n) for a, n in enumerate(x.shape))


def names_of(x):
    return tuple(f"axis{a}" for a in range(x.ndim))


BOXES = {
    "nnx.Param": nnx.Param,
    "nnx.Param with metadata": lambda x: nnx.Param(x, names=names_of(x)),
    "linen.Partitioned": lambda x: linen.Partitioned(x, names_of(x)),
    "linen.LogicallyPartitioned": lambda x: linen.LogicallyPartitioned(x, names_of(x)),
    "haliax.NamedArray": lambda x: hax.NamedArray(x, axes_of(x)),
    "with dtype and shape": lambda x: Quantity(x, "metre"),
    "that checks the rank": lambda x: Checked(x, names_of(x)),
    "dataclass": lambda x: Labelled(x, "kernel"),
    "box in a box": lambda x: nnx.Param(Checked(linen.Partitioned(x, names_of(x)), names_of(x))),
}
RNG = np.random.default_rng(0)
BARE = {
    "dense": {name: jnp.asarray(RNG.normal(size=n), jnp.float32) for name, n in (("bias", 5), ("kernel", (4, 5)))},
    "gain": jnp.float32(3.0),
    "stack": [jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32)],
}
PATHS = ["dense/bias", "dense/kernel", "gain", "stack/0"]


def per_unit(path, leaf):
    return 0 if path.endswith("kernel") else "vectors" if leaf.ndim < 2 else "block"


SCOPES = {"global": "global", "block": "block", "by path": per_unit}


def boxed(kind):
    return jax.tree.map(BOXES[kind], BARE)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, want)


@pytest.mark.parametrize("kind", BOXES)
def test_no_function_sees_a_box(kind):
    tree = boxed(kind)
    same(unboxed(tree), BARE)
    for scope in SCOPES.values():
        same(rmsjax.tree_rms(tree, scope), rmsjax.tree_rms(BARE, scope))
        same(rmsjax.rms_penalty(tree, 0.5, scope), rmsjax.rms_penalty(BARE, 0.5, scope))
    assert [*rmsjax.rms_by_path(tree)] == [row.path for row in rmsjax.rms_report(tree)] == PATHS
    same(rmsjax.rms_by_path(tree, scope=per_unit), rmsjax.rms_by_path(BARE, scope=per_unit))
    same(rmsjax.rms_operator_norm_by_path(tree), rmsjax.rms_operator_norm_by_path(BARE))


def norms_of(state):
    """The fields of norms of all rmsjax states in a state."""
    states = [
        s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "norm_fields")) if hasattr(s, "norm_fields")
    ]
    assert states
    return [getattr(s, field) for s in states for field in s.norm_fields]


def two_steps(name, params):
    tx = ELEMENTS[name].make(per_unit)
    step = jax.jit(tx.update)
    _, state = step(params, tx.init(params), params)
    return step(params, state, params)


@cache
def bare_steps(name):
    return two_steps(name, BARE)


@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("name", quick_of(ELEMENTS, "clip_by_rms", "record_rms", "scale_by_stable_adam"))
def test_states_hold_norms_without_boxes(name, kind):
    """What a box says of a parameter is true of an update, and not of a norm."""
    (updates, state), (bare_updates, bare_state) = two_steps(name, boxed(kind)), bare_steps(name)
    assert jax.tree.structure(updates) == jax.tree.structure(boxed(kind))
    same(unboxed(updates), bare_updates)
    same(unboxed(state), bare_state)
    same(norms_of(state), norms_of(bare_state))
    assert [row.path for row in rmsjax.rms_report(state)] == [row.path for row in rmsjax.rms_report(bare_state)]


@pytest.mark.parametrize("kind", BOXES)
def test_masked_and_empty_boxes(kind):
    make = BOXES[kind]
    tree = {"a": make(jnp.ones((2, 3))), "b": make(jnp.zeros((0, 3)))}
    assert rmsjax.rms_by_path(tree) == {"a": 1, "b": 0}
    tx = optax.masked(rmsjax.record_rms(), {"a": True, "b": False})
    _, state = tx.update(tree, tx.init(tree), tree)
    assert [(row.path, *row.rms) for row in rmsjax.rms_report(state)] == [("inner_state/rms/a", 1.0)]


@dataclasses.dataclass
class OptParam:
    """As of axlearn: no node, so a leaf, that holds an array."""

    value: Any
    weight_decay_scale: float = 1.0


HOLDERS = {
    "NamedArray": ("array", BOXES["haliax.NamedArray"]),
    "Partitioned": ("value", BOXES["linen.Partitioned"]),
    "OptParam": ("value", OptParam),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_arrays_have_no_boxes_and_messages_say_what_to_pass(kind):
    """The type of it in one line, and the attribute."""
    attribute, make = HOLDERS[kind]
    for x in (jnp.ones((2, 3)), np.ones((200, 3), np.float32)):
        box = make(x)
        # Flax's frames end in a word of JAX on them.
        said = rf"array of .*, got .*{kind}.*\. Pass the array that it holds, its \.{attribute}\.(\n-|$)"
        for call in (
            rmsjax.rms,
            rmsjax.rms_normalize,
            lambda x: rmsjax.linen.RMSNorm().init(jax.random.key(0), x),
            rmsjax.nnx.RMSNorm(3, rngs=nnx.Rngs(0)),
        ):
            with pytest.raises(TypeError, match=said) as caught:
                call(box)
            assert len(str(caught.value).splitlines()[0]) < 200
        assert rmsjax.rms(getattr(box, attribute)) == 1
    if kind == "OptParam":
        for call in (rmsjax.tree_rms, rmsjax.clip_by_rms(1.0).init, rmsjax.rms_penalty, rmsjax.rms_report):
            with pytest.raises(TypeError, match=rf"leaf 'w' must be an {said}"):
                call({"w": box})
        with pytest.raises(TypeError, match=rf"leaf 'w' of params must be an {said}"):
            rmsjax.clip_by_relative_rms(1.0).update({"w": x}, None, {"w": box})


class Many:
    def __repr__(self):
        return "Many(\n" + 100 * "  entry,\n" + ")"


@pytest.mark.parametrize("leaf", ["mean", object(), np.array([None, "a"]), b"x" * 200, Many()], ids=type)
def test_a_leaf_that_is_no_array_and_holds_none(leaf):
    with pytest.raises(TypeError, match=r"leaf 'w' must be an array of .* leave it out of the tree") as caught:
        rmsjax.tree_rms({"w": leaf})
    assert "\n" not in str(caught.value)
    assert "Cast" not in str(caught.value) or hasattr(leaf, "dtype")


# ------------------------------------------------------------------------------------------------------------ no boxes


class Only(NamedTuple):
    value: Any


class Mapping(dict):
    """A mapping that names no keys, as that of haiku."""


jax.tree_util.register_pytree_node(
    Mapping, lambda m: (tuple(m.values()), tuple(m)), lambda k, v: Mapping(zip(k, v, strict=True))
)


@jax.tree_util.register_pytree_node_class
class Layer:
    """A layer with one parameter, that names no keys."""

    def __init__(self, weight, epsilon):
        self.weight, self.epsilon = weight, epsilon

    def __call__(self, x):
        return self.weight * x

    def tree_flatten(self):
        return (self.weight,), self.epsilon

    @classmethod
    def tree_unflatten(cls, epsilon, children):
        return cls(*children, epsilon)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Table:
    rows: Any
    dtype: str = dataclasses.field(metadata={"static": True})  # of something else


X = jnp.ones((2, 3))
IN, OUT = hax.Axis("in", 2), hax.Axis("out", 3)
NO_BOXES = {
    "array": (X, ""),
    "dict": ({"value": X}, "value"),
    "list": ([X], "0"),
    "tuple": ((X,), "0"),
    "NamedTuple": (Only(X), "value"),
    "FrozenDict": (flax.core.FrozenDict({"value": X}), "value"),
    "nnx.State": (nnx.State({"value": X}), "value"),
    "mapping without keys": (Mapping(a=X), "0"),
    "layer without keys": (Layer(X, 1e-6), "0"),
    "dataclass": (Table(X, "int8"), "rows"),
    "eqx.nn.Embedding": (eqx.nn.Embedding(weight=X), "weight"),
    "eqx.nn.Linear": (eqx.nn.Linear(3, 2, use_bias=False, key=jax.random.key(0)), "weight"),
    "nnx.Embed": (nnx.state(nnx.Embed(3, 2, rngs=nnx.Rngs(0))), "embedding"),
    "hax.nn.Embedding": (hax.nn.Embedding.init(IN, OUT, key=jax.random.key(0)), "weight"),
    "hax.nn.Linear": (hax.nn.Linear.init(IN, OUT, key=jax.random.key(0), use_bias=False), "weight"),
    "wrapper without a word": (jax.tree_util.Partial(jnp.add, X), "0/0"),
}


@pytest.mark.parametrize("kind", NO_BOXES)
def test_a_node_with_one_array_is_not_a_box(kind):
    node, path = NO_BOXES[kind]
    assert not is_box(node)
    assert [*rmsjax.rms_by_path({"at": node})] == ["/".join(filter(None, ("at", path)))]
    norms = rmsjax.tree_rms(node, "block")
    assert isinstance(norms, type(node))
    assert jax.tree.leaves(norms) == [*rmsjax.rms_by_path(node).values()]


# ------------------------------------------------------------------------------------------------------------- haliax


class Model(eqx.Module):
    """Stacked layers and a head, as levanter's models hold them."""

    layers: Any
    head: hax.nn.Linear

    @staticmethod
    def init(key):
        hidden, out, layer = hax.Axis("hidden", 16), hax.Axis("out", 4), hax.Axis("layer", 2)
        keys = jax.random.split(key, 2)
        layers = hax.vmap(hax.nn.Linear.init, layer)(
            hidden, hidden.alias("hidden2"), key=jax.random.split(keys[0], layer.size)
        )
        return Model(layers, hax.nn.Linear.init(hidden, out, key=keys[1]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what haliax uses of JAX
@pytest.mark.parametrize("name", quick_of(ELEMENTS, "clip_by_rms"))
def test_a_step_of_levanter(name, tmp_path):
    """State sharded by the names of axes, a step under `named_jit`, saved, restored into shapes, one more step."""
    tx = ELEMENTS[name].make("block")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    mapping = {"hidden": "data"}

    def init(key):
        model = Model.init(key)
        return model, tx.init(model)

    def step(model, state):
        updates, state = tx.update(model, state, model)
        return optax.apply_updates(model, updates), state

    def flat(tree):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]

    expected = [init(jax.random.key(0))]
    for _ in range(2):
        expected.append(step(*expected[-1]))

    with jax.numpy_dtype_promotion("standard"), hax.partitioning.set_mesh(mesh), hax.axis_mapping(mapping):
        first = hax.named_jit(init)(jax.random.key(0))
        second = hax.named_jit(step)(*first)
        assert "data" in second[0].head.weight.array.sharding.spec
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(tmp_path / "saved", jax.tree.leaves(second))
        checkpointer.wait_until_finished()
        shapes = eqx.filter_eval_shape(init, jax.random.key(0))
        shardings = hax.partitioning.infer_resource_partitions(shapes, mapping, preserve_existing_shardings=False)
        shardings = jax.tree.leaves(shardings)
        leaves, treedef = jax.tree.flatten(shapes)
        targets = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to) for s, to in zip(leaves, shardings, strict=True)]
        restored = treedef.unflatten(checkpointer.restore(tmp_path / "saved", targets))
        third = hax.named_jit(step)(*restored)
    for got, want in zip((first, second, third), expected, strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for g, w in zip(flat(got), flat(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
