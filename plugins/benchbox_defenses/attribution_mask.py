"""attribution-mask: replace the pixels that an attribution calls least, or most, important, then classify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from benchbox import api
from benchbox_attributions.attribution import AttributionOptions, attribute

WIDTH = 0.1
"""Width of the sigmoid that stands in for the ranking, in standard deviations of an image's pixel weights."""


class Masked(api.Protected):
    """The model on images whose masked pixels were replaced. It is its own surrogate.

    A mask chosen by ranking has no derivative. With a mask that the gradient takes for a constant (plain BPDA,
    Athalye et al. 2018, arXiv 1802.00420) an attack never learns how to move it, and often does worse than one that
    does not know the defense. So the backward pass, and only that, goes through a sigmoid around the ranking's limit.
    """

    mean: Tensor

    def __init__(self, model: nn.Module, options: AttributionMask.Options, mean: Float[Tensor, "1 c 1 1"]) -> None:
        super().__init__(model)
        self.options = options
        self.register_buffer("mean", mean)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        graph = torch.is_grad_enabled() and x.requires_grad
        weight = self._weight(x, graph)
        mask = self._least_or_most(weight.detach()).to(x.dtype)
        if graph:
            soft = self._soft(weight)
            mask = mask + (soft - soft.detach())
        mask = mask.view(len(x), 1, *x.shape[2:])
        return self.model(mask * self.replacement(x) + (1 - mask) * x)

    def mask(self, x: Float[Tensor, "n c h w"]) -> Bool[Tensor, "n h w"]:
        """Which pixels are replaced: the same number in every image; of equal ones, the first in reading order.

        Raises ContractError when the fraction rounds to no pixel or to all of them.
        """
        return self._least_or_most(self._weight(x, graph=False)).view(len(x), *x.shape[2:])

    def replacement(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """What stands in masked places."""
        if self.options.replacement == "blur":
            return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return self.mean.expand_as(x) if self.options.replacement == "mean" else torch.zeros_like(x)

    def _weight(self, x: Tensor, graph: bool) -> Float[Tensor, "n p"]:
        """Per pixel, that is per place in the image: the sum of |attribution| over the channels."""
        return attribute(self.model, x, self.options, differentiable=graph, nan_ok=True).abs().sum(1).flatten(1)

    def _least_or_most(self, weight: Float[Tensor, "n p"]) -> Bool[Tensor, "n p"]:
        pixels = weight.shape[1]
        count = round(self.options.fraction * pixels)
        if not 0 < count < pixels:
            raise api.ContractError(
                f"attribution-mask: fraction {self.options.fraction:g} of {pixels} pixels rounds to {count}; "
                f"choose one between {1 / pixels:.3g} and {1 - 1 / pixels:.3g}"
            )
        order = weight.argsort(dim=1, descending=self.options.which == "most", stable=True)
        return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order[:, :count], True)

    def _soft(self, weight: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """About the mask, but with a slope: pixels near the limit between masked and kept ones are undecided."""
        if self.options.which == "most":
            weight = -weight
        ordered = weight.detach().sort(1).values
        count = round(self.options.fraction * weight.shape[1])
        limit = ordered[:, count - 1 : count + 1].mean(1, keepdim=True)
        width = WIDTH * ordered.std(1, correction=0, keepdim=True)
        return torch.sigmoid((limit - weight) / torch.where(width > 0, width, 1.0))


class AttributionMask(api.Defense):
    """Masks the pixels with the smallest or largest attribution of the predicted class.

    Masking the least attributed ones leaves the attacker fewer places to hide a perturbation in; masking the most
    attributed ones takes away what a perturbation pushed up. Attributions are those of the undefended model.
    """

    name = "attribution-mask"

    class Options(AttributionOptions):
        fraction: float = Field(0.3, gt=0, lt=1, description="share of the pixels that are replaced")
        which: Literal["least", "most"] = Field("least", description="which end of the ranking is replaced")
        replacement: Literal["zero", "mean", "blur"] = Field(
            "zero", description="black, the calibration images' mean colour, or a 3 x 3 box blur of the input"
        )

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fits nothing but the mean colour of the calibration images."""
        return {"mean": calibration.images.mean((0, 2, 3), keepdim=True)}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Masked:
        """See :meth:`benchbox.api.Defense.build`."""
        return Masked(model, self.options, fitted["mean"])
