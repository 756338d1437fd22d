"""Built-in probes of benchbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchbox.hookspecs import hookimpl

if TYPE_CHECKING:
    from benchbox.api import Probe


@hookimpl
def benchbox_probes() -> list[type[Probe]]:
    from benchbox_probes.attribution_quality import AttributionQuality
    from benchbox_probes.attribution_statistics import AttributionStatistics
    from benchbox_probes.gradient_norms import GradientNorms
    from benchbox_probes.neuron_sensitivity import NeuronSensitivity
    from benchbox_probes.noise_flatness import NoiseFlatness
    from benchbox_probes.weight_density import WeightDensity
    from benchbox_probes.weight_norms import WeightNorms
    from benchbox_probes.weight_sensitivity import WeightSensitivity

    return [
        AttributionQuality, AttributionStatistics, GradientNorms, NeuronSensitivity, NoiseFlatness, WeightDensity,
        WeightNorms, WeightSensitivity,
    ]  # fmt: skip
