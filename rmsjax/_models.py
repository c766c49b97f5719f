"""Flax models as functions that tag what their layers return: `program_of` makes one, `measure` runs and reads it."""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from types import MethodType
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from rmsjax._norm import rms
from rmsjax._tags import Trees, arrays_of, by_name, fill_in, flat, is_array, run, tag_tree

# ------------------------------------------------------------------------------------------------------------- programs


def program_of(function: str, model: Any) -> tuple[Callable[..., Any], Any]:
    """A model as a function of (its state, args, kwargs) that tags what each layer returns, and the state."""
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        module, variables = model
        return _LinenProgram(Static(module)), variables
    owner, method = (model.__self__, model.__func__) if isinstance(model, MethodType) else (model, None)
    if not isinstance(owner, nnx.Module):
        linen = isinstance(owner, nn.Module)
        hint = "write (module, variables)" if linen else "for a plain function use tag and collect"
        raise TypeError(
            f"{function}: model must be a flax.nnx module, a method of one, or a tuple of a flax.linen module and its "
            f"variables, got {type(model).__name__}; {hint}"
        )
    if method is None and not callable(owner):
        raise TypeError(f"{function}: {type(owner).__name__} has no __call__; name a method, such as model.encode")
    graphdef, state = nnx.split(owner)
    return _NNXProgram(Static(graphdef), method), state


# A compiled layer of Linen (nn.jit) that was called before would not be traced again, and so have no tags, or those of
# another model: this is a part of the keys by which JAX finds what it has traced.
_measured: Any = jax.make_user_context(None)


@dataclass(frozen=True)
class _LinenProgram:
    module: Static

    def __call__(self, variables: Any, args: Any, kwargs: Any) -> Any:
        with _measured(self.module), _tagged_linen("", itself=True):
            return self.module.value.apply(variables, *args, **kwargs)


@dataclass(frozen=True)
class _NNXProgram:
    graphdef: Static
    method: Callable[..., Any] | None

    def __call__(self, state: Any, args: Any, kwargs: Any) -> Any:
        model = nnx.merge(self.graphdef.value, state)
        with _measured(self.graphdef), _tagged_nnx(model, "", itself=True):
            if self.method is None:
                return model(*args, **kwargs)
            return tag_tree(self.method(model, *args, **kwargs), f"{type(model).__name__}.{self.method.__name__}")


def _below(path: str, parts: Iterable[Any], module: Any = None) -> str:
    """The path of a part of what is at a path; with the module, the name of its outputs, which is never empty."""
    parts = tuple(map(str, parts)) or (() if module is None else (type(module).__name__,))
    return "/".join(filter(None, (path, *parts)))


# --------------------------------------------------------------------------------------------------------------- Linen


class _Surroundings(threading.local):
    """Of the Linen module that is applied: its path in the whole model, and whether its own output is tagged.

    None while nothing is tagged. Flax keeps its interceptors for each thread by itself, and so do we.
    """

    now: tuple[str, bool] | None = None


_surroundings = _Surroundings()


@contextlib.contextmanager
def _tagged_linen(path: str, *, itself: bool) -> Generator[None]:
    """For as long as this lasts, modules inside a Linen module that is applied tag what they return, and perhaps it."""
    before = _surroundings.now
    _surroundings.now = path, itself
    try:
        with nn.intercept_methods(_tag_linen) if before is None else contextlib.nullcontext():
            yield
    finally:
        _surroundings.now = before


