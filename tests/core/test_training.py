"""Training: recipes are checked, the adversary is right, and an interrupted training loses nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchbox import api
from benchbox.adversary import augment, pgd, robust_mask
from benchbox.errors import DataError, GridError
from benchbox.hookspecs import hookimpl
from benchbox.identity import file_digest
from benchbox.recipe import Adversary, Augmentation, Recipe, Schedule, load_recipe
from benchbox.registry import Registry
from benchbox.training import train
from benchbox.training_state import Epoch

STANDARD = """
method = "standard"
epochs = 2
batch_size = 32
[dataset]
name = "digits"
[model]
name = "digits-cnn"
[optimiser]
name = "adam"
lr = 0.005
[augmentation]
pad_crop = 1
"""

PGD = """
method = "pgd"
epochs = 2
batch_size = 32
[dataset]
name = "digits"
[model]
name = "digits-cnn"
[optimiser]
name = "sgd"
lr = 0.1
[schedule]
name = "onecycle"
[pgd]
eps = "1/20"
steps = 2
warmup_epochs = 1
validation_steps = 3
[evaluation]
eps = 0.05
steps = 3
restarts = 2
"""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe with some texts replaced."""

    def write(text: str, replace: Mapping[str, str] | None = None) -> Path:
        for old, new in (replace or {}).items():
            assert old in text, f"{old!r} is not in the recipe"
            text = text.replace(old, new)
        path = tmp_path / "tiny.toml"
        path.write_text(text)
        return path

    return write


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"epochs = 2": "epoch = 2"}, "tiny.toml:epochs: Field required|tiny.toml:epoch: .*Did you mean 'epochs'"),
        ({"epochs = 2": "epochs = 0"}, "tiny.toml:epochs: .*greater than or equal to 1"),
        ({"epochs = 2": 'epochs = "two"'}, "tiny.toml:epochs: .*valid integer"),
        ({"lr = 0.1": "lr = -0.1"}, "tiny.toml:optimiser.lr: .*greater than 0"),
        ({"lr = 0.1": "lr = nan"}, "tiny.toml:optimiser.lr: .*finite number"),
        ({'"onecycle"': '"triangle"'}, "tiny.toml:schedule.name: .*'onecycle'"),
        ({'"onecycle"': '"piecewise"'}, "tiny.toml:schedule: milestones belong to the schedule piecewise"),
        ({'"1/20"': '"1/x"'}, "tiny.toml:pgd.eps: '1/x' is no number"),
        ({'"1/20"': "0"}, "tiny.toml:pgd.eps: .*greater than 0"),
        ({'"pgd"': '"standard"'}, r"a table \[pgd\] belongs to method"),
        ({"epochs = 2": "epochs = "}, "no valid TOML"),
    ],
)
def test_a_wrong_recipe_names_the_place(recipe: Callable[..., Path], replace: Mapping[str, str], message: str) -> None:
    with pytest.raises(GridError, match=message):
        load_recipe(recipe(PGD, replace))


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"digits-cnn": "digits-cmn"}, "tiny.toml:model.name: unknown model 'digits-cmn'. Did you mean 'digits-cnn'"),
        ({'"digits-cnn"': '"digits-cnn"\nwidth = 3'}, "tiny.toml:model.width: .*no option 'width'"),
        ({"digits-cnn": "mnist-cnn"}, r"tiny.toml:model: cannot take the data set's images, \(1, 8, 8\)"),
        (
            {'"digits-cnn"': '"resnet18"\nin_channels = 1\nmean = [0]\nstd = [1]\nnum_classes = 7'},
            r"tiny.toml:model: gives outputs of shape \(7,\) and the data set has 10 classes. Set the model",
        ),
        (
            {"epochs = 2": "epochs = 2\nexamples = 5000"},
            r"tiny.toml:examples: the train split has .* Set examples to \d+",
        ),
        ({'"adam"': '"sgd"', "lr = 0.005": "lr = 1e30"}, "tiny.toml:optimiser.lr: the training loss became .*Lower lr"),
    ],
)
def test_a_recipe_that_cannot_be_carried_out_says_why(
    recipe: Callable[..., Path], registry: Registry, tmp_path: Path, replace: Mapping[str, str], message: str
) -> None:
    with pytest.raises(GridError, match=message):
        train(recipe(STANDARD, replace), registry, tmp_path, tmp_path)


