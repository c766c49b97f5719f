"""Norm, clips and optimizer steps of trees: traffic in units of the size of the tree, and seconds to compile."""

import statistics
from functools import cache

import jax

from tests.accelerators.compiled import NAMES, compiled
from tests.accelerators.markdown import cost, table
from tests.helpers.workloads import TREES, clips, norms, optimizers, step, tree_of

LIBRARIES = {"norm": norms(), **clips(), **optimizers()}


def size(tree):
    """Bytes of a tree by its name."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in tree_of(TREES[tree]).values())


def program_of(device, tree, what, library):
    """The program of `library` that does this with the tree of this name."""
    leaves, subject = tree_of(TREES[tree]), LIBRARIES[what][library]
    if what == "norm":
        return compiled(device, subject, leaves)
    state = jax.eval_shape(subject.init, leaves)
    if what in clips():
        return compiled(device, subject.update, leaves, state)
    return compiled(device, step(subject), leaves, leaves, state)


program = cache(program_of)


def seconds(device, tree, what, rounds=3):
    """Medians of the seconds to compile with each library, which take turns; nothing is kept from turn to turn."""
    found = {library: [] for library in LIBRARIES[what]}
    for _ in range(rounds):
        for library, times in found.items():
            jax.clear_caches()
            times.append(program_of(device, tree, what, library).seconds)
    return {library: statistics.median(times) for library, times in found.items()}


def report(device):
    """Optax's nearest beside each, by the time that it takes to compile as well."""
    for tree in TREES:
        rows = []
        for what, libraries in LIBRARIES.items():
            _, peer = libraries
            compiling = seconds(device, tree, what)
            cells = [
                f"{cost(program(device, tree, what, name), size(tree))}, {compiling[name]:.1f} s" for name in libraries
            ]
            note = peer.removeprefix("optax").strip(", ")
            ratio = compiling["rmsjax"] / compiling[peer]
            rows.append([what, cells[0], cells[1] + (f" ({note})" if note else ""), f"{ratio:.2f}x"])
        yield table(f"{tree}, {NAMES[device]}", ["", "rmsjax", "optax", "to compile"], rows)
