"""Run all benchmarks, or those that are named, and print one table in markdown."""

import argparse
import itertools
import os
import platform

import equinox
import flax
import jax
import lineax
import optax

from tests.benchmarks import layer, norms, probe, record_rms, trees
from tests.benchmarks.timing import table
from tests.benchmarks.torch_peer import torch

SECTIONS = {
    "layer": layer.run,
    "norms": norms.run,
    "import": norms.import_time,
    "leaves": trees.many_leaves,
    "gpt2": trees.large_leaves,
    "probe": probe.run,
    "record": record_rms.run,
}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="all without a name")
    chosen = parser.parse_args().sections or list(SECTIONS)
    modules = [jax, flax, optax, equinox, lineax, *([torch] if torch else [])]
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in modules)
    cores = f"{os.cpu_count()} cores of {platform.machine()}"
    print(f"{cores}, {jax.default_backend()}, Python {platform.python_version()}, {versions}\n")
    print(table(itertools.chain.from_iterable(SECTIONS[name]() for name in chosen)))


if __name__ == "__main__":
    main()
