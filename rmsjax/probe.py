"""The RMS norm of activations: at every layer of an unchanged Flax model, or wherever a JAX function has a `tag`.

`activation_rms` and `gradient_rms` measure a model in one jit that no activation leaves; `capture` returns the
activations themselves. `tag` and `collect` do for any function what these do for models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rmsjax._models import jitted, measure, pool_norms, program_of
from rmsjax._norm import rms
from rmsjax._tags import arrays_of, by_name, is_array, partition, run, tag_tree, trees

if TYPE_CHECKING:
    from jaxtyping import PyTree, Real

__all__ = ["Model", "activation_rms", "capture", "collect", "gradient_rms", "tag"]


def __dir__() -> list[str]:
    return sorted(__all__)


T = TypeVar("T")
Model: TypeAlias = nnx.Module | MethodType | tuple[nn.Module, Mapping[str, Any]]
"""A model: an NNX module or a method of one, or a Linen module and its variables as a tuple."""


# ----------------------------------------------------------------------------------------------------- plain functions


def tag(x: T, name: str) -> T:
    """The identity, $x \\mapsto x$, that marks a value for `collect`.

    Without `collect` it does nothing and costs nothing in the compiled program. Go on with what it returns: like any
    computation, a tag whose result nobody uses may be dropped.

    Args:
        x: an array or a tree; its arrays are marked, and what is none for JAX (a record of NumPy) is left alone.
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
    """fn, but that it returns what it tagged as well: $(fn(x), \\lbrace name: value \\rbrace)$.

    Works through jit, vmap, grad, scan, cond, while_loop, remat, custom derivatives and shard_map inside fn, and may
    itself be transformed by any of them. Put a jit around it: by itself it runs fn operation by operation.

    A value is what `tag` was given, with these axes in front, outermost first:

    - inside `scan` (and `fori_loop` of known length), one of the length of the loop;
    - inside `vmap`, the mapped axis, if the value depends on it;
    - inside `shard_map`, one over the devices of the mesh.

    Of a `while_loop` the value of the last iteration is kept; under vmap, of the last one of each lane, or of any where
    it is the same in all iterations. What was not reached, in a loop that did not run or in the other branch of a
    `cond`, is NaN (0 for integers). Branches of a `cond` share a name, unless a vmap over its predicate has made it a
    selection: then both run, and the second is "name#2". What the backward pass of a `jax.checkpoint` computes again
    does not count again.

    What is tagged where it cannot be collected (inside a kernel, a linear solve, the condition of a `while_loop`) is
    said by a warning; so is each call of a function from `jax.export`, which does not show whether it had tags.

    Args:
        fn: a JAX function. Arrays in its arguments are traced, as under jit; all else reaches it as it is.
        reduce: a function of one array that is applied to each value where it arises, before it is stacked by a loop;
            with `rmsjax.rms` no activation is kept. It is given arrays of numbers; those of booleans or keys, and those
            without elements, become None.
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
        out, entries = run(fn, args, kwargs, arrays_of(jnp.number, reduce) if reduce else lambda x: x)
        values, cotangents = map(trees, by_name(entries))
        return (out, values, cotangents) if gradients else (out, values)

    return collected


# -------------------------------------------------------------------------------------------------------------- models


def capture(model: Model, *args: Any, **kwargs: Any) -> tuple[Any, OrderedDict[str, PyTree]]:
    """Call a Flax model, and return what each of its layers returned: $(model(x), \\lbrace path: h_{path} \\rbrace)$.

    Every call of a submodule's `__call__` is an entry, under the path of the submodule, and so is the model itself,
    under the name of its class; so are values that the model's code marks with `tag`. All that is said of values in
    `collect` holds for these.

    The model is not changed: it runs on a copy, and updates of its state (batch statistics, counts of random keys) are
    dropped. Its code need not be changed either, and may use nnx.scan, nn.scan, remat and jit. NNX inside Linen
    (`nnx.bridge.ToLinen`) and Linen inside NNX (`nnx.bridge.ToNNX`, or `apply`) are seen as well, under the path of
    what they are in. While an NNX module is traced, `__call__` of its classes is wrapped; models that other threads
    call meanwhile do not notice.

    Args:
        model: an NNX module, or a method of one, such as `model.encode`; or a Linen module and its variables as a
            tuple, `(module, variables)`.
        *args: the arguments of the model, in Linen those of `module.apply` after the variables.
        **kwargs: likewise; in Linen `rngs`, `mutable` and `method` too.

    Returns:
        `(out, activations)`: what the call returns, and a dict, in the order of the program, from "block/dense" to the
        output, an array or a tree; "block/dense#2" is the second call of that layer. Layers that are stacked by a scan
        have the layer as the first axis. If used inside a jit, what is not used of it costs nothing.

    Raises:
        TypeError: the model is of another kind, or an NNX module without `__call__`.

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
    program, state = program_of("capture", model)
    return collect(program)(state, args, kwargs)


