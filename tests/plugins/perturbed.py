"""Networks to perturb, and what becomes of their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchbox_perturbations.synaptic_filter import SynapticFilter
from benchbox_perturbations.weight_noise import WeightNoise


def single(weight: Tensor) -> nn.Module:
    """One linear layer, named "0", with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight.clone()
    return nn.Sequential(layer)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 10),
        )  # fmt: skip
        model(torch.rand(20, 1, 8, 8))  # gives the batch norm running statistics
    return model.eval()


LAYERS = ("0", "4", "6")


def filtered(model: nn.Module, **options: object) -> nn.Module:
    return SynapticFilter(SynapticFilter.Options(**options)).apply(model, torch.Generator())


def noisy(model: nn.Module, seed: int = 0, **options: object) -> nn.Module:
    return WeightNoise(WeightNoise.Options(**options)).apply(model, torch.Generator().manual_seed(seed))


def weight(model: nn.Module, layer: str = "0") -> Tensor:
    return model.get_submodule(layer).weight.detach()  # type: ignore[return-value]
