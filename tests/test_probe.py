"""What is tagged comes out: from plain functions under every transformation, and from every layer of Flax models.

References are computed without the probe: plain functions are written a second time, unrolled, with their values and a
perturbation at each point; models are called layer by layer.
"""

import dataclasses
import itertools
import threading
import warnings
from collections import OrderedDict
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call
from jax.experimental import pallas as pl
from jax.experimental import xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir, partial_eval
from jax.sharding import PartitionSpec as P

import rmsjax
from rmsjax import _tags, activation_rms, gradient_rms, rms
from rmsjax.probe import capture, collect, tag
from tests.helpers.marks import slow

pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(0)


def gaussian(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def assert_trees_close(found, want, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, want)


# ----------------------------------------------------------------------------------------------------- plain functions


@jax.custom_jvp
def cube(x):
    return tag(x**3, "custom")


@cube.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return cube(x), 3 * x**2 * t


@jax.custom_vjp
def flip(x):
    return tag(-x, "flip")


flip.defvjp(lambda x: (flip(x), None), lambda _, ct: (-ct,))


def network(w, x):
    """Tags inside every kind of control flow."""
    x = tag(x * w["scale"], "scaled")
    x = jax.jit(lambda x: tag(jnp.tanh(x), "jit"))(x)

    def layer(x, kernel):
        x = jax.checkpoint(lambda x: tag(jnp.sin(tag(x @ kernel, "dense")), "act"))(x)
        return x, jnp.sum(x)

    x, sums = jax.lax.scan(layer, x, w["kernels"])
    x = jax.vmap(lambda column: tag(column * 2.0, "column"), in_axes=1, out_axes=1)(x)
    x = jax.lax.cond(jnp.sum(x) > 1e6, lambda x: tag(tag(3 * x, "branch"), "other"), lambda x: tag(x / 2, "branch"), x)
    x = flip(cube(x))
    x, rest = tag((x, {"half": x.astype(jnp.bfloat16), "text": "left alone", "none": None}), "tree")
    return jnp.sum(x**2) + jnp.sum(rest["half"].astype(jnp.float32)) + jnp.sum(sums)


def unrolled(w, x, p):
    """`network` without control flow: its value and those of its tags, each of which is perturbed by p[name]."""
    values = {}

    def at(name, x, k=None):
        x = x + (p[name] if k is None else p[name][k]) if name in p else x
        values.setdefault(name, []).append(x)
        return x

    x = at("scaled", x * w["scale"])
    x = at("jit", jnp.tanh(x))
    sums = []
    for k, kernel in enumerate(w["kernels"]):
        x = at("act", jnp.sin(at("dense", x @ kernel, k)), k)
        sums.append(jnp.sum(x))
    x = at("column", (x * 2.0).T).T
    x = at("branch", x / 2)
    x = at("custom", x**3)
    x = at("flip", -x)
    x, half = at("tree", x), x.astype(jnp.bfloat16)
    values = {name: jnp.stack(v) if len(v) > 1 else v[0] for name, v in values.items()}
    values["other"] = jnp.full_like(x, jnp.nan)
    values["tree"] = (values["tree"], {"half": half, "text": None, "none": None})
    return jnp.sum(x**2) + jnp.sum(half.astype(jnp.float32)) + sum(sums), values


W = {"scale": np.float32(0.7), "kernels": gaussian(3, 4, 4)}
X = gaussian(5, 4)
UNROLLED = jax.jit(unrolled)


@pytest.fixture(scope="module")
def reference():
    return UNROLLED(W, X, {})


def test_values_come_out_of_all_control_flow(reference):
    """Operation by operation, and without a leak; the other tests compile it."""
    with jax.checking_leaks():
        out, values = collect(network)(W, X)
    assert_trees_close((out, dict(values)), reference)
    assert list(values) == ["scaled", "jit", "dense", "act", "column", "branch", "other", "custom", "flip", "tree"]
    assert values["tree"][1]["half"].dtype == jnp.bfloat16


def test_collect_under_transformations(reference):
    """vmap, scan, grad and remat of a collected function; what it returns can be differentiated too."""
    batch = np.stack([X, 2 * X])

    def through(w, values_too):
        out, values = jax.checkpoint(collect(network))(w, X)
        return out + values_too * (rms(values["act"]) + jnp.sum(values["tree"][0]))

    def through_unrolled(w, values_too):
        out, values = unrolled(w, X, {})
        return out + values_too * (rms(values["act"]) + jnp.sum(values["tree"][0]))

    @jax.jit
    def found(w, values_too):
        _, stacked = jax.lax.scan(lambda c, x: (c, collect(network)(w, x)[1]["act"]), 0, batch)
        return jax.vmap(collect(network), in_axes=(None, 0))(w, batch), stacked, jax.grad(through)(w, values_too)

    (out, values), stacked, gradient = found(W, 0.0)
    for k, x in enumerate(batch):
        of_one = jax.tree.map(lambda leaf, k=k: leaf[k], (out, dict(values)))
        assert_trees_close(of_one, UNROLLED(W, x, {}), atol=1e-5)
    np.testing.assert_allclose(stacked[0], reference[1]["act"], rtol=1e-5, atol=1e-6)
    want = jax.jit(jax.grad(through_unrolled))
    assert_trees_close(gradient, want(W, 0.0), rtol=1e-4, atol=1e-4)
    assert_trees_close(found(W, 1.0)[2], want(W, 1.0), rtol=1e-4, atol=1e-4)


def test_cotangents_are_the_gradients_at_the_tags(reference):
    out, values = reference
    points = {name: v for name, v in values.items() if name not in ("tree", "other", "custom", "flip")}
    zeros = {name: np.zeros(v.shape, np.float32) for name, v in points.items()}
    gradient, want = jax.jit(jax.grad(lambda w, p: unrolled(w, X, p)[0], argnums=(0, 1)))(W, zeros)
    found, collected, cotangents = jax.jit(collect(jax.value_and_grad(network), gradients=True))(W, X)
    assert_trees_close(found, (out, gradient), rtol=1e-4, atol=1e-4)
    assert_trees_close(dict(collected), values)
    # A derivative rule does not pass through the tags of the function that it replaces.
    assert [name for name in values if name not in cotangents] == ["custom", "flip"]
    assert [name for name in collected if name in cotangents] == list(cotangents)
    assert np.isnan(cotangents.pop("other")).all()
    np.testing.assert_allclose(cotangents["tree"][0], 2 * values["tree"][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cotangents.pop("tree")[1]["half"], 1)
    assert_trees_close(dict(cotangents), want, rtol=1e-4, atol=1e-4)


def test_a_tag_costs_nothing():
    """The compiled program is that of the function without tags, also of its gradient."""

    def program(mark):
        def fn(w, x):
            x, _ = jax.lax.scan(jax.checkpoint(lambda x, k: (mark(jnp.tanh(mark(x @ k, "a")), "b"), None)), x, w)
            return jnp.sum(jax.vmap(lambda row: mark(row * row, "c"), 1)(x))

        return jax.jit(jax.value_and_grad(fn)).lower(W["kernels"], X).compile().as_text()

    plain, tagged = program(lambda x, name: x), program(tag)
    instructions = [
        [line.split(", metadata=")[0] for line in text.splitlines() if " = " in line] for text in (plain, tagged)
    ]
    assert len(instructions[0]) > 20
    assert instructions[0] == instructions[1]


def test_a_tag_is_the_identity():
    x = jnp.ones((2, 3), jnp.bfloat16)
    tree = {"x": x, "key": jax.random.key(0), "n": 3, "text": "t", "none": None}
    found = tag(tree, "tree")
    assert found["x"] is x
    assert {k: v for k, v in found.items() if k not in ("x", "key")} == {"n": 3, "text": "t", "none": None}
    primal, tangent = jax.jvp(lambda x: tag(x, "x"), (2.0,), (3.0,))
    assert (primal, tangent) == (2.0, 3.0)
    assert jax.hessian(lambda x: tag(x, "x") ** 3)(2.0) == 12.0
    assert jax.linear_transpose(lambda x: 2 * tag(x, "x"), 1.0)(3.0) == (6.0,)
    assert jax.eval_shape(lambda x: tag(x, "x"), x).dtype == jnp.bfloat16


def test_names_that_repeat():
    """One function that JAX traces once and calls twice: forth in order, back in reverse, each with its own value."""
    assert list(collect(lambda x: [tag(x, name) for name in ("h", "h#2", "h")])(np.ones(1))[1]) == ["h", "h#2", "h#3"]
    double = jax.jit(lambda x: tag(2 * x, "h"))

    def loss(x):
        return jnp.sum(double(double(x)) ** 3)

    x = jnp.float32(1.0)
    _, values, cotangents = collect(jax.grad(loss), gradients=True)(x)
    assert (values["h"], values["h#2"]) == (2, 4)
    assert (cotangents["h"], cotangents["h#2"]) == (96, 48)

    step = jax.jit(jax.grad(loss))
    _, values, cotangents = collect(lambda a, b: (step(a), step(b)), gradients=True)(x, 2 * x)  # two micro-batches
    assert [float(values[name]) for name in ("h", "h#2", "h#3", "h#4")] == [2, 4, 4, 8]
    assert [float(cotangents[name]) for name in ("h", "h#2", "h#3", "h#4")] == [96, 48, 384, 192]


def test_collect_sees_functions_that_were_compiled_before():
    fn = jax.jit(lambda x: 2 * tag(x + 1, "h"))
    assert fn(1.0) == 4
    assert collect(fn)(jnp.float32(1.0))[1]["h"] == 2


def test_the_inner_collect_takes_its_tags():
    def fn(x):
        _, values = collect(lambda x: tag(x, "inner"))(x)
        return tag(values["inner"] + 1, "outer")

    assert list(collect(fn)(jnp.ones(2))[1]) == ["outer"]


def test_loops_of_unknown_length_keep_the_last_value():
    def fn(x, n):
        x = jax.lax.fori_loop(0, n, lambda i, x: tag(x + 1, "float"), x)
        return x, jax.lax.while_loop(lambda i: i < n, lambda i: tag(i + 1, "int"), 0)

    collected = jax.jit(collect(fn))
    (x, i), values = collected(jnp.zeros(2), 3)
    assert (x.tolist(), int(i)) == ([3, 3], 3)
    assert (values["float"].tolist(), int(values["int"])) == ([3, 3], 3)
    _, values = collected(jnp.zeros(2), 0)
    assert np.isnan(values["float"]).all()
    assert values["int"] == 0


def last_by_lane(x, counts):
    """What a loop that adds 1 to x some number of times, tagging each result, has tagged last in each lane."""
    x, counts = np.broadcast_arrays(x, counts)
    return np.where(counts > 0, x + counts, np.nan).astype(np.float32)


def test_loops_that_end_at_different_times():
    """Under vmap each lane keeps its own last value, wherever the axis of the lanes is and whatever axes there are."""

    def loop(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: tag(x + tag(jnp.float32(1), "same"), "h"), x)

    x, counts = np.arange(2, dtype=np.float32), np.array([1, 3, 0])
    three = np.arange(0, 30, 10, dtype=np.float32)  # as many as lanes
    lanes = {
        "of one size": (jax.vmap(jax.vmap(loop, (0, None)), (None, 0)), three, last_by_lane(three, counts[:, None])),
        "loops": (jax.vmap(loop, (None, 0)), x[0], last_by_lane(x[0], counts)),
        "loops of arrays": (jax.vmap(loop, (None, 0)), x, last_by_lane(x, counts[:, None])),
        "inside": (jax.vmap(jax.vmap(loop, (None, 0)), (0, None)), x, last_by_lane(x[:, None], counts)),
        "outside": (jax.vmap(jax.vmap(loop, (0, None)), (None, 0)), x, last_by_lane(x, counts[:, None])),
    }
    for name, (fn, x, want) in lanes.items():
        _, values = jax.jit(collect(fn))(x, counts)
        np.testing.assert_array_equal(values["h"], want, err_msg=name)
        assert values["same"] == 1  # in no lane by itself
    alone = jax.jit(collect(lanes["loops"][0]))
    for counts in itertools.permutations([0, 1, 3, 4]):  # whichever lane is the last to end
        np.testing.assert_array_equal(alone(x[0], np.array(counts))[1]["h"], last_by_lane(x[0], np.array(counts)))
    every = np.array([1, 3, 2])
    _, values = jax.jit(collect(lanes["inside"][0], reduce=rms))(lanes["inside"][1], every)
    assert float(values["h"]) == pytest.approx(np.sqrt(np.mean(last_by_lane(x[:, None], every) ** 2)))


LANES = {
    "elementwise": lambda x, w: tag(x + w, "h"),
    "a function": lambda x, w: tag(jnp.where(x > 1, jax.nn.silu(x), x + w), "h"),
    "a product": lambda x, w: tag(jnp.array([[1.0, 2.0], [0.5, 0.0]]) @ x + w, "h"),
    "loops": lambda x, w: jax.lax.fori_loop(0, jnp.int32(w), lambda _, x: tag(x + w, "h"), a_scan(x, w)),
}


def a_scan(x, w):
    return jnp.sum(jax.lax.scan(lambda x, y: (x + w, x + y), x, jnp.stack([x, x]))[1], 0)


def by_itself(fn, mapped):
    """fn under one vmap for each of its arguments, the outermost last, and the same of the values of each call."""
    whole, alone = fn, collect(fn)
    for k in mapped:
        axes = tuple(0 if j == k else None for j in range(len(mapped)))
        whole, alone = jax.vmap(whole, axes), jax.vmap(alone, axes)
    return whole, alone


@pytest.mark.parametrize("sizes", [(3, 3, 3), slow((2, 3, 4))], ids=str)
@pytest.mark.parametrize("body", LANES)
def test_lanes_among_other_axes(body, sizes):
    """However vmaps are nested, and of one size or not: what a call inside vmap collects is what is collected of all.

    The lanes are those of the counts alone, or those of the weights as well, with other axes before, within and after.
    """
    xs = jnp.linspace(0.5, 2.0, 2 * sizes[0]).reshape(-1, 2)
    counts = jnp.array([0, 3, 1])[: sizes[1]]
    weights = jnp.array([0.3, 1.2, 2.7, 0.8])[: sizes[2]]
    for both, mapped in itertools.product([0, 1], [(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 0, 1)]):

        def loop(x, count, weight, both=both):
            last = count + both * jnp.int32(weight)
            return jax.lax.while_loop(lambda s: s[1] < last, lambda s: (LANES[body](s[0], weight), s[1] + 1), (x, 0))

        whole, alone = by_itself(loop, mapped)
        got, want = jax.jit(lambda *args, fns=(whole, alone): (collect(fns[0])(*args)[1], fns[1](*args)[1]))(
            xs, counts, weights
        )
        np.testing.assert_allclose(got["h"], want["h"], rtol=1e-5, err_msg=f"{mapped} {both}")


@pytest.mark.parametrize("mapped", [(1, 0), (0, 1)], ids=str)
def test_lanes_that_cannot_be_told_from_other_axes(mapped):
    """A reshape names its sizes. Where two are one, it is said that the lanes are not known; never are others taken."""

    def loop(x, count):
        return jax.lax.fori_loop(0, count, lambda _, x: tag(1 + x.reshape(1, 2), "h").reshape(2), x)

    whole, alone = by_itself(loop, mapped)
    xs, counts = jnp.arange(6.0).reshape(3, 2), jnp.array([0, 3, 1])
    np.testing.assert_array_equal(collect(whole)(xs[:2], counts)[1]["h"], alone(xs[:2], counts)[1]["h"])
    with pytest.raises(ValueError, match=r"tagged 'h' they may be any of the axes \[\(0,\), \(1,\)\]"):
        jax.eval_shape(collect(whole), xs, counts)


@pytest.mark.parametrize("size", [2, 3])
def test_constants_of_a_loop_are_in_no_lane(size):
    """They are the same in each iteration, with all their axes, as many as lanes or not."""

    def loop(x, count):
        def iteration(_, y):
            jax.debug.callback(lambda y: None, y)  # looks at what the loop carries, and has no result
            return y + tag(2 * x, "constant")

        return jax.lax.fori_loop(0, count, iteration, x)

    x, counts = jnp.arange(float(size)), jnp.array([0, 3, 1])
    _, values = collect(jax.vmap(jax.vmap(loop, (None, 0)), (0, None)))(x, counts)
    np.testing.assert_array_equal(values["constant"], 2 * x)


def test_loops_in_loops_that_end_at_different_times():
    """A scan inside: one value for each of its steps, of the last iteration of each lane, reduced or not."""

    def loop(n):
        def iteration(_, x):
            return jax.lax.scan(lambda x, step: (tag(x + step, "h"), None), x, jnp.arange(2.0))[0]

        return jax.lax.fori_loop(0, n, iteration, jnp.float32(0))

    counts = np.array([1, 3])
    want = np.array([[0.0, 2.0], [1.0, 3.0]])  # [steps, lanes]
    _, values = jax.jit(collect(jax.vmap(loop)))(counts)
    np.testing.assert_array_equal(values["h"], want)
    _, values = jax.jit(collect(jax.vmap(loop), reduce=jnp.max))(counts)
    np.testing.assert_array_equal(values["h"], want.max(1))


def test_branches_are_one_unless_a_vmap_makes_them_a_selection():
    def fn(x):
        return jax.lax.cond(x > 0, lambda x: tag(2 * x, "h"), lambda x: tag(3 * x, "h"), x)

    assert dict(collect(fn)(jnp.float32(-1))[1]) == {"h": -3}
    _, values = collect(jax.vmap(fn))(jnp.array([-1.0, 1.0]))
    assert {name: value.tolist() for name, value in values.items()} == {"h": [-3, 3], "h#2": [-2, 2]}


def double(x):
    return tag(2 * x, "h")


def with_rule(decorator, define):
    fn = decorator(double)
    define(fn)
    return fn


ONE = jax.make_mesh((1,), ("one",), axis_types=(jax.sharding.AxisType.Auto,))
# What holds other functions, by the names of the primitives: each calls `double` once, and returns what that returns.
HOLDERS = {
    "jit": jax.jit(double),
    "remat2": jax.checkpoint(double),
    "scan": lambda x: jax.lax.scan(lambda x, _: (double(x), None), x, None, length=1)[0],
    "while": lambda x: jax.lax.while_loop(lambda s: s[1] < 1, lambda s: (double(s[0]), s[1] + 1), (x, 0))[0],
    "cond": lambda x: jax.lax.cond(x[0] > 0, double, lambda x: x, x),
    "shard_map": jax.shard_map(double, mesh=ONE, in_specs=P(), out_specs=P()),
    "custom_jvp_call": with_rule(jax.custom_jvp, lambda f: f.defjvp(lambda x, t: (f(*x), 2 * t[0]))),
    "custom_vjp_call": with_rule(jax.custom_vjp, lambda f: f.defvjp(lambda x: (f(x), None), lambda _, ct: (2 * ct,))),
    "custom_vmap_call": with_rule(custom_vmap, lambda f: f.def_vmap(lambda size, batched, x: (f(x), *batched))),
    "composite": jax.lax.composite(double, "test.double"),
    "linear_call": lambda x: linear_call(lambda _, x: double(x), lambda _, ct: 2 * ct, (), x),
    "call_hi_primitive": lambda x: jax.lax.custom_root(
        lambda y: double(y) - x, x, lambda f, y: f(y) + x, lambda f, y: y / 2
    ),
}
if hasattr(xla_metadata, "xla_metadata_call"):  # not in jax 0.7
    HOLDERS["xla_metadata_call"] = xla_metadata.xla_metadata_call(double, a="b")
KERNEL = pl.pallas_call(
    lambda x, out: out.__setitem__(..., double(x[...])),
    out_shape=jax.ShapeDtypeStruct((3,), np.float32),
    interpret=True,
)
# These run what they hold another number of times than once, or on other things than arrays.
OPAQUE = {
    "custom_linear_solve": lambda x: jax.lax.custom_linear_solve(double, x, lambda _, b: b / 2, symmetric=True),
    "pallas_call": KERNEL,
    "reduce": lambda x: jax.lax.reduce(x, np.float32(0), lambda a, b: double(a) + b, (0,)),
    "reduce_window": lambda x: jax.lax.reduce_window(x, np.float32(0), lambda a, b: double(a) + b, (1,), (1,), "VALID"),
}


def primitives(fn):
    return {eqn.primitive.name for eqn in jax.make_jaxpr(fn)(np.ones(3, np.float32)).eqns}


@pytest.mark.parametrize("name", HOLDERS)
def test_every_primitive_that_holds_a_function(name):
    fn = HOLDERS[name]
    assert name in primitives(fn) or name == "call_hi_primitive"  # a custom_jvp_call in older versions
    out, values = jax.jit(collect(fn))(x := np.arange(1, 4, dtype=np.float32))
    np.testing.assert_array_equal(out, 2 * x)
    np.testing.assert_array_equal(values["h"].reshape(3), 2 * x)


@pytest.mark.parametrize("name", OPAQUE)
def test_every_primitive_that_hides_a_function(name):
    fn, x = OPAQUE[name], np.ones(3, np.float32)
    assert name in primitives(fn)
    with pytest.warns(UserWarning, match=f"what is tagged inside {name} is not collected"):
        out, values = collect(fn)(x)
    np.testing.assert_array_equal(out, fn(x))
    assert values == {}


def test_no_primitive_that_may_hold_a_function_is_unknown():
    """Those that jax has rules for, by which functions inside are cut or split: a new name is to be looked at here."""
    rules = {*_tags._RULES, *HOLDERS, *OPAQUE}
    assert set(_tags._RULES) <= set(HOLDERS)
    hold_none = {"addupdate", "debug_callback", "debug_print", "free_ref", "get", "new_ref", "swap"}
    # Only transformations make them, or kernels; or they have no place of their own in a program (pmap is shard_map).
    out_of_reach = {
        "call",
        "call_hi_primitive_linearized",
        "closed_call",
        "core_map",
        "mpmd_map",
        "remat_opt",
        "vjp_node",
        "xla_pmap",
    }
    evaluated_beside = {"compute_on", "eval_jaxpr", "program_order"}  # as a custom_jvp_call is; not in all versions
    cut_or_split = {*partial_eval.dce_rules, *partial_eval.partial_eval_jaxpr_custom_rules}
    found = {primitive.name.split("[")[0] for primitive in cut_or_split}  # vjp_node[scan], one for each that was met
    assert {"jit", "scan", "cond", "while"} <= found
    assert found <= rules | hold_none | out_of_reach | evaluated_beside


def equations(jaxpr, name):
    """Of one name, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in _tags._jaxprs_of(eqn):
            yield from equations(getattr(inner, "jaxpr", inner), name)


def test_what_a_loop_or_a_checkpoint_was_told_is_kept():
    """The policy of a checkpoint, and how a scan unrolls and turns: seen in the program, and in what is kept."""
    policy = jax.checkpoint_policies.save_only_these_names("kept")

    def fn(x):
        def block(x, _):
            return jnp.sin(tag(checkpoint_name(jnp.sin(x), "kept"), "h")), None

        block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(block, x, None, length=6, unroll=3, reverse=True)[0])

    def told(fn):
        jaxpr = jax.make_jaxpr(fn)(np.ones(3, np.float32)).jaxpr
        (scan,), (remat,) = equations(jaxpr, "scan"), equations(jaxpr, "remat2")
        loop = {name: scan.params[name] for name in ("unroll", "reverse", "length")}
        return loop | {name: remat.params[name] for name in ("policy", "prevent_cse")}

    collected = lambda x: collect(fn, reduce=rms)(x)  # noqa: E731
    assert told(collected) == told(fn)
    assert told(fn) == {"unroll": 3, "reverse": True, "length": 6, "policy": policy, "prevent_cse": False}

    def sines(fn):
        """How many are computed in the backward pass: all of them again, but those that were kept."""
        backward = jax.make_jaxpr(jax.grad(lambda x: jax.tree.leaves(fn(x))[0]))(np.ones(3, np.float32))
        return sum(1 for _ in equations(backward.jaxpr, "sin"))

    assert sines(collected) == sines(fn)


def test_only_the_branch_of_the_platform_is_lowered():
    elsewhere = Primitive("elsewhere")
    elsewhere.def_abstract_eval(lambda x: x)
    mlir.register_lowering(elsewhere, lambda ctx, x: [x], platform="tpu")  # on a CPU there is none

    def fn(x):
        return jax.lax.platform_dependent(
            x, tpu=lambda x: tag(elsewhere.bind(x), "h"), default=lambda x: tag(2 * x, "h")
        )

    for collected in (collect(fn), jax.jit(collect(fn))):
        out, values = collected(jnp.ones(2))
        np.testing.assert_array_equal([out, values["h"]], np.full((2, 2), 2))


def test_reduce_is_given_numbers_alone():
    def fn(x):
        return tag({"x": x, "n": 3 * x.astype(int), "mask": x > 0, "key": jax.random.key(0), "empty": x[:0]}, "tree")[
            "x"
        ]

    _, values = collect(fn, reduce=rms)(jnp.ones(2))
    assert values["tree"] == {"x": 1, "n": 3, "mask": None, "key": None, "empty": None}


@jax.tree_util.register_pytree_node_class
class Distribution:
    """As those of distrax: what is no array is no child, but a part of the structure."""

    def __init__(self, **parameters):
        self.parameters = parameters

    def tree_flatten(self):
        arrays = {name: x for name, x in self.parameters.items() if isinstance(x, (jax.Array, np.ndarray))}
        rest = {name: x for name, x in self.parameters.items() if name not in arrays}
        return list(arrays.values()), (tuple(arrays), rest)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(**dict(zip(aux[0], children, strict=True)), **aux[1])


def outputs(x):
    """Trees with such nodes, and the leaves of each by their paths, None for what is no floating array."""
    one, both = Distribution(logits=x), Distribution(loc=x, scale=2 * x, name=["unhashable"])
    name = lambda k: jax.tree_util.keystr((jax.tree_util.FlattenedIndexKey(k),))  # noqa: E731
    yield (one, 10 * x), {f"[0]{name(0)}": x, "[1]": 10 * x}
    yield (10 * x, one), {"[0]": 10 * x, f"[1]{name(0)}": x}
    yield {"a": both, "b": 3 * x}, {f"['a']{name(0)}": x, f"['a']{name(1)}": 2 * x, "['b']": 3 * x}
    yield (Distribution(logits=None), 4 * x), {"[1]": 4 * x}
    yield (Distribution(n=x.astype(int), scale=5 * x), "text", 6 * x), {f"[0]{name(1)}": 5 * x, "[2]": 6 * x}
    yield [Distribution(inner=(x,)), Distribution(logits=one, scale=x), 7 * x], {f"[1]{name(0)}": x, "[2]": 7 * x}


OUTPUTS = pytest.mark.parametrize("k", range(len(list(outputs(np.ones(1))))))


def floating_leaves(tree):
    return [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)]


def total(tree):
    return sum(jnp.sum(x**2) for x in floating_leaves(tree))


@OUTPUTS
def test_nodes_that_keep_what_is_no_array_in_their_structure(k):
    """Every leaf of a tree is at its place: reduced or not, forwards and backwards."""

    def fn(x):
        tree = tag(list(outputs(2 * x))[k][0], "tree")
        return total(tree), tree

    x = gaussian(3)
    want = list(list(outputs(2 * x))[k][1].values())
    (_, tree), values, cotangents = collect(jax.grad(fn, has_aux=True), gradients=True)(x)
    for found, factor in ((tree, 1), (values["tree"], 1), (cotangents["tree"], 2)):
        assert_trees_close(floating_leaves(found), [factor * leaf for leaf in want])
    _, values = jax.jit(lambda x: collect(lambda x: fn(x)[0], reduce=rms)(x))(x)
    norms = floating_leaves(values["tree"])
    assert_trees_close(norms[-len(want) :], [rms(leaf) for leaf in want])  # before them that of integers, if there are


@OUTPUTS
def test_models_that_return_such_nodes(k):
    class Head(nnx.Module):
        def __call__(self, x):
            return list(outputs(2 * x))[k][0]

    class LinenHead(nn.Module):
        @nn.compact
        def __call__(self, x):
            return list(outputs(2 * x))[k][0]

    x = gaussian(3)
    want = list(outputs(2 * x))[k][1]
    for name, model in (("Head", Head()), ("LinenHead", (LinenHead(), {}))):
        norms = {name + path: rms(leaf) for path, leaf in want.items()}
        assert_trees_close(dict(activation_rms(model, x)), norms)
        assert_trees_close(dict(gradient_rms(total, model, x)), {path: 2 * norm for path, norm in norms.items()})
        assert_trees_close(floating_leaves(capture(model, x)[1][name]), list(want.values()))


def test_what_cannot_be_collected_is_said():
    def solve(x):
        matvec = lambda v: tag(2 * v, "inside")  # noqa: E731
        return tag(jax.lax.custom_linear_solve(matvec, x, lambda _, b: b / 2, symmetric=True), "outside")

    with pytest.warns(UserWarning, match="what is tagged inside custom_linear_solve is not collected"):
        out, values = collect(solve)(jnp.ones(2))
    assert out.tolist() == [0.5, 0.5]
    assert list(values) == ["outside"]
    condition = collect(lambda x: jax.lax.while_loop(lambda x: tag(x, "c") < 3, lambda x: x + 1, x))
    with pytest.warns(UserWarning, match="inside the condition of a while_loop is not collected"):
        out, values = condition(jnp.float32(0))
    assert (out, values) == (3, {})


def test_functions_that_were_exported():
    """They show no tags, and so are said to; by themselves, and inside of other things."""
    exported = export.export(jax.jit(lambda x: tag(2 * x, "inside")))(jnp.ones(3))
    loaded = export.deserialize(exported.serialize())
    for call in (exported.call, lambda x: jax.jit(jax.checkpoint(loaded.call))(x)):
        with pytest.warns(UserWarning, match="what is tagged inside an exported function is not collected"):
            out, values = collect(lambda x, call=call: tag(call(x), "outside"))(np.ones(3, np.float32))
        np.testing.assert_array_equal(out, 2)
        assert list(values) == ["outside"]


NO_ARRAYS = {
    "record": np.zeros(2, [("a", np.float32), ("b", np.int32)]),
    "one record": np.zeros(2, [("a", np.float32)])[0],
    "recarray": np.rec.array([(1, 2.0)]),
    "bytes": np.zeros(2, "V4"),
    "date": np.zeros(2, "M8[s]"),
    "object": np.zeros(2, object),
    "text": np.array(["a"]),
    "long": np.zeros(2, np.longdouble),
    "big endian": np.zeros(2, ">f4"),
}


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_numpy_arrays_that_are_none_for_jax(name):
    """A tag leaves them alone, among other things; so do functions that are given them."""
    x = NO_ARRAYS[name]
    assert tag(x, "h") is x
    (out, other), values = collect(lambda x, y: tag((x, 2 * y), "h"))(x, np.float32(1))
    assert (out is x, float(other), values["h"]) == (True, 2, (None, 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4", "float16", "uint8", "bool", "complex64"])
def test_numpy_arrays_of_all_dtypes_of_jax(dtype):
    x = np.ones(2, jnp.dtype(dtype))
    _, values = collect(lambda: tag(x, "h"))()
    assert values["h"].dtype == x.dtype


def test_arguments_and_results_that_are_no_arrays():
    def fn(x, mode, *, flag, scale=2):
        assert isinstance(flag, bool)
        return {"x": tag(x, "x") * scale, "mode": mode, "flag": flag, "none": None}

    out, values = collect(fn)(np.ones(2, np.float32), "mode", flag=True)
    assert {**out, "x": out["x"].tolist()} == {"x": [2, 2], "mode": "mode", "flag": True, "none": None}
    assert values["x"].tolist() == [1, 1]


def test_reduced_values_are_all_that_a_loop_keeps():
    """Under `reduce` no array with the elements of all layers' activations exists, forwards."""
    layers, batch, width = 7, 5, 11

    def fn(w, x):
        return jax.lax.scan(lambda x, k: (tag(jnp.tanh(x @ k), "h"), None), x, w)[0]

    w, x = gaussian(layers, width, width), gaussian(batch, width)

    def largest_but_weights(reduce):
        jaxpr = jax.make_jaxpr(collect(fn, reduce=reduce))(w, x)
        scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        return max(v.aval.size for eqn in scans for v in eqn.outvars)

    assert largest_but_weights(None) == layers * batch * width
    assert largest_but_weights(rms) == batch * width
    _, values = jax.jit(collect(fn, reduce=rms))(w, x)
    _, whole = jax.jit(collect(fn))(w, x)
    np.testing.assert_allclose(values["h"], rms(whole["h"], (1, 2)), rtol=1e-6)


def mesh(kind=jax.sharding.AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    def local(x):
        x = tag(x * tag(jnp.float32(2.0), "same"), "x")
        return jax.lax.cond(jax.lax.axis_index("data") == 0, lambda x: x, lambda x: tag(x + 1, "most"), x)

    spec = P("data")
    fn = jax.shard_map(local, mesh=mesh(), in_specs=spec, out_specs=spec, check_vma=check_vma)
    x = gaussian(16, 3)
    _, values, cotangents = jax.jit(collect(jax.grad(lambda x: jnp.sum(fn(x) ** 2)), gradients=True))(x)
    np.testing.assert_allclose(values["x"], 2 * x.reshape(8, 2, 3))
    np.testing.assert_array_equal(values["same"], np.full(8, 2))
    want = 2 * x.reshape(8, 2, 3) + 1
    np.testing.assert_allclose(values["most"][1:], want[1:], rtol=1e-6)
    assert np.isnan(values["most"][0]).all()
    np.testing.assert_allclose(cotangents["most"][1:], 2 * want[1:], rtol=1e-6)


def test_sharded_arrays():
    """Under jit the values are global, whether the mesh is automatic or part of the types."""
    w, x = gaussian(3, 4, 4), gaussian(16, 4)

    def fn(w, x):
        x = jax.lax.cond(jnp.sum(x) > 1e6, lambda x: tag(x, "no"), lambda x: x, x)
        return jax.lax.scan(lambda x, k: (tag(jnp.tanh(x @ k), "h"), None), x, w)[0]

    _, want = jax.jit(collect(fn, reduce=rms))(w, x)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        sharded = jax.device_put(x, jax.NamedSharding(mesh(kind), P("data")))
        replicated = jax.device_put(w, jax.NamedSharding(mesh(kind), P()))
        _, values = jax.jit(collect(fn, reduce=rms))(replicated, sharded)
        assert_trees_close(dict(values), dict(want))


# -------------------------------------------------------------------------------------------------------------- models

WIDTH, BATCH, LAYERS = 6, 3, 4


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = rmsjax.nnx.RMSNorm(WIDTH, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.inner(x)

    @nnx.remat
    def inner(self, x):
        return jax.nn.relu(tag(self.dense(self.norm(x)), "user's"))


class Pair(nnx.Module):
    """Calls one layer twice, and returns a tree of mixed dtypes."""

    def __init__(self, rngs):
        self.shared = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, *, half):
        y = self.shared(x)
        z = self.shared(y)
        return y, {"half": z.astype(half), "count": jnp.int32(3), "none": None, "empty": jnp.zeros(0)}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(4, WIDTH, rngs=rngs)
        self.statistics = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = getattr(nnx, "List", list)([Block(rngs) for _ in range(2)])  # no List in flax 0.11
        self.pair = Pair(rngs)
        self.head = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.relu, nnx.Linear(WIDTH, 2, rngs=rngs))

    def __call__(self, x, half=jnp.bfloat16):
        x = self.dropout(self.statistics(self.embed(x)))
        for block in self.blocks:
            x = block(x)
        y, rest = self.pair(x, half=half)
        return self.head(y + rest["half"].astype(y.dtype))


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


def by_hand(model, x):
    """What the layers of a `Model` return, called one by one."""
    h = OrderedDict(embed=model.embed(x))
    h["statistics"] = model.statistics(h["embed"])
    h["dropout"] = x = model.dropout(h["statistics"])
    for k, block in enumerate(model.blocks):
        h[f"blocks/{k}/norm"] = block.norm(x)
        h[f"blocks/{k}/dense"] = block.dense(h[f"blocks/{k}/norm"])
        h["user's" + (f"#{k + 1}" if k else "")] = h[f"blocks/{k}/dense"]
        h[f"blocks/{k}"] = x = x + jax.nn.relu(h[f"blocks/{k}/dense"])
    h["pair/shared"] = model.pair.shared(x)
    h["pair/shared#2"] = model.pair.shared(h["pair/shared"])
    y, rest = h["pair"] = model.pair(x, half=jnp.bfloat16)
    h["head/layers/0"] = model.head.layers[0](y + rest["half"].astype(jnp.float32))
    h["head/layers/2"] = h["head"] = h["Model"] = model.head.layers[2](nnx.relu(h["head/layers/0"]))
    return h


def norms(activations):
    """The RMS norms of activations, in float64 numpy, by the names of `activation_rms`."""
    flat = {
        name + jax.tree_util.keystr(path): leaf
        for name, tree in activations.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size
    }
    return {name: np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64)))) for name, leaf in flat.items()}


