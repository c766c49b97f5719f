"""What no test would notice: `python -m tests.mutations` breaks `rmsjax` in one place at a time, and names survivors.

A mutation is a small change of the source: another operator or constant, a negated condition, a call without one of
its arguments. The quick tests that run its line try it, cheapest first, and after them the others of their files, up
to a budget of seconds. A mutation under which all of them pass has survived: a test is missing, or the code does what
nobody needs. `NAMED` has mutations that are no such slips, each of which survived once.

    python -m tests.mutations --files _reduce _norm --sample 100 --seed 1 --jobs 16

It needs Python 3.12, the checkout, what the package requires, pytest and hypothesis. Tests that fail by themselves on
the machine, for want of another package say, are left out.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rmsjax"
CACHE = ROOT / ".pytest_cache" / "mutations"
MODULES = ("_reduce", "_norm", "_pools", "_tree", "_updates", "_clips", "_stable_adam", "_hyperball", "_transforms")


class Mutation(NamedTuple):
    """The source of a module from `start` to `stop` replaced by other text."""

    module: str
    line: int
    start: int
    stop: int
    text: str
    what: str

    def __str__(self):
        return f"{self.module}.py:{self.line}: {self.what}"

    def applied(self, source):
        return source[: self.start] + self.text + source[self.stop :]


# -------------------------------------------------------------------------------------------------------- by hand

NAMED = {
    "_coord_check": {
        "return lifted(x) - lifted(y)": "return x - y",
    },
    "_models": {
        "x = jnp.moveaxis(x, shards, range(loops, len(axes)))": "pass",
        "if type(self) is cls else None": "if isinstance(self, cls) else None",
    },
    "_tags": {
        ', policy=eqn.params["policy"])': ")",
        ', unroll=params["unroll"]': "",
        "choices = known": "pass",
    },
    "_tree": {'key = i if choice == "block" else choice': "key = choice"},
    "_training": {"return optax.with_extra_args_support(optimizer)": "return optimizer"},
    "_updates": {"newest = jnp.asarray(1 - decay, dtype)": "newest = 1 - jnp.asarray(decay, dtype)"},
}


def by_hand(module, source):
    for old, new in NAMED.get(module, {}).items():
        if source.count(old) != 1:
            raise ValueError(f"NAMED: {module} must have this once, found {source.count(old)} times: {old}")
        start = source.index(old)
        line = source.count("\n", 0, start) + 1
        yield Mutation(module, line, start, start + len(old), new, f"{old} -> {new or 'nothing'}")


# ------------------------------------------------------------------------------------------------------- by rule

OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip


def by_rule(module, source):
    """All mutations of a module: none of docstrings, types, or what an error says."""
    lines = source.splitlines(keepends=True)
    starts = [0, *accumulate(map(len, lines))]

    def offset(line, column):
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())  # ast counts bytes

    def span(node):
        return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)

    def text(node):
        return source[slice(*span(node))]

    def change(node, start, stop, new):
        old, replaced = (" ".join(words.split())[:60] or "nothing" for words in (source[start:stop], new))
        what = f"{old} -> {replaced} in {lines[node.lineno - 1].strip()[:90]}"
        return Mutation(module, node.lineno, start, stop, new, what)

    def operator(node, left, op, right):
        old, new = OPERATORS.get(type(op), ("", ""))
        gap = slice(span(left)[1], span(right)[0])
        if old and (found := re.search(re.escape(old), source[gap])):
            yield change(node, gap.start + found.start(), gap.start + found.end(), new)

    def of_call(node):
        for keyword in node.keywords:
            if keyword.arg is not None and not is_beside_the_point(keyword):
                start, stop = span(keyword)
                yield change(node, start, stop + re.match(r",?\s*", source[stop:]).end(), "")
        if len(node.args) > 1:
            yield change(node, span(node.args[-2])[1], span(node.args[-1])[1], "")
        elif len(node.args) == 1 and not node.keywords and is_of_a_library(node.func) and not is_starred(node.args[0]):
            yield change(node, *span(node), f"({text(node.args[0])})")

    def of(node):
        if isinstance(node, ast.BinOp):
            yield from operator(node, node.left, node.op, node.right)
        elif isinstance(node, ast.Compare):
            for (left, right), op in zip(pairwise([node.left, *node.comparators]), node.ops, strict=True):
                yield from operator(node, left, op, right)
        elif isinstance(node, ast.BoolOp):
            joint = " or " if isinstance(node.op, ast.And) else " and "
            yield change(node, *span(node), f"({joint.join(f'({text(value)})' for value in node.values)})")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            yield change(node, *span(node), f"({text(node.operand)})")
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            value = node.value
            new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value or 1.0
            yield change(node, *span(node), repr(new))
        elif isinstance(node, ast.Call):
            yield from of_call(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield change(node, *span(node), "...")
        conditions = [getattr(node, "test", None)] if not isinstance(node, ast.Assert) else []
        for condition in [*conditions, *getattr(node, "ifs", [])]:
            if condition is not None:
                yield change(condition, *span(condition), f"(not ({text(condition)}))")

    def walk(node):
        yield from of(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not is_beside_the_point(child):
                    yield from walk(child)

    seen = set()
    for mutation in walk(ast.parse(source)):
        if (key := (mutation.start, mutation.stop, mutation.text)) not in seen:
            seen.add(key)
            yield mutation


def is_starred(node):
    return isinstance(node, ast.Starred)


def is_of_a_library(function):
    """Whether it is a function such as `jnp.sqrt`, which a mutation leaves out."""
    return isinstance(function, ast.Attribute) and ast.unparse(function.value) in ("jnp", "lax", "np", "math")


def is_beside_the_point(node):
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.FunctionDef):
        return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)
    if isinstance(node, ast.keyword):
        return node.arg == "strict"  # a check that never fails
    return isinstance(node, (ast.Raise, ast.JoinedStr))


def source_of(module):
    return (PACKAGE / f"{module}.py").read_text("utf-8")


def mutations_of(module):
    return [*by_hand(module, source_of(module)), *by_rule(module, source_of(module))]


# ------------------------------------------------------------------------------------------------- which tests run it


class Recorder:
    """A plugin of pytest: the lines of the package that each test runs, and the seconds of a processor it takes."""

    def __init__(self, path):
        self.path, self.tests, self.lines = path, {}, set()
        sys.monitoring.use_tool_id(sys.monitoring.COVERAGE_ID, "rmsjax mutations")
        sys.monitoring.register_callback(sys.monitoring.COVERAGE_ID, sys.monitoring.events.LINE, self.line)
        sys.monitoring.set_events(sys.monitoring.COVERAGE_ID, sys.monitoring.events.LINE)

    def line(self, code, number):
        file = Path(code.co_filename)
        if file.parent == PACKAGE:
            self.lines.add(f"{file.stem}:{number}")
        return sys.monitoring.DISABLE  # until the next test

    def pytest_runtest_logstart(self, nodeid):
        self.lines.clear()
        sys.monitoring.restart_events()
        self.tests[nodeid] = {"seconds": time.process_time(), "passed": True}

    def pytest_runtest_logreport(self, report):
        found = self.tests[report.nodeid]
        found["passed"] &= report.outcome == "passed"
        found["lines"] = sorted(self.lines)

    def pytest_runtest_logfinish(self, nodeid):
        self.tests[nodeid]["seconds"] = time.process_time() - self.tests[nodeid]["seconds"]

    def pytest_sessionfinish(self):
        Path(self.path).write_text(json.dumps(self.tests))


def pytest_configure(config):
    """This module is a plugin where it is asked for by `-p tests.mutations`."""
    config.pluginmanager.register(Recorder(os.environ["RMSJAX_RECORD"]))


def run_pytest(folder, *arguments, limit=None, **env):
    """The exit code of pytest in a copy of the checkout, and what it said: without the options that are for people.

    All copies keep compiled programs in one place, so only what a mutation has changed is compiled anew.
    """
    options = "--doctest-modules --ignore=rmsjax/__main__.py --import-mode=importlib"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", f"cache_dir={CACHE}", "-o", f"addopts={options}"]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"} | env
    try:
        done = subprocess.run(
            [*command, "-m", "not slow", *arguments], cwd=folder, env=env, timeout=limit, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "timeout", ""
    return done.returncode, done.stdout


def record(files, jobs):
    """Each test that passes: its seconds, and the lines that it runs. One process for each file, since what JAX has
    traced in one test it does not trace again in the next.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def of_file(file):
            path = Path(folder) / file.replace("/", "_")
            more = ("--maxfail=1000", "--continue-on-collection-errors", "-p", "tests.mutations")
            run_pytest(ROOT, *more, file, RMSJAX_RECORD=str(path))
            return json.loads(path.read_text()) if path.exists() else {}

        found = {}
        for tests in pool.map(of_file, files):
            found |= {name: test for name, test in tests.items() if test["passed"] and test.get("lines")}
        return found


