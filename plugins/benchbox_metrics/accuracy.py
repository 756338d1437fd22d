"""accuracy: the share of inputs classified correctly, before and after the attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from benchbox import api
from benchbox.domain import Record, Score
from benchbox_metrics.common import proportion, unattacked


class Accuracy(api.Metric):
    """``clean``: accepted and correct without an attack. ``robust``: that, and the attack did not succeed.

    Both are shares of all examples, so that misclassified ones count against robust accuracy too. An adversarial
    input that the defense refuses is no success of the attack: it leaves robust accuracy as it was.
    """

    name: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "fraction"

    def score(self, record: Record) -> Mapping[str, Score]:
        scores = {"clean": proportion(record.clean_correct)}
        return scores if unattacked(record) else scores | {"robust": proportion(record.robust)}
