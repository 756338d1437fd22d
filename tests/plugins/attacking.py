"""Attacks as the engine runs them, and linear models, whose distances are known exactly."""

from __future__ import annotations

import torch
from torch import nn

from benchbox.api import Attack, AttackTarget, Examples
from benchbox.domain import Threat
from benchbox.engine import Search, search
from benchbox.testing.oracles import LinearModel
from benchbox_attacks.autoattack_reference import AutoAttackReference


def reference(*attacks: str) -> AutoAttackReference:
    return AutoAttackReference(AutoAttackReference.Options(version="custom", attacks=attacks))


def run(attack: Attack, model: nn.Module, examples: Examples, threat: Threat, classes: int = 10) -> Search:
    index = torch.arange(len(examples))
    return search(attack, AttackTarget(model, classes), examples, index, threat, seed=0, batch_size=64)


def linear(classes: int, count: int = 40, lowest: float = 0.3, highest: float = 0.7) -> tuple[LinearModel, Examples]:
    model = LinearModel.random(classes, (1, 8, 8), seed=0)
    rng = torch.Generator().manual_seed(1)
    images = lowest + (highest - lowest) * torch.rand(count, 1, 8, 8, generator=rng)
    return model, Examples(images, model(images).argmax(1))
