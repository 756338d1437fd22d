"""class-rejection: the share of clean inputs that a detector refuses, class by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from benchbox import api
from benchbox.domain import Record, Score
from benchbox_metrics.common import proportion


class ClassRejection(api.Metric):
    """``clean.C`` for each class C that occurs: refused clean inputs of that true class among all of it.

    A threshold holds its false-positive rate over all classes together; one class may pay for the others. Empty
    without a detector. ``rejection`` has the overall rate and the worst class.
    """

    name: ClassVar[str] = "class-rejection"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "fraction"

    def score(self, record: Record) -> Mapping[str, Score]:
        if not record.clean_evidence:
            return {}
        return {f"clean.{c}": proportion(record.clean_rejected[record.label == c]) for c in np.unique(record.label)}
