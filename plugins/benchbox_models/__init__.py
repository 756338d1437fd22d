"""Built-in models of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox.api import Model


@hookimpl
def benchbox_models() -> list[type[Model]]:
    from benchbox_models.checkpoint import Checkpoint
    from benchbox_models.cifar_resnet import CifarResNet
    from benchbox_models.digits_cnn import DigitsCnn
    from benchbox_models.ground_model import GroundModel
    from benchbox_models.mnist_cnn import MnistCnn
    from benchbox_models.resnet18 import ResNet18
    from benchbox_models.torchvision_model import TorchvisionModel

    return [Checkpoint, CifarResNet, DigitsCnn, GroundModel, MnistCnn, ResNet18, TorchvisionModel]
