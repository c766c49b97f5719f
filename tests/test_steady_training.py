"""What keeps training steady: the clip in L2 units, the clip by history, and parameters that keep their norm.

That they compose as all transformations do is in tests/test_transforms.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import rmsjax
from tests.helpers import hyperball
from tests.helpers.marks import slow
from tests.helpers.optax_suite import GRADS, PARAMS, SIZES, at

pytestmark = pytest.mark.usefixtures("quick_compiles")


def close(got, expected, rtol=1e-6):
    jax.tree.map(lambda g, e: np.testing.assert_allclose(np.asarray(g), np.asarray(e), rtol, 1e-12), got, expected)


def root_mean_square(x, axis=None):
    return np.sqrt(np.mean(np.float64(np.asarray(x, np.float64)) ** 2, axis))


def l2(tree):
    return np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(tree)))


def stepped(tx, *grads, params=None):
    """The updates and the states of some steps."""
    state, history = tx.init(grads[0] if params is None else params), []
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        history.append((updates, state))
    return history


# --------------------------------------------------------------------------------------------------------- global norm


TO_A_GLOBAL_NORM = [  # the latter in its warm-up
    rmsjax.clip_by_global_norm,
    lambda bound, **kwargs: rmsjax.clip_by_history(warmup_max_norm=bound, **kwargs),
]


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 4.0, 1e3])
def test_global_norm_is_that_of_optax(max_norm):
    for step in range(len(SIZES)):
        grads = at(GRADS, step)
        theirs, _ = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
        ((ours, state),) = stepped(rmsjax.clip_by_global_norm(max_norm), grads)
        close(ours, theirs)
        close(state.rms, rmsjax.tree_rms(grads))
        assert int(state.num_clipped) == (l2(grads) > max_norm)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float16", 300.0), ("float32", 3e38), ("float32", 1e30), ("float32", 1e-30), ("bfloat16", 1e30)],
)
@pytest.mark.parametrize("make", TO_A_GLOBAL_NORM)
def test_global_norm_of_any_size(make, dtype, value):
    grads = {"a": jnp.full(8, value, dtype), "b": jnp.full((4, 2), value, dtype)}
    ((updates, _),) = stepped(make(value), grads)
    assert {u.dtype for u in updates.values()} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(l2(updates) / value, 1, rtol=1e-2)


@pytest.mark.parametrize("make", TO_A_GLOBAL_NORM)
@pytest.mark.parametrize("tree", [{}, {"a": jnp.zeros((0, 3))}, {"a": jnp.zeros(3)}])
def test_global_norm_of_nothing(make, tree):
    for max_norm in (0.0, 1.0):
        ((updates, state),) = stepped(make(max_norm), tree)
        close(updates, tree)
        assert not any(map(np.any, jax.tree.leaves((state.rms, state.num_clipped))))


@pytest.mark.parametrize("make", TO_A_GLOBAL_NORM)
def test_all_elements_count_once_however_they_are_laid_out(make):
    """Those that are split over devices, and those of which each has a copy."""
    layouts = {"split": P(None, "a"), "whole": P()}
    grads = {"split": jnp.arange(8.0).reshape(2, 4), "whole": jnp.arange(3.0)}
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tx = make(0.5, axis_name=("a", "b"))
    clip = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[0], mesh=mesh, in_specs=(layouts,), out_specs=layouts, check_vma=True
    )
    close(jax.jit(clip)(grads), jax.tree.map(lambda g: g * 0.5 / l2(grads), grads))


# ------------------------------------------------------------------------------------------------------------- history


def by_the_paper(grads, factor, decay, warmup_steps, max_norm):
    """Algorithm 1 of arXiv 2502.11034 up to the optimizer: (clipped gradients, histories) in NumPy."""
    history = dict.fromkeys(grads[0], np.inf)
    for step, given in enumerate(grads):
        norms = {name: root_mean_square(g) for name, g in given.items()}
        if step < warmup_steps:
            share = min(1, max_norm / l2(given))
            clipped = {name: g * share for name, g in given.items()}
            history = {name: min(history[name], norms[name] * share) for name in given}
        else:
            clipped = {name: g * min(1, factor * history[name] / norms[name]) for name, g in given.items()}
            history = {
                name: decay * history[name] + (1 - decay) * min(norms[name], factor * history[name]) for name in given
            }
        yield clipped, history


SPIKES = (1.0, 3.0, 0.5, 2.0, 0.6, 1e4, 0.7, 1.5, 0.1, 1e30, 0.6)


def noisy(sizes, shapes=(("a", (3, 4)), ("b", (5,)))):
    rng = np.random.default_rng(3)
    return [{name: np.float32(size * rng.normal(size=shape)) for name, shape in shapes} for size in sizes]


@pytest.mark.parametrize("max_norm", [2.0, None])
def test_history_is_that_of_the_paper(max_norm):
    grads = noisy(SPIKES)
    expected = by_the_paper(grads, 1.5, 0.75, 4, np.inf if max_norm is None else max_norm)
    tx = rmsjax.clip_by_history(1.5, decay=0.75, warmup_steps=4, warmup_max_norm=max_norm)
    for (updates, state), (clipped, history) in zip(stepped(tx, *grads), expected, strict=True):
        close(updates, clipped, rtol=1e-5)
        close(state.ema_rms, history, rtol=1e-5)
    early = {"a": 4 if max_norm else 0, "b": 4 if max_norm else 0}
    assert all(state.num_clipped[name] >= early[name] + 2 for name in "ab")


def test_global_history_is_that_of_the_leaves_in_one():
    grads = noisy(SPIKES)
    joined = [{"all": np.concatenate([np.ravel(g) for g in grad.values()])} for grad in grads]
    tx = partial(rmsjax.clip_by_history, 1.5, decay=0.75, warmup_steps=4)
    for (updates, state), (one, of_one) in zip(stepped(tx("global"), *grads), stepped(tx(), *joined), strict=True):
        close(np.concatenate([np.ravel(u) for u in updates.values()]), one["all"], rtol=1e-5)
        close(state.ema_rms, of_one.ema_rms["all"], rtol=1e-5)
        assert state.num_clipped == of_one.num_clipped["all"]


@pytest.mark.parametrize("scope", ["global", "block", slow(-1)])
@pytest.mark.parametrize("spike", [slow(1e4), 1e30, -jnp.inf, jnp.nan])
def test_a_spike_enters_no_history(spike, scope):
    """One in the warm-up, and one after it, which is then as an update at the bound, or, not finite, as none."""
    usual = {"w": jnp.ones((2, 4)), "b": jnp.ones(4)}
    spiked = {"w": jnp.ones((2, 4)).at[:, 1].set(spike), "b": jnp.full(4, spike)}
    is_finite = bool(jnp.isfinite(spike))
    tx = rmsjax.clip_by_history(1.25, scope, decay=0.5, warmup_steps=3, warmup_max_norm=None)
    history = stepped(tx, usual, spiked, usual, spiked, usual)
    moved = {True: [1, 1, 1, 1.125, 1.0625], False: [1, 1, 1, 1, 1]}[is_finite]
    for (_, state), expected in zip(history, moved, strict=True):
        for norm in jax.tree.leaves(state.ema_rms):
            np.testing.assert_allclose(norm, np.full(norm.shape, expected), rtol=1e-6)
    (updates, state), last = history[3], history[4][1]
    assert all(jnp.isfinite(u).all() == is_finite for u in jax.tree.leaves(updates))
    assert int(last.num_nonfinite) == (0 if is_finite else 2)
    for clipped in jax.tree.leaves(last.num_clipped):  # the first spike is in a warm-up without a bound
        assert int(clipped.max()) == is_finite
    if is_finite:
        close(rmsjax.tree_rms(updates, scope), jax.tree.map(lambda r: jnp.full_like(r, 1.25), state.rms))


def test_what_is_not_finite_is_skipped_by_optax():
    """State and parameters then stay as they were, and the next step is as if nothing had been."""
    tx = optax.apply_if_finite(rmsjax.clip_by_history(warmup_steps=1), max_consecutive_errors=9)
    usual, broken = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, jnp.nan, 1.0])}
    (_, before), (skipped, after), (updates, _) = stepped(tx, usual, broken, usual)
    close(after.inner_state, before.inner_state)
    assert not skipped["w"].any()
    assert after.total_notfinite == 1
    np.testing.assert_allclose(updates["w"], np.full(3, 1 / np.sqrt(3)) * 1.05, rtol=1e-6)


def test_a_leaf_without_gradients_keeps_its_history_or_starts_late():
    tx = rmsjax.clip_by_history(1.5, decay=0.5, warmup_steps=1, warmup_max_norm=None)
    sizes = [(1, 0), (0, 0), (0, 2), (2, 8)]
    history = stepped(tx, *({"early": jnp.full(3, float(a)), "late": jnp.full(3, float(b))} for a, b in sizes))
    assert [float(s.ema_rms["early"]) for _, s in history] == [1, 1, 1, 1.25]
    assert [float(s.ema_rms["late"]) for _, s in history] == [0, 0, 2, 2.5]
    assert [float(u["late"][0]) for u, _ in history] == [0, 0, 2, 3]


def test_norms_that_grow_for_good_are_followed():
    """By (1 - decay) (factor - 1) a step."""
    tx = rmsjax.clip_by_history(1.5, decay=0.75, warmup_steps=1, warmup_max_norm=None)
    norms = [float(state.ema_rms) for _, state in stepped(tx, jnp.ones(2), *[jnp.full(2, 100.0)] * 50)]
    np.testing.assert_allclose(norms[30], 1.125**30, rtol=1e-5)
    np.testing.assert_allclose(norms[-1], 100, rtol=0.02)


def test_no_warmup_starts_with_the_first_update():
    (first, _), (second, _) = stepped(rmsjax.clip_by_history(2.0, warmup_steps=0), jnp.full(4, 0.25), jnp.ones(4))
    assert (first.tolist(), second.tolist()) == ([0.25] * 4, [0.5] * 4)


def test_all_numbers_may_be_schedules():
    grads, numbers = noisy(SPIKES), {"factor": 1.5, "decay": 0.75, "warmup_steps": 4, "warmup_max_norm": 2.0}
    inject = optax.inject_hyperparams(rmsjax.clip_by_history, hyperparam_dtype=jnp.float32)
    tx = inject(**{name: lambda step, number=number: number for name, number in numbers.items()})
    tx = tx._replace(update=jax.jit(tx.update))
    for got, expected in zip(stepped(tx, *grads), stepped(rmsjax.clip_by_history(**numbers), *grads), strict=True):
        close((got[0], got[1].inner_state), expected, rtol=1e-5)


def test_report_of_a_history():
    tx = rmsjax.clip_by_history(1.5, decay=0.5, warmup_steps=1, warmup_max_norm=None)
    *_, (_, state) = stepped(tx, *({"w": jnp.full(3, size)} for size in (1.0, 9.0, 1.0, 1.0)))
    assert repr(rmsjax.rms_report(state)).splitlines() == [
        "path        rms  clipped",
        "rms/w         1    25.0%",
        "ema_rms/w  1.06",
    ]


# ----------------------------------------------------------------------------------------------------------- hyperball


def everything(params):
    return jax.tree.map(lambda _: True, params)


def walk(dtype, steps, learning_rate, **kwargs):
    """From the first parameters to those after each of many steps along random gradients."""
    tx = rmsjax.hyperball(optax.sgd(1.0, momentum=0.9), learning_rate, everything, **kwargs)

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.random.normal(key, params.shape, dtype), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys)[1])


def ulps_off(params, start, axis):
    """By how many units in the last place of the first norm the others are off it; both in float64."""
    norm = root_mean_square(start, axis)
    return np.abs(root_mean_square(params, axis) - norm) / np.spacing(np.float32(norm))


@pytest.mark.parametrize("form", ["cpu", "cuda", "tpu"], indirect=True)
def test_no_drift(form):
    """Over 10^5 steps in float32."""
    steps = 100_000 if form == "cpu" else 1_000
    start = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    assert ulps_off(walk(jnp.float32, steps, 0.02)(start), start, (-2, -1)).max() <= 2


@pytest.mark.parametrize(
    ("shape", "scope", "axis"),
    [((2, 2), "block", (-2, -1)), ((9,), "global", -1), ((2, 8, 8), (1, 2), (-2, -1)), ((40, 50), "block", (-2, -1))],
)
@pytest.mark.parametrize("learning_rate", [1e-4, 0.1])
def test_norms_stay_to_two_ulps(shape, scope, axis, learning_rate):
    steps = walk(jnp.float32, 200, learning_rate, scope=scope)
    for size in (1e-3, 1.0, 30.0):
        start = jnp.asarray(size * np.random.default_rng(1).normal(size=shape), jnp.float32)
        assert ulps_off(steps(start), start, axis).max() <= 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("learning_rate", [1e-3, 0.1])
def test_in_16_bits_norms_stay_to_half_a_ulp_of_an_element(dtype, learning_rate):
    """That is what to round each once costs at most; over many elements it averages out."""
    steps = walk(dtype, 1_000, learning_rate)
    for shape, share in (((4, 4), 1), ((32, 32), 0.5)):
        start = jnp.asarray(np.random.default_rng(2).normal(size=shape), dtype)
        norms = root_mean_square(steps(start), (-2, -1))
        off = np.abs(norms / root_mean_square(start) - 1)
        assert off.max() <= share * float(jnp.finfo(dtype).eps) / 2
        assert off[-100:].mean() <= 2 * off[:200].mean() + 1e-4  # no drift


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_16_bits_each_element_is_rounded_once(dtype):
    """Twice, where it has changed its sign, or by more than a factor of 2."""
    rng = np.random.default_rng(3)
    narrow = [jnp.asarray(rng.normal(size=(16, 16)), dtype) for _ in range(2)]
    start, got, exact = map(np.float32, (narrow[0], moved(*narrow, 0.5), moved(*map(jnp.float32, narrow), 0.5)))
    once = np.float32(jnp.asarray(exact).astype(dtype))
    is_near = (once / start >= 0.5) & (once / start <= 2)
    assert 20 < is_near.sum() < 236
    np.testing.assert_array_equal(got[is_near], once[is_near])
    ulps = np.spacing(np.maximum(np.abs(once), np.abs(once - start))) * 2.0**23 * float(jnp.finfo(dtype).eps)
    assert (np.abs(got - once) <= ulps).all()


@pytest.mark.parametrize("learning_rate", [0.3, 1.0, 10.0])
def test_norms_after_large_steps(learning_rate):
    for seed in range(5):
        params, grads = jnp.float32(np.random.default_rng(seed).normal(size=(2, 3, 4)))
        assert ulps_off(moved(params, grads, learning_rate), params, (0, 1)) <= 16


def moved(params, grads, learning_rate):
    tx = rmsjax.hyperball(optax.sgd(1.0), learning_rate)
    return optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])


def by_layer(path, leaf):
    return (1, 2) if leaf.ndim == 3 else "block"


def test_adam_in_hyperball_is_adamh():
    """Of Marin's Levanter, which recorded where it went; there norms are measured anew at each step."""
    adam = optax.adam(1.0, hyperball.B1, hyperball.B2, hyperball.EPS)
    with jax.numpy_dtype_promotion("standard"):
        got = hyperball.trajectory(rmsjax.hyperball(adam, hyperball.LEARNING_RATE, scope=by_layer))
    with np.load(hyperball.FIXTURE) as expected:
        for name, values in got.items():
            np.testing.assert_allclose(values[hyperball.RECORDED], expected[name], rtol=1e-4, atol=1e-5)


