"""A data set for benchmarks/sweeps.py."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from benchbox import api
from benchbox.domain import Split
from benchbox.hookspecs import hookimpl


class RandomImages(api.Dataset):
    """Uniform noise with arbitrary labels: enough to compare predictions and times."""

    name = "random-images"
    num_classes = 10

    class Options(api.Options):
        count: int = Field(10_000, ge=1)
        channels: int = Field(1, ge=1)
        size: int = Field(28, ge=1)

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        return self.options.channels, self.options.size, self.options.size

    def load(self, split: Split, data_dir: Path) -> api.Examples:
        rng = torch.Generator().manual_seed(0)
        images = torch.rand(self.options.count, *self.shape, generator=rng)
        return api.Examples(images, torch.arange(self.options.count) % 10)


@hookimpl
def benchbox_datasets() -> list[type[api.Dataset]]:
    return [RandomImages]
