"""What goes wrong elsewhere, as the README says: rmsjax is right in each case, and the peer is wrong as it says.

A peer may mend a case in a later release; then its test fails, and the case leaves the README.
"""

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import lineax.internal
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import rmsjax

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(autouse=True)
def permissive():
    """Peers are not made for strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def clipped(tx, x):
    return tx.update(x, tx.init(x))[0]


OPTAX_CLIPS = {"block": optax.clip_by_block_rms, "global": optax.clip_by_global_norm}


@pytest.mark.parametrize("scope", ["block", "global"])
@pytest.mark.parametrize("x", [jnp.array([300.0], jnp.float16), jnp.array([1e30])], ids=["float16 300", "float32 1e30"])
def test_optax_clip_erases_a_finite_gradient(scope, x):
    assert clipped(OPTAX_CLIPS[scope](1.0), x) == 0
    got = clipped(rmsjax.clip_by_rms(1.0, scope), x)
    assert got == 1
    assert got.dtype == x.dtype


@pytest.mark.parametrize("scope", ["block", "global"])
def test_gradient_through_optax_clip_at_zero_is_nan(scope):
    zeros = jnp.zeros(3)
    assert jnp.isnan(jax.grad(lambda x: clipped(OPTAX_CLIPS[scope](1.0), x).sum())(zeros)).any()
    np.testing.assert_array_equal(jax.grad(lambda x: clipped(rmsjax.clip_by_rms(1.0, scope), x).sum())(zeros), 1)


@pytest.mark.parametrize("norm", [optax.tree.norm, jnp.linalg.norm])
def test_gradient_of_other_norms_at_zero_is_nan(norm):
    assert jnp.isnan(jax.grad(norm)(jnp.zeros(3))).any()
    np.testing.assert_array_equal(jax.grad(rmsjax.rms)(jnp.zeros(3)), 0)
    np.testing.assert_array_equal(jax.grad(rmsjax.tree_rms)(jnp.zeros(3)), 0)


def test_optax_block_clip_of_zeros_at_threshold_zero_is_nan():
    assert jnp.isnan(clipped(optax.clip_by_block_rms(0.0), jnp.zeros(3))).all()
    np.testing.assert_array_equal(clipped(rmsjax.clip_by_rms(0.0, "block"), jnp.zeros(3)), 0)


def test_optax_clips_change_or_refuse_bfloat16_under_an_injected_threshold():
    updates = jnp.ones(3, jnp.bfloat16)

    def injected(clip, **kwargs):
        tx = optax.inject_hyperparams(clip, hyperparam_dtype=jnp.float32)(**kwargs)
        return tx.update(updates, tx.init(updates))[0].dtype

    assert injected(optax.clip_by_block_rms, threshold=lambda count: 0.5) == jnp.float32
    with pytest.raises(TypeError):
        injected(optax.clip_by_global_norm, max_norm=lambda count: 0.5)
    assert injected(rmsjax.clip_by_rms, max_rms=lambda count: 0.5) == jnp.bfloat16


def test_optax_block_clip_under_shard_map_clips_each_shard_by_itself():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("data")
    x = jnp.array([1.0, 1.0, 3.0, 3.0])

    def under_shard_map(tx):
        return jax.jit(jax.shard_map(lambda x: clipped(tx, x), mesh=mesh, in_specs=spec, out_specs=spec))(x)

    want = x / np.sqrt(5)
    np.testing.assert_allclose(under_shard_map(optax.clip_by_block_rms(1.0)), np.ones(4))
    np.testing.assert_allclose(under_shard_map(rmsjax.clip_by_rms(1.0, "block", axis_name="data")), want, rtol=1e-6)


def test_stacked_layers_have_a_norm_each():
    layers = jnp.stack([jnp.full((4, 4), size) for size in (1.0, 10.0)])
    np.testing.assert_allclose(clipped(optax.clip_by_block_rms(1.0), layers)[0], 1 / np.sqrt(50.5), rtol=1e-6)
    got = clipped(rmsjax.clip_by_rms(1.0, (1, 2)), layers)
    np.testing.assert_allclose(got, jnp.ones((2, 4, 4)), rtol=1e-6)


def test_optax_monitor_has_no_state_that_a_scan_could_carry():
    updates = {"w": jnp.ones(3)}

    def scanned(tx):
        def step(state, _):
            return tx.update(updates, state)[1], None

        return jax.lax.scan(step, tx.init(updates), None, length=2)[0]

    with pytest.raises(TypeError):
        scanned(optax.monitor({"rms": optax.tree.norm}))
    assert scanned(rmsjax.clip_by_rms(1.0)).num_updates == 2
    assert optax.tree.get(scanned(rmsjax.record_rms("global")), "rms") == 1


def layers(epsilon=1e-6):
    """RMSNorm layers of width 4, as functions of x, by library."""
    nnx_kwargs = {"epsilon": epsilon, "rngs": nnx.Rngs(0)}
    scale = {"params": {"scale": jnp.ones(4)}}
    ours_nnx, ours_linen = rmsjax.nnx.RMSNorm(4, **nnx_kwargs), rmsjax.linen.RMSNorm(epsilon=epsilon)
    flax_linen = flax.linen.RMSNorm(epsilon=epsilon)
    ours = [ours_nnx, lambda x, mask=None: ours_linen.apply(scale, x, mask=mask)]
    flax_layers = [nnx.RMSNorm(4, **nnx_kwargs), lambda x, mask=None: flax_linen.apply(scale, x, mask=mask)]
    return ours, flax_layers, equinox.nn.RMSNorm(4, eps=epsilon)


def test_flax_gives_nan_for_a_masked_row():
    ours, flax_layers, _ = layers()
    x, mask = jnp.ones((2, 4)), jnp.array([[True] * 4, [False] * 4])
    for layer in flax_layers:
        assert jnp.isnan(layer(x, mask=mask)[1]).all()
    for layer in ours:
        np.testing.assert_array_equal(layer(x, mask=mask)[1], 0)


@pytest.mark.parametrize("factor", [1e20, 1e-20])
def test_other_layers_lose_large_and_small_inputs(factor):
    ours, flax_layers, equinox_layer = layers(epsilon=0.0)
    x = np.array([1.0, -2.0, 3.0, 4.0], np.float32)
    want = x / np.sqrt(7.5)
    for layer in (*flax_layers, equinox_layer):
        got = layer(jnp.asarray(x * factor))
        assert (got == 0).all() if factor > 1 else jnp.isinf(got).all()
    for layer in ours:
        np.testing.assert_allclose(layer(jnp.asarray(x * factor)), want, rtol=1e-6)


def test_flax_gives_nan_for_zeros_without_epsilon():
    ours, flax_layers, _ = layers(epsilon=0.0)
    for layer in flax_layers:
        assert jnp.isnan(layer(jnp.zeros(4))).all()
    for layer in ours:
        np.testing.assert_array_equal(layer(jnp.zeros(4)), 0)


def test_flax_says_only_that_it_cannot_reshape():
    with pytest.raises(TypeError, match="cannot reshape"):
        nnx.RMSNorm(4, rngs=nnx.Rngs(0))(jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r"num_features is 4, but axis 1 of x with shape \(2, 5\) has size 5"):
        rmsjax.nnx.RMSNorm(4, rngs=nnx.Rngs(0))(jnp.ones((2, 5)))


@pytest.mark.parametrize(("value", "dtype"), [(300.0, jnp.float16), (1e20, jnp.float32)])
def test_lineax_overflows(value, dtype):
    x = jnp.full(4, value, dtype)
    assert lineax.internal.rms_norm(x) == jnp.inf
    np.testing.assert_array_equal(jax.grad(lineax.internal.rms_norm)(x), 0)
    np.testing.assert_allclose(rmsjax.rms(x), value, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(rmsjax.rms)(x), 0.25, rtol=1e-3)
