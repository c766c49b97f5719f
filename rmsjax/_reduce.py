"""The one place that squares and sums.

Everything rmsjax measures is the root of a mean of squares, rho = sqrt(mean(|x|^2) + epsilon), over some elements of
some arrays: right for every finite input, at the cost of the naive sum, and differentiable in both modes. What the
naive sum costs differs between platforms, so there are several forms of one formula, and `by_platform` chooses:

- squares that always fit (float16, float8): the naive sum, everywhere;
- `_by_branch`, for CPUs: the naive sum, and another reading of the data only if that left the range;
- `_by_double`, for NVIDIA GPUs: one sum in float64, which holds the square of every float32;
- `_by_three_sums`, for TPUs and all else, and for float64: the sums of x, x S and x/S in one reading, of which one is
  right;
- `_norm.in_one_kernel`, for a row to be normalised on an NVIDIA GPU: `_by_double`, fused with what follows.

`root_of_sums` makes the root of whatever sums its caller takes, here those of an array (`root`), in `_pools` those of
a tree. Derivatives are written by hand as linear maps of plain operations, so that both modes and all orders follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------------- platforms

FORM: str | None = None
"""For tests: the platform whose forms to take, instead of that which a program is compiled for."""


def by_platform(*args: Any, default: Callable[..., T], **forms: Callable[..., T]) -> T:
    """The form for the platform that a program is compiled for, of the same arguments: `forms` by its name."""
    if FORM is not None:
        return forms.get(FORM, default)(*args)
    return lax.platform_dependent(*args, default=default, **forms)


def cpu_barrier(values: T) -> T:
    """Keep XLA:CPU from sharing a computed value between two loops: it would store it in full, in float32.

    On other platforms fusion across the two is what one wants, so there it is the identity.
    """
    return lax.platform_dependent(values, cpu=hold, default=lambda v: v)


def hold(values: T) -> T:
    """Compute these numbers, a few for each row, before what uses them for each element and might do it again there."""
    # Before jax 0.11 what comes out of one barrier varies over all mapped axes that anything in it varies over.
    alike = len({varying(value) for value in jax.tree.leaves(values)}) <= 1
    return lax.optimization_barrier(values) if alike else jax.tree.map(lax.optimization_barrier, values)


# What a derivative needs it computes again from its arguments, which live anyway; nothing else is kept. There is no
# barrier around it, as JAX would put by default, since that keeps XLA:GPU and XLA:TPU from fusing it with what follows.
recomputed = partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)


# -------------------------------------------------------------------------------------------------------------- dtypes

_jax: Any = jax
enable_x64 = _jax.enable_x64 if hasattr(jax, "enable_x64") else _jax.experimental.enable_x64  # moved in jax 0.8
KNOWS_DOUBLE = jax.__version_info__ >= (0, 8)
"""Before, an array of constants in float64 could be taken for one of 32 bits, where JAX is not set to have float64."""


def accumulator_dtype(*dtypes: Any) -> np.dtype[Any]:
    """float64 where one of the dtypes is float64 or complex128, float32 for all else."""
    return np.dtype(np.float64 if any(d in (np.float64, np.complex128) for d in dtypes) else np.float32)


def real_parts(x: Array, dtype: Any) -> tuple[Array, ...]:
    """x in a real dtype: (x,), or (real part, imaginary part) of a complex x."""
    return tuple(part.astype(dtype) for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,)))


def lift(x: Array, dtype: Any) -> Array:
    """x in the accumulator dtype, or in its complex counterpart if x is complex."""
    return x.astype(np.result_type(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype)


def lifted(x: Array) -> Array:
    """x in its accumulator dtype."""
    return lift(x, accumulator_dtype(x.dtype))


def times(x: Array, *factors: Array) -> Array:
    """The product in the dtype of x, which may be complex where the factors are real."""
    return reduce(lax.mul, [factor.astype(x.dtype) for factor in factors], x)


def is_known(size: Any) -> bool:
    """Whether a size is a number; in an export it may be symbolic."""
    return isinstance(size, int)


def divisor(size: Any, dtype: Any) -> Any:
    """A number of elements to divide by, at least 1; an array if the number is not known."""
    return dtype.type(max(1, size)) if is_known(size) else jnp.maximum(jnp.asarray(size).astype(dtype), 1)


# -------------------------------------------------------------------------------------------------------------- range


class _Window(NamedTuple):
    """A mean square between `low` and `high` lost nothing. Beyond, x is first scaled by `scale` or its inverse.

    In float32: 2^-80, 2^124, 2^80. A fixed power of two brings every normal number that matters to where its square is
    normal too, so nobody has to look for the largest element or to divide by it.
    """

    low: np.floating[Any]
    high: np.floating[Any]
    scale: np.floating[Any]


def _window(dtype: np.dtype[Any]) -> _Window:
    info = jnp.finfo(dtype)
    bounds = float(info.tiny) / float(info.eps) ** 2, float(info.max) / 16, 2.0 ** (-5 * int(info.minexp) // 8 + 2)
    return _Window(*map(dtype.type, bounds))


def squares_fit(dtype: np.dtype[Any], accumulator: np.dtype[Any]) -> bool:
    """Whether no sum of squares of this dtype leaves the accumulator's range: float8, float16, 32-bit integers."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return dtype.itemsize <= 4
    x, acc = jnp.finfo(dtype), jnp.finfo(accumulator)
    # Where no square underflows none overflows: types reach as far up as down.
    return 2 * (int(x.minexp) - int(x.nmant)) > int(acc.minexp)


