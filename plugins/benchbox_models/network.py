"""What the built-in networks share: the options `weights`, `sha256` and `init_seed`, and how they are obeyed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from benchbox.api import Model, Options
from benchbox_models.weight_files import file_sha256, load_weights, locate


class WeightOptions(Options):
    """Where the weights come from."""

    weights: str = Field(
        "none", description='a shipped name ("standard", "pgd"), a file (absolute or below the data folder), or "none"'
    )
    sha256: str | None = Field(None, description="the digest that the weight file must have")
    init_seed: int = Field(0, ge=0, description='seed of the initial weights where weights = "none"')

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weights == "none" and self.sha256:
            raise ValueError('sha256 is the digest of a weight file, and weights = "none" has none')
        if self.weights != "none" and self.init_seed:
            raise ValueError('init_seed only matters for an untrained network: leave it out, or set weights = "none"')
        return self


class NetworkModel(Model):
    """A model whose network we build: subclasses write :meth:`build` alone."""

    Options: type[WeightOptions] = WeightOptions
    options: WeightOptions
    prefix = ""
    """Put before a weight file's names when the network was saved inside another module; taken off when loading."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the network with fresh weights from torch's global generator, which :meth:`load` has seeded."""

    def inner(self, module: nn.Module) -> nn.Module:
        """The part of ``module`` that the weight file holds (without a normalisation in front)."""
        return module

    def load(self, data_dir: Path) -> nn.Module:
        """The network in evaluation mode, with the weights that the options ask for; the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.options.init_seed)
            module = self.build()
        if self.options.weights != "none":
            load_weights(self.inner(module), self._path(data_dir), self.options.sha256, self.prefix)
        return module.eval()

    def fingerprint(self, data_dir: Path) -> str:
        return "" if self.options.weights == "none" else file_sha256(self._path(data_dir))

    def _path(self, data_dir: Path) -> Path:
        return locate(self.options.weights, data_dir, self.name)


class Normalise(nn.Module):
    """(x - mean) / std per channel. The constants are no part of the state dict: they come from the options."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) in, (n, c, h, w) out."""
        return (x - self.mean) / self.std
