"""Boards: results and a definition in, tables out, in which every number names the cells that it was made from.

The headline is the worst case: an example counts as robust when no attack of its line succeeds on it. It is the AND of
per-example masks, never the minimum of averages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchbox.definitions import COLUMNS, Definition, load_definition
from benchbox.domain import Cell, Norm, Threat
from benchbox.errors import GridError
from benchbox.labels import Labels
from benchbox.protocol import protocol_of
from benchbox.ranking import Standing, rank, requirements, standing
from benchbox.registry import did_you_mean
from benchbox.results import EPS_TOLERANCE, Failure, Results
from benchbox.rows import Row
from benchbox.sweeps import Sweep, split_sweeps, summarise
from benchbox.systems import systems


@dataclass(frozen=True, slots=True)
class Board:
    """A table of systems under one threat on the same examples, with all that is needed to read it."""

    title: str
    description: str
    dataset: str
    threat: Threat | None
    examples: int
    columns: tuple[str, ...]
    rank_by: str
    attacks: tuple[str, ...]  # labels, in the order of the columns
    standings: tuple[Standing, ...]  # ranked ones first
    sweeps: tuple[Sweep, ...]
    points: tuple[Standing, ...]  # what the sweeps summarise
    protocol: Mapping[str, tuple[str, ...]]
    cells: Mapping[str, str]  # what the numbers were made from: key -> description
    failures: Mapping[str, str]  # cells that belong here and failed: description -> error


def boards_of(results: Results, grid: str | None = None, definition: Path | None = None) -> list[Board]:
    """The boards of ``definition``; without one, a board per data set, norm and radius of the results.

    ``grid`` narrows the results down to those that the grid of this name asked for. Results on other examples of the
    same data set get boards of their own. Raises GridError when the definition is wrong or asks for what is not there.
    """
    rows = results.rows(grid=grid)
    labels = Labels(row.cell for row in rows)
    failures = [failure for failure in results.failures() if grid is None or grid in failure.runs]
    if definition is None:
        wanted = _default_definitions(rows)
    else:
        wanted = [load_definition(definition)]
        _check_against_results(wanted[0], rows, definition)
    return [
        _board(part, threat, group, labels, failures)
        for part in wanted
        for threat in _threats(part)
        for group in _on_same_examples(part, threat, rows)
    ]


def _default_definitions(rows: Sequence[Row]) -> list[Definition]:
    """One per data set and norm, with all radii; one of clean accuracy where a data set met no attack."""
    found: dict[str, dict[Norm, set[float]]] = {}
    for row in rows:
        norms = found.setdefault(row.cell.dataset.name, {})
        if row.cell.threat and math.isfinite(row.cell.threat.eps):
            norms.setdefault(row.cell.threat.norm, set()).add(row.cell.threat.eps)
    wanted = []
    for dataset, norms in found.items():
        for norm, radii in norms.items():
            wanted.append(Definition(title=dataset, dataset=dataset, norm=norm, eps=sorted(radii)))
        if not norms:
            columns = ["clean", "notes", "cost"]
            wanted.append(Definition(title=dataset, dataset=dataset, rank_by="clean", columns=columns))
    return wanted


def _threats(definition: Definition) -> list[Threat | None]:
    return [Threat(definition.norm, eps) for eps in definition.eps] if definition.norm else [None]


def _check_against_results(definition: Definition, rows: Sequence[Row], path: Path) -> None:
    """A misspelt data set or score would give an empty board: where there are results, it is an error instead."""
    datasets = sorted({row.cell.dataset.name for row in rows})
    if rows and definition.dataset not in datasets:
        hint = did_you_mean(definition.dataset, datasets) or f" There are results on: {', '.join(datasets)}."
        raise GridError(
            f"{path}:dataset: there is no result on {definition.dataset!r}.{hint} Or run a grid on it first"
        )
    known = sorted({"/".join(name) for row in rows for name in row.scores})
    for position, column in enumerate(definition.columns):
        if rows and column not in (*COLUMNS, *known):
            hint = did_you_mean(column, known) or f" Known: {', '.join(known)}."
            raise GridError(f"{path}:columns[{position}]: no result has the score {column!r}.{hint}")


def _on_same_examples(definition: Definition, threat: Threat | None, rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that belong on a board, apart for each set of examples; one empty group where there are none."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if _belongs(row.cell, definition, threat):
            groups.setdefault((row.cell.dataset.digest, row.cell.examples), []).append(row)
    return list(groups.values()) or [[]]


def _belongs(cell: Cell, definition: Definition, threat: Threat | None) -> bool:
    if cell.dataset.name != definition.dataset or definition.examples not in (None, cell.examples):
        return False
    if cell.threat is None or threat is None:
        return cell.threat is threat
    near = math.isclose(cell.threat.eps, threat.eps, rel_tol=0, abs_tol=EPS_TOLERANCE)
    return cell.threat.norm == threat.norm and near


def _board(
    definition: Definition, threat: Threat | None, rows: Sequence[Row], labels: Labels, failures: Iterable[Failure]
) -> Board:
    found = systems(rows)
    alone, groups = split_sweeps(found)
    if definition.sweeps == "rows":
        alone, groups = found, []
    required = requirements(definition, [system for system in alone if not system.cell.weight_perturbation], labels)
    lines = [(system, standing(system, definition.columns, labels, required)) for system in alone]
    points = [standing(system, definition.columns, labels) for group in groups for system in group]
    split = rows[0].cell.dataset.options.get("split") if rows else None  # other than the usual one, that for tests
    return Board(
        title=f"{definition.title}, {split} split" if split else definition.title,
        description=definition.description,
        dataset=definition.dataset,
        threat=threat,
        examples=rows[0].cell.examples if rows else definition.examples or 0,
        columns=tuple(definition.columns),
        rank_by=definition.rank_by,
        attacks=tuple(dict.fromkeys(labels.attack(row.cell) for system in alone for row in system.attacked)),
        standings=tuple(rank(lines, definition.rank_by)),
        sweeps=tuple(summarise(group, alone, labels) for group in groups),
        points=tuple(points),
        protocol=protocol_of(rows, labels),
        cells={row.key: labels.cell(row.cell) for row in rows},
        failures={
            labels.cell(failure.cell): failure.error
            for failure in failures
            if _belongs(failure.cell, definition, threat)
        },
    )
