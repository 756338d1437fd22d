"""pixel-deflection: replace random pixels by random neighbours, then classify."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from benchbox import api


class Deflected(api.Protected):
    """The model on images some of whose pixels were replaced; every call draws anew.

    It is its own surrogate: for given draws the gradient is exact, and over many calls it is that of the expectation.
    """

    def __init__(self, model: nn.Module, share: float, radius: int, rng: torch.Generator) -> None:
        super().__init__(model)
        self.share, self.radius, self.rng = share, radius, rng

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.model(self.deflect(x))

    def deflect(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """``x`` with the same number of distinct pixels of each image replaced, all channels together.

        The replacement is uniform over the part of the square of ``radius`` pixels around it that lies in the image,
        itself included. Raises ContractError when the share rounds to no pixel.
        """
        count, (height, width) = len(x), x.shape[2:]
        replaced = round(self.share * height * width)
        if not replaced:
            raise api.ContractError(
                f"pixel-deflection: share {self.share:g} of {height * width} pixels rounds to none; "
                f"choose at least {1 / (height * width):.3g}"
            )
        target = torch.rand(count, height * width, generator=self.rng).topk(replaced, dim=1).indices
        row = self._near(target // width, height)
        column = self._near(target % width, width)
        source = torch.arange(height * width).repeat(count, 1).scatter(1, target, row * width + column)
        return x.flatten(2).gather(2, source.to(x.device)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)

    def _near(self, place: Tensor, size: int) -> Tensor:
        """Uniform over the places at most ``radius`` from ``place`` and inside 0 … size - 1."""
        low, high = (place - self.radius).clamp_min(0), (place + self.radius).clamp_max(size - 1)
        return low + (torch.rand(place.shape, generator=self.rng) * (high - low + 1)).long().clamp_max(high - low)


class PixelDeflection(api.Defense):
    """Random local replacement of pixels (Prakash et al., CVPR 2018, "Deflecting Adversarial Attacks with Pixel
    Deflection", §4.1), uniformly over the image.

    The paper prefers pixels that a class-activation map calls unimportant and denoises wavelets afterwards; both are
    left out, and replacements are drawn all at once instead of one after the other. Broken with BPDA by Athalye &
    Carlini 2018 (arXiv 1804.03286).
    """

    name = "pixel-deflection"
    stochastic = True

    class Options(api.Options):
        share: float = Field(0.1, gt=0, le=1, description="share of the pixels that are replaced")
        radius: int = Field(2, ge=1, description="how far away, in pixels along each axis, the replacement may lie")

    def protect(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> Deflected:
        """Fits nothing; keeps ``rng`` to draw from."""
        return Deflected(model, self.options.share, self.options.radius, rng)
