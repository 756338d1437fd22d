"""What the tables of ML-LOO are about: data set, network, attacks, other detectors, and the figures of the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from benchbox import api
from benchbox.registry import Registry
from benchmarks.mnist_cases import data_dir, mnist, mnist_model

NOISE = "uniform-noise"
LeftOut = Literal["values", "pixels"]
"""What ml-loo takes away at a time: one value of one channel, as in the paper, or a pixel in all channels."""
Published = Mapping[str, Mapping[str, float]]
"""AUROC by detector and attack."""


@dataclass(frozen=True, slots=True)
class Case:
    """A table, ``name``.md. ``eps`` is the radius of what is bounded in L∞; ``skips`` are for ml-loo's ``skip_below``.

    ``published`` is from the tables of the paper's supplement, where the network is called ``theirs``.
    """

    name: str
    network_name: str
    network: Callable[[], nn.Module]
    examples: Callable[[Any, int], api.Examples]
    eps: float
    carlini_wagner: Mapping[str, Any]
    left_out: LeftOut
    skips: tuple[float | None, ...]
    theirs: str
    published: Published

    @property
    def attacks(self) -> dict[str, tuple[Mapping[str, Any], Any]]:
        """Options and norm by name."""
        return {"fgsm": ({}, "linf"), "pgd": ({"steps": 40}, "linf"), "carlini-wagner": (self.carlini_wagner, "l2")}


def cifar10(split: Any, count: int) -> api.Examples:
    """From the same archive of pictures as the network's recipe."""
    plugin = Registry.discover().create("dataset", "image-folder", {"path": "cifar10-jpeg.tar.xz"})
    return plugin.load(split, data_dir()).head(count)


def cifar10_network() -> nn.Module:
    """Our ResNet-14 with the shipped weights, channels-last: which leave-one-out is quicker with."""
    plugin = Registry.discover().create("model", "cifar-resnet", {"weights": "standard"})
    network: nn.Module = plugin.load(data_dir()).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)


CASES = {
    case.name: case
    for case in (
        Case(
            name="mnist",
            network_name="mnist-cnn (standard)",
            network=lambda: mnist_model("mnist-cnn"),
            examples=mnist,
            eps=0.3,
            carlini_wagner={"steps": 200, "learning_rate": 0.05, "search_steps": 5, "initial_c": 1.0},
            left_out="values",
            skips=(None, 0.1),
            theirs="MNIST CNN",
            published={
                "ml-loo, own attack": {"fgsm": 1.000, "pgd": 1.000, "carlini-wagner": 1.000},
                "lid": {"fgsm": 0.780, "pgd": 0.902, "carlini-wagner": 1.000},
                "mahalanobis-features": {"fgsm": 0.967, "pgd": 0.736, "carlini-wagner": 0.957},
                "kernel-density": {"fgsm": 0.744, "pgd": 0.766, "carlini-wagner": 0.893},
            },
        ),
        Case(
            name="cifar10",
            network_name="cifar-resnet (ResNet-14, standard)",
            network=cifar10_network,
            examples=cifar10,
            eps=8 / 255,
            carlini_wagner={"steps": 100, "learning_rate": 0.01, "search_steps": 5, "initial_c": 0.01},  # the authors'
            left_out="pixels",  # a third of the passes of values: 1,024 for each image
            skips=(None,),
            theirs="CIFAR-10 ResNet",
            published={
                "ml-loo, own attack": {"fgsm": 0.997, "pgd": 0.999, "carlini-wagner": 0.995},
                "ml-loo std, own attack": {"pgd": 0.996, "carlini-wagner": 0.989},
                "IG-IQR": {"fgsm": 0.667, "carlini-wagner": 0.802},
                "lid": {"fgsm": 0.972, "pgd": 0.970, "carlini-wagner": 0.990},
                "mahalanobis-features": {"fgsm": 0.770, "pgd": 0.958, "carlini-wagner": 0.962},
                "kernel-density": {"fgsm": 0.673, "pgd": 0.834, "carlini-wagner": 0.623},
            },
        ),
    )
}
