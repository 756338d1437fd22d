"""Detectors by confidence, features and squeezing: against scikit-learn, SciPy and closed forms, and under attack."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from evading import accepted_and_wrong, assert_refusals_win, protect, successes
from pydantic import ValidationError
from scipy import special, stats
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import KernelDensity as ReferenceDensity
from torch import Tensor, nn

from benchbox.api import ContractError, Defense, Examples
from benchbox.testing.oracles import LinearModel
from benchbox_defenses import benchbox_defenses
from benchbox_defenses.confidence_detector import ConfidenceDetector, doubt
from benchbox_defenses.detector import Scored, halves
from benchbox_defenses.feature_squeezing import LEAST, FeatureSqueezing, apart
from benchbox_defenses.kernel_density import KernelDensity, log_density, typical_distance
from benchbox_defenses.layer_features import FeatureReader
from benchbox_defenses.lid import LARGEST, LocalDimension, local_dimension
from benchbox_defenses.mahalanobis_features import MahalanobisFeatures, whitening_of
from conftest import TrainedDigits

Detector = tuple[type[Defense], dict[str, Any]]
DETECTORS = [
    pytest.param((ConfidenceDetector, {"score": "max-softmax"}), id="max-softmax"),
    pytest.param((ConfidenceDetector, {"score": "entropy"}), id="entropy"),
    pytest.param((ConfidenceDetector, {"score": "energy", "temperature": 2.0}), id="energy"),
    pytest.param((MahalanobisFeatures, {"layer": "2"}), id="mahalanobis-features"),
    pytest.param((KernelDensity, {}), id="kernel-density"),
    pytest.param((LocalDimension, {"layers": ["0", "5"], "k": 10}), id="lid"),
    pytest.param((FeatureSqueezing, {"bits": 3, "window": 3}), id="feature-squeezing"),
]
FEATURES = [(MahalanobisFeatures, {}), (KernelDensity, {}), (LocalDimension, {"references": 20, "k": 5})]


def pixels_are_features(classes: int = 2, pixels: int = 4) -> nn.Module:
    """A linear model in float64: what enters its last linear layer are the pixels of images (1, 1, pixels)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double().requires_grad_(False)