INPUT, STREAM = gaussian(BATCH, 4), gaussian(BATCH, WIDTH)
captured = nnx.jit(lambda model, x: capture(model, x))


@pytest.fixture(scope="module")
def model():
    return nnx.jit(Model)(nnx.Rngs(0))


@pytest.fixture(scope="module")
def stack():
    return nnx.jit(Stack)(nnx.Rngs(0))


@pytest.fixture(scope="module")
def linen_model():
    module = LinenModel()
    return module, jax.jit(module.init)(jax.random.key(0), INPUT)


def squares(out):
    return jnp.sum(out**2)


@pytest.fixture(scope="module")
def compiled(model, stack, linen_model):
    """All models measured by one program: what it returns, and its sizes."""
    (graphdef, state), (stack_def, stack_state), (module, variables) = nnx.split(model), nnx.split(stack), linen_model

    def measure(state, stack_state, variables):
        stack = nnx.merge(stack_def, stack_state)
        return {
            "nnx": activation_rms(nnx.merge(graphdef, state), INPUT),
            "stack": activation_rms(stack, STREAM),
            "linen": activation_rms((module, variables), INPUT),
            "nnx gradients": gradient_rms(squares, nnx.merge(graphdef, state), INPUT),
            "stack gradients": gradient_rms(jnp.sum, stack, STREAM),
            "linen gradients": gradient_rms(jnp.sum, (module, variables), INPUT),
        }

    program = jax.jit(measure).lower(state, stack_state, variables).compile()
    return program(state, stack_state, variables), program


