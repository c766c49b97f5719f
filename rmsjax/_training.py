"""What `coord_check`, `compare_widths` and `lr_sweep` share: arguments, checked, and a model with its loss to train."""

from __future__ import annotations

import contextlib
import inspect
import operator
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import AxisType, NamedSharding

from rmsjax._checks import described
from rmsjax._models import streams, trainable
from rmsjax._tags import is_array, partition

Model: TypeAlias = nnx.Module | MethodType | nn.Module | tuple[nn.Module, Mapping[str, Any]]
Batch: TypeAlias = Sequence[Any]
Kwargs: TypeAlias = Mapping[str, Any]

# ----------------------------------------------------------------------------------------------------------- arguments


class Call(NamedTuple):
    """What a model is called with, and what the loss compares its output with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any


def as_call(function: str, batch: Any, kwargs: Any, *, names: tuple[str, str] = ("batch", "kwargs")) -> Call:
    """A batch and the keyword arguments that go with it; `names` are what messages call them."""
    if not isinstance(batch, (tuple, list)) or len(cast(Sequence[Any], batch)) < 2:
        got = f"a {type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else described(batch)
        raise ValueError(f"{function}: {names[0]} must be a tuple such as (x, labels), the target last, got {got}")
    *args, target = cast(Sequence[Any], batch)
    return Call(tuple(args), as_kwargs(function, kwargs, argument=names[1]), target)


def as_kwargs(function: str, kwargs: Any, *, argument: str = "kwargs") -> dict[str, Any]:
    """Keyword arguments of the model; none for None."""
    if kwargs is None:
        return {}
    if isinstance(kwargs, Mapping):
        given = dict(cast(Mapping[Any, Any], kwargs))
        if all(isinstance(name, str) for name in given):
            return given
    raise TypeError(
        f"{function}: {argument} must be the keyword arguments of the model by their names, such as "
        f'{{"mask": mask}}, got {described(kwargs)}'
    )


def at_size(function: str, argument: str, value: Any, axis: str, size: int) -> Any:
    """An argument at one size, of which it may be a function."""
    if not callable(value):
        return value
    check_takes(function, argument, value, (axis,), f"lambda {axis}: ...")
    return value(size)


def as_sizes(function: str, widths: Any, depths: Any) -> tuple[str, list[int]]:
    """The name of the axis along which models are compared, and the sizes, ascending."""
    given = {axis: values for axis, values in (("width", widths), ("depth", depths)) if values is not None}
    if len(given) != 1:
        got = "both" if given else "neither"
        raise TypeError(f"{function}: give widths, such as [64, 256, 1024], or depths, such as [2, 4, 8]; got {got}")
    ((axis, values),) = given.items()
    return axis, integers(function, f"{axis}s", values, least=1, count=2)


def as_seeds(function: str, seeds: Any) -> tuple[list[int], Array]:
    """The seeds, and their keys."""
    if not isinstance(seeds, Iterable):
        seeds = range(*integers(function, "seeds", [seeds], least=1))
    found = integers(function, "seeds", seeds, least=0)
    return found, keys_of(found)


def keys_of(seeds: Iterable[int]) -> Array:
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def integers(function: str, argument: str, values: Iterable[int], *, least: int, count: int = 1) -> list[int]:
    """Distinct integers, in ascending order."""
    try:
        found = sorted(operator.index(value) for value in values)
    except TypeError:
        raise TypeError(f"{function}: {argument} must be integers, got {values!r:.80}") from None
    if len(found) < count or len(set(found)) < len(found):
        raise ValueError(f"{function}: {argument} must be {count} or more, none of them twice, got {found}")
    if found[0] < least:
        raise ValueError(f"{function}: {argument} must be at least {least}, got {found[0]}")
    return found


def check_takes(function: str, argument: str, value: Any, takes: tuple[str, ...], example: str) -> None:
    """TypeError unless this is a function that takes these arguments by position."""
    expected = f"{function}: {argument} must be a function ({', '.join(takes)})"
    if not callable(value) or isinstance(value, (nnx.Module, nn.Module)):  # a model can be called too
        raise TypeError(f"{expected}, got {described(value)}; write {example}")
    with contextlib.suppress(ValueError):  # some builtins have no signature
        signature = inspect.signature(value)
        name = getattr(value, "__name__", type(value).__name__)
        try:
            signature.bind(*takes)
        except TypeError:
            raise TypeError(f"{expected}, got {name}{signature}; write {example}") from None
        if "learning_rate" in list(signature.parameters)[:1]:  # an optimizer of optax, whose rate the size would be
            raise TypeError(f"{expected}, got {name}, which takes a learning rate; write {example}")


def as_optimizer(function: str, optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """What make_optimizer returned, as an optimizer that may be told of more than the gradient."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"{function}: make_optimizer must return an optax transformation, such as optax.adam(1e-3), "
            f"got {described(optimizer)}"
        )
    return optax.with_extra_args_support(optimizer)


# ------------------------------------------------------------------------------------------------------------ training


