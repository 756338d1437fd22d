"""Leave-one-out attribution of many units at once, against captum, closed forms and one unit at a time by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import captum.attr
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from benchbox.api import ContractError
from benchbox_attributions.dispersion import dispersion
from benchbox_attributions.features import FeatureOptions, feature_members, feature_numbers, reference_images
from benchbox_attributions.leave_one_out import LeaveOneOut, LeaveOneOutOptions
from benchbox_attributions.units import Units, rectified_layers
from benchbox_models.mnist_cnn import MnistCnn
from benchbox_models.resnet18 import ResNet18
from conftest import TrainedDigits

KINDS: tuple[dict[str, Any], ...] = (
    {"features": "pixels"},
    {"features": "values"},
    {"features": "channels"},
    {"features": "superpixels", "side": 2},
    {"features": "superpixels", "side": 3},  # does not divide 7 x 5: the last squares are cut off
)
ALL_UNITS = ("layer:0", "layer:3", "logits", "probabilities", "predicted-logit", "predicted-probability")
MEAN = torch.tensor([0.2, 0.5, 0.7])[:, None, None]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A random network for images (3, 7, 5) with 4 logits; it is nonlinear and has an activation in place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(210, 8), nn.Tanh(),
        nn.Linear(8, 4),
    ).to(dtype)  # fmt: skip


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images, a third of whose values are black."""
    x = torch.rand(count, 3, 7, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return torch.where(x < 1 / 3, 0.0, x)


# ------------------------------------------------------------------------------------------------ features


def test_features_are_numbered_in_reading_order() -> None:
    def numbers(**options: Any) -> list[Any]:
        return feature_numbers((2, 2, 3), FeatureOptions(**options)).tolist()

    assert numbers(features="pixels") == [[[0, 1, 2], [3, 4, 5]]] * 2
    assert numbers(features="values") == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert numbers(features="channels") == [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]]
    assert numbers(features="superpixels", side=2) == [[[0, 0, 1], [0, 0, 1]]] * 2
    assert numbers(features="superpixels") == [[[0, 0, 0], [0, 0, 0]]] * 2


def test_members_of_a_smaller_feature_are_repeated() -> None:
    numbers = feature_numbers((1, 2, 3), FeatureOptions(features="superpixels", side=2))

    assert feature_members(numbers).tolist() == [[0, 1, 3, 4], [2, 5, 5, 5]]


def test_a_side_is_only_for_superpixels() -> None:
    with pytest.raises(ValidationError, match="side is only for features 'superpixels', not 'pixels': leave it out"):
        FeatureOptions(side=3)


def test_references_are_black_the_mean_or_a_blur() -> None:
    x = images(2)

    black = reference_images(x, "zero", FeatureOptions())
    mean = reference_images(x, "mean", FeatureOptions(), MEAN)
    blur = reference_images(x, "blur", FeatureOptions())
    wide = reference_images(x, "blur", FeatureOptions(features="superpixels", side=2))

    assert not black.any()
    assert torch.equal(mean, MEAN.expand_as(x))
    torch.testing.assert_close(blur[:, :, 2, 2], x[:, :, 1:4, 1:4].mean((2, 3)))
    torch.testing.assert_close(blur[:, :, 0, 0], x[:, :, :2, :2].mean((2, 3)))  # of an image's corner, what there is
    torch.testing.assert_close(wide[:, :, 2, 2], x[:, :, :5, :5].mean((2, 3)))


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (None, "needs the mean of the calibration images"),
        (torch.zeros(2, 1, 1), r"has the shape \(2, 1, 1\), which does not fit images \(3, 7, 5\)"),
    ],
)
def test_a_mean_that_is_missing_or_does_not_fit_is_an_error(mean: Tensor | None, message: str) -> None:
    options = LeaveOneOutOptions(reference="mean")

    with pytest.raises(ContractError, match=message):
        LeaveOneOut(network(), ["logits"], options, mean).differences(images(1))


# ------------------------------------------------------------------------------------------------ units


def test_units_are_read_off_in_the_order_of_their_names() -> None:
    model, x = network(), images(4)

    found, predicted = Units(model, ALL_UNITS).read(x)

    logits, hidden = model(x), model[0](x)
    best = logits.argmax(1, keepdim=True)
    probabilities = logits.softmax(1)
    truth = [hidden.mean((2, 3)), model[:4](x), logits, probabilities, logits.gather(1, best)]
    torch.testing.assert_close(found, torch.cat([*truth, probabilities.gather(1, best)], 1))
    assert torch.equal(predicted, best[:, 0])
    assert not any(part._forward_hooks for part in model.modules())


