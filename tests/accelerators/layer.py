"""RMSNorm by itself, and rms: the least is 2x forward (read x, write y) and 3x backward (read x and dy, write dx)."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp

import rmsjax
from tests.accelerators.compiled import NAMES, Program, compiled
from tests.accelerators.markdown import cost, table, times
from tests.helpers.workloads import layers, naive_rms

SHAPES = [(8, 512, 768), (4, 1024, 4096), (65536, 128), (4, 2048, 16, 128)]
DTYPES = ["float32", "bfloat16", "float16"]


class Passes(NamedTuple):
    """What RMSNorm compiles to, in a program each as in training, and the bytes that the first keeps for the second."""

    forward_for_grad: Program
    backward: Program
    kept: int


def arguments(shape, dtype, *, scaled=True):
    """x and, if it is wanted, a scale in float32."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    return (x, jax.ShapeDtypeStruct(shape[-1:], jnp.float32)) if scaled else (x,)


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@cache
def forward(device, library, shape, dtype, epsilon=1e-6, *, scaled=True):
    """The program of the forward pass alone."""
    return compiled(device, layers(shape[-1], epsilon=epsilon)[library], *arguments(shape, dtype, scaled=scaled))


@cache
def passes(device, library, shape, dtype):
    args = arguments(shape, dtype)
    taped = partial(jax.vjp, layers(shape[-1])[library])
    y, pull = jax.eval_shape(taped, *args)
    first = compiled(device, without_what_passes_through(taped, *args), *args)
    return Passes(first, compiled(device, lambda pull, dy: pull(dy), pull, y), bytes_of(pull))


def without_what_passes_through(fn, *args):
    """fn without those of its results that are its arguments.

    A backward pass needs x, and has it where both passes are one program. By itself the forward pass would copy x to
    its results, which no training step does.
    """
    program = jax.make_jaxpr(fn)(*args)
    new = [i for i, var in enumerate(program.jaxpr.outvars) if not any(var is own for own in program.jaxpr.invars)]

    def rest(*args):
        results = jax.extend.core.jaxpr_as_fun(program)(*jax.tree.leaves(args))
        return [results[i] for i in new]

    return rest


@cache
def rms(device, library, shape, dtype, axis=None):
    """The program of rms(x, axis), or of the naive formula."""
    fn = {"rmsjax": rmsjax.rms, "naive": naive_rms}[library]
    return compiled(device, lambda x: fn(x, axis), *arguments(shape, dtype, scaled=False))


def report(device):
    """Tables of the layer and of rms."""
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES[:2]:
            unit = bytes_of(arguments(shape, dtype)[0])
            for library in layers(shape[-1]):
                first, (taped, backward, kept) = (
                    forward(device, library, shape, dtype),
                    passes(device, library, shape, dtype),
                )
                costs = [cost(first, unit), cost(taped, unit), times(kept, unit), cost(backward, unit)]
                rows.append([f"{shape} {dtype}", library, *costs, times(backward.temporary, unit)])
    columns = ["x", "", "forward", "forward for grad", "kept", "backward", "temporary memory"]
    yield table(f"RMSNorm by itself, {NAMES[device]}", columns, rows)
    rows = []
    for shape in SHAPES[1:3]:
        for dtype in DTYPES[:2]:
            unit = bytes_of(arguments(shape, dtype)[0])
            for axis in (None, -1):
                costs = [cost(rms(device, library, shape, dtype, axis), unit) for library in ("rmsjax", "naive")]
                rows.append([f"{shape} {dtype}", f"{axis}", *costs])
    yield table(f"rms(x, axis), {NAMES[device]}", ["x", "axis", "rmsjax", "naive formula"], rows)
