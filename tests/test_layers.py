"""Both RMSNorm layers against Flax's: arguments, parameters, outputs, checkpoints; and what they do better."""

import inspect
import warnings

import flax.linen as flax_linen
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx as flax_nnx

import rmsjax
from tests.helpers.marks import slow

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32) * 3
SCALE = np.array([0.5, -1.0, 2.0, 3.0], np.float32)


def run_nnx(module, x, scale=None, mask=None, num_features=None, **kwargs):
    """The output of an NNX layer with the given scale."""
    if num_features is None:
        num_features = x.shape[-1] if scale is None else np.shape(scale)[0]
    layer = module(num_features, rngs=flax_nnx.Rngs(0), **kwargs)
    if scale is not None:
        layer.scale[...] = jnp.asarray(scale, layer.scale[...].dtype)
    return layer(x) if mask is None else layer(x, mask)


def run_linen(module, x, scale=None, mask=None, **kwargs):
    """The output of a Linen layer with the given scale."""
    layer = module(**kwargs)
    variables = layer.init(jax.random.key(0), x)
    if scale is not None:
        variables = {"params": {"scale": jnp.asarray(scale)}}
    return layer.apply(variables, x, mask=mask)


OURS_AND_FLAX = {
    "nnx": (run_nnx, rmsjax.nnx.RMSNorm, flax_nnx.RMSNorm),
    "linen": (run_linen, rmsjax.linen.RMSNorm, flax_linen.RMSNorm),
}
both_apis = pytest.mark.parametrize("api", list(OURS_AND_FLAX))


def close(got, want):
    assert got.dtype == want.dtype
    exact = jnp.finfo(want.dtype)
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=4 * float(exact.eps), atol=float(exact.eps)
    )