def learner(
    function: str,
    make_model: Callable[[nnx.Rngs], Any],
    loss: Callable[[Any, Any], Any],
    call: Call,
    key: Array,
    *,
    positional: str = "batch",
) -> tuple[Any, Callable[[Any, Call], Array]]:
    """The parameters of a new model, and its loss as a function of (params, call), in which layers are tagged.

    `positional` is where the arguments of the call come from, as in `check_call`.
    """
    model = make_model(nnx.Rngs(key))
    if not isinstance(model, (nnx.Module, nn.Module, MethodType, tuple)):
        raise TypeError(f"{function}: make_model must return a Flax module, got {described(model)}")
    check_call(function, model, call, positional=positional)
    if isinstance(model, nn.Module):
        kwargs = {name: value for name, value in call.kwargs.items() if name not in ("rngs", "mutable")}
        rngs = {**streams(call.kwargs.get("rngs")), "params": key}  # parameters are those of the seed in any case
        model = (model, model.init(rngs, *call.args, **kwargs))
    params, program = trainable(function, model, key)

    def objective(params: Any, call: Call) -> Array:
        args, kwargs, target = call
        given = ", ".join([*map(described, args), *(f"{name}={described(value)}" for name, value in kwargs.items())])
        with noted(f"{function}: the model was called with what {positional} has, {given}"):
            output = program(params, args, kwargs)
        with noted(f"{function}: loss was given output, {described(output)}, and target, {described(target)}"):
            value = loss(output, target)
        return jnp.mean(_without_aux(function, value))

    return params, objective


@contextlib.contextmanager
def noted(note: str, of: type[Exception] = Exception) -> Generator[None]:
    """An error from within is told what was done."""
    try:
        yield
    except of as error:
        error.add_note(note)
        raise


def _without_aux(function: str, value: Any) -> Any:
    """The loss that was returned, alone or as the first of two, in the manner of JAX's has_aux."""
    loss = cast(tuple[Any, Any], value)[0] if isinstance(value, tuple) and len(cast(Any, value)) == 2 else value
    if not (is_array(loss) and jnp.issubdtype(loss.dtype, jnp.floating)):
        raise TypeError(
            f"{function}: loss must return an array of floating-point numbers, or a tuple of one and of what else it "
            f"has computed, (loss, aux); got {described(value)}"
        )
    return loss


def advance(
    optimizer: optax.GradientTransformationExtraArgs,
    objective: Callable[[Any, Call], Array],
    call: Call,
    value: Array,
    grads: Any,
    params: Any,
    state: Any,
) -> tuple[Any, Any]:
    """Parameters and state of the optimizer after one step, of which value and gradient of the objective are known."""
    # Some optimizers ask for more than the gradient: a schedule for the loss, a line search for the function.
    more = {"value": value, "grad": grads, "value_fn": lambda params: objective(params, call)}
    updates, state = optimizer.update(grads, state, params, **more)
    return optax.apply_updates(params, updates), state


_OF_APPLY = ("rngs", "mutable", "method", "capture_intermediates")  # what Linen's `apply` takes for itself


def check_call(function: str, model: Any, call: Call, *, positional: str = "batch") -> None:
    """TypeError if the model does not take these arguments; `positional` is where those without a name come from."""
    owner: Any = model[0] if isinstance(model, tuple) and model else model
    args, kwargs = call.args, call.kwargs
    if isinstance(owner, nn.Module):
        method = kwargs.get("method") or "__call__"
        method = getattr(type(owner), method, None) if isinstance(method, str) else method
        args, kwargs = (owner, *args), {name: value for name, value in kwargs.items() if name not in _OF_APPLY}
    elif isinstance(owner, nnx.Module) and callable(owner):
        method, args = type(owner).__call__, (owner, *args)
    else:
        method = owner if isinstance(owner, MethodType) else None
    if not callable(method):  # what is no model is said elsewhere
        return
    with contextlib.suppress(ValueError):  # some builtins have no signature
        signature = inspect.signature(method)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            name = getattr(method, "__qualname__", type(method).__name__)
            raise TypeError(
                f"{function}: the model is called by {name}{signature}, and cannot be with what {positional} has "
                f"({len(call.args)} without the target) and kwargs ({', '.join(kwargs) or 'none'}): {error}"
            ) from None


# ------------------------------------------------------------------------------------------------------------- programs


def prepared(
    function: str,
    axis: str,
    run: Callable[..., Any],
    calls: Mapping[int, Any],
    *more: Array,
    check: Callable[[list[Any]], Any] | None = None,
    progress: bool = False,
) -> Callable[..., list[Any]]:
    """A function of arrays like `more` that returns the results of `run(size, call, *more)` for each size.

    Each size is compiled as one program, once. All are traced, and `check` is given the shapes of their results, before
    the first is compiled: so what is wrong at any size is said at once.
    """

    def trace(size: int, call: Any) -> Any:
        arrays, join = partition(call)
        with on_mesh_of(function, arrays):
            traced: Any = jax.jit(lambda arrays, *more: run(size, join(arrays), *more)).trace(arrays, *more)
        return traced, arrays

    traced = {size: trace(size, call) for size, call in calls.items()}
    if check is not None:
        check([program.out_info for program, _ in traced.values()])
    compiled: dict[int, Callable[..., Any]] = {}

    def result(size: int, more: tuple[Array, ...]) -> Any:
        program, arrays = traced[size]
        with on_mesh_of(function, arrays):
            if size not in compiled:
                compiled[size] = program.lower().compile()
            return jax.device_get(compiled[size](arrays, *more))

    return lambda *more: [result(size, more) for size in with_bar(function, axis, list(calls), progress)]


