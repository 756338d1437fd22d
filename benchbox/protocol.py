"""The protocol card of a board: everything that a reader needs to know, and to repeat, what was measured.

It is made from the results alone (no clock, no machine of the reader), so that a page can be rendered again, byte for
byte, from what was published.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchbox.domain import Component
from benchbox.labels import Labels, family, plain
from benchbox.rows import Row

STATISTICS = "95 % Wilson intervals; neighbouring ranks compared on the same examples by McNemar's exact test"


def protocol_of(rows: Sequence[Row], labels: Labels) -> dict[str, tuple[str, ...]]:
    """What the rows of one board have in common, and what they were made with: lines of text by heading."""
    if not rows:
        return {}
    cell = rows[0].cell
    seeds = sorted({row.cell.seed for row in rows if row.cell.seed is not None})
    card = {
        "Examples": (f"the first {cell.examples:,} test examples of {component(cell.dataset, cell.dataset.name)}",),
        "Threat": (_threat(row) for row in rows),
        "Attacks": (component(row.cell.attack, labels.attack(row.cell)) for row in rows if row.cell.attack),
        "Defenses": (component(row.cell.defense, labels(row.cell.defense)) for row in rows if row.cell.defense),
        "Weight perturbations": (_perturbation(row) for row in rows),
        "Models": (component(row.cell.model, labels(row.cell.model)) for row in rows),
        "Seeds": (", ".join(map(str, seeds)),) if seeds else ("none: nothing is random",),
        "Precision": (row.cell.precision for row in rows),
        "Statistics": (STATISTICS,),
        "Evaluated": (_dates(rows),),
        "Devices": (row.device for row in rows),
        "Versions": _versions(rows),
    }
    return {heading: lines for heading, texts in card.items() if (lines := tuple(dict.fromkeys(filter(None, texts))))}


def component(part: Component, label: str) -> str:
    """A component as text: its name, version and provider, all options, and the fingerprint of the files behind it."""
    options = ", ".join(f"{name}={plain(value)}" for name, value in sorted(part.options.items()) if value is not None)
    files = f"; files {part.fingerprint[:12]}" if part.fingerprint else ""
    name = part.name if label == part.name else f"{label}: {part.name}"
    return f"{name} v{part.version} of {part.provider}" + (f"; {options}" if options else "") + files


def _threat(row: Row) -> str:
    threat = row.cell.threat
    return f"{threat.label}, in units of the [0, 1] pixel range" if threat else ""


def _perturbation(row: Row) -> str:
    part = row.cell.weight_perturbation
    return f"{family(part)} v{part.version} of {part.provider}" if part else ""


def _dates(rows: Iterable[Row]) -> str:
    days = sorted(f"{row.started_at:%Y-%m-%d}" for row in rows)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _versions(rows: Iterable[Row]) -> tuple[str]:
    names: dict[str, set[str]] = {}
    for row in rows:
        for name, version in row.environment.items():
            names.setdefault(name, set()).add(str(version))
    return (", ".join(f"{name} {' / '.join(sorted(versions))}" for name, versions in sorted(names.items())),)
