"""resnet18 for small images: He et al. 2016, "Deep Residual Learning for Image Recognition", §4.2's stem."""

from __future__ import annotations

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


class SmallResNet18(nn.Module):
    """A 3×3 stem without pooling, then 4 stages of 2 blocks with 64, 128, 256, 512 channels: 11.2 million weights."""

    def __init__(self, num_classes: int, normalise: Normalise) -> None:
        super().__init__()
        self.normalise = normalise
        self.conv1 = nn.Conv2d(len(normalise.mean), 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(self.normalise(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
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
    """ResNet-18 as it is used on 32×32 and 64×64 images."""

    name = "resnet18"
    Options = ResNet18Options
    options: ResNet18Options

    def build(self) -> nn.Module:
        return SmallResNet18(self.options.num_classes, Normalise(self.options.mean, self.options.std))
