"""The operator norm that RMS induces on the kernel of a Dense layer: by how much the layer can enlarge an RMS norm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from rmsjax._checks import as_axes, as_number, as_numeric
from rmsjax._norm import rms, rms_normalize
from rmsjax._reduce import lifted, times
from rmsjax._tree import leaf_paths

if TYPE_CHECKING:
    from jaxtyping import Inexact, PyTree, Real

Axes: TypeAlias = int | Sequence[int]
Selection: TypeAlias = Callable[[str, Array], "bool | tuple[Axes, Axes]"]

_KRYLOV = 8  # vectors of the subspace in which each step looks for the maximizer
_MAX_STEPS = 100


def rms_operator_norm(
    kernel: Inexact[Array, "..."],
    *,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    exact: bool = False,
    tolerance: float = 1e-5,
) -> Real[Array, "..."]:
    r"""The norm of a kernel that RMS induces, $\max_x \|xW\|_{RMS}/\|x\|_{RMS} = \sqrt{n_{in}/n_{out}}\ \sigma_1(W)$.

    The bound on what a Dense layer does to the size of its input, with one meaning at every width: `rms(x @ kernel) <=
    rms_operator_norm(kernel) * rms(x)`. Spectral scaling keeps it, and that of the update, of order 1.

    It is found by power iteration, eight powers at a time: with $G = WW^H$, the best vector that $x, xG, ..., xG^7$
    span takes the place of x (a restarted Lanczos method), until $\|xG - \lambda x\| \le tolerance \cdot \lambda$. Then
    a singular value is within tolerance/2 of the result, relatively, and as a rule within tolerance². The start is
    fixed. An early end would give too small a norm, never one that is too large.

    Right for every finite kernel, also where its squares overflow or underflow; of a kernel with inf or NaN the norm is
    NaN. Zero has the norm 0 and there the derivative 0. The derivative is that along the vector that was found, whose
    error is the tolerance over the relative gap between the squares of the two largest singular values; if these are
    equal, it is one of several.

    Args:
        kernel: floats or complex numbers, `[..., in, out]`; other axes than in and out are a batch, such as the layers
            of a stacked kernel.
        in_axis: the axis or axes of the kernel that are multiplied by the input.
        out_axis: those that make up the output.
        exact: take all eigenvalues of the smaller of WWᴴ and WᴴW instead: slower for large kernels, without an error
            of iteration, and differentiable more than once, but where the largest singular value repeats, as in the
            identity and in zero: there second derivatives are NaN.
        tolerance: of the iteration, see above. It ends after 100 steps at the latest.

    Returns:
        The norm of each kernel in the batch, float32 (float64 for float64 and complex128), in the unit of the kernel.
        The kernel may be split over devices in any way; on a mesh with explicit axes each device has the norm.

    Raises:
        TypeError: the kernel is not floating, an axis not integral, the tolerance not a number.
        ValueError: an axis is out of range, repeated, or empty; the tolerance is not positive.
        NotImplementedError: a second derivative without `exact=True`.

    Example:
        >>> import jax.numpy as jnp
        >>> import rmsjax
        >>> print(rmsjax.rms_operator_norm(jnp.ones((8, 2))))
        8.0
        >>> print(rmsjax.rms_operator_norm(1e30 * jnp.eye(3)))
        1e+30

    Source: Yang, Simon, Bernstein, A Spectral Condition for Feature Learning (arXiv 2310.17813), section 2 (there with
    the transpose of the kernel); Large, Liu, Huh, Bahng, Isola, Bernstein (arXiv 2405.14813) for the name.
    """
    name = "rms_operator_norm"
    _check_tolerance(name, tolerance)
    kernel = as_numeric(name, "kernel", kernel, kind=jnp.inexact)
    return _operator_norms([kernel], (_axes(name, kernel, in_axis, out_axis),), exact, tolerance)[0]


def rms_operator_norm_by_path(
    tree: PyTree,
    select: Selection | None = None,
    *,
    sep: str = "/",
    exact: bool = False,
    tolerance: float = 1e-5,
) -> dict[str, Real[Array, "..."]]:
    """The RMS operator norm of each kernel of a tree by its path: the size of each layer's weights, or of an update.

    All norms of a call are found together, in temporary memory for two copies of the kernels, in float32 at least.
    Where that is too much, select some of them at a time.

    Args:
        tree: any pytree of arrays: parameters, gradients, an `nnx.State`.
        select: a callable `(path, leaf)`, as for `Scope`, that says what a leaf is: False for no kernel, True for a
            kernel `[..., in, out]`, or its `(in_axis, out_axis)`. By default all floating leaves of two or more axes
            are kernels `[..., in, out]`. Convolutions and attention want `(in_axis, out_axis)`; embeddings, whose input
            is an index, are best left out.
        sep: what separates the parts of a path.
        exact: as in `rms_operator_norm`.
        tolerance: as in `rms_operator_norm`.

    Returns:
        A dict from path to norm, in the order of the leaves. Works under `jit`.

    Raises:
        TypeError: the selection is not of a known kind.
        ValueError: two kernels have the same path; and what `rms_operator_norm` raises, with the path of the leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from rmsjax import rms_operator_norm_by_path
        >>> params = {"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "heads": jnp.ones((2, 3, 4))}
        >>> axes = {"heads": (0, (1, 2))}
        >>> norms = rms_operator_norm_by_path(params, lambda path, leaf: axes.get(path, leaf.ndim == 2))
        >>> print({path: round(float(norm), 4) for path, norm in norms.items()})
        {'dense/kernel': 4.0, 'heads': 2.0}

    Source: keys as in `rms_by_path`; the norm as in `rms_operator_norm`.
    """
    function = "rms_operator_norm_by_path"
    _check_tolerance(function, tolerance)
    kernels: dict[str, Array] = {}
    axes_of: list[_Axes] = []
    for path, leaf in zip(leaf_paths(tree, sep), jax.tree.leaves(tree), strict=True):
        axes = _selected(function, _is_kernel if select is None else select, path, leaf)
        if axes is None:
            continue
        if path in kernels:
            raise ValueError(f"{function}: several kernels have the path {path!r}; choose another sep than {sep!r}")
        try:
            kernels[path] = as_numeric(function, "kernel", leaf, kind=jnp.inexact)
            axes_of.append(_axes(function, kernels[path], *axes))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (leaf {path!r})") from None
    return dict(zip(kernels, _operator_norms(list(kernels.values()), tuple(axes_of), exact, tolerance), strict=True))


def _selected(function: str, select: Selection, path: str, leaf: Any) -> tuple[Axes, Axes] | None:
    choice: Any = select(path, leaf)
    if isinstance(choice, (bool, np.bool_)):
        return (-2, -1) if choice else None
    if isinstance(choice, tuple) and len(choice) == 2:
        return choice
    raise TypeError(
        f"{function}: select must return True, False or (in_axis, out_axis), got {choice!r:.80} for {path!r}"
    )


def _is_kernel(path: str, leaf: Any) -> bool:
    del path
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(leaf.dtype, jnp.inexact)


class _Axes(NamedTuple):
    """The axes of a kernel; the others are a batch."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def matrices(self, kernel: Array) -> Array:
        """The kernel as [..., in, out]."""
        batch = tuple(a for a in range(kernel.ndim) if a not in self.rows + self.columns)
        sizes = [math.prod(kernel.shape[a] for a in axes) for axes in self]
        return kernel.transpose(*batch, *self.rows, *self.columns).reshape(*(kernel.shape[a] for a in batch), *sizes)


def _axes(function: str, kernel: Array, in_axis: Axes, out_axis: Axes) -> _Axes:
    shape = kernel.shape
    rows = as_axes(function, in_axis, shape, argument="in_axis")
    columns = as_axes(function, out_axis, shape, argument="out_axis")
    if set(rows) & set(columns):
        raise ValueError(f"{function}: in_axis {in_axis!r} and out_axis {out_axis!r} share an axis of shape {shape}")
    if any(shape[a] == 0 for a in rows + columns):
        raise ValueError(f"{function}: the kernel of shape {shape} has no elements along in_axis or out_axis")
    return _Axes(rows, columns)


def _check_tolerance(function: str, tolerance: float) -> None:
    if as_number(function, "tolerance", tolerance) <= 0:
        raise ValueError(f"{function}: tolerance must be positive, got {tolerance}")


@partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _operator_norms(kernels: list[Array], axes: tuple[_Axes, ...], exact: bool, tolerance: float) -> list[Array]:
    """The norms of kernels."""

    def of_kernels(kernels: list[Array]) -> list[Array]:
        matrices = [own.matrices(kernel) for own, kernel in zip(axes, kernels, strict=True)]
        return _norms_of_matrices(exact, tolerance, matrices)

    return partitioned_by_xla(of_kernels, kernels)


def partitioned_by_xla(fn: Callable[[list[Array]], list[Array]], kernels: list[Array]) -> list[Array]:
    """fn(kernels), whose results every device has. XLA partitions it, also on a mesh with explicit axes.

    For products of a kernel with itself no sharding follows from that of the kernel.
    """
    avals: list[Any] = list(map(jax.typeof, kernels))
    mesh = next((aval.sharding.mesh for aval in avals if aval.sharding.mesh.explicit_axes), None)
    if mesh is None:
        return fn(kernels)
    everywhere = NamedSharding(mesh, PartitionSpec())
    partitioned: Any = jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=everywhere)
    return partitioned(kernels)


