"""Several processes, each with its own devices and part of the data, train as one process with all devices does."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import multiprocess_worker as worker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROCESSES = 2
# Seconds, for a machine that is busy with other things; on a quiet one each test takes about ten.
BOUND = 300


def free_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def run(directory, *, victim=None):
    """Start the processes, of which one may be killed on the way; the exit code of each and what it printed."""
    address = free_address()
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={worker.DEVICES_PER_PROCESS}",
        "PYTHONPATH": str(ROOT),
    }
    logs = [directory / f"{i}.log" for i in range(PROCESSES)]
    processes = []
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, worker.__file__, address, str(PROCESSES), str(i), directory / f"{i}.npz"]
            if victim is not None:
                command += ["--heartbeat", "10", *(["--die-at", "5"] if i == victim else [])]
            with log.open("w") as out:
                processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
        # TimeoutExpired fails the test: the processes hang.
        return [(process.wait(timeout=BOUND), log.read_text()) for process, log in zip(processes, logs, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def assembled(path, leaf, files):
    """A whole array from the parts that the processes have; each entry must come from exactly one of them."""
    name = jax.tree_util.keystr(path)
    whole, written = np.zeros(leaf.shape, leaf.dtype), np.zeros(leaf.shape, int)
    for file in files:
        for key in file.files:
            if key.split("@")[0] == name:
                bounds = [part.split(":") for part in key.split("@")[1].split(",") if part]
                at = tuple(slice(int(start), int(stop)) for start, stop in bounds)
                whole[at] = file[key]
                written[at] += 1
    assert np.all(written == 1), name
    return whole


def test_two_processes_train_like_one(tmp_path):
    results = run(tmp_path)
    assert [code for code, _ in results] == [0] * PROCESSES, results
    files = [np.load(tmp_path / f"{i}.npz") for i in range(PROCESSES)]
    reference = worker.train(worker.make_mesh())
    trained = {k: reference[k] for k in ("params", "state")}
    jax.tree_util.tree_map_with_path(
        lambda path, leaf: worker.assert_alike(path, assembled(path, leaf, files), leaf), trained
    )
    for file in files:
        jax.tree_util.tree_map_with_path(
            lambda path, leaf, file=file: worker.assert_alike(
                path, file["['history']" + jax.tree_util.keystr(path)], leaf
            ),
            reference["history"],
        )
        # Of the split matrices, and of their momentum, each process has one half.
        for name in ("w_in", "w_out"):
            held = [key for key in file.files if f"['{name}']@" in key and "rms" not in key]
            assert len(held) == 2 * worker.DEVICES_PER_PROCESS
            assert sum(file[key].size for key in held) == 2 * reference["params"][name].size // PROCESSES
    clipped = reference["history"]["clip"].num_clipped
    assert 0 < clipped[-1] < worker.STEPS  # some updates are clipped and others are not


@pytest.mark.parametrize("victim", [0, 1])  # 0 is also the one that coordinates
def test_when_a_process_is_killed_the_other_ends_with_an_error(tmp_path, victim):
    results = run(tmp_path, victim=victim)
    assert results[victim][0] == -signal.SIGKILL
    code, printed = results[1 - victim]
    assert code not in (0, -signal.SIGKILL), printed
    assert "step 5" in printed
    assert "step 6" not in printed