INNER = {
    "sgd": optax.sgd(0.3, momentum=0.9),
    "adamw": optax.adamw(optax.linear_schedule(1.0, 0.1, 3)),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-2),
    "muon": optax.contrib.muon(1e-2),
    "stable_adamw": rmsjax.stable_adamw(1e-3),
    "clipped": optax.chain(rmsjax.clip_by_history(), optax.adam(1e-3)),
    "several": optax.MultiSteps(optax.sgd(0.1), 1).gradient_transformation(),
}


@pytest.mark.parametrize("name", INNER)
def test_any_optimizer_gives_the_direction(name):
    """Matrices keep their norm, each step is of the size asked for, and the rest moves as without the wrapper."""
    params = {"matrix": PARAMS["stack"][0], "scale": PARAMS["dense"]["scale"]}
    grads = [{"matrix": at(GRADS, k)["stack"][0], "scale": at(GRADS, k)["dense"]["scale"]} for k in range(3)]
    tx, plain = rmsjax.hyperball(INNER[name], 0.1), INNER[name]
    state, of_plain = tx.init(params), plain.init(params)
    norm = root_mean_square(params["matrix"])
    with jax.numpy_dtype_promotion("standard"):
        for grad in grads:
            inner, of_plain = plain.update(grad, of_plain, params)
            updates, state = tx.update(grad, state, params)
            close(updates["scale"], inner["scale"])
            moved = np.float64(params["matrix"])
            moved += 0.1 * norm * np.float64(inner["matrix"]) / root_mean_square(inner["matrix"])
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params["matrix"], moved * norm / root_mean_square(moved), rtol=1e-4, atol=1e-5)
    *_, held = rmsjax.rms_states(state).values()
    close(held.param_rms["matrix"], norm)
    close(held.rms["matrix"], root_mean_square(inner["matrix"]), rtol=1e-5)


