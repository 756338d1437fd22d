"""A data set of one class has no wrong answer: what then comes out is said, and nothing is broken by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchbox import api, open_results
from benchbox.config import Settings
from benchbox.hookspecs import hookimpl
from benchbox.registry import Registry
from benchbox.runner import run
from builders import Silent


class Alike(api.Dataset):
    name = "alike"
    num_classes, shape = 1, (1, 4, 4)

    def load(self, split: str, data_dir: Path) -> api.Examples:
        return api.Examples(torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(40).long())


class OneLogit(api.Model):
    name = "one-logit"

    def load(self, data_dir: Path) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).requires_grad_(False)


class Plugins:
    @staticmethod
    @hookimpl
    def benchbox_datasets() -> list[type[api.Dataset]]:
        return [Alike]

    @staticmethod
    @hookimpl
    def benchbox_models() -> list[type[api.Model]]:
        return [OneLogit]


GRID = """
name = "alike"
examples = 12

[dataset]
name = "alike"

[[model]]
name = "one-logit"

[[threat]]
norm = "linf"
eps = 0.1

[[attack]]
name = "{attack}"
"""


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "apgd", "fab", "square", "ddn", "deepfool", "autoattack"])
def test_attacks_break_nothing_where_there_is_one_class(
    attack: str, grid_file: Callable[..., Path], settings: Settings
) -> None:
    registry = Registry.discover()
    registry.register(Plugins, "alike")
    norm = {"ddn": "l2"}.get(attack, "linf")

    summary = run(grid_file(text=GRID.format(attack=attack).replace("linf", norm)), settings, registry, Silent())

    assert summary.failures == []
    (row,) = [row for row in open_results(settings.database).rows() if row.cell.attack]
    assert row.scores["accuracy", "robust"].value == 1
    (flag,) = [flag for flag in row.flags if flag.name == "too-few-classes"]
    assert "no wrong answer" in flag.detail
