"""Sweeps of the synaptic filter in results: a line per layer, beside the intact model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from benchbox.domain import Component
from benchbox.errors import StoreError
from benchbox.labels import Labels, describe
from benchbox.results import Results, Row
from benchbox.sweeps import intact_of, robust_under, shared_attacks, split_sweeps, sweep_names
from benchbox.systems import System, attack_id, systems
from benchbox_reports.layer_order import in_order, positions
from benchbox_reports.synaptic_scores import LayerSweep

FILTER = "synaptic-filter"
PROBE = "weight-density"


@dataclass(frozen=True, slots=True)
class Study:
    """One filter on one model, layer by layer, met by the same attacks at every point."""

    title: str
    model: str
    network: str  # the model without its weights
    weights: str | None  # the model's option of this name
    filter: str
    attacks: tuple[str, ...]
    layers: Mapping[str, LayerSweep]  # by the option ``layer``, in the model's order
    examples: int
    classes: int | None  # among the labels of the examples; None where only verdicts were published


def studies(results: Results, rows: Iterable[Row]) -> tuple[list[Study], list[str]]:
    """The sweeps among ``rows``, which share their examples and a threat, and what is no sweep, with the reason."""
    found = [row for row in rows if _is_filter(row.cell.weight_perturbation) or not row.cell.weight_perturbation]
    labels = Labels(row.cell for row in found)
    alone, groups = split_sweeps(systems(found))
    missing = [
        f"{labels.system(system.cell).line}: a single point is no sweep"
        for system in alone if system.cell.weight_perturbation
    ]  # fmt: skip
    complete = []
    for group in groups:
        intact = intact_of(group, alone)
        if intact is None:
            missing.append(f"{sweep_names(group, labels).line}: the intact model was not evaluated")
            continue
        complete += [_study(results, part, intact, labels) for part in _by_width(group)]
    return complete, missing


def _is_filter(part: Component | None) -> bool:
    return part is not None and part.name == FILTER


def _options(system: System) -> Mapping[str, Any]:
    perturbation = system.cell.weight_perturbation
    return perturbation.options if perturbation else {}


def _by_width(group: Sequence[System]) -> list[list[System]]:
    """The width of the pulse is a number, too, and no place in the sweep; other filters have none."""
    widths: dict[Any, list[System]] = {}
    for system in group:
        options = _options(system)
        width = options.get("pulse_width") if options.get("filter") == "pulse" else None
        widths.setdefault(width, []).append(system)
    return list(widths.values())


def _study(results: Results, group: Sequence[System], intact: System, labels: Labels) -> Study:
    shared = shared_attacks(group)
    lines: dict[str, list[System]] = {}
    for system in group:
        lines.setdefault(str(_options(system).get("layer", "*")), []).append(system)
    counted = _nonzero(results, intact)
    width = _options(group[0]).get("pulse_width") if _options(group[0]).get("filter") == "pulse" else None
    places = positions(results, intact)
    names, extra = sweep_names(group, labels), "" if width is None else f", width {width:.3g}"
    weights = group[0].cell.model.options.get("weights")
    return Study(
        title=names.line + extra,
        model=names.model,
        network=_network(group[0].cell.model),
        weights=weights if isinstance(weights, str) else None,
        filter=names.perturbation + extra + (f", {names.access}" if names.access else ""),
        attacks=tuple(labels.attack(row.cell) for row in group[0].attacked if attack_id(row.cell) in shared),
        layers={name: _sweep(results, name, lines[name], intact, shared, counted) for name in in_order(lines, places)},
        examples=group[0].cell.examples,
        classes=_classes(results, intact),
    )


def _network(model: Component) -> str:
    """What trainings of one network share: the plugin's name, and its numbers and words but for where weights are."""
    kept = {
        name: value for name, value in model.options.items()
        if isinstance(value, str | int) and name not in ("weights", "sha256", "init_seed")
    }  # fmt: skip
    return describe(model.name, kept)


def _sweep(
    results: Results,
    layer: str,
    points: Sequence[System],
    intact: System,
    attacks: set[tuple[str, bool, int | None]],
    counted: Mapping[str, float],
) -> LayerSweep:
    points = sorted(points, key=lambda system: float(_options(system)["threshold"]))
    robust = [share.value for system in points if (share := robust_under(system, attacks))]
    reference = robust_under(intact, attacks)
    kept = [_kept(layer, _nonzero(results, system), counted) for system in points]
    return LayerSweep(
        places=[float(_options(system)["threshold"]) for system in points],
        clean=[system.clean.value for system in points],
        intact_clean=intact.clean.value,
        adversarial=robust if len(robust) == len(points) and reference else None,
        intact_adversarial=reference.value if reference else None,
        kept=None if None in kept else [share for share in kept if share is not None],
    )


def _kept(layer: str, now: Mapping[str, float], before: Mapping[str, float]) -> float | None:
    """The share of the weights of ``layer`` (a name or a pattern) that are not zero yet; None where none were counted.

    Weights that the intact model has at zero do not count: they can neither be kept nor removed.
    """
    names = [name for name in before if name in now and (name == layer or fnmatchcase(name, layer))]
    total = sum(before[name] for name in names)
    return sum(now[name] for name in names) / total if total else None


def _nonzero(results: Results, system: System) -> dict[str, float]:
    """What the probe counted: by layer how many weights are not zero."""
    for row in system.rows:
        try:
            found = results.measurements(row, PROBE)
        except StoreError:  # published results hold no measurements
            return {}
        if found:
            return {item.subject: item.value for item in found if item.name == "nonzero" and item.value is not None}
    return {}


def _classes(results: Results, system: System) -> int | None:
    try:
        return len(np.unique(results.record(system.rows[0].key).label))
    except StoreError:  # published results hold verdicts alone
        return None
