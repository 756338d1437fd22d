"""Attribution defenses: attributions, dispersion, masking, detection, and what an attacker who knows them can do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from benchbox.api import AttackTarget, ContractError, Examples, adversarial_loss
from benchbox.domain import Threat
from benchbox.testing.contracts import check_defense
from benchbox_attributions.attribution import AttributionOptions, attribute
from benchbox_attributions.dispersion import dispersion
from benchbox_attributions.relu import SmoothStep
from benchbox_defenses import benchbox_defenses
from benchbox_defenses.attribution_detector import AttributionDetector, Detecting
from benchbox_defenses.attribution_mask import AttributionMask, Masked
from conftest import TrainedDigits

METHODS = ("saliency", "input-x-gradient", "integrated-gradients", "occlusion")
MOMENTS = ("std", "variance", "mean-abs-deviation", "kurtosis", "skewness")
STATISTICS = (*MOMENTS, "iqr", "mad")
ATTACK = Threat("linf", 0.15)


def linear(weight: Tensor) -> nn.Module:
    """Logits <weight[k], x>; ``weight`` (k, c, h, w)."""
    layer = nn.Linear(weight[0].numel(), len(weight), bias=False)
    layer.weight.data = weight.flatten(1)
    return nn.Sequential(nn.Flatten(), layer)


def smooth_network() -> nn.Module:
    """A random network with all derivatives, in float64, for images (2, 4, 4)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()


def pgd(logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, steps: int = 20) -> Tensor:
    """Plain projected gradient ascent within ``ATTACK``; returns the last iterate."""
    adversarial = images
    for _ in range(steps):
        x = adversarial.detach().requires_grad_()
        gradient = torch.autograd.grad(adversarial_loss(logits(x), labels, ATTACK).sum(), x)[0]
        x = x.detach() + ATTACK.eps / 4 * gradient.sign()
        adversarial = x.clamp(images - ATTACK.eps, images + ATTACK.eps).clamp(0, 1)
    return adversarial


def protect(kind: type[Any], model: nn.Module, calibration: Examples, **options: Any) -> Any:
    return kind(kind.Options(**options)).protect(model, calibration, torch.Generator())


def test_both_defenses_are_offered() -> None:
    kinds = {kind.name: kind for kind in benchbox_defenses()}

    assert kinds["attribution-detector"].detects
    assert not kinds["attribution-mask"].detects


# ------------------------------------------------------------------------------------------------ attributions


def test_attributions_of_a_linear_model_are_its_weights() -> None:
    weight, x = torch.randn(3, 2, 4, 4), torch.rand(5, 2, 4, 4)
    model = linear(weight)
    own = weight[model(x).argmax(1)]

    found = {method: attribute(model, x, AttributionOptions(method=method)) for method in METHODS}

    torch.testing.assert_close(found["saliency"], own)
    torch.testing.assert_close(found["input-x-gradient"], own * x)
    torch.testing.assert_close(found["integrated-gradients"], own * x)
    per_place = (own * x).sum(1, keepdim=True).expand_as(x)  # leaving a place out takes all its channels away
    torch.testing.assert_close(found["occlusion"], per_place, atol=1e-5, rtol=1e-4)


def test_integrated_gradients_are_complete(trained_digits: TrainedDigits) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:40]
    best = model(x).argmax(1, keepdim=True)
    difference = (model(x) - model(torch.zeros_like(x))).gather(1, best)[:, 0]

    total = attribute(model, x, AttributionOptions(method="integrated-gradients", steps=200)).sum((1, 2, 3))

    torch.testing.assert_close(total, difference, rtol=0.01, atol=0.05)


def test_integrated_gradients_are_captums_however_the_steps_are_batched(trained_digits: TrainedDigits) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:40]
    truth = captum.attr.IntegratedGradients(model).attribute(x, target=model(x).argmax(1), n_steps=50)

    found = attribute(model, x, AttributionOptions(method="integrated-gradients", steps=50))

    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 2, 3])  # 3 does not divide 8: the last windows are cut off
