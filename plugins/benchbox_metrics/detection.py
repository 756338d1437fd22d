"""detection: how well a detector's scores tell adversarial inputs from clean ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from benchbox import api
from benchbox.api import conservative_threshold
from benchbox.domain import Array, Record, Score
from benchbox_metrics.common import proportion, unattacked

BUDGETS = (1, 5, 10)
"""False-positive rates, in percent."""


class Detection(api.Metric):
    """For each kind of evidence NAME: ``NAME.auroc``, and ``NAME.tpr@1%``, ``NAME.tpr@5%``, ``NAME.tpr@10%``.

    Positives are attacked inputs whose adversarial version is misclassified, whether or not it was refused: an attack
    that failed is nothing to detect. Negatives are all clean inputs, misclassified ones too. Thresholds come from the
    clean scores of this very record and never let more than the stated share of them through; they are not the
    threshold that the defense itself works with. Undefined where there are no positives.
    """

    name: ClassVar[str] = "detection"
    unit: ClassVar[str] = "fraction"

    def score(self, record: Record) -> Mapping[str, Score]:
        if unattacked(record):
            return {}
        positive = record.attacked & (record.prediction != record.label)
        scores: dict[str, Score] = {}
        for name, clean in record.clean_evidence.items():
            adversarial = record.evidence[name][positive]
            scores[f"{name}.auroc"] = auroc(clean, adversarial)
            for percent in BUDGETS:
                threshold = conservative_threshold(clean, percent / 100)
                scores[f"{name}.tpr@{percent}%"] = proportion(_flagged(adversarial) > threshold)
        return scores


def auroc(negatives: Array, positives: Array) -> Score:
    """P(a positive scores higher than a negative) + P(equal) / 2 (Mann & Whitney 1947; Hanley & McNeil 1982).

    ``negatives`` (m,), ``positives`` (n,), higher = more positive. Undefined where one class is absent.
    """
    if not len(negatives) or not len(positives):
        return Score(None)
    ordered, positives = np.sort(_flagged(negatives)), _flagged(positives)
    below = np.searchsorted(ordered, positives, "left") + np.searchsorted(ordered, positives, "right")
    return Score(float(below.mean() / 2 / len(ordered)), n=len(positives))


def _flagged(scores: Array) -> Array:
    """A score that is not finite counts as flagged: it is above all others."""
    return np.where(np.isfinite(scores), scores, np.inf)
