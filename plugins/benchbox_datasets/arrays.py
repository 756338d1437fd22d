"""Base of the data sets that come as two arrays of equally large images: training and test."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from benchbox.api import Dataset, Examples, Options
from benchbox.domain import Split
from benchbox_datasets.splits import hold_out


@dataclass(frozen=True, eq=False)
class Raw:
    """Images as they are stored, uint8 (n, c, h, w), and labels, int64 (n,). Shared by all who load: never written."""

    images: Tensor
    labels: Tensor

    @cached_property
    def sha256(self) -> str:
        """Of shapes, pixels and labels: the same however the files were packed."""
        state = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        state.update(self.images.contiguous().numpy().data)
        state.update(self.labels.contiguous().numpy().astype("<i8").data)
        return state.hexdigest()


class ArrayOptions(Options):
    """What stands for the test split; a sweep over both shows the generalisation gap."""

    split: Literal["test", "train"] = Field(
        "test", description="the examples that grids evaluate: the test split, or the train split (as good as seen)"
    )

    @model_serializer(mode="wrap")
    def _without_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Left out where it says nothing: results on the test split keep the keys that they always had."""
        options: dict[str, Any] = dump(self)
        if self.split == "test":
            options.pop("split")
        return options


class ArrayDataset(Dataset):
    """Test examples keep the order of their file; the training examples are split by a stratified order."""

    Options = ArrayOptions
    options: ArrayOptions
    unseeded = ("split",)

    white: ClassVar[int] = 255
    """The stored value that becomes 1.0."""
    calibration_share: ClassVar[float] = 0.1
    """The part of the training examples that is held out as the calibration split."""

    @abstractmethod
    def raw(self, part: Literal["train", "test"], data_dir: Path) -> Raw:
        """Read (or remember) the training or the test arrays. Raises DataError when they are missing or damaged."""

    def load(self, split: Split, data_dir: Path) -> Examples:
        """A fresh copy of a split. Raises DataError when files are missing or damaged."""
        split = self.options.split if split == "test" else split
        raw = self.raw("test" if split == "test" else "train", data_dir)
        if split == "test":
            return self._examples(raw.images, raw.labels.clone())
        calibration, train = hold_out(raw.labels, self.calibration_share)
        index = calibration if split == "calibration" else train
        return self._examples(raw.images[index], raw.labels[index])

    def fingerprint(self, data_dir: Path) -> str:
        """SHA-256 of the training and the test arrays. Raises DataError when files are missing or damaged."""
        parts = self.raw("train", data_dir).sha256 + self.raw("test", data_dir).sha256
        return hashlib.sha256(parts.encode()).hexdigest()

    def _examples(self, images: Tensor, labels: Tensor) -> Examples:
        return Examples(images.to(torch.float32).div_(self.white), labels)