def test_nothing_but_norms_leaves(compiled):
    """One number for each layer, and for each iteration of a loop: BATCH in time, LAYERS of a stack."""
    measured, program = compiled
    assert {name: set(map(np.shape, norms.values())) for name, norms in measured.items()} == {
        "nnx": {()},
        "stack": {(), (LAYERS,)},
        "linen": {(), (LAYERS,), (BATCH,)},
        "nnx gradients": {()},
        "stack gradients": {(), (LAYERS,)},
        "linen gradients": {(), (LAYERS,), (BATCH,)},
    }
    norms = jax.tree.leaves(measured)
    numbers, pointer = sum(norm.size for norm in norms), 8
    assert program.memory_analysis().output_size_in_bytes <= 4 * numbers + pointer * (len(norms) + 1)


def test_every_layer_of_an_nnx_model(model, compiled):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    out, found = captured(model, INPUT)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    assert_trees_close(after, before, rtol=0, atol=0)  # neither statistics nor counts of keys
    want = nnx.jit(by_hand)(nnx.clone(model), INPUT)
    assert list(found) == list(want)
    assert_trees_close({**found, "pair": found["pair"][0]}, {**want, "pair": want["pair"][0]})
    assert found["pair"][1]["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, found["Model"])
    measured = compiled[0]["nnx"]
    assert list(measured) == [name for name in norms(found) if name != "pair"]
    assert_trees_close(dict(measured), norms(found), rtol=1e-6)
    assert set(measured) >= {"pair[0]", "pair[1]['half']"}
    assert not set(measured) & {"pair[1]['count']", "pair[1]['empty']"}


def test_stacked_layers_have_a_norm_each(stack, compiled):
    """A scan over stacked layers gives what a loop over them gives."""
    measured = compiled[0]["stack"]
    assert list(measured) == ["blocks/norm", "blocks/dense", "user's", "blocks", "Stack"]
    shapes = jax.eval_shape(lambda x: capture(stack, x)[1], STREAM)
    assert shapes["blocks/dense"].shape == (LAYERS, BATCH, WIDTH)

    @jax.jit
    def loop(blocks, x):
        graphdef, state = nnx.split(blocks)
        norms = []
        for k in range(LAYERS):
            block = nnx.merge(graphdef, jax.tree.map(lambda leaf, k=k: leaf[k], state))
            dense = block.dense(block.norm(x))
            x = block(x)
            norms.append((rms(dense), rms(x)))
        return jnp.array(norms)

    want = loop(stack.blocks, STREAM)
    np.testing.assert_allclose(measured["blocks/dense"], want[:, 0], rtol=1e-5)
    np.testing.assert_allclose(measured["blocks"], want[:, 1], rtol=1e-5)
    gradients = compiled[0]["stack gradients"]
    assert float(gradients["Stack"]) == float(gradients["blocks"][-1]) == 1


def test_models_under_vmap():
    """Over the seeds of a model."""

    @jax.jit
    @jax.vmap
    def measure(key):
        block = Block(nnx.Rngs(key))
        return activation_rms(block, STREAM), rms(block(STREAM))

    found, want = measure(jax.random.split(jax.random.key(0), 2))
    assert list(found) == ["norm", "dense", "user's", "Block"]
    assert want[0] != want[1]
    np.testing.assert_allclose(found["Block"], want, rtol=1e-6)


def test_gradient_rms_of_an_nnx_model(model, compiled):
    found = compiled[0]["nnx gradients"]
    _, h = captured(model, INPUT)
    head = model.head.layers
    d_out = 2 * h["Model"]
    d_hidden = jnp.where(h["head/layers/0"] > 0, d_out @ head[2].kernel[...].T, 0)
    d_sum = d_hidden @ head[0].kernel[...].T
    want = {
        "Model": d_out,
        "head/layers/2": d_out,
        "head/layers/0": d_hidden,
        "pair[0]": d_sum,
        "pair[1]['half']": d_sum,
        "pair/shared#2": d_sum,
        "pair/shared": d_sum + d_sum @ model.pair.shared.kernel[...].T,
    }
    for name, value in want.items():
        np.testing.assert_allclose(found[name], rms(value), rtol=2e-2 if "half" in name or "shared" in name else 1e-5)
    assert list(found) == [name for name in compiled[0]["nnx"] if name in found]
    assert {"embed", "blocks/0/norm", "blocks/1"} <= set(found)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(WIDTH)(nn.LayerNorm()(x)), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(WIDTH)(x)
        shared = nn.Dense(WIDTH, name="shared")
        x = shared(shared(x))
        stacked = nn.scan(nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = stacked(name="stack")(x, None)
        x, _ = nn.jit(LinenBlock)(name="jitted")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.RNN(nn.SimpleCell(WIDTH), name="rnn")(x[None])[0]

    def encode(self, x, train):
        return self(x, train) + 1


def test_every_layer_of_a_linen_model(linen_model, compiled):
    _, variables = linen_model
    measured = compiled[0]["linen"]
    assert list(measured) == [
        *("Dense_0", "shared", "shared#2"),
        *("stack/LayerNorm_0", "stack/Dense_0", "stack[0]"),
        *("jitted/LayerNorm_0", "jitted/Dense_0", "jitted[0]"),
        *("Dropout_0", "SimpleCell_0/i", "SimpleCell_0/h", "SimpleCell_0[0]", "SimpleCell_0[1]", "rnn", "LinenModel"),
    ]
    assert measured["SimpleCell_0/h"].shape == (BATCH,)  # one norm for each step in time

    @jax.jit
    def by_hand(params, x):
        h = {"Dense_0": nn.Dense(WIDTH).apply({"params": params["Dense_0"]}, x)}
        h["shared"] = nn.Dense(WIDTH).apply({"params": params["shared"]}, h["Dense_0"])
        h["shared#2"] = x = nn.Dense(WIDTH).apply({"params": params["shared"]}, h["shared"])
        stack = {"stack/LayerNorm_0": [], "stack/Dense_0": [], "stack[0]": []}
        for k in range(LAYERS):
            layer = jax.tree.map(lambda leaf, k=k: leaf[k], params["stack"])
            normed = nn.LayerNorm().apply({"params": layer["LayerNorm_0"]}, x)
            dense = nn.Dense(WIDTH).apply({"params": layer["Dense_0"]}, normed)
            x = x + dense
            for values, value in zip(stack.values(), (normed, dense, x), strict=True):
                values.append(rms(value))
        h["jitted[0]"], _ = LinenBlock().apply({"params": params["jitted"]}, x)
        return {name: rms(value) for name, value in h.items()} | {k: jnp.stack(v) for k, v in stack.items()}

    want = by_hand(variables["params"], INPUT)
    assert_trees_close({name: measured[name] for name in want}, want)


def test_arguments_of_a_linen_model(linen_model):
    """`rngs` and `method` are those of `apply`."""
    module, variables = linen_model
    rngs = {"dropout": jax.random.key(1)}

    @jax.jit
    def call():
        out, activations = capture(linen_model, INPUT, True, rngs=rngs, method="encode")
        return out, module.apply(variables, INPUT, True, rngs=rngs, method="encode"), activations

    out, want, activations = call()
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(activations["LinenModel"] + 1, want, rtol=1e-5, atol=1e-6)
    assert (activations["Dropout_0"] == 0).any()


def test_gradient_rms_of_a_linen_model(compiled):
    found = compiled[0]["linen gradients"]
    assert float(found["LinenModel"]) == float(found["rnn"]) == 1.0
    # The residual stream: what arrives behind the last block arrives at what its Dense layer adds.
    np.testing.assert_allclose(found["stack/Dense_0"], found["stack[0]"], rtol=1e-6)


def test_range_and_dtype(x64):
    """The norm is that of `rms`: right where squares overflow, and in the accumulator's dtype."""

    class Scale(nnx.Module):
        def __call__(self, x, dtype):
            return (x * 1e30).astype(dtype)

    for dtype, accumulator in ((jnp.float32, np.float32), (jnp.bfloat16, np.float32), (jnp.float64, np.float64)):
        norm = activation_rms(Scale(), jnp.full(4, 3.0, jnp.float32), dtype)["Scale"]
        assert norm.dtype == accumulator
        assert float(norm) == pytest.approx(3e30, rel=5e-3)


def test_models_that_shard_themselves():
    class Split(nnx.Module):
        def __init__(self):
            self.inner = Double()

        def __call__(self, x):
            return jax.shard_map(self.inner, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))(x)

    class Double(nnx.Module):
        def __call__(self, x):
            return 2 * x

    x = gaussian(16, 3)
    measured = activation_rms(Split(), x)
    np.testing.assert_allclose([measured["inner"], measured["Split"]], np.full(2, rms(2 * x)), rtol=1e-6)


class Leaf(nnx.Module):
    def __call__(self, x):
        return 2 * x


def floats(norms):
    return {name: float(norm) for name, norm in norms.items()}


def test_a_program_is_kept_for_equal_calls():
    traces = []

    class Counted(nnx.Module):
        def __call__(self, x, flag):
            traces.append(flag)
            return x if flag is True else 2 * x

    for scale in (1.0, 2.0):
        for flag in (True, 1):  # equal, and yet another call
            factor = 1 if flag is True else 2
            assert floats(activation_rms(Counted(), scale * jnp.ones(2), flag)) == {"Counted": factor * scale}
    assert traces == [True, 1]


class Listed(nn.Module):
    features: Any

    @nn.compact
    def __call__(self, x, options=None):
        for size in self.features["sizes"]:
            x = nn.Dense(size, kernel_init=nn.initializers.ones)(x)
        return x


@dataclasses.dataclass
class Options:
    scale: int = 3


def test_what_has_no_hash():
    """Lists and dicts in a Linen module, a set or a plain dataclass as an argument: known by their identity."""
    x = np.ones((1, 2), np.float32)
    sequence = nn.Sequential([nn.Dense(2, kernel_init=nn.initializers.ones), jnp.negative])
    params = {"params": {"layers_0": {"kernel": x * x.T, "bias": x[0]}}}
    assert floats(activation_rms((sequence, params), x)) == {"layers_0": 3, "Sequential": 3}
    model = Listed({"sizes": [2]})
    params = {"params": {"Dense_0": {"kernel": x * x.T, "bias": x[0]}}}
    for options in ({1, 2}, Options()):
        assert floats(activation_rms((model, params), x, options)) == {"Dense_0": 3, "Listed": 3}
    assert floats(gradient_rms(jnp.sum, (model, params), x)) == {"Dense_0": 1, "Listed": 1}


def test_other_kinds_of_nnx_classes():
    """Subclasses that call their parent count once; a module that is no pytree, or is shared, is a layer as well."""

    class Parent(nnx.Module):
        def __init_subclass__(cls, *, shift, **kwargs):
            super().__init_subclass__(**kwargs)
            cls.shift = shift

        def __call__(self, x):
            return x + self.shift

    class Child(Parent, shift=1):
        def __call__(self, x):
            return super().__call__(x) * 2

    class Heir(Parent, shift=0):
        pass

    class Root(nnx.Module, pytree=False):
        def __init__(self):
            self.first = self.second = Child()
            self.heir = Heir()

        def __call__(self, x):
            assert type(self.first) is Child
            return self.heir(self.second(self.first(x)))

    own = Child.__call__
    assert floats(activation_rms(Root(), jnp.zeros(2))) == {"first": 2, "first#2": 6, "heir": 6, "Root": 6}
    assert Child.__call__ is own
    assert "__call__" not in vars(Heir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert type(nnx.clone(Root())) is Root


def test_compiled_calls_of_an_nnx_model():
    """A layer that is compiled by itself, and was before anybody measured it."""

    class Compiled(nnx.Module):
        def __init__(self):
            self.leaf = Leaf()

        @nnx.jit
        def __call__(self, x):
            return self.leaf(x) + 1

    model = Compiled()
    assert model(jnp.ones(())) == 3
    assert floats(activation_rms(model, jnp.ones(()))) == {"leaf": 2, "Compiled": 3}
    assert model(jnp.ones(())) == 3


def test_a_linen_layer_in_an_nnx_model():
    class Mixed(nnx.Module):
        def __init__(self):
            dense = nn.Dense(2, kernel_init=nn.initializers.ones)
            self.linen = nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, 2)))
            self.leaf = Leaf()

        def __call__(self, x):
            return self.leaf(self.linen(x))

    assert floats(activation_rms(Mixed(), jnp.ones((1, 2)))) == {"linen": 2, "leaf": 4, "Mixed": 4}


