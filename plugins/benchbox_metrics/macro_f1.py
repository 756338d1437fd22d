"""macro-f1: the mean of the classes' F1 scores, before and after the attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from benchbox import api
from benchbox.domain import Array, Record, Score
from benchbox_metrics.common import unattacked


class MacroF1(api.Metric):
    """``clean`` and ``adversarial``: F1 = 2 TP / (2 TP + FP + FN), averaged over the classes that occur.

    A class occurs when an example has it as its label; so both averages are over the same classes. A refused input is
    no prediction: its own class misses it (FN), and no class is charged with it (FP).
    """

    name: ClassVar[str] = "macro-f1"
    unit: ClassVar[str] = "fraction"

    def score(self, record: Record) -> Mapping[str, Score]:
        scores = {"clean": macro_f1(record.label, record.clean_prediction, record.clean_rejected)}
        if unattacked(record):
            return scores
        return scores | {"adversarial": macro_f1(record.label, record.prediction, record.rejected)}


def macro_f1(label: Array, prediction: Array, rejected: Array) -> Score:
    """Macro F1 over the classes in ``label``; all arrays (n,). Undefined without examples."""
    if not len(label):
        return Score(None)
    classes, actual = np.unique(label, return_counts=True)
    hits = np.array([np.sum((label == c) & (prediction == c) & ~rejected) for c in classes])
    predicted = np.array([np.sum((prediction == c) & ~rejected) for c in classes])
    return Score(float(np.mean(2 * hits / (predicted + actual))), n=len(label))
