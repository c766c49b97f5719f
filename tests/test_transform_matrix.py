"""Every public array function under every JAX transformation: the matrix, printed as a table at the end of the run.

One line in `ROWS` adds a function. A public function without a row fails a test.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.extend.random import define_prng_impl

import rmsjax
from rmsjax import _reduce, geometry
from rmsjax.testing import TRANSFORMS, TransformationError, assert_transform_invariant
from tests.helpers.marks import quick_of

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Row(NamedTuple):
    """A function with its arguments; `without` says why it is not tried under a transformation."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    without: MappingProxyType[str, str] = MappingProxyType({})


def row(fn, *args, **without):
    return Row(fn, args, MappingProxyType(without))


def cheap_generator():
    """Random keys whose numbers are one hash of a counter: JAX's own generator is most of any program that draws."""

    def mixed(x):
        for shift, factor in (16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1):  # of MurmurHash3
            x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
        return x

    def numbered(key, shape):
        return mixed(mixed(key[0]) + lax.iota(jnp.uint32, math.prod(shape)).reshape(shape))

    return define_prng_impl(
        key_shape=(1,),
        seed=lambda seed: mixed(seed.astype(jnp.uint32)).reshape(1),
        split=lambda key, shape: numbered(key, (*shape, 1)),
        random_bits=lambda key, bits, shape: numbered(key, shape).astype(f"uint{bits}"),
        fold_in=lambda key, data: mixed(key ^ data.astype(jnp.uint32)),
        name="cheap",
        tag="cheap",
    )


CHEAP = cheap_generator()

# Eight columns, one for each device. Neither norms nor elements are close to a threshold of any row.
X = jnp.array(np.random.default_rng(7).normal(1.0, 1.0, (2, 8)), jnp.float32)
MASK = jnp.arange(16).reshape(2, 8) % 3 > 0
TREE = {"kernel": 3 * X, "bias": X[0] / 4}
# Compiling is what takes time, in proportion to the leaves, so functions that treat leaves alike have one.
LEAF = {"kernel": 3 * X}
PARAMS = jax.tree.map(lambda x: 1 - x / 2, LEAF)
# Adam's step bends at gradients near 0 as fast as they are small, and differences there say nothing of a derivative.
GRADIENTS = jax.tree.map(lambda x: x + jnp.sign(x), LEAF)
KEY = jax.random.key_data(jax.random.key(3, impl=CHEAP))  # jax.export takes no keys of other generators than JAX's
LAYER = rmsjax.nnx.RMSNorm(8, scale_init=jax.nn.initializers.normal(1.0), rngs=nnx.Rngs(0))
VARIABLES = {"params": {"scale": X[1] / 2}}

# Of random points: there is nothing to differentiate in a key, so these share two rows.
OF_NORMS = ["rotation_gap", "orthogonal_gap", "is_even_gap", "norm_axioms_gap", "worst_axioms", "worst_rotation"]
OF_KEYS = ["random_orthogonal", "random_rotation"]


def by_path(path, leaf):
    return 0 if path == "kernel" else "others"


def second_step(tx, params=PARAMS):
    """A gradient transformation as a function of updates, and parameters if it needs them, after one step."""

    @cache
    def state():
        with jax.ensure_compile_time_eval():
            return tx.update(jax.tree.map(jnp.sin, params), tx.init(params), params)[1]

    return lambda updates, params=None: tx.update(updates, state(), params)


# The squares of one row overflow and those of the other underflow, or those of leaves: both take the rescaled path.


def beyond(x):
    return x * jnp.array([[1e30], [1e-30]], x.dtype)


def back(norms):
    return norms * jnp.array([[1e-30], [1e30]], norms.dtype)


def beyond_tree(tree):
    return {"kernel": tree["kernel"] * 1e30, "bias": tree["bias"] * 1e-30}


def back_tree(norms):
    return {"kernel": norms["kernel"] * 1e-30, "bias": norms["bias"] * 1e30}


clip_to_a_tenth_of_the_smaller = second_step(rmsjax.clip_by_rms(1e-31, "block"), TREE)


def clip_beyond(tree):
    updates, state = clip_to_a_tenth_of_the_smaller(beyond_tree(tree))
    return jax.tree.map(lambda update: update * 1e31, updates), back_tree(state.rms), state.num_clipped


def nnx_layer(state, x, mask=None):
    return nnx.merge(nnx.graphdef(LAYER), state)(x, mask=mask)


