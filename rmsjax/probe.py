"""The RMS norm of activations: at every layer of an unchanged Flax model, or wherever a JAX function has a `tag`.

`activation_rms` and `gradient_rms` measure a model in one jit that no activation leaves; `capture` returns the
activations themselves. `tag` and `collect` do for any function what these do for models.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial, wraps
from types import new_class
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rmsjax._norm import rms
from rmsjax._tags import Entry, fill_in, is_array, run, tag_tree

if TYPE_CHECKING:
    from jaxtyping import PyTree, Real

T = TypeVar("T")
Model: TypeAlias = nnx.Module | tuple[nn.Module, Mapping[str, Any]]
"""A model: an NNX module, or a Linen module and its variables as a tuple."""


# ----------------------------------------------------------------------------------------------------- plain functions


def tag(x: T, name: str) -> T:
    """The identity, $x \\mapsto x$, that marks a value for `collect`.

    Without `collect` it does nothing and costs nothing in the compiled program. Go on with what it returns: like any
    computation, a tag whose result nobody uses may be dropped.

    Args:
        x: an array or a tree; its arrays are marked.
        name: what `collect` files it under. Names may repeat.

    Returns:
        x.

    Raises:
        TypeError: `name` is not a string.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax.probe import collect, tag
        >>> def double(x):
        ...     return 2.0 * tag(x + 1.0, "h")
        >>> print(double(1.0), collect(double)(jnp.float32(1.0))[1]["h"])
        4.0 2.0

    Source: `sow` of oryx.core.interpreters.harvest, and of Flax, with nothing to declare.
    """
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"tag: name must be a string, got {name!r:.80}; write tag(x, name)")
    return tag_tree(x, name)


def collect(
    fn: Callable[..., Any], *, reduce: Callable[[Array], Any] | None = None, gradients: bool = False
) -> Callable[..., Any]:
    """fn, but that it returns what it tagged as well: $(fn(x), \\{name: value\\})$.

    Works through jit, vmap, grad, scan, cond, while_loop, remat, custom derivatives and shard_map inside fn, and may
    itself be transformed by any of them. Put a jit around it: by itself it runs fn operation by operation.

    A value is what `tag` was given, with these axes in front, outermost first:

    - inside `scan` (and `fori_loop` of known length), one of the length of the loop;
    - inside `vmap`, the mapped axis, if the value depends on it;
    - inside `shard_map`, one over the devices of the mesh.

    Of a `while_loop` the value of the last iteration is kept. What was not reached, in a loop that did not run or in
    the other branch of a `cond`, is NaN (0 for integers). Branches of a `cond` share a name. What the backward pass of
    a `jax.checkpoint` computes again does not count again.

    Args:
        fn: a JAX function. Arrays in its arguments are traced, as under jit; all else reaches it as it is.
        reduce: a function of one array that is applied to each value where it arises, before it is stacked by a loop;
            with `rmsjax.rms` no activation is kept.
        gradients: return the cotangents of the tagged points also: the gradient, with respect to each of them, of what
            fn differentiates. So fn must take a gradient itself (`jax.value_and_grad(loss)`, or a whole training step).

    Returns:
        A function of the same arguments that returns `(out, values)`, or `(out, values, cotangents)`. Both are dicts,
        in the order of the program, of trees like those that were tagged. A name that comes a second time is "name#2".
        Cotangents have the names of the values. A point has none on which the loss does not depend, that does not
        depend on what is differentiated, or that is inside a function with a derivative rule of its own.

    Example:
        >>> import jax, jax.numpy as jnp, rmsjax
        >>> from rmsjax.probe import collect, tag
        >>> def loss(w, x):
        ...     x, _ = jax.lax.scan(lambda x, w: (tag(w * x, "h"), None), x, w)
        ...     return jnp.sum(x)
        >>> w, x = jnp.array([1.0, 2.0, 3.0]), jnp.ones(4)
        >>> _, values, cotangents = jax.jit(collect(jax.grad(loss), reduce=rmsjax.rms, gradients=True))(w, x)
        >>> print(values["h"], cotangents["h"])
        [1. 2. 6.] [6. 3. 1.]

    Source: harvest of Oryx (oryx.core.interpreters.harvest), for the idea of a tag that is a primitive.
    """

    @wraps(fn)
    def collected(*args: Any, **kwargs: Any) -> Any:
        out, entries = run(fn, args, kwargs, reduce or (lambda x: x))
        values, cotangents = _by_name(entries)
        return (out, values, cotangents) if gradients else (out, values)

    return collected


Trees: TypeAlias = OrderedDict[str, Any]  # ordered, since jit sorts the keys of a dict


def _by_name(entries: Iterable[Entry]) -> tuple[Trees, Trees]:
    """The values and the cotangents, as trees, by names that are not repeated."""
    values: dict[tuple[int, int], list[Entry]] = defaultdict(list)
    cotangents: dict[tuple[int, int], list[Entry]] = defaultdict(list)
    times: Counter[tuple[int, int]] = Counter()
    unmatched: dict[tuple[int, int], list[int]] = defaultdict(list)
    for entry in entries:
        call, leaf = entry.mark.call, entry.mark.leaf
        if entry.mark.cotangent and unmatched[call, leaf]:
            cotangents[call, unmatched[call, leaf].pop()].append(entry)  # the newest value first: that is backward
            continue
        time = times[call, leaf]
        times[call, leaf] += 1
        if entry.mark.cotangent:
            cotangents[call, time].append(entry)
        else:
            values[call, time].append(entry)
            unmatched[call, leaf].append(time)
    names: dict[tuple[int, int], str] = {}
    taken: set[str] = set()
    for key, leaves in (values | cotangents).items():
        name = leaves[0].mark.name
        labels = itertools.chain([name], (f"{name}#{n}" for n in itertools.count(2)))
        names[key] = next(label for label in labels if label not in taken)
        taken.add(names[key])
    return (
        OrderedDict((name, _tree(values[key])) for key, name in names.items() if key in values),
        OrderedDict((name, _tree(cotangents[key])) for key, name in names.items() if key in cotangents),
    )


def _tree(leaves: list[Entry]) -> Any:
    """Leaves of one call of `tag` as the tree that was tagged, with None where there is none."""
    treedef = leaves[0].mark.treedef
    found = {entry.mark.leaf: entry.value for entry in leaves}
    return treedef.unflatten([found.get(k) for k in range(treedef.num_leaves)])


# -------------------------------------------------------------------------------------------------------------- models


def capture(model: Model, *args: Any, **kwargs: Any) -> tuple[Any, OrderedDict[str, PyTree]]:
    """Call a Flax model, and return what each of its layers returned: $(model(x), \\{path: h_{path}\\})$.

    Every call of a submodule's `__call__` is an entry, under the path of the submodule, and so is the model itself,
    under the name of its class; so are values that the model's code marks with `tag`. All that is said of values in
    `collect` holds for these.

    The model is not changed: it runs on a copy, and updates of its state (batch statistics, counts of random keys) are
    dropped. Its code is not changed either, and may use nnx.scan, nn.scan, remat and jit.

    Args:
        model: an NNX module; or a Linen module and its variables as a tuple, `(module, variables)`.
        *args: the arguments of the model, in Linen those of `module.apply` after the variables.
        **kwargs: likewise; in Linen `rngs`, `mutable` and `method` too.

    Returns:
        `(out, activations)`: what the call returns, and a dict, in the order of the program, from "block/dense" to the
        output, an array or a tree; "block/dense#2" is the second call of that layer. Layers that are stacked by a scan
        have the layer as the first axis. If used inside a jit, what is not used of it costs nothing.

    Raises:
        TypeError: the model is of another kind.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from rmsjax.probe import capture
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
        >>> out, activations = capture(model, jnp.ones((4, 2)))
        >>> print({path: h.shape for path, h in activations.items()})
        {'layers/0': (4, 3), 'layers/2': (4, 1), 'Sequential': (4, 1)}

    Source: the activations of a coordinate check (Yang et al., arXiv 2203.03466, appendix D.1).
    """
    program, state = _program("capture", model)
    return collect(program)(state, args, kwargs)


def activation_rms(model: Model, *args: Any, **kwargs: Any) -> OrderedDict[str, Real[Array, "..."]]:
    r"""The RMS norm of what each layer of a Flax model returns, $\{path: \|h_{path}\|_{RMS}\}$.

    Compiled once for a model and the shapes of its arguments, and each output is reduced where it arises: no activation
    leaves the jit, nor the body of a scan. Numerics are those of `rmsjax.rms`.

    Args:
        model: an NNX module, or `(linen_module, variables)`; see `capture`, also for the names.
        *args: the arguments of the model. Arrays are traced, all else (flags, strings, Python numbers) is static.
        **kwargs: likewise.

    Returns:
        A dict from path to norm, over all axes of the output, in float32 (float64 for float64). For stacked layers a
        vector with a norm for each layer; under a `shard_map` in the model the norm over all shards. Of an output
        that is a tree each array has an entry, "attention[1]['weights']"; integers, booleans and keys have none.

    Raises:
        TypeError: the model is of another kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from rmsjax.probe import activation_rms
        >>> ones = nnx.initializers.ones
        >>> model = nnx.Sequential(*[nnx.Linear(4, 4, kernel_init=ones, rngs=nnx.Rngs(0)) for _ in range(2)])
        >>> for path, norm in activation_rms(model, jnp.ones((3, 4))).items():
        ...     print(path, norm)
        layers/0 4.0
        layers/1 16.0
        Sequential 16.0

    Source: Yang et al. (arXiv 2203.03466), appendix D.1.
    """
    program, state = _program("activation_rms", model)
    return _jitted(_ActivationRMS(program), (state, args, kwargs))


def gradient_rms(
    loss: Callable[[Any], Array], model: Model, *args: Any, **kwargs: Any
) -> OrderedDict[str, Real[Array, "..."]]:
    r"""The RMS norm of the gradient at what each layer returns, $\{path: \|\partial L/\partial h_{path}\|_{RMS}\}$.

    The gradient is that of `loss(model(*args, **kwargs))`. As with `activation_rms`, no gradient leaves the jit.

    Args:
        loss: a function of the model's output with a scalar value. Compilation is kept for each such function, so
            define it once, or call `gradient_rms` inside a jit of your own.
        model: an NNX module, or `(linen_module, variables)`; see `capture`.
        *args: the arguments of the model, as in `activation_rms`.
        **kwargs: likewise.

    Returns:
        A dict with the keys and shapes of `activation_rms`. Outputs that the loss does not depend on, or that depend
        on no floating parameter or argument of the model, are not in it.

    Raises:
        TypeError: the model is of another kind; the loss is not scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from rmsjax.probe import gradient_rms
        >>> ones = nnx.initializers.ones
        >>> model = nnx.Sequential(*[nnx.Linear(4, 4, kernel_init=ones, rngs=nnx.Rngs(0)) for _ in range(2)])
        >>> for path, norm in gradient_rms(jnp.sum, model, jnp.ones((3, 4))).items():
        ...     print(path, norm)
        layers/0 4.0
        layers/1 1.0
        Sequential 1.0

    Source: the backward form of the coordinate check of Yang et al. (arXiv 2203.03466), appendix D.1.
    """
    program, state = _program("gradient_rms", model)
    return _jitted(_GradientRMS(program, loss), (state, args, kwargs))


# What follows is hashable, as a static argument of a jit has to be: equal models share a compiled program.


@dataclass(frozen=True)
class _ActivationRMS:
    program: Callable[..., Any]

    def __call__(self, *call: Any) -> Trees:
        _, entries = run(self.program, call, {}, _norm_or_none)
        return _flat(_by_name(map(_over_shards, entries))[0])


@dataclass(frozen=True)
class _GradientRMS:
    program: Callable[..., Any]
    loss: Callable[[Any], Array]

    def __call__(self, *call: Any) -> Trees:
        leaves, treedef = jax.tree.flatten(call)
        moving = [is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
        rest = [None if moves else (leaf,) for leaf, moves in zip(leaves, moving, strict=True)]

        def total(arrays: list[Array]) -> Array:
            return self.loss(self.program(*treedef.unflatten(fill_in(rest, arrays))))

        arrays = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        _, entries = run(jax.grad(total), (arrays,), {}, _norm_or_none)
        return _flat(_by_name(map(_over_shards, entries))[1])


def _norm_or_none(x: Array) -> Array | None:
    return rms(x) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size else None


def _over_shards(entry: Entry) -> Entry:
    """Shards are of one size, so the norm of the whole is the norm of their norms."""
    shards = [k for k, axis in enumerate(entry.axes) if axis == "shard"]
    return entry._replace(value=rms(entry.value, shards)) if shards and entry.value is not None else entry


def _flat(trees: Trees) -> Trees:
    return OrderedDict(
        (name + jax.tree_util.keystr(path), value)
        for name, tree in trees.items()
        for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]
    )


def _jitted(fn: Callable[..., Any], call: Any) -> Any:
    leaves, treedef = jax.tree.flatten(call)
    static = tuple(None if is_array(leaf) else (leaf,) for leaf in leaves)
    return _jitted_flat(fn, treedef, static, [leaf for leaf in leaves if is_array(leaf)])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _jitted_flat(fn: Callable[..., Any], treedef: Any, static: tuple[Any, ...], arrays: list[Array]) -> Any:
    return fn(*treedef.unflatten(fill_in(static, arrays)))


def _program(function: str, model: Any) -> tuple[Callable[..., Any], Any]:
    """A model as a function of (its state, args, kwargs) that tags what each layer returns, and the state."""
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)
        return _NNXProgram(graphdef), state
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        module, variables = model
        return _LinenProgram(module), variables
    hint = "write (module, variables)" if isinstance(model, nn.Module) else "for a plain function use tag and collect"
    raise TypeError(
        f"{function}: model must be a flax.nnx module, or a tuple of a flax.linen module and its variables, got "
        f"{type(model).__name__}; {hint}"
    )


@dataclass(frozen=True)
class _LinenProgram:
    module: nn.Module

    def __call__(self, variables: Any, args: Any, kwargs: Any) -> Any:
        with nn.intercept_methods(_tag_linen):
            return self.module.apply(variables, *args, **kwargs)


def _tag_linen(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    out = call(*args, **kwargs)
    if context.method_name != "__call__":
        return out
    return tag_tree(out, _path(context.module.path, context.module))


@dataclass(frozen=True)
class _NNXProgram:
    graphdef: Any

    def __call__(self, state: Any, args: Any, kwargs: Any) -> Any:
        model = nnx.merge(self.graphdef, state)
        for path, module in list(nnx.iter_graph(model)):
            if isinstance(module, nnx.Module) and any("__call__" in vars(cls) for cls in type(module).__mro__):
                layer: Any = module
                layer._rmsjax_path = _path(path, module)
                layer.__class__ = _tagging(type(module), not jax.tree_util.all_leaves([module]))
        return model(*args, **kwargs)


@cache
def _tagging(cls: type, is_pytree: bool) -> type:
    """A subclass whose calls tag their result. A copy that nnx.scan or nnx.remat makes of the module is of it too."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = cls.__call__(self, *args, **kwargs)
        return out if self._rmsjax_path is None else tag_tree(out, self._rmsjax_path)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_rmsjax_path": None}
    body: dict[str, Any] = {"__call__": __call__, **names}
    return new_class(cls.__name__, (cls,), {"pytree": is_pytree}, lambda namespace: namespace.update(body))


def _path(path: Iterable[Any], module: Any) -> str:
    return "/".join(map(str, path)) or type(module).__name__
