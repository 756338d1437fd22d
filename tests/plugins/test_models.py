"""The built-in models: right networks, [0, 1] in and logits out."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchbox.api import WeightPerturbation, target_layers
from benchbox.errors import DataError, OptionError
from benchbox.recipe import load_recipe
from benchbox.registry import Registry
from benchbox_models.weight_files import SHIPPED

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


def test_all_built_in_models_are_offered(registry: Registry) -> None:
    names = {offer.name for offer in registry.offers("model") if offer.provider == "benchbox"}

    assert names >= {"checkpoint", "cifar-resnet", "digits-cnn", "ground-model", "mnist-cnn", "resnet18", "torchvision"}


@pytest.mark.parametrize(
    ("name", "options", "shape", "classes"),
    [
        ("digits-cnn", {}, (1, 8, 8), 10),
        ("mnist-cnn", {}, (1, 28, 28), 10),
        ("ground-model", {"number": 1}, (1, 28, 28), 10),
        ("ground-model", {"number": 6}, (1, 28, 28), 10),
        ("resnet18", {}, (3, 32, 32), 10),
        ("cifar-resnet", {}, (3, 32, 32), 10),
        ("cifar-resnet", {"depth": 8, "in_channels": 1, "mean": [0.5], "std": [0.5], "num_classes": 4}, (1, 16, 16), 4),
        ("resnet18", {"in_channels": 1, "mean": [0.5], "std": [0.5], "num_classes": 4}, (1, 16, 16), 4),
        ("torchvision", {"arch": "squeezenet1_1", "num_classes": 7}, (3, 64, 64), 7),
    ],
)
def test_images_become_logits(
    create_model: Callable[..., Any],
    tmp_path: Path,
    name: str,
    options: Mapping[str, Any],
    shape: tuple[int, ...],
    classes: int,
) -> None:
    model = create_model(name, **options).load(tmp_path)

    logits = model(torch.rand(3, *shape))

    assert logits.shape == (3, classes)
    assert not model.training
    assert torch.isfinite(logits).all()


# ------------------------------------------------------------------------------------------------ fresh weights


def test_untrained_weights_depend_on_init_seed_alone(create_model: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()

    first, again, other = (create_model("digits-cnn", init_seed=seed).load(tmp_path).conv1.weight for seed in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before), "loading a model drew from the global generator"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "standard", "init_seed": 3}, "only matters for an untrained network"),
        ({"sha256": "ab"}, "sha256 is the digest of a weight file"),
        ({"init_seed": -1}, "greater than or equal to 0"),
        ({"weight": "pgd"}, "Did you mean 'weights'"),
    ],
)
def test_contradictory_options_are_refused(
    create_model: Callable[..., Any], options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        create_model("mnist-cnn", **options)


@pytest.mark.parametrize("options", [{"mean": [0.5]}, {"std": [0.2, 0.2, 0.0]}, {"in_channels": 1}])
def test_normalisation_must_fit_the_channels(create_model: Callable[..., Any], options: Mapping[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"mean and std need|std must be positive"):
        create_model("resnet18", **options)


# ------------------------------------------------------------------------------------------------ right networks


def test_resnet18_computes_what_torchvisions_does_with_a_small_stem(
    create_model: Callable[..., Any], tmp_path: Path
) -> None:
    from torchvision.models import resnet18

    ours = create_model("resnet18", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]).load(tmp_path)
    theirs = resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    renamed = {
        name.replace("shortcut", "downsample").replace("linear", "fc"): value
        for name, value in ours.state_dict().items()
    }
    theirs.load_state_dict(renamed)
    images = torch.rand(2, 3, 32, 32)
    normalised = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]

    with torch.no_grad():
        expected, logits = theirs.eval()(normalised), ours(images)

    torch.testing.assert_close(logits, expected)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 11_173_962


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_the_cifar_resnets_have_their_published_sizes(
    create_model: Callable[..., Any], tmp_path: Path, depth: int, millions: float
) -> None:
    """He et al. 2016, Table 6, where shortcuts have no weights."""
    model = create_model("cifar-resnet", depth=depth).load(tmp_path)

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if "shortcut" not in name}

    assert round(sum(sizes.values()) / 1e6, 2) == millions
    assert sum(name.endswith(("conv1.weight", "conv2.weight", "linear.weight")) for name in sizes) == depth


def test_a_depth_that_no_whole_blocks_make_is_refused(create_model: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match=r"depth is 6 n \+ 2, such as 8, 14 or 20, not 18"):
        create_model("cifar-resnet", depth=18)


@pytest.mark.parametrize(
    ("number", "parameters"), [(1, 422_026), (2, 28_394), (3, 390_410), (4, 421_642), (5, 804_554), (6, 63_050)]
)
def test_the_ground_models_have_their_published_sizes(
    create_model: Callable[..., Any], tmp_path: Path, number: int, parameters: int
) -> None:
    """Published in the notebooks of fall2023project."""
    model = create_model("ground-model", number=number).load(tmp_path)

    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_ground_model_sees_pixels_between_minus_one_and_one(create_model: Callable[..., Any], tmp_path: Path) -> None:
    model = create_model("ground-model", number=6).load(tmp_path)
    images = torch.rand(2, 1, 28, 28)
    features = torch.relu(nn.functional.conv2d(2 * images - 1, model.conv1.weight, model.conv1.bias, padding=1))

    expected = model.linear1(nn.functional.max_pool2d(features, 2).flatten(1))

    torch.testing.assert_close(model(images), expected)


def test_ground_models_are_numbered_from_1_to_6(create_model: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match="1, 2, 3, 4, 5 or 6"):
        create_model("ground-model", number=7)
    with pytest.raises(OptionError, match="number"):
        create_model("ground-model")


@pytest.mark.parametrize("number", range(1, 7))
def test_there_is_a_recipe_for_each_ground_model(create_model: Callable[..., Any], number: int) -> None:
    recipe = load_recipe(RECIPES / f"ground-model-{number}.toml")

    assert recipe.model.name == "ground-model"
    assert create_model(recipe.model.name, **recipe.model.options).options.number == number
    assert (recipe.epochs, recipe.batch_size, recipe.optimiser.lr) == (10, 64, 1e-3)


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_torchvision_takes_grey_images_with_one_mean(
    create_model: Callable[..., Any], tmp_path: Path, arch: str
) -> None:
    """The networks of the filtering study on MNIST; its ResNet-18 has 21 layers to filter."""
    size = 64 if arch == "squeezenet1_1" else 28
    model = create_model("torchvision", arch=arch, num_classes=10, mean=[0.1307], std=[0.3081]).load(tmp_path)

    assert model(torch.rand(2, 1, size, size)).shape == (2, 10)
    first = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    assert first.in_channels == 1
    if arch == "resnet18":
        assert len(target_layers(model, WeightPerturbation.targets)) == 21
        colour = create_model("torchvision", arch=arch, num_classes=10).load(tmp_path)
        parameters = [sum(part.numel() for part in net.parameters()) for net in (colour, model)]
        assert parameters[0] - parameters[1] == 2 * 64 * 7 * 7


def test_torchvision_loads_a_state_dict_behind_its_normalisation(
    create_model: Callable[..., Any], tmp_path: Path
) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    net = squeezenet1_1(num_classes=5).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    images = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    model = create_model("torchvision", arch="squeezenet1_1", num_classes=5, weights="net.pth").load(tmp_path)

    torch.testing.assert_close(model(images), net((images - mean[:, None, None]) / std[:, None, None]))


def test_torchvision_loads_what_training_saved(create_model: Callable[..., Any], tmp_path: Path) -> None:
    trained = create_model("torchvision", arch="squeezenet1_1", num_classes=3, init_seed=9).load(tmp_path)
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")

    model = create_model("torchvision", arch="squeezenet1_1", num_classes=3, weights="trained.safetensors").load(
        tmp_path
    )

    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


def test_an_unknown_torchvision_network_gets_a_suggestion(create_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no classifier 'resnet81'. Did you mean .*resnet18"):
        create_model("torchvision", arch="resnet81").load(tmp_path)


def test_torchvision_is_imported_only_when_its_network_is_built() -> None:
    """Its import is slow, and fails where it was built for another torch."""
    for path in SHIPPED.parent.glob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            imported = ast.unparse(statement) if isinstance(statement, ast.Import | ast.ImportFrom) else ""
            assert "torchvision" not in imported, path.name
