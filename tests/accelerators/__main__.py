"""Compile the layer, the transformer and the trees for devices that are not here, and print tables in markdown.

x is the traffic of reading or writing the input once: x of the layer and the transformer, all leaves of a tree.
"""

import argparse

import flax
import jax
import optax

from tests.accelerators import block, compiled, layer, trees

PARTS = {"layer": layer.report, "block": block.report, "trees": trees.report}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.accelerators", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*compiled.NAMES, *PARTS, []], help="devices and parts, or all")
    names = parser.parse_args().names
    devices = [name for name in compiled.NAMES if name in names] or list(compiled.NAMES)
    parts = [name for name in PARTS if name in names] or list(PARTS)
    for name in devices:
        if reason := compiled.missing(name):
            parser.exit(1, f"{compiled.NAMES[name]}: {reason}\n")
    print(f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}\n")
    for name in devices:
        for part in parts:
            for table in PARTS[part](name):
                print(table, flush=True)


if __name__ == "__main__":
    main()
