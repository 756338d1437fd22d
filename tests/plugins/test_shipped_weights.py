"""The shipped weights are as good as their cards and the literature say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchbox.adversary import robust_mask
from benchbox.api import Examples
from benchbox.recipe import Adversary, Recipe, load_recipe
from benchbox.registry import Registry
from benchbox_models.weight_files import SHIPPED

RECIPES = Path(__file__).parents[2] / "recipes"
CARDS = sorted(SHIPPED.glob("*.json"))


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


def accuracy(model: nn.Module, examples: Examples) -> float:
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in torch.split(examples.images, 500)])
    return float((predicted == examples.labels).double().mean())


def test_there_are_standard_and_robust_weights_of_both_networks() -> None:
    names = {card.stem for card in CARDS}

    shipped = {f"{net}-{kind}" for net in ("digits-cnn", "mnist-cnn") for kind in ("standard", "pgd")}
    assert names == shipped | {"cifar-resnet-standard", "ground-model-2", "ground-model-6"}


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_describes_its_file_and_its_recipe(create_model: Callable[..., Any], tmp_path: Path, path: Path) -> None:
    card = json.loads(path.read_text())
    network, _, weights = path.stem.rpartition("-")
    plugin = create_model(**card["recipe"]["model"], weights=weights)

    model = plugin.load(tmp_path)

    assert plugin.fingerprint(tmp_path) == card["sha256"]
    assert sum(parameter.numel() for parameter in model.parameters()) == card["parameters"]
    assert (SHIPPED / card["weights"]).stat().st_size < 1_000_000
    assert Recipe.model_validate(card["recipe"]) == load_recipe(RECIPES / f"{path.stem}.toml")
    assert network == plugin.name


@pytest.mark.parametrize("weights", ["standard", "pgd"])
def test_digits_weights_are_as_good_as_their_card_says(
    create_model: Callable[..., Any], registry: Registry, tmp_path: Path, weights: str
) -> None:
    test = registry.create("dataset", "digits", {}).load("test", tmp_path)
    card = json.loads((SHIPPED / f"digits-cnn-{weights}.json").read_text())["test"]
    attack = Adversary.model_validate({name: card["attack"][name] for name in Adversary.model_fields})

    model = create_model("digits-cnn", weights=weights).load(tmp_path)
    robust = robust_mask(model, test, attack, card["attack"]["restarts"], torch.Generator().manual_seed(1))

    assert accuracy(model, test) == pytest.approx(card["clean_accuracy"], abs=1e-9)
    assert float(robust.double().mean()) == pytest.approx(card["robust_accuracy"], abs=0.01)


@pytest.mark.parametrize(("weights", "clean", "robust"), [("standard", 0.99, None), ("pgd", 0.98, 0.85)])
def test_mnist_weights_are_as_good_as_their_card_says(
    create_model: Callable[..., Any],
    registry: Registry,
    data_dir: Path,
    weights: str,
    clean: float,
    robust: float | None,
) -> None:
    test = registry.create("dataset", "mnist", {}).load("test", data_dir)
    card = json.loads((SHIPPED / f"mnist-cnn-{weights}.json").read_text())["test"]
    model = create_model("mnist-cnn", weights=weights).load(data_dir)

    assert accuracy(model, test) == pytest.approx(card["clean_accuracy"], abs=1e-9)
    assert card["examples"] == 10_000
    assert card["clean_accuracy"] >= clean
    if robust:
        attack = Adversary(norm="linf", eps=0.3, steps=40, step_size=0.01, random_start=True)
        mask = robust_mask(model, test.head(200), attack, 1, torch.Generator().manual_seed(0))
        assert (card["attack"]["eps"], card["attack"]["steps"], card["attack"]["restarts"]) == (0.3, 40, 5)
        assert card["robust_accuracy"] >= robust
        assert float(mask.double().mean()) >= robust


def test_the_cifar_resnet_is_as_good_as_its_card_says(
    create_model: Callable[..., Any], registry: Registry, data_dir: Path
) -> None:
    card = json.loads((SHIPPED / "cifar-resnet-standard.json").read_text())
    options = {name: value for name, value in card["recipe"]["dataset"].items() if name != "name"}
    if not (data_dir / options["path"]).is_file():
        pytest.skip(f"{options['path']} is not in the data folder")
    test = registry.create("dataset", "image-folder", options).load("test", data_dir).head(1000)

    model = create_model("cifar-resnet", weights="standard").load(data_dir)

    three_errors = 0.045
    assert card["test"]["examples"] == 10_000
    assert card["test"]["clean_accuracy"] >= 0.7
    assert accuracy(model, test) == pytest.approx(card["test"]["clean_accuracy"], abs=three_errors)


@pytest.mark.parametrize("number", [2, 6])
def test_ground_models_are_as_good_as_their_card_and_the_study_say(
    create_model: Callable[..., Any], registry: Registry, data_dir: Path, number: int
) -> None:
    """The study printed test accuracies from 0.985 to 0.990 of model 2 and 0.978 of model 6, on other images."""
    test = registry.create("dataset", "mnist", {}).load("test", data_dir)
    card = json.loads((SHIPPED / f"ground-model-{number}.json").read_text())["test"]

    model = create_model("ground-model", number=number, weights=str(number)).load(data_dir)

    assert accuracy(model, test) == pytest.approx(card["clean_accuracy"], abs=1e-9)
    assert card["clean_accuracy"] >= {2: 0.985, 6: 0.975}[number]


@pytest.mark.parametrize(
    ("file", "builder", "published"),
    [
        ("mipverify_WK17a_mnist.pth", "wk_net", 0.9811),
        ("wk17_mnist.pth", "wk_net", 0.9820),
        ("fastadv_mnist_pgd_madry.pth", "wk_net", 0.9899),
        ("advertorch_lenet5_clntrained.pt", "lenet5", 0.9889),
    ],
)
def test_published_networks_have_their_published_accuracy(
    create_model: Callable[..., Any], registry: Registry, data_dir: Path, file: str, builder: str, published: float
) -> None:
    if not (data_dir.parent / "models" / file).is_file():
        pytest.skip("the reference networks are not beside the data folder")
    test = registry.create("dataset", "mnist", {}).load("test", data_dir)

    model = create_model(
        "checkpoint", weights=f"../models/{file}", builder=f"benchbox_models.reference:{builder}"
    ).load(data_dir)

    assert len(test) == 10_000
    assert accuracy(model, test) == pytest.approx(published, abs=1e-9)
