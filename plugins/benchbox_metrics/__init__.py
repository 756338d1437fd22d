"""Built-in metrics of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox.api import Metric


@hookimpl
def benchbox_metrics() -> list[type[Metric]]:
    from benchbox_metrics.accuracy import Accuracy
    from benchbox_metrics.attack_success_rate import AttackSuccessRate
    from benchbox_metrics.class_rejection import ClassRejection
    from benchbox_metrics.cost import Cost
    from benchbox_metrics.detection import Detection
    from benchbox_metrics.evasion import Evasion
    from benchbox_metrics.loss import Loss
    from benchbox_metrics.macro_f1 import MacroF1
    from benchbox_metrics.median_norms import MedianNorms
    from benchbox_metrics.nips_2018_score import NIPS2018Score
    from benchbox_metrics.rejection import Rejection

    return [
        Accuracy, AttackSuccessRate, ClassRejection, Cost, Detection, Evasion, Loss, MacroF1, MedianNorms,
        NIPS2018Score, Rejection,
    ]  # fmt: skip
