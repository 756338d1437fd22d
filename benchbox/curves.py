"""What the figures draw: shares of examples along a radius or along a sweep of weight perturbations."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchbox.domain import BLIND, Cell
from benchbox.labels import Labels, Names, plain
from benchbox.rows import Row
from benchbox.sweeps import (
    intact_of,
    point_options,
    robust_under,
    shared_attacks,
    split_sweeps,
    sweep_names,
)  # fmt: skip
from benchbox.systems import AttackId, Share, System, attacker, identity, systems


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a figure: a share, with its interval, at each place ``x``; places rise."""

    label: str
    x: tuple[float, ...]
    shares: tuple[Share, ...]
    dashed: bool = False
    colour: str = ""  # lines with equal texts here have one colour


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines that share their axes. ``references`` are horizontal lines by label."""

    title: str
    axis: str
    curves: tuple[Curve, ...]
    references: tuple[tuple[str, Share], ...] = ()


def eps_panels(rows: Iterable[Row]) -> list[Panel]:
    """A panel per model; in it, a line per defense and attacker: clean accuracy at 0, then the worst case per radius.

    ``rows`` share a data set and a norm. Attackers who never meet the protected model are dashed.
    """
    found = [row for row in rows if row.cell.threat and math.isfinite(row.cell.threat.eps)]
    labels = Labels(row.cell for row in found)
    radii: dict[float, list[Row]] = {}
    for row in found:
        radii.setdefault(row.cell.threat.eps, []).append(row)  # type: ignore[union-attr]
    lines: dict[tuple[Any, ...], dict[float, System]] = {}
    for eps in sorted(radii):
        for system in systems(radii[eps]):
            lines.setdefault((*identity(system.cell), attacker(system.cell)), {})[eps] = system
    panels: dict[str, list[Curve]] = {}
    for line in lines.values():
        first = next(iter(line.values()))
        names = labels.system(first.cell)
        shares = [first.clean, *(share for system in line.values() if (share := system.robust))]
        places = (0.0, *(eps for eps, system in line.items() if system.robust))
        label, blind = _protection(names), first.cell.access in BLIND
        curve = Curve(label, places, tuple(shares), blind, label.removesuffix(f" · {names.access}"))
        panels.setdefault(names.model, []).append(curve)
    return [Panel(model, "ε", tuple(curves)) for model, curves in panels.items()]


def _protection(names: Names) -> str:
    """What stands between the model and the attacker: ``weight-noise · blur · adaptive``."""
    return names.line.removeprefix(names.model).removeprefix(" · ") or "no defense"


def sweep_panels(rows: Iterable[Row]) -> list[Panel]:
    """A panel per model and kind of weight perturbation: robust accuracy (dashed: clean) along the swept number.

    ``rows`` share a data set and a threat. One line per layer (or other option in which the points differ); the
    references are the intact model, met by the same attacks.
    """
    found = list(rows)
    labels = Labels(row.cell for row in found)
    alone, groups = split_sweeps(systems(found))
    panels = []
    for group in groups:
        option = _swept_option([system.cell for system in group])
        if option is None:
            continue
        intact, attacks = intact_of(group, alone), shared_attacks(group)
        references = []
        if intact and (share := robust_under(intact, attacks)):
            references.append(("intact, robust", share))
        if intact:
            references.append(("intact, clean", intact.clean))
        names = sweep_names(group, labels)
        panels.append(Panel(names.line, option, tuple(_sweep_curves(group, option, attacks)), tuple(references)))
    return panels


def _swept_option(cells: Sequence[Cell]) -> str | None:
    """The number in which the points of a sweep differ the most; None where they differ in words alone."""
    values: dict[str, set[float]] = {}
    for cell in cells:
        for name, value in point_options(cell).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "seed":
                values.setdefault(name, set()).add(value)
    count, name = max(((len(found), name) for name, found in values.items()), default=(0, ""))
    return name if count > 1 else None


def _sweep_curves(group: Sequence[System], option: str, attacks: Collection[AttackId]) -> list[Curve]:
    """Per line the robust curve, where the points were attacked, and the clean one, dashed."""
    others = [
        name
        for name in point_options(group[0].cell)
        if name != option and len({repr(point_options(system.cell).get(name)) for system in group}) > 1
    ]
    lines: dict[str, list[tuple[float, System]]] = {}
    for system in group:
        options = point_options(system.cell)
        lines.setdefault(_line_label(options, others), []).append((options[option], system))
    curves = []
    for label, points in lines.items():
        points.sort(key=lambda point: point[0])
        places = tuple(place for place, _ in points)
        robust = tuple(share for _, system in points if (share := robust_under(system, attacks)))
        if robust:
            curves.append(Curve(label, places, robust, colour=label))
        curves.append(Curve(label, places, tuple(system.clean for _, system in points), dashed=True, colour=label))
    return curves


def _line_label(options: dict[str, Any], differing: Sequence[str]) -> str:
    if not differing:
        layer = options.get("layer", "*")
        return "all layers" if layer == "*" else str(layer)
    texts = [plain(options[name]) if name == "layer" else f"{name} {plain(options[name])}" for name in differing]
    return ", ".join("all layers" if text == "*" else text for text in texts)