@both_apis
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"epsilon": 0.1},
        {"use_scale": False},
        {"reduction_axes": (1, 2)},
        {"reduction_axes": (0, 1), "feature_axes": 2},
        {"axis_name": None, "axis_index_groups": None},
        {"param_dtype": jnp.bfloat16},
        {"dtype": jnp.float16},
        {"scale_init": flax_linen.initializers.constant(3.0)},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "defaults",
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_equals_flax(api, dtype, kwargs):
    run, ours, flax = OURS_AND_FLAX[api]
    x = jnp.asarray(X, dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = run(flax, x, **kwargs)
    if "scale_init" not in kwargs and kwargs.get("use_scale", True):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            want = run(flax, x, SCALE, **kwargs)
        got = run(ours, x, SCALE, **kwargs)
    else:
        got = run(ours, x, **kwargs)
    close(got, want)


@both_apis
def test_equals_flax_under_a_mask_where_the_mask_is_true(api):
    run, ours, flax = OURS_AND_FLAX[api]
    mask = np.random.default_rng(1).random(X.shape) < 0.6
    mask[..., 0] = True
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = run(flax, X, SCALE, mask)
    got = run(ours, X, SCALE, mask)
    np.testing.assert_allclose(got[mask], want[mask], rtol=1e-6)
    np.testing.assert_array_equal(got[~mask], 0)


@both_apis
def test_takes_the_arguments_of_flax(api):
    """All that mean something for an RMS norm, under the same names and with the same defaults."""
    _, ours, flax = OURS_AND_FLAX[api]
    inert = {"use_fast_variance", "force_float32_reductions"}
    own, theirs = (inspect.signature(cls.__init__).parameters for cls in (ours, flax))
    assert set(theirs) - inert - set(own) == set()
    ours_first = {"scale_init", "promote_dtype"}  # None, to stand for the same thing
    for name in set(theirs) & set(own) - inert - ours_first - {"self", "kwargs"}:
        assert own[name].default == theirs[name].default or name in ("parent", "name", "dtype"), name


@both_apis
@pytest.mark.parametrize("kwargs", [{"reduction_axes": (1, 2)}, {"reduction_axes": (0, 1), "feature_axes": 2}])
@pytest.mark.parametrize(
    "make", [np.array, lambda axes: np.atleast_1d(axes).tolist(), np.uint8], ids=["array", "list", "uint8"]
)
def test_axes_of_other_types(api, kwargs, make):
    run, ours, _ = OURS_AND_FLAX[api]
    close(run(ours, X, **{name: make(axes) for name, axes in kwargs.items()}), run(ours, X, **kwargs))


@both_apis
@pytest.mark.parametrize("value", [True, False])
def test_takes_and_ignores_use_fast_variance(api, value):
    """With one warning for a layer, in which Python sees one for all of them; copies of a layer are silent."""
    run, ours, _ = OURS_AND_FLAX[api]
    with pytest.warns(UserWarning, match="RMSNorm: use_fast_variance does nothing") as caught:
        got = run(ours, X, use_fast_variance=value)
    assert len(caught) == 1
    close(got, run(ours, X))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            run(ours, X, use_fast_variance=value)
            run(ours, X[0], use_fast_variance=value)
    assert len(caught) == 1


@both_apis
def test_force_float32_reductions(api):
    run, ours, _ = OURS_AND_FLAX[api]
    close(run(ours, X, force_float32_reductions=True), run(ours, X))
    with pytest.raises(ValueError, match="RMSNorm: force_float32_reductions must be True, got False"):
        run(ours, X, force_float32_reductions=False)


@pytest.mark.parametrize("num_features", [4, np.int64(4), (3, 4), [3, 4]])
def test_num_features_reads_back(num_features):
    """As Flax has it; what is not an integer as a tuple."""
    feature_axes = -1 if np.ndim(num_features) == 0 else (-2, -1)
    layer = rmsjax.nnx.RMSNorm(num_features, feature_axes=feature_axes, rngs=flax_nnx.Rngs(0))
    expected = (3, 4) if np.ndim(num_features) else 4
    assert layer.num_features == expected
    assert type(layer.num_features) is type(expected)
    close(layer(X), rmsjax.rms_normalize(X))


def test_scale_that_is_set_later():
    """Loading code makes layers without a scale, and gives them one; as flax, and through its transformations."""

    def later(module):
        layer = module(4, use_scale=False, rngs=flax_nnx.Rngs(0))
        assert jax.tree.leaves(flax_nnx.state(layer)) == []
        layer.scale = flax_nnx.Param(jnp.asarray(SCALE))
        return layer

    ours, theirs = later(rmsjax.nnx.RMSNorm), later(flax_nnx.RMSNorm)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = theirs(X)
    close(ours(X), want)
    close(flax_nnx.jit(lambda layer, x: layer(x))(ours, X), want)
    assert jax.tree.structure(flax_nnx.state(ours)) == jax.tree.structure(flax_nnx.state(theirs))
    assert flax_nnx.grad(lambda layer: layer(X).sum())(ours)["scale"][...].shape == (4,)


@both_apis
def test_zeros_and_masked_rows_give_zero(api):
    run, ours, _ = OURS_AND_FLAX[api]
    np.testing.assert_array_equal(run(ours, np.zeros((2, 4), np.float32), SCALE, epsilon=0.0), 0)
    mask = np.array([[True] * 4, [False] * 4])
    for epsilon in (0.0, 1e-6):
        got = run(ours, X[0, :2], SCALE, mask, epsilon=epsilon)
        np.testing.assert_array_equal(got[1], 0)
        assert (got[0] != 0).all()


@both_apis
def test_gemma_convention(api):
    run, ours, _ = OURS_AND_FLAX[api]
    close(run(ours, X, scale_offset=1.0), run(ours, X))
    close(run(ours, X, SCALE, scale_offset=1.0), run(ours, X, SCALE + 1))
    zeros = rmsjax.nnx.RMSNorm(4, scale_offset=1.0, rngs=flax_nnx.Rngs(0)).scale[...]
    np.testing.assert_array_equal(zeros, np.zeros(4))


@both_apis
def test_tuple_of_feature_axes(api):
    run, ours, _ = OURS_AND_FLAX[api]
    scale = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    kwargs = {"feature_axes": (-2, -1)} | ({"num_features": (3, 4)} if api == "nnx" else {})
    close(run(ours, X, scale, **kwargs), rmsjax.rms_normalize(X) * scale[None])


@both_apis
def test_wrong_feature_size_names_size_and_axis(api):
    run, ours, _ = OURS_AND_FLAX[api]
    given = {"nnx": "num_features is", "linen": "the scale has size"}[api]
    with pytest.raises(ValueError, match=rf"RMSNorm: {given} 3, but axis 2 of x with shape \(2, 3, 4\) has size 4"):
        run(ours, X, np.ones(3, np.float32))


@both_apis
def test_float8_comes_out_in_the_dtype_of_the_scale(api):
    """JAX has no promotion for float8, and a layer of its own has no dtype to give."""
    run, ours, _ = OURS_AND_FLAX[api]
    x = X.astype(jnp.float8_e4m3fn)
    got = run(ours, x, np.ones(4, np.float32))
    assert got.dtype == jnp.float32
    close(got, rmsjax.rms_normalize(x.astype(jnp.float32)))


def test_offset_without_scale_is_refused():
    for run, ours, _ in OURS_AND_FLAX.values():
        with pytest.raises(ValueError, match=r"RMSNorm: scale_offset 1\.0 needs a scale"):
            run(ours, X, use_scale=False, scale_offset=1.0)


def test_nnx_specials():
    def widen(arrays, dtype):
        del dtype
        return tuple(array.astype(jnp.float32) for array in arrays)

    x = jnp.asarray(X, jnp.bfloat16)
    layer = rmsjax.nnx.RMSNorm(
        4, param_dtype=jnp.bfloat16, promote_dtype=widen, scale_metadata={"note": "kept"}, rngs=flax_nnx.Rngs(0)
    )
    assert layer(x).dtype == jnp.float32
    assert layer.scale.get_metadata()["note"] == "kept"
    grads = flax_nnx.grad(lambda layer: layer(x).sum())(layer)
    assert grads["scale"][...].shape == (4,)


# ------------------------------------------------------------------------------- one suite for layers and clip alike


def clip(x):
    tx = rmsjax.clip_by_rms(0.5)
    return tx.update({"x": x}, tx.init({"x": x}))[0]["x"]


def clip_exactly(x):
    return x * min(1.0, 0.5 / np.sqrt(np.mean(x**2)))


def nnx_layer(x):
    return run_nnx(rmsjax.nnx.RMSNorm, x, SCALE, dtype=x.dtype, param_dtype=x.dtype)


def linen_layer(x):
    return rmsjax.linen.RMSNorm(dtype=x.dtype).apply({"params": {"scale": jnp.asarray(SCALE, x.dtype)}}, x)


def layer_exactly(x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * SCALE


@pytest.mark.parametrize(
    "dtype", [slow(jnp.float16), jnp.bfloat16, jnp.float32, slow(jnp.float64)], ids=lambda d: d.__name__
)
@pytest.mark.parametrize(
    ("fn", "exactly"), [(clip, clip_exactly), (nnx_layer, layer_exactly), (linen_layer, layer_exactly)]
)
def test_shared_suite(fn, exactly, dtype, x64):
    """Eager, jit, vmap and grad, in every dtype, against float64."""
    x = jnp.asarray(X[0], dtype)
    exact, tolerance = np.asarray(x, np.float64), 8 * float(jnp.finfo(dtype).eps)

    def check(got, want):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)

    check(fn(x), exactly(exact))
    check(jax.jit(fn)(x), exactly(exact))
    batch = jnp.stack([x, 2 * x])
    check(jax.vmap(fn)(batch), np.stack([exactly(exact), exactly(2 * exact)]))

    weights = np.random.default_rng(3).normal(size=x.shape)
    step = 1e-6
    numeric = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        h = np.zeros(x.shape)
        h[i] = step
        numeric[i] = np.sum(weights * (exactly(exact + h) - exactly(exact - h))) / (2 * step)
    got = jax.grad(lambda x: jnp.sum(fn(x).astype(jnp.float64) * weights))(x)
    scale = np.abs(numeric).max()
    np.testing.assert_allclose(np.asarray(got, np.float64) / scale, numeric / scale, atol=tolerance + 1e-7)


# ------------------------------------------------------------------------------------------------- partitioned scales

BOXING = {
    "partitioned": lambda names: flax_linen.with_partitioning(flax_linen.initializers.ones_init(), names),
    "logically": lambda names: flax_linen.with_logical_partitioning(flax_linen.initializers.ones_init(), names),
    "twice": lambda names: flax_linen.with_logical_partitioning(
        flax_linen.with_partitioning(flax_linen.initializers.ones_init(), names), names
    ),
}
boxings = pytest.mark.parametrize("boxing", BOXING)


@boxings
@pytest.mark.parametrize("feature_axes", [-1, (-2, -1)])
def test_linen_scale_in_a_box(boxing, feature_axes):
    """As the guide of Flax on sharding has it: variables keep the box, and the layer finds the array in it."""
    names = ("embed",) if feature_axes == -1 else ("heads", "embed")
    layer = rmsjax.linen.RMSNorm(scale_init=BOXING[boxing](names), feature_axes=feature_axes)
    variables = layer.init(jax.random.key(0), X)
    assert isinstance(variables["params"]["scale"], flax_linen.Partitioned)
    assert variables["params"]["scale"].names == names
    scaled = jax.tree.map(lambda scale: 2 * scale, variables)
    for apply in (layer.apply, jax.jit(layer.apply)):
        close(apply(scaled, X), 2 * rmsjax.rms_normalize(X))
    grads = jax.grad(lambda v: layer.apply(v, X).sum())(variables)
    assert jax.tree.structure(grads) == jax.tree.structure(variables)
    np.testing.assert_allclose(
        *jax.tree.leaves(grads),
        rmsjax.rms_normalize(X).sum(0 if feature_axes != -1 else (0, 1)),
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match=r"RMSNorm: the scale has size .* but axis .* initialise the layer with an x"):
        layer.apply(variables, X[..., :3])


@boxings
def test_stacked_linen_scales_in_boxes(boxing):
    class Block(flax_linen.Module):
        @flax_linen.compact
        def __call__(self, x, _):
            return rmsjax.linen.RMSNorm(scale_init=BOXING[boxing](("embed",)), name="norm")(x), None

    stack = flax_linen.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={flax_linen.PARTITION_NAME: "layers"},
    )()
    variables = stack.init(jax.random.key(0), X, None)
    assert variables["params"]["norm"]["scale"].names == ("layers", "embed")
    scaled = jax.tree.map(lambda scale: scale * jnp.array([[2.0], [1.0], [5.0]]), variables)
    got = jax.jit(stack.apply)(scaled, X, None)[0]
    np.testing.assert_allclose(got, 5 * rmsjax.rms_normalize(X), rtol=1e-5)


