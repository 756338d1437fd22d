"""Selective training: what is frozen stays to the bit, the rest learns, and chosen epochs are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchbox.errors import GridError
from benchbox.freezing import freeze
from benchbox.recipe import Freeze, load_recipe
from benchbox.registry import Registry
from benchbox.training import train
from benchbox_models.weight_files import locate

RETRAIN = """
method = "standard"
epochs = 2
batch_size = 64
[dataset]
name = "digits"
[model]
name = "digits-cnn"
weights = "standard"
[optimiser]
name = "sgd"
lr = 0.05
weight_decay = 0.01
"""

Retrain = Callable[..., dict[str, Tensor]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def recipe(more: str = "", top: str = "") -> Path:
        path = tmp_path / "retrain.toml"
        path.write_text(f"{top}\n{RETRAIN}\n{more}")
        return path

    return recipe


@pytest.fixture
def retrain(write: Callable[..., Path], tmp_path: Path) -> Retrain:
    """The last kept weights after retraining the shipped network; the best epoch could be another one."""

    def call(more: str = "", top: str = "keep = [2]") -> dict[str, Tensor]:
        train(write(more, top), Registry.discover(), tmp_path, tmp_path / "out")
        return load_file(tmp_path / "out" / "retrain-epoch-2.safetensors")

    return call


@pytest.fixture
def shipped(tmp_path: Path) -> dict[str, Tensor]:
    return load_file(locate("standard", tmp_path, "digits-cnn"))


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, int]:
    """How many numbers differ, by parameter."""
    return {name: int((before[name] != after[name]).sum()) for name in before}


def test_frozen_layers_stay_to_the_bit_and_all_others_learn(retrain: Retrain, shipped: dict[str, Tensor]) -> None:
    after = retrain('[freeze]\nlayers = ["conv*", "linear2"]')

    changed = moved(shipped, after)
    assert {name for name, count in changed.items() if count == 0} == {
        f"{layer}.{kind}" for layer in ("conv1", "conv2", "linear2") for kind in ("weight", "bias")
    }
    assert changed["linear1.weight"] > 0.9 * shipped["linear1.weight"].numel()


def test_as_many_single_parameters_as_asked_for_stay(retrain: Retrain, shipped: dict[str, Tensor]) -> None:
    """Momentum and weight decay move what has no gradient, too: they must not here."""
    total = sum(value.numel() for value in shipped.values())

    after = retrain("[freeze]\nrandom = 30000")

    still = total - sum(moved(shipped, after).values())
    assert (
        30_000 <= still < 30_000 + 0.3 * (total - 30_000)
    )  # weights of dead neurons and black pixels stay by themselves


def test_the_random_draw_takes_every_parameter_with_the_same_chance() -> None:
    model = nn.Sequential(nn.Linear(100, 60), nn.Linear(60, 40))

    frozen = freeze(model, Freeze(random=4250), torch.Generator().manual_seed(0), "recipe.toml:freeze")

    counts = [int(mask.sum()) for _, mask, _ in frozen.held]
    assert sum(counts) == 4250
    for (parameter, _, _), count in zip(frozen.held, counts, strict=True):
        expected = parameter.numel() * 4250 / 8500
        assert abs(count - expected) <= 5 * (parameter.numel() / 4) ** 0.5  # five standard deviations of a binomial


def test_frozen_batch_norms_keep_their_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    frozen = freeze(model, Freeze(layers=["0", "1"]), torch.Generator(), "recipe.toml:freeze")

    frozen.train(model)
    model(torch.randn(8, 1, 8, 8) + 3)

    assert torch.equal(model[1].running_mean, torch.zeros(2))
    assert not torch.equal(model[3].running_mean, torch.zeros(2))
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('layers = ["conv9"]', r"retrain.toml:freeze.layers: the model has no layer 'conv9'. Its layers: 'conv1', "),
        ('layers = ["*"]', "retrain.toml:freeze.layers: all parameters are frozen, nothing is left to train"),
        ("random = 38282", "retrain.toml:freeze.random: the model has 38,282 parameters, so that 38,282 leave nothing"),
        ("random = -1", "retrain.toml:freeze.random: .*greater than or equal to 0"),
        ("", r"a table \[freeze\] says either layers or random"),
        ('layers = ["conv1"]\nrandom = 3', r"a table \[freeze\] says either layers or random"),
    ],
)
def test_freezing_too_much_or_nothing_names_the_place(
    write: Callable[..., Path], tmp_path: Path, more: str, message: str
) -> None:
    with pytest.raises(GridError, match=message):
        train(write(f"[freeze]\n{more}"), Registry.discover(), tmp_path, tmp_path / "out")


def test_kept_epochs_are_files_that_models_load_and_the_best_is_one_of_them(
    write: Callable[..., Path], tmp_path: Path, shipped: dict[str, Tensor]
) -> None:
    result = train(write(top="keep = [0, 1, 2]"), Registry.discover(), tmp_path, tmp_path / "out")

    kept = [load_file(tmp_path / "out" / f"retrain-epoch-{epoch}.safetensors") for epoch in (0, 1, 2)]
    best = load_file(result.weights)
    assert all(torch.equal(kept[0][name], shipped[name]) for name in shipped)
    assert all(
        torch.equal(kept[json.loads(result.card_path.read_text())["best_epoch"]][name], best[name]) for name in best
    )
    assert not torch.equal(kept[1]["linear1.weight"], kept[2]["linear1.weight"])
    options: dict[str, Any] = {"weights": str(tmp_path / "out" / "retrain-epoch-1.safetensors")}
    model = Registry.discover().create("model", "digits-cnn", options).load(tmp_path)
    assert torch.equal(model.linear1.weight, kept[1]["linear1.weight"])


def test_an_epoch_that_never_comes_cannot_be_kept(write: Callable[..., Path]) -> None:
    with pytest.raises(GridError, match="keep names epoch 3 and there are 2"):
        load_recipe(write(top="keep = [1, 3]"))