@pytest.mark.parametrize("mask", [{"a": True, "b": False}, lambda params: {"a": True, "b": False}])
def test_a_mask_chooses_what_is_held(mask):
    params = {"a": jnp.full(4, 2.0), "b": jnp.full((2, 2), 2.0)}
    grads = {"a": jnp.arange(4.0), "b": jnp.ones((2, 2))}
    ((updates, state),) = stepped(rmsjax.hyperball(optax.sgd(0.5), 0.1, mask), grads, params=params)
    np.testing.assert_array_equal(updates["b"], -0.5 * grads["b"])
    np.testing.assert_allclose(root_mean_square(params["a"] + updates["a"]), 2, rtol=2e-7)
    assert list(rmsjax.rms_by_path(rmsjax.rms_states(state)["1/inner_state"].param_rms)) == ["a"]


def test_what_starts_at_zero_moves_as_the_inner_optimizer_says():
    """As the second factor of LoRA. It goes on to do so, since it has no norm to come back to."""
    params = {"zero": jnp.zeros((2, 3)), "some": jnp.ones((2, 3))}
    tx = rmsjax.hyperball(optax.sgd(0.5), 0.1)
    state = tx.init(params)
    for k in (1, 2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["zero"], np.full((2, 3), -0.5 * k))
    np.testing.assert_allclose(root_mean_square(params["some"]), 1, rtol=2e-7)