def test_occlusion_agrees_with_captum(trained_digits: TrainedDigits, window: int) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:20]
    shape = (1, window, window)
    truth = captum.attr.Occlusion(model).attribute(x, shape, strides=shape, target=model(x).argmax(1))

    found = attribute(model, x, AttributionOptions(method="occlusion", window=window))

    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_attributions_leave_no_trace_whatever_the_gradient_mode(trained_digits: TrainedDigits, method: str) -> None:
    options = AttributionOptions(method=method)
    model = nn.Sequential(nn.ReLU(inplace=True), copy.deepcopy(trained_digits.model)).requires_grad_()
    x = trained_digits.test.images[:4] - 0.01
    before = x.clone()

    plain = attribute(model, x, options)
    with torch.no_grad():
        without = attribute(model, x, options)
    with torch.inference_mode():
        inference = attribute(model, x.clone(), options)

    assert torch.equal(plain, without)
    assert torch.equal(plain, inference)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert not plain.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_an_all_black_image_and_an_empty_batch_are_no_trouble(trained_digits: TrainedDigits, method: str) -> None:
    options = AttributionOptions(method=method)
    x = torch.zeros(2, 1, 8, 8)

    phi = attribute(trained_digits.model, x, options)

    assert phi.isfinite().all()
    assert method == "saliency" or not phi.any()
    assert attribute(trained_digits.model, x[:0], options).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("method", METHODS)
def test_differentiable_attributions_have_the_same_values(trained_digits: TrainedDigits, method: str) -> None:
    options = AttributionOptions(method=method, **({"steps": 40} if method == "integrated-gradients" else {}))
    x = trained_digits.test.images[:30]

    found = attribute(trained_digits.model, x.clone().requires_grad_(), options, differentiable=True)

    torch.testing.assert_close(found.detach(), attribute(trained_digits.model, x, options), atol=1e-5, rtol=1e-4)
    assert found.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("statistic", MOMENTS)
def test_the_gradient_of_a_dispersion_is_that_of_finite_differences(method: str, statistic: Any) -> None:
    model = smooth_network()
    options = AttributionOptions(method=method, **({"steps": 150} if method == "integrated-gradients" else {}))
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def score(images: Tensor) -> Tensor:
        return dispersion(attribute(model, images, options, differentiable=True).flatten(1), statistic)

    assert torch.autograd.gradcheck(score, x, fast_mode=True, atol=1e-6)


def test_an_option_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="steps is only for method 'integrated-gradients'"):
        AttributionDetector.Options(method="saliency", steps=50)
    with pytest.raises(ValidationError, match="window is only for method 'occlusion'"):
        AttributionMask.Options(method="saliency", window=2)
    complete = AttributionMask.Options(method="occlusion", window=2).model_dump()
    assert AttributionMask.Options(**complete).window == 2  # with all defaults filled in, it is still valid


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "function": functional.relu,
    "torch": torch.relu,
    "method": lambda z: z.relu(),
    "method in place": lambda z: z.relu_(),
    "in place, result dropped": lambda z: (z.relu_(), z)[1],
}


@pytest.mark.parametrize("form", RELUS)
def test_relu_keeps_value_and_slope_and_gets_curvature(form: str) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(6, 5), nn.Linear(5, 1)
    x = torch.randn(4, 6, requires_grad=True)

    def slope() -> tuple[Tensor, Tensor]:
        value = last(RELUS[form](first(x))).sum()
        return value.detach(), torch.autograd.grad(value, x, create_graph=True)[0]

    value, gradient = slope()
    with SmoothStep():
        smooth_value, smooth_gradient = slope()

    assert torch.equal(smooth_value, value)
    torch.testing.assert_close(smooth_gradient, gradient, atol=1e-7, rtol=1e-6)
    curvature = torch.autograd.grad(smooth_gradient.square().sum(), x)[0]
    assert (curvature.abs().sum(1) > 0).all()


# ------------------------------------------------------------------------------------------------ masking


COLOURED = Examples(
    torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(3)), torch.zeros(6, dtype=torch.int64)
)