def test_shipped_recipes_are_valid() -> None:
    paths = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))

    assert len(paths) >= 4
    assert all(isinstance(load_recipe(path), Recipe) for path in paths)


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        ({"name": "constant"}, lambda opt: torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)),
        ({"name": "cosine"}, lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20)),
        (
            {"name": "piecewise", "milestones": [5.0, 12.0], "factor": 0.5},
            lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [5, 12], gamma=0.5),
        ),
        (
            {"name": "onecycle", "warmup": 0.25},
            lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.0, 1.0, step_size_up=5, step_size_down=15),
        ),
    ],
)
def test_schedules_agree_with_torchs(schedule: dict[str, Any], reference: Callable[..., Any]) -> None:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = reference(optimiser)
    expected = []
    for _ in range(20):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()

    actual = [Schedule.model_validate(schedule).scale(epoch, 20) for epoch in range(20)]

    assert actual == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------------------ the adversary


def linear_model(features: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 2)).eval()


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_pgd_finds_the_optimum_of_a_linear_model(norm: str, dual: int) -> None:
    """The worst loss of margin has the closed form eps * dual norm of the weights' difference."""
    model, x = linear_model(16), torch.full((8, 1, 4, 4), 0.5)  # mid-grey: the image range never binds
    y = torch.arange(8) % 2
    adversary = Adversary.model_validate({"norm": norm, "eps": 0.1, "steps": 20, "step_size": 0.1})

    adversarial = pgd(model, x, y, adversary, torch.Generator().manual_seed(0))

    weight = model[1].weight.detach()
    drop = margin(model, x, y) - margin(model, adversarial, y)
    torch.testing.assert_close(drop, 0.1 * (weight[0] - weight[1]).norm(p=dual).expand(8), rtol=1e-3, atol=1e-6)


