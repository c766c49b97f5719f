"""`python -m rmsjax`: what the ruler is for, on real data.

Checks at several widths how the first steps of training change the activations of a small classifier of handwritten
digits, and gives the verdict; lays RMS and L2 norms side by side; trains each width with gradients clipped by RMS.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from rmsjax._text import wrapped

_SUFFIXES = (".png", ".pdf", ".svg")
_TAKES = "less than a minute"  # with the default arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help shows the arguments)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the description keeps its lines."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line, all of them checked."""

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    example = "example:\n  python -m rmsjax --widths 32 128 512 --steps 100 --out widths.svg"
    about = "\n\n".join(map(wrapped, (__doc__ or "").split("\n\n")))
    parser = _Parser(prog="python -m rmsjax", description=about, epilog=example, formatter_class=_Help)
    add, widths = parser.add_argument, [64, 128, 256, 512]
    add("--widths", type=positive, nargs="+", metavar="N", default=widths, help="two or more widths")
    add("--steps", type=positive, metavar="N", default=200, help="training steps for each width")
    add("--seed", type=int, metavar="N", default=0, help="seed of data split, initialisation and batches")
    add("--out", type=Path, metavar="PATH", default=Path("rmsjax.png"), help="a file, or a folder, for the picture")
    args = parser.parse_args(argv)
    if len(set(args.widths)) < 2 or len(set(args.widths)) < len(args.widths):
        parser.error(f"argument --widths: expected two or more different widths, got {args.widths}")
    if args.seed < 0:
        parser.error(f"argument --seed: {args.seed} is negative")
    if args.out.is_dir():
        args.out /= "rmsjax.png"
    if problem := _why_not_writable(args.out):
        parser.error(f"argument --out: {problem}")
    args.widths.sort()
    return args


def _why_not_writable(path: Path) -> str:
    """What keeps a picture from being written there; empty if nothing does."""
    if path.suffix.lower() not in _SUFFIXES:
        return f"expected a name that ends in {', '.join(_SUFFIXES)}, got {path}"
    if not path.absolute().parent.is_dir():
        return f"no folder {path.parent}"
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        return f"cannot write in folder {path.absolute().parent}: {error.strerror}"
    return f"cannot write to {path}" if path.exists() and not os.access(path, os.W_OK) else ""


def stop_at_once_on_ctrl_c() -> None:
    """Ctrl-C ends the program with one line and code 130, also while XLA compiles.

    A handler in Python would wait until the main thread is back from XLA, for seconds; and an exception that unwinds
    from there leaves XLA's threads to a dying interpreter. So a thread waits for the byte that the interpreter writes
    as soon as the signal is there.
    """
    told, telling = socket.socketpair()
    telling.setblocking(False)

    def wait() -> None:
        told.recv(1)
        os.write(2, b"\ninterrupted\n")
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()
    signal.set_wakeup_fd(telling.detach(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, train, print the tables, draw the picture."""
    args = parse(argv)
    listed = ", ".join(map(str, args.widths))
    print(wrapped(f"Checks and trains a classifier of handwritten digits at widths {listed}."), flush=True)
    try:
        for needed in ("matplotlib", "sklearn", "tqdm"):
            import_module(needed)
    except ImportError as error:
        print(f"python -m rmsjax needs {error.name}: pip install matplotlib scikit-learn tqdm", file=sys.stderr)
        return 2
    from rmsjax._demo import run

    try:
        run(args.widths, args.steps, args.seed, args.out)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    stop_at_once_on_ctrl_c()
    sys.exit(main())