class Mlp(nnx.Module):
    def __init__(self, width, rngs):
        self.up, self.down = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))

    def twice(self, x):
        return self(self(x))


class LinenMlp(nn.Module):
    wrap: Any = None  # a transformation of the class of the bridge

    @nn.compact
    def __call__(self, x):
        bridge = nnx.bridge.ToLinen if self.wrap is None else self.wrap(nnx.bridge.ToLinen)
        return nn.Dense(x.shape[-1])(bridge(Mlp, args=(x.shape[-1],), name="mlp")(x))


class Alternating(nnx.Module):
    """Linen inside NNX, with NNX inside the Linen."""

    def __init__(self, rngs):
        self.linen = nnx.bridge.ToNNX(LinenMlp(), rngs=rngs).lazy_init(jnp.ones((1, 4)))
        self.mlp = Mlp(4, rngs)

    def __call__(self, x):
        return self.mlp(self.linen(x))


IN_LINEN_MLP = ["mlp/up", "mlp/down", "mlp", "Dense_0"]


def assert_entries(model, x, names):
    """And each is what the layer returns: the values of inner layers lead to those of the outer ones."""
    out, found = capture(model, x)
    assert list(found) == names
    np.testing.assert_array_equal(found[names[-1]], out)
    assert list(activation_rms(model, x)) == list(gradient_rms(squares, model, x)) == names
    return found


