"""Norms, clips and steps of trees: each leaf is read as often as it must be, in no more kernels than Optax's."""

import itertools

import pytest

from tests.accelerators.trees import LIBRARIES, program, size
from tests.helpers.marks import slow

GPT2, MEDIUM, SMALL, LARGE = "GPT-2 small", "200 of 256x256", "500 of 64", "20 of 1024x1024"


def pair(device, tree, what):
    return (program(device, tree, what, library) for library in LIBRARIES[what])


@pytest.mark.parametrize("tree", [GPT2, MEDIUM])
def test_norm_h100(h100, tree):
    ours, optax = pair(h100, tree, "norm")
    assert ours.bytes <= 1.1 * size(tree)
    assert ours.kernels <= optax.kernels


def test_norm_of_small_leaves_h100(h100):
    ours = program(h100, SMALL, "norm", "rmsjax")
    assert ours.bytes <= 1.1 * size(SMALL)
    assert ours.kernels <= 20


@pytest.mark.parametrize("tree", [GPT2, MEDIUM, SMALL])
def test_global_clip_h100(h100, tree):
    ours, optax = pair(h100, tree, "global clip")
    assert ours.bytes <= 3.1 * size(tree)
    assert ours.kernels <= optax.kernels


@pytest.mark.parametrize("tree", [GPT2, MEDIUM])
def test_block_clip_h100(h100, tree):
    ours, optax = pair(h100, tree, "block clip")
    assert ours.bytes <= 3.1 * size(tree)
    assert ours.kernels <= 0.6 * optax.kernels  # of which the numbers of the state have a few


def test_block_clip_of_small_leaves_h100(h100):
    ours = program(h100, SMALL, "block clip", "rmsjax")
    assert ours.bytes <= 4 * size(SMALL)
    assert ours.kernels <= 100


@pytest.mark.parametrize("tree", [LARGE, slow(MEDIUM), slow(GPT2)])
@pytest.mark.parametrize(
    ("what", "most"),
    [
        ("AdamW with global clip", 8.1),
        ("record, clip, AdamW", 8.1),
        ("clip, AdamW, record", 11.1),
        ("stable_adamw", 9.2),
    ],
)
def test_optimizers_h100(h100, tree, what, most):
    """The least is 7x for AdamW: parameters, gradients and two moments are read, all but the gradients are written."""
    assert program(h100, tree, what, "rmsjax").bytes <= most * size(tree)


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("record, AdamW", 1.05),  # gradients, which are in memory, are read once more at most
        ("AdamW, record of the ratio", 0.1),  # steps and parameters are in registers
    ],
)
def test_a_record_in_a_step(device, what, more):
    """What is written down of large leaves beside AdamW, that of two norms of each as well."""
    ours, optax = pair(device, LARGE, what)
    assert ours.bytes <= optax.bytes + more * size(LARGE)


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        *itertools.product([GPT2, MEDIUM, LARGE], ["norm", "global clip", "block clip"]),
        (LARGE, "AdamW with global clip"),
        slow(GPT2, "AdamW with global clip"),
        slow(MEDIUM, "AdamW with global clip"),
    ],
)
def test_traffic_of_optax_v5e(v5e, tree, what):
    ours, optax = pair(v5e, tree, what)
    assert ours.bytes <= 1.04 * optax.bytes
