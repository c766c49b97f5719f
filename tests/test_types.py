"""The signatures tell the truth: shapes and dtypes hold at run time. And every public function has an example."""

import ast
import inspect
import types
import typing
from functools import cache

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from beartype import beartype
from flax import nnx
from jax import lax

import rmsjax
from rmsjax import geometry, linen, plot, probe, testing

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = jnp.array(np.random.default_rng(7).normal(1.0, 1.0, (2, 8)), jnp.float32)
TREE = {"kernel": X, "bias": X[0]}
KEY = jax.random.key(3)

# What functions return or raise: the example of the function shows it.
RECORDS = {"WidthRecord", "SweepRecord", "RMSReport", "TransformationError"}


def public():
    """(name, value) of all public functions and layers."""
    homes = {"rmsjax": rmsjax, "geometry": geometry, "probe": probe, "plot": plot, "testing": testing}
    for home, module in homes.items():
        for name in dir(module):
            value = getattr(module, name)
            if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            if home != "rmsjax" and getattr(rmsjax, name, None) is value:
                continue  # of two names the shorter one
            if not (inspect.isclass(value) and (name in RECORDS or issubclass(value, tuple))):
                yield f"{home}.{name}", value
    yield "nnx.RMSNorm", rmsjax.nnx.RMSNorm
    yield "linen.RMSNorm", linen.RMSNorm


PUBLIC = dict(public())


@cache
def namespace(module):
    """The names of a module, and those that it imports for type checkers alone."""
    names = dict(vars(inspect.importlib.import_module(module)))
    tree = ast.parse(inspect.getsource(inspect.importlib.import_module(module)))
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), module, "exec"), names)
    return names


def hints(function):
    return typing.get_type_hints(function, namespace(function.__module__))