def test_predicted_units_are_about_the_class_that_is_given() -> None:
    model, x, given = network(), images(4), torch.tensor([3, 0, 1, 2])

    found, _ = Units(model, ["predicted-logit"]).read(x, given)

    torch.testing.assert_close(found[:, 0], model(x)[torch.arange(4), given])


def test_a_hidden_unit_is_what_the_layer_gave_whatever_overwrites_it_later() -> None:
    model, x = network(), images(4)  # the layer 0 is followed by an activation in place

    found, _ = Units(model, ["layer:0"]).read(x)

    assert (found < 0).any()
    torch.testing.assert_close(found, model[0](x).mean((2, 3)))


def test_rectified_layers_are_relus_blocks_and_poolings_and_none_twice(tmp_path: Path) -> None:
    cnn = MnistCnn(MnistCnn.Options()).load(tmp_path)  # a flattened ReLU is the same units
    resnet = ResNet18(ResNet18.Options()).load(tmp_path)  # functional.relu at the end of each block

    assert rectified_layers(cnn, torch.rand(2, 1, 28, 28)) == ["relu1", "relu2", "relu3"]
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    stem = "layer1.0.shortcut"  # the first to hand on what the stem's functional.relu gave
    assert rectified_layers(resnet, torch.rand(2, 3, 16, 16)) == [stem, *blocks]
    assert rectified_layers(network(), images(2)) == ["1"]  # it overwrites what the layer "0" gave
    assert not any(part._forward_hooks for part in resnet.modules())


def test_a_layer_that_copies_what_it_hands_on_is_no_layer_of_its_own(tmp_path: Path) -> None:
    """Flattening copies channels-last tensors; each pixel of the layer before would become a unit."""
    cnn = MnistCnn(MnistCnn.Options()).load(tmp_path).to(memory_format=torch.channels_last)
    x = torch.rand(2, 1, 28, 28).to(memory_format=torch.channels_last)
    hidden = cnn[:4](x)

    assert cnn.flatten(hidden).data_ptr() != hidden.data_ptr()
    assert rectified_layers(cnn, x) == ["relu1", "relu2", "relu3"]


def test_a_layer_that_is_overwritten_later_stays_a_layer_of_its_own() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x).add_(1)

    model = nn.Sequential(nn.Conv2d(3, 2, 3), Residual(), nn.Flatten())

    assert rectified_layers(model, images(2)) == ["1.relu", "1"]


def test_means_of_a_layer_in_reduced_precision_tell_single_pixels() -> None:
    """1 of 35 values of a channel is 1 / 128 larger than 1: bfloat16 means would be equal."""
    x = torch.ones(2, 3, 7, 5)
    x[1, :, 0, 0] += 1 / 128
    model = nn.Sequential(nn.ReLU(), nn.Flatten()).bfloat16()

    found, _ = Units(model, ["layer:0"]).read(x.bfloat16())

    torch.testing.assert_close(found[1] - found[0], torch.full((3,), 1 / 128 / 35), atol=1e-7, rtol=1e-3)


