"""Builders of networks that others published weights for; use them with the model `checkpoint`."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def wk_net() -> nn.Sequential:
    """MNIST network of Wong & Kolter 2018 (convex_adversarial), also of fast_adversarial and MIPVerify's WK17a.

    (n, 1, 28, 28) in [0, 1] to logits (n, 10); layers 0, 2, 5 and 7 have weights.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def lenet5() -> nn.Sequential:
    """AdverTorch's LeNet5 for MNIST: (n, 1, 28, 28) in [0, 1] to logits (n, 10)."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 3, padding=1),
            relu1=nn.ReLU(),
            maxpool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3, padding=1),
            relu2=nn.ReLU(),
            maxpool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(64 * 7 * 7, 200),
            relu3=nn.ReLU(),
            linear2=nn.Linear(200, 10),
        )
    )
