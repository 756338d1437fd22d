"""evasion: how often an attack is misclassified and still passes the detector at a stated false-positive rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from benchbox import api
from benchbox.api import conservative_threshold
from benchbox.domain import Record, Score
from benchbox_metrics.common import flagged, proportion, unattacked

PERCENT = 5


class Evasion(api.Metric):
    """For each kind of evidence NAME ``NAME.sr@5%``: of all attacked inputs those whose adversarial version is
    misclassified and accepted by a threshold that refuses at most 5 % of the clean inputs (SR@5 of Bryniarski et al.,
    ICLR 2022, arXiv 2106.15023, §5).

    The threshold comes from the clean scores of this very record, so that detectors of any ``fpr`` are compared at one
    rate; an attack that knows the detector aimed at the detector's own, so with an ``fpr`` other than 0.05 the number
    is a lower bound. Of a targeted attack every misclassification counts, not the target alone.
    """

    name: ClassVar[str] = "evasion"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "fraction"

    def score(self, record: Record) -> Mapping[str, Score]:
        if unattacked(record):
            return {}
        wrong = record.prediction != record.label
        scores: dict[str, Score] = {}
        for name, clean in record.clean_evidence.items():
            accepted = flagged(record.evidence[name]) <= conservative_threshold(clean, PERCENT / 100)
            accepted &= flagged(record.evidence[name]) < float("inf")  # not even where no threshold is low enough
            scores[f"{name}.sr@{PERCENT}%"] = proportion((wrong & accepted)[record.attacked])
        return scores
