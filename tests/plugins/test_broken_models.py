"""Each contract suite catches plugins that break it; every broken one here differs by one fault from a sound one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import catches, variants
from torch import Tensor, nn

from benchbox import api
from benchbox.testing import contracts

SHAPE = (1, 3, 3)


# ------------------------------------------------------------------------------------------------ data sets


class Blobs(api.Dataset):
    name, num_classes, shape = "blobs", 2, SHAPE

    def load(self, split: str, data_dir: Path) -> api.Examples:
        rng = torch.Generator().manual_seed({"train": 0, "calibration": 1, "test": 2}[split])
        return api.Examples(torch.rand(20, *SHAPE, generator=rng), torch.arange(20) % 2)


class BytesNotFloats(Blobs):
    def load(self, split: str, data_dir: Path) -> api.Examples:
        good = super().load(split, data_dir)
        return api.Examples((good.images * 255).byte(), good.labels)


class NotScaled(Blobs):
    def load(self, split: str, data_dir: Path) -> api.Examples:
        good = super().load(split, data_dir)
        return api.Examples(good.images * 255, good.labels)


class CountsFromOne(Blobs):
    def load(self, split: str, data_dir: Path) -> api.Examples:
        good = super().load(split, data_dir)
        return api.Examples(good.images, good.labels + 1)


class WrongShape(Blobs):
    shape = (3, 3, 1)


class Shuffled(Blobs):
    def load(self, split: str, data_dir: Path) -> api.Examples:
        return super().load(split, data_dir).take(torch.randperm(20))


class NoCalibration(Blobs):
    def load(self, split: str, data_dir: Path) -> api.Examples:
        return super().load("train" if split == "calibration" else split, data_dir)  # type: ignore[arg-type]


class OddFingerprint(Blobs):
    calls = 0

    def fingerprint(self, data_dir: Path) -> str:
        type(self).calls += 1
        return str(self.calls)


def test_a_sound_data_set_passes(tmp_path: Path) -> None:
    contracts.check_dataset(Blobs(Blobs.Options()), tmp_path)


@variants(
    (BytesNotFloats, "returns torch.uint8 and torch.int64"),
    (NotScaled, "scale them to [0, 1]"),
    (CountsFromOne, "labels from 1 to 2"),
    (WrongShape, "it promises (n, 3, 3, 1)"),
    (Shuffled, "in another order"),
    (NoCalibration, "20 images both in train and in calibration"),
    (OddFingerprint, "has the fingerprints '1' and '2'"),
)
def test_broken_data_sets_are_caught(plugin: type[Any], promise: str, tmp_path: Path) -> None:
    catches(contracts.check_dataset, plugin, promise, tmp_path)


# ------------------------------------------------------------------------------------------------ models


class Linear(nn.Sequential):
    def __init__(self, classes: int = 3) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Flatten(), nn.Linear(9, classes))


class Fixed(api.Model):
    name = "fixed"
    network: type[nn.Module] = Linear

    def load(self, data_dir: Path) -> nn.Module:
        return self.network()


def model_of(forward: Callable[[nn.Module, Tensor], Tensor]) -> type[api.Model]:
    """A model whose network does what ``forward(linear, x)`` says."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Linear()

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.linear, x)

    return type("Odd", (Fixed,), {"name": "odd", "network": Network})


class AlwaysTraining(Linear):
    def train(self, mode: bool = True) -> nn.Module:  # type: ignore[override]
        return super().train(True)


class Unseeded(Fixed):
    def load(self, data_dir: Path) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 3))


class WrongClasses(Fixed):
    def load(self, data_dir: Path) -> nn.Module:
        return Linear(4)


def test_a_sound_model_passes(tmp_path: Path) -> None:
    contracts.check_model(Fixed(Fixed.Options()), SHAPE, 3, tmp_path)


@variants(
    (WrongClasses, "returns (7, 4) for 7 images; logits (7, 3) are needed"),
    (Unseeded, "when it is loaded again"),
    (type("Training", (Fixed,), {"network": AlwaysTraining}), "stays in training mode"),
    (model_of(lambda linear, x: linear(x).softmax(1)), "returns probabilities"),
    (model_of(lambda linear, x: linear(x / x.amax((1, 2, 3), keepdim=True))), "not finite, for black"),
    (model_of(lambda linear, x: linear(x - x.mean(0))), "to images one by one"),
    (model_of(lambda linear, x: linear(nn.functional.dropout(x, 0.5, training=True))), "at a second call"),
    (model_of(lambda linear, x: linear(x.mul_(2).sub_(1))), "changes its argument images"),
    (model_of(lambda linear, x: linear(x).double()), "logits are float32"),
)
def test_broken_models_are_caught(plugin: type[Any], promise: str, tmp_path: Path) -> None:
    catches(contracts.check_model, plugin, promise, SHAPE, 3, tmp_path)


# ------------------------------------------------------------------------------------------------ weight perturbations