def clouds(count: int, classes: int = 2, pixels: int = 4, seed: int = 0) -> Examples:
    """Correlated Gaussian clouds, one per class, in turn; float64 images (count, 1, 1, pixels)."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % classes
    mixing = np.random.default_rng(99).normal(size=(pixels, pixels)) / 10
    points = rng.normal(size=(count, pixels)) @ mixing + np.linspace(0.3, 0.7, classes)[label, None]
    return Examples(torch.tensor(points)[:, None, None], torch.tensor(label))


def test_the_detectors_are_offered() -> None:
    kinds = {kind.name: kind for kind in benchbox_defenses()}

    for name in ("confidence-detector", "mahalanobis-features", "kernel-density", "lid", "feature-squeezing"):
        assert kinds[name].detects
        assert kinds[name].differentiable


# ------------------------------------------------------------------------------------------------ confidence


@pytest.mark.parametrize("temperature", [1.0, 0.5, 100.0])
def test_confidence_scores_agree_with_scipy(temperature: float) -> None:
    z = np.random.default_rng(0).normal(0, 3, (20, 5))
    p = special.softmax(z / temperature, axis=1)
    truth = {
        "max-softmax": np.log(1 - p.max(1)),
        "entropy": np.log(stats.entropy(p, axis=1)),
        "energy": -temperature * special.logsumexp(z / temperature, axis=1),
    }

    for score, values in truth.items():
        np.testing.assert_allclose(doubt(torch.tensor(z), score, temperature), values, rtol=1e-9)  # type: ignore[arg-type]


def test_maximum_softmax_keeps_its_order_and_its_slope_where_probabilities_are_all_one() -> None:
    logits = torch.tensor([[50.0, 0.0], [200.0, 0.0], [0.0, 100.0]], requires_grad=True)

    found = doubt(logits, "max-softmax")

    assert logits.softmax(1).amax(1).tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(found.detach(), torch.tensor([-50.0, -200.0, -100.0]))
    slope = torch.autograd.grad(found.sum(), logits)[0]
    torch.testing.assert_close(slope, torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]]))


# ------------------------------------------------------------------------------------------------ features


def test_features_are_the_pooled_activations_of_the_same_pass(trained_digits: TrainedDigits) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:5]
    reader = FeatureReader(model, ["0", "5", None], "test")

    logits, (convolution, hidden, penultimate) = reader(x)

    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(convolution, model[0](x).mean((2, 3)))  # type: ignore[index]
    torch.testing.assert_close(hidden, model[:6](x))  # type: ignore[index]
    torch.testing.assert_close(penultimate, model[:7](x))  # type: ignore[index]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_layer_that_works_in_place_leaves_the_features_before_it_alone() -> None:
    linear = nn.Linear(4, 4)
    x = torch.randn(3, 4)

    _, (found,) = FeatureReader(nn.Sequential(linear, nn.ReLU(inplace=True), nn.Linear(4, 2)), ["0"], "test")(x)

    assert (found < 0).any()
    torch.testing.assert_close(found, linear(x))


@pytest.mark.parametrize("layer", ["7.conv", ""])
@pytest.mark.parametrize("kind", [MahalanobisFeatures, KernelDensity])
def test_a_layer_that_does_not_exist_is_an_error_with_those_that_do(
    trained_digits: TrainedDigits, kind: type[Defense], layer: str
) -> None:
    with pytest.raises(
        ContractError, match=rf"{kind.name}: the model has no layer '{layer}'. Its layers: '0', '1', '2'"
    ):
        protect(kind, trained_digits.model, trained_digits.calibration, layer=layer)
    with pytest.raises(ContractError, match=r"lid: the model has no layer 'head'. Its layers: '0'"):
        protect(LocalDimension, trained_digits.model, trained_digits.calibration, layers=["0", "head"])


def test_a_model_without_a_linear_layer_needs_the_name_of_another() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().requires_grad_(False)

    with pytest.raises(ContractError, match=r"no nn.Linear.*name a layer. Its layers: '0', '1', '2'"):
        protect(KernelDensity, model, clouds(80))


def test_a_layer_that_takes_no_part_in_a_pass_is_an_error() -> None:
    model = pixels_are_features()
    model.spare = nn.Identity()
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign, index]

    with pytest.raises(ContractError, match="layer 'spare' gave no activations per image in a pass"):
        protect(KernelDensity, model, clouds(80), layer="spare")


# ------------------------------------------------------------------------------------------------ what is fitted


def test_the_images_that_fit_do_not_fix_the_threshold_and_classes_are_shared_out(trained_digits: TrainedDigits) -> None:
    fit, held_out = halves(trained_digits.model, trained_digits.calibration, "test")

    assert len(fit) + len(held_out) == len(trained_digits.calibration)
    assert (fit.labels.bincount() - held_out.labels.bincount()).abs().max() <= 1
    assert torch.cdist(fit.images.flatten(1), held_out.images.flatten(1)).min() > 0


def test_mahalanobis_distances_agree_with_scikit_learn() -> None:
    model, calibration, x = pixels_are_features(), clouds(80), clouds(30, seed=1).images
    fit, _ = halves(model, calibration, "test")
    points, label = fit.images.flatten(1).numpy(), fit.labels.numpy()
    means = np.stack([points[label == c].mean(0) for c in (0, 1)])
    shared = LedoitWolf(assume_centered=True).fit(points - means[label])
    truth = np.min([shared.mahalanobis(x.flatten(1).numpy() - mean) for mean in means], axis=0)

    protected = protect(MahalanobisFeatures, model, calibration)

    np.testing.assert_allclose(protected.evidence(x)["mahalanobis-features"], truth, rtol=1e-9)


def test_whitening_makes_the_shrunk_covariance_the_identity() -> None:
    residuals = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    covariance = torch.tensor(LedoitWolf(assume_centered=True).fit(residuals.numpy()).covariance_)

    whitening = whitening_of(residuals)

    torch.testing.assert_close(whitening.T @ covariance @ whitening, torch.eye(6, dtype=torch.float64))


def test_kernel_densities_are_those_of_the_predicted_class_as_in_scikit_learn() -> None:
    model, calibration, x = pixels_are_features(), clouds(80), clouds(30, seed=1).images
    fit, _ = halves(model, calibration, "test")
    points, label, predicted = fit.images.flatten(1).numpy(), fit.labels.numpy(), model(x).argmax(1).numpy()
    width = 0.5 * typical_distance(fit.images.flatten(1), fit.labels)
    bandwidth = width / math.sqrt(2)  # their kernel is exp(-d² / 2h²), and their density integrates to 1
    mass = 4 / 2 * math.log(2 * math.pi * bandwidth**2)
    reference = [ReferenceDensity(bandwidth=bandwidth).fit(points[label == c]) for c in (0, 1)]
    densities = np.stack([known.score_samples(x.flatten(1).numpy()) for known in reference])
    truth = -densities[predicted, np.arange(len(x))] - mass

    protected = protect(KernelDensity, model, calibration)

    np.testing.assert_allclose(protected.evidence(x)["kernel-density"], truth, rtol=1e-9)


def test_a_density_that_underflows_still_has_a_logarithm_and_a_slope() -> None:
    distance = torch.tensor([[100.0, 200.0]], requires_grad=True)

    found = log_density(distance, torch.tensor([[True, False]]), width=1.0)

    assert found.tolist() == [-10_000.0]
    assert torch.autograd.grad(found.sum(), distance)[0].tolist() == [[-200.0, 0.0]]


def test_references_of_each_class_are_limited(trained_digits: TrainedDigits) -> None:
    protected: Any = protect(KernelDensity, trained_digits.model, trained_digits.calibration, references=7)

    assert protected.labels.bincount().tolist() == [7] * 10


@pytest.mark.parametrize(
    ("distance", "truth"),
    [
        ([4.0, 1.0, 2.0, 9.0], 1 / math.log(2)),  # of 1, 2, 4: 3 / (ln 4 + ln 2 + 0)
        ([3.0, 3.0, 3.0, 3.0], LARGEST),
        ([0.0, 0.0, 0.0, 1.0], LARGEST),
    ],
)
def test_the_local_dimension_of_known_distances(distance: list[float], truth: float) -> None:
    assert float(local_dimension(torch.tensor([distance]), k=3)) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("dimension", [1, 3, 8])
def test_the_local_dimension_of_a_uniform_ball_is_its_dimension(dimension: int) -> None:
    radius = torch.rand(50, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** (1 / dimension)

    found = local_dimension(radius, k=400).mean()

    assert float(found) == pytest.approx(dimension, rel=0.03)


def test_a_reference_that_equals_the_input_leaves_score_and_slope_finite() -> None:
    model, calibration = pixels_are_features(), clouds(80)
    protected: Any = protect(LocalDimension, model, calibration, references=20, k=5)
    x = halves(model, calibration, "test")[0].images[:3].clone().requires_grad_()

    score = protected.assess(x)[1]

    assert score.isfinite().all()
    assert torch.autograd.grad(score.sum(), x)[0].isfinite().all()


def test_squeezing_distances_of_a_linear_model() -> None:
    """Half black and half just below the middle: one bit makes all of it black, and a median leaves it as it is."""
    image = torch.zeros(1, 1, 4, 4)
    image[..., 2:] = 0.49
    model = LinearModel(torch.stack([torch.zeros(16), torch.ones(16)]), torch.zeros(2))
    p = special.expit(8 * 0.49)
    calibration = Examples(torch.rand(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64))

    bits = protect(FeatureSqueezing, model, calibration, bits=1, window=0).evidence(image)
    both = protect(FeatureSqueezing, model, calibration, bits=1, window=3).evidence(image)
    window = protect(FeatureSqueezing, model, calibration, bits=0, window=3).evidence(image)

    distance = 2 * (p - 0.5)
    assert float(bits["feature-squeezing"]) == pytest.approx(math.log(distance / (2 - distance)), abs=1e-5)
    assert float(both["feature-squeezing"]) == pytest.approx(math.log(distance / (2 - distance)), abs=1e-5)
    assert float(window["feature-squeezing"]) == pytest.approx(math.log(LEAST), abs=1e-5)


def test_two_sure_and_different_answers_still_have_a_slope() -> None:
    """Their L1 distance is 2, and in floats it does not move; the overlap is e^-50 on either side."""
    one = torch.tensor([[50.0, 0.0]], requires_grad=True)

    found = apart(one, torch.tensor([[0.0, 50.0]]))

    assert found.item() == pytest.approx(50 - math.log(2), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), one)[0], torch.tensor([[0.5, -0.5]]))


def test_a_squeezer_that_does_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="a median filter of one pixel changes nothing"):
        FeatureSqueezing.Options(window=1)
    with pytest.raises(ValidationError, match="bits = 0 and window = 0 leave nothing to compare with"):
        FeatureSqueezing.Options(bits=0, window=0)


# ------------------------------------------------------------------------------------------------ thresholds


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("fpr", [0.05, 0.2])
def test_new_clean_images_are_refused_about_as_often_as_stated(
    trained_digits: TrainedDigits, detector: Detector, fpr: float
) -> None:
    protected = protect(detector[0], trained_digits.model, trained_digits.calibration, fpr=fpr, **detector[1])
    images = trained_digits.test.images  # 397, and the threshold is known from 200 or 400: about ±2.6 % each at 20 %

    refused = protected.rejects(protected.evidence(images)).float().mean().item()

    assert fpr - 0.08 < refused < fpr + 0.08


@pytest.mark.parametrize("detector", DETECTORS)
def test_too_few_calibration_images_for_the_rate_are_an_error(
    trained_digits: TrainedDigits, detector: Detector
) -> None:
    options = {"fpr": 0.001} | detector[1]

    with pytest.raises(
        ContractError, match=r"\d+ calibration images are too few .* of 0.001: 1000 are needed; enlarge"
    ):
        protect(detector[0], trained_digits.model, trained_digits.calibration, **options)


@pytest.mark.parametrize(("kind", "options"), FEATURES)
def test_a_class_without_calibration_images_is_an_error(
    trained_digits: TrainedDigits, kind: type[Defense], options: dict[str, Any]
) -> None:
    calibration = trained_digits.calibration
    calibration = calibration.take((calibration.labels != 3) & (calibration.labels != 8))

    with pytest.raises(ContractError, match=f"{kind.name}: the calibration split has no image of class 3, 8; enlarge"):
        protect(kind, trained_digits.model, calibration, **options)


def test_more_references_than_images_or_neighbours_than_references_are_errors(trained_digits: TrainedDigits) -> None:
    few = trained_digits.calibration.head(100)

    with pytest.raises(
        ContractError, match=r"half of the calibration split, \d+ images, is less than references = 100"
    ):
        protect(LocalDimension, trained_digits.model, few)
    with pytest.raises(ContractError, match="20 references have no 20 neighbours and one to spare"):
        protect(LocalDimension, trained_digits.model, few, references=20)


class Bright(nn.Module):
    """Bright images become what ``value`` says, all others pass."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.mean((1, 2, 3), keepdim=True) > 0.9, self.value, x)


