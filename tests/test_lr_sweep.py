"""The sweep of learning rates: what the records say, how runs are trained, and that the rate of muP transfers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from rmsjax import SweepRecord, lr_sweep
from tests.helpers.parametrisations import ResidualMLP, Transformer, adam, cross_entropy, digits, zen_of_python

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
RATES = 2.0 ** np.arange(-6, 0)


@pytest.fixture(autouse=True)
def promotion(strict):
    """optax's Adam needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def linear(width, rngs):
    return nnx.Linear(8, width, rngs=rngs)


def sweep(make_model=linear, batches=((X, X[:, :1]),), **kwargs):
    given = {"widths": [8, 16], "learning_rates": [0.1, 0.2], "make_optimizer": lambda width, rate: optax.sgd(rate)}
    given |= {"loss": lambda y, x: jnp.mean((y - x) ** 2), "steps": 3, "seeds": 2, "progress": False}
    return lr_sweep(make_model, batches, **given | kwargs)


def record_of(best, *, widths=(64, 128, 256), seeds=3, steps=20, noise=0.0, floor=0.1):
    """Losses that are least at these rates: parabolas in the logarithm."""
    rng, shape = np.random.default_rng(0), (len(widths), seeds, len(RATES), steps)
    final = floor + np.log2(RATES / np.array(best)[:, None]) ** 2
    loss = np.broadcast_to(final[:, None, :, None], shape) * np.exp(noise * rng.normal(size=(*shape[:3], 1)))
    return SweepRecord(np.array(widths), np.arange(seeds), RATES, np.array(loss))


# ----------------------------------------------------------------------------------------------------------- acceptance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_model", "batch", "widths", "steps"),
    [(ResidualMLP, digits(256), [64, 1024], 10), (Transformer, zen_of_python(16), [64, 256], 20)],
    ids=["mlp on digits", "transformer on bytes"],
)
def test_the_best_rate_of_mup_stays(make_model, batch, widths, steps):
    """In standard parametrisation it falls with the width, and that of the small model is dear at the large width."""

    def train(mup):
        return lr_sweep(
            lambda width, rngs: make_model(width, rngs, mup=mup, blocks=1), [batch], widths=widths, seeds=2,
            steps=steps, learning_rates=2.0 ** np.arange(-10, -3), progress=False, loss=cross_entropy,
            make_optimizer=lambda width, rate: adam(width, mup=mup, learning_rate=rate),
        )  # fmt: skip

    standard, mup = train(False), train(True)
    print(standard, mup, sep="\n")
    assert standard.drift <= 1 / 4
    assert standard.regret > 0.3
    assert 1 / 2 <= mup.drift <= 2
    assert abs(mup.regret) < 0.03
    assert not mup.at_edge


# -------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("best", "drift", "regret", "edges", "words"),
    [
        ([1 / 8, 1 / 8, 1 / 8], 1, 0, (), "0.125 at width 64, 0.125 at width 256: it stays"),
        ([1 / 4, 1 / 8, 1 / 16], 0.25, 4, (), "0.25 at width 64, 0.0625 at width 256: it falls by a factor of 4"),
        ([1 / 8, 1 / 8, 1 / 4], 2, 1, (), "it rises by a factor of 2"),
        ([1 / 2, 1 / 4, 1 / 4], 0.5, 1, (64,), "the largest rate is the best at width 64: try larger ones too"),
        ([1 / 8, 1 / 64, 1 / 64], 1 / 8, 9, (128, 256), "the smallest rate is the best at width 128, 256: try smaller"),
    ],
)
def test_drift_and_regret(best, drift, regret, edges, words):
    record = record_of(best)
    assert record.best_rates == dict(zip((64, 128, 256), best, strict=True))
    assert record.drift == drift
    assert record.regret == pytest.approx(regret)
    assert record.at_edge == edges
    text = " ".join(str(record).split())
    assert words in text
    assert text.count("*") == 1 + 3  # the legend, and one of each width
    assert ("try" in text) == bool(edges)


def test_regret_has_the_interval_of_student():
    record = record_of([1 / 4, 1 / 8, 1 / 8], noise=0.2, seeds=5)
    by_seed = record.loss[-1, :, :, -1]
    regrets = by_seed[:, 4] - by_seed[:, 3]
    assert record.regret == pytest.approx(np.mean(regrets))
    half = stats.sem(regrets) * stats.t.ppf(0.975, 4)
    assert f"a regret of {np.mean(regrets):.2g} ±{half:.2g} (95 % interval over seeds)" in " ".join(str(record).split())


