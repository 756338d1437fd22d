"""Small untrained networks for 1×8×8 images and ten classes, one of which torch.fx cannot trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with torchvision's habits: in-place activations and sums, a convolution in the shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.downsample = nn.Conv2d(channels, out, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.relu(out.add_(x if self.downsample is None else self.downsample(x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.blocks = nn.Sequential(Block(6, 6, 1), Block(6, 8, 2))
        self.linear = nn.Linear(8, 10)
        self.register_buffer("mean", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(self.stem(x - self.mean))
        return self.linear(torch.flatten(out.mean((2, 3)), 1))


class Branching(nn.Module):
    """Its graph depends on the values of its input, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) if x.amax() > 0.5 else self.linear(-x.flatten(1))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(64, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10),
    )  # fmt: skip


def built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for part in model.modules():
            if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
                part.bias.data.zero_()  # so that the input decides
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-0.1, 0.1)
                part.running_var.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)
