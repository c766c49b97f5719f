"""Times as ratios: competitors take turns in one process, and only medians of one run are compared."""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax


def interleaved(calls: Mapping[str, Callable[[], Any]], *, repeats: int = 11, warm_up: int = 2) -> dict[str, float]:
    """The median time of each call in milliseconds. In every round each has its turn, so that noise hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for _ in range(warm_up + repeats):
        order = order[1:] + order[:1]  # nobody always comes after the same one, and finds the memory as that left it
        for name, call in order:
            times[name].append(_seconds(call) * 1e3)
    return {name: statistics.median(values[warm_up:]) for name, values in times.items()}


def recycled(fn: Callable[..., Any], *args: Any, kept: list[Any]) -> Callable[[], Any]:
    """A call of fn(*args) that writes its outputs into those of the call before, by donation: no page faults.

    kept: a list of one, the outputs of the call before, made by `memory_for`. Competitors share it: where memory lies
    can make half as much difference again.
    """

    def with_buffers(buffers: Any, *args: Any) -> Any:
        del buffers
        return fn(*args)

    jitted = jax.jit(with_buffers, donate_argnums=0, keep_unused=True)

    def call() -> Any:
        kept[0] = jitted(kept[0], *args)
        return kept[0]

    return call


def memory_for(*outputs: Any) -> list[Any]:
    """What `recycled` writes to, for outputs like these."""
    like = outputs if len(outputs) > 1 else outputs[0]
    return [jax.tree.map(lambda x: x + 0, like)]


def compile_time(jitted: Any, *args: Any) -> float:
    """Seconds to trace, lower and compile a jitted function; its calls use the program."""
    return _seconds(lambda: jitted.lower(*args).compile())


def trace_time(jitted: Any, *args: Any) -> float:
    """Seconds to trace a jitted function."""
    return _seconds(lambda: jitted.trace(*args))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def temporary(compiled: Any) -> float:
    """The temporary memory of a compiled program in MB."""
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


class Row(NamedTuple):
    """A line of the table: what is measured, of rmsjax and of others, and how many times less it is of rmsjax."""

    what: str
    ours: str
    others: str
    gain: str


def row(what: str, values: Mapping[str, float], unit: str = "ms", *, floor: str = "") -> Row:
    """Values of which less is better; those of the others in one cell, and the gain over the best of them, if any.

    floor: the name of one that does no more than read and write as much, which is shown, and is no competitor.
    """
    others = {name: value for name, value in values.items() if name != "rmsjax"}
    shown = ", ".join(f"{name} {value:.3g}" for name, value in others.items())
    competitors = [value for name, value in others.items() if name != floor]
    gain = min(competitors) / values["rmsjax"] if competitors else None
    factor = "" if gain is None else f"{gain:.2f}x" if gain < 100 else f"{gain:.0f}x"
    return Row(f"{what}, {unit}", f"{values['rmsjax']:.3g}", shown, factor)


def table(rows: Iterable[Row]) -> str:
    """A table in markdown."""
    lines = [("what", "rmsjax", "others", "gain"), ("---",) * 4, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def versions() -> str:
    """Those of Python and of all libraries that are compared, of the ones that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in ("jax", "flax", "optax", "equinox", "lineax", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
