"""fashion-mnist: 28×28 pictures of clothes, in MNIST's format."""

from __future__ import annotations

from typing import ClassVar

from benchbox_datasets.mnist import Mnist


class FashionMnist(Mnist):
    """60,000 training images (54,000 train, 6,000 calibration) and 10,000 test images, grey.

    The four IDX files, compressed or not, lie in ``FashionMNIST/raw`` of the data folder; torchvision downloads them
    where they are absent. Xiao, Rasul & Vollgraf, "Fashion-MNIST: a novel image dataset", arXiv:1708.07747.
    """

    name = "fashion-mnist"
    download_name: ClassVar[str] = "FashionMNIST"