class Jitter(api.WeightPerturbation):
    name, stochastic = "jitter", True

    def apply(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        model = copy.deepcopy(model)
        for part in api.target_layers(model, self.targets, self.options.layer).values():
            part.weight.data += self.noise(part.weight, rng)
        return model

    def noise(self, weight: Any, rng: torch.Generator) -> Tensor:
        return torch.randn(weight.shape, generator=rng)


class InPlace(Jitter):
    def apply(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        copy.deepcopy(model)
        for part in api.target_layers(model, self.targets, self.options.layer).values():
            part.weight.data += 1
        return model


class Shallow(Jitter):
    def apply(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        return copy.copy(model)


class GlobalNoise(Jitter):
    def noise(self, weight: Any, rng: torch.Generator) -> Tensor:
        return torch.randn(weight.shape)


class Undeclared(Jitter):
    stochastic = False


class EveryLayer(Jitter):
    def apply(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        api.target_layers(model, self.targets, self.options.layer)
        return Jitter(Jitter.Options()).apply(model, rng)


class AnyLayer(Jitter):
    def apply(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        known = self.options.layer in ("*", *self.layers(model))
        return super().apply(model, rng) if known else copy.deepcopy(model)


class OldName(Jitter):
    unseeded = ("level",)


TWO_LAYERS = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))


def test_a_sound_weight_perturbation_passes() -> None:
    contracts.check_weight_perturbation(Jitter(Jitter.Options()), TWO_LAYERS)


@variants(
    (InPlace, "changes its argument model (1.weight, 3.weight)"),
    (Shallow, "shares memory with its argument"),
    (GlobalNoise, "for the same generator; draw from rng alone"),
    (Undeclared, "for another generator; say stochastic = True"),
    (EveryLayer, "changes '3.weight' though the option layer is '1'"),
    (AnyLayer, "takes any text as the option layer"),
    (OldName, "has no option 'level'"),
)
def test_broken_weight_perturbations_are_caught(plugin: type[Any], promise: str) -> None:
    catches(contracts.check_weight_perturbation, plugin, promise, copy.deepcopy(TWO_LAYERS))


# ------------------------------------------------------------------------------------------------ defenses


class Bright(api.Protected):
    """Refuses bright images."""

    def evidence(self, x: Tensor) -> dict[str, Tensor]:
        return {"brightness": x.mean((1, 2, 3))}

    def rejects(self, evidence: Any) -> Tensor:
        return ~(evidence["brightness"] <= 0.5)

    def surrogate(self) -> nn.Module:
        return api.RejectLogit(self.model, lambda x: x.mean((1, 2, 3)), 0.5)


class Detector(api.Defense):
    name, detects = "detector", True
    protected: Callable[[nn.Module], api.Protected] = Bright

    def protect(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> api.Protected:
        return type(self).protected(model)


def detector_with(**methods: Any) -> type[api.Defense]:
    return type("Broken", (Detector,), {"name": "broken", "protected": type("Odd", (Bright,), methods)})


class Silent(Detector):
    detects = False


class Spoils(Detector):
    def protect(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> api.Protected:
        model[1].weight.data.mul_(2)  # type: ignore[index, operator, union-attr]
        return Bright(model)


class SpoilsImages(Detector):
    def protect(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> api.Protected:
        calibration.images.mul_(0.5)
        return Bright(model)


class Bare(Detector):
    def protect(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> Any:
        return model


class Noisy(api.Protected):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.rand(x.shape, generator=self.rng))


class Randomised(api.Defense):
    name, stochastic = "randomised", True

    def protect(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> api.Protected:
        protected = Noisy(model)
        protected.rng = rng
        return protected


class UndeclaredNoise(Randomised):
    stochastic = False


class GlobalRandomness(Detector):
    detects = False
    protected = type(
        "Odd", (api.Protected,), {"forward": lambda self, x: self.model(x + 0.1 * torch.rand_like(x))}
    )  # fmt: skip


class Rounding(Detector):
    detects = False
    protected = type("Odd", (api.Protected,), {"forward": lambda self, x: self.model((x * 4).round() / 4)})


def defense_arguments() -> tuple[nn.Module, api.Examples, Tensor]:
    rng = torch.Generator().manual_seed(0)
    calibration = api.Examples(torch.rand(10, *SHAPE, generator=rng), torch.arange(10) % 3)
    return Linear(), calibration, torch.rand(8, *SHAPE, generator=rng)


@pytest.mark.parametrize("plugin", [Detector, Randomised])
def test_sound_defenses_pass(plugin: type[Any]) -> None:
    contracts.check_defense(plugin(plugin.Options()), *defense_arguments())


@variants(
    (Bare, "returns a Linear, not an api.Protected"),
    (Spoils, "changes its argument model (1.weight)"),
    (SpoilsImages, "changes its argument calibration_images"),
    (Silent, "rejects images and does not say detects = True"),
    (detector_with(evidence=lambda self, x: {}), "says detects = True and gives no evidence"),
    (detector_with(evidence=lambda self, x: {"all": x.mean()[None]}), "one number for each of 8 images"),
    (detector_with(rejects=lambda self, evidence: evidence["brightness"]), "one bool per image"),
    (
        detector_with(rejects=lambda self, evidence: evidence["brightness"] > 0.5),
        "accepts inputs whose evidence is NaN",
    ),
    (detector_with(forward=lambda self, x: self.model(x).detach().squeeze(0)[:, 0]), "float32 logits (8, classes)"),
    (detector_with(forward=lambda self, x: self.model(x - x.mean(0)).nan_to_num()), "to images one by one"),
    (detector_with(surrogate=lambda self: self.model), '(8, 4) is due, the last column being "rejected"'),
    (
        detector_with(surrogate=lambda self: api.RejectLogit(self.model, lambda x: x.mean((1, 2, 3)), 0.6)),
        '"rejected" differs from the verdict',
    ),
    (GlobalRandomness, "for the same generator; draw from rng alone"),
    (UndeclaredNoise, "say stochastic = True"),
    (Rounding, "use BPDA or say differentiable = False"),
)
def test_broken_defenses_are_caught(plugin: type[Any], promise: str) -> None:
    catches(contracts.check_defense, plugin, promise, *defense_arguments())