def tests_for(mutation, recorded, budget):
    """The tests that run the line of a mutation, then all others of their files that run its module."""
    line, module = f"{mutation.module}:{mutation.line}", f"{mutation.module}:"
    of_module = {name: t for name, t in recorded.items() if any(at.startswith(module) for at in t["lines"])}
    direct = {name for name, test in of_module.items() if line in test["lines"]}
    # A line that only an import runs has no tests of its own.
    files = {name.split("::")[0] for name in direct or of_module}
    beside = {name for name in of_module if name.split("::")[0] in files} - direct
    chosen, seconds = [], 0.0
    for group in (direct, beside):
        for name in sorted(group, key=lambda name: recorded[name]["seconds"]):
            seconds += recorded[name]["seconds"]
            if chosen and seconds > budget:
                return chosen, budget
            chosen.append(name)
    return chosen, seconds


# ------------------------------------------------------------------------------------------------------------ the run


def copied(folder):
    """A copy of the checkout to break."""
    for name in ("rmsjax", "tests", "notebooks", ".github", "pyproject.toml", "README.md"):
        source, target = ROOT / name, Path(folder) / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target)
    return Path(folder)


def tried(mutation, folder, recorded, budget):
    """ "killed", "survived" or "timeout", which is killed too, and what pytest said at last."""
    tests, seconds = tests_for(mutation, recorded, budget)
    if not tests:
        return "survived", "no test runs it"
    path = folder / "rmsjax" / f"{mutation.module}.py"
    source = path.read_text("utf-8")
    path.write_text(mutation.applied(source), "utf-8")
    (folder / "chosen").write_text("\n".join(tests))
    try:
        code, output = run_pytest(folder, f"@{folder / 'chosen'}", limit=60 + 10 * seconds)
    finally:
        path.write_text(source, "utf-8")
    last = output.strip().splitlines()[-1] if output.strip() else ""
    return "timeout" if code == "timeout" else "survived" if code == 0 else "killed", last


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--files", nargs="+", default=MODULES, metavar="MODULE", help="of rmsjax (default: %(default)s)"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="try so many, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--named", action="store_true", help="try those of NAMED alone, of all modules")
    parser.add_argument("--match", metavar="REGEX", help="try only mutations whose description it is found in")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="of these files alone (default: all)")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="of tests for each mutation")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", type=Path, metavar="PATH", help="keep what runs which line here, for next time")
    options = parser.parse_args(argv)
    names = [Path(name).stem for name in (NAMED if options.named else options.files)]
    found = [m for name in names for m in (by_hand(name, source_of(name)) if options.named else mutations_of(name))]
    found = [m for m in found if re.search(options.match or "", str(m))]
    if options.sample:
        found = random.Random(options.seed).sample(found, min(options.sample, len(found)))
    if options.record and options.record.exists():
        recorded = json.loads(options.record.read_text())
    else:
        files = options.tests or [
            *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py")),
            "rmsjax",
        ]
        recorded = record(files, options.jobs)
        if options.record:
            options.record.write_text(json.dumps(recorded))
    print(f"{len(found)} mutations, {len(recorded)} tests", flush=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        free = SimpleQueue()
        for job in range(options.jobs):
            free.put(copied(Path(scratch) / str(job)))

        def attempt(mutation):
            folder, started = free.get(), time.monotonic()
            try:
                return mutation, *tried(mutation, folder, recorded, options.budget), time.monotonic() - started
            finally:
                free.put(folder)

        survivors = []
        for mutation, result, last, seconds in pool.map(attempt, found):
            print(f"{result:8} {seconds:5.0f} s  {mutation}", flush=True)
            survivors += [(mutation, last)] if result == "survived" else []
    print(f"\n{len(found) - len(survivors)} of {len(found)} killed")
    for name in names:
        for mutation, last in survivors:
            if mutation.module == name:
                print(f"survived: {mutation}  ({last})")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
