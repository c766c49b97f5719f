"""Four RMSNorms where they are used, in a bfloat16 transformer: what they add to the same model without a norm."""

from functools import cache
from typing import NamedTuple

import jax

from tests.accelerators.compiled import NAMES, Program, compiled
from tests.accelerators.markdown import table, times
from tests.helpers.workloads import layers, scale_alone, transformer, transformer_shapes

PARAMS, X = transformer_shapes()
UNIT = X.size * X.dtype.itemsize


class Model(NamedTuple):
    forward: Program
    gradient: Program


@cache
def model(device, library):
    """The programs of the transformer with the norm of a library, or without one: "none"."""
    norm = (layers(X.shape[-1]) | {"none": scale_alone})[library]
    forward, gradient = transformer(norm)
    return Model(compiled(device, forward, PARAMS, X), compiled(device, gradient, PARAMS, X, X))


def beyond(device, library):
    """Bytes forward and for the gradient beyond those of the model without a norm."""
    pairs = zip(model(device, library), model(device, "none"), strict=True)
    return tuple(program.bytes - bare.bytes for program, bare in pairs)


def report(device):
    rows = []
    for library in [*layers(X.shape[-1]), "none"]:
        forward, gradient = model(device, library)
        more = ["", ""] if library == "none" else [f"{extra / UNIT:+.2f}x" for extra in beyond(device, library)]
        shown = [(more[0], forward), (more[1], gradient)]
        cells = [f"{extra} ({p.kernels} kernels, {times(p.bytes, UNIT)})".strip() for extra, p in shown]
        rows.append([library, *cells, times(gradient.temporary, UNIT), f"{gradient.seconds:.1f} s"])
    title = f"Four RMSNorms in a transformer, {jax.numpy.dtype(X.dtype).name} {X.shape}, {NAMES[device]}"
    yield table(title, ["", "forward", "gradient", "temporary memory", "compiling the gradient"], rows)
