"""attack-success-rate: the share of attacked inputs on which the attack succeeded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from benchbox import api
from benchbox.domain import Record, Score
from benchbox_metrics.common import proportion, unattacked


class AttackSuccessRate(api.Metric):
    """``rate``: successes among attacked inputs, that is among those accepted and correct before."""

    name: ClassVar[str] = "attack-success-rate"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "fraction"

    def score(self, record: Record) -> Mapping[str, Score]:
        return {} if unattacked(record) else {"rate": proportion(record.success[record.attacked])}
