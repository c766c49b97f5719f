"""Every public array function under every JAX transformation: the matrix, printed as a table at the end of the run.

One line in `ROWS` adds a function. A public function without a row fails a test.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import rmsjax
from rmsjax import geometry
from rmsjax.testing import TRANSFORMS, TransformationError, assert_transform_invariant


class Row(NamedTuple):
    """A function with its arguments; `without` says why it is not tried under a transformation."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    without: MappingProxyType[str, str] = MappingProxyType({})


def row(fn, *args, **without):
    return Row(fn, args, MappingProxyType(without))


# Eight columns, one for each device. Neither norms nor elements are close to a threshold of any row.
X = jnp.array(np.random.default_rng(7).normal(1.0, 1.0, (2, 8)), jnp.float32)
MASK = jnp.arange(16).reshape(2, 8) % 3 > 0
TREE = {"kernel": 3 * X, "bias": X[0] / 4}
PARAMS = jax.tree.map(lambda x: 1 - x / 2, TREE)
# Adam's step bends at gradients near 0 as fast as they are small, and differences there say nothing of a derivative.
GRADIENTS = jax.tree.map(lambda x: x + jnp.sign(x), TREE)
KEY = jax.random.key(3)
LAYER = rmsjax.nnx.RMSNorm(8, scale_init=jax.nn.initializers.normal(1.0), rngs=nnx.Rngs(0))
VARIABLES = {"params": {"scale": X[1] / 2}}

# What a row with these would try is compiled, at length, for the row that it names already.
DERIVATIVES = ("hessian_fwd_over_rev", "hessian_rev_over_rev", "jacfwd", "jacrev", "linearize")
CONTROL_FLOW = ("nested_vmap", "scan", "while_loop", "cond", "checkpoint", "shard_map")

# Of random points: there is nothing to differentiate in a key, so these share two rows.
OF_NORMS = ["rotation_gap", "orthogonal_gap", "is_even_gap", "norm_axioms_gap", "worst_axioms", "worst_rotation"]
OF_KEYS = ["random_orthogonal", "random_rotation"]


def by_path(path, leaf):
    return 0 if path == "kernel" else "others"


def second_step(tx):
    """A gradient transformation as a function of updates, and parameters if it needs them, after one step."""
    state = tx.update(jax.tree.map(jnp.sin, TREE), tx.init(PARAMS), PARAMS)[1]
    return lambda updates, params=None: tx.update(updates, state, params)


def nnx_layer(state, x):
    return nnx.merge(nnx.graphdef(LAYER), state)(x)


def of_norms(key):
    found = {name: getattr(geometry, name)(rmsjax.rms, 3, key, samples=4) for name in OF_NORMS}
    found["equivariance_gap"] = geometry.equivariance_gap(rmsjax.rms_normalize, 3, key, samples=4)
    found["euclidean_constant"] = geometry.euclidean_constant(rmsjax.rms, 3, key, samples=4)
    found["family_constant"] = geometry.family_constant(rmsjax.rms, (2, 3), key, samples=4)
    return found


ROWS = {
    "rms": row(rmsjax.rms, X),
    "rms axis": row(partial(rmsjax.rms, axis=-1), X),
    "rms keepdims": row(partial(rmsjax.rms, axis=(0,), keepdims=True), X),
    "rms where": row(lambda x, where: rmsjax.rms(x, -1, where=where), X, MASK),
    "rms complex": row(rmsjax.rms, lax.complex(X, X[::-1])),
    "rms_normalize": row(rmsjax.rms_normalize, X),
    "rms_normalize scale": row(partial(rmsjax.rms_normalize, scale_offset=1.0), X, X[0] / 4),
    "rms_normalize where": row(lambda x, where: rmsjax.rms_normalize(x, axis=None, where=where), X, MASK),
    "rms_normalize bfloat16": row(rmsjax.rms_normalize, X.astype(jnp.bfloat16)),
    "tree_rms": row(rmsjax.tree_rms, TREE),
    "tree_rms block": row(partial(rmsjax.tree_rms, scope="block"), TREE),
    "tree_rms axes": row(partial(rmsjax.tree_rms, scope=-1), TREE),
    "tree_rms callable": row(partial(rmsjax.tree_rms, scope=by_path), TREE),
    "rms_by_path": row(rmsjax.rms_by_path, TREE),
    "rms_penalty": row(partial(rmsjax.rms_penalty, target=0.25), TREE),
    "rms_operator_norm": row(partial(rmsjax.rms_operator_norm, exact=True), X[:, :3]),
    "rms_operator_norm_by_path": row(
        partial(rmsjax.rms_operator_norm_by_path, exact=True),
        {"w": X[:, :3], "b": X[0]},
        **dict.fromkeys((*DERIVATIVES, *CONTROL_FLOW), "calls rms_operator_norm for each matrix, whose row has it"),
    ),
    "clip_by_rms": row(second_step(rmsjax.clip_by_rms(0.5)), TREE),
    "clip_by_relative_rms": row(second_step(rmsjax.clip_by_relative_rms(0.1)), TREE, PARAMS),
    "normalize_by_rms": row(second_step(rmsjax.normalize_by_rms(scope=-1)), TREE),
    "record_rms": row(second_step(rmsjax.record_rms(ema_decay=0.5)), TREE),
    "scale_by_stable_adam": row(second_step(rmsjax.scale_by_stable_adam(0.5, 0.75)), GRADIENTS),
    "stable_adamw": row(
        second_step(rmsjax.stable_adamw(0.1, weight_decay=0.1)),
        *(GRADIENTS, PARAMS),
        **dict.fromkeys((*DERIVATIVES, *CONTROL_FLOW), "is scale_by_stable_adam times a number, whose row has it"),
    ),
    "nnx.RMSNorm": row(nnx_layer, nnx.state(LAYER), X),
    "linen.RMSNorm": row(rmsjax.linen.RMSNorm().apply, VARIABLES, X),
    "geometry.rotation_between": row(geometry.rotation_between, X[0, :3], X[1, :3]),
    "geometry.radial_profile": row(lambda radii: geometry.radial_profile(rmsjax.rms, radii, 3), X),
    "geometry.gaussian_mean_rms": row(geometry.gaussian_mean_rms, jnp.abs(X) * 10),
    "geometry of norms": row(
        *(of_norms, KEY),
        enable_x64="points are of JAX's default float, so under x64 they are others",
        **dict.fromkeys(CONTROL_FLOW, "nothing but a key goes in, as in the row of keys"),
    ),
    "geometry of keys": row(lambda key: [getattr(geometry, name)(key, 3, jnp.float32) for name in OF_KEYS], KEY),
}

# Public functions that are no functions of arrays, and where they are tested.
NOT_OF_ARRAYS = {
    "activation_rms": "of a model, tests/test_probe.py",
    "gradient_rms": "of a model, tests/test_probe.py",
    "compare_widths": "of models, to NumPy records",
    "coord_check": "trains models, to NumPy records",
    "rms_report": "prints a table",
}


@pytest.fixture(autouse=True)
def _quick_compiles():
    """Compiling is all the cost here, and what LLVM makes of tiny loops is of no interest."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# What differs between versions of JAX shows in these; the others take minutes to compile.
IN_EVERY_ENVIRONMENT = ("rms", "rms_normalize", "tree_rms", "clip_by_rms", "nnx.RMSNorm")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name.split()[0] in IN_EVERY_ENVIRONMENT else pytest.mark.once) for name in ROWS],
)
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
