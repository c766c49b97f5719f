"""Norm, clips and optimizer steps of trees: traffic in units of the size of the tree."""

from functools import cache

import jax

from tests.accelerators.compiled import NAMES, compiled
from tests.accelerators.markdown import cost, table
from tests.workloads import TREES, clips, norms, optimizers, step, tree_of

LIBRARIES = {"norm": norms(), **clips(), **optimizers()}


def size(tree):
    """Bytes of a tree by its name."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in tree_of(TREES[tree]).values())


@cache
def program(device, tree, what, library):
    """The program of `library` that does this with the tree of this name."""
    leaves, subject = tree_of(TREES[tree]), LIBRARIES[what][library]
    if what == "norm":
        return compiled(device, subject, leaves)
    state = jax.eval_shape(subject.init, leaves)
    if what in clips():
        return compiled(device, subject.update, leaves, state)
    return compiled(device, step(subject), leaves, leaves, state)


def report(device):
    """Optax's nearest beside each, by the time that it takes to compile as well."""
    for tree in TREES:
        rows = []
        for what, libraries in LIBRARIES.items():
            ours, theirs = (program(device, tree, what, library) for library in libraries)
            _, peer = libraries
            cells = [f"{cost(p, size(tree))}, {p.seconds:.1f} s" for p in (ours, theirs)]
            note = peer.removeprefix("optax").strip(", ")
            rows.append([what, cells[0], cells[1] + (f" ({note})" if note else "")])
        yield table(f"{tree}, {NAMES[device]}", ["", "rmsjax", "optax"], rows)