def activation_rms(model: Model, *args: Any, **kwargs: Any) -> OrderedDict[str, Real[Array, "..."]]:
    r"""The RMS norm of what each layer of a Flax model returns, $\lbrace path: \|h_{path}\|_{RMS} \rbrace$.

    Each output is reduced where it arises: no activation leaves the jit, nor the body of a scan. Numerics are those of
    `rmsjax.rms`.

    A compiled program is kept for each model (its values may differ), shapes of the arrays among the arguments, and
    values of all other arguments. So a number that changes from call to call should be an array, `jnp.float32(0.1)`,
    and a function in a model one that was defined once: each lambda is another. What has no hash (a list, a dict) is
    known by its identity; do not change it between calls.

    Args:
        model: an NNX module or a method of one, or `(linen_module, variables)`; see `capture`, also for the names.
        *args: the arguments of the model. Arrays are traced, all else (flags, strings, Python numbers) is static.
        **kwargs: likewise.

    Returns:
        A dict from path to norm, over all axes of the output, in float32 (float64 for float64). For stacked layers a
        vector with a norm for each layer; under a `shard_map` in the model the norm over all shards. Of an output
        that is a tree each array has an entry, "attention[1]['weights']"; integers, booleans and keys have none.

    Raises:
        TypeError: the model is of another kind, or an NNX module without `__call__`.

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
    return jitted(_activation_rms, *program_of("activation_rms", model), args, kwargs)


def gradient_rms(
    loss: Callable[[Any], Array], model: Model, *args: Any, **kwargs: Any
) -> OrderedDict[str, Real[Array, "..."]]:
    r"""The RMS norm of the gradient at each layer, $\lbrace path: \|\partial L/\partial h_{path}\|_{RMS} \rbrace$.

    The gradient is that of `loss(model(*args, **kwargs))`. As with `activation_rms`, no gradient leaves the jit.

    Args:
        loss: a function of the model's output with a scalar value. Compilation is kept for each such function, so
            define it once, or call `gradient_rms` inside a jit of your own.
        model: an NNX module or a method of one, or `(linen_module, variables)`; see `capture`.
        *args: the arguments of the model, as in `activation_rms`.
        **kwargs: likewise.

    Returns:
        A dict with the keys and shapes of `activation_rms`. Outputs that the loss does not depend on, or that depend
        on no floating parameter or argument of the model, are not in it.

    Raises:
        TypeError: the model is of another kind, or an NNX module without `__call__`; the loss is not scalar.

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
    program, state = program_of("gradient_rms", model)
    return jitted(_gradient_rms, program, loss, state, args, kwargs)


def _activation_rms(program: Callable[..., Any], *call: Any) -> OrderedDict[str, Array]:
    return measure(program, call, rms, pool_norms)[1]


def _gradient_rms(program: Callable[..., Any], loss: Callable[[Any], Array], *call: Any) -> OrderedDict[str, Array]:
    arrays, join = partition(call, lambda leaf: is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact))

    def total(arrays: list[Array]) -> Array:
        return loss(program(*join(arrays)))

    return measure(jax.grad(total), (arrays,), rms, pool_norms)[2]
