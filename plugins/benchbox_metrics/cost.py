"""cost: what the attack spent per attacked input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from benchbox import api
from benchbox.domain import Record, Score
from benchbox_metrics.common import mean, unattacked


class Cost(api.Metric):
    """``forwards``, ``backwards``: passes of the attacked model; ``seconds``: its share of the batches' time.

    Each is a mean over attacked inputs. Seconds depend on the machine, passes do not.
    """

    name: ClassVar[str] = "cost"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "per attacked input"

    def score(self, record: Record) -> Mapping[str, Score]:
        if unattacked(record):
            return {}
        return {name: mean(getattr(record, name)[record.attacked]) for name in ("forwards", "backwards", "seconds")}