def _tag_linen(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module: nn.Module = context.module
    is_layer = context.method_name == "__call__" and module.scope is not None and not module.is_initializing()
    if not is_layer or _surroundings.now is None:
        return call(*args, **kwargs)
    path, itself = _surroundings.now
    name = _below(path, module.path, module)
    itself = itself or bool(module.path)
    if _runs_nnx(module):
        kwargs = {**kwargs, "nnx_method": partial(_call_nnx, _below(path, module.path), kwargs.get("nnx_method"))}
    out = call(*args, **kwargs)
    return tag_tree(out, name) if itself else out


def _runs_nnx(module: nn.Module) -> bool:
    """Whether it is a bridge to NNX: Flax's ToLinen, or one of the copies of it that models have."""
    return "nnx_class" in vars(module) and "nnx_method" in inspect.signature(type(module).__call__).parameters


def _call_nnx(path: str, method: Any, module: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
    """What ToLinen calls with the module that it has made. Its output is that of ToLinen, which has a tag."""
    with _tagged_nnx(module, path, itself=method is not None):
        method = "__call__" if method is None else method
        return (getattr(type(module), method) if isinstance(method, str) else method)(module, *args, **kwargs)


# ----------------------------------------------------------------------------------------------------------------- NNX


@dataclass(frozen=True)
class _Place:
    path: str
    name: str | None  # of its outputs, if they are tagged


# The place of a module is an attribute of it, and so goes with it into the copies that nnx.scan, nnx.remat and nnx.jit
# make. Flax takes names that begin like this for its own where it lists the attributes of a module (bridge.ToNNX).
_PLACE = "_pytree__rmsjax_place"


@contextlib.contextmanager
def _tagged_nnx(model: nnx.Module, path: str, *, itself: bool) -> Generator[None]:
    """For as long as this lasts, modules inside an NNX module tag what they return, and perhaps it does."""
    with contextlib.ExitStack() as stack:
        for parts, module in list(nnx.iter_graph(model)):
            if isinstance(module, nnx.Module) and callable(module):
                name = _below(path, parts, module) if itself or module is not model else None
                setattr(module, _PLACE, _Place(_below(path, parts), name))
                stack.enter_context(_tagged_calls(type(module)))
        yield


_patching = threading.Lock()
_patched: dict[type, tuple[int, Any]] = {}  # how many programs use the class now, and the __call__ of its own it had


@contextlib.contextmanager
def _tagged_calls(cls: type) -> Generator[None]:
    """For as long as this lasts, calls of modules of this class that have a path tag what they return.

    All others, such as the models that another thread calls meanwhile, go on as they were.
    """
    with _patching:
        users, own = _patched.get(cls, (0, vars(cls).get("__call__")))
        if not users:
            setattr(cls, "__call__", _tagging(cls, cls.__call__))  # noqa: B010
        _patched[cls] = users + 1, own
    try:
        yield
    finally:
        with _patching:
            users, own = _patched.pop(cls)
            if users > 1:
                _patched[cls] = users - 1, own
            elif own is None:
                delattr(cls, "__call__")
            else:
                setattr(cls, "__call__", own)  # noqa: B010


def _tagging(cls: type, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def tagging(self: Any, *args: Any, **kwargs: Any) -> Any:
        place = vars(self).get(_PLACE) if type(self) is cls else None  # a subclass that calls its parent tags by itself
        if place is None:
            return call(self, *args, **kwargs)
        with _tagged_linen(place.path, itself=not _runs_linen(self) or kwargs.get("method") is not None):
            out = call(self, *args, **kwargs)
        return out if place.name is None else tag_tree(out, place.name)

    return tagging


def _runs_linen(module: nnx.Module) -> bool:
    """Whether it is a bridge to Linen: Flax's ToNNX, or a copy of it; its output is that of the module in it."""
    return isinstance(module, nnx.bridge.ToNNX) or "to_nnx__module" in vars(module)


# ------------------------------------------------------------------------------------------------------------ measuring


def trainable(function: str, model: Any, key: Array) -> tuple[Any, Callable[[Any, Any, Any], Any]]:
    """The parameters of a model, and the model as a function of (params, args, kwargs) that tags what layers return.

    All else in its state is as it is, and what the model writes there is dropped. Only of a Linen module that is called
    with a `mutable` does the function return what `apply` returns, the output and these collections.
    """
    program, state = program_of(function, model)
    if not isinstance(program, _LinenProgram):
        params, others = nnx.split_state(state, nnx.Param, ...)

        def call(params: Any, args: Any, kwargs: Any) -> Any:
            # All made anew: objects of NNX, in the model or among its arguments, change only where they were made.
            return program(*jax.tree.map(lambda leaf: leaf, (nnx.merge_state(params, others), args, kwargs)))

        return params, call
    rest = {name: collection for name, collection in state.items() if name != "params"}

    def apply(params: Any, args: Any, kwargs: Any) -> Any:
        # Flax takes the stream "params" for each that has no key of its own, such as that of a dropout.
        given = {"mutable": list(rest), **kwargs, "rngs": {"params": key, **streams(kwargs.get("rngs"))}}
        out = program({**rest, "params": params}, args, given)
        return out if "mutable" in kwargs else out[0]

    return state.get("params", {}), apply


def streams(rngs: Any) -> dict[str, Any]:
    """The random keys that a Linen module is given, by the names of their streams; one alone is that of "params"."""
    if rngs is None:
        return {}
    return dict(cast(Mapping[str, Any], rngs)) if isinstance(rngs, Mapping) else {"params": rngs}


def measure_layers(fn: Callable[..., Any], *args: Any) -> tuple[Any, Trees]:
    """fn(*args), and what each layer in it returned as (*loops, examples, elements).

    Loops are those of stacked layers, examples the first axis of an output, elements all others.
    """
    return measure(fn, args, _by_example, _pool_examples)[:2]


def measure(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    reduce: Callable[[Array], Array],
    pool: Callable[[Array, tuple[str, ...]], Array],
) -> tuple[Any, Trees, Trees]:
    """fn(*args), and the values and cotangents of the layers in it, by the name of each floating array.

    Each is reduced where it arises; `pool` is given the result and the names of the axes in front, and pools shards.
    """
    out, entries = run(fn, args, {}, arrays_of(jnp.inexact, reduce))
    found = [entry if entry.value is None else entry._replace(value=pool(entry.value, entry.axes)) for entry in entries]
    values, cotangents = by_name(found)
    return out, flat(values), flat(cotangents)


def pool_norms(norms: Array, axes: tuple[str, ...]) -> Array:
    """Shards are of one size, so the norm of the whole is the norm of their norms."""
    return rms(norms, _shards(axes)) if "shard" in axes else norms


def _by_example(x: Array) -> Array:
    """[examples, elements]. On a mesh with explicit axes not every sharding has a form in which axes are merged."""
    sharding: Any = jax.typeof(x).sharding
    together = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1])) if any(sharding.spec[1:]) else None
    return lax.reshape(x, (*(x.shape[:1] or (1,)), math.prod(x.shape[1:])), out_sharding=together)


