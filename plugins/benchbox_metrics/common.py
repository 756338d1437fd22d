"""What the metrics share: when a record says nothing about an attack, and proportions with their interval."""

from __future__ import annotations

import numpy as np

from benchbox.api import wilson
from benchbox.domain import Array, Record, Score


def unattacked(record: Record) -> bool:
    """Whether the record is of a cell without an attack: there were inputs to attack, and none was.

    Then whatever speaks of an attack does not apply, and metrics leave it out. Where there was nothing to attack (no
    input was accepted and classified correctly) they say so instead: robust accuracy 0, everything else undefined.
    """
    return bool(record.clean_correct.any() and not record.attacked.any())


def proportion(hits: Array) -> Score:
    """The share of true values in the bool array ``hits`` with its 95 % Wilson interval; undefined for none."""
    successes, n = int(hits.sum()), len(hits)
    return Score(successes / n, *wilson(successes, n), n=n) if n else Score(None)


def mean(values: Array) -> Score:
    """The mean, summed in float64; undefined for no values and where one of them is not finite."""
    value = float(values.mean(dtype=float)) if len(values) else float("nan")
    return Score(value if abs(value) < float("inf") else None, n=len(values))


def flagged(scores: Array) -> Array:
    """A detector's ``scores`` where one that is not finite counts as flagged: it is above all others."""
    return np.where(np.isfinite(scores), scores, np.inf)