@pytest.mark.parametrize("detector", DETECTORS)
def test_scores_that_are_no_numbers_are_refused(trained_digits: TrainedDigits, detector: Detector) -> None:
    blind = nn.Sequential(Bright(math.nan), *copy.deepcopy(list(trained_digits.model.children())))  # type: ignore[arg-type]
    options = detector[1] | {
        name: value for name, value in {"layer": "3", "layers": ["1", "6"]}.items() if name in detector[1]
    }
    protected = protect(detector[0], blind, trained_digits.calibration, **options)
    bright = torch.ones(1, 1, 8, 8)

    evidence = protected.evidence(bright)

    assert next(iter(evidence.values())).isnan().all()
    assert protected.rejects(evidence).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ConfidenceDetector, {}, "the score is not finite on 100 of 400 calibration images"),
        (FeatureSqueezing, {}, "the score is not finite on 100 of 400 calibration images"),
        *((kind, options, r"penultimate layer are not finite on \d+ of") for kind, options in FEATURES),
    ],
)
def test_a_calibration_split_without_numbers_is_an_error(
    trained_digits: TrainedDigits, kind: type[Defense], options: dict[str, Any], message: str
) -> None:
    images = trained_digits.calibration.images.clone()
    images[:100] = 1.0
    blind = nn.Sequential(Bright(math.nan), trained_digits.model)

    with pytest.raises(ContractError, match=message):
        protect(kind, blind, Examples(images, trained_digits.calibration.labels), **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ConfidenceDetector, {}, r"max-softmax: the score is -?[\d.e-]+ on every calibration image"),
        (MahalanobisFeatures, {}, "the features of each class are the same on all calibration images"),
        (KernelDensity, {}, "two images of a class have the same features"),
        (LocalDimension, {"references": 20, "k": 5}, "lid: the score is 0 on every calibration image"),
        (FeatureSqueezing, {}, r"feature-squeezing: the score is -[\d.]+ on every calibration image"),
    ],
)
def test_scores_that_tell_nothing_apart_are_an_error(
    trained_digits: TrainedDigits, kind: type[Defense], options: dict[str, Any], message: str
) -> None:
    black = Examples(torch.zeros_like(trained_digits.calibration.images), trained_digits.calibration.labels)

    with pytest.raises(ContractError, match=message):
        protect(kind, trained_digits.model, black, **options)


