"""Filtering scores: does a network lose less, or more, than the weights that a filter takes from it?

Pure functions of accuracies along a sweep. Pravin, Martino, Nicosia, Ojha (2024), "Fragility, robustness and
antifragility in deep learning", Artificial Intelligence 327:104060; as their notebooks compute them, but integrated
over the sweep from 0 to 1 (over the threshold, a low-pass sweep has the opposite sign).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchbox.domain import Array

Rule = Literal["simpson", "trapezoid"]
Class = Literal["fragile", "robust", "antifragile"]


@dataclass(frozen=True, slots=True)
class LayerSweep:
    """Accuracies, shares from 0 to 1, along the places of one sweep, which rise; ``intact`` without any filter.

    ``kept`` are the shares of the weights that the filter leaves; None where nobody counted them.
    """

    places: Sequence[float]
    clean: Sequence[float]
    intact_clean: float
    adversarial: Sequence[float] | None = None
    intact_adversarial: float | None = None
    kept: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """S_clean, S_adv, S_diff, and S_clean with accuracies above chance alone; None where undefined."""

    clean: float | None
    adversarial: float | None
    difference: float | None
    above_chance: float | None
    kept: float | None  # the integral of the baseline
    rule: Rule  # how it was integrated


def filtering_scores(
    sweep: LayerSweep, *, first_step: bool = False, rule: Rule = "simpson", classes: int | None = None
) -> Scores:
    """The scores of one sweep: integrals over it of accuracy / reference - kept.

    The reference is the intact model's accuracy, or with ``first_step`` (as in the authors' notebooks) that at the
    first place. A score is None where its reference is 0 (above chance: not above 1 / ``classes``), where it needs
    ``kept`` and nobody counted, and for a sweep of a single place.
    """
    rule = possible_rule(sweep.places, rule)
    clean = _relative(sweep.clean, sweep.clean[0] if first_step else sweep.intact_clean)
    adversarial = None
    if sweep.adversarial is not None and sweep.intact_adversarial is not None:
        adversarial = _relative(sweep.adversarial, sweep.adversarial[0] if first_step else sweep.intact_adversarial)
    chance = None if classes is None else 1 / classes
    above = (
        None if chance is None else _relative(sweep.clean, sweep.clean[0] if first_step else sweep.intact_clean, chance)
    )
    kept = None if sweep.kept is None else np.asarray(sweep.kept, np.float64)
    return Scores(
        clean=_area(sweep.places, clean, kept, rule),
        adversarial=_area(sweep.places, adversarial, kept, rule),
        difference=_area(sweep.places, adversarial, clean, rule),
        above_chance=_area(sweep.places, above, kept, rule),
        kept=_area(sweep.places, kept, np.zeros(len(sweep.places)), rule),
        rule=rule,
    )


def classify(score: float | None, tolerance: float) -> Class | None:
    """Fragile below -``tolerance``, antifragile above ``tolerance``, robust between; None for no score.

    The authors publish no tolerance, so that it has to be said beside the class.
    """
    if score is None:
        return None
    if abs(score) <= tolerance:
        return "robust"
    return "fragile" if score < 0 else "antifragile"


def possible_rule(places: Sequence[float], wanted: Rule) -> Rule:
    """Simpson's rule needs an odd number of places, evenly spaced; the trapezoidal rule takes its place elsewhere."""
    steps = np.diff(np.asarray(places, np.float64))
    even = len(places) >= 3 and len(places) % 2 == 1 and bool(np.allclose(steps, steps.mean(), rtol=1e-6, atol=0))
    return wanted if even else "trapezoid"


def integral(places: Sequence[float], values: Array, rule: Rule) -> float:
    """The integral of float64 (n,) ``values`` over the n >= 2 ``places``, the sweep scaled to [0, 1].

    ``rule``: composite Simpson (for places that :func:`possible_rule` finds fit) or trapezoidal.
    """
    x = np.asarray(places, np.float64)
    if rule == "simpson":
        weights = np.full(len(x), 2.0)
        weights[1::2] = 4.0
        weights[[0, -1]] = 1.0
        return float((weights * values).sum() / weights.sum())
    return float((np.diff(x) * (values[1:] + values[:-1]) / 2).sum() / (x[-1] - x[0]))


def _relative(values: Sequence[float], reference: float, floor: float = 0.0) -> Array | None:
    """Accuracies in units of the reference, both above ``floor``; None where the reference is not."""
    if reference <= floor:
        return None
    return (np.asarray(values, np.float64) - floor) / (reference - floor)


def _area(places: Sequence[float], values: Array | None, baseline: Array | None, rule: Rule) -> float | None:
    if values is None or baseline is None or len(places) < 2:
        return None
    return integral(places, values - baseline, rule)
