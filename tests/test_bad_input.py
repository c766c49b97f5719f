"""Mistakes that users make: each raises, before anything runs, and says function, argument, expected and got."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rmsjax
from rmsjax import rms, rms_by_path, rms_normalize, rms_operator_norm, rms_penalty, tree_rms

X = jnp.ones((2, 4))
MASK = jnp.ones((2, 4), bool)
TREE = {"w": X, "b": X[0]}
KEY = jax.random.key(0)
OTHER_WIDTH = {"w": jnp.ones((2, 3))}


def update(tx, updates, params=None, init=None):
    return tx.update(updates, tx.init(updates if init is None else init), params)


def nnx_norm(num_features=4, **kwargs):
    return rmsjax.nnx.RMSNorm(num_features, rngs=nnx.Rngs(0), **kwargs)


def linen_norm(x, scale=None, mask=None, **kwargs):
    layer = rmsjax.linen.RMSNorm(use_scale=scale is not None, **kwargs)
    return layer.apply({"params": {"scale": scale}} if scale is not None else {}, x, mask=mask)


# What is called, the type of the error, function, argument, expected, got. The message has the last four in this order.
MISTAKES = {
    # rms: x
    "x is a string": (lambda: rms("x"), TypeError, "rms", "x", "array of numbers", "'x'"),
    "x is None": (lambda: rms(None), TypeError, "rms", "x", "array of numbers", "None"),
    "x is a tree": (
        *(lambda: rms(TREE), TypeError),
        *("rms", "x", "array of numbers", "got a dict with the keys 'w', 'b'.*there is tree_rms"),
    ),
    "x is a key": (lambda: rms(KEY), TypeError, "rms", "x", "array of numbers", "dtype key<fry>"),
    "x is boolean": (lambda: rms(MASK), TypeError, "rms", "x", "array of numbers", "dtype bool"),
    "x is a ragged list": (lambda: rms([[1.0], [1.0, 2.0]]), TypeError, "rms", "x", "array of numbers", r"\[\[1.0\]"),
    "x is an array of strings": (
        lambda: rms(np.array(["a"])),
        TypeError,
        "rms",
        "x",
        "array of numbers",
        r"got an array of shape \(1,\) and dtype <U1",
    ),
    "x is a type": (lambda: rms(jnp.float32), TypeError, "rms", "x", "array of numbers", "got the class float32"),
    "x is too large an integer": (lambda: rms(2**70), TypeError, "rms", "x", "array of numbers", str(2**70)),
    "x is abstract": (
        *(lambda: rms(jax.ShapeDtypeStruct((2,), jnp.float32)), TypeError),
        *("rms", "x", "array of numbers", r"got a ShapeDtypeStruct of shape \(2,\) and dtype float32"),
    ),
    "no elements": (
        *(lambda: rms(jnp.zeros((0, 3)), 0), ValueError),
        *("rms", "cannot average over no elements", r"shape \(0, 3\)", r"axis \(0,\)"),
    ),
    # rms: axis
    "axis too large": (lambda: rms(X, 2), ValueError, "rms", "axis 2", "out of range", r"shape \(2, 4\)"),
    "axis too small": (lambda: rms(X, -3), ValueError, "rms", "axis -3", "out of range", r"shape \(2, 4\)"),
    "axis of a scalar": (lambda: rms(1.0, 0), ValueError, "rms", "axis 0", "out of range", r"shape \(\)"),
    "axis repeated": (lambda: rms(X, (0, -2)), ValueError, "rms", r"axis \(0, -2\)", r"\(2, 4\)", "more than once"),
    "axis empty": (lambda: rms(X, ()), ValueError, "rms", "axis", "is empty", "at least one axis"),
    "axis a float": (lambda: rms(X, 1.0), TypeError, "rms", "axis", "integer or a tuple of integers", r"1\.0"),
    "axis a boolean": (lambda: rms(X, True), TypeError, "rms", "axis", "integer or a tuple of integers", "True"),
    "axis a string": (lambda: rms(X, "0"), TypeError, "rms", "axis", "integer or a tuple of integers", "'0'"),
    "axis traced": (lambda: jax.jit(rms)(X, 0), TypeError, "rms", "axis", "integer or a tuple of integers", "Tracer"),
    # rms: where
    "where of another shape": (
        *(lambda: rms(X, where=MASK[:, :3]), ValueError),
        *("rms", "where", r"broadcast to the shape of x, \(2, 4\)", r"got shape \(2, 3\)"),
    ),
    "where of a higher rank": (
        *(lambda: rms(X, where=MASK[None]), ValueError),
        *("rms", "where", r"broadcast to the shape of x, \(2, 4\)", r"got shape \(1, 2, 4\)"),
    ),
    "where of integers": (
        *(lambda: rms(X, where=MASK.astype(int)), TypeError),
        *("rms", "where", "array of booleans", "dtype int32.*where != 0"),
    ),
    "where a string": (lambda: rms(X, where="all"), TypeError, "rms", "where", "array of booleans", "'all'"),
    # axis_name
    "axis_name not bound": (
        *(lambda: rms(X, axis_name="data"), ValueError),
        *("rms", "axis_name 'data'", "is not bound", "shard_map, pmap or vmap"),
    ),
    "axis_name under plain jit": (
        *(lambda: jax.jit(lambda x: tree_rms(x, axis_name=("a", "b")))(X), ValueError),
        *("tree_rms", "axis_name 'a'", "is not bound", "Under plain jit leave it out"),
    ),
    "axis_name an integer": (
        *(lambda: rms_normalize(X, axis_name=0), TypeError),
        *("rms_normalize", "axis_name", "string or a tuple of strings", "got 0"),
    ),
    # rms_normalize
    "normalizing integers": (
        *(lambda: rms_normalize(X.astype(int)), TypeError),
        *("rms_normalize", "x", "floating-point or complex numbers", "dtype int32.*Cast"),
    ),
    "normalizing a scalar": (
        *(lambda: rms_normalize(jnp.float32(2)), ValueError),
        *("rms_normalize", "axis -1", "out of range", r"shape \(\)"),
    ),
    "epsilon negative": (
        *(lambda: rms_normalize(X, epsilon=-1e-6), ValueError),
        *("rms_normalize", "epsilon", "finite and at least 0", "-1e-06"),
    ),
    "epsilon NaN": (
        *(lambda: rms_normalize(X, epsilon=float("nan")), ValueError),
        *("rms_normalize", "epsilon", "finite and at least 0", "nan"),
    ),
    "epsilon a string": (
        *(lambda: rms_normalize(X, epsilon="1"), TypeError),
        *("rms_normalize", "epsilon", "number known at trace time", "'1'"),
    ),
    "epsilon traced": (
        *(lambda: jax.jit(lambda e: rms_normalize(X, epsilon=e))(1e-6), TypeError),
        *("rms_normalize", "epsilon", "number known at trace time", "Tracer"),
    ),
    "scale of another size": (
        *(lambda: rms_normalize(X, jnp.ones(3)), ValueError),
        *("rms_normalize", "scale", r"shape \(4,\)", r"got shape \(3,\)"),
    ),
    "epsilon in the place of scale": (
        *(lambda: rms_normalize(X, 1e-6), ValueError),
        *("rms_normalize", "scale", r"shape \(4,\)", r"got shape \(\)"),
    ),
    "scale complex": (
        *(lambda: rms_normalize(X, jnp.ones(4, jnp.complex64)), TypeError),
        *("rms_normalize", "scale", "array of floating-point numbers", "dtype complex64"),
    ),
    "scale_offset an array": (
        *(lambda: rms_normalize(X, X[0], scale_offset=X[0]), TypeError),
        *("rms_normalize", "scale_offset", "number known at trace time", r"Array\("),
    ),
    "scale_offset without a scale": (
        *(lambda: rms_normalize(X, scale_offset=1.0), ValueError),
        *("rms_normalize", r"scale_offset 1\.0", "needs a scale", "got none"),
    ),
    "dtype integral": (
        *(lambda: rms_normalize(X, dtype=jnp.int32), TypeError),
        *("rms_normalize", "dtype", "floating-point numbers", "int32"),
    ),
    "dtype misspelt": (
        *(lambda: rms_normalize(X, dtype="flaot32"), TypeError),
        *("rms_normalize", "dtype", "floating-point numbers", "'flaot32'"),
    ),
    "dtype real for complex x": (
        *(lambda: rms_normalize(X.astype(jnp.complex64), dtype=jnp.float32), TypeError),
        *("rms_normalize", "dtype", "complex numbers", "float32"),
    ),
    # trees and scopes
    "scope misspelt": (
        *(lambda: tree_rms(TREE, "gobal"), ValueError),
        *("tree_rms", "scope", "'global', 'block', axes or a callable", "got 'gobal'; did you mean 'global'"),
    ),
    "scope unknown": (
        *(lambda: rms_by_path(TREE, scope="leaf"), ValueError),
        *("rms_by_path", "scope", "'global', 'block', axes or a callable", "got 'leaf'$"),
    ),
    "scope an empty tuple": (
        lambda: tree_rms(TREE, ()),
        ValueError,
        "tree_rms",
        "scope axis is empty",
        r"\(4,\)",
        "'b'",
    ),
    "a leaf is abstract": (
        *(lambda: tree_rms({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}), TypeError),
        *("tree_rms", "leaf 'w'", "array of numbers", "ShapeDtypeStruct.*eval_shape"),
    ),
    "sep None": (lambda: rms_by_path(TREE, sep=None), TypeError, "rms_by_path", "sep", "a string", "None"),
    "scope None": (lambda: tree_rms(TREE, None), TypeError, "tree_rms", "scope", "'global', 'block'", "got None"),
    "scope traced": (
        *(lambda: jax.jit(tree_rms)(TREE, 0), TypeError),
        *("tree_rms", "scope", "'global', 'block', axes or a callable", "Tracer"),
    ),
    "scope axis that one leaf does not have": (
        *(lambda: tree_rms(TREE, 1), ValueError),
        *("tree_rms", "scope axis 1", r"out of range for shape \(4,\)", "leaf 'b'.*a callable scope"),
    ),
    "scope axes repeated": (
        *(lambda: tree_rms({"w": X}, (0, 0)), ValueError),
        *("tree_rms", r"scope axis \(0, 0\)", "more than once", "leaf 'w'"),
    ),
    "callable scope gives None": (
        *(lambda: tree_rms(TREE, lambda path, leaf: None), TypeError),
        *("tree_rms", "scope", "axes, 'block' or a label", r"got None \(leaf 'b'\)"),
    ),
    "callable scope gives a float": (
        *(lambda: tree_rms(TREE, lambda path, leaf: 1.5), TypeError),
        *("tree_rms", "scope axis", "integer", r"got 1\.5 \(leaf 'b'\)"),
    ),
    "a key in the tree": (
        *(lambda: tree_rms({"rng": KEY, "w": X}), TypeError),
        *("tree_rms", "leaf 'rng'", "array of numbers", "dtype key<fry>.*leave them out"),
    ),
    "a string in the tree": (
        *(lambda: tree_rms({"name": "mlp", "w": X}), TypeError),
        *("tree_rms", "leaf 'name'", "array of numbers", "'mlp'.*leave it out"),
    ),
    "a function in the place of the tree": (
        *(lambda: tree_rms(jnp.sin), TypeError),
        *("tree_rms", "the tree", "array of numbers", "got the function sin"),
    ),
    "a stack that is not there": (
        *(lambda: rms_by_path({"blocks": TREE}, stacked="block"), ValueError),
        *("rms_by_path", "stacked", "paths in the tree", "got 'block'; did you mean 'blocks'"),
    ),
    "a stack of the wrong type": (
        *(lambda: rms_by_path({"blocks": TREE}, stacked=3), TypeError),
        *("rms_by_path", "stacked", "a path, several, or a dict from path to axis", "got 3; write stacked="),
    ),
    "a stack that is no path": (
        *(lambda: rms_by_path({"blocks": TREE}, stacked=[["blocks"]]), TypeError),
        *("rms_by_path", "stacked", "a path, several, or a dict from path to axis", r"got \[\['blocks'\]\]; write"),
    ),
    "a stack along a boolean": (
        *(lambda: rms_by_path({"blocks": TREE}, stacked={"blocks": True}), TypeError),
        *("rms_by_path", "stacked", "a path, several, or a dict from path to axis", "got {'blocks': True}; write"),
    ),
    "a stack along a boolean of NumPy": (
        *(lambda: rms_by_path({"blocks": TREE}, stacked={"blocks": np.True_}), TypeError),
        *("rms_by_path", "stacked", "a path, several, or a dict from path to axis", "got {'blocks': .*True_?}; write"),
    ),
    "a stack along two axes": (
        *(lambda: rms_by_path({"blocks": TREE}, stacked={"blocks": (0, 1)}), TypeError),
        *("rms_by_path", "stacked", "a path, several, or a dict from path to axis", r"got {'blocks': \(0, 1\)}; write"),
    ),
    "a stack along an axis that a leaf does not have": (
        *(lambda: rms_by_path({"blocks": TREE}, stacked={"blocks": 1}), ValueError),
        *("rms_by_path", "the axis of stacked leaf 'blocks/b'", "out of range", r"shape \(4,\)"),
    ),
    "stacked leaves with other numbers of layers": (
        *(lambda: rms_by_path({"blocks": TREE}, stacked="blocks"), ValueError),
        *("rms_by_path", "stacked leaves", "as many layers", "4 at 'blocks/w', as 'blocks/b' has", "got 2 .*; a leaf"),
    ),
    "axes for stacked leaves": (
        *(lambda: rms_by_path({"blocks": X}, stacked="blocks", scope=(0, 1)), ValueError),
        *("rms_by_path", "scope", "'block' or a label for a stacked leaf", r"got \(0, 1\) \(leaf 'blocks'\)"),
    ),
    "a label in and out of a stack": (
        *(lambda: rms_by_path({"blocks": X, "head": X}, stacked="blocks", scope=lambda path, leaf: "a"), ValueError),
        *(
            "rms_by_path",
            "leaves with one label",
            "in one stack, or in none",
            "'a' for leaf 'blocks' and for leaf 'head'",
        ),
    ),
    "a label that is a path": (
        *(lambda: rms_by_path(TREE, scope=lambda path, leaf: "w" if path == "b" else "block"), ValueError),
        *("rms_by_path", "two entries", "path 'w'", "another label"),
    ),
    "two leaves of one path": (
        *(lambda: rms_by_path({"a": {"b": X}, "a/b": X}), ValueError),
        *("rms_by_path", "two entries", "path 'a/b'", "another sep than '/'"),
    ),
    # optax
    "max_rms negative": (
        *(lambda: rmsjax.clip_by_rms(-1.0), ValueError),
        *("clip_by_rms", "max_rms", "at least 0", r"-1\.0"),
    ),
    "max_rms NaN": (
        *(lambda: rmsjax.clip_by_rms(jnp.nan), ValueError),
        *("clip_by_rms", "max_rms", "at least 0", "nan"),
    ),
    "max_rms complex": (lambda: rmsjax.clip_by_rms(1j), TypeError, "clip_by_rms", "max_rms", "a number", "1j"),
    "max_rms an array": (
        *(lambda: rmsjax.clip_by_rms(X[0]), TypeError),
        *("clip_by_rms", "max_rms", "a number", r"got an array of shape \(4,\)"),
    ),
    "max_rms a schedule": (
        *(lambda: rmsjax.clip_by_rms(optax.constant_schedule(1.0)), TypeError),
        *("clip_by_rms", "max_rms", "a number", "got the function", "inject_hyperparams", "static_args"),
    ),
    "scope of a clip misspelt": (
        *(lambda: rmsjax.clip_by_rms(1.0, "blok").init(TREE), ValueError),
        *("clip_by_rms", "scope", "'global', 'block'", "got 'blok'; did you mean 'block'"),
    ),
    "scope as an injected hyperparameter": (
        *(lambda: optax.inject_hyperparams(rmsjax.clip_by_rms)(max_rms=1.0, scope=0).init(TREE), TypeError),
        *("clip_by_rms", "scope", "'global', 'block'", "got Array.*static_args"),
    ),
    "integer updates": (
        *(lambda: update(rmsjax.clip_by_rms(1.0), {"w": jnp.ones(3, int)}), TypeError),
        *("clip_by_rms", "leaf 'w'", "floating-point or complex numbers", "dtype int32.*optax.masked"),
    ),
    "updates of another structure": (
        *(lambda: update(rmsjax.clip_by_rms(1.0, "block"), TREE, init={"w": X}), ValueError),
        *("clip_by_rms", "updates", r"structure of the params.*\{'w': \*\}", r"updates have .*'b': \*"),
    ),
    "updates of another shape": (
        *(lambda: update(rmsjax.clip_by_rms(1.0, 0), OTHER_WIDTH, init={"w": X}), ValueError),
        *("clip_by_rms", "updates", r"'w' has shape \(1, 4\)", r"\(1, 3\)"),
    ),
    "relative clip without params": (
        *(lambda: update(rmsjax.clip_by_relative_rms(0.1), TREE), ValueError),
        *("clip_by_relative_rms", "update", "needs the parameters", "params"),
    ),
    "relative clip with other params": (
        *(lambda: update(rmsjax.clip_by_relative_rms(0.1), TREE, {"w": X, "b": X}), ValueError),
        *("clip_by_relative_rms", "params", r"expected 'b' of shape \(4,\)", r"got 'b' of shape \(2, 4\)"),
    ),
    "relative clip with a string as param": (
        *(lambda: update(rmsjax.clip_by_relative_rms(0.1), TREE, {"w": "he_normal", "b": X[0]}), TypeError),
        *("clip_by_relative_rms", "leaf 'w' of params", "array of numbers", "'he_normal'"),
    ),
    "max_norm negative": (
        *(lambda: rmsjax.clip_by_global_norm(-1.0), ValueError),
        *("clip_by_global_norm", "max_norm", "at least 0", r"-1\.0"),
    ),
    "factor of a history below 1": (
        *(lambda: rmsjax.clip_by_history(0.5), ValueError),
        *("clip_by_history", "factor", "at least 1", r"0\.5"),
    ),
    "hyperball of no optimizer": (
        *(lambda: rmsjax.hyperball(optax.adam, 0.1), TypeError),
        *("hyperball", "inner", "an optax optimizer", "got the function adam", "such as optax.adam"),
    ),
    "hyperball without params": (
        *(lambda: update(rmsjax.hyperball(optax.sgd(0.1), 0.1), TREE), ValueError),
        *("hyperball", "update", "needs the parameters", "params"),
    ),
    "learning rate of hyperball negative": (
        *(lambda: rmsjax.hyperball(optax.sgd(0.1), -0.1), ValueError),
        *("hyperball", "learning_rate", "at least 0", r"-0\.1"),
    ),
    "min_rms negative": (
        *(lambda: rmsjax.clip_by_relative_rms(0.1, min_rms=-1e-3), ValueError),
        *("clip_by_relative_rms", "min_rms", "at least 0", "-0.001"),
    ),
    "target negative": (
        *(lambda: rmsjax.normalize_by_rms(-1.0), ValueError),
        *("normalize_by_rms", "target", "at least 0", r"-1\.0"),
    ),
    "ema_decay of 1": (
        *(lambda: rmsjax.record_rms(ema_decay=1.0), ValueError),
        *("record_rms", "ema_decay", "below 1", r"1\.0"),
    ),
    "b2 above 1": (
        *(lambda: rmsjax.stable_adamw(0.1, b2=1.5), ValueError),
        *("scale_by_stable_adam", "b2", "below 1", r"1\.5"),
    ),
    "learning rate a string": (
        *(lambda: rmsjax.stable_adamw("fast"), TypeError),
        *("stable_adamw", "learning_rate", "must be a number", "'fast'"),
    ),
    "learning rate NaN": (
        *(lambda: rmsjax.stable_adamw(float("nan")), ValueError),
        *("stable_adamw", "learning_rate", "must be finite", "nan"),
    ),
    "average in integers": (
        *(lambda: rmsjax.scale_by_stable_adam(mu_dtype="int8"), TypeError),
        *("scale_by_stable_adam", "mu_dtype", "floating-point or complex", "'int8'"),
    ),
    "average in no dtype": (
        *(lambda: rmsjax.stable_adamw(0.1, mu_dtype="foo"), TypeError),
        *("scale_by_stable_adam", "mu_dtype", "floating-point or complex numbers", "'foo'"),
    ),
    "complex average of real leaves": (
        *(lambda: rmsjax.scale_by_stable_adam(mu_dtype="complex64").init({"w": jnp.ones(2)}), TypeError),
        *("scale_by_stable_adam", "mu_dtype", "floating-point numbers for leaf 'w'.* float32", "'complex64'"),
    ),
    "real average of complex leaves": (
        *(lambda: rmsjax.scale_by_stable_adam(mu_dtype="bfloat16").init({"w": jnp.ones(2, complex)}), TypeError),
        *("scale_by_stable_adam", "mu_dtype", "complex numbers for leaf 'w'.* complex64", "'bfloat16'"),
    ),
    "decay without params": (
        *(lambda: update(rmsjax.stable_adamw(0.1), TREE), ValueError),
        *("scale_by_stable_adam", "update", "needs the parameters", "params"),
    ),
    "kind of penalty misspelt": (
        *(lambda: rms_penalty(TREE, kind="cieling"), ValueError),
        *("rms_penalty", "kind", "'two_sided' or 'ceiling'", "'cieling'"),
    ),
    "scope in the place of target": (
        *(lambda: rms_penalty(TREE, "block"), TypeError),
        *("rms_penalty", "target", "a number", "'block'"),
    ),
    "operator norm of a vector": (
        *(lambda: rms_operator_norm(X[0]), ValueError),
        *("rms_operator_norm", "in_axis -2", "out of range", r"shape \(4,\)"),
    ),
    "tolerance of zero": (
        *(lambda: rms_operator_norm(X, tolerance=0.0), ValueError),
        *("rms_operator_norm", "tolerance", "positive", r"0\.0"),
    ),
    # layers
    "nnx: wrong num_features": (
        *(lambda: nnx_norm(3)(X), ValueError),
        *("RMSNorm", "num_features is 3", r"axis 1 of x with shape \(2, 4\)", "has size 4; make the layer with"),
    ),
    "nnx: num_features a float": (
        *(lambda: nnx_norm(4.0), TypeError),
        *("RMSNorm", "num_features", "integer or a tuple of integers", r"4\.0"),
    ),
    "nnx: num_features negative": (
        *(lambda: nnx_norm((2, -4)), ValueError),
        *("RMSNorm", "num_features", "at least 1", r"\(2, -4\)"),
    ),
    "nnx: x a string": (lambda: nnx_norm()("x"), TypeError, "RMSNorm", "x", "array of numbers", "'x'"),
    "nnx: integers": (lambda: nnx_norm()(X.astype(int)), TypeError, "RMSNorm", "x", "floating-point", "int32.*Cast"),
    "nnx: mask of floats": (lambda: nnx_norm()(X, X), TypeError, "RMSNorm", "mask", "booleans", "float32.*mask != 0"),
    "nnx: reduction_axes out of range": (
        *(lambda: nnx_norm(reduction_axes=2)(X), ValueError),
        *("RMSNorm", "reduction_axes 2", "out of range", r"\(2, 4\)"),
    ),
    "nnx: feature_axes out of range": (
        *(lambda: nnx_norm(feature_axes=-3)(X), ValueError),
        *("RMSNorm", "feature_axes -3", "out of range", r"\(2, 4\)"),
    ),
    "nnx: narrow reductions": (
        *(lambda: nnx_norm(force_float32_reductions=False), ValueError),
        *("RMSNorm", "force_float32_reductions", "must be True", "got False"),
    ),
    "nnx: groups of unequal size": (
        *(lambda: nnx_norm(axis_index_groups=[[0], [1, 2]])(X), ValueError),
        *("RMSNorm", "axis_index_groups", "equal size", r"\[\[0\], \[1, 2\]\]"),
    ),
    "nnx: a number for groups": (
        *(lambda: nnx_norm(axis_name="i", axis_index_groups=2)(X), TypeError),
        *("RMSNorm", "axis_index_groups", "groups of integers", "got 2"),
    ),
    "nnx: groups of what": (
        *(lambda: nnx_norm(axis_index_groups=[[0], [1]])(X), ValueError),
        *("RMSNorm", "axis_index_groups", "needs an axis_name", "got none"),
    ),
    "nnx: axis_name not bound": (
        *(lambda: nnx_norm(axis_name="data")(X), ValueError),
        *("RMSNorm", "axis_name 'data'", "not bound", "shard_map"),
    ),
    "linen: wrong scale": (
        *(lambda: linen_norm(X, jnp.ones(3)), ValueError),
        *("RMSNorm", "the scale has size 3", "axis 1 of x", "has size 4; initialise the layer"),
    ),
    "linen: mask of another shape": (
        *(lambda: linen_norm(X, mask=MASK[:, :3]), ValueError),
        *("RMSNorm", "mask", r"\(2, 4\)", r"got shape \(2, 3\)"),
    ),
    "linen: epsilon negative": (
        *(lambda: linen_norm(X, epsilon=-1.0), ValueError),
        *("RMSNorm", "epsilon", "at least 0", r"-1\.0"),
    ),
    "linen: dtype integral": (
        *(lambda: linen_norm(X, dtype=jnp.int8), TypeError),
        *("RMSNorm", "dtype", "floating-point", "int8"),
    ),
    "linen: narrow reductions": (
        *(lambda: linen_norm(X, force_float32_reductions=False), ValueError),
        *("RMSNorm", "force_float32_reductions", "must be True", "got False"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    call, error, function, *words = MISTAKES[name]
    with pytest.raises(error, match=rf"(?s)^(rmsjax )?{function}: {'.*'.join(words)}") as caught:
        call()
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400


def test_there_are_forty():
    assert len(MISTAKES) >= 40


def test_mistakes_are_found_while_tracing():
    """No value is needed to find them, so they show before a long program is compiled."""
    with pytest.raises(ValueError, match="rms: axis 2 is out of range"):
        jax.eval_shape(lambda x: rms(x, 2), X)
    with pytest.raises(ValueError, match="RMSNorm: num_features is 3"):
        nnx.eval_shape(lambda: nnx_norm(3)(X))
    with pytest.raises(TypeError, match="clip_by_rms: leaf 'w' must be"):
        jax.eval_shape(rmsjax.clip_by_rms(1.0).init, {"w": jnp.ones(3, int)})


def test_traced_threshold_below_zero_is_zero():
    """Its value is not known while tracing. A schedule that overshoots must not turn the sign of an update."""
    clipped = jax.jit(lambda t: update(rmsjax.clip_by_rms(t), {"w": X})[0]["w"])
    assert jnp.all(clipped(-0.5) == 0)
    assert jnp.all(jnp.isnan(clipped(jnp.nan)))