def mask_of(weight: list[list[list[float]]], **options: Any) -> list[list[bool]]:
    """The mask of a one-class linear model with ``weight`` (c, 2, 2): its saliency is its weight."""
    model = linear(torch.tensor([weight]))
    protected = protect(AttributionMask, model, COLOURED, **({"method": "saliency", "fraction": 0.5} | options))
    return protected.mask(torch.rand(1, len(weight), 2, 2))[0].tolist()


def test_the_least_or_most_attributed_places_are_masked_all_channels_together() -> None:
    weight = [[[1.0, -9.0], [3.0, 0.0]], [[-1.0, 9.0], [3.0, 1.0]], [[1.0, 0.0], [3.0, 0.0]]]  # sums 3 18 / 9 1

    assert mask_of(weight, which="least") == [[True, False], [False, True]]
    assert mask_of(weight, which="most") == [[False, True], [True, False]]
    assert mask_of(weight, which="most", fraction=0.25) == [[False, True], [False, False]]


@pytest.mark.parametrize("which", ["least", "most"])
def test_ties_go_to_the_first_in_reading_order(which: str) -> None:
    assert mask_of([[[2.0, -2.0], [2.0, 2.0]]], which=which) == [[True, True], [False, False]]


def test_masked_places_are_replaced_and_all_others_kept() -> None:
    weight = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]] * 3]).reshape(1, 3, 2, 2)
    x = COLOURED.images[:2]
    truth = {
        "zero": torch.zeros(2, 3),
        "mean": COLOURED.images.mean((0, 2, 3)).expand(2, 3),
        "blur": x.mean((2, 3)),  # of 2 x 2 pixels, a 3 x 3 window sees all
    }

    for replacement, colour in truth.items():
        protected = protect(AttributionMask, linear(weight), COLOURED, fraction=0.25, replacement=replacement)
        expected = x.clone()
        expected[:, :, 0, 0] = colour
        torch.testing.assert_close(protected(x), linear(weight)(expected))


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_a_fraction_that_rounds_to_nothing_or_everything_is_an_error(fraction: float) -> None:
    with pytest.raises(ContractError, match=r"fraction 0\.\d of 4 pixels rounds to [04]; choose one between 0.25"):
        mask_of([[[1.0, 2.0], [3.0, 4.0]]], fraction=fraction)


@pytest.mark.parametrize(("which", "replacement"), [*itertools.product(["least", "most"], ["zero", "mean", "blur"])])
def test_the_masked_model_is_the_same_with_and_without_a_graph(
    trained_digits: TrainedDigits, which: str, replacement: str
) -> None:
    x = trained_digits.test.images[:30]
    protected = protect(
        AttributionMask, trained_digits.model, trained_digits.calibration, which=which, replacement=replacement
    )

    with_graph = protected.surrogate()(x.clone().requires_grad_())

    torch.testing.assert_close(with_graph.detach(), protected(x), atol=1e-5, rtol=1e-5)
    assert with_graph.requires_grad


def test_an_attack_that_sees_the_mask_move_beats_one_for_which_it_is_constant(trained_digits: TrainedDigits) -> None:
    model, test = trained_digits.model, trained_digits.test.head(150)
    protected: Masked = protect(
        AttributionMask, model, trained_digits.calibration, method="input-x-gradient", replacement="blur"
    )

    def constant_mask(x: Tensor) -> Tensor:
        return model(torch.where(protected.mask(x)[:, None], protected.replacement(x), x))

    robust = {
        name: (protected(pgd(logits, test.images, test.labels)).argmax(1) == test.labels).float().mean().item()
        for name, logits in {"oblivious": model, "constant": constant_mask, "adaptive": protected.surrogate()}.items()
    }

    assert robust["adaptive"] < robust["constant"] - 0.1
    assert robust["adaptive"] < robust["oblivious"] - 0.1


# ------------------------------------------------------------------------------------------------ detection


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("tail", ["upper", "lower", "both"])
@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.3])
def test_the_calibration_split_never_pays_more_than_the_budget(
    trained_digits: TrainedDigits, statistic: str, tail: str, fpr: float
) -> None:
    calibration = trained_digits.calibration
    options = {"method": "saliency", "statistic": statistic, "tail": tail, "fpr": fpr}
    protected = protect(AttributionDetector, trained_digits.model, calibration, **options)

    refused = protected.rejects(protected.evidence(calibration.images)).float().mean().item()

    assert fpr - 1 / 400 < refused + 1e-6
    assert refused <= fpr + 1e-6


