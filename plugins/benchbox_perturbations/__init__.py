"""Built-in perturbations of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox import api


@hookimpl
def benchbox_weight_perturbations() -> list[type[api.WeightPerturbation]]:
    from benchbox_perturbations.synaptic_filter import SynapticFilter
    from benchbox_perturbations.weight_noise import WeightNoise

    return [SynapticFilter, WeightNoise]
