"""`RMSNorm` for Flax NNX: holds the scale; the arithmetic is `rmsjax.rms_normalize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from rmsjax._layer import Axes, apply_layer, as_features, check_features, check_inert, plain_axes, scale_initializer

if TYPE_CHECKING:
    from jax import Array
    from jax.typing import DTypeLike
    from jaxtyping import Bool, Inexact

__all__ = ["RMSNorm"]


def __dir__() -> list[str]:
    return sorted(__all__)


class RMSNorm(nnx.Module):
    r"""RMS layer normalization, $y = \frac{x}{\sqrt{\|x\|_{RMS}^2 + \epsilon}} \odot (\text{scale} + \text{offset})$.

    Takes the place of `flax.nnx.RMSNorm`: the same arguments, the same parameter `scale`, so its checkpoints load, and
    the same outputs to rounding. Numerics are those of `rmsjax.rms_normalize`: right for every finite input, zeros
    and fully masked rows give 0 (also with `epsilon=0`), and the backward pass keeps no float32 copy of x.

    Args:
        num_features: the size of the feature axis; a tuple, in the order of the axes in x, for several of them.
        epsilon: what is added to the mean square, inside the root; 0 is legal.
        dtype: the dtype of the result; by default the wider one of x and scale. The norm is taken of x as it comes.
        param_dtype: the dtype of the scale.
        use_scale: multiply by a learned scale.
        scale_init: the initializer of the scale; by default the gain, scale + scale_offset, starts at 1.
        scale_offset: added to the scale; 1.0 is Gemma's convention, with a scale that starts at 0.
        reduction_axes: the axes of x that share a norm.
        feature_axes: the axes of x that have a scale of their own.
        axis_name: under `shard_map` or `pmap`, the mapped axes that a norm extends over.
        axis_index_groups: groups of indices of that mapped axis that each share a norm, as in `jax.lax.psum`.
        use_fast_variance: does nothing, and warns of that; code for Flax may pass it.
        force_float32_reductions: True; reductions are always in float32 or wider.
        promote_dtype: a function of `((x, scale), dtype=...)` that casts both; by default x is not copied.
        rngs: key for the initializer.
        scale_metadata: metadata for the scale, such as its sharding.

    Raises:
        TypeError: x is not floating, or the mask not boolean.
        ValueError: x does not have `num_features` along `feature_axes`; force_float32_reductions is False; and all that
            `rms_normalize` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import rmsjax
        >>> layer = rmsjax.nnx.RMSNorm(4, rngs=nnx.Rngs(0))
        >>> print(layer(jnp.array([[1.0, -1.0, 1.0, 1.0], [1e30, 0.0, 0.0, 0.0]])))
        [[ 0.9999995 -0.9999995  0.9999995  0.9999995]
         [ 2.         0.         0.         0.       ]]

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Callable[..., Array] | None = None,
        scale_offset: float = 0.0,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool | None = None,
        force_float32_reductions: bool = True,
        promote_dtype: Callable[..., Any] | None = None,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        check_inert(use_fast_variance, force_float32_reductions)
        shape = as_features(num_features)
        self.scale: nnx.Param[Any] | None
        if use_scale:
            init = scale_initializer(scale_init, scale_offset)
            self.scale = nnx.Param(init(rngs.params(), shape, param_dtype), **scale_metadata)
        else:
            self.scale = nnx.data(None)  # not static: it may be set later
        self.num_features = shape if isinstance(num_features, Sequence) else shape[0]
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_scale = use_scale
        self.scale_offset = scale_offset
        self.reduction_axes = plain_axes(reduction_axes)
        self.feature_axes = plain_axes(feature_axes)
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.promote_dtype = promote_dtype

    def __call__(self, x: Inexact[Array, "..."], mask: Bool[Array, "..."] | None = None) -> Inexact[Array, "..."]:
        """x normalised; where the mask is False, elements do not count and come out as 0."""
        fix = "make the layer with num_features={}"
        check_features(x, as_features(self.num_features), self.feature_axes, given="num_features is", fix=fix)
        scale = None if self.scale is None else self.scale[...]
        if self.promote_dtype is not None:
            x, scale = self.promote_dtype((x, scale), dtype=self.dtype)
        return apply_layer(
            x,
            scale,
            mask,
            epsilon=self.epsilon,
            dtype=self.dtype,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            scale_offset=self.scale_offset,
        )
