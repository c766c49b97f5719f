"""Twenty steps of sharded training in which no process needs to hold more than its own part of anything.

Imported, this gives the pieces to tests in one process. Run as a script, it is one of several processes:

    python multiprocess_worker.py COORDINATOR PROCESSES PROCESS OUTPUT [--heartbeat SECONDS] [--die-at STEP]

and writes the parts of the trained parameters and optimizer state that this process has, and what was measured.
"""

import argparse
import os
import signal
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsjax

STEPS = 20
DEVICES_PER_PROCESS = 4
AXES = ("data", "model")

# As in FSDP with tensor parallelism: every matrix is split over both axes, the batch over "data".
SHAPES = {"w_in": (32, 64), "scale": (64,), "w_out": (64, 8), "bias": (1, 8)}
SPECS = {"w_in": P("data", "model"), "scale": P("model"), "w_out": P("model", "data"), "bias": P()}
BATCH_SHAPES, BATCH_SPECS = {"x": (16, 32), "y": (16, 8)}, {"x": P("data"), "y": P("data")}


def make_mesh(shape=(2, 4), devices=None):
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def entries(shape, seed, index):
    """The entries of a fixed array at an index, computed without the rest of the array."""
    grids = np.ogrid[tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))]
    i, j = grids if len(grids) == 2 else (0, grids[0])
    return np.sin(seed + 12.9898 * i + 78.233 * j + i * j).astype(np.float32)


def make(mesh, shapes, specs, size):
    """Sharded arrays with entries between -size and size, of which each process computes what it holds."""
    return {
        k: size * jax.make_array_from_callback(shape, NamedSharding(mesh, specs[k]), partial(entries, shape, seed))
        for seed, (k, shape) in enumerate(shapes.items())
    }


def assert_alike(path, got, want):
    """Equal to 1e-6 of the entry, or of the largest entry of the array: rounding adds up over the steps."""
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max(), err_msg=jax.tree_util.keystr(path))


def optimizer(axis_name=None):
    return optax.chain(
        rmsjax.record_rms("block", axis_name=axis_name),
        rmsjax.clip_by_rms(0.005, axis_name=axis_name),
        optax.sgd(0.2, momentum=0.9),
    )


def loss_under_jit(params, batch):
    h = batch["x"] @ params["w_in"]
    h = rmsjax.linen.RMSNorm().apply({"params": {"scale": params["scale"]}}, h)
    return jnp.mean(jnp.square(jnp.tanh(h) @ params["w_out"] + params["bias"] - batch["y"]))


def loss_under_shard_map(params, batch):
    """The same, with all communication by hand."""
    h = batch["x"] @ lax.all_gather(params["w_in"], "data", axis=0, tiled=True)
    h = rmsjax.linen.RMSNorm(axis_name="model").apply({"params": {"scale": params["scale"]}}, h)
    y = lax.psum(jnp.tanh(h) @ lax.all_gather(params["w_out"], "data", axis=1, tiled=True), "model")
    return lax.pmean(jnp.mean(jnp.square(y + params["bias"] - batch["y"])), "data")


def make_step(loss_of, tx):
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def train(mesh, by_hand=False, before_step=lambda step: None):
    """Parameters, optimizer state, and what was measured at every step; by shard_map if by hand, else by jit."""
    params = make(mesh, SHAPES, SPECS, 0.3)
    batch = make(mesh, BATCH_SHAPES, BATCH_SPECS, 1.0)
    state = optimizer().init(params)
    step = make_step(loss_under_jit, optimizer())
    if by_hand:
        state_specs = jax.tree.map(lambda x: x.sharding.spec if isinstance(x.sharding, NamedSharding) else P(), state)
        step = jax.shard_map(
            make_step(loss_under_shard_map, optimizer(AXES)),
            mesh=mesh,
            in_specs=(SPECS, state_specs, BATCH_SPECS),
            out_specs=(SPECS, state_specs, P()),
        )
    step = jax.jit(step)
    history = []
    for i in range(STEPS):
        before_step(i)
        params, state, loss = step(params, state, batch)
        recorded, clipped = state[:2]
        history.append(jax.device_get({"loss": loss, "rms": recorded.rms, "clip": clipped}))
    return {"params": params, "state": state, "history": jax.tree.map(lambda *steps: np.stack(steps), *history)}


# ----------------------------------------------------------------------------------------- one of several processes


def parts(tree):
    """What this process has of each global array of a tree, named by path and bounds; other leaves as they are."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, np.ndarray):
            found[name] = leaf
            continue
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                bounds = [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
                at = ",".join(f"{start}:{stop}" for start, stop in bounds)
                found[f"{name}@{at}"] = np.asarray(shard.data)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("coordinator")
    parser.add_argument("processes", type=int)
    parser.add_argument("process", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--heartbeat", type=int, default=100, help="seconds after which a silent process counts as dead"
    )
    parser.add_argument("--die-at", type=int, help="the step before which this process is to kill itself")
    options = parser.parse_args()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.process,
        coordinator_bind_address=options.coordinator,  # the loopback alone
        heartbeat_timeout_seconds=options.heartbeat,
    )
    assert jax.local_device_count() == DEVICES_PER_PROCESS
    assert jax.device_count() == DEVICES_PER_PROCESS * options.processes

    def before_step(step):
        print("step", step, flush=True)
        if step == options.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    result = train(make_mesh(), before_step=before_step)
    np.savez(options.output, **parts(result))


if __name__ == "__main__":
    main()
