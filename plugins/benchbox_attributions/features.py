"""What an ablation takes away at a time (pixels, values, channels, squares of pixels), and what stands in its place."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from benchbox import api

Reference = Literal["zero", "mean", "blur"]


class FeatureOptions(api.Options):
    """Which parts of an image are one feature; shared by all methods that take features away."""

    features: Literal["pixels", "values", "channels", "superpixels"] = Field(
        "pixels",
        description="what is replaced at a time: a pixel in all channels, one value of one channel, a whole channel, "
        "or a square of pixels in all channels",
    )
    side: int = Field(4, ge=1, description="side of a square in pixels, cut off at the image's edge; only superpixels")

    @model_validator(mode="after")
    def _refuse_idle_side(self) -> Self:
        """An option that changes nothing would make two names for one cell."""
        if self.features != "superpixels" and self.side != type(self).model_fields["side"].default:
            raise ValueError(f"side is only for features 'superpixels', not {self.features!r}: leave it out")
        return self


def feature_numbers(shape: tuple[int, int, int], options: FeatureOptions) -> Int[Tensor, "c h w"]:
    """The number of the feature that each value of an image of ``shape`` belongs to: 0, 1, …, in reading order."""
    channels, rows, columns = shape
    if options.features == "values":
        return torch.arange(channels * rows * columns).view(shape)
    if options.features == "channels":
        return torch.arange(channels)[:, None, None].expand(shape)
    side = options.side if options.features == "superpixels" else 1
    down, right = torch.arange(rows) // side, torch.arange(columns) // side
    return (down[:, None] * (int(right[-1]) + 1) + right).expand(shape)


def feature_members(numbers: Int[Tensor, "c h w"]) -> Int[Tensor, "features members"]:
    """The places of each feature in the flattened image; smaller features name their last place several times."""
    order = numbers.flatten().argsort(stable=True)
    sizes = numbers.flatten().bincount()
    start = sizes.cumsum(0) - sizes
    within = torch.minimum(torch.arange(int(sizes.max())), (sizes - 1)[:, None])
    return order[start[:, None] + within]


def reference_images(
    x: Float[Tensor, "n c h w"], kind: Reference, options: FeatureOptions, mean: Tensor | None = None
) -> Float[Tensor, "n c h w"]:
    """What stands in the place of a feature that is taken away.

    Black; ``mean``, a colour or an image that broadcasts to ``x``, such as the calibration images' mean; or a box blur
    of ``x`` itself, 3 × 3 pixels, for squares of ``side`` s 2s + 1, so that it brings colour from outside of them.
    Raises ContractError when ``mean`` is asked for and not given, or does not fit.
    """
    if kind == "blur":
        width = 2 * options.side + 1 if options.features == "superpixels" else 3
        return functional.avg_pool2d(x, width, stride=1, padding=width // 2, count_include_pad=False)
    if kind == "zero":
        return torch.zeros_like(x)
    if mean is None:
        raise api.ContractError("the reference 'mean' needs the mean of the calibration images: pass it as mean")
    try:
        return mean.to(x).expand_as(x)
    except RuntimeError:
        raise api.ContractError(
            f"the reference mean has the shape {tuple(mean.shape)}, which does not fit images {tuple(x.shape[1:])}"
        ) from None