@jax.custom_jvp
def four_over(root: Array) -> Array:
    """4/root, and 0 where root is 0.

    1/root is subnormal for a root near the top of the range, hence flushed to 0. 4/root never is, and overflows for the
    smallest normal number alone, where the largest number is as good.
    """
    largest, split = jnp.finfo(root.dtype).max, jax.typeof(root).sharding.spec
    ones = [a for a, n in enumerate(root.shape) if n == 1 and split[a] is None]  # left out, as are those of sums
    root = lax.squeeze(root, ones)
    return lax.expand_dims(jnp.where(root == 0, 0, jnp.minimum(4 / jnp.where(root == 0, 1, root), largest)), ones)


@four_over.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (root,), (droot,) = primals, tangents
    y = four_over(root)
    return y, -in_order(droot, y / 4, y)  # 4/root^2 would overflow or underflow


@jax.custom_jvp
def divide4(x: Array, root: Array, over: Array) -> Array:
    """4 x/root without a division for each element, and 0 where root is 0; linear in x. `over` is `four_over(root)`.

    Whoever calls divides by 4 what is small. The derivative multiplies in an order that neither overflows nor
    underflows on the way.
    """
    del root
    return times(x, over)


@divide4.defjvp
def _(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    (x, root, over), (dx, droot, _) = primals, tangents
    y = divide4(x, root, over)
    return y, divide4(dx, root, over) - times(y, divide4(droot, root, over) / 4)


def factor_near_inverse(span: Range, root: Array) -> Array:
    """That of `span.factors` by which numbers of the size of root become about 1."""
    scale, factor = _window(span.dtype).scale, jnp.ones_like(root)
    if span.fits:
        return factor
    factor = jnp.where(root > np.sqrt(scale), 1 / scale, factor)
    return factor if span.is_outweighed else jnp.where(root < 1 / np.sqrt(scale), scale, factor)


def in_order(x: Array, *factors: Array) -> Array:
    """`times` from left to right, for factors of which it matters which ones are multiplied first.

    XLA turns (x c) d into x (c d) where the factors are constants, and that may overflow or underflow. To reduce the
    precision of x c to what it is changes nothing, and prevents it; but reductions do not fuse with that.
    """

    def product(x: Array, factor: Array) -> Array:
        info = jnp.finfo(x.dtype)
        x = times(x, factor)
        return x if jnp.iscomplexobj(x) else lax.reduce_precision(x, int(info.nexp), int(info.nmant))

    return reduce(product, factors, x)


# --------------------------------------------------------------------------------------------------------- mapped axes


def varying(x: Array) -> frozenset[str]:
    """The manual mesh axes that JAX knows x to vary over: none unless under shard_map(check_vma=True)."""
    if jax.sharding.get_abstract_mesh().empty:
        return frozenset()
    aval: Any = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma  # renamed in jax 0.10


class Mapped(NamedTuple):
    """Mapped axes to sum over, each group of devices by itself where groups are given (as in `lax.psum`)."""

    names: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None

    def of(self, x: Array) -> Mapped:
        """Only the axes to sum x over: those it varies over where JAX tracks that, else all, as the caller said.

        Whether JAX tracks is not public, but the index along an axis varies over it by definition, so it tells; only
        of axes of a mesh, since arrays never vary over the axis of a vmap.
        """
        if not self.names:
            return self
        tracks = jax.sharding.get_abstract_mesh().axis_names
        names = (n for n in self.names if n in varying(x) or n not in tracks or n not in varying(lax.axis_index(n)))
        return self._replace(names=tuple(names))

    def shards(self) -> int:
        """How many devices are summed over."""
        if self.names and self.groups:
            return len(self.groups[0])
        return math.prod(int(lax.axis_size(n)) for n in self.names)

    def psum(self, x: T) -> T:
        """The sum over these axes; no operation at all where there are none."""
        return lax.psum(x, self.names, axis_index_groups=self.groups) if self.names else x


UNMAPPED = Mapped()

# ---------------------------------------------------------------------------------------------------------------- sums


def may_be_split(x: Array) -> bool:
    """Whether jit may split x over devices. To reshape it would then gather it.

    Of an array that is yet to be placed the mesh is empty here, and `in_shardings` may still split it.
    """
    mesh: Any = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return jax.device_count() > 1
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit  # the latter counts even with size 1
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(kind == explicit or (kind == auto and size > 1) for size, kind in axes)


def _extent(x: Array, axes: Sequence[int]) -> int:
    """Along how many axes there is more than one element."""
    return sum(x.shape[a] != 1 for a in axes)


def sum_of(
    terms: Callable[..., Sequence[Array]], axes: Sequence[int], *arrays: Array, on_cpu: bool | None = None
) -> list[Array]:
    """The sums over axes of each of the `terms(*arrays)`, elementwise functions, in one reading of the arrays.

    The arrays have one rank, and along each axis size 1 or that of the first. `on_cpu` where that is known.
    """

    def at_once(*arrays: Array) -> list[Array]:
        # One by one, which XLA fuses: one reduction with several results it would not split over devices, but gather.
        return [lax.reduce_sum(total, axes) for total in terms(*arrays)]

    on_cpu = True if FORM is not None else on_cpu  # whatever the form, a test is run on a CPU
    if on_cpu is False or _extent(arrays[0], axes) < 2 or may_be_split(arrays[0]):
        return at_once(*arrays)
    merged = partial(_neighbours_merged, terms, axes)
    return merged(*arrays) if on_cpu else by_platform(*arrays, cpu=merged, default=at_once)


def _neighbours_merged(terms: Callable[..., Sequence[Array]], axes: Sequence[int], *arrays: Array) -> list[Array]:
    """For CPUs: XLA:CPU adds up one axis in blocks of 32 terms, but several in blocks of 32 along each of them.

    That are 1024 or 32768 terms one by one, and the sum of equal numbers is off by 1e-5. So neighbouring axes become
    one, and axes that are no neighbours are added up one after the other.
    """
    x = arrays[0]
    groups = [
        (summed, [*group])
        for summed, group in groupby((a for a in range(x.ndim) if x.shape[a] != 1), axes.__contains__)
    ]
    # The arrays are reshaped, not the terms, since XLA undoes a reshape right before a sum.
    sizes = [[math.prod(array.shape[a] for a in group) for _, group in groups] for array in arrays]
    totals = list(terms(*map(jnp.reshape, arrays, sizes)))
    for done, k in enumerate(k for k, (summed, _) in reversed([*enumerate(groups)]) if summed):
        totals = hold(totals) if done else totals  # or XLA makes one sum of both
        totals = [lax.reduce_sum(total, [k]) for total in totals]
    return [jnp.reshape(total, [n for a, n in enumerate(x.shape) if a not in axes]) for total in totals]


def sums_of_squares(x: Array, axes: Sequence[int], dtype: Any, factors: Sequence[Any], on: str) -> list[Array]:
    """For each factor the sum over axes of |x factor|^2: None for 1, a number, or an array of the shape of the sum."""

    def square(part: Array, factor: Any) -> Array:
        scaled = part * factor
        if isinstance(factor, Array):
            return lax.square(scaled)
        # The size of it: of a constant, XLA before that of jax 0.12 would make (x x)(factor factor) of a bare square.
        return lax.square(lax.max(scaled, lax.neg(scaled)))

    def squares(x: Array, *given: Array) -> list[Array]:
        left, parts = iter(given), real_parts(x, dtype)
        factor_of = [next(left) if isinstance(factor, Array) else factor for factor in factors]
        return [reduce(lax.add, [lax.square(p) if f is None else square(p, f) for p in parts]) for f in factor_of]

    given = [lax.expand_dims(factor, axes) for factor in factors if isinstance(factor, Array)]
    if on == "cpu" and KNOWS_DOUBLE and dtype == np.float32 and _extent(x, axes) > 1 and may_be_split(x):
        # What may be split cannot be reshaped, nor added up axis by axis, which would send partial sums.
        with enable_x64(True):
            wide = [lax.convert_element_type(total, np.float64) for total in squares(x, *given)]
            return [lax.convert_element_type(lax.reduce_sum(total, axes), dtype) for total in wide]
    return sum_of(squares, axes, x, *given, on_cpu=on == "cpu")


# ------------------------------------------------------------------------------------------------------------ the root


class Range(NamedTuple):
    """What is known about sums of squares before they are taken."""

    epsilon: float  # what is added to the mean
    dtype: np.dtype[Any]  # of the sums
    fits: bool  # no sum can leave the range
    computed: bool = False  # from other arrays just before, in the loop that adds up the squares

    @property
    def is_outweighed(self) -> bool:
        """Whether what underflows is nothing beside epsilon."""
        return bool(self.epsilon >= 1e8 * _window(self.dtype).low)

    @property
    def factors(self) -> tuple[float, ...]:
        """What x may be multiplied by to be near 1."""
        scale = float(_window(self.dtype).scale)
        return (1.0,) if self.fits else (1.0, 1 / scale) if self.is_outweighed else (1.0, 1 / scale, scale)


def range_of(*dtypes: Any, epsilon: float = 0.0, result_dtype: Any = np.float32) -> Range:
    """The range of sums over arrays of these dtypes.

    result_dtype: the dtype of what is computed with the root, which is not to be less exact than that.
    """
    dtype = accumulator_dtype(result_dtype, *dtypes)
    return Range(epsilon, dtype, all(squares_fit(d, dtype) for d in dtypes))


Sums = Callable[[Any, list[Any], Any, str], list[list[Array]]]
"""Takes sums of squares of some data: for each factor (None for 1, a number, or a list with an array for each sum) all
sums of the squares of the elements times that factor, in the dtype that is the third argument. The last one says what
it is compiled for: "cpu", "cuda", or "other"."""


def root_of_sums(span: Range, sums: Sums, data: Any, counts: Sequence[Any]) -> list[Array]:
    """sqrt(sum/count + epsilon) of each of the sums of squares of some data; counts are at least 1."""
    if span.fits:
        forms = [partial(_as_they_are, span, sums, on) for on in ("cpu", "other")]
    else:
        forms = [partial(_by_branch, span, sums), partial(_by_three_sums, span, sums)]
        if span.dtype == np.float32 and KNOWS_DOUBLE:
            return by_platform(data, list(counts), cpu=forms[0], cuda=partial(_by_double, span, sums), default=forms[1])
    return by_platform(data, list(counts), cpu=forms[0], default=forms[1])


def _as_they_are(span: Range, sums: Sums, on: str, data: Any, counts: list[Any]) -> list[Array]:
    """Where no sum can leave the range."""
    return _roots(span, sums(data if span.computed else cpu_barrier(data), [None], span.dtype, on)[0], None, counts)


def _by_branch(span: Range, sums: Sums, data: Any, counts: list[Any]) -> list[Array]:
    """For CPUs: read the data again only if some sum left the window.

    Of small arrays a sum in float64 is as fast, and compiles in half the time. But under vmap there may be many of
    them, which no one sees here: 65,536 of 128 elements then take twenty times as long (jax 0.12).
    """
    # Behind a barrier, or XLA would store float32 copies and squares, to share them with what follows.
    data = hold(data)
    (naive,) = sums(data, [None], span.dtype, "cpu")

    def as_they_are(data: Any, naive: list[Array], counts: list[Any]) -> list[Array]:
        del data
        return _roots(span, naive, None, counts)

    def rescaled(data: Any, naive: list[Array], counts: list[Any]) -> list[Array]:
        factors = _factors(span, naive, counts)
        return _roots(span, sums(data, [factors], span.dtype, "cpu")[0], factors, counts)

    fit = _all_in_batch([lax.eq(factor, lax.full_like(factor, 1)) for factor in _factors(span, naive, counts)])
    return lax.cond(fit, as_they_are, rescaled, data, naive, counts)


def _by_double(span: Range, sums: Sums, data: Any, counts: list[Any]) -> list[Array]:
    """For NVIDIA GPUs: one sum in float64, which holds the square of every float32, whatever JAX is set to have.

    Even those of them that have few units for float64 add up faster than numbers come from memory.
    """
    with enable_x64(True):
        (totals,) = sums(data, [None], np.float64, "cuda")
        means = [total / lax.convert_element_type(n, np.float64) for total, n in zip(totals, counts, strict=True)]
        return [lax.convert_element_type(lax.sqrt(mean + span.epsilon), np.float32) for mean in means]


def _by_three_sums(span: Range, sums: Sums, data: Any, counts: list[Any]) -> list[Array]:
    """For accelerators: sums at three scales in one reading. XLA:GPU would run both sides of a branch, always."""
    naive, large, *small = sums(data, [None, *span.factors[1:]], span.dtype, "other")
    factors = _factors(span, naive, counts)
    totals = [lax.select(f < 1, many, total) for f, many, total in zip(factors, large, naive, strict=True)]
    for few in small:
        totals = [lax.select(f > 1, some, total) for f, some, total in zip(factors, few, totals, strict=True)]
    return _roots(span, totals, factors, counts)


def _roots(span: Range, totals: list[Array], factors: list[Array] | None, counts: list[Any]) -> list[Array]:
    given = [None] * len(totals) if factors is None else factors
    return [_root(span, *each) for each in zip(totals, given, counts, strict=True)]


def _factors(span: Range, naive: Sequence[Array], counts: Sequence[Any]) -> list[Array]:
    """What to multiply x by before it is squared: 1 where the naive sum lost nothing."""
    low, high, scale = _window(span.dtype)

    def factor(total: Array, count: Any) -> Array:
        one, up, down = (lax.full_like(total, value) for value in (1, scale, 1 / scale))
        inside = one if span.is_outweighed else lax.select(total >= low * count, one, up)
        return lax.select(total < high, inside, down)  # NaN goes down, and stays NaN

    return [factor(total, count) for total, count in zip(naive, counts, strict=True)]


def _root(span: Range, total: Array, factor: Array | None, count: Any) -> Array:
    """sqrt(total/count + epsilon) of a sum that was taken with a factor."""
    mean = total / count
    if factor is None:
        return lax.sqrt(mean + span.dtype.type(span.epsilon))
    root = lax.sqrt(mean + in_order(factor, jnp.asarray(span.epsilon), factor) if span.epsilon else mean)
    # The RMS of numbers at the top of the range is in the range: do not let the last rounding carry it beyond.
    # A root of numbers that were scaled up is far below.
    largest = lax.min(factor, lax.full_like(factor, 0.5)) * jnp.finfo(span.dtype).max
    return lax.div(lax.select(lax.is_finite(root), lax.min(root, largest), root), factor)


@custom_vmap
def _all_in_batch(flags: list[Array]) -> Array:
    """Whether all flags are set, and under vmap those of all examples: so it stays one.

    A `cond` on one flag stays a branch, where a flag for each example would make it both branches and a select.
    """
    alike: dict[Any, list[Array]] = {}
    for array in flags:
        alike.setdefault(jax.typeof(array), []).append(array)
    all_of = [reduce(lax.bitwise_and, group) for group in alike.values()]
    return reduce(lax.bitwise_and, [lax.reduce_and(each, range(each.ndim)) for each in all_of])


@_all_in_batch.def_vmap
def _(axis_size: int, in_batched: list[Any], flags: list[Array]) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _all_in_batch(flags), False


# ------------------------------------------------------------------------------------------------- the root of an array


class Rows(NamedTuple):
    """What is static about the groups of elements of one array that have a root each."""

    axes: tuple[int, ...]  # which are kept with size 1
    span: Range
    mapped: Mapped  # what each group extends over beside the axes


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def root(rows: Rows, x: Array, count: Any) -> Array:
    """rho = sqrt(mean(|x|^2) + epsilon) of each group; `count` is what sums are divided by, at least 1.

    The derivative is mean(Re(conj(x) dx))/rho, and 0 where rho = 0.
    """
    count = lax.squeeze(count, rows.axes) if jnp.ndim(count) else count

    def sums(x: Array, factors: list[Any], dtype: Any, on: str) -> list[list[Array]]:
        # Axes are not kept: XLA:CPU computes one by one what has a last axis of size 1.
        given = [factor[0] if isinstance(factor, list) else factor for factor in factors]
        return [[rows.mapped.psum(total)] for total in sums_of_squares(x, rows.axes, dtype, given, on)]

    (found,) = root_of_sums(rows.span, sums, x, [count])
    return lax.expand_dims(found, rows.axes)


def four_over_root_in_double(rows: Rows, x: Array, count: Any) -> Array:
    """4/rho of each row, as in `_by_double`, by nothing that keeps XLA:GPU from fusing it with what comes after."""
    with enable_x64(True):
        wide = lax.convert_element_type(x, np.float32 if rows.span.fits else np.float64)
        total = lax.convert_element_type(lax.reduce_sum(lax.square(wide), rows.axes), np.float64)
        over = 4 * lax.rsqrt(total / lax.convert_element_type(count, np.float64) + rows.span.epsilon)
        over = lax.min(over, lax.full_like(over, float(jnp.finfo(np.float32).max)))
        return lax.expand_dims(lax.convert_element_type(over, np.float32), rows.axes)


@partial(root.defjvp, symbolic_zeros=True)
def _(rows: Rows, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, count), (dx, _) = primals, tangents
    rho = root(rows, x, count)
    if isinstance(dx, SymbolicZero):
        return rho, jnp.zeros_like(rho)
    return rho, along_root(rows, x, rho, count, dx)


@partial(recomputed, static_argnums=(0,))
def along_root(rows: Rows, x: Array, rho: Array, count: Any, dx: Array) -> Array:
    """The derivative of `root` along dx: mean(Re(conj(x/rho) dx)), linear in dx."""
    x, rho = cpu_barrier((x, rho))
    return in_order(rows.mapped.psum(along(x, rho, dx, rows.axes, count)), inverse_root(count, rho.dtype))


def inverse_root(count: Any, dtype: Any) -> Array:
    return 1 / jnp.sqrt(jnp.asarray(count, dtype))


def direction(x: Array, rho: Array, over: Array, count: Any) -> Array:
    """v = x/(rho sqrt(count)): of the length 1, if rho is the RMS norm of x and nothing else; linear in x.

    Derivatives go along v, by v.dx: no sum on the way is larger than the length of dx, nor one on the way back than
    that of the cotangent, and small terms are as far from underflow as that allows.
    """
    return times(divide4(x, rho, over), inverse_root(count, rho.dtype) / 4)


def along(x: Array, rho: Array, dx: Array, axes: Sequence[int], count: Any) -> Array:
    """Re(v.dx) with v = `direction`: the sum over axes, which are kept with size 1; linear in dx."""

    def products(x: Array, rho: Array, over: Array, dx: Array, count: Array) -> list[Array]:
        parts = zip(real_parts(x, rho.dtype), real_parts(dx, rho.dtype), strict=True)
        return [reduce(lax.add, [direction(p, rho, over, count) * t for p, t in parts])]

    count = jnp.broadcast_to(jnp.asarray(count, rho.dtype), rho.shape)
    (total,) = sum_of(products, axes, x, rho, hold(four_over(rho)), dx, count)
    return lax.expand_dims(total, axes)