def test_ties_are_refused_only_where_all_of_them_fit_the_budget(trained_digits: TrainedDigits) -> None:
    calibration = trained_digits.calibration
    options = {"statistic": "mad", "tail": "lower", "fpr": 0.05}  # many images have mad 0, which is the lowest there is

    protected = protect(AttributionDetector, trained_digits.model, calibration, **options)

    assert (protected.statistic(calibration.images) == 0).float().mean() > 0.05
    assert not protected.rejects(protected.evidence(calibration.images)).any()


def test_the_tail_says_which_values_of_the_statistic_are_suspicious(trained_digits: TrainedDigits) -> None:
    model, calibration = trained_digits.model, trained_digits.calibration
    spread = dispersion(attribute(model, calibration.images, AttributionOptions()).flatten(1), "std")

    def refused(tail: str) -> Tensor:
        protected = protect(AttributionDetector, model, calibration, tail=tail, fpr=0.1)
        return spread[protected.rejects(protected.evidence(calibration.images))]

    assert refused("upper").min() > spread.quantile(0.89)
    assert refused("lower").max() < spread.quantile(0.11)
    distance = (spread - spread.median()).abs()
    assert (refused("both") - spread.median()).abs().min() > distance.quantile(0.89)


def test_too_few_calibration_images_are_an_error(trained_digits: TrainedDigits) -> None:
    with pytest.raises(ContractError, match=r"19 calibration images.*0\.05; give at least 20 or raise fpr"):
        protect(AttributionDetector, trained_digits.model, trained_digits.calibration.head(19))

    protect(AttributionDetector, trained_digits.model, trained_digits.calibration.head(20))


def test_a_statistic_that_collapses_is_an_error(trained_digits: TrainedDigits) -> None:
    dark = torch.zeros(40, 1, 8, 8)
    dark[:, :, 3:5, 3:5] = torch.rand(40, 1, 2, 2)  # 60 of 64 pixels are black, and so are their attributions

    with pytest.raises(ContractError, match="is 0 on every calibration image and can tell nothing apart"):
        protect(
            AttributionDetector, trained_digits.model, Examples(dark, torch.zeros(40, dtype=torch.int64)),
            statistic="iqr",
        )  # fmt: skip


