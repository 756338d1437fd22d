"""Base of the data sets that come as picture files: decode, check the sizes, split, remember."""

from __future__ import annotations

import io
import struct
import zlib
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from benchbox.api import DataError, Dataset, Examples
from benchbox.domain import Array, Split
from benchbox_datasets.sources import Source, fingerprint
from benchbox_datasets.splits import hold_out

Colours = Literal["rgb", "grey"]
_MODES: dict[Colours, str] = {"rgb": "RGB", "grey": "L"}
_CONVERTIBLE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What Pillow raises on damaged files of these formats.
_DAMAGED = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listing:
    """Which pictures belong where: names with the index of their class, in the order of the split."""

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


class PictureDataset(Dataset):
    """``num_classes`` (and ``shape`` without a given size) are known after ``load`` or ``fingerprint`` has looked.

    A split is decoded whole and kept as bytes, so it has to fit in memory; other splits are not decoded.
    """

    colours: Colours = "rgb"
    crop: int | None = None
    """Scale and crop every picture to this height and width; None demands that they are equally large."""
    calibration_share: float = 0.1
    """The part of the training pictures that is held out as the calibration split, stratified."""
    _classes: tuple[str, ...] = ()
    _size: tuple[int, int] | None = None

    @abstractmethod
    def source(self, data_dir: Path) -> Source:
        """Where the pictures are. Raises DataError when they are nowhere."""

    @abstractmethod
    def listing(self, source: Source) -> Listing:
        """What there is (remembered). Raises DataError when it is not laid out as it should be."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        if not self._classes:
            raise DataError(f"data set {self.name!r} knows its classes once load() or fingerprint() has read its files")
        return self._classes

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        size = (self.crop, self.crop) if self.crop else self._size
        if size is None:
            raise DataError(f"data set {self.name!r} knows the size of its images once load() has read them")
        return (3 if self.colours == "rgb" else 1, *size)

    def load(self, split: Split, data_dir: Path) -> Examples:
        """A fresh copy of a split. Raises DataError when files are missing, damaged or of different sizes."""
        source = self.source(data_dir)
        listing = self._look(source)
        chosen = listing.test
        if split != "test":
            labels = torch.tensor([label for _, label in listing.train])
            calibration, train = hold_out(labels, self.calibration_share)
            chosen = tuple(listing.train[i] for i in (calibration if split == "calibration" else train).tolist())
        if not chosen:
            raise DataError(f"{source.path}: nothing is left for the split {split!r}. It needs more pictures")
        size = (self.crop, self.crop) if self.crop else None
        images = _decode_all(source, tuple(name for name, _ in chosen), self.colours, size)
        self._agree_on_size(source, split, (images.shape[2], images.shape[3]))
        return Examples(images.to(torch.float32).div_(255), torch.tensor([label for _, label in chosen]))

    def fingerprint(self, data_dir: Path) -> str:
        """SHA-256 of the archive, or of the folder's names and contents. Raises DataError when it is not usable."""
        source = self.source(data_dir)
        self._look(source)
        return fingerprint(source)

    def _look(self, source: Source) -> Listing:
        listing = self.listing(source)
        self._classes = listing.classes
        return listing

    def _agree_on_size(self, source: Source, split: Split, size: tuple[int, int]) -> None:
        if self._size not in (None, size):
            raise DataError(f"{source.path}: the pictures of {split!r} are {size}, others {self._size}. {_GIVE_SIZE}")
        self._size = size


_GIVE_SIZE = "Give the option `size`, to which all are scaled and cropped"


@lru_cache(maxsize=4)
def _decode_all(source: Source, names: tuple[str, ...], colours: Colours, size: tuple[int, int] | None) -> Tensor:
    """The pictures, uint8 (n, c, h, w), in the order of ``names``; shared by all who load, never written."""
    position = {name: index for index, name in enumerate(names)}
    images: Array | None = None
    for name, data in source.read(names):
        pixels = _decode(data, f"{source.path}: {name}", colours, size)
        if images is None:
            images, first = np.empty((len(names), *pixels.shape), np.uint8), name
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{source.path}: {name} has {pixels.shape[2]} × {pixels.shape[1]} pixels, {first} has "
                f"{images.shape[3]} × {images.shape[2]}. {_GIVE_SIZE}, if the data set has it"
            )
        images[position.pop(name)] = pixels
    if images is None or position:
        raise DataError(f"{source.path}: {next(iter(position))} is gone. Did the files change meanwhile? Try again")
    return torch.from_numpy(images)


def _decode(data: bytes, place: str, colours: Colours, size: tuple[int, int] | None) -> Array:
    """One picture, uint8 (c, h, w); transparency is dropped. Raises DataError that names the ``place``."""
    try:
        with Image.open(io.BytesIO(data)) as stored:
            if stored.mode not in _CONVERTIBLE:
                raise DataError(
                    f"{place} has pixels of mode {stored.mode!r}, more than 8 bits: convert it to 8-bit grey or RGB"
                )
            picture: Image.Image = stored.convert(_MODES[colours])
        if size:
            picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BILINEAR)
    except _DAMAGED as error:
        raise DataError(f"{place} is no picture that can be decoded ({error}). Replace or remove it") from error
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
