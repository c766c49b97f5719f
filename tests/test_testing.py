"""`assert_transform_invariant` passes what is right and catches what is broken, each under the right name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap

from rmsjax import testing
from rmsjax.testing import TRANSFORMS, TransformationError, assert_transform_invariant
from tests.helpers.marks import quick_of, slow

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = jnp.array([[1.0, -2.0, 0.5, 3.0], [0.25, 4.0, -1.0, 2.0]])

FIRST = {"grad", "value_and_grad", "jvp", "vjp", "linearize", "jacfwd", "jacrev"}
SECOND = {"hessian_fwd_over_rev", "hessian_rev_over_rev"}
MODES = {"strict_dtype_promotion", "rank_promotion_raise", "debug_nans", "checking_leaks"}


# --------------------------------------------------------------------------------------------------- what is right


@pytest.mark.slow
def test_a_right_function_passes_under_everything():
    def f(tree, n, flag):
        z = tree["z"] * lax.complex(tree["a"], jnp.zeros_like(tree["a"]))
        return {"complex": z, "narrow": jnp.tanh(tree["b"]), "none": None}, [
            n + 1,
            ~flag,
            jnp.where(flag, tree["a"], 0),
        ]

    tree = {"a": X, "b": jnp.array([0.5, -1.5], jnp.bfloat16), "z": lax.complex(X, X * X)}
    assert assert_transform_invariant(f, tree, jnp.arange(3), jnp.array(True)) == {}


def test_a_function_of_a_key_passes():
    assert (
        assert_transform_invariant(
            lambda key, x: (jax.random.split(key), x * jax.random.uniform(key, x.shape)),
            *(jax.random.key(1), X),
            transforms=["vmap", "scan", "grad", "checking_leaks"],
        )
        == {}
    )


def test_nothing_to_differentiate_is_said_with_the_reason():
    derivatives = sorted([*FIRST, "hessian_fwd_over_rev"])
    reasons = assert_transform_invariant(lambda n: n * 2.5, jnp.array(3), transforms=[*derivatives, "jit"])
    assert reasons == dict.fromkeys(derivatives, "no derivative: no argument is floating or complex")
    reasons = assert_transform_invariant(jnp.argmax, X, transforms=["grad", "scan", "while_loop", "export"])
    assert reasons == {"grad": "no derivative: no output is floating or complex"}


def test_missing_packages_are_said_with_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reasons = assert_transform_invariant(jnp.sin, X, transforms=["nnx_jit", "nnx_grad", "export", "aot"])
    assert reasons == {
        "nnx_jit": "flax is not installed",
        "nnx_grad": "flax is not installed",
        "export": "flatbuffers, which jax.export needs to serialize, is not installed",
    }


def test_a_value_with_a_nan_is_compared_but_not_debugged():
    reasons = assert_transform_invariant(jnp.log, -X, transforms=["jit", "vmap", "debug_nans"])
    assert reasons == {"debug_nans": "the value itself has a NaN"}


def test_one_device_is_enough(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    assert assert_transform_invariant(jnp.sin, X, transforms=["shard_map", "named_sharding"]) == {}


def test_zeros_infinities_and_no_elements_are_legal():
    x = jnp.array([0.0, -0.0, jnp.inf, 2.0])
    transforms = ["jit", "vmap", "jvp", "grad", "named_sharding"]
    assert assert_transform_invariant(lambda x, y: (x * 2, y), x, jnp.zeros((0, 2)), transforms=transforms) == {}


def test_float64_under_x64(x64):
    x = jnp.linspace(1.0, 2.0, 3)
    assert x.dtype == np.float64
    assert assert_transform_invariant(jnp.tanh, x, transforms=["jvp", "grad", *SECOND, "enable_x64"]) == {}
    with pytest.raises(TransformationError, match="derivative of output"):
        assert_transform_invariant(scaled_rule(1 + 1e-4), x, transforms=["jvp"])


def test_straight_through_needs_no_slope():
    def round_straight_through(x):
        return x + lax.stop_gradient(jnp.round(x) - x)

    derivatives = [*sorted(FIRST | SECOND), "while_loop", "scan"]
    assert assert_transform_invariant(round_straight_through, X, transforms=derivatives, finite_differences=False) == {}
    failed = failures(round_straight_through, X, transforms=["jvp", "grad"])
    assert failed == {"jvp", "grad"}


# ------------------------------------------------------------------------------------------------------ what is broken


def failures(fn, *args, transforms=TRANSFORMS):
    with pytest.raises(TransformationError, match="assert_transform_invariant") as caught:
        assert_transform_invariant(fn, *args, transforms=transforms)
    return set(caught.value.failures)


def scaled_rule(factor):
    """sin, with a derivative that is off by a factor."""

    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda xs, dxs: (f(*xs), factor * jnp.cos(*xs) * dxs[0]))
    return f


def test_custom_vjp_forbids_forward_mode():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * jnp.cos(x),))
    forward = {"jvp", "linearize", "jacfwd", "hessian_fwd_over_rev"}
    assert failures(f, X) == forward
    with pytest.raises(
        TransformationError, match=r"(?s)f fails under 1 of 1.*jvp: TypeError: can't apply forward-mode"
    ):
        assert_transform_invariant(f, X, transforms=["jvp"])


def test_numpy_on_a_tracer():
    assert failures(lambda x: jnp.asarray(np.square(x)), X) >= {
        "jit",
        "vmap",
        "grad",
        "scan",
        "shard_map",
        "make_jaxpr",
    }
    with pytest.raises(TransformationError, match="aot: TracerArrayConversionError"):
        assert_transform_invariant(np.square, X, transforms=["aot"])


def test_branch_on_a_value():
    with pytest.raises(TransformationError, match="scan: TracerBoolConversionError"):
        assert_transform_invariant(lambda x: x if x[0, 0] > 0 else -x, X, transforms=["scan"])


def batching_rule(rule):
    """x + y, where a vmap over x follows the rule; differentiable."""

    @custom_vmap
    def add(x, y):
        return x + y

    add.def_vmap(rule)
    f = jax.custom_jvp(add)
    f.defjvp(lambda xs, dxs: (f(*xs), dxs[0] + dxs[1]))
    return f


def test_batch_dependent_under_vmap():
    f = batching_rule(lambda axis_size, in_batched, x, y: (x - jnp.mean(x) + y, True))
    assert failures(f, X, X, transforms=["jit", "vmap", "nested_vmap", "scan", "shard_map"]) == {"vmap", "nested_vmap"}
    said = pytest.raises(TransformationError, match=r"with in_axes=-1 and out_axes=-1: output is off by .*at index \(")
    with said, jax.numpy_rank_promotion("allow"):
        assert_transform_invariant(f, X, X, transforms=["vmap"])


def test_first_example_for_all_under_vmap():
    f = batching_rule(lambda axis_size, in_batched, x, y: (jnp.broadcast_to((x + y)[:1], x.shape), True))
    assert failures(f, X, X, transforms=["jit", "vmap", "nested_vmap"]) == {"vmap", "nested_vmap"}


def times(rule):
    """x with the numbers that are made of y added, where a vmap follows the rule; differentiable in x."""

    @custom_vmap
    def f(x, y):
        return x + numbers_of(y)

    f.def_vmap(rule)
    derivative = jax.custom_jvp(f)
    derivative.defjvp(lambda xs, dxs: (derivative(*xs), dxs[0]))
    return derivative


def numbers_of(y):
    if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
        return jax.random.uniform(y)
    return jnp.sum(y).astype(jnp.float32)


NO_FLOATS = {
    "integer": jnp.int32(3),
    "one": jnp.uint8(1),
    "zero": jnp.int32(0),
    "integers": jnp.arange(4),
    "boolean": jnp.asarray(True),
    "mask": jnp.array([True, False, True]),
    "key": jax.random.key(0),
    "old key": jax.random.PRNGKey(0),
}


@pytest.mark.parametrize("kind", quick_of(NO_FLOATS, "integer", "mask", "key"))
def test_number_of_the_first_example_for_all(kind):
    """Examples differ in whatever they are made of, or else this would pass."""

    def first_for_all(axis_size, in_batched, x, y):
        y = y[0] if in_batched[1] else y
        return x + numbers_of(y), in_batched[0]

    def right(axis_size, in_batched, x, y):
        numbers = jax.vmap(numbers_of)(y) if in_batched[1] else numbers_of(y)
        x = x if in_batched[0] else jnp.broadcast_to(x, (axis_size, *x.shape))
        return x + numbers.reshape(-1, *[1] * (x.ndim - 1)), True

    y = NO_FLOATS[kind]
    assert failures(times(first_for_all), X, y, transforms=["jit", "vmap", "nested_vmap"]) == {"vmap", "nested_vmap"}
    assert_transform_invariant(times(right), X, y, transforms=["jit", "vmap", "nested_vmap", "scan", "shard_map"])


@pytest.mark.parametrize("wrong", [(0,), (1,), (2,)])
def test_wrong_for_one_argument_batched_alone(wrong):
    @custom_vmap
    def add(x, y, z):
        return x + y + z

    @add.def_vmap
    def _(axis_size, in_batched, x, y, z):
        batched = [i for i, yes in enumerate(in_batched) if yes]
        return x + y + z + float(tuple(batched) == wrong), True

    names = ["argument 0", "argument 1['y']", "argument 1['z']"]
    with pytest.raises(TransformationError) as caught, jax.numpy_rank_promotion("allow"):
        assert_transform_invariant(lambda x, t: add(x, t["y"], t["z"]), X, {"y": X, "z": X}, transforms=["vmap"])
    assert caught.value.failures["vmap"].startswith(f"over {names[wrong[0]]} alone: output is off by 1")


STEEP = {
    "sine": (jnp.sin, [10.0, -7.0]),
    "tanh": (jnp.tanh, [4.0, -7.0]),
    "softmax": (jax.nn.softmax, [10.0, -30.0, 3.0]),
    "clip": (lambda x: jnp.clip(x, -1, 1), [0.95, 2.0]),
    "relu": (jax.nn.relu, [1.0, 1e-3, -1e-3]),
    "exponential": (lambda x: jnp.exp(10 * x), [1.0, -0.5, 0.3]),
    "logarithm": (jnp.log, [1.01, 1e-3, 100.0]),
    "root": (jnp.sqrt, [1e-6, 1.0, 1e6]),
    "sigmoid": (jax.nn.sigmoid, [20.0, -3.0]),
    "logsumexp": (jax.nn.logsumexp, [50.0, 49.0, -10.0]),
    "power": (lambda x: x**9, [1.0, -2.0, 0.5]),
    "near the end": (jnp.arcsin, [0.97, -0.5]),
}


@pytest.mark.parametrize("dtype", [slow(jnp.float32), jnp.bfloat16, slow("float32 within")])
@pytest.mark.parametrize("name", quick_of(STEEP, "clip", "softmax", "root", "near the end"))
def test_right_functions_that_are_steep_or_near_a_kink(name, dtype):
    """Differences over some percent of an element say nothing of these."""
    f, x = STEEP[name]
    g = (lambda x: f(x.astype(jnp.float32)).astype(x.dtype)) if dtype == "float32 within" else f
    x = jnp.array(x, jnp.float32 if dtype == "float32 within" else dtype)
    some = sorted(FIRST | SECOND | {"enable_x64", "vmap"})
    if dtype == jnp.bfloat16:  # its own rounding of a second derivative is no matter here
        some = sorted(FIRST)
    assert_transform_invariant(g, x, transforms=some)


@pytest.mark.parametrize("name", quick_of(STEEP, "sine", "softmax", "logarithm"))
def test_a_thousandth_of_the_derivative_is_seen(name):
    """Where the derivative is not lost beside the value."""
    f, x = STEEP[name]

    @jax.custom_jvp
    def wrong(x):
        return f(x)

    wrong.defjvp(lambda xs, dxs: (wrong(*xs), 1.001 * jax.jvp(f, xs, dxs)[1]))
    lost = name in ("tanh", "sigmoid", "softmax")  # where these are flat
    assert failures(wrong, jnp.array(x) / (8 if lost else 1), transforms=["grad", "jvp"]) == {"grad", "jvp"}


def test_unmapped_argument_that_a_batching_rule_takes_for_mapped():
    f = batching_rule(lambda axis_size, in_batched, x, y: (x + y.reshape(x.shape), True))
    with pytest.raises(TransformationError, match="vmap: over argument 0 alone: TypeError: cannot reshape"):
        assert_transform_invariant(f, X, X, transforms=["vmap"])


@pytest.mark.parametrize("factor", [1.01, 0.0, -1.0, np.nan])
def test_wrong_derivative(factor):
    some = ["jit", "grad", "value_and_grad", "jvp", "vjp", "jacrev", "scan"]
    assert failures(scaled_rule(factor), X, transforms=some) >= {"grad", "value_and_grad", "jvp", "vjp", "jacrev"}


def test_wrong_derivative_in_reverse_mode_only():
    @jax.custom_vjp
    def sine(x, y):
        return jnp.sin(x), jnp.sin(y)

    sine.defvjp(lambda x, y: (sine(x, y), (x, y)), lambda xy, cts: (cts[0] * jnp.cos(xy[0]), cts[1] * jnp.sin(xy[1])))
    with pytest.raises(TransformationError, match=r"gradient with respect to argument 0\['wrong'\], along a random"):
        assert_transform_invariant(
            lambda t: sine(t["right"], t["wrong"]), {"right": X, "wrong": X}, transforms=["grad"]
        )


def test_wrong_derivative_of_one_output():
    f = scaled_rule(2.0)
    with pytest.raises(TransformationError, match=r"derivative of output\['b'\]\[0\].* is off by .*got .*expected"):
        assert_transform_invariant(lambda x: {"a": jnp.sin(x), "b": [f(x)]}, X, transforms=["jvp"])


def test_wrong_second_derivative():
    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda xs, dxs: (f(*xs), lax.stop_gradient(jnp.cos(*xs)) * dxs[0]))
    assert failures(f, X, transforms=sorted(FIRST | SECOND)) == SECOND


def test_wrong_derivative_of_a_complex_argument():
    @jax.custom_jvp
    def f(z):
        return jnp.sum(jnp.abs(z) ** 2)

    f.defjvp(lambda zs, dzs: (f(*zs), 2 * jnp.sum(zs[0].real * dzs[0].real)))
    with pytest.raises(TransformationError, match="gradient with respect to imaginary part of argument 0"):
        assert_transform_invariant(f, lax.complex(X, X * X), transforms=["vjp"])


def test_loop_without_reverse_mode():
    def squared_thrice(x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * c[1]), (0, x))[1]

    some = ["jvp", "jacfwd", "grad", "vjp", "while_loop", "nnx_grad"]
    assert failures(squared_thrice, X / 4, transforms=some) == {"grad", "vjp", "nnx_grad"}


def test_gradient_that_is_nan():
    failed = failures(lambda x: jnp.where(x > 0, jnp.sqrt(x), 0), X, transforms=["jit", "jvp", "grad", "debug_nans"])
    assert failed == {"grad", "debug_nans"}


def test_every_check_of_values_fails_for_other_values():
    """That differ when traced; what compares nothing with the plain call is left out."""
    others = {"grad", "jacfwd", "jacrev", "eval_shape", "nnx_grad", *SECOND, *MODES} - {"debug_nans"}
    assert failures(lambda x: jnp.sin(x) + float(isinstance(x, jax.core.Tracer)), X) == {*TRANSFORMS} - others


def test_every_check_of_derivatives_fails_for_a_wrong_one():
    """Gradients through other transformations are compared with the plain one, and second derivatives with its slope,
    which is as wrong.
    """
    assert failures(scaled_rule(2.0), X) == FIRST | {"while_loop"}


def test_every_check_of_gradients_fails_for_other_gradients():
    """That double from one call to the next: each transformation traces anew what the plain gradient has traced."""
    traced = []

    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    def backward(x, ct):
        traced.append(None)
        return (ct * jnp.cos(x) * 2.0 ** len(traced),)

    f.defvjp(lambda x: (f(x), x), backward)
    through = ["jit", "vmap", "checkpoint", "scan", "cond", "shard_map", "named_sharding", "make_jaxpr", "export"]
    through += ["nnx_jit", "nnx_grad", "enable_x64"]
    assert failures(f, X, transforms=through) == set(through)


def test_state_from_call_to_call():
    calls = []

    def f(x):
        calls.append(None)
        return x * len(calls)

    with pytest.raises(TransformationError, match=r"jit: output is off by .* more than"):
        assert_transform_invariant(f, X, transforms=["jit"])


def test_other_result_when_traced():
    def shape(x):
        return x[None] if isinstance(x, jax.core.Tracer) else x

    def dtype(x):
        return x.astype(jnp.bfloat16) if isinstance(x, jax.core.Tracer) else x

    def count(x):
        return [x] if isinstance(x, jax.core.Tracer) else [x, x]

    transforms = ["jit", "eval_shape", "make_jaxpr", "aot", "nnx_jit"]
    assert failures(shape, X, transforms=transforms) == set(transforms)
    assert failures(dtype, X, transforms=transforms) == set(transforms)
    assert failures(count, X, transforms=transforms) == set(transforms)
    with pytest.raises(TransformationError, match=r"jit: output has shape \(1, 2, 4\), expected \(2, 4\)"):
        assert_transform_invariant(shape, X, transforms=["jit"])
    with pytest.raises(TransformationError, match="eval_shape: output has dtype bfloat16, expected float32"):
        assert_transform_invariant(dtype, X, transforms=["eval_shape"])


@pytest.mark.slow
def test_what_each_mode_shows():
    leaked = []

    def leaks(x):
        leaked.append(x)
        return x

    def mixes_dtypes(x):
        return x.astype(jnp.bfloat16) * x

    def mixes_ranks(x):
        return x + x[0]

    def divides_zero_by_zero(x):
        return jnp.where(x == 1, 0.0, (x - 1) / (x - 1))

    def widens(x):
        return x * jnp.asarray(np.ones(4)).reshape(1, 4)

    modes = sorted(MODES | {"enable_x64"})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert failures(leaks, X, transforms=modes) == {"checking_leaks"}
        assert failures(mixes_dtypes, X, transforms=modes) == {"strict_dtype_promotion"}
        assert failures(mixes_ranks, X, transforms=modes) == {"rank_promotion_raise"}
        assert failures(divides_zero_by_zero, X, transforms=["jit", "debug_nans"]) == {"debug_nans"}
        assert failures(widens, X, transforms=modes) == {"enable_x64"}


def test_carry_that_does_not_vary_over_devices():
    def total(x):
        return lax.scan(lambda carry, row: (carry + jnp.sum(row), None), jnp.zeros(()), x)[0]

    assert failures(total, X, transforms=["jit", "vmap", "shard_map", "named_sharding"]) == {"shard_map"}


def test_callback_cannot_be_exported_nor_differentiated():
    def f(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")

    assert failures(f, X, transforms=["jit", "nested_vmap", "export", "grad", "eval_shape"]) >= {"export", "grad"}


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_the_error_lists_all_failures_and_only_those():
    with pytest.raises(
        TransformationError, match=r"fails under 2 of 3 transformations:\n  grad: .*\n  jvp: "
    ) as caught:
        assert_transform_invariant(scaled_rule(2.0), X, transforms=["jit", "grad", "jvp"])
    assert isinstance(caught.value, AssertionError)
    assert list(caught.value.failures) == ["grad", "jvp"]
    assert isinstance(caught.value.__cause__, AssertionError)


def test_tolerances():
    off = lambda x: x * (1.001 if isinstance(x, jax.core.Tracer) else 1.0)  # noqa: E731
    assert failures(off, X, transforms=["jit"]) == {"jit"}
    assert_transform_invariant(off, X, transforms=["jit"], rtol=1e-2)
    assert_transform_invariant(off, X, transforms=["jit"], atol=1e-2)


def test_an_error_of_the_plain_call_is_not_wrapped():
    def f(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        assert_transform_invariant(f, X)


def test_mistakes_of_the_caller():
    with pytest.raises(ValueError, match=r"assert_transform_invariant: transforms has an unknown 'vmpa'; .*'vmap'"):
        assert_transform_invariant(jnp.sin, X, transforms=["vmpa"])
    with pytest.raises(ValueError, match=r"assert_transform_invariant: .*'xyz'; expected one of jit, vmap, "):
        assert_transform_invariant(jnp.sin, X, transforms=["xyz"])
    with pytest.raises(
        ValueError, match="assert_transform_invariant: expected at least one array as an argument of sin"
    ):
        assert_transform_invariant(jnp.sin)
    with pytest.raises(TypeError, match=r"an argument, at \[1\], must be an array, got 'mean'; close over"):
        assert_transform_invariant(lambda x, how: x, X, "mean")
    with pytest.raises(TypeError, match=r"an output, at \['name'\], must be an array, got 'x'"):
        assert_transform_invariant(lambda x: {"name": "x"}, X)


def test_all_transformations_of_the_design_are_there():
    assert len(TRANSFORMS) == len(set(TRANSFORMS)) == 29
    assert {*FIRST, *SECOND, *MODES} < set(TRANSFORMS) == set(testing.TRANSFORMS)
