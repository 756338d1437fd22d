"""Built-in datasets of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox.api import Dataset


@hookimpl
def benchbox_datasets() -> list[type[Dataset]]:
    from benchbox_datasets.cifar10 import Cifar10
    from benchbox_datasets.digits import Digits
    from benchbox_datasets.fashion_mnist import FashionMnist
    from benchbox_datasets.image_folder import ImageFolder
    from benchbox_datasets.mnist import Mnist
    from benchbox_datasets.tiny_imagenet import TinyImageNet

    return [Cifar10, Digits, FashionMnist, ImageFolder, Mnist, TinyImageNet]
