"""Filtering scores against what can be computed by hand: the analytic anchors of their definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from benchbox_perturbations.synaptic_filter import SynapticFilter
from benchbox_reports.synaptic_scores import LayerSweep, classify, filtering_scores, integral, possible_rule

PLACES = np.linspace(0, 1, 25).tolist()
GAUSSIAN = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))

UNIFORM = torch.linspace(-1, 1, 10_001)[None]


def kept_by(name: str, weights: torch.Tensor) -> list[float]:
    """The share of ``weights`` that the real filter keeps at each place of the sweep."""
    layer = nn.Linear(weights.shape[1], 1, bias=False)
    layer.weight.data = weights
    shares = []
    for threshold in PLACES:
        perturbation = SynapticFilter(SynapticFilter.Options(filter=name, threshold=threshold))
        filtered = perturbation.apply(nn.Sequential(layer), torch.Generator())
        shares.append(float(filtered[0].weight.count_nonzero()) / weights.numel())
    return shares


def sweep(clean: list[float], kept: list[float], **more: object) -> LayerSweep:
    return LayerSweep(places=PLACES, clean=clean, intact_clean=0.9, kept=kept, **more)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ analytic anchors


@pytest.mark.parametrize("name", ["high-pass", "low-pass", "pulse"])
def test_accuracy_in_proportion_to_the_weights_kept_scores_zero(name: str) -> None:
    kept = kept_by(name, GAUSSIAN)

    scores = filtering_scores(sweep([0.9 * share for share in kept], kept))

    assert scores.clean == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["high-pass", "low-pass"])
@pytest.mark.parametrize("weights", [GAUSSIAN, UNIFORM, GAUSSIAN.exp()], ids=["Gaussian", "uniform", "log-normal"])
def test_accuracy_that_stays_scores_what_the_filter_removes(name: str, weights: torch.Tensor) -> None:
    """A weight at the share p of the range is gone for 1 - p of a high-pass sweep and for p of a low-pass one.

    The sign is the same for both directions; integrated over the threshold, the low-pass filter's would flip.
    """
    place = float(((weights - weights.min()) / (weights.max() - weights.min())).mean())

    scores = filtering_scores(sweep([0.9] * 25, kept_by(name, weights)))

    assert scores.clean == pytest.approx(1 - place if name == "high-pass" else place, abs=2e-3)
    assert scores.clean == pytest.approx(1 - scores.kept)


@pytest.mark.parametrize("weights", [GAUSSIAN, UNIFORM], ids=["Gaussian", "uniform"])
def test_accuracy_that_stays_scores_about_a_half_where_weights_are_symmetric(weights: torch.Tensor) -> None:
    assert filtering_scores(sweep([0.9] * 25, kept_by("high-pass", weights))).clean == pytest.approx(0.5, abs=0.02)


def test_a_layer_destroyed_at_once_scores_the_chance_floor_less_what_is_kept() -> None:
    kept = kept_by("high-pass", UNIFORM)

    scores = filtering_scores(replace(sweep([0.1] * 25, kept), intact_clean=1.0), classes=10)

    assert scores.clean == pytest.approx(0.1 - 0.5, abs=1e-3)
    assert scores.above_chance == pytest.approx(-0.5, abs=1e-3)


def test_the_pulse_keeps_all_but_its_band() -> None:
    """25 bands that tile the range hold all weights once, so that the mean share kept is 24/25."""
    kept = kept_by("pulse", GAUSSIAN)

    assert np.mean(kept) == pytest.approx(24 / 25)


def test_the_difference_is_that_of_the_two_scores() -> None:
    rng = np.random.default_rng(0)
    clean, adversarial, kept = (rng.uniform(size=25).tolist() for _ in range(3))

    scores = filtering_scores(sweep(clean, kept, adversarial=adversarial, intact_adversarial=0.4))
    uncounted = filtering_scores(
        replace(sweep(clean, kept, adversarial=adversarial, intact_adversarial=0.4), kept=None)
    )

    assert scores.difference == pytest.approx(scores.adversarial - scores.clean)
    assert uncounted.difference == pytest.approx(scores.difference)  # the baseline cancels out
    assert uncounted.clean is None
    assert uncounted.adversarial is None


def test_the_notebooks_reference_is_the_first_step() -> None:
    clean = np.linspace(0.45, 0.9, 25).tolist()

    ours, theirs = (filtering_scores(sweep(clean, [0.5] * 25), first_step=first) for first in (False, True))

    assert ours.clean == pytest.approx(0.75 - 0.5)
    assert theirs.clean == pytest.approx(1.5 - 0.5)


# ------------------------------------------------------------------------------------------------ integration


@pytest.mark.parametrize("points", [3, 5, 25])
def test_the_rules_are_those_of_scipy(points: int) -> None:
    x = np.linspace(0.2, 0.7, points)
    values = np.random.default_rng(points).normal(size=points)

    assert integral(x.tolist(), values, "simpson") == pytest.approx(integrate.simpson(values, x=x) / 0.5)
    assert integral(x.tolist(), values, "trapezoid") == pytest.approx(np.trapezoid(values, x) / 0.5)


@pytest.mark.parametrize(
    "places", [[0.0, 1.0], [0.0, 0.1, 1.0], np.linspace(0, 1, 24).tolist()], ids=["two", "uneven", "an even number"]
)
def test_places_unfit_for_simpsons_rule_get_the_trapezoidal_one(places: list[float]) -> None:
    line = LayerSweep(places, clean=[0.9] * len(places), intact_clean=0.9, kept=[1 - place for place in places])

    assert possible_rule(places, "simpson") == "trapezoid"
    scores = filtering_scores(line)
    assert (scores.rule, scores.clean) == ("trapezoid", pytest.approx(0.5))


# ------------------------------------------------------------------------------------------------ what is undefined


def test_without_accuracy_of_the_intact_model_scores_are_undefined() -> None:
    dead = LayerSweep(PLACES, [0.0] * 25, 0.0, [0.2] * 25, 0.0, kept=[0.5] * 25)

    scores = filtering_scores(dead, classes=10)

    assert (scores.clean, scores.adversarial, scores.difference, scores.above_chance) == (None,) * 4
    assert scores.kept == pytest.approx(0.5)


def test_a_strong_attack_leaves_the_clean_score_alone() -> None:
    scores = filtering_scores(sweep([0.9] * 25, [0.5] * 25, adversarial=[0.0] * 25, intact_adversarial=0.0))

    assert scores.clean == pytest.approx(0.5)
    assert (scores.adversarial, scores.difference) == (None, None)


def test_a_model_at_chance_has_nothing_above_it() -> None:
    assert filtering_scores(replace(sweep([0.1] * 25, [0.5] * 25), intact_clean=0.1), classes=10).above_chance is None


def test_a_sweep_of_one_point_has_no_score() -> None:
    scores = filtering_scores(LayerSweep([0.5], [0.8], 0.9, kept=[0.5]))

    assert (scores.clean, scores.kept) == (None, None)


@pytest.mark.parametrize(
    ("score", "expected"),
    [(-0.06, "fragile"), (-0.05, "robust"), (0.0, "robust"), (0.05, "robust"), (0.06, "antifragile"), (None, None)],
)
def test_classes_have_a_tolerance(score: float | None, expected: str | None) -> None:
    assert classify(score, 0.05) == expected
    assert classify(math.copysign(1e-9, score or 1.0), 0.0) != "robust"
