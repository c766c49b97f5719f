"""Run all benchmarks, or those that are named, and print markdown."""

import argparse
import platform

import equinox
import flax
import jax
import optax

from tests.benchmarks import layer, norms, probe, record_rms, trees

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
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (jax, flax, optax, equinox))
    print(f"{platform.machine()}, {jax.default_backend()}, Python {platform.python_version()}, {versions}\n")
    for name in chosen:
        print(SECTIONS[name](), flush=True)


if __name__ == "__main__":
    main()
