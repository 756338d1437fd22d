"""detection: how well a detector's scores tell adversarial inputs from clean ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from benchbox import api
from benchbox.api import conservative_threshold
from benchbox.domain import Array, Record, Score
from benchbox_metrics.common import flagged, proportion, unattacked

BUDGETS = (1, 5, 10)
"""False-positive rates, in percent."""
PARTIAL = 10
"""The false-positive rate, in percent, up to which the partial area goes."""


class Detection(api.Metric):
    """For each kind of evidence NAME: ``NAME.auroc``, ``NAME.partial-auroc@10%``, and ``NAME.tpr@1%``, ``NAME.tpr@5%``,
    ``NAME.tpr@10%``.

    Positives are attacked inputs whose adversarial version is misclassified, whether or not it was refused: an attack
    that failed is nothing to detect. Negatives are all clean inputs, misclassified ones too. Thresholds come from the
    clean scores of this very record and never let more than the stated share of them through; they are not the
    threshold that the defense itself works with. Undefined where there are no positives.
    """

    name: ClassVar[str] = "detection"
    version: ClassVar[int] = 2
    unit: ClassVar[str] = "fraction"

    def score(self, record: Record) -> Mapping[str, Score]:
        if unattacked(record):
            return {}
        positive = record.attacked & (record.prediction != record.label)
        scores: dict[str, Score] = {}
        for name, clean in record.clean_evidence.items():
            adversarial = record.evidence[name][positive]
            scores[f"{name}.auroc"] = auroc(clean, adversarial)
            scores[f"{name}.partial-auroc@{PARTIAL}%"] = partial_auroc(clean, adversarial, PARTIAL / 100)
            for percent in BUDGETS:
                threshold = conservative_threshold(clean, percent / 100)
                scores[f"{name}.tpr@{percent}%"] = proportion(flagged(adversarial) > threshold)
        return scores


def auroc(negatives: Array, positives: Array) -> Score:
    """P(a positive scores higher than a negative) + P(equal) / 2 (Mann & Whitney 1947; Hanley & McNeil 1982).

    ``negatives`` (m,), ``positives`` (n,), higher = more positive. Undefined where one class is absent.
    """
    if not len(negatives) or not len(positives):
        return Score(None)
    ordered, positives = np.sort(flagged(negatives)), flagged(positives)
    below = np.searchsorted(ordered, positives, "left") + np.searchsorted(ordered, positives, "right")
    return Score(float(below.mean() / 2 / len(ordered)), n=len(positives))


def partial_auroc(negatives: Array, positives: Array, max_fpr: float) -> Score:
    """The area under the ROC curve up to ``max_fpr``, scaled so that chance is 0.5 and perfection 1 (McClish 1989,
    Medical Decision Making 9:190-195); between its points the curve is straight.

    Undefined where one class is absent.
    """
    if not len(negatives) or not len(positives):
        return Score(None)
    negatives, positives = flagged(negatives), flagged(positives)
    levels = np.unique(np.concatenate([negatives, positives]))[::-1]
    fpr, tpr = (_share_from(part, levels) for part in (negatives, positives))
    inside = fpr <= max_fpr
    x, y = np.append(fpr[inside], max_fpr), np.append(tpr[inside], np.interp(max_fpr, fpr, tpr))
    area = float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)
    chance = max_fpr**2 / 2
    return Score(min(1.0, (1 + (area - chance) / (max_fpr - chance)) / 2), n=len(positives))


def _share_from(scores: Array, levels: Array) -> Array:
    """The share of ``scores`` at or above each of the falling ``levels``, with 0 in front."""
    return np.append(0.0, 1 - np.searchsorted(np.sort(scores), levels, "left") / len(scores))
