"""What the norm and the clip of a transformer send on 512 devices: compiled for that many, on any machine, and printed.

To be run in a process of its own, with `--xla_force_host_platform_device_count=512` in XLA_FLAGS.
"""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsjax
from tests.test_parallel import sent

LAYERS, WIDTH = 24, 4096


def gradients():
    """Shapes of a transformer with every matrix split both ways, and the norms' scales on every device."""
    mesh = jax.make_mesh((32, 16), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def split(spec, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    def layer():
        return {
            "scale": split(P(), WIDTH),
            "qkv": split(P("data", "model"), WIDTH, 3 * WIDTH),
            "out": split(P("model", "data"), WIDTH, WIDTH),
            "up": split(P("data", "model"), WIDTH, 4 * WIDTH),
            "down": split(P("model", "data"), 4 * WIDTH, WIDTH),
        }

    return [layer() for _ in range(LAYERS)]


if __name__ == "__main__":
    clip = rmsjax.clip_by_rms(1e-3)
    programs = {"norm": rmsjax.tree_rms, "clip": lambda grads: clip.update(grads, clip.init(grads))}
    print(json.dumps({name: sent(jax.jit(program), gradients()) for name, program in programs.items()}))