def margin(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(x)
    return logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_pgd_stays_in_its_ball_and_in_the_image_range(norm: str, share: float) -> None:
    rng = torch.Generator().manual_seed(3)
    x = torch.rand((20, 1, 4, 4), generator=rng).round(decimals=1)  # with pixels at both ends of the range
    adversary = Adversary.model_validate({"norm": norm, "eps": 0.3, "steps": 5, "step_size": 0.2})

    adversarial = pgd(linear_model(16), x, torch.zeros(20, dtype=torch.int64), adversary, rng, share)

    distance = (adversarial - x).flatten(1).norm(p=float("inf") if norm == "linf" else 2, dim=1)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (distance <= 0.3 * share + 1e-6).all()
    assert not adversarial.requires_grad


def test_the_robust_mask_of_a_linear_model_is_exact() -> None:
    model, rng = linear_model(16), torch.Generator().manual_seed(0)
    x = 0.5 + 0.2 * torch.rand((300, 1, 4, 4), generator=rng)
    y = torch.randint(2, (300,), generator=rng)
    adversary = Adversary.model_validate({"norm": "linf", "eps": 0.02, "steps": 10})

    robust = robust_mask(model, api.Examples(x, y), adversary, 2, rng)

    weight = model[1].weight.detach()
    expected = margin(model, x, y) > 0.02 * (weight[0] - weight[1]).norm(p=1)
    assert torch.equal(robust, expected)
    assert 0 < robust.sum() < len(x)


def test_pad_crop_shifts_each_image_and_lets_black_in() -> None:
    image = torch.rand(1, 2, 5, 6) + 0.1
    padded = nn.functional.pad(image, (1, 1, 1, 1))[0]
    shifted = [padded[:, top : top + 5, left : left + 6] for top, left in itertools.product(range(3), repeat=2)]

    augmented = augment(image.expand(200, -1, -1, -1), Augmentation(pad_crop=1), torch.Generator().manual_seed(0))

    counts = [sum(torch.equal(found, one) for found in augmented) for one in shifted]
    assert sum(counts) == 200
    assert min(counts) > 0, "one of the nine shifts never happened"


def test_flip_mirrors_about_half_of_the_images() -> None:
    image = torch.rand(1, 3, 4, 4)

    augmented = augment(image.expand(200, -1, -1, -1), Augmentation(flip=True), torch.Generator().manual_seed(0))

    mirrored = sum(torch.equal(found, image[0].flip(2)) for found in augmented)
    assert mirrored + sum(torch.equal(found, image[0]) for found in augmented) == 200
    assert 60 < mirrored < 140


# ------------------------------------------------------------------------------------------------ training


def test_training_learns_and_describes_what_it_made(
    recipe: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    seen: list[Epoch] = []

    result = train(recipe(STANDARD, {"epochs = 2": "epochs = 4"}), registry, tmp_path, tmp_path, on_epoch=seen.append)

    model = registry.create("model", "digits-cnn", {"weights": str(result.weights)}).load(tmp_path)
    test = registry.create("dataset", "digits", {}).load("test", tmp_path)
    correct = int((model(test.images).argmax(1) == test.labels).sum())
    card = json.loads((tmp_path / "tiny.json").read_text())
    assert card == result.card
    assert card["sha256"] == file_digest(result.weights)
    assert card["test"] == {"examples": len(test), "clean_accuracy": correct / len(test)}
    assert card["test"]["clean_accuracy"] > 0.8
    assert card["recipe"]["optimiser"]["lr"] == 0.005
    assert seen == list(result.history)
    best = max(seen, key=lambda epoch: (epoch.score, epoch.epoch))
    assert (card["best_epoch"], card["validation"]["clean_accuracy"]) == (best.epoch, best.clean)


def test_a_recipe_can_train_on_the_first_images_alone(
    recipe: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    class First(api.Dataset):
        """What `digits` gives first: 100 images, of which a tenth validates."""

        name, num_classes, shape = "first", 10, (1, 8, 8)

        def load(self, split: str, data_dir: Path) -> api.Examples:
            examples = registry.create("dataset", "digits", {}).load(split, data_dir)
            return examples.head(100) if split == "train" else examples

    class Provider:
        @hookimpl
        def benchbox_datasets(self) -> list[type[api.Dataset]]:
            return [First]

    registry_of_both = Registry.discover()
    registry_of_both.register(Provider(), "first")

    part = train(recipe(STANDARD, {"epochs = 2": "epochs = 2\nexamples = 100"}), registry, tmp_path, tmp_path / "part")
    whole = train(recipe(STANDARD, {'"digits"': '"first"'}), registry_of_both, tmp_path, tmp_path / "whole")

    assert part.card["validation"]["examples"] == 10
    assert part.card["sha256"] == whole.card["sha256"]


def test_adversarial_training_is_judged_by_robust_accuracy(
    recipe: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    result = train(recipe(PGD, {"epochs = 2": "epochs = 4"}), registry, tmp_path, tmp_path)

    best = max(result.history, key=lambda epoch: (epoch.robust, epoch.clean, epoch.epoch))
    test = result.card["test"]
    assert result.card["best_epoch"] == best.epoch
    assert result.card["validation"]["robust_accuracy"] == best.robust
    assert result.card["validation"]["attack"]["steps"] == 3
    assert 0.3 < test["robust_accuracy"] < test["clean_accuracy"]
    assert (test["attack"]["eps"], test["attack"]["restarts"]) == (0.05, 2)


def test_the_best_epoch_is_kept_when_later_ones_are_worse(
    recipe: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    """The rising learning rate ruins what the first epochs learnt."""
    ruinous = {"lr = 0.005": "lr = 0.3\n[schedule]\nname = 'onecycle'\nwarmup = 0.99", "epochs = 2": "epochs = 5"}

    result = train(recipe(STANDARD, ruinous), registry, tmp_path, tmp_path)

    assert result.card["best_epoch"] < 5
    assert result.history[-1].clean < result.card["validation"]["clean_accuracy"] - 0.2
    assert result.card["test"]["clean_accuracy"] > result.history[-1].clean + 0.2


class Interrupted(Exception):
    """Stands for a kill after the first epoch."""


def interrupt(epoch: Epoch) -> None:
    raise Interrupted


@pytest.mark.parametrize("text", [STANDARD, PGD], ids=["standard-adam", "pgd-sgd"])
def test_an_interrupted_training_ends_with_the_same_bits(
    recipe: Callable[..., Path], registry: Registry, tmp_path: Path, text: str
) -> None:
    path = recipe(text)
    whole = train(path, registry, tmp_path, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(path, registry, tmp_path, tmp_path / "halves", on_epoch=interrupt)
    assert not (tmp_path / "halves" / "tiny.safetensors").exists()
    torch.rand(7)  # another process has another global generator
    epochs: list[Epoch] = []

    resumed = train(path, registry, tmp_path, tmp_path / "halves", on_epoch=epochs.append)

    assert [epoch.epoch for epoch in epochs] == [2]
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()
    assert resumed.card["test"] == whole.card["test"]
    assert [epoch.loss for epoch in resumed.history] == [epoch.loss for epoch in whole.history]


def test_a_finished_training_is_not_repeated(recipe: Callable[..., Path], registry: Registry, tmp_path: Path) -> None:
    path = recipe(STANDARD)
    first = train(path, registry, tmp_path, tmp_path)

    again = train(path, registry, tmp_path, tmp_path, on_epoch=interrupt)

    assert again.card["sha256"] == first.card["sha256"]


def test_the_seed_changes_the_training(recipe: Callable[..., Path], registry: Registry, tmp_path: Path) -> None:
    digests = [
        train(recipe(STANDARD, {"epochs = 2": f"epochs = 1\nseed = {seed}"}), registry, tmp_path, tmp_path / folder)
        .card["sha256"]
        for seed, folder in ((0, "a"), (0, "b"), (1, "c"))
    ]  # fmt: skip

    assert digests[0] == digests[1] != digests[2]


def test_a_changed_recipe_does_not_continue_another_ones_checkpoint(
    recipe: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train(recipe(STANDARD), registry, tmp_path, tmp_path, on_epoch=interrupt)
    changed = recipe(STANDARD, {"lr = 0.005": "lr = 0.004"})

    with pytest.raises(GridError, match=r"another recipe: optimiser.lr was 0.005 and is 0.004. Give another output"):
        train(changed, registry, tmp_path, tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04", None])
def test_a_damaged_checkpoint_is_named(
    recipe: Callable[..., Path], registry: Registry, tmp_path: Path, content: bytes | None
) -> None:
    checkpoint = tmp_path / "tiny.checkpoint.pt"
    if content is None:
        torch.save({"model": {}}, checkpoint)
    else:
        checkpoint.write_bytes(content)

    with pytest.raises(DataError, match=r"tiny.checkpoint.pt: is no checkpoint .* Delete it to begin anew"):
        train(recipe(STANDARD), registry, tmp_path, tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    recipe: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match=r"file: is no folder to write to .* Name another output folder"):
        train(recipe(STANDARD), registry, tmp_path, tmp_path / "file")


class Numbered(api.Dataset):
    """Each image carries its own number in its first pixel; nothing asks for the calibration split."""

    name, num_classes, shape = "numbered", 2, (1, 1, 2)

    def load(self, split: str, data_dir: Path) -> api.Examples:
        numbers = {"train": torch.arange(40), "test": torch.arange(40, 50)}[split]
        images = torch.stack([numbers / 100, torch.zeros(len(numbers))], dim=1).reshape(-1, 1, 1, 2)
        return api.Examples(images, numbers % 2)


class Witness(nn.Linear):
    """Remembers which images it was trained on, and which it only looked at."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.met: dict[bool, set[int]] = {True: set(), False: set()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.met[self.training] |= {round(100 * float(image[0, 0, 0])) for image in x}
        return super().forward(x.flatten(1))


WITNESS = Witness()


class WitnessModel(api.Model):
    name = "witness"

    def load(self, data_dir: Path) -> nn.Module:
        return WITNESS.eval()


class Witnesses:
    """A plugin with both."""

    @hookimpl
    def benchbox_datasets(self) -> list[type[api.Dataset]]:
        return [Numbered]

    @hookimpl
    def benchbox_models(self) -> list[type[api.Model]]:
        return [WitnessModel]


def test_validation_is_held_out_of_the_training_split(recipe: Callable[..., Path], tmp_path: Path) -> None:
    registry = Registry()
    registry.register(Witnesses(), "witnesses")
    options = {
        '"digits"': '"numbered"', '"digits-cnn"': '"witness"', "pad_crop = 1": "", "= 32": "= 10\nvalidation = 0.25",
    }  # fmt: skip

    train(recipe(STANDARD, options), registry, tmp_path, tmp_path)

    trained, looked_at = WITNESS.met[True], WITNESS.met[False]
    assert trained <= set(range(40))
    assert len(trained) == 30
    assert looked_at == (set(range(40)) - trained) | set(range(40, 50))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_training_runs_on_a_gpu(recipe: Callable[..., Path], registry: Registry, tmp_path: Path) -> None:
    result = train(recipe(PGD), registry, tmp_path, tmp_path, device="cuda")

    assert result.card["environment"]["device"] != "cpu"
    assert all(value.device.type == "cpu" for value in load_file(result.weights).values())