@pytest.mark.parametrize("boxing", ["partitioned", "logically"])  # the bridge takes one box
def test_linen_scale_in_a_box_through_the_bridge(boxing):
    layer = rmsjax.linen.RMSNorm(scale_init=BOXING[boxing](("embed",)))
    mesh = jax.make_mesh((2,), ("embed",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        bridged = flax_nnx.bridge.ToNNX(layer, rngs=flax_nnx.Rngs(0)).lazy_init(X)
        close(bridged(X), rmsjax.rms_normalize(X))


# ------------------------------------------------------------------------------------------------------- checkpoints


def nnx_model(norm):
    class Model(flax_nnx.Module):
        def __init__(self, seed):
            rngs = flax_nnx.Rngs(seed)
            self.first = flax_nnx.Linear(4, 8, rngs=rngs)
            self.norm = norm(8, scale_init=flax_linen.initializers.normal(), rngs=rngs)
            self.last = flax_nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(self.norm(self.first(x)))

    return Model


def test_checkpoint_of_flax_nnx_restores(tmp_path):
    theirs = nnx_model(flax_nnx.RMSNorm)(0)
    ours = nnx_model(rmsjax.nnx.RMSNorm)(1)
    graph, state = flax_nnx.split(ours)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = theirs(X)
        assert not np.allclose(ours(X), want)
        restored = save_and_restore(
            tmp_path, flax_nnx.to_pure_dict(flax_nnx.state(theirs)), flax_nnx.to_pure_dict(state)
        )
        flax_nnx.replace_by_pure_dict(state, restored)
        close(flax_nnx.merge(graph, state)(X), want)


def test_checkpoint_of_flax_linen_restores(tmp_path):
    def model(norm):
        return flax_linen.Sequential([flax_linen.Dense(8), norm(), flax_linen.Dense(2)])

    theirs, ours = model(flax_linen.RMSNorm), model(rmsjax.linen.RMSNorm)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trained = jax.tree.map(lambda p: p + 0.3, theirs.init(jax.random.key(0), X))
        restored = save_and_restore(tmp_path, trained, ours.init(jax.random.key(1), X))
        close(ours.apply(restored, X), theirs.apply(trained, X))


def save_and_restore(path, saved, like):
    assert jax.tree.structure(saved) == jax.tree.structure(like)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", like)
