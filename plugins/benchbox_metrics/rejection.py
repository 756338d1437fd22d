"""rejection: the share of inputs that a detector refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from benchbox import api
from benchbox.domain import Array, Record, Score
from benchbox_metrics.common import proportion, unattacked


class Rejection(api.Metric):
    """``clean``: refused clean inputs among all; ``clean-worst-class``: the same in the class that suffers most;
    ``clean-misclassified``: among those that are misclassified, a control, as a detector of errors is none of attacks;
    ``adversarial``: refused adversarial inputs among those attacked, successful or not.

    Lower is better for clean inputs. The adversarial rate has no direction by itself (refusing an input that is
    still classified correctly helps nobody): see ``detection`` and robust accuracy. Empty without a detector.
    """

    name: ClassVar[str] = "rejection"
    version: ClassVar[int] = 2
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "fraction"

    def score(self, record: Record) -> Mapping[str, Score]:
        if not record.clean_evidence:
            return {}
        scores = {
            "clean": proportion(record.clean_rejected),
            "clean-worst-class": worst_class(record.label, record.clean_rejected),
            "clean-misclassified": proportion(record.clean_rejected[record.clean_prediction != record.label]),
        }
        if unattacked(record):
            return scores
        return scores | {"adversarial": proportion(record.rejected[record.attacked])}


def worst_class(label: Array, rejected: Array) -> Score:
    """The highest rate of ``rejected`` in one class. No interval: the maximum of several rates is not a proportion."""
    if not len(label):
        return Score(None)
    rates = {int(c): float(rejected[label == c].mean()) for c in np.unique(label)}
    worst = max(rates, key=lambda c: rates[c])
    return Score(rates[worst], n=int(np.sum(label == worst)))