def test_final_loss_is_the_mean_over_the_last_tenth_and_seeds():
    record = record_of([1 / 8] * 3, seeds=2, steps=30)
    record.loss[..., :27] = 1e9
    record.loss[0, 0, 0, 27:] = [1, 2, 3]
    record.loss[0, 1, 0, 27:] = 6
    assert record.final[0, 0] == 4
    assert "mean over the last 3 steps and 2 seeds" in str(record)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_diverges_is_not_the_best(value):
    """For one seed is enough, and that it once was the smallest does not count."""
    record = record_of([1 / 4, 1 / 8, 1 / 8])
    record.loss[0, 1, 4, -1] = value
    assert record.final[0, 4] == np.inf
    assert record.best_rates[64] == 1 / 8
    assert "diverged" in str(record)
    record = record_of([1 / 4, 1 / 8, 1 / 8])
    record.loss[2, 0, 4, -1] = value
    assert record.regret == np.inf
    assert "at width 256 the best rate of width 64 diverges" in str(record)


def test_a_width_at_which_all_diverges():
    record = record_of([1 / 4, 1 / 8, 1 / 8])
    record.loss[0] = np.nan
    assert np.isnan([record.best_rates[64], record.drift, record.regret]).all()
    assert record.at_edge == ()
    assert str(record).endswith("no best learning rate: all have diverged at width 64; use smaller ones")


def test_one_seed_and_one_step():
    text = str(record_of([1 / 4, 1 / 8, 1 / 8], seeds=1, steps=1))
    assert text.startswith("final loss by learning rate, of 1 seed\nwidths 64, 128, 256; 1 step of training; *")
    assert "interval" not in text
    assert text.endswith("at width 256 the best rate of width 64 gives a loss of 1.1 instead of 0.1")


@pytest.mark.parametrize(("base", "said"), [(2.0, False), (4.0, True)])
def test_a_coarse_grid_is_said_to_be_one(base, said):
    rates = base ** np.arange(-3.0, 1)
    loss = np.broadcast_to([3.0, 1, 2, 4], (2, 1, 4))[..., None]
    text = " ".join(str(SweepRecord(np.array([64, 256]), np.array([0]), rates, loss)).split())
    assert "it stays" in text
    assert ("it stays, as far as rates 4 times apart show" in text) == said


def test_save_and_load(tmp_path):
    record = dataclasses.replace(record_of([1 / 4, 1 / 8, 1 / 8], noise=0.1), axis="depth")
    record.save(tmp_path / "record")
    loaded = SweepRecord.load(tmp_path / "record")
    assert str(loaded) == str(record)
    assert "depths 64, 128, 256" in str(loaded)
    for field in dataclasses.fields(record):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(record, field.name))


def test_to_dict_has_a_row_for_each_loss():
    record = record_of([1 / 4, 1 / 8, 1 / 8], noise=0.1)
    columns = record.to_dict()
    picked = (columns["width"] == 256) & (columns["seed"] == 1) & (columns["learning_rate"] == 1 / 8)
    np.testing.assert_array_equal(columns["loss"][picked], record.loss[2, 1, 3])
    np.testing.assert_array_equal(columns["step"][picked], np.arange(20))
    assert {len(column) for column in columns.values()} == {record.loss.size}


