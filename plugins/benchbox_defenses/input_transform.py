"""input-transform: classify a JPEG, blurred, median-filtered or coarser version of the image."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.transforms import blur, fewer_bits, jpeg, median

_PARAMETER = {"jpeg": "quality", "blur": "sigma", "median": "window", "bit-depth": "bits"}


class Transformed(api.Protected):
    """The model on transformed images. It is its own surrogate: blur and median have gradients, JPEG and rounding get
    the identity's in the backward pass, and all have their exact values in the forward pass."""

    def __init__(self, model: nn.Module, options: InputTransform.Options) -> None:
        super().__init__(model)
        self.options = options

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.model(self.transform(x))

    def transform(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """What the model sees of ``x``."""
        options = self.options
        if options.transform == "jpeg":
            return jpeg(x, options.quality)
        if options.transform == "blur":
            return blur(x, options.sigma)
        return median(x, options.window) if options.transform == "median" else fewer_bits(x, options.bits)


class InputTransform(api.Defense):
    """Takes details away before the model sees the image, and with them, it is hoped, the perturbation.

    JPEG (Dziugaite et al. 2016, arXiv 1608.00853; Guo et al., ICLR 2018), bit depth and median filter (Xu et al., NDSS
    2018), Gaussian blur. Attackers who do not know it meet a robust-looking model; those who attack through it (BPDA,
    Athalye et al. 2018) hardly notice it.
    """

    name = "input-transform"

    class Options(api.Options):
        transform: Literal["jpeg", "blur", "median", "bit-depth"] = Field("jpeg", description="what is done to images")
        quality: int = Field(75, ge=1, le=95, description="of the JPEG file; only jpeg")
        sigma: float = Field(1.0, gt=0, le=50, description="standard deviation in pixels; only blur")
        window: int = Field(3, ge=2, le=11, description="side of the square in pixels; only median")
        bits: int = Field(3, ge=1, le=8, description="bits per value; only bit-depth")

        @model_validator(mode="after")
        def _refuse_idle_options(self) -> Self:
            """An option that changes nothing would make two names for one cell."""
            for transform, option in _PARAMETER.items():
                default = type(self).model_fields[option].default
                if self.transform != transform and getattr(self, option) != default:
                    raise ValueError(f"{option} is only for transform {transform!r}, not {self.transform!r}")
            return self

    options: Options

    def protect(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> Transformed:
        """Fits nothing. Raises ContractError, when it is used, for JPEG of images that have not 1 or 3 channels."""
        return Transformed(model, self.options)
