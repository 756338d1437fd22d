"""median-norms: how far the attack had to go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from benchbox import api
from benchbox.domain import Record, Score
from benchbox_metrics.common import unattacked


class MedianNorms(api.Metric):
    """``linf``, ``l2``, ``l1``, ``l0``: median distance of the successful adversarial inputs to the clean ones.

    In units of the [0, 1] pixel range; l0 counts changed values. Undefined where no attack succeeded.
    """

    name: ClassVar[str] = "median-norms"
    unit: ClassVar[str] = "pixel range"

    def score(self, record: Record) -> Mapping[str, Score]:
        if unattacked(record):
            return {}
        n = int(record.success.sum())
        return {
            norm: Score(float(np.median(getattr(record, norm)[record.success])), n=n) if n else Score(None)
            for norm in ("linf", "l2", "l1", "l0")
        }