class BlindToBright(nn.Module):
    """A model whose logits are no numbers where an image is bright."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * torch.where(x.mean((1, 2, 3)) > 0.9, float("nan"), 1.0)[:, None]


def test_scores_that_are_not_finite_are_refused_by_defense_and_surrogate(trained_digits: TrainedDigits) -> None:
    protected = protect(AttributionDetector, BlindToBright(trained_digits.model), trained_digits.calibration)
    bright = torch.ones(1, 1, 8, 8)

    evidence = protected.evidence(bright)

    assert evidence["dispersion"].isnan().all()
    assert protected.rejects(evidence).all()
    assert protected._finite_score(bright) > protected.threshold


def test_a_calibration_split_without_numbers_is_an_error(trained_digits: TrainedDigits) -> None:
    images = trained_digits.calibration.images.clone()
    images[:30] = 1.0  # 7.5 % of 400, and the budget is 5 %

    with pytest.raises(ContractError, match="not finite on 30 of 400 calibration images"):
        protect(
            AttributionDetector,
            BlindToBright(trained_digits.model),
            Examples(images, trained_digits.calibration.labels),
        )


@pytest.mark.parametrize("method", METHODS)
def test_the_surrogates_rejected_column_wins_exactly_when_the_input_is_refused(
    trained_digits: TrainedDigits, method: str
) -> None:
    protected = protect(AttributionDetector, trained_digits.model, trained_digits.calibration, method=method, fpr=0.3)
    x = trained_digits.test.images[:100]

    logits = protected.surrogate()(x.clone().requires_grad_())

    assert torch.equal(logits.argmax(1) == 10, protected.rejects(protected.evidence(x)))
    torch.testing.assert_close(logits[:, :10].detach(), trained_digits.model(x))


def accepted_and_wrong(protected: Detecting, images: Tensor, labels: Tensor) -> float:
    """The share of ``images`` that are misclassified and not refused."""
    accepted = ~protected.rejects(protected.evidence(images))
    return ((protected(images).argmax(1) != labels) & accepted).float().mean().item()


@pytest.mark.parametrize(("method", "examples"), [("input-x-gradient", 120), ("occlusion", 40)])
def test_an_attack_that_knows_the_detector_passes_it_more_often(
    trained_digits: TrainedDigits, method: str, examples: int
) -> None:
    model, test = trained_digits.model, trained_digits.test.head(examples)
    protected = protect(AttributionDetector, model, trained_digits.calibration, method=method, statistic="mad")
    target = AttackTarget(protected.surrogate(), num_classes=10, rejects=True)

    oblivious = pgd(model, test.images, test.labels)
    adaptive = pgd(lambda x: target.logits(x, test.labels), test.images, test.labels)

    assert accepted_and_wrong(protected, oblivious, test.labels) < 0.6
    gain = accepted_and_wrong(protected, adaptive, test.labels) - accepted_and_wrong(protected, oblivious, test.labels)
    assert gain > 0.1
    assert protected.score(adaptive).mean() < protected.score(oblivious).mean()


@pytest.mark.parametrize("method", ["saliency", "input-x-gradient", "integrated-gradients"])
def test_without_curvature_of_relu_the_score_could_not_be_steered(trained_digits: TrainedDigits, method: str) -> None:
    x = trained_digits.test.images[:60]
    protected = protect(AttributionDetector, trained_digits.model, trained_digits.calibration, method=method)

    lowered = x
    for _ in range(10):
        x_step = lowered.detach().requires_grad_()
        gradient = torch.autograd.grad(protected.score(x_step).sum(), x_step)[0]
        lowered = (lowered - 0.01 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    shaken = (x + 0.1 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)).clamp(0, 1)

    assert protected.score(lowered).mean() < 0.9 * protected.score(x).mean()
    assert protected.score(lowered).mean() < protected.score(shaken).mean()


# ------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [AttributionMask, AttributionDetector])
def test_no_example_depends_on_its_neighbours(
    trained_digits: TrainedDigits, kind: type[AttributionMask] | type[AttributionDetector], method: str
) -> None:
    model = copy.deepcopy(trained_digits.model).double()  # so that rounding cannot hide behind a tolerance
    calibration = Examples(trained_digits.calibration.images.double(), trained_digits.calibration.labels)
    protected = protect(kind, model, calibration, method=method)
    x = trained_digits.test.images[:12].double()

    together = protected(x), protected.evidence(x)
    alone = [(protected(image), protected.evidence(image)) for image in x.split(1)]

    torch.testing.assert_close(torch.cat([logits for logits, _ in alone]), together[0], atol=1e-9, rtol=0)
    for name, scores in together[1].items():
        torch.testing.assert_close(torch.cat([scores[name] for _, scores in alone]), scores, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", [AttributionMask, AttributionDetector])
def test_protecting_twice_gives_the_same_answers(
    trained_digits: TrainedDigits, kind: type[AttributionMask] | type[AttributionDetector]
) -> None:
    x = trained_digits.test.images[:20]

    first, second = (protect(kind, trained_digits.model, trained_digits.calibration) for _ in range(2))

    assert torch.equal(first(x), second(x))
    assert [s.tolist() for s in first.evidence(x).values()] == [s.tolist() for s in second.evidence(x).values()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [AttributionMask, AttributionDetector])
def test_the_contract_of_defenses_is_kept(
    trained_digits: TrainedDigits, kind: type[AttributionMask] | type[AttributionDetector], method: Any
) -> None:
    test = trained_digits.test.head(30)
    images = torch.cat([test.images, pgd(trained_digits.model, test.images, test.labels, steps=5)])

    check_defense(kind(kind.Options(method=method)), trained_digits.model, trained_digits.calibration, images)
