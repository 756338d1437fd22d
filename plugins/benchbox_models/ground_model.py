"""ground-model: the MNIST networks of the weight-noise study."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import nn

from benchbox_models.network import NetworkModel, Normalise, WeightOptions

CHANNELS = {1: (32, 64, 128, 256), 2: (32, 32, 32, 32), 3: (32, 64, 128), 4: (32, 64), 5: (32,), 6: (32,)}
"""Output channels of the convolutions of each model."""
HIDDEN = {1: (128,), 2: (), 3: (256,), 4: (128,), 5: (128,), 6: ()}
"""Widths of the linear layers before the last one."""
SIDE = 28


class GroundModelOptions(WeightOptions):
    number: Literal[1, 2, 3, 4, 5, 6] = Field(description="which of the six ground models")


class GroundModel(NetworkModel):
    """3×3 convolutions, each before a ReLU and a 2×2 maximum pooling, then one or two linear layers.

    The ground models of A. Braimah's study of noise on weights (2023, repository fall2023project): 1: convolutions
    32-64-128-256, linear 128-10; 2: 32-32-32-32, 10; 3: 32-64-128, 256-10; 4: 32-64, 128-10; 5: 32, 128-10; 6: 32, 10.
    Takes (n, 1, 28, 28) in [0, 1], scaled inside to [-1, 1] as in the study, gives logits (n, 10).
    """

    name = "ground-model"
    Options = GroundModelOptions
    options: GroundModelOptions

    def build(self) -> nn.Module:
        channels, hidden = CHANNELS[self.options.number], HIDDEN[self.options.number]
        model = nn.Sequential()
        model.add_module("normalise", Normalise([0.5], [0.5]))
        for index, (before, after) in enumerate(pairwise((1, *channels)), start=1):
            model.add_module(f"conv{index}", nn.Conv2d(before, after, 3, padding=1))
            model.add_module(f"relu{index}", nn.ReLU())
            model.add_module(f"pool{index}", nn.MaxPool2d(2))
        model.add_module("flatten", nn.Flatten())
        side = SIDE // 2 ** len(channels)
        widths = (channels[-1] * side**2, *hidden, 10)
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            if index > 1:
                model.add_module(f"relu{len(channels) + index - 1}", nn.ReLU())
            model.add_module(f"linear{index}", nn.Linear(before, after))
        return model