def largest(x):
    return jnp.max(jnp.abs(x))


def of_norms(key):
    key = jax.random.wrap_key_data(key, impl=CHEAP)
    found = {name: getattr(geometry, name)(largest, 3, key, samples=4) for name in OF_NORMS}
    found["equivariance_gap"] = geometry.equivariance_gap(jnp.abs, 3, key, samples=4)
    found["euclidean_constant"] = geometry.euclidean_constant(largest, 3, key, samples=4)
    found["family_constant"] = geometry.family_constant(largest, (2, 3), key, samples=4)
    return found


def of_keys(key):
    key = jax.random.wrap_key_data(key, impl=CHEAP)
    return [getattr(geometry, name)(key, 3, jnp.float32) for name in OF_KEYS]


SECOND = ("hessian_fwd_over_rev", "hessian_rev_over_rev")

ROWS = {
    "rms": row(rmsjax.rms, X),
    "rms where": row(lambda x, where: rmsjax.rms(x, -1, keepdims=True, where=where), X, MASK),
    "rms complex": row(rmsjax.rms, lax.complex(X, X[::-1])),
    "rms beyond": row(lambda x: back(rmsjax.rms(beyond(x), -1, keepdims=True)), X),
    "rms_normalize": row(partial(rmsjax.rms_normalize, scale_offset=1.0), X, X[0] / 4),
    "rms_normalize where": row(lambda x, where: rmsjax.rms_normalize(x, axis=None, where=where), X, MASK),
    "rms_normalize bfloat16": row(rmsjax.rms_normalize, X.astype(jnp.bfloat16)),
    "rms_normalize beyond": row(lambda x: rmsjax.rms_normalize(beyond(x), epsilon=0), X),
    "tree_rms": row(rmsjax.tree_rms, TREE),
    "tree_rms callable": row(partial(rmsjax.tree_rms, scope=by_path), TREE),
    "tree_rms beyond": row(lambda tree: back_tree(rmsjax.tree_rms(beyond_tree(tree), "block")), TREE),
    "rms_by_path": row(rmsjax.rms_by_path, TREE),
    "rms_by_path layers": row(partial(rmsjax.rms_by_path, stacked=("kernel", "bias")), TREE),
    "rms_penalty": row(partial(rmsjax.rms_penalty, target=0.25), TREE),
    "rms_operator_norm": row(partial(rmsjax.rms_operator_norm, exact=True), X[:, :3]),
    "rms_operator_norm_by_path": row(partial(rmsjax.rms_operator_norm_by_path, exact=True), {"w": X[:, :3], "b": X[0]}),
    "clip_by_rms": row(second_step(rmsjax.clip_by_rms(0.5), TREE), TREE),
    "clip_by_rms beyond": row(
        *(clip_beyond, TREE),
        **dict.fromkeys(SECOND, "the second derivative of a clip is out of range there, and no optimizer takes one"),
    ),
    "clip_by_relative_rms": row(second_step(rmsjax.clip_by_relative_rms(0.1)), LEAF, PARAMS),
    "clip_by_global_norm": row(second_step(rmsjax.clip_by_global_norm(0.5), TREE), TREE),
    "clip_by_history": row(second_step(rmsjax.clip_by_history(warmup_steps=1), TREE), TREE),
    "normalize_by_rms": row(second_step(rmsjax.normalize_by_rms(scope=-1)), LEAF),
    "record_rms": row(second_step(rmsjax.record_rms(ema_decay=0.5, relative=True)), LEAF, PARAMS),
    "scale_by_stable_adam": row(second_step(rmsjax.scale_by_stable_adam(0.5, 0.75)), GRADIENTS),
    "stable_adamw": row(second_step(rmsjax.stable_adamw(0.1, weight_decay=0.1)), GRADIENTS, PARAMS),
    "hyperball": row(second_step(rmsjax.hyperball(optax.scale(-1.0), 0.1)), LEAF, PARAMS),
    "nnx.RMSNorm": row(nnx_layer, nnx.state(LAYER), X),
    "nnx.RMSNorm bfloat16": row(nnx_layer, nnx.state(LAYER), X.astype(jnp.bfloat16), MASK),
    "linen.RMSNorm": row(
        lambda variables, x, mask: rmsjax.linen.RMSNorm().apply(variables, x, mask=mask), VARIABLES, X, MASK
    ),
    "geometry.rotation_between": row(geometry.rotation_between, X[0, :3], X[1, :3]),
    "geometry.radial_profile": row(lambda radii: geometry.radial_profile(rmsjax.rms, radii, 3), X),
    "geometry.gaussian_mean_rms": row(geometry.gaussian_mean_rms, jnp.abs(X) * 10 + 2),
    "geometry of norms": row(
        *(of_norms, KEY),
        enable_x64="points are of JAX's default float, so under x64 they are others: tests/test_geometry.py",
    ),
    "geometry of keys": row(of_keys, KEY),
}

