"""digits-cnn: a small network for scikit-learn's 8×8 digits."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from benchbox_models.network import NetworkModel


class DigitsCnn(NetworkModel):
    """Two 3×3 convolutions (16, 32 channels, the second with stride 2) and two linear layers: 38,282 parameters.

    Takes (n, 1, 8, 8) in [0, 1] as it is, gives logits (n, 10).
    """

    name = "digits-cnn"

    def build(self) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 16, 3, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(16, 32, 3, stride=2, padding=1),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                linear1=nn.Linear(32 * 4 * 4, 64),
                relu3=nn.ReLU(),
                linear2=nn.Linear(64, 10),
            )
        )
