"""The loops that the GPU benchmark times: as much is done in each repetition as in a program by itself."""

import jax
import jax.numpy as jnp
import pytest

from tests.accelerators.compiled import compiled
from tests.benchmarks.gpu import copied, looped
from tests.helpers.workloads import TREES, clips, norms, optimizers, step, tree_of

TREE = tree_of(TREES["20 of 1024x1024"])


def norm(library):
    return lambda _, tree: norms()[library](tree), jax.ShapeDtypeStruct((), jnp.float32)


def clip(library):
    tx = clips()["global clip"][library]
    return lambda carry, tree: tx.update(tree, carry[1]), (TREE, jax.eval_shape(tx.init, TREE))


def adamw(library):
    tx = optimizers()["AdamW with global clip"][library]
    return lambda carry, tree: step(tx)(carry[0], tree, carry[1]), (TREE, jax.eval_shape(tx.init, TREE))


@pytest.mark.parametrize("library", ["rmsjax", "optax"])
@pytest.mark.parametrize("work", [norm, clip, adamw])
def test_nothing_is_taken_out_of_the_loop_and_nothing_is_copied(h100, work, library):
    taken, carry = work(library)
    check(h100, taken, carry, (TREE,))


def test_copy(h100):
    work = copied(2**28)
    assert compiled(h100, work.step, work.carry, *work.args).bytes == 2**28
    check(h100, *work)


def check(device, step, carry, args):
    alone = compiled(device, lambda carry, args: step(carry, *args), carry, args)
    ten, twenty = (compiled(device, looped(step, times), carry, args) for times in (10, 20))
    assert (twenty.bytes - ten.bytes) / 10 == pytest.approx(alone.bytes, rel=0.01)
    assert (twenty.kernels - ten.kernels) / 10 <= alone.kernels + 2  # the count of the loop is one