class Twice(nn.Module):
    """Runs one layer twice and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.idle, self.linear = nn.ReLU(), nn.ReLU(), nn.Linear(105, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(self.relu(x).flatten(1)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"units \[\]: name at least one"),
        (["logits", "logits"], "and each once"),
        (["logit"], "no unit 'logit'; units are 'logits', .*'layer:NAME'"),
        (["layer:conv9"], "the model has no layer 'conv9'. Its layers: 'relu', 'idle', 'linear'"),
        (["layer:relu"], "layer:relu runs more than once"),
        (["layer:idle"], "layer:idle did not run"),
    ],
)
def test_units_that_cannot_be_read_are_errors(names: list[str], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Units(Twice(), names).read(images(2))


def test_an_error_in_the_model_leaves_no_hooks_behind() -> None:
    model = network()

    with pytest.raises(RuntimeError):
        Units(model, ["layer:0"]).read(torch.zeros(1, 3, 4, 4))

    assert not model[0]._forward_hooks


# ------------------------------------------------------------------------------------------------ differences


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", ["zero", "mean", "blur"])
def test_differences_of_logits_are_those_of_captums_feature_ablation(kind: dict[str, Any], reference: Any) -> None:
    model, x = network(), images(5)
    options = LeaveOneOutOptions(**kind, reference=reference, rows=37)  # no multiple of anything
    numbers = feature_numbers((3, 7, 5), options)
    baseline = reference_images(x, reference, options, MEAN)

    found = LeaveOneOut(model, ["logits"], options, MEAN).differences(x)

    for target in range(4):
        ablation = captum.attr.FeatureAblation(model)
        truth = ablation.attribute(x, baseline, target=target, feature_mask=numbers[None])
        torch.testing.assert_close(found[:, target][:, numbers], truth, atol=2e-6, rtol=1e-5)


def test_all_units_are_what_one_perturbed_image_at_a_time_gives() -> None:
    model, x = network(torch.float64), images(3, torch.float64)
    units = Units(model, ALL_UNITS)
    intact, predicted = units.read(x)

    found = LeaveOneOut(model, ALL_UNITS, LeaveOneOutOptions()).differences(x)

    assert found.shape == (3, 6 + 8 + 4 + 4 + 1 + 1, 35)
    for image in range(3):
        for place in range(35):
            perturbed = x[image : image + 1].clone()
            perturbed[0, :, place // 5, place % 5] = 0
            value, _ = units.read(perturbed, predicted[image : image + 1])
            torch.testing.assert_close(found[image, :, place], intact[image] - value[0], atol=1e-12, rtol=0)


def test_differences_of_a_linear_model_are_weight_times_input() -> None:
    weight, x = torch.randn(4, 105), images(6)
    layer = nn.Linear(105, 4)
    layer.weight.data = weight

    found = LeaveOneOut(
        nn.Sequential(nn.Flatten(), layer), ["logits"], LeaveOneOutOptions(features="values")
    ).differences(x)

    torch.testing.assert_close(found, weight * x.flatten(1)[:, None], atol=2e-6, rtol=1e-5)


class Counting(nn.Module):
    """Notes how many images went through it, and how many at a time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.model(x)


def test_what_already_is_the_reference_costs_no_pass_and_is_exactly_zero(trained_digits: TrainedDigits) -> None:
    model, x = Counting(trained_digits.model), trained_digits.test.images[:20]
    black = x.flatten(1) == 0

    found = LeaveOneOut(model, ["logits", "probabilities"], LeaveOneOutOptions()).differences(x)

    assert black.float().mean() > 0.3
    assert not found.transpose(1, 2)[black].any()
    assert (found.abs().amax(1)[~black] > 0).float().mean() > 0.95  # the others are not all lost
    assert sum(model.batches) == 20 + int((~black).sum())


def test_batches_are_full_across_images_and_further_units_cost_no_pass() -> None:
    x = images(7).clamp_min(0.1)  # nothing is black: 7 * 35 = 245 perturbed images
    one, all_of_them = Counting(network()), Counting(network())

    LeaveOneOut(one, ["logits"], LeaveOneOutOptions(rows=50)).differences(x)
    LeaveOneOut(all_of_them, [f"layer:model.{n}" for n in range(6)], LeaveOneOutOptions(rows=50)).differences(x)

    assert one.batches == [7, 50, 50, 50, 50, 45]
    assert all_of_them.batches == one.batches


def test_reduced_sees_no_more_at_once_than_memory_allows() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 40)).requires_grad_(False)
    x = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def iqr(part: Tensor) -> Tensor:
        seen.append(part.numel() * part.element_size())
        return dispersion(part.flatten(0, 1), "iqr").view(len(part), -1)

    tight = LeaveOneOut(model, ["logits"], LeaveOneOutOptions(memory=1)).reduced(x, iqr)
    roomy = LeaveOneOut(model, ["logits"], LeaveOneOutOptions()).reduced(x, iqr)

    assert len(seen) > 2
    assert max(seen[:-1]) <= 2**20
    torch.testing.assert_close(tight, roomy, atol=1e-6, rtol=1e-5)
    assert tight.shape == (20, 40)


