"""`RMSNorm` for Flax Linen: holds the scale; the arithmetic is `rmsjax.rms_normalize`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp

from rmsjax._boxes import unboxed
from rmsjax._checks import as_axes, as_numeric
from rmsjax._layer import Axes, apply_layer, check_features, check_inert, plain_axes, scale_initializer

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Inexact

__all__ = ["RMSNorm"]


def __dir__() -> list[str]:
    return sorted(__all__)


class RMSNorm(nn.Module):
    r"""RMS layer normalization, $y = \frac{x}{\sqrt{\|x\|_{RMS}^2 + \epsilon}} \odot (\text{scale} + \text{offset})$.

    Takes the place of `flax.linen.RMSNorm`: the same arguments, the same parameter `scale`, so its checkpoints load,
    and the same outputs to rounding. Numerics are those of `rmsjax.rms_normalize`: right for every finite input, zeros
    and fully masked rows give 0 (also with `epsilon=0`), and the backward pass keeps no float32 copy of x.

    Attributes:
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

    Raises:
        TypeError: x is not floating, or the mask not boolean.
        ValueError: the scale does not fit the feature axes of x; force_float32_reductions is False; and all that
            `rms_normalize` raises.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import rmsjax
        >>> layer = rmsjax.linen.RMSNorm(scale_offset=1.0)
        >>> x = jnp.array([[1.0, -1.0, 1.0, 1.0], [1e30, 0.0, 0.0, 0.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> print(variables["params"]["scale"])
        [0. 0. 0. 0.]
        >>> print(layer.apply(variables, x))
        [[ 0.9999995 -0.9999995  0.9999995  0.9999995]
         [ 2.         0.         0.         0.       ]]

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Callable[..., Any] | None = None
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool | None = None
    force_float32_reductions: bool = True
    scale_offset: float = 0.0

    def __post_init__(self) -> None:
        check_inert(self.use_fast_variance, self.force_float32_reductions)
        object.__setattr__(self, "use_fast_variance", None)  # Flax makes copies, of which there is no more to say
        for axes in "reduction_axes", "feature_axes":
            object.__setattr__(self, axes, plain_axes(getattr(self, axes)))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Inexact[Array, "..."], *, mask: Bool[Array, "..."] | None = None) -> Inexact[Array, "..."]:
        """x normalised; where the mask is False, elements do not count and come out as 0."""
        scale = None
        if self.use_scale:
            if self.has_variable("params", "scale"):  # Linen's own message would not name the axis
                held = unboxed(self.get_variable("params", "scale"))
                sizes, fix = jnp.shape(held), "initialise the layer with an x like this"
                check_features(x, sizes, self.feature_axes, given="the scale has size", fix=fix)
            sizes = as_numeric("RMSNorm", "x", x, kind=jnp.inexact).shape
            shape = [sizes[a] for a in as_axes("RMSNorm", self.feature_axes, sizes, argument="feature_axes")]
            scale = self.param("scale", scale_initializer(self.scale_init, self.scale_offset), shape, self.param_dtype)
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