# -------------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_trains_like_a_plain_loop(monkeypatch, backend):
    """Each width, seed and rate; one after the other as on a CPU, or side by side. Batches come in turn."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    batches = [(k * X, X) for k in (1.0, -0.5)]
    record = sweep(
        batches=batches, widths=[8, 9], seeds=[3, 5], loss=lambda y, x: (jnp.mean((y[:, :8] - x) ** 2), {"aux": y})
    )
    assert record.loss.shape == (2, 2, 2, 3)
    assert (record.seeds.tolist(), record.learning_rates.tolist()) == ([3, 5], [0.1, 0.2])
    for s, seed in enumerate(record.seeds):
        for r, rate in enumerate(record.learning_rates):
            layer = linear(8, nnx.Rngs(jax.random.key(seed)))
            kernel, bias = np.float64(layer.kernel[...]), np.zeros(8)
            for step in range(3):
                x, target = batches[step % 2]
                error = x @ kernel + bias - target
                assert record.loss[0, s, r, step] == pytest.approx(np.mean(error**2), rel=1e-4)
                kernel -= rate * x.T @ error * 2 / error.size
                bias -= rate * error.sum(0) * 2 / error.size


def test_a_rate_that_diverges():
    record = sweep(learning_rates=[0.1, 1e30], steps=5)
    assert np.isinf(record.final[:, 1]).all()
    assert record.best_rates == {8: 0.1, 16: 0.1}


def test_depths():
    def make_model(depth, rngs):
        return nnx.Sequential(*(nnx.Linear(8, 8, rngs=rngs) for _ in range(depth)))

    record = sweep(make_model, widths=None, depths=[1, 3], make_optimizer=lambda depth, rate: optax.sgd(rate / depth))
    assert (record.axis, record.widths.tolist()) == ("depth", [1, 3])
    assert "at depth 1, " in str(record)


def test_a_bar(capsys):
    sweep(progress=True, steps=1, seeds=1)
    assert "lr_sweep: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"learning_rates": 0.1}, TypeError, r"learning_rates must be numbers such as np.geomspace\(.*\), got 0.1$"),
        ({"learning_rates": ["a", 1]}, TypeError, "learning_rates must be a number known at trace time, got 'a'"),
        ({"learning_rates": [0.1]}, ValueError, r"learning_rates must be 2 or more, none of them twice, got \[0.1\]"),
        ({"learning_rates": [0.1, 0.1]}, ValueError, "learning_rates must be 2 or more, none of them twice"),
        ({"learning_rates": [0.0, 0.1]}, ValueError, "learning_rates must be positive, got 0.0"),
        ({"learning_rates": [np.nan, 0.1]}, ValueError, "learning_rates must be finite"),
        ({"batches": (X, X)}, TypeError, r"batches must be a list .* \[\(x, labels\)\], got .* write \[batch\]$"),
        ({"batches": X}, TypeError, r"batches must be a list .* got an array of shape \(16, 8\)"),
        ({"batches": []}, TypeError, r"batches must be a list .* got \[\]"),
        (
            {"batches": [(X, X), (X,)]},
            ValueError,
            r"batches\[1\] must be a tuple such as \(x, labels\), .* a tuple of 1$",
        ),
        (
            {"batches": [(X,) * 4]},
            TypeError,
            r"the model is called by .* with what batches\[0\] has \(3 without the t",
        ),
        ({"kwargs": [3]}, TypeError, r"kwargs\[0\] must be the keyword arguments .* got 3$"),
        ({"kwargs": 3}, TypeError, "kwargs must be the keyword arguments .* got 3$"),
        (
            {"batches": [(X, X), (X[:3], X[:3])]},
            ValueError,
            r"batches must be alike, .*; batches\[1\] has .* shape \(3, 8\) .* batches\[0\] has .* shape \(16, 8\)",
        ),
        (
            {"batches": [(X, True, X), (X, 1, X)]},
            ValueError,
            r"batches must be alike, .* batches\[1\] has 1 where batches\[0\] has True",
        ),
        ({"kwargs": [{}, {}]}, ValueError, "kwargs, .* must be one for each batch, got 2 for 1 batch$"),
        (
            {"make_optimizer": lambda width: optax.sgd(0.1)},
            TypeError,
            r"make_optimizer must be a function \(width, learning_rate\), got <lambda>\(width\); write lambda width, l",
        ),
        ({"make_optimizer": optax.adam}, TypeError, "make_optimizer must be .*, got adam, which takes a learning rate"),
        ({"make_optimizer": lambda width, rate: rate}, TypeError, "make_optimizer must return an optax transformation"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"loss": optax.l2_loss, "make_model": X}, TypeError, "make_model must be a function"),
    ],
)
def test_errors(kwargs, error, message, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)  # nothing is compiled before
    with pytest.raises(error, match=f"^lr_sweep: {message}"):
        sweep(**kwargs)


@pytest.mark.parametrize("use", [float, bool, lambda rate: np.log(rate)])
def test_an_optimizer_that_asks_for_the_value_of_the_rate(use, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)  # nothing is compiled before
    with pytest.raises(TypeError) as raised:
        sweep(make_optimizer=lambda width, rate: optax.sgd(use(rate)))
    assert "lr_sweep: learning_rate is traced" in raised.value.__notes__[0]
