"""torchvision: any of torchvision's classifiers by name, behind its normalisation."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from importlib.util import find_spec
from typing import Self

from pydantic import Field, model_validator
from torch import nn

from benchbox.api import DataError
from benchbox_models.network import NetworkModel, Normalise, WeightOptions


class TorchvisionOptions(WeightOptions):
    """Which network, for how many classes; by default ImageNet's constants. One mean and std: for grey images."""

    arch: str = Field(description="the network's name in torchvision, such as resnet50")
    num_classes: int = Field(1000, ge=2, description="logits per image")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="of each channel, subtracted inside the model")
    std: list[float] = Field([0.229, 0.224, 0.225], description="of each channel, what is then divided by")

    @model_validator(mode="after")
    def _rgb_or_grey(self) -> Self:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or min(self.std) <= 0:
            raise ValueError(
                "mean and std need 3 numbers each (torchvision's networks take RGB), or 1 for grey images; std positive"
            )
        return self


class TorchvisionModel(NetworkModel):
    """Weights are a file that you have: torchvision's own downloads (a state dict), or what `benchbox train` wrote."""

    name = "torchvision"
    prefix = "net."
    Options = TorchvisionOptions
    options: TorchvisionOptions

    @classmethod
    def unavailable(cls) -> str | None:
        return None if find_spec("torchvision") else "torchvision is not installed: pip install torchvision"

    def build(self) -> nn.Module:
        from torchvision import models

        arch, known = self.options.arch, models.list_models(module=models)
        if arch not in known:
            close = difflib.get_close_matches(arch, known, n=3, cutoff=0.4)
            raise DataError(
                f"model torchvision: option arch: torchvision has no classifier {arch!r}. "
                f"Did you mean {' or '.join(close) or 'one of ' + ', '.join(known)}?"
            )
        extra = {"init_weights": True} if arch in {"googlenet", "inception_v3"} else {}  # silences their warning
        net = models.get_model(arch, weights=None, num_classes=self.options.num_classes, **extra)
        if len(self.options.mean) == 1:
            _make_grey(net)
        return nn.Sequential(OrderedDict(normalise=Normalise(self.options.mean, self.options.std), net=net))

    def inner(self, module: nn.Module) -> nn.Module:
        return module.get_submodule("net")


def _make_grey(net: nn.Module) -> None:
    """Give the first convolution one input channel and fresh weights, as studies on MNIST do."""
    first = next(part for part in net.modules() if isinstance(part, nn.Conv2d))
    first.in_channels = 1
    first.weight = nn.Parameter(first.weight[:, :1].detach().clone())
    first.reset_parameters()
