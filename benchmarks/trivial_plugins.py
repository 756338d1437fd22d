"""Plugins that cost next to nothing, so that what is left of a run's time is the harness."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchbox import api
from benchbox.domain import Split, Threat
from benchbox.hookspecs import hookimpl


class TrivialData(api.Dataset):
    name = "trivial"
    num_classes, shape = 10, (1, 8, 8)

    def load(self, split: Split, data_dir: Path) -> api.Examples:
        labels = torch.arange(100) % 10
        images = torch.zeros(100, 1, 8, 8)
        images.flatten(1)[torch.arange(100), labels] = 1.0
        return api.Examples(images, labels)


class TrivialModel(api.Model):
    name = "trivial"

    def load(self, data_dir: Path) -> nn.Module:
        linear = nn.Linear(64, 10)
        with torch.no_grad():
            linear.bias.zero_()
            linear.weight.copy_(torch.eye(10, 64))
        return nn.Sequential(nn.Flatten(), linear)


class TrivialAttack(api.BudgetAttack):
    """Adds eps everywhere; ``number`` only makes cells differ."""

    name = "trivial"
    norms = ("linf",)
    needs = "decisions"

    class Options(api.Options):
        number: int = 0

    def perturb(
        self, model: api.AttackTarget, x: Tensor, y: Tensor, threat: Threat, rng: api.RowRandom
    ) -> Tensor:  # fmt: skip
        return (x + threat.eps).clamp(0, 1)


@hookimpl
def benchbox_datasets() -> list[type[api.Dataset]]:
    return [TrivialData]


@hookimpl
def benchbox_models() -> list[type[api.Model]]:
    return [TrivialModel]


@hookimpl
def benchbox_attacks() -> list[type[api.Attack]]:
    return [TrivialAttack]
