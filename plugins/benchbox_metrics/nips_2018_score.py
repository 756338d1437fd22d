"""nips-2018-score: how far, in L2, half of all inputs have to be moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from benchbox import api
from benchbox.api import bootstrap_median
from benchbox.domain import Array, Record, Score
from benchbox_metrics.common import unattacked


class NIPS2018Score(api.Metric):
    """``l2``: the median over *all* examples of the L2 distance that this one attack needed, with a 95 % bootstrap
    interval; the rule of the NIPS 2018 Adversarial Vision Challenge (Brendel et al. 2018, arXiv 1808.01976).

    An example that is misclassified, or refused, before the attack has distance 0. One on which the attack failed has
    an infinite one, so the median is undefined where the attack fails on half of all examples or more; minimum-norm
    attacks hardly ever do. In units of the [0, 1] pixel range over the flattened image. The challenge takes each
    example's minimum over five attacks before the median: a report does so with ``needed_distances`` of the records
    of all attacks on a system. The minimum of their medians is only an upper bound of that.
    """

    name: ClassVar[str] = "nips-2018-score"
    unit: ClassVar[str] = "pixel range"

    def score(self, record: Record) -> Mapping[str, Score]:
        if unattacked(record):
            return {}
        distance = needed_distances(record)
        value, low, high = (bound if np.isfinite(bound) else None for bound in bootstrap_median(distance))
        return {"l2": Score(value, low, high, len(distance))}


def needed_distances(record: Record) -> Array:
    """float64 (n,): 0 where nothing was needed, the L2 distance of a successful attack, infinity of a failed one."""
    reached = np.where(record.success, record.l2.astype(float), np.inf)
    return np.where(record.clean_correct, reached, 0.0)
