"""How good a judge `coord_check` is, of the zoo in `helpers/zoo.py`: mistakes found, false alarms, causes, seconds.

Each configuration is checked by itself, with several sets of seeds, in one of several processes. A mistake is found if
the verdict is another than "level", and named if the first cause is one of those that were planted.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

SEEDS = 3  # in a set


class Score(NamedTuple):
    """Of one configuration: what each set of seeds says, and the seconds that the first takes."""

    index: int
    found: list[bool]
    named: list[bool]
    causes: list[str]
    seconds: float


def configs():
    from tests.helpers import zoo

    return [*zoo.MISTAKES, *zoo.RIGHT]


def is_chosen(config, names):
    return not names or any(fnmatch(f"{config.model} {config.name}", name) for name in names)


def file_name(config):
    words = [config.model, config.optimizer, "mistake" if config.cause else "right", config.name]
    return re.sub(r"[^\w+-]+", "-", "-".join(words))


def score(sets, folder, index):
    import rmsjax

    config = configs()[index]
    found, named, causes, seconds = [], [], [], 0.0
    for k in range(sets):
        path = folder and folder / f"{file_name(config)}-{k}.npz"
        if path and path.exists():
            record = rmsjax.WidthRecord.load(path)
        else:
            start = time.perf_counter()
            record = config.check(seeds=range(SEEDS * k, SEEDS * (k + 1)))
            seconds = seconds or time.perf_counter() - start
            if path:
                record.save(path)
        first = record.findings[0] if record.findings else None
        found.append(first is not None)
        named.append(first is not None and config.is_cause(first.name))
        causes.append(str(first or "level"))
    return Score(index, found, named, causes, seconds)


def _start_process(cores):
    """Two cores for each process, where the machine has that many: the times are then those of two cores."""
    with contextlib.suppress(AttributeError):  # not on every system
        available = sorted(os.sched_getaffinity(0))
        first = 2 * cores.get() % max(len(available) - 1, 1)
        os.sched_setaffinity(0, available[first : first + 2])


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks mistakes", description=__doc__)
    parser.add_argument("names", nargs="*", help="patterns, such as 'mlp*' or '*tied*'; all without one")
    parser.add_argument("--half", choices=["tuned", "held-out"], help="the half of the zoo; both without it")
    parser.add_argument("--kind", choices=["right", "mistakes"], help="both without it")
    parser.add_argument("--sets", type=int, default=2, help="sets of seeds")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--records", type=Path, help="a folder that keeps the records, and has those of an earlier run")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args(arguments)
    chosen = [
        i
        for i, config in enumerate(configs())
        if given.half in (None, config.half)
        and given.kind in (None, "mistakes" if config.cause else "right")
        and is_chosen(config, given.names)
    ]
    if given.records:
        given.records.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.Queue()
    for job in range(given.jobs):
        cores.put(job)
    scores = []
    with ProcessPoolExecutor(given.jobs, spawn, _start_process, (cores,)) as pool:
        for result in pool.map(partial(score, given.sets, given.records), chosen):
            scores.append(result)
            print(line(result, markdown=given.markdown), flush=True)
    print("\n" + summary(scores, markdown=given.markdown))


def line(score, *, markdown=False):
    config = configs()[score.index]
    right = all(score.named) if config.cause else not any(score.found)
    causes = "; ".join(dict.fromkeys(score.causes))
    what = [config.half, config.model, config.optimizer, config.name, "mistake" if config.cause else "right"]
    cells = [*what, f"{sum(score.found)}/{len(score.found)}", f"{sum(score.named)}" if config.cause else ""]
    cells += ["" if right else "!", f"{score.seconds:.0f} s", causes]
    return ("| " + " | ".join(cells) + " |") if markdown else "  ".join(cells)


def summary(scores, *, markdown=False):
    rows = [["half", "model", "mistakes found", "cause named", "false alarms", "seconds: median, most"]]
    for half in ("tuned", "held-out"):
        for model in (None, "mlp", "scan", "linen", "transformer", "conv"):
            cells = summed(half, model, scores)
            if cells:
                rows.append(cells)
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) for row in rows)


def summed(half, model, scores):
    everything = configs()
    mine = [s for s in scores if everything[s.index].half == half and model in (None, everything[s.index].model)]
    if not mine:
        return None
    mistakes, right = ([s for s in mine if bool(everything[s.index].cause) == planted] for planted in (True, False))

    def share(values):
        values = [value for part in values for value in part]
        return f"{sum(values)} of {len(values)} ({sum(values) / len(values):.0%})" if values else ""

    seconds = sorted(s.seconds for s in mine)
    return [
        half, model or "all", share(s.found for s in mistakes), share(s.named for s in mistakes),
        share(s.found for s in right), f"{seconds[len(seconds) // 2]:.0f}, {seconds[-1]:.0f}",
    ]  # fmt: skip
