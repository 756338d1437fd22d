"""Data sets and their examples."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from benchbox.api.plugin import Plugin
from benchbox.domain import Split


@dataclass(frozen=True, slots=True)
class Examples:
    """Images, float32 (n, c, h, w) in [0, 1], and their labels, int64 (n,), in a fixed order."""

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, count: int) -> Examples:
        """The first ``count`` examples."""
        return Examples(self.images[:count], self.labels[:count])

    def take(self, index: Tensor) -> Examples:
        """The examples that ``index`` (bool mask or int64 indices) selects."""
        return Examples(self.images[index], self.labels[index])


class Dataset(Plugin):
    """A data set.

    ``num_classes`` and ``shape`` (c, h, w) are class facts, or properties that look at the options or, after
    :meth:`load`, at what was read.
    """

    num_classes: int
    shape: tuple[int, int, int]
    unseeded: ClassVar[tuple[str, ...]] = ()
    """Options that do not enter the seed: one noisy network meets all choices of them."""

    @abstractmethod
    def load(self, split: Split, data_dir: Path) -> Examples:
        """Return a split: images in [0, 1], always in the same order.

        ``train`` and ``calibration`` are disjoint parts of the training data: models learn from the first, defenses
        and detectors are fitted on the second. Raises DataError, which says what to set or fetch, when files are
        missing or damaged.
        """