# ------------------------------------------------------------------------------------------------ under attack


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_surrogates_rejected_column_wins_exactly_when_the_input_is_refused(
    trained_digits: TrainedDigits, detector: Detector
) -> None:
    protected = protect(detector[0], trained_digits.model, trained_digits.calibration, fpr=0.3, **detector[1])

    assert_refusals_win(protected, trained_digits.model, trained_digits.test.images[:100])


EXACT = [
    (ConfidenceDetector, {"score": "max-softmax"}),
    (ConfidenceDetector, {"score": "entropy"}),
    (ConfidenceDetector, {"score": "energy"}),
    (MahalanobisFeatures, {"layer": "1"}),
    (KernelDensity, {"width": 1.0}),
    (LocalDimension, {"layers": ["0", "3"], "references": 20, "k": 5}),
    (FeatureSqueezing, {"bits": 0, "window": 3}),
]


@pytest.mark.parametrize(("kind", "options"), EXACT)
def test_the_gradient_of_the_surrogate_is_that_of_finite_differences(
    kind: type[Defense], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 6), nn.Linear(6, 3))
    model = model.double().requires_grad_(False)
    images = torch.rand(90, 1, 4, 4, dtype=torch.float64)
    protected = protect(kind, model, Examples(images, torch.arange(90) % 3), **options)

    assert torch.autograd.gradcheck(protected.surrogate(), images[:3].clone().add_(0.01).requires_grad_(), atol=1e-5)


