"""What the RMSNorm layers of both Flax APIs share: everything but how they hold their parameter."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import initializers

from rmsjax._checks import as_axes, as_mapped, as_numeric
from rmsjax._norm import normalize

Axes = int | Sequence[int]


def check_inert(use_fast_variance: Any, force_float32_reductions: Any) -> None:
    """What Flax has and an RMS norm has no use for: taken, with a word, so that code for Flax runs as it is."""
    if not force_float32_reductions:
        raise ValueError(
            "RMSNorm: force_float32_reductions must be True, got False; reductions are always in float32 or wider"
        )
    if use_fast_variance is not None:
        warnings.warn(  # as from here, not from where the layer is made: one warning for a model of many layers
            "rmsjax RMSNorm: use_fast_variance does nothing, since an RMS norm subtracts no mean; leave it out",
            stacklevel=1,
        )


def plain_axes(axes: Axes) -> Axes:
    """Axes that a module can hold as static: arrays it takes for data, and lists do not hash."""
    axes = axes.tolist() if isinstance(axes, np.ndarray) else axes
    return tuple(axes) if isinstance(axes, list) else axes


def scale_initializer(scale_init: Any, scale_offset: float) -> Any:
    """The given initializer, or one with which the gain, scale + offset, starts at 1."""
    return initializers.constant(1.0 - scale_offset) if scale_init is None else scale_init


def apply_layer(
    x: Any,
    scale: Array | None,
    mask: Any,
    *,
    epsilon: float,
    dtype: Any,
    reduction_axes: Axes,
    feature_axes: Axes,
    axis_name: str | Sequence[str] | None,
    axis_index_groups: Any,
    scale_offset: float,
) -> Array:
    """The forward pass; the result has `dtype`, or the wider one of the dtypes of x and scale."""
    if dtype is None and scale is not None and hasattr(x, "dtype"):
        if x.dtype.itemsize == 1:  # JAX promotes no float8
            dtype = scale.dtype
        else:
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.promote_types(x.dtype, scale.dtype)
    return normalize(
        "RMSNorm",
        x,
        scale,
        axis=reduction_axes,
        feature_axes=feature_axes,
        epsilon=epsilon,
        scale_offset=scale_offset,
        where=mask,
        mapped=as_mapped("RMSNorm", axis_name, axis_index_groups),
        dtype=dtype,
        axis_argument="reduction_axes",
        where_argument="mask",
    )


def as_features(num_features: Any) -> tuple[int, ...]:
    """The sizes of the feature axes."""
    given: tuple[Any, ...] = tuple(num_features) if isinstance(num_features, (tuple, list)) else (num_features,)
    integers = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in given)
    if not integers:
        raise TypeError(f"RMSNorm: num_features must be an integer or a tuple of integers, got {num_features!r:.80}")
    if not given or min(given) < 1:
        raise ValueError(f"RMSNorm: num_features must be at least 1, got {num_features!r}")
    return tuple(int(n) for n in given)


def check_features(x: Any, sizes: Sequence[int], feature_axes: Axes, *, given: str, fix: str) -> None:
    """ValueError unless x has these sizes along the feature axes; `given` says whose they are, `fix` what to do."""
    shape = as_numeric("RMSNorm", "x", x).shape
    axes = as_axes("RMSNorm", feature_axes, shape, argument="feature_axes")
    found = tuple(shape[a] for a in axes)
    if found != tuple(sizes):
        raise ValueError(
            f"RMSNorm: {given} {_listed(sizes)}, but axis {_listed(axes)} of x with shape {shape} has size "
            f"{_listed(found)}; {fix.format(_listed(found))}, or set feature_axes"
        )


def _listed(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else str(tuple(values))
