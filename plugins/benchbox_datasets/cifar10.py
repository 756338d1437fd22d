"""cifar10: 32×32 colour photographs, from the original batch files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchbox.api import DataError
from benchbox_datasets.arrays import ArrayDataset, Raw
from benchbox_datasets.cifar_files import read_pickle, read_records
from benchbox_datasets.download import download
from benchbox_datasets.files import Stamp

_PICKLES, _RECORDS = "cifar-10-batches-py", "cifar-10-batches-bin"
_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


class Cifar10(ArrayDataset):
    """50,000 training images (45,000 train, 5,000 calibration) and 10,000 test images, RGB.

    The data folder holds ``cifar-10-batches-py`` (torchvision downloads it where it is absent) or
    ``cifar-10-batches-bin``; both give the same images in the same order.
    """

    name = "cifar10"
    num_classes = 10
    shape = (3, 32, 32)

    def raw(self, part: Literal["train", "test"], data_dir: Path) -> Raw:
        """Read (or remember) the training or the test arrays. Raises DataError as :meth:`load` does."""
        files = _files(part, data_dir)
        if files is None:
            names = ", ".join(name for batches in _BATCHES.values() for name in batches)
            download("CIFAR10", data_dir, f"{data_dir / _PICKLES}: cifar10 is not all there", names)
            files = _files(part, data_dir)
        if files is None:
            raise DataError(f"{data_dir / _PICKLES}: torchvision's download left no {part} files")
        return _read(files)


def _files(part: str, data_dir: Path) -> tuple[Stamp, ...] | None:
    """The batch files of a part in one of the formats, or None where neither is complete."""
    for folder, suffix in ((_PICKLES, ""), (_RECORDS, ".bin")):
        paths = [data_dir / folder / f"{name}{suffix}" for name in _BATCHES[part]]
        if all(path.is_file() for path in paths):
            return tuple(Stamp.of(path) for path in paths)
    return None


@lru_cache(maxsize=4)
def _read(files: tuple[Stamp, ...]) -> Raw:
    batches = [(read_records if file.path.suffix else read_pickle)(file.path) for file in files]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Raw(torch.from_numpy(images), torch.from_numpy(labels))
