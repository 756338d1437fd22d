"""Layers in the order of their network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from benchbox.errors import StoreError
from benchbox.results import Results
from benchbox.systems import System


def positions(results: Results, system: System) -> dict[str, float]:
    """Where each layer stands in the network of ``system``, as a probe noted it; empty where none did."""
    for row in system.rows:
        try:
            measured = results.measurements(row)
        except StoreError:  # published results hold no measurements
            return {}
        found = {item.subject: item.value for item in measured if item.name == "position" and item.value is not None}
        if found:
            return found
    return {}


def in_order(layers: Iterable[str], places: Mapping[str, float]) -> list[str]:
    """``layers`` by their ``places``; those without one (patterns, say) stay in their order, behind the others."""
    return sorted(layers, key=lambda layer: places.get(layer, math.inf))