def _pool_examples(x: Array, axes: tuple[str, ...]) -> Array:
    """A shard has some of the examples."""
    shards = _shards(axes)
    loops = len(axes) - len(shards)
    x = jnp.moveaxis(x, shards, range(loops, len(axes)))
    return x.reshape(*x.shape[:loops], -1, x.shape[-1])


def _shards(axes: tuple[str, ...]) -> list[int]:
    return [k for k, axis in enumerate(axes) if axis == "shard"]


# ------------------------------------------------------------------------------------------------------------- compiled


class Static:
    """A static argument of a jit: known by its type and value or, if it has no hash (a list, a dict), by its identity.

    So equal models share a compiled program.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        try:
            self.hash, self.by_value = hash(value), True
        except TypeError:
            self.hash, self.by_value = id(value), False

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static) or type(self.value) is not type(other.value):  # True == 1 is another call
            return False
        return self.value is other.value or (self.by_value and other.by_value and bool(self.value == other.value))


def jitted(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args), compiled, with all that is no array as static arguments."""
    leaves, treedef = jax.tree.flatten(args)
    static = tuple(None if is_array(leaf) else Static(leaf) for leaf in leaves)
    return _jitted(fn, Static(treedef), static, [leaf for leaf in leaves if is_array(leaf)])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _jitted(fn: Callable[..., Any], treedef: Static, static: tuple[Static | None, ...], arrays: list[Array]) -> Any:
    rest = [None if leaf is None else (leaf.value,) for leaf in static]
    return fn(*treedef.value.unflatten(fill_in(rest, arrays)))
