"""Accuracy against the level of noise on the weights, a curve per layer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from benchbox.sweeps import robust_under, shared_attacks
from benchbox.systems import System
from benchbox_reports.layer_order import in_order


@dataclass(frozen=True, slots=True)
class NoiseCurve:
    """Mean accuracies of one layer over the draws, at rising levels above 0, with their standard deviations."""

    levels: Sequence[float]
    draws: int  # the fewest of any level
    clean: Sequence[float]
    clean_sd: Sequence[float] | None  # by level; None for a single draw
    robust: Sequence[float] | None
    robust_sd: Sequence[float] | None

    @property
    def spread(self) -> float | None:
        """The largest standard deviation of any level."""
        return max(self.clean_sd) if self.clean_sd else None


def curves(group: Iterable[System], places: Mapping[str, float] = MappingProxyType({})) -> dict[str, NoiseCurve]:
    """The curves of the points of one sweep by layer, in the order of the layers' ``places``, with other options that
    differ; level 0 has no logarithm."""
    group = list(group)
    layers = in_order(dict.fromkeys(_layer(system) for system in group), places)
    group.sort(key=lambda system: layers.index(_layer(system)))
    shared = shared_attacks(group)
    lines: dict[str, dict[float, list[System]]] = {}
    for system in group:
        options = _options(system)
        if options.get("level", 0) > 0:
            extra = "".join(f", {name}" for name in ("include_bias", "include_batch_norm") if options.get(name))
            name = _layer(system) + extra.replace("include_", "with ")
            lines.setdefault(name, {}).setdefault(float(options["level"]), []).append(system)
    return {name: _curve(dict(sorted(by_level.items())), shared) for name, by_level in lines.items()}


def _curve(by_level: Mapping[float, Sequence[System]], attacks: Any) -> NoiseCurve:
    clean = [[system.clean.value for system in points] for points in by_level.values()]
    robust = [
        [share.value for system in points if (share := robust_under(system, attacks))] for points in by_level.values()
    ]
    draws = min(map(len, clean))
    attacked = all(robust)
    return NoiseCurve(
        levels=list(by_level),
        draws=draws,
        clean=[statistics.fmean(values) for values in clean],
        clean_sd=[statistics.stdev(values) for values in clean] if draws > 1 else None,
        robust=[statistics.fmean(values) for values in robust] if attacked else None,
        robust_sd=[statistics.stdev(values) for values in robust] if attacked and draws > 1 else None,
    )


def layer_text(name: str) -> str:
    """The name of a curve as people read it."""
    return name.replace("*", "all layers", 1) if name.startswith("*") else name


def _layer(system: System) -> str:
    return str(_options(system).get("layer", "*"))


def _options(system: System) -> Mapping[str, Any]:
    perturbation = system.cell.weight_perturbation
    return perturbation.options if perturbation else {}
