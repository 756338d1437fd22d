"""Built-in reports of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox.api import Report


@hookimpl
def benchbox_reports() -> list[type[Report]]:
    from benchbox_reports.accuracy_curves import AccuracyCurves
    from benchbox_reports.attributions import Attributions
    from benchbox_reports.heat_map import HeatMap
    from benchbox_reports.lesci_sweep import LesciSweep
    from benchbox_reports.model_table import ModelTable
    from benchbox_reports.neurons import Neurons
    from benchbox_reports.nips_2018_score import NIPS2018Scores
    from benchbox_reports.noise_report import NoiseScores
    from benchbox_reports.sweeps import Sweeps
    from benchbox_reports.synaptic_report import SynapticScores
    from benchbox_reports.synaptic_trainings import SynapticTrainings
    from benchbox_reports.transfer_matrix import TransferMatrix

    return [
        AccuracyCurves, Attributions, HeatMap, LesciSweep, ModelTable, NIPS2018Scores, Neurons, NoiseScores, Sweeps,
        SynapticScores, SynapticTrainings, TransferMatrix,
    ]  # fmt: skip