# Public functions that are no functions of arrays, and where they are tested.
NOT_OF_ARRAYS = {
    "activation_rms": "of a model, tests/test_probe.py",
    "gradient_rms": "of a model, tests/test_probe.py",
    "compare_widths": "of models, to NumPy records",
    "coord_check": "trains models, to NumPy records",
    "lr_sweep": "trains models, to NumPy records",
    "rms_report": "prints a table",
    "rms_states": "reads the states of optimizers, tests/test_transforms.py",
}


# The others are minutes of compiling, and what they share with these is most of what a transformation can break.
QUICK = ("rms", "rms_normalize beyond", "clip_by_rms")

# Of these the quick suite has some transformations: not of variants of one function, nor of geometry, which has tests
# of its own.
VARIANTS = (" bfloat16", " beyond", " where", " callable", " layers")
OTHERS = [
    name for name in ROWS if name not in QUICK and not name.startswith("geometry") and not name.endswith(VARIANTS)
]


@pytest.mark.parametrize("name", OTHERS)
def test_function_under_some_transformations(name):
    fn, args, without = ROWS[name]
    assert_transform_invariant(fn, *args, transforms=[t for t in ("jit", "vmap", "jvp", "grad") if t not in without])


@pytest.mark.parametrize("name", quick_of(ROWS, *QUICK))
def test_function_under_all_transformations(name, record_property):
    fn, args, without = ROWS[name]
    failures, reasons = dict.fromkeys(TRANSFORMS, "the plain call fails"), {}
    try:
        reasons = assert_transform_invariant(fn, *args, transforms=[t for t in TRANSFORMS if t not in without])
        failures = {}
    except TransformationError as error:
        failures, reasons = error.failures, error.not_applicable
        raise
    finally:
        cells = {t: f"! {text}" for t, text in failures.items()}
        cells |= {t: f"- {reason}" for t, reason in {**without, **reasons}.items()}
        record_property("transform_matrix", [name, [[t, cells.get(t, "+")] for t in TRANSFORMS]])


FORMS = ["rms", "rms beyond", "rms_normalize", "rms_normalize beyond", "tree_rms"]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", quick_of(FORMS, *QUICK))
@pytest.mark.usefixtures("fresh_traces")
def test_forms_of_accelerators_under_all_transformations(name, platform, monkeypatch):
    """Run on a CPU."""
    monkeypatch.setattr(_reduce, "FORM", platform)
    fn, args, without = ROWS[name]
    assert_transform_invariant(fn, *args, transforms=[t for t in TRANSFORMS if t not in without])


def public_functions():
    for name in dir(rmsjax):
        if inspect.isfunction(getattr(rmsjax, name)) and not name.startswith("_"):
            yield name
    for name, value in vars(geometry).items():
        if inspect.isfunction(value) and value.__module__ == geometry.__name__ and not name.startswith("_"):
            yield f"geometry.{name}"


def test_every_public_function_has_a_row():
    rows = {name.split()[0] for name in ROWS} | set(NOT_OF_ARRAYS)
    others = ["equivariance_gap", "euclidean_constant", "family_constant"]
    rows |= {f"geometry.{name}" for name in [*OF_NORMS, *OF_KEYS, *others]}
    assert set(public_functions()) <= rows


def test_nnx_transforms_of_the_module_itself():
    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x)))

    def functional(scale, x):
        return jnp.sum(jnp.sin(rmsjax.rms_normalize(x, scale)))

    value, gradient = nnx.jit(nnx.value_and_grad(loss))(LAYER, X)
    want, want_gradient = jax.value_and_grad(functional)(LAYER.scale[...], X)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient["scale"][...], want_gradient, rtol=1e-5, atol=1e-6)
    vmapped = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(LAYER, X)
    np.testing.assert_allclose(vmapped, LAYER(X), rtol=1e-6)