def for_each(xs: Array, fn: Callable[[Array], Any]) -> Any:
    """fn of each element, side by side; on a CPU one after the other, which takes less than half the time there.

    XLA has no fast product of batches of matrices on a CPU, and a single copy of a model stays in its caches.
    """
    return jax.lax.map(fn, xs) if jax.default_backend() == "cpu" else jax.vmap(fn)(xs)


@contextlib.contextmanager
def on_mesh_of(function: str, arrays: Iterable[Any]) -> Generator[None]:
    """On the mesh of the arrays that have explicit axes: what meets them, such as parameters, must be made on it."""
    shardings = [x.sharding for x in arrays if isinstance(x, Array) and isinstance(x.sharding, NamedSharding)]
    meshes: set[Any] = {s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types}
    if len(meshes) > 1:
        raise ValueError(f"{function}: all arrays must be on one mesh, got some on each of {sorted(map(str, meshes))}")
    now = jax.sharding.get_abstract_mesh()
    with jax.set_mesh(meshes.pop()) if meshes and now.empty else contextlib.nullcontext():
        yield


def with_bar(function: str, axis: str, sizes: list[int], progress: bool) -> Iterable[int]:
    """The sizes, perhaps with a bar."""
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm.auto import tqdm

            return tqdm(sizes, desc=function, unit=axis)
    return sizes


# --------------------------------------------------------------------------------------------------------------- names


def shared_names(
    function: str, axis: str, sizes: list[int], kind: str, names: Sequence[Iterable[str]]
) -> list[dict[str, str]]:
    """For each size, from the names that all share, of layers say, to those that they have there."""
    found = at_same_share(names) if axis == "depth" else [{name: name for name in own} for own in names]
    for size, own in zip(sizes, found, strict=True):
        if different := set(found[0]) ^ set(own):
            raise ValueError(
                f"{function}: the model must have the same {kind} at every {axis}; "
                f"at {axis}s {sizes[0]} and {size} they differ in {sorted(different)}"
            )
    return found


def at_same_share(names: Sequence[Iterable[str]]) -> list[dict[str, str]]:
    """For models of several depths, from names that all of them share to the names that each of them has.

    A number in a name counts a stack of layers if there are more of them in a deeper model. As many are chosen as the
    shallowest model has, at equal shares of the depth, up to the last; the others have no part in this.
    """
    split = [{tuple(re.split(r"(\d+)", name)): name for name in own} for own in names]
    pairs = list(_paired([list(own) for own in split]))
    found = [{"".join(shared): own[name] for shared, row in pairs if (name := row[k])} for k, own in enumerate(split)]
    order = {name: place for place, name in enumerate(split[0].values())}
    shared = sorted(found[0], key=lambda name: order[found[0][name]])
    return [{name: own[name] for name in dict.fromkeys([*shared, *own]) if name in own} for own in found]


_Parts: TypeAlias = tuple[str, ...]  # of a name: text, number, text, number, ...


def _paired(names: list[list[_Parts]], shared: _Parts = ()) -> Iterator[tuple[_Parts, list[_Parts | None]]]:
    """What the names at each size, which are equal or a pair as far as `shared`, have in common, and these names."""
    at = len(shared)
    ends = [next((name for name in own if len(name) == at), None) for own in names]
    if any(ends):
        yield shared, ends
    # Layers are of one kind if what is in them has the same names but for numbers: attention is no pair of an MLP.
    kinds: list[dict[Any, list[str]]] = [{} for _ in names]
    for own, by_kind in zip(names, kinds, strict=True):
        for head in dict.fromkeys(name[at] for name in own if len(name) > at):
            kind = frozenset(name[at + 1 :: 2] for name in own if name[at:][:1] == (head,))
            by_kind.setdefault(kind if at % 2 else None, []).append(head)
    for kind in dict.fromkeys(kind for by_kind in kinds for kind in by_kind):
        heads = [by_kind.get(kind, []) for by_kind in kinds]
        fewest = min(map(len, heads))
        if at % 2 and any(len(own) > fewest for own in heads):
            # What a layer returns is at its end: of two layers at 1/2 and at 1 of the depth.
            heads = [[own[round(k * len(own) / fewest) - 1] for k in range(1, fewest + 1)] for own in heads]
            rows = list(zip(*heads, strict=True))
        else:
            rows = [(head,) * len(names) for head in dict.fromkeys(head for own in heads for head in own)]
        for row in rows:
            inside = [[name for name in own if name[at:][:1] == (head,)] for own, head in zip(names, row, strict=True)]
            yield from _paired(inside, (*shared, row[0]))
