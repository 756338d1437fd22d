"""resnet18 for small images: He et al. 2016, "Deep Residual Learning for Image Recognition", §4.2's stem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from benchbox_models.network import NetworkModel, Normalise, WeightOptions


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut (He et al. 2016, Figure 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A 3×3 stem without pooling, then a stage of ``blocks`` blocks for each of ``channels``, each half as large."""

    def __init__(self, channels: Sequence[int], blocks: int, num_classes: int, normalise: Normalise) -> None:
        super().__init__()
        self.normalise = normalise
        self.conv1 = nn.Conv2d(len(normalise.mean), channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.stages = [f"layer{number}" for number in range(1, len(channels) + 1)]
        before = channels[0]
        for name, width in zip(self.stages, channels, strict=True):
            first = Block(before, width, 1 if name == self.stages[0] else 2)
            self.add_module(name, nn.Sequential(first, *(Block(width, width, 1) for _ in range(blocks - 1))))
            before = width
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(self.normalise(x))))
        for name in self.stages:
            out = self.get_submodule(name)(out)
        return self.linear(out.mean((2, 3)))


class ResNet18Options(WeightOptions):
    """Shape of input and output; by default the constants of CIFAR-10's training images."""

    num_classes: int = Field(10, ge=2, description="logits per image")
    in_channels: int = Field(3, ge=1, description="1 for grey images, 3 for RGB")
    mean: list[float] = Field([0.4914, 0.4822, 0.4465], description="of each channel, subtracted inside the model")
    std: list[float] = Field([0.2470, 0.2435, 0.2616], description="of each channel, what is then divided by")

    @model_validator(mode="after")
    def _channels_match(self) -> Self:
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise ValueError(f"mean and std need one number per channel, {self.in_channels} each")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


class ResNet18(NetworkModel):
    """ResNet-18 as it is used on 32×32 and 64×64 images: 11.2 million weights."""

    name = "resnet18"
    Options = ResNet18Options
    options: ResNet18Options

    def build(self) -> nn.Module:
        normalise = Normalise(self.options.mean, self.options.std)
        return SmallResNet((64, 128, 256, 512), 2, self.options.num_classes, normalise)
