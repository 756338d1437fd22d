"""mnist: 28×28 handwritten digits, from the four original files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import torch

from benchbox.api import DataError
from benchbox_datasets.arrays import ArrayDataset, Raw
from benchbox_datasets.download import download
from benchbox_datasets.files import Stamp
from benchbox_datasets.idx import read_idx

_PREFIXES = {"train": "train", "test": "t10k"}


class Mnist(ArrayDataset):
    """60,000 training images (54,000 train, 6,000 calibration) and 10,000 test images, grey.

    The four IDX files, compressed or not, lie in ``MNIST/raw`` of the data folder; torchvision downloads them where
    they are absent. LeCun, Bottou, Bengio & Haffner, "Gradient-based learning applied to document recognition", 1998.
    """

    name = "mnist"
    num_classes = 10
    shape = (1, 28, 28)
    download_name: ClassVar[str] = "MNIST"
    """torchvision's class, and the folder that it uses."""

    def raw(self, part: Literal["train", "test"], data_dir: Path) -> Raw:
        """Read (or remember) the training or the test arrays. Raises DataError as :meth:`load` does."""
        files = self._files(part, data_dir)
        if files is None:
            self._download(data_dir)
            files = self._files(part, data_dir)
        if files is None:
            raise DataError(f"{data_dir / self.download_name / 'raw'}: torchvision's download left no {part} files")
        return _read(*files)

    def _files(self, part: str, data_dir: Path) -> tuple[Stamp, Stamp] | None:
        """The files with images and labels of a part, or None where one of them is missing."""
        folder, prefix = data_dir / self.download_name / "raw", _PREFIXES[part]
        images, labels = (_find(folder, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        return (images, labels) if images and labels else None

    def _download(self, data_dir: Path) -> None:
        folder = data_dir / self.download_name / "raw"
        names = [f"{part}-{kind}-ubyte.gz" for part in _PREFIXES.values() for kind in ("images-idx3", "labels-idx1")]
        download(self.download_name, data_dir, f"{folder}: {self.name} is not all there", ", ".join(names))


def _find(folder: Path, name: str) -> Stamp | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return Stamp.of(path)
    return None


@lru_cache(maxsize=4)
def _read(images: Stamp, labels: Stamp) -> Raw:
    pixels, classes = read_idx(images.path, 3), read_idx(labels.path, 1)
    if pixels.shape[1:] != (28, 28) or len(pixels) == 0:
        raise DataError(f"{images.path}: holds {pixels.shape} values, not images of 28 × 28. Fetch the file again")
    if len(pixels) != len(classes):
        raise DataError(
            f"{labels.path}: holds {len(classes)} labels for the {len(pixels)} images of {images.path.name}. "
            "Fetch both files again"
        )
    if classes.max() >= Mnist.num_classes:
        raise DataError(f"{labels.path}: holds the label {classes.max()}; they are 0 … 9. Fetch the file again")
    return Raw(torch.from_numpy(pixels.copy())[:, None], torch.from_numpy(classes.astype("int64")))