def checked(function):
    """The function, with its annotations checked at each call: dtypes, shapes, and sizes that have one name."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = hints(function)
    return jaxtyping.jaxtyped(copy, typechecker=beartype)


def method(cls, *args, **kwargs):
    """`__call__` of a layer, checked."""
    layer = cls(*args, **kwargs)
    return lambda *inputs: checked(cls.__call__)(layer, *inputs)


def updated(tx):
    return tx.update(TREE, tx.init(TREE), TREE)


def max_norm(x):
    return jnp.max(jnp.abs(x))


def double(x):
    return 2 * x


COMPLEX = lax.complex(X, X)
NARROW = X.astype(jnp.bfloat16)
LAYER = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

# Calls of each public function, with all kinds of arguments that its signature admits.
CALLS = {
    "rmsjax.rms": lambda f: [f(X), f(X, 0), f(COMPLEX, (0, 1)), f(3.0), f(np.arange(3)), f(NARROW, where=X > 0)],
    "rmsjax.rms_normalize": lambda f: [
        f(X),
        f(COMPLEX, X[0]),
        f(NARROW, dtype=jnp.float32),
        f(X, axis=None, where=X > 0),
    ],
    "rmsjax.tree_rms": lambda f: [f(TREE), f(TREE, "block"), f({"w": X}, (0, 1)), f(TREE, lambda path, leaf: "one")],
    "rmsjax.rms_by_path": lambda f: [f(TREE), f(nnx.state(LAYER), sep=".")],
    "rmsjax.rms_penalty": lambda f: [f(TREE), f(TREE, 0.5, 0, "ceiling"), f(TREE, jnp.float32(1))],
    "rmsjax.rms_operator_norm": lambda f: [f(X), f(COMPLEX, in_axis=(0,), out_axis=(1,), exact=True)],
    "rmsjax.rms_operator_norm_by_path": lambda f: [f(TREE, lambda path, leaf: leaf.ndim == 2, exact=True)],
    "rmsjax.activation_rms": lambda f: [f(LAYER, X)],
    "rmsjax.gradient_rms": lambda f: [f(jnp.sum, LAYER, X)],
    "rmsjax.rms_report": lambda f: [f(TREE)],
    "rmsjax.clip_by_rms": lambda f: [updated(f(1.0)), updated(f(jnp.float32(1), 0))],
    "rmsjax.clip_by_relative_rms": lambda f: [updated(f(0.1, "global", min_rms=1e-3))],
    "rmsjax.clip_by_global_norm": lambda f: [updated(f(1.0)), updated(f(jnp.float32(1)))],
    "rmsjax.clip_by_history": lambda f: [updated(f()), updated(f(1.1, 0, warmup_steps=0, warmup_max_norm=None))],
    "rmsjax.hyperball": lambda f: [
        updated(f(optax.adam(0.1), 0.1)),
        updated(f(optax.sgd(0.1), lambda step: 0.1, {"kernel": True, "bias": False}, scope="global")),
    ],
    "rmsjax.normalize_by_rms": lambda f: [updated(f()), updated(f(0.2, epsilon=1e-8))],
    "rmsjax.record_rms": lambda f: [updated(f(ema_decay=0.9)), updated(f())],
    "rmsjax.rms_states": lambda f: [f(rmsjax.clip_by_rms(1.0).init(TREE))],
    "rmsjax.scale_by_stable_adam": lambda f: [
        updated(f(0.9, mu_dtype=jnp.bfloat16, mask={"kernel": True, "bias": False}))
    ],
    "rmsjax.stable_adamw": lambda f: [updated(f(0.1)), updated(f(lambda step: 0.1))],
    "geometry.random_orthogonal": lambda f: [f(KEY, 3), f(KEY, 2, jnp.float32)],
    "geometry.random_rotation": lambda f: [f(KEY, 3)],
    "geometry.rotation_between": lambda f: [f(X[0], X[1])],
    "geometry.worst_rotation": lambda f: [f(max_norm, 3, KEY, 4, reflections=True)],
    "geometry.rotation_gap": lambda f: [f(max_norm, 3, KEY, 4)],
    "geometry.orthogonal_gap": lambda f: [f(max_norm, 3, KEY, 4)],
    "geometry.is_even_gap": lambda f: [f(max_norm, 3, KEY, 4)],
    "geometry.equivariance_gap": lambda f: [f(double, 3, KEY, 4)],
    "geometry.radial_profile": lambda f: [f(max_norm, X, 3)],
    "geometry.euclidean_constant": lambda f: [f(max_norm, 3, KEY, 4)],
    "geometry.family_constant": lambda f: [f(max_norm, (2, 4), KEY, "uniform", 2)],
    "geometry.gaussian_mean_rms": lambda f: [f(jnp.arange(1, 4)), f(2.5), f(1 + jnp.abs(X))],
    "testing.assert_transform_invariant": lambda f: [f(jnp.sin, X, transforms=["eval_shape"])],
    "testing.assert_rotation_invariant": lambda f: [f(rmsjax.rms, 3)],
    "testing.assert_orthogonal_invariant": lambda f: [f(rmsjax.rms, 3)],
    "testing.assert_norm": lambda f: [f(rmsjax.rms, 3)],
    "nnx.RMSNorm": lambda _: [method(rmsjax.nnx.RMSNorm, 8, rngs=nnx.Rngs(0))(x, X > 0) for x in (X, NARROW)],
    "linen.RMSNorm": lambda _: [linen.RMSNorm().init_with_output(KEY, X)],
}

# Their signatures have no arrays, or their own tests call them at length.
NOT_CALLED = {
    "geometry.worst_axioms": "beartype knows no generic NamedTuple: tests/test_geometry.py",
    "geometry.norm_axioms_gap": "likewise",
    "rmsjax.coord_check": "trains models: tests/test_coord_check.py",
    "rmsjax.compare_widths": "runs models: tests/test_coord_check.py",
    "rmsjax.lr_sweep": "trains models: tests/test_lr_sweep.py",
    "plot.coord_check": "a record to a figure: tests/test_plot.py",
    "plot.layer_by_step": "a record to a figure",
    "plot.lr_sweep": "a record to a figure",
    "plot.over_training": "a record to a figure",
    "plot.rms_and_l2": "a record to a figure",
    "probe.tag": "any type, unchanged",
    "probe.collect": "a function, wrapped",
    "probe.capture": "a model, with what it gives",
}


@pytest.mark.parametrize("name", CALLS)
def test_annotations_hold(name):
    function = PUBLIC[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = CALLS[name](checked(function) if inspect.isfunction(function) else function)
    assert results


def test_every_public_function_is_called_or_has_a_reason():
    assert set(PUBLIC) == set(CALLS) | set(NOT_CALLED)


@pytest.mark.parametrize("name", PUBLIC)
def test_annotations_resolve_and_an_example_is_there(name):
    value = PUBLIC[name]
    assert hints(value.__call__ if inspect.isclass(value) else value)
    doc = inspect.getdoc(value)
    example = doc[doc.index("Example:") :]
    assert ">>> " in example


def test_wrong_shapes_and_dtypes_are_noticed():
    """The check itself works: what a signature rules out is found by it, before the function looks."""
    checks = jaxtyping.TypeCheckError
    with pytest.raises(checks, match="rms_normalize"):
        checked(rmsjax.rms_normalize)(X.astype(jnp.int32))
    with pytest.raises(checks, match="where"):
        checked(rmsjax.rms)(X, where=X)
    with pytest.raises(checks, match="rotation_between"):
        checked(geometry.rotation_between)(X[0], X[1, :3])
    with pytest.raises(checks, match="return"):
        checked(untrue)(X)


def untrue(x: jaxtyping.Float[jax.Array, "rows columns"]) -> jaxtyping.Float[jax.Array, "columns rows"]:
    return x