@pytest.mark.parametrize("detector", DETECTORS)
def test_an_attack_that_knows_the_detector_passes_it_more_often(
    trained_digits: TrainedDigits, detector: Detector
) -> None:
    protected = protect(detector[0], trained_digits.model, trained_digits.calibration, fpr=0.2, **detector[1])

    oblivious, adaptive = successes(protected, trained_digits.model, trained_digits.test.head(100), eps=0.15)

    assert adaptive > oblivious + 0.05


def test_confident_examples_pass_the_entropy_detector_better_than_clean_images(trained_digits: TrainedDigits) -> None:
    """Why an oblivious number says little: no knowledge of the detector is needed, only steps beyond the boundary."""
    model, test = trained_digits.model, trained_digits.test.head(100)
    protected = protect(ConfidenceDetector, model, trained_digits.calibration, score="entropy")
    adversarial = test.images
    for _ in range(20):
        x = adversarial.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(x), test.labels, reduction="sum")
        moved = x.detach() + 0.03 * torch.autograd.grad(loss, x)[0].sign()
        adversarial = moved.clamp(test.images - 0.25, test.images + 0.25).clamp(0, 1)

    assert accepted_and_wrong(protected, adversarial, test.labels) > 0.8


@pytest.mark.parametrize("detector", DETECTORS)
def test_no_example_depends_on_its_neighbours(trained_digits: TrainedDigits, detector: Detector) -> None:
    model = copy.deepcopy(trained_digits.model).double()  # so that rounding cannot hide behind a tolerance
    calibration = Examples(trained_digits.calibration.images.double(), trained_digits.calibration.labels)
    protected = protect(detector[0], model, calibration, **detector[1])
    assert isinstance(protected, Scored)
    x = trained_digits.test.images[:250].double()

    whole = protected.surrogate()(x)

    for size in (1, 7):
        parts = torch.cat([protected.surrogate()(part) for part in x[:50].split(size)])
        torch.testing.assert_close(parts, whole[:50], atol=1e-8, rtol=1e-9)
