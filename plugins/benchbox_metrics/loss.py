"""loss: the mean cross entropy, before and after the attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from benchbox import api
from benchbox.domain import Record, Score
from benchbox_metrics.common import mean, unattacked


class Loss(api.Metric):
    """``clean`` and ``adversarial``: mean cross entropy of the true class over all examples, in nats.

    Refusals do not enter. Examples that were not attacked keep their clean loss. Undefined, rather than a mean of the
    rest, where the loss of an example is not finite.
    """

    name: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "nats"

    def score(self, record: Record) -> Mapping[str, Score]:
        scores = {"clean": mean(record.clean_loss)}
        return scores if unattacked(record) else scores | {"adversarial": mean(record.loss)}
