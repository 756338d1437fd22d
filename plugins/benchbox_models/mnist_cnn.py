"""mnist-cnn: a small network for 28×28 grey images, cheap to attack because its convolutions stride."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from benchbox_models.network import NetworkModel


class MnistCnn(NetworkModel):
    """Two 4×4 convolutions with stride 2 (32, 64 channels) and two linear layers: 234,794 parameters.

    The layout of Wong & Kolter 2018 ("Provable defenses against adversarial examples via the convex outer adversarial
    polytope", §4) with twice the channels. Takes (n, 1, 28, 28) in [0, 1] as it is, gives logits (n, 10).
    """

    name = "mnist-cnn"

    def build(self) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 32, 4, stride=2, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 64, 4, stride=2, padding=1),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                linear1=nn.Linear(64 * 7 * 7, 64),
                relu3=nn.ReLU(),
                linear2=nn.Linear(64, 10),
            )
        )
