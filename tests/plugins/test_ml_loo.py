"""ml-loo: features against captum and numpy, the regression against scikit-learn, and the detector under attack."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from evading import assert_refusals_win, protect, successes
from pydantic import ValidationError
from scipy import stats
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchbox.api import AttackTarget, ContractError, Examples, Protected
from benchbox.domain import Threat
from benchbox.engine import search
from benchbox.testing.oracles import LinearModel
from benchbox_attacks.carlini_wagner import CarliniWagner
from benchbox_attacks.pgd import PGD
from benchbox_attributions.dispersion import Statistic, dispersion
from benchbox_attributions.leave_one_out import LeaveOneOut, LeaveOneOutOptions
from benchbox_defenses.adversarial_pairs import PairOptions, adversarial_pairs
from benchbox_defenses.attribution_detector import AttributionDetector
from benchbox_defenses.ml_loo import MlLoo
from benchbox_defenses.regression import fit_regression
from benchbox_defenses.unit_dispersion import UnitDispersion
from conftest import TrainedDigits

SEVEN: tuple[Statistic, ...] = ("std", "variance", "mean-abs-deviation", "kurtosis", "skewness", "iqr", "mad")
UNITS = ["layer:1", "layer:4", "probabilities", "predicted-probability"]
FORMS: list[dict[str, Any]] = [
    {"pairs": 80, "held_out": 200},
    {"pairs": 80, "held_out": 200, "statistics": ["std", "mad"], "scaling": True, "skip_below": 0.0},
    {"form": "single", "statistics": ["std"], "held_out": 200},
]


def network(activation: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A random network for images (2, 4, 3) with 3 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), activation or nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(),
        nn.Linear(5, 3),
    ).to(dtype).requires_grad_(False)  # fmt: skip


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images, a third of whose values are black."""
    x = torch.rand(count, 2, 4, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return torch.where(x < 1 / 3, 0.0, x)


def spread_of(
    model: nn.Module, units: list[str], statistics: list[Statistic], skip_below: float | None = None, **options: Any
) -> UnitDispersion:
    loo = LeaveOneOut(model, units, LeaveOneOutOptions(**{"features": "values"} | options))
    return UnitDispersion(loo, statistics, skip_below, samples=10)


# ------------------------------------------------------------------------------------------------ features


def by_numpy(phi: np.ndarray, statistic: Statistic) -> float:
    """The seven statistics as the authors' code has them."""
    quarters = np.percentile(phi, [25, 75])
    return {
        "std": phi.std(),
        "variance": phi.var(),
        "mean-abs-deviation": np.abs(phi - phi.mean()).mean(),
        "kurtosis": -stats.kurtosis(phi),
        "skewness": -stats.skew(phi),
        "iqr": quarters[1] - quarters[0],
        "mad": np.median(np.abs(phi - np.median(phi))),
    }[statistic]


def test_features_are_those_of_captums_feature_ablation_and_numpy() -> None:
    model, x = network(dtype=torch.float64), images(4, torch.float64)
    outputs: dict[str, Callable[[Tensor], Tensor]] = {
        "layer:1": lambda x: model[:2](x).mean((2, 3)),
        "layer:4": model[:5],
        "probabilities": lambda x: model(x).softmax(1),
    }
    predicted = model(x).argmax(1)
    maps = [
        captum.attr.FeatureAblation(output).attribute(x, target=unit).flatten(1)
        for output in outputs.values()
        for unit in range(output(x).shape[1])
    ]
    maps.append(captum.attr.FeatureAblation(outputs["probabilities"]).attribute(x, target=predicted).flatten(1))
    truth = [[by_numpy(phi[image].numpy(), s) for s in SEVEN for phi in maps] for image in range(4)]

    found = spread_of(model, UNITS, list(SEVEN))(x)

    assert found.shape == (4, 7 * (4 + 5 + 3 + 1))
    np.testing.assert_allclose(found, np.nan_to_num(truth), rtol=1e-7, atol=1e-12)  # a dead unit is 0, not NaN


@pytest.mark.parametrize(
    ("phi", "truth"),
    [
        ([0.0, 1, 2, 3, 4], (math.sqrt(2), 2, 1.2, 1.3, 0, 2, 1)),
        ([0.0, 0, 0, 0, 10], (4, 16, 3.2, -0.25, -1.5, 0, 0)),
        ([7.0, 7, 7, 7, 7], (0, 0, 0, 0, 0, 0, 0)),
    ],
)
def test_the_vectors_of_the_specification_through_a_linear_model(phi: list[float], truth: tuple[float, ...]) -> None:
    model = LinearModel(torch.tensor([phi, [0.0] * 5]), torch.zeros(2))  # on white, attributions are its weights

    found = spread_of(model, ["predicted-logit"], list(SEVEN))(torch.ones(1, 1, 1, 5))

    np.testing.assert_allclose(found[0], truth, atol=1e-6)


def test_what_equals_the_reference_can_be_left_out() -> None:
    model, x = network(dtype=torch.float64), images(3, torch.float64)
    x[2] = 0
    differences = LeaveOneOut(model, ["logits"], LeaveOneOutOptions(features="values")).differences(x)
    truth = [[np.subtract(*np.percentile(phi[image != 0], [75, 25])) for phi in rows] if image.any() else [0.0] * 3
             for image, rows in zip(x.flatten(1).numpy(), differences.numpy(), strict=True)]  # fmt: skip

    counted = spread_of(model, ["logits"], ["iqr"], skip_below=0.0)(x)
    everything = spread_of(model, ["logits"], ["iqr"])(x)

    np.testing.assert_allclose(counted, truth, atol=1e-12)
    assert (counted[:2] > everything[:2]).all()


@pytest.mark.parametrize("skip_below", [None, 0.0, 0.1])
def test_features_do_not_depend_on_memory_rows_or_neighbours(skip_below: float | None) -> None:
    model, x = network(dtype=torch.float64), images(7, torch.float64)
    whole = spread_of(model, UNITS, list(SEVEN), skip_below)(x)

    tight = spread_of(model, UNITS, list(SEVEN), skip_below, rows=5, memory=1)
    alone = torch.cat([tight(part) for part in torch.split(x, 1)])

    torch.testing.assert_close(tight(x), whole, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(alone, whole, atol=1e-9, rtol=1e-9)


def test_one_attribution_that_is_no_number_makes_the_dispersion_unknown() -> None:
    """The quantiles of 24 values would not notice."""
    model = LinearModel(torch.randn(3, 24), torch.zeros(3))
    x = images(2)
    x[0, 0, 0, 0] = math.inf

    found = spread_of(model, ["logits"], ["iqr"])(x)

    assert found[0].isnan().all()
    assert found[1].isfinite().all()


# ------------------------------------------------------------------------------------------------ the slope


def test_an_image_draws_its_own_features_wherever_it_stands() -> None:
    features, x = spread_of(network(), UNITS, ["std"]), images(6)

    together = features.sampled(x)
    alone = torch.cat([features.sampled(part) for part in torch.split(x, 1)])
    moved = features.sampled(x + 1e-3)

    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert (together - moved).abs().mean() > 10 * (features(x) - features(x + 1e-3)).abs().mean()  # other draws


def test_with_all_features_the_slope_is_that_of_finite_differences() -> None:
    model = network(nn.Tanh(), torch.float64)
    model[4] = nn.Tanh()
    x = torch.rand(90, 2, 4, 3, dtype=torch.float64)
    calibration = Examples(x, model(x).argmax(1))
    options = {"units": UNITS, "statistics": ["std", "variance"], "samples": 24, "eps": 0.5, "rows": 30}
    protected = protect(MlLoo, model, calibration, **options, fpr=0.1)

    assert torch.autograd.gradcheck(protected.surrogate(), x[:3].clone().requires_grad_(), atol=1e-5)


@pytest.mark.parametrize(("samples", "least"), [(8, 0.2), (32, 0.6)])
def test_a_sample_points_where_everything_points(trained_digits: TrainedDigits, samples: int, least: float) -> None:
    options = {"form": "single", "statistics": ["std"], "units": ["predicted-logit"]}
    x = trained_digits.test.images[:40]

    def slope(count: int) -> Tensor:
        protected: Any = protect(
            MlLoo, trained_digits.model, trained_digits.calibration, **options, samples=count, held_out=100
        )
        point = x.clone().requires_grad_()
        return torch.autograd.grad(protected.assess(point)[1].sum(), point)[0].flatten(1)

    cosine = nn.functional.cosine_similarity(slope(samples), slope(64))

    assert cosine.mean() > least


# ------------------------------------------------------------------------------------------------ what is learnt


@pytest.mark.parametrize("attack", ["pgd", "nearest", "both"])
def test_pairs_are_correct_and_misclassified_and_within_eps(trained_digits: TrainedDigits, attack: Any) -> None:
    model, options = trained_digits.model, PairOptions(attack=attack, eps=0.2, pairs=100)

    clean, adversarial = adversarial_pairs(model, trained_digits.calibration, options, "test")

    known = (clean[:, None] == trained_digits.calibration.images).flatten(2).all(2)
    label = trained_digits.calibration.labels[known.float().argmax(1)]
    assert len(clean) == len(adversarial) == 100
    assert torch.equal(model(clean).argmax(1), label)
    assert (model(adversarial).argmax(1) != label).all()
    assert (adversarial - clean).abs().max() <= 0.2 + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    distance = (adversarial - clean).abs().amax((1, 2, 3))
    assert {"pgd": distance.min() > 0.19, "nearest": distance.median() < 0.15, "both": True}[attack]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("scaling", [False, True])
def test_the_regression_is_scikit_learns(scaling: bool) -> None:
    rng = np.random.default_rng(0)
    clean, adversarial, new = rng.normal(0, 1, (60, 5)), rng.normal(0.7, 2, (60, 5)), rng.normal(0, 1, (9, 5))
    scaler = StandardScaler(with_mean=scaling, with_std=scaling).fit(np.vstack([clean, adversarial]))
    reference = LogisticRegressionCV(scoring="accuracy", max_iter=1000)
    reference.fit(scaler.transform(np.vstack([clean, adversarial])), [0] * 60 + [1] * 60)

    regression = fit_regression(torch.tensor(clean), torch.tensor(adversarial), scaling, "test")

    truth = reference.decision_function(scaler.transform(new))
    np.testing.assert_allclose(regression(torch.tensor(new)), truth, rtol=1e-9, atol=1e-9)


def test_the_single_form_is_the_dispersion_of_the_predicted_class(trained_digits: TrainedDigits) -> None:
    model, x = trained_digits.model, trained_digits.test.images[:20]
    loo = LeaveOneOut(model, ["predicted-probability"], LeaveOneOutOptions())

    protected = protect(MlLoo, model, trained_digits.calibration, **FORMS[2])

    truth = dispersion(loo.differences(x)[:, 0], "std")
    torch.testing.assert_close(protected.evidence(x)["ml-loo"], truth)


@pytest.mark.parametrize("form", FORMS)
def test_new_clean_images_are_refused_about_as_often_as_stated(
    trained_digits: TrainedDigits, form: dict[str, Any]
) -> None:
    protected = protect(MlLoo, trained_digits.model, trained_digits.calibration, fpr=0.2, **form)

    refused = protected.rejects(protected.evidence(trained_digits.test.images)).float().mean()

    assert 0.1 < refused < 0.3  # the threshold is known from 200 images


# ------------------------------------------------------------------------------------------------ detection


def attacked(model: nn.Module, test: Examples, attack: Any, threat: Threat) -> Tensor:
    """The inputs with which ``attack`` succeeds."""
    target = AttackTarget(model, num_classes=10)
    found = search(attack, target, test, torch.arange(len(test)), threat, seed=0, batch_size=len(test)).adversarial
    with torch.no_grad():
        return found[model(found).argmax(1) != test.labels]


def area(protected: Protected, clean: Tensor, adversarial: Tensor) -> float:
    """AUROC of the detector's only evidence."""
    (low,), (high,) = (protected.evidence(part).values() for part in (clean, adversarial))
    return float(roc_auc_score([0] * len(low) + [1] * len(high), torch.cat([low, high])))


def test_many_units_tell_more_than_integrated_gradients_but_not_to_who_knows_them(
    trained_digits: TrainedDigits,
) -> None:
    """The published order, on three attacks of which none is the one that the pairs come from; and what it is worth."""
    model, test = trained_digits.model, trained_digits.test.head(120)
    attacks = [
        (PGD(PGD.Options(steps=1, random_start=False)), Threat("linf", 0.2), 0.9),
        (PGD(PGD.Options(steps=20)), Threat("linf", 0.2), 0.9),
        (CarliniWagner(CarliniWagner.Options(steps=40, search_steps=3)), Threat("l2", math.inf), 0.7),
    ]
    loo = protect(MlLoo, model, trained_digits.calibration, eps=0.2)
    ig = protect(AttributionDetector, model, trained_digits.calibration, method="integrated-gradients", statistic="iqr")

    for attack, threat, least in attacks:
        adversarial = attacked(model, test, attack, threat)

        assert len(adversarial) > 40
        assert area(loo, test.images, adversarial) > area(ig, test.images, adversarial) + 0.1
        assert area(loo, test.images, adversarial) > least

    oblivious, adaptive = successes(loo, model, test.head(20), eps=0.2, steps=40)
    assert oblivious < 0.4
    assert adaptive > oblivious + 0.3


@pytest.mark.parametrize("form", FORMS)
def test_an_attack_that_knows_the_detector_passes_it_more_often(
    trained_digits: TrainedDigits, form: dict[str, Any]
) -> None:
    protected = protect(MlLoo, trained_digits.model, trained_digits.calibration, **form)

    oblivious, adaptive = successes(protected, trained_digits.model, trained_digits.test.head(20), eps=0.3, steps=40)

    assert adaptive > oblivious + 0.1


@pytest.mark.parametrize("form", FORMS)
def test_the_surrogates_rejected_column_wins_exactly_when_the_input_is_refused(
    trained_digits: TrainedDigits, form: dict[str, Any]
) -> None:
    protected = protect(MlLoo, trained_digits.model, trained_digits.calibration, fpr=0.3, **form)

    assert_refusals_win(protected, trained_digits.model, trained_digits.test.images[:60])


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ["layer:conv9"]}, "the model has no layer 'conv9'. Its layers: '0', '1', '2'"),
        ({"fpr": 0.001}, r"\d+ calibration images are too few to fix a false-positive rate of 0.001: 1000 are needed"),
        ({"eps": 1e-6}, r"ml-loo: PGD with eps = 1e-06 and 10 steps fools the model on \d of \d+ calibration images"),
    ],
)
def test_what_cannot_be_fitted_is_an_error(
    trained_digits: TrainedDigits, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        protect(MlLoo, trained_digits.model, trained_digits.calibration, **{"pairs": 20} | options)


def test_a_dispersion_that_collapses_is_an_error_that_names_a_remedy(trained_digits: TrainedDigits) -> None:
    """More than three quarters of each image are black, as in MNIST."""
    images = trained_digits.calibration.images.clone()
    images[:, :, :, :3] = images[:, :, :, 5:] = 0

    with pytest.raises(ContractError, match=r"the score is 0 on every calibration image .* set skip_below = 0"):
        protect(MlLoo, trained_digits.model, Examples(images, trained_digits.calibration.labels), form="single")


class BlindToBright(nn.Module):
    """A model whose answers are no numbers where an image is bright."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * torch.where(x.mean((1, 2, 3)) > 0.9, math.nan, 1.0)[:, None]


@pytest.mark.parametrize("form", FORMS)
def test_scores_that_are_no_numbers_are_refused_by_detector_and_surrogate(
    trained_digits: TrainedDigits, form: dict[str, Any]
) -> None:
    blind = BlindToBright(copy.deepcopy(trained_digits.model))
    protected: Any = protect(MlLoo, blind, trained_digits.calibration, **form)
    bright = torch.ones(1, 1, 8, 8)

    assert protected.evidence(bright)["ml-loo"].isnan().all()
    assert protected.rejects(protected.evidence(bright)).all()
    assert protected.assess(bright.clone().requires_grad_())[1].isnan().all()


def test_attributions_to_learn_from_must_be_numbers() -> None:
    known = torch.randn(20, 3)

    with pytest.raises(ContractError, match="test: attributions are not finite on 1 of 40 images to learn from"):
        fit_regression(known, known.index_fill(0, torch.tensor([4]), math.nan), False, "test")
    with pytest.raises(ContractError, match="test: each feature is the same on all 40 images"):
        fit_regression(torch.ones(20, 3), torch.ones(20, 3), False, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": ["iqr", "iqr"]}, "name one twice"),
        ({"statistics": []}, "at least 1 item"),
        ({"form": "single", "statistics": ["iqr", "std"]}, "takes one statistic and one unit of predicted-probability"),
        ({"form": "single", "units": ["logits"]}, "takes one statistic and one unit"),
        ({"form": "single", "eps": 0.2}, "eps is only for form 'regression', which learns from pairs: leave it out"),
        ({"form": "single", "scaling": True}, "scaling is only for form 'regression'"),
        ({"side": 3}, "side is only for features 'superpixels', not 'values'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MlLoo.Options(**options)