def test_a_schedule_sets_the_size_of_steps():
    rng = np.random.default_rng(5)
    start, grad = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    tx = rmsjax.hyperball(optax.sgd(1.0), lambda step: 0.1 / (1 + step.astype(jnp.float32)))
    params, state = start, tx.init(start)
    for step in range(3):
        moved = params / rmsjax.rms(start) - 0.1 / (step + 1) * grad / rmsjax.rms(grad)
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        close(params, moved * (rmsjax.rms(start) / rmsjax.rms(moved)), rtol=1e-5)


def test_no_step_where_there_is_no_direction_or_no_size():
    params = jnp.asarray(np.random.default_rng(5).normal(size=(3, 4)), jnp.float32)
    for rate, grad in ((0.0, jnp.ones((3, 4))), (0.1, jnp.zeros((3, 4)))):
        ((updates, _),) = stepped(rmsjax.hyperball(optax.sgd(1.0), rate), grad, params=params)
        np.testing.assert_allclose(updates, np.zeros((3, 4)), atol=5e-7)
    opposite = rmsjax.hyperball(optax.sgd(1.0), 1.0)
    ((updates, _),) = stepped(opposite, params, params=params)
    assert jnp.isfinite(updates).all()


@pytest.mark.parametrize("form", ["cpu", "cuda", "tpu"], indirect=True)
def test_parameters_and_updates_of_any_size(form):
    """Up to where twice a parameter overflows, or the step is a subnormal number."""
    signs = np.where(np.random.default_rng(5).normal(size=(3, 4)) > 0, 1, -1)
    of_one = {"alike": np.ones((3, 4)), "signed": signs * np.linspace(0.7, 1, 12).reshape(3, 4)}
    grads = {name: jnp.asarray(-0.3 * np.roll(w, 1, 1) - 0.05 * signs, jnp.float32) for name, w in of_one.items()}
    tx = rmsjax.hyperball(optax.sgd(1.0), 0.1)
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    for size in (1e-34, 1e-20, 1.0, 1e38, 1.6e38, 1.8e38, 3e38):
        for of_updates in (1e-30, 1.0, 1e38):
            params = {name: jnp.asarray(size * w, jnp.float32) for name, w in of_one.items()}
            state = init(params)
            (held,) = rmsjax.rms_states(state).values()
            updates, _ = update(jax.tree.map(lambda g, by=of_updates: g * by, grads), state, params)
            for name, start in params.items():
                np.testing.assert_allclose(held.param_rms[name], root_mean_square(start), rtol=1e-7)
                assert ulps_off(start + updates[name], start, (0, 1)) <= 2
                assert root_mean_square(updates[name]) > 1e-3 * size


