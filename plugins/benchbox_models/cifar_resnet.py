"""cifar-resnet: the small networks of He et al. 2016, "Deep Residual Learning for Image Recognition"."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from torch import nn

from benchbox_models.network import NetworkModel, Normalise
from benchbox_models.resnet18 import ResNet18Options, SmallResNet

CHANNELS = (16, 32, 64)


class CifarResNetOptions(ResNet18Options):
    """How deep it is, and the shape of input and output; by default what the shipped weights are for."""

    depth: int = Field(14, ge=8, description="6 n + 2 layers, for n blocks in each of the three stages")

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if (self.depth - 2) % (2 * len(CHANNELS)):
            raise ValueError(f"depth is 6 n + 2, such as 8, 14 or 20, not {self.depth}")
        return self


class CifarResNet(NetworkModel):
    """§4.2's network: three stages with 16, 32 and 64 channels; 0.18 million weights with depth 14, 0.27 with 20.

    Where the shape changes the shortcut is a convolution (the paper's option B) instead of padding with zeros.
    """

    name = "cifar-resnet"
    Options = CifarResNetOptions
    options: CifarResNetOptions

    def build(self) -> nn.Module:
        blocks = (self.options.depth - 2) // (2 * len(CHANNELS))
        normalise = Normalise(self.options.mean, self.options.std)
        return SmallResNet(CHANNELS, blocks, self.options.num_classes, normalise)
