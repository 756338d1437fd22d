"""Contract suites: one function per kind of plugin, which checks every promise that ``benchbox.api`` makes for it.

A plugin's own test takes a few lines::

    from benchbox.testing.contracts import check_attack
    from my_attacks.sign import SignAttack

    def test_contract():
        check_attack(SignAttack(SignAttack.Options()))

The suites need no test framework: each raises ContractError, which names the plugin, the promise that it broke and
what to do, and returns None when all are kept.
"""

from __future__ import annotations

from benchbox.testing.attacking import check_attack
from benchbox.testing.components import check_dataset, check_model, check_weight_perturbation
from benchbox.testing.drawing import check_figure, sample_scenes
from benchbox.testing.measuring import check_metric, check_probe, check_report
from benchbox.testing.protection import check_defense
from benchbox.testing.running import check_executor
from benchbox.testing.samples import sample_record, sample_records, sample_results

__all__ = [
    "check_attack",
    "check_dataset",
    "check_defense",
    "check_executor",
    "check_figure",
    "check_metric",
    "check_model",
    "check_probe",
    "check_report",
    "check_weight_perturbation",
    "sample_record",
    "sample_records",
    "sample_results",
    "sample_scenes",
]
