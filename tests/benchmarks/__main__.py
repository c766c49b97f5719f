"""Run all benchmarks, or those that are named, and print one table in markdown.

`gpu`, `spikes` and `mistakes` are commands by themselves, with options of their own.
"""

import argparse
import importlib
import itertools
import os
import platform
import sys

import jax

from tests.benchmarks.timing import table, versions

# Modules are imported when they are run, since not every machine has all peers.
SECTIONS = {
    "layer": "layer.run",
    "norms": "norms.run",
    "import": "norms.import_time",
    "leaves": "trees.many_leaves",
    "gpt2": "trees.large_leaves",
    "probe": "probe.run",
    "record": "record_rms.run",
}


def function(name):
    module, attribute = name.split(".")
    return getattr(importlib.import_module(f"tests.benchmarks.{module}"), attribute)


def main():
    if sys.argv[1:2] in (["gpu"], ["spikes"], ["mistakes"]):
        return function(f"{sys.argv[1]}.main")(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="all without a name")
    chosen = parser.parse_args().sections or list(SECTIONS)
    cores = f"{os.cpu_count()} cores of {platform.machine()}"
    print(f"{cores}, {jax.default_backend()}, {versions()}\n")
    print(table(itertools.chain.from_iterable(function(SECTIONS[name])() for name in chosen)))
    return None


if __name__ == "__main__":
    main()
