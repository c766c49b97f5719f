"""What a user's type checker makes of rmsjax: what is right passes, with its types known, and what is wrong does not.

It runs where nothing is installed but what rmsjax requires: what only tests use must not be what makes names known.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = Path(__file__).parent.parent

RIGHT = """
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import rmsjax
from rmsjax import Scope, clip_by_rms, geometry, linen, probe, rms

x = jnp.ones((2, 3))
grads = {"w": x, "b": jnp.ones(3)}
assert_type(rms(x), Array)
assert_type(rms(np.ones((2, 3)), axis=-1, where=x > 0), Array)
assert_type(rmsjax.rms_normalize(x, jnp.ones(3)), Array)
assert_type(rmsjax.tree_rms(grads), Array)
assert_type(rmsjax.tree_rms(grads, "global"), Array)
assert_type(rmsjax.tree_rms(grads, "block"), dict[str, Array])
assert_type(rmsjax.tree_rms(grads, (0, 1)), dict[str, Array])
assert_type(rmsjax.tree_rms(grads, lambda path, leaf: 0 if leaf.ndim == 2 else "a label"), dict[str, Array])
assert_type(rmsjax.rms_by_path(grads), dict[str, Array])
assert_type(rmsjax.rms_penalty(grads, 0.5, "block", "ceiling"), Array)
assert_type(rmsjax.rms_operator_norm(x), Array)
assert_type(rmsjax.rms_report(grads), rmsjax.RMSReport)
assert_type(clip_by_rms(1.0, "block"), optax.GradientTransformation)
assert_type(rmsjax.stable_adamw(lambda step: 1e-3), optax.GradientTransformationExtraArgs)
assert_type(rmsjax.clip_by_history(1.05, "block", warmup_max_norm=None), optax.GradientTransformation)
assert_type(rmsjax.hyperball(optax.adam(1e-3), 1e-2), optax.GradientTransformationExtraArgs)
assert_type(rmsjax.rms_states(clip_by_rms(1.0).init(grads)), dict[str, Any])

scope: Scope = "block"
optax.chain(rmsjax.record_rms(scope), rmsjax.normalize_by_rms(0.1), optax.sgd(0.1))
assert_type(rmsjax.nnx.RMSNorm(3, rngs=nnx.Rngs(0)), rmsjax.nnx.RMSNorm)
assert_type(rmsjax.nnx.RMSNorm(3, rngs=nnx.Rngs(0))(x), Array)
assert_type(linen.RMSNorm(epsilon=1e-5), linen.RMSNorm)
assert_type(geometry.rotation_gap(rms, 3, jax.random.key(0)), Array)
assert_type(probe.tag(x, "x"), Array)


