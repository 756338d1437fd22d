"""bit-depth: a defense that rounds what it sees."""

from pydantic import Field
from torch import nn

from benchbox import api


class Rounding(nn.Module):
    """The model on images of few grey levels; ``differentiable``: gradients pass as if nothing had been rounded."""

    def __init__(self, model, levels, differentiable):
        super().__init__()
        self.model, self.levels, self.differentiable = model, levels, differentiable

    def forward(self, x):
        rounded = (x * self.levels).round() / self.levels
        return self.model(x + (rounded - x).detach() if self.differentiable else rounded)


class Rounded(api.Protected):
    """Classifies the rounded image. An adaptive attacker meets the same values with a straight-through gradient."""

    def __init__(self, model, levels):
        super().__init__(model)
        self.levels = levels

    def forward(self, x):
        return Rounding(self.model, self.levels, differentiable=False)(x)

    def surrogate(self):
        return Rounding(self.model, self.levels, differentiable=True)


class BitDepth(api.Defense):
    """Colour depth reduction (Xu et al., NDSS 2018, "Feature Squeezing"), to be attacked by BPDA (Athalye et al. 2018,
    "Obfuscated Gradients Give a False Sense of Security", §4.1).
    """

    name = "bit-depth"

    class Options(api.Options):
        bits: int = Field(2, ge=1, le=8, description="bits per channel that are left")

    def protect(self, model, calibration, rng):
        return Rounded(model, 2**self.options.bits - 1)