@pytest.mark.parametrize("size", [1, 7, 250])
def test_no_example_depends_on_its_neighbours_or_on_the_number_of_rows(size: int) -> None:
    model, x = network(torch.float64), images(9, torch.float64)
    whole = LeaveOneOut(model, ALL_UNITS, LeaveOneOutOptions()).differences(x)
    loo = LeaveOneOut(model, ALL_UNITS, LeaveOneOutOptions(rows=size))

    parts = torch.cat([loo.differences(part) for part in x.split(size)])

    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), network()).requires_grad_()  # begins in place
    x = images(3) - 0.01
    before, weights = x.clone(), copy.deepcopy(model.state_dict())

    found = LeaveOneOut(model, ["logits"], LeaveOneOutOptions()).differences(x)

    assert torch.equal(x, before)
    assert not found.requires_grad
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_an_all_black_image_and_an_empty_batch_are_no_trouble(trained_digits: TrainedDigits) -> None:
    loo = LeaveOneOut(trained_digits.model, ["logits"], LeaveOneOutOptions())

    black = loo.differences(torch.zeros(2, 1, 8, 8))
    nothing = loo.differences(torch.zeros(0, 1, 8, 8))

    assert black.shape == (2, 10, 64)
    assert not black.any()
    assert nothing.shape == (0, 10, 64)


def test_the_iqr_of_an_image_that_is_mostly_black_collapses_and_std_does_not(trained_digits: TrainedDigits) -> None:
    x = torch.zeros(1, 1, 8, 8)
    x[..., 3:5, 3:5] = 0.9  # 4 of 64 pixels

    differences = LeaveOneOut(trained_digits.model, ["predicted-probability"], LeaveOneOutOptions()).differences(x)

    assert dispersion(differences[:, 0], "iqr").item() == 0
    assert dispersion(differences[:, 0], "std").item() > 0


def test_values_that_are_no_numbers_stay_unknown() -> None:
    model, x = network(), images(2)
    x[0, 0, 0, 0] = float("nan")

    found = LeaveOneOut(model, ["logits"], LeaveOneOutOptions()).differences(x)

    assert found[0].isnan().any()
    assert found[1].isfinite().all()


# ------------------------------------------------------------------------------------------------ with a graph


@pytest.mark.parametrize("reference", ["zero", "mean", "blur"])
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_features_have_the_differences_of_all(kind: dict[str, Any], reference: Any) -> None:
    loo = LeaveOneOut(network(), ALL_UNITS, LeaveOneOutOptions(**kind, reference=reference), MEAN)
    x, chosen = images(4), torch.tensor([2, 0])

    found = loo.sampled(x.clone().requires_grad_(), chosen)

    torch.testing.assert_close(found.detach(), loo.differences(x)[:, :, chosen], atol=2e-6, rtol=1e-5)
    assert found.requires_grad


def test_each_image_can_have_sampled_features_of_its_own() -> None:
    loo, x = LeaveOneOut(network(), ALL_UNITS, LeaveOneOutOptions()), images(3)
    chosen = torch.tensor([[2, 0], [34, 7], [5, 5]])

    found = loo.sampled(x, chosen)

    truth = loo.differences(x)
    own = torch.stack([truth[image][:, chosen[image]] for image in range(3)])
    torch.testing.assert_close(found, own, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("least", "truth"), [(0.0, [[False, True, True]]), (0.1, [[False, False, True]])])
def test_a_feature_has_changed_when_one_of_its_values_differs_enough(least: float, truth: list[list[bool]]) -> None:
    x = torch.tensor([[0.0, 0.1, 0.05], [0.0, 0.0, 0.2]]).view(1, 2, 1, 3)
    loo = LeaveOneOut(nn.Flatten(), ["logits"], LeaveOneOutOptions())

    assert loo.changed(x, least).tolist() == truth


@pytest.mark.parametrize("reference", ["zero", "blur"])
def test_the_gradient_of_sampled_differences_is_that_of_finite_differences(reference: Any) -> None:
    model = network(torch.float64)
    model[1] = nn.Softplus()
    loo = LeaveOneOut(model, ["layer:0", "probabilities"], LeaveOneOutOptions(reference=reference))
    x = images(2, torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(lambda x: loo.sampled(x, torch.tensor([3, 17, 30])), x, fast_mode=True)


def test_reduced_precision_inside_the_model_gives_differences_in_float32() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.adaptive_avg_pool2d(x, 1).flatten(1).bfloat16()

    assert LeaveOneOut(Half(), ["logits"], LeaveOneOutOptions()).differences(images(2)).dtype == torch.float32
