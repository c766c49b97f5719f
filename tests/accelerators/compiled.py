"""Compile a function for a device that is not here, and count what its program does there.

XLA's compilers for NVIDIA GPUs and for TPUs run on any machine, for what they need of a device is its description. They
give the program that the real one would run. Code about norms is bound by memory: the bytes that its kernels read and
write are its cost, free of noise. They are counted in the text of the program, by these rules:

- a kernel reads each of its operands once and writes its results once, but for those that stay on the chip (TPU);
- of an operand that is only sliced it reads the slices, and of a result that is updated in place it writes the update;
- the body of a loop counts as often as it runs;
- a conditional is noted, and counts as its cheapest branch, which is the one that ordinary numbers take;
- arithmetic of single numbers that is not part of a fusion is no kernel: a TPU does that in its scalar unit.

The padding of a TPU's tiles, caches, and what XLA keeps in registers across kernels are not counted.
"""

import functools
import importlib.metadata
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

NAMES = {"h100": "H100", "v5e": "TPU v5e"}
PLUGINS = {"h100": ("jax-cuda13-plugin", "jax-cuda13-pjrt"), "v5e": ("libtpu",)}


def missing(name):
    """Why nothing can be compiled for this device here; empty if it can be."""
    if jax.__version_info__ < (0, 12):
        return f"the figures are of XLA as in jax 0.12, and this is jax {jax.__version__}"
    for package in PLUGINS[name]:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"needs {package}: pip install '.[accelerators]'"
        if package.startswith("jax-") and version != importlib.metadata.version("jax"):
            return f"{package} {version} is not of the version of jax, {jax.__version__}"
    return ""


@functools.cache
def device(name):
    """The description of a device to compile for: "h100" or "v5e"."""
    if name == "v5e":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    config = Path(__file__).with_name("nvidia_h100.txtpb").read_text(encoding="utf-8")
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=config
    ).devices[0]


class Program(NamedTuple):
    """What a program does when it runs, and the seconds of processor time that it took to trace, lower and compile."""

    kernels: int
    bytes: int
    conditionals: int
    temporary: int
    seconds: float


def compiled(name, fn, *args):
    """The program of fn for the device of this name, of arguments that are arrays or their shapes."""
    place = SingleDeviceSharding(device(name))
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    start = time.process_time()
    program = jax.jit(fn).lower(*args).compile()
    seconds = time.process_time() - start
    return Program(*counted(program.as_text()), program.memory_analysis().temp_size_in_bytes, seconds)


def counted(text):
    """Kernels, bytes and conditionals of a program in XLA's text."""
    computations, entry = parsed(text)
    found = _kernels(computations, entry)
    return len(found), sum(found), text.count(" conditional(")


class Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str


def parsed(text):
    """The instructions of each computation, both by name and the root last; and the name of the entry."""
    computations, entry, current = {}, "", {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():  # such comments are in tuples of more than five
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{", line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif part := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$", line):
            name, shape, operation, rest = part.groups()
            operands = dict.fromkeys(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            current[name] = Instruction(name, shape, operation, tuple(operands), rest)
    return computations, entry


# Bits of an element; what is no number, like a token, has no size.
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128} | {
    f"{kind}{n}": n for kind in "suf" for n in (4, 8, 16, 32, 64)
}


def size_of(shape, *, anywhere=False):
    """Bytes of a shape, or of all in a tuple: of those in main memory, or anywhere. A layout names any other memory."""
    total = 0
    for kind, dimensions, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        bits = 8 if kind.startswith("f8e") else _BITS.get(kind, 0)
        if anywhere or not re.search(r"S\(\d", layout):
            total += math.ceil(math.prod(int(d) for d in dimensions.split(",") if d) * bits / 8)
    return total


_NO_KERNEL = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier"}
# Asynchronous copies and slices count where they are done, and other asynchronous work where it starts.
_NO_KERNEL |= {"copy-start", "slice-start", "async-update", "async-done"}


def _is_number(shape):
    return re.fullmatch(r"\w+\[(1(,1)*)?\](\{.*\})?", shape) is not None


def _kernels(computations, name):
    """The bytes of each kernel of a computation, in the order of the program."""
    found = []
    instructions = computations[name]
    for own in instructions.values():
        called = _called(own)
        if own.operation in _NO_KERNEL or 'custom_call_target="ConcatBitcast"' in own.rest:
            continue
        if not called and all(_is_number(i.shape) for i in (own, *(instructions[name] for name in own.operands))):
            continue
        if own.operation == "conditional":
            found += min((_kernels(computations, branch) for branch in called), key=sum)
        elif own.operation == "while":
            condition, body = (re.search(rf"{part}=%?([\w.\-]+)", own.rest)[1] for part in ("condition", "body"))
            found += _times(own, computations[condition]) * _kernels(computations, body)
        elif own.operation in ("call", "async-start"):
            found += _kernels(computations, called[0])
        elif own.operation in ("copy-done", "slice-done"):
            source = instructions[instructions[own.operands[0]].operands[0]]
            # As much as arrives is read where it comes from and written where it goes to, if that is main memory.
            found.append(size_of(own.shape, anywhere=True) * (size_of(source.shape) > 0) + size_of(own.shape))
        else:
            found.append(_moved(own, instructions, computations[called[0]] if own.operation == "fusion" else None))
    return found


def _called(own):
    """The names of the computations that an instruction runs."""
    keys = "calls|to_apply|branch_computations|true_computation|false_computation"
    groups = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", own.rest)
    return [name.strip(" %") for group in groups for name in group.strip("{}").split(",")]


def _times(loop, condition):
    """How often a loop runs. XLA:GPU says so; on a TPU the condition compares JAX's count from 0 with a constant."""
    *_, last = condition.values()
    bounds = [
        i.rest.split(")")[0] for i in condition.values() if i.operation == "constant" and i.shape.startswith("s32")
    ]
    if count := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(count[1])
    if len(bounds) == 1 and last.operation == "compare" and "direction=LT" in last.rest:
        return int(bounds[0])
    raise ValueError(f"cannot tell how often the loop {loop.name} runs")


def _moved(own, instructions, fused):
    """The bytes that one kernel reads and writes; fused: the computation of a fusion, or None."""
    if fused is None:
        body, users, inner = instructions, [own], own.operands
    else:
        body, users = fused, list(fused.values())
        parameters = [i for i in users if i.operation == "parameter"]
        inner = [i.name for i in sorted(parameters, key=lambda i: int(i.rest.split(")")[0]))]
    pairs = zip(own.operands, inner, strict=True)
    read = sum(min(size_of(instructions[outer].shape), _used(users, name)) for outer, name in pairs)
    return read + min(size_of(own.shape), _changed(body, users[-1]))


def _used(users, name):
    """Bytes that a kernel needs of the value of this name: what it slices from it, if it does nothing else with it."""
    total = 0
    for user in (i for i in users if name in i.operands):
        if user.operation == "bitcast":
            total += _used(users, user.name)
        elif user.operation in ("slice", "dynamic-slice"):
            total += size_of(user.shape, anywhere=True)
        elif user.operation != "dynamic-update-slice" or user.operands[0] != name:
            return math.inf
    return total


def _changed(body, root):
    """Bytes that a kernel writes: of an update in place the update alone."""
    if root.operation in ("tuple", "bitcast"):
        return sum(_changed(body, body[name]) for name in root.operands)
    if root.operation == "dynamic-update-slice" and root.operands[1] in body:
        return size_of(body[root.operands[1]].shape, anywhere=True)
    return size_of(root.shape, anywhere=True)