def _norms_of_matrices(exact: bool, tolerance: float, kernels: list[Array]) -> list[Array]:
    """The norms of kernels [..., in, out]. Those of one shape share a loop, since each loop is a second to compile."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for k, kernel in enumerate(kernels):
        alike[kernel.shape[-2:], kernel.dtype].append(k)
    norms: dict[int, Array] = {}
    for members in alike.values():
        stack = lifted(jnp.concatenate([kernels[k].reshape(-1, *kernels[k].shape[-2:]) for k in members]))
        found = jax.vmap(partial(_operator_norm, exact, tolerance))(stack)
        ends = np.cumsum([math.prod(kernels[k].shape[:-2]) for k in members])
        for k, part in zip(members, jnp.split(found, ends[:-1]), strict=True):
            norms[k] = part.reshape(kernels[k].shape[:-2])
    return [norms[k] for k in range(len(kernels))]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _operator_norm(exact: bool, tolerance: float, kernel: Array) -> Array:
    scaled = _normalized(kernel)
    return rms(kernel) * _gain(_maximizer(exact, tolerance, scaled), scaled)


@_operator_norm.defjvp
def _(exact: bool, tolerance: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """At the maximum the maximizer's change does not count; the gain's derivative does not depend on the scale."""
    (kernel,), (tangent,) = primals, tangents
    scaled = _normalized(kernel)
    x = _maximizer(exact, tolerance, scaled)
    gain, change = jax.jvp(partial(_gain, x), (scaled,), (tangent,))
    return rms(kernel) * gain, change


def _normalized(x: Array) -> Array:
    return rms_normalize(x, axis=None, epsilon=0.0)


def _gain(x: Array, kernel: Array) -> Array:
    """RMS(xW) of an x with the RMS norm 1."""
    return rms(_matmul(x, kernel))


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)  # the default of accelerators has 8 bits


def _maximizer(exact: bool, tolerance: float, kernel: Array) -> Array:
    return _by_eigenvalues(kernel) if exact else _by_iteration(tolerance, kernel)


def _by_eigenvalues(kernel: Array) -> Array:
    adjoint = kernel.conj().T
    if kernel.shape[0] <= kernel.shape[1]:
        x = jnp.linalg.eigh(_matmul(kernel, adjoint))[1][:, -1].conj()
    else:
        x = _matmul(kernel, jnp.linalg.eigh(_matmul(adjoint, kernel))[1][:, -1]).conj()
    return _normalized(x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_iteration(tolerance: float, kernel: Array) -> Array:
    start = np.random.default_rng(0).normal(size=kernel.shape[0])
    x, _, _ = lax.while_loop(
        lambda state: (state[1] > tolerance) & (state[2] < _MAX_STEPS),
        lambda state: (*_step(state[0], kernel), state[2] + 1),
        (_unit(jnp.asarray(start, kernel.dtype)), jnp.asarray(jnp.inf, jnp.finfo(kernel.dtype).dtype), jnp.asarray(0)),
    )
    return x * math.sqrt(x.size)


@_by_iteration.defjvp
def _(tolerance: float, primals: Any, tangents: Any) -> tuple[Array, Array]:
    del tolerance, primals, tangents
    raise NotImplementedError(
        "rms_operator_norm: the iteration has a first derivative only; set exact=True for derivatives of higher order"
    )


def _step(x: Array, kernel: Array) -> tuple[Array, Array]:
    """The best unit vector of the Krylov space of x, and its residual relative to its eigenvalue."""
    adjoint = kernel.conj().T

    def add(k: Array, basis: Array) -> Array:
        power = _unit(_matmul(_matmul(basis[k - 1], kernel), adjoint))
        for _ in range(2):  # a second time, since rounding errors of the first grow with every power
            power = power - _matmul(_matmul(basis.conj(), power), basis)
        return basis.at[k].set(_unit(power))

    size = min(_KRYLOV, kernel.shape[0])
    basis = lax.fori_loop(1, size, add, jnp.zeros((size, x.size), x.dtype).at[0].set(x))
    images = _matmul(basis, kernel)
    best = jnp.linalg.eigh(_matmul(images, images.conj().T))[1][:, -1].conj()
    x, y = _matmul(best, basis), _matmul(best, images)
    eigenvalue = jnp.sum(jnp.abs(y) ** 2)
    residual = jnp.linalg.norm(_matmul(y, adjoint) - times(x, eigenvalue))
    return _unit(x), jnp.where(eigenvalue > 0, residual / jnp.where(eigenvalue > 0, eigenvalue, 1), 0)


def _unit(x: Array) -> Array:
    """x by its norm; 0 if x is what rounding leaves of a unit vector, which would be orthogonal to nothing.

    Vectors of the iteration are neither large nor small, so the plain norm does.
    """
    norm = jnp.linalg.norm(x)
    tiny = norm < 10 * float(jnp.finfo(x.dtype).eps)
    return times(x, jnp.where(tiny, 0, 1 / jnp.where(tiny, 1, norm)))