@pytest.mark.slow
@pytest.mark.parametrize("make", [rmsjax.clip_by_relative_rms, partial(rmsjax.hyperball, optax.scale(-1.0))])
def test_parameters_of_several_dtypes_beside_updates_of_one(make, x64):
    """Leaves of one type are measured together, and those of params need not be alike where those of updates are."""
    dtypes = {"a": "float32", "b": "bfloat16", "c": "float64", "d": "float32"}
    params = {name: jnp.full((2, 2), 3.0, dtype) for name, dtype in dtypes.items()}
    grads = {name: jnp.arange(4.0, dtype="float32").reshape(2, 2) for name in dtypes}
    tx = make(0.1)
    ((together, _),) = stepped(tx, grads, params=params)
    for name in dtypes:
        ((alone, _),) = stepped(tx, {name: grads[name]}, params={name: params[name]})
        np.testing.assert_array_equal(together[name], alone[name])


@pytest.mark.parametrize("steps", [2, 2.0, np.int64(2), jnp.float32(2), 2**31 - 1])
def test_a_warmup_is_so_many_steps_long(steps):
    tx = rmsjax.clip_by_history(1.5, warmup_steps=steps, warmup_max_norm=None)
    *_, (updates, _) = stepped(tx, *(jnp.full(2, size) for size in (1.0, 8.0, 8.0)))
    np.testing.assert_allclose(updates, np.full(2, 1.5 if steps == 2 else 8.0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rmsjax.clip_by_global_norm(-1.0), ValueError, "clip_by_global_norm: max_norm must be at least 0"),
        (lambda: rmsjax.clip_by_global_norm(None), TypeError, "clip_by_global_norm: max_norm must be a number"),
        (lambda: rmsjax.clip_by_history(0.9), ValueError, "clip_by_history: factor must be at least 1, .*got 0.9"),
        (lambda: rmsjax.clip_by_history(decay=1.0), ValueError, "clip_by_history: decay must be below 1, got 1.0"),
        (lambda: rmsjax.clip_by_history(warmup_steps=-1), ValueError, "warmup_steps must be at least 0, got -1"),
        *(
            (
                lambda n=n: rmsjax.clip_by_history(warmup_steps=n),
                ValueError,
                f"warmup_steps must be a whole .* got {got}",
            )
            for n, got in ((2.5, 2.5), (2**31, 2**31), (jnp.float32(3e9), 3e9), (float("inf"), "inf"))
        ),
        (lambda: rmsjax.clip_by_history(warmup_max_norm="1"), TypeError, "warmup_max_norm must be a number, got '1'"),
        (lambda: rmsjax.hyperball(optax.adam, 0.1), TypeError, "hyperball: inner must be an optax optimizer, got the "),
        (
            lambda: rmsjax.hyperball(optax.MultiSteps(optax.adam(1e-3), 2), 0.1),
            TypeError,
            r"hyperball: inner must be an optax optimizer, got a MultiSteps; pass its gradient_transformation\(\)",
        ),
        (lambda: rmsjax.hyperball(optax.adam(1e-3), -0.1), ValueError, "learning_rate must be at least 0, got -0.1"),
        (lambda: rmsjax.hyperball(optax.adam(1e-3), "1"), TypeError, "learning_rate must be a number, got '1'"),
        (lambda: rmsjax.hyperball(optax.adam(1e-3), 0.1, scope="blok"), ValueError, "did you mean 'block'"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
