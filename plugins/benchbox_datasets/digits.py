"""digits: 8×8 handwritten digits that come with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch

from benchbox_datasets.arrays import ArrayDataset, Raw
from benchbox_datasets.splits import hold_out


class Digits(ArrayDataset):
    """1,797 grey images, split by a fixed stratified shuffle: 1,137 train, 300 calibration, 360 test (a fifth).

    They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, UCI), pixels 0 … 16.
    The calibration split is larger than the usual tenth, so that a 1 % false-positive rate is three images.
    """

    name = "digits"
    num_classes = 10
    shape = (1, 8, 8)
    white: ClassVar[int] = 16
    test_share: ClassVar[float] = 360 / 1797
    calibration_share: ClassVar[float] = 300 / 1437

    def raw(self, part: Literal["train", "test"], data_dir: Path) -> Raw:
        """The training or the test arrays; ``data_dir`` is not looked at."""
        return _read()[part]


@cache
def _read() -> dict[str, Raw]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    test, train = hold_out(labels, Digits.test_share)
    return {name: Raw(images[index], labels[index]) for name, index in (("train", train), ("test", test))}
