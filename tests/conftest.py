"""Set-up of the suite: eight devices on the CPU, strict promotion of dtypes and ranks."""

import gc
import os
import textwrap

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from rmsjax import _reduce

gc.set_threshold(100_000, 20, 100)  # what JAX keeps is a lot to look through, time and again


def pytest_configure(config):
    """What was compiled once is there for all workers, and for the next run; `--cache-clear` forgets it."""
    if hasattr(config, "cache"):
        options = {
            "jax_compilation_cache_dir": str(config.cache.mkdir("compiled")),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        for name, value in options.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)  # for processes that tests start


def pytest_report_header(config):
    """What a run leaves out, on the console of whoever started it."""
    if config.option.markexpr == "not slow":
        return [
            "the quick suite: every module and public name. Left out is what is marked slow: notebooks, code and main",
            "job of the README, several processes, and further types, widths and transformations of a kind.",
            "everything, which takes three times as long: python -m pytest -m 'slow or not slow'",
        ]
    return None


@pytest.fixture(autouse=True)
def strict():
    """No implicit promotion in any test. The examples in docstrings run as a user's program does."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def quick_compiles():
    """Compiling is most of the cost of many tests, and what LLVM makes of tiny loops is of no interest to them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick_programs(quick_compiles):
    """The exception within such a module: more is run than compiled."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def fresh_traces():
    """For a test that changes what the package does: it takes nothing that was traced before, and leaves nothing."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="module", params=["cpu", "cuda", "tpu"])
def form(request):
    """The platform whose form of the arithmetic is taken; all of them run on a CPU, as if it were a single device."""
    with pytest.MonkeyPatch.context() as patch:
        jax.clear_caches()
        patch.setattr(_reduce, "FORM", request.param)
        patch.setattr(jax, "device_count", lambda: 1)
        yield request.param
    jax.clear_caches()


@pytest.fixture
def x64():
    """Within the test, JAX has 64-bit types."""
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable(True):
        yield


def pytest_terminal_summary(terminalreporter):
    """The functions of tests/test_transform_matrix.py times transformations, if any of them ran, on whatever worker."""
    rows = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                rows |= {row: cells for name, (row, cells) in report.user_properties if name == "transform_matrix"}
    if rows:
        terminalreporter.section("functions x transformations")
        for line in _matrix(rows):
            terminalreporter.write_line(line)


def _matrix(rows):
    """A line for each function: + is a pass, ! a failure, - a transformation that does not apply; then the reasons."""
    numbered = [f"{number} {transform}" for number, (transform, _) in enumerate(next(iter(rows.values())), 1)]
    yield from textwrap.wrap(", ".join(numbered), 110)
    width = max(map(len, rows))
    yield " " * width + "".join(f"{number:3}" for number in range(1, len(numbered) + 1))
    reasons = {}
    for row, cells in sorted(rows.items()):
        yield row.ljust(width) + "".join(f"{text[0]:>3}" for _, text in cells)
        for number, (_, text) in enumerate(cells, 1):
            if text != "+":
                reasons.setdefault(f"{text[0]} {row}: {text[2:]}", []).append(str(number))
    yield from (f"{reason} ({', '.join(numbers)})" for reason, numbers in reasons.items())
    marks = [text[0] for cells in rows.values() for _, text in cells]
    yield f"{marks.count('+')} cells right, {marks.count('!')} wrong, {marks.count('-')} not applicable"
