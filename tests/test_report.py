"""The table of norms: what it shows of trees and of optimizer states, and in which order. And the way into a logger."""

import json
import struct
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rmsjax import (
    ClipByRelativeRMSState,
    ClipByRMSState,
    RecordRMSState,
    RMSReport,
    clip_by_relative_rms,
    clip_by_rms,
    normalize_by_rms,
    record_rms,
    rms_by_path,
    rms_report,
    rms_states,
    stable_adamw,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

TREE = {"in": {"kernel": jnp.full((2, 3), 0.1), "bias": jnp.zeros(3)}, "out": jnp.full((3, 2, 2), 7.0, jnp.bfloat16)}


def test_a_tree_in_its_order():
    report = rms_report(TREE)
    assert repr(report).splitlines() == [
        "path           shape     dtype  rms   share",
        "in/bias         (3,)   float32    0    0.0%",
        "in/kernel     (2, 3)   float32  0.1    0.0%",
        "out        (3, 2, 2)  bfloat16    7  100.0%",
    ]
    assert {row.path: float(row.rms[0]) for row in report} == {k: float(v) for k, v in rms_by_path(TREE).items()}
    assert (len(report), report[-1].path, report[1:][0].path) == (3, "out", "in/kernel")
    assert isinstance(report[1:], RMSReport)


def test_worst_first():
    """Not finite, then by the factor to the median, in either direction; a norm of 0 is infinitely far from it."""
    norms = {"a": 1.0, "b": 1.0, "c": 1.1, "d": 0.9, "e": 30.0, "f": 0.01, "g": 0.0, "h": np.nan, "i": 1.0}
    tree = {name: jnp.full(4, norm) for name, norm in norms.items()}
    assert "".join(row.path for row in rms_report(tree, order="worst"))[:6] == "hgfedc"
    assert "".join(row.path for row in rms_report({"a": jnp.zeros(4), "b": jnp.zeros(4)}, order="worst")) == "ab"
    assert len(rms_report({}, order="worst")) == 0


@pytest.mark.parametrize(
    "scope", ["block", -1, lambda path, leaf: "c" if path == "c" else "block"], ids=["block", "axis", "callable"]
)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
def test_leaves_without_elements_come_last(scope, shape):
    """Also behind those that are as the median is, and those that are 0; wherever they are in the tree."""
    empty = jnp.zeros(shape)
    tree = {"a": empty, "b": jnp.full((4, 2), 3.0), "c": empty, "d": jnp.zeros((4, 2)), "e": jnp.full((4, 2), 3.0)}
    report = rms_report(tree, scope, order="worst")
    assert [row.path for row in report] == ["d", "b", "e", "a", "c"]
    report = rms_report({"a": empty, "b": jnp.ones((4, 2))}, order="worst")
    assert [row.path for row in report] == ["b", "a"]


def test_worst_first_compares_what_is_alike():
    """The norms of one field of one state: gradients, ratios and parameters are not of one size."""

    def tree(*values):
        return dict(zip("abc", map(np.float32, values), strict=True))

    unclipped = dict.fromkeys("abc", np.int32(0))
    state = (
        RecordRMSState(tree(1, 1.1, 1), None, None, np.int32(1)),
        ClipByRelativeRMSState(tree(1e-5, 1e-5, 3e-5), tree(2e3, 1e3, 1e3), np.int32(1), unclipped),
    )
    worst = [row.path for row in rms_report(state, order="worst")[:3]]
    assert worst == ["1/rms/c", "1/param_rms/a", "0/rms/b"]


def test_states_of_a_vmap():
    """A norm for each of its members, and as many shares."""
    states = jax.vmap(clip_by_rms(1.0, -1).init)({"w": jnp.ones((5, 4, 3))})
    (row,) = rms_report(states._replace(num_updates=jnp.full(5, 2), num_clipped={"w": np.ones((5, 4, 1), np.int32)}))
    np.testing.assert_array_equal(row.rms, np.zeros(20))
    np.testing.assert_array_equal(row.clipped, np.full(20, 0.5))


def test_several_norms_of_a_leaf_show_as_a_range():
    stack = jnp.arange(1.0, 4)[:, None] * jnp.ones((3, 4))
    report = rms_report({"stack": stack, "empty": jnp.zeros((0, 2)), "even": jnp.ones((2, 2))}, 1)
    assert [line.split("  ")[-2].strip() for line in repr(report).splitlines()[1:]] == ["-", "1", "1 to 3"]
    np.testing.assert_array_equal(report[2].rms, [1, 2, 3])
    broken = rms_report({"stack": stack.at[1].set(jnp.nan), "even": jnp.ones((2, 2))}, 1, order="worst")
    assert (broken[0].path, repr(broken).splitlines()[1].split()[-2]) == ("stack", "nan")


def test_global_scope_is_one_line():
    report = rms_report({"a": jnp.ones(2), "b": jnp.full(2, 7.0)}, "global")
    assert repr(report).split() == ["path", "rms", "share", "all", "5", "100.0%"]


@pytest.mark.parametrize("factor", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("scope", ["block", -1, lambda path, leaf: "few" if path in ("a", "b") else "block"])
def test_shares_of_the_square_of_the_whole(scope, factor):
    """They say which leaf makes the norm of the whole large, whatever its size is and however it is pooled."""
    rng = np.random.default_rng(0)
    tree = {
        name: rng.normal(size=shape) * size for name, shape, size in zip("abcd", SHAPES, (1, 5, 0, 0.1), strict=True)
    }
    squares = {name: np.sum(np.square(leaf)) for name, leaf in tree.items()} | {"e": 0.0}
    tree = {name: np.float32(leaf * factor) for name, leaf in tree.items()} | {"e": np.zeros((0, 2), np.float32)}
    squares |= {"few": squares["a"] + squares["b"]}
    report = rms_report(tree, scope)
    shares = {row.path: row.share for row in report}
    np.testing.assert_allclose(sum(shares.values()), 1, rtol=1e-12)
    total = sum(squares[name] for name in "abcd")
    np.testing.assert_allclose([*shares.values()], [squares[name] / total for name in shares], rtol=1e-5)


SHAPES = [(3, 4), (5,), (2, 2), (100, 2)]


def test_shares_of_what_is_broken_or_zero():
    assert [row.share for row in rms_report({"a": jnp.zeros(2), "b": jnp.zeros((0,))})] == [0, 0]
    for value in (np.nan, np.inf):
        assert np.isnan(rms_report({"a": jnp.ones(2), "b": jnp.full(2, value)})[1].share)


def test_stacked_layers_have_lines_of_their_own():
    stack = {"bias": jnp.zeros((2, 3)), "kernel": jnp.stack([jnp.ones((4, 3)), jnp.full((4, 3), 3.0)])}
    tree = {"blocks": stack, "head": jnp.full((3, 4), 2.0)}
    assert repr(rms_report(tree, stacked="blocks")).splitlines() == [
        "path              shape    dtype  rms  share",
        "blocks/0/bias      (3,)  float32    0   0.0%",
        "blocks/0/kernel  (4, 3)  float32    1   7.1%",
        "blocks/1/bias      (3,)  float32    0   0.0%",
        "blocks/1/kernel  (4, 3)  float32    3  64.3%",
        "head             (3, 4)  float32    2  28.6%",
    ]
    assert rms_report(tree, stacked="blocks", order="worst")[-1].path == "head"  # its norm is the median


def test_stacked_layers_in_a_state():
    """A norm for each layer and each unit; what has one norm for all layers has one line."""
    tree = {"blocks": {"kernel": jnp.arange(1.0, 3)[:, None, None] * jnp.ones((2, 4, 3))}, "head": jnp.ones(3)}

    def of_layers(path, leaf):
        return (1, 2) if leaf.ndim == 3 else "block"

    tx = optax.named_chain(
        ("layers", clip_by_rms(1.5, of_layers)), ("units", record_rms(lambda path, leaf: -1)), ("all", record_rms())
    )
    _, state = tx.update(tree, tx.init(tree))
    rows = {row.path: (row.rms.tolist(), row.clipped) for row in rms_report(state, stacked="blocks")}
    assert rows == {
        "layers/rms/blocks/0/kernel": ([1], [0]),
        "layers/rms/blocks/1/kernel": ([2], [1]),
        "layers/rms/head": ([1], [0]),
        "units/rms/blocks/0/kernel": ([1] * 4, None),
        "units/rms/blocks/1/kernel": ([1.5] * 4, None),
        "units/rms/head": ([1], None),
        "all/rms/blocks/kernel": (pytest.approx([np.sqrt(3.25 / 2)]), None),
        "all/rms/head": ([1], None),
    }
    assert {path: float(norm) for path, norm in rms_by_path(state["layers"].rms, stacked="blocks").items()} == {
        "blocks/0/kernel": 1, "blocks/1/kernel": 2, "head": 1,
    }  # fmt: skip


def test_shares_in_a_state():
    """Of what came in, if the parameters are there to say how large each leaf is; those of a layer as of any leaf."""
    tree = {"blocks": {"w": jnp.arange(1.0, 3)[:, None, None] * jnp.ones((2, 4, 3))}, "head": jnp.full(6, 3.0)}
    tx = optax.chain(
        optax.masked(
            record_rms(lambda path, leaf: (1, 2) if leaf.ndim == 3 else "block"), {"blocks": True, "head": True}
        ),
        clip_by_rms(1.0),
        record_rms(relative=True),
    )
    _, state = tx.update(tree, tx.init(tree), tree)
    assert all(row.share is None for row in rms_report(state))
    shapes = jax.eval_shape(lambda: tree)
    shares = {row.path: row.share for row in rms_report(state, stacked="blocks", params=shapes)}
    assert {path: share for path, share in shares.items() if share is not None} == {
        "0/inner_state/rms/blocks/0/w": pytest.approx(12 / 114),
        "0/inner_state/rms/blocks/1/w": pytest.approx(48 / 114),
        "0/inner_state/rms/head": pytest.approx(54 / 114),
        "2/rms/blocks/w": pytest.approx(60 / 114),
        "2/rms/head": pytest.approx(54 / 114),
    }


def test_no_share_where_a_label_may_have_pooled_leaves():
    """The state has the norm of the pool at each of its leaves; the other leaves have the shares that are theirs."""
    params = {"a": jnp.full(4, 1.0), "b": jnp.full(12, 3.0), "c": jnp.full(8, 2.0), "z": jnp.zeros(3)}
    for make in (record_rms, partial(clip_by_rms, 1.0), normalize_by_rms):
        tx = make(scope=lambda path, leaf: "few" if path in ("a", "b") else "block")
        _, state = tx.update(params, tx.init(params))
        report = rms_report(state, params=params)
        assert [row.share for row in report] == [None, None, pytest.approx(32 / 144), 0]


def test_only_norms_of_updates_have_shares():
    params = {"a": jnp.full(4, 1.0), "b": jnp.full(12, 3.0)}
    for tx in (stable_adamw(1e-3), clip_by_relative_rms(0.1), record_rms("block", relative=True, ema_decay=0.5)):
        grads = {"a": jnp.full(4, 2.0), "b": jnp.full(12, 5.0)}
        _, state = tx.update(grads, tx.init(params), params)
        shares = {row.path.split("/")[-2]: row.share for row in rms_report(state, params=params)}
        assert {field for field, share in shares.items() if share is not None} == {"rms"} & {*shares}


def test_states_of_a_chain():
    tx = optax.named_chain(
        ("clip", clip_by_rms(1.0, "block")),
        ("record", record_rms("global", ema_decay=0.5)),
        ("adam", stable_adamw(1.0)),
        ("rest", optax.chain(normalize_by_rms(2.0), clip_by_relative_rms(0.1, "global"))),
    )
    params = {"w": np.full(4, 5.0, np.float32), "b": np.full(4, 0.5, np.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for scale in (0.5, 2.0):
        _, state = update(jax.tree.map(lambda p, s=scale: np.float32(s * p), params), state, params)
    report = rms_report(state)
    assert [row.path for row in report] == [
        "clip/rms/b", "clip/rms/w", "record/rms", "record/ema_rms", "adam/0/ratio_rms/b", "adam/0/ratio_rms/w",
        "rest/0/rms/b", "rest/0/rms/w", "rest/1/rms", "rest/1/param_rms",
    ]  # fmt: skip
    assert repr(report[:3]).splitlines() == [
        "path        rms  clipped",
        "clip/rms/b    1     0.0%",
        "clip/rms/w   10   100.0%",
        "record/rms    1",
    ]
    np.testing.assert_allclose(report[2].rms, optax.tree.get(state["record"], "rms"))
    assert rms_report(state["clip"])[0].path == "rms/b"


def test_what_a_notebook_shows():
    html = rms_report({"<a&b>": jnp.ones(2)})._repr_html_()
    assert html.startswith(
        "<table><thead><tr><th>path</th><th>shape</th><th>dtype</th><th>rms</th><th>share</th></tr></thead>"
    )
    assert "<td>&lt;a&amp;b&gt;</td><td>(2,)</td><td>float32</td><td>1</td><td>100.0%</td>" in html


def test_a_flax_model():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert [row.path for row in rms_report(nnx.state(model), sep=".")] == ["bias", "kernel"]
    optimizer = nnx.Optimizer(model, record_rms(), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    assert [row.path for row in rms_report(optimizer.opt_state)] == ["rms/bias", "rms/kernel"]


def test_errors():
    with pytest.raises(ValueError, match="rms_report: order must be 'tree' or 'worst', got 'best'"):
        rms_report(TREE, order="best")
    with pytest.raises(
        TypeError, match="rms_report: the tree must have values, not tracers; under jit use rms_by_path"
    ):
        jax.jit(rms_report)(TREE)
    with pytest.raises(
        ValueError, match=r"rms_report: params go with a tree that holds states .*, got a dict with .*;"
    ):
        rms_report({"a": jnp.ones(2)}, params={"a": jnp.ones(2)})
    with pytest.raises(TypeError, match="rms_report: leaf 'a' must be an array of numbers"):
        rms_report({"a": "text"})
    with pytest.raises(ValueError, match="rms_report: scope axis 1 is out of range"):
        rms_report(TREE, 1)


def chains():
    """(transformation, the paths of its states) for all that optax wraps a transformation in."""
    clip, record = clip_by_rms(1.0), record_rms()
    yield "alone", clip, [""]
    yield "two alike", optax.chain(record, clip, optax.adam(1e-3), clip_by_rms(2.0)), ["0", "1", "3"]
    yield "named", optax.named_chain(("record", record), ("clip", clip)), ["record", "clip"]
    scheduled = optax.inject_hyperparams(clip_by_rms, hyperparam_dtype=jnp.float32)
    yield "scheduled", scheduled(max_rms=lambda step: 1.0), ["inner_state"]
    yield "several steps", optax.MultiSteps(clip, 2).gradient_transformation(), ["inner_opt_state"]
    yield "masked", optax.chain(optax.masked(record, True), optax.adam(1e-3)), ["0/inner_state"]
    parts = optax.partition({"a": record, "b": clip}, lambda tree: jax.tree.map(lambda leaf: "ab"[leaf.ndim > 1], tree))
    yield "parts", parts, ["inner_states/a/inner_state", "inner_states/b/inner_state"]


@pytest.mark.parametrize(("tx", "paths"), [pytest.param(tx, paths, id=name) for name, tx, paths in chains()])
def test_states_are_found_however_deep(tx, paths):
    state = tx.init(TREE)
    found = rms_states(state)
    assert list(found) == paths
    assert all(isinstance(part, (ClipByRMSState, RecordRMSState)) for part in found.values())
    assert jax.tree.structure(jax.jit(rms_states)(state)) == jax.tree.structure(found)


def test_states_of_an_nnx_optimizer_hold_arrays():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(record_rms(), clip_by_rms(1.0)), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    recorded, clip = rms_states(optimizer.opt_state).values()
    assert (float(clip.rms), int(clip.num_updates)) == (1.0, 1)
    assert {path: float(norm) for path, norm in rms_by_path(recorded.rms).items()} == {"bias": 1.0, "kernel": 1.0}


def test_no_states_is_an_error():
    with pytest.raises(ValueError, match=r"rms_states: opt_state must hold .*clip_by_rms.*, got tuple without any"):
        rms_states(optax.chain(optax.adam(1e-3)).init(TREE))


# ------------------------------------------------------------------------------------------------------------- loggers


@pytest.fixture(scope="module")
def log():
    """`log(steps, write)` of the notebook on training."""
    notebook = json.loads((Path(__file__).parent.parent / "notebooks/02_training.ipynb").read_text("utf-8"))
    (source,) = ("".join(cell["source"]) for cell in notebook["cells"] if cell["id"] == "cell-log")
    names = {"nnx": nnx, "jax": jax}
    exec(source, names)
    return names["log"]


def logged_steps(count):
    """The numbers of some steps of training, as the notebook's step gives them."""
    params = {"blocks": {"kernel": jnp.ones((2, 3, 3))}, "head": jnp.ones(3)}
    tx = record_rms(lambda path, leaf: (1, 2) if leaf.ndim == 3 else "block")

    @jax.jit
    def step(state, size):
        _, state = tx.update(jax.tree.map(lambda p: size * p, params), state)
        return state, {"loss": size / 2} | rms_by_path(state.rms, stacked="blocks")

    state = tx.init(params)
    for k in range(count):
        state, numbers = step(state, jnp.float32(k))
        yield numbers


EXPECTED = [{"loss": k / 2} | dict.fromkeys(["blocks/0/kernel", "blocks/1/kernel", "head"], k) for k in range(4)]


def test_a_step_is_written_when_the_next_one_is_on_its_way(log):
    events, written = [], []

    def steps():
        for k, numbers in enumerate(logged_steps(4)):
            events.append(f"step {k}")
            yield numbers

    def write(numbers, k):
        events.append(f"write {k}")
        written.append({name: float(value) for name, value in numbers.items()})

    log(steps(), write)
    assert written == EXPECTED
    assert events == ["step 0", "step 1", "write 0", "step 2", "write 1", "step 3", "write 2", "write 3"]


def test_tensorboard(log, tmp_path):
    """Read back from the file of events: a record is its length, two checksums and the event itself."""
    tensorboardX = pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        log(logged_steps(4), lambda numbers, k: [writer.add_scalar(name, value, k) for name, value in numbers.items()])
    (path,) = tmp_path.iterdir()
    data, found = path.read_bytes(), [{} for _ in range(4)]
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            found[event.step][value.tag] = value.simple_value
    assert found == EXPECTED


@pytest.mark.slow
def test_wandb_offline(log, tmp_path):
    wandb = pytest.importorskip("wandb")  # no part of the extra "test": it is large, and starts a process of its own
    settings = wandb.Settings(console="off", silent=True, disable_git=True)
    with wandb.init(mode="offline", dir=tmp_path, settings=settings) as run:
        log(logged_steps(4), run.log)
        run.log({}, 4)  # W&B adds to the row of a step until another one begins
        last = {name: value for name, value in dict(run.summary).items() if not name.startswith("_")}
        assert (run.step, last) == (4, EXPECTED[-1])
    assert [path.stat().st_size > 0 for path in tmp_path.glob("wandb/offline-run-*/*.wandb")] == [True]
