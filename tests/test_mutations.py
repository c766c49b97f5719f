"""The mutations are what they say, and those by hand still have their places."""

import ast

import pytest

from tests.mutations import MODULES, NAMED, by_hand, by_rule, source_of

SOURCE = '''
def f(x: int = 1, *, axis: "1 + 1" = None):
    """1 + 1"""
    if not 0 < x <= 2 or x is None:
        raise ValueError(f"{x + 1}")
    check(x)
    return [-jnp.sqrt(y) for y in g(x, é, keepdims=True) if y] + list(zip(x, x, strict=True))
'''
MUTATED = [
    ("x: int = 1", "x: int = 2"),
    ("if not 0 < x <= 2 or x is None", "if (not (not 0 < x <= 2 or x is None))"),
    ("if not 0 < x <= 2 or x is None", "if ((not 0 < x <= 2) and (x is None))"),
    ("not 0 < x <= 2", "(0 < x <= 2)"),
    ("0 < x", "0 <= x"),
    ("x <= 2", "x < 2"),
    ("0 < x", "1 < x"),
    ("x <= 2", "x <= 3"),
    ("x is None", "x is not None"),
    ("check(x)", "..."),
    ("] + list", "] - list"),
    ("-jnp.sqrt(y)", "(jnp.sqrt(y))"),
    ("jnp.sqrt(y)", "(y)"),
    ("if y]", "if (not (y))]"),
    ("keepdims=True", ""),
    (", é", ""),
    ("keepdims=True", "keepdims=False"),
    ("zip(x, x,", "zip(x,"),
]


def test_every_rule():
    """These and no other: what is said, and what a type is, stays."""
    found = [mutation.applied(SOURCE) for mutation in by_rule("module", SOURCE)]
    assert sorted(found) == sorted(SOURCE.replace(old, new) for old, new in MUTATED)


@pytest.mark.parametrize("module", NAMED)
def test_mutations_by_hand_have_one_place_each(module):
    source = source_of(module)
    for mutation in by_hand(module, source):
        assert mutation.applied(source) != source
        ast.parse(mutation.applied(source))


@pytest.mark.parametrize("module", MODULES)
def test_some_of_each_module_are_python(module):
    source = source_of(module)
    for mutation in list(by_rule(module, source))[::20]:
        ast.parse(mutation.applied(source))