def test_a_layer_that_calls_its_parent_class_is_one_layer():
    class Shifted(Mlp):
        def __call__(self, x):
            return super().__call__(x) + 1

    class Both(nnx.Module):
        def __init__(self, rngs):
            self.plain, self.shifted = Mlp(4, rngs), Shifted(4, rngs)

        def __call__(self, x):
            return self.shifted(self.plain(x))

    names = [f"{layer}{part}" for layer in ("plain", "shifted") for part in ("/up", "/down", "")]
    assert_entries(Both(nnx.Rngs(0)), gaussian(3, 4), [*names, "Both"])


@pytest.mark.parametrize("wrap", [None, nn.remat, nn.jit])
def test_nnx_in_linen(wrap):
    module, x = LinenMlp(wrap), gaussian(3, 4)
    variables = module.init(jax.random.key(0), x)
    found = assert_entries((module, variables), x, [*IN_LINEN_MLP, "LinenMlp"])
    up, down = (variables["params"]["mlp"][name] for name in ("up", "down"))
    want = x @ up["kernel"]  # the biases are 0
    np.testing.assert_allclose(found["mlp/up"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["mlp/down"], nnx.relu(want) @ down["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["mlp"], found["mlp/down"])


def test_nnx_as_linen():
    """By itself, by another method, and inside a scan over layers."""

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return LinenMlp(name="block")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            stacked = nn.scan(Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return nnx.bridge.to_linen(Mlp, 4, name="head").twice(stacked(name="stack")(x, None)[0])

    x = gaussian(3, 4)
    module = nnx.bridge.to_linen(Mlp, 4)
    assert_entries((module, module.init(jax.random.key(0), x)), x, ["up", "down", "ToLinen"])
    stack = Stack()
    out, found = capture((stack, stack.init(jax.random.key(0), x)), x)
    assert list(found) == [
        *(f"stack/block/{name}" for name in IN_LINEN_MLP),
        *("stack/block", "stack"),
        *("head/up", "head/down", "head/Mlp", "head/up#2", "head/down#2", "head/Mlp#2", "head", "Stack"),
    ]
    assert found["stack/block/mlp/up"].shape == (LAYERS, 3, 8)
    np.testing.assert_array_equal(found["head/Mlp#2"], out)


JittedMlp = nn.jit(LinenMlp)


def test_compiled_layers_of_linen_that_were_called_before():
    """By other models, by the model itself, or inside of NNX; each has the names of its own model."""

    class Named(nn.Module):
        layer: str

        @nn.compact
        def __call__(self, x):
            return JittedMlp(name=self.layer)(x)

    x = gaussian(3, 4)
    for layer in ("first", "second"):
        names = [f"{layer}/{name}" for name in IN_LINEN_MLP]
        module = Named(layer)
        variables = module.init(jax.random.key(0), x)
        module.apply(variables, x)
        assert_entries((module, variables), x, [*names, layer, "Named"])
        module.apply(variables, x)
        model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x)
        model(x)
        assert_entries(model, x, [*names, layer, "ToNNX"])


def test_linen_in_nnx():
    x, model = gaussian(3, 4), Alternating(nnx.Rngs(0))
    inside = [f"linen/{name}" for name in IN_LINEN_MLP]
    names = [*inside, "linen", "mlp/up", "mlp/down", "mlp", "Alternating"]
    found = assert_entries(model, x, names)
    np.testing.assert_array_equal(found["linen"], found["linen/Dense_0"])
    np.testing.assert_array_equal(found["linen/mlp"], found["linen/mlp/down"])
    assert_entries(model.linen, x, [*IN_LINEN_MLP, "ToNNX"])
    # All of it as Linen again; what is called to initialise the inner one is no layer of the model.
    module = nnx.bridge.to_linen(Alternating)
    assert_entries((module, module.init(jax.random.key(0), x)), x, [*names[:-1], "ToLinen"])


def test_linen_without_a_bridge_in_nnx():
    """A model that applies a Linen module by itself: that one's output is not the model's, and has a name."""

    class Unbound(nn.Module):
        def __call__(self, x):
            return -x

    class Applying(nnx.Module):
        def __init__(self):
            self.params = nnx.Param(LinenMlp().init(jax.random.key(0), jnp.ones((1, 4)))["params"])

        def __call__(self, x):
            return Unbound()(LinenMlp().apply({"params": nnx.to_pure_dict(nnx.state(self))["params"]}, x))

    class Outer(nnx.Module):
        def __init__(self):
            self.inner = Applying()

        def __call__(self, x):
            return self.inner(x)

    x = gaussian(3, 4)
    names = [*IN_LINEN_MLP, "LinenMlp"]
    assert_entries(Applying(), x, [*names, "Applying"])
    assert_entries(Outer(), x, [*(f"inner/{name}" for name in names), "inner", "Outer"])


def test_a_measurement_inside_a_model():
    """The inner one takes its tags, and leaves the names of the outer one as they are."""

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = nn.Dense(3, name=None, parent=None)
            _, found = capture((inner, inner.init(jax.random.key(0), x)), x)
            assert list(found) == ["Dense"]
            return nn.Dense(2)(found["Dense"])

    x = gaussian(3, 4)
    assert_entries((Outer(), Outer().init(jax.random.key(0), x)), x, ["Dense_0", "Outer"])


def test_methods_of_a_model():
    class Encoder(nnx.Module):
        def __init__(self):
            self.leaf = Leaf()

        def encode(self, x, times):
            return times * self.leaf(x)

    x = jnp.ones(3)
    assert floats(activation_rms(Encoder().encode, x, times=3)) == {"leaf": 2, "Encoder.encode": 6}
    assert floats(gradient_rms(jnp.sum, Encoder().encode, x, 3)) == {"leaf": 3, "Encoder.encode": 1}
    with pytest.raises(
        TypeError, match=r"activation_rms: Encoder has no __call__; name a method, such as model.encode"
    ):
        activation_rms(Encoder(), x, 3)


def test_models_that_others_call_meanwhile():
    """In another thread, while this model is traced: one that is measured too, and one that is not."""
    found = {}

    def elsewhere():
        found["measured"] = floats(activation_rms(Leaf(), jnp.ones(1)))
        found["plain"] = collect(lambda x: Leaf()(x))(jnp.ones(1))

    class Slow(nnx.Module):
        def __init__(self):
            self.leaf = Leaf()

        def __call__(self, x):
            other = threading.Thread(target=elsewhere)
            other.start()
            other.join()
            return self.leaf(x)

    own = Leaf.__call__
    assert floats(activation_rms(Slow(), jnp.ones(2))) == {"leaf": 2, "Slow": 2}
    assert found == {"measured": {"Leaf": 2}, "plain": (2, {})}
    assert Leaf.__call__ is own


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: tag(jnp.ones(2), 3), "tag: name must be a string, got 3"),
        (lambda: capture(jnp.sin, 1.0), "capture: model must be .* for a plain function use tag and collect"),
        (
            lambda: activation_rms(LinenModel(), INPUT),
            r"activation_rms: .* got LinenModel; write \(module, variables\)",
        ),
        (lambda: gradient_rms(jnp.sum, None, INPUT), "gradient_rms: model must be .* got NoneType"),
        (lambda: gradient_rms(lambda y: y, nnx.Linear(1, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 1))), "scalar-output"),
    ],
)
def test_errors(call, match):
    with pytest.raises(TypeError, match=match):
        call()