def make_model(width: int, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(3, width, rngs=rngs)


record = rmsjax.coord_check(
    make_model, (x, x), widths=[2, 4], make_optimizer=lambda width: optax.sgd(0.1), loss=optax.l2_loss
)
assert_type(record, rmsjax.WidthRecord)
assert_type(record.verdict, str)
rmsjax.plot.coord_check(record)
rmsjax.coord_check(
    make_model, lambda depth: (x, x), depths=[2, 4], kwargs={"mask": x}, make_optimizer=lambda depth: optax.sgd(0.1),
    loss=lambda output, target: (optax.l2_loss(output, target), output),
)
sweep = rmsjax.lr_sweep(
    make_model, [(x, x)], widths=[2, 4], learning_rates=[0.1, 0.2], loss=optax.l2_loss,
    make_optimizer=lambda width, learning_rate: optax.sgd(learning_rate),
)
assert_type(sweep, rmsjax.SweepRecord)
assert_type(sweep.load("file"), rmsjax.SweepRecord)
assert_type(sweep.best_rates, dict[int, float])
rmsjax.plot.lr_sweep({"muP": sweep})
"""

# Each line is an error, of the rule named beside it.
WRONG = """
import jax.numpy as jnp
import optax
import rmsjax
from flax import nnx

from rmsjax import clip_by_rmss  # reportAttributeAccessIssue
from rmsjax import Array  # reportPrivateImportUsage|reportAttributeAccessIssue
from rmsjax.nnx import RmsNorm  # reportAttributeAccessIssue

x = jnp.ones(3)
rmsjax.foo(1.0)  # reportAttributeAccessIssue
rmsjax.rms_norm(x)  # reportAttributeAccessIssue
rmsjax.plot.coordinate_check(x)  # reportAttributeAccessIssue
rmsjax.rms("a")  # reportArgumentType
rmsjax.rms(x, "rows")  # reportArgumentType
rmsjax.rms(x, dim=0)  # reportCallIssue
rmsjax.tree_rms({"w": x}, "layers")  # reportCallIssue|reportArgumentType
rmsjax.tree_rms({"w": x}, "block").sum()  # reportAttributeAccessIssue
rmsjax.clip_by_rms(1.0, "blocks")  # reportArgumentType
rmsjax.clip_by_rms()  # reportCallIssue
rmsjax.clip_by_rms("1")  # reportArgumentType
rmsjax.clip_by_rms(lambda step: 1.0)  # reportArgumentType
rmsjax.rms_penalty({"w": x}, kind="floor")  # reportArgumentType
rmsjax.nnx.RMSNorm(3)  # reportCallIssue
rmsjax.nnx.RMSNorm(3, rngs=nnx.Rngs(0), eps=1e-6)  # reportCallIssue
rmsjax.nnx.RMSNorm(3, rngs=nnx.Rngs(0)).gain  # reportAttributeAccessIssue
rmsjax.linen.RMSNorm(eps=1e-6)  # reportCallIssue
rmsjax.coord_check(nnx.Linear, (x, x), widths=2, make_optimizer=lambda w: optax.sgd(1), loss=optax.l2_loss)  # report
rmsjax.rms_report({"w": x}).worst  # reportAttributeAccessIssue
"""


def required(name):
    """The distributions that one of ours requires, and those that these require, without extras."""
    found, wanted = set(), [Requirement(name)]
    while wanted:
        requirement = wanted.pop()
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or key in found:
            continue
        found.add(key)
        wanted += [Requirement(text) for text in importlib.metadata.requires(key) or ()]
    return found


@pytest.fixture(scope="module")
def users_python(tmp_path_factory):
    """The interpreter of an environment with rmsjax and what it requires, which are linked and not copied."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    for name in set().union(*map(required, needs)):
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    (site / "rmsjax").symlink_to(ROOT / "rmsjax")
    return folder / "bin/python"


def test_the_environment_is_a_users(users_python):
    """rmsjax runs in it, and what tests use is not there."""
    program = "import rmsjax, jaxtyping; print(rmsjax.clip_by_rms(1.0), rmsjax.nnx.RMSNorm); import beartype"
    done = subprocess.run([users_python, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout.startswith("GradientTransformation")
    assert "No module named 'beartype'" in done.stderr


@pytest.fixture(scope="module")
def errors_in(users_python, tmp_path_factory):
    """A function from a program to (line, rule) of all that pyright finds in it."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, program in {"right": RIGHT, "wrong": WRONG}.items():
        (folder / f"{name}.py").write_text(program, "utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", users_python, "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]

    def errors_in(name):
        mine = [entry for entry in found if Path(entry["file"]).stem == name and entry["severity"] == "error"]
        return [(entry["range"]["start"]["line"], entry.get("rule", ""), entry["message"]) for entry in mine]

    return errors_in


@pytest.mark.slow
def test_what_is_right_passes_with_its_types_known(errors_in):
    assert errors_in("right") == []


@pytest.mark.slow
def test_what_is_wrong_does_not_pass(errors_in):
    found = {}
    for line, rule, _ in errors_in("wrong"):
        found.setdefault(line, rule)
    for number, text in enumerate(WRONG.splitlines()):
        expected = text.partition("  # ")[2]
        assert bool(expected) == (number in found), text
        assert not expected or re.match(expected, found[number]), (text, found[number])
