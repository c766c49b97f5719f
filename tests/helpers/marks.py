"""What the quick suite leaves out. A whole test is `@pytest.mark.slow`; here are its cases."""

import pytest


def slow(*values):
    """A case of `pytest.mark.parametrize` that is no part of the quick suite."""
    return pytest.param(*values, marks=pytest.mark.slow)


def quick_of(cases, *quick):
    """Cases, of which those that are named are in the quick suite."""
    return [case if case in quick else slow(case) for case in cases]


# Of the forms that the fixture `form` gives, those of accelerators.
QUICK_ON_CPU = pytest.mark.parametrize("form", ["cpu", slow("cuda"), slow("tpu")], indirect=True)
