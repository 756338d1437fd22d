"""Transfer matrices: how often examples that were made on one model break another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchbox.domain import Array, Cell, Component, Threat
from benchbox.labels import Labels
from benchbox.rows import Row
from benchbox.systems import Share, attack_id, identity


@dataclass(frozen=True, slots=True)
class Matrix:
    """Success rates of one attack under one threat: a line per source, a column per evaluated model.

    A rate is the share of the inputs that the evaluated model accepts and classifies correctly which the examples of
    the source break; None where it was not evaluated, or nothing was left to attack.
    """

    dataset: str
    threat: Threat
    attack: str
    sources: tuple[str, ...]
    evaluated: tuple[str, ...]
    rates: tuple[tuple[Share | None, ...], ...]
    own: tuple[int | None, ...]  # per column the line of its own model: attackers who know the evaluated model
    beyond: tuple[int, ...]  # per column the inputs that withstood those attackers and fell to transferred examples


def matrices(rows: Iterable[Row]) -> list[Matrix]:
    """A matrix per attack whose examples were transferred.

    ``rows`` share their examples, norm and radius. Perturbed weights and oblivious attackers are left out.
    """
    found = [row for row in rows if not row.cell.weight_perturbation and row.cell.access != "oblivious"]
    labels = Labels(row.cell for row in found)
    attacks: dict[Any, list[Row]] = {}
    for row in found:
        if row.cell.threat:
            attacks.setdefault(attack_id(row.cell), []).append(row)
    return [
        _matrix(group, group[0].cell.threat, labels)
        for group in attacks.values() if group[0].cell.threat and any(row.cell.source for row in group)
    ]  # fmt: skip


def _matrix(rows: Sequence[Row], threat: Threat, labels: Labels) -> Matrix:
    """The matrix of ``rows``, all of one attack."""
    columns: dict[Any, dict[str, list[Row]]] = {}  # protected model -> digest of the source -> results
    for row in rows:
        by_source = columns.setdefault(identity(row.cell), {})
        by_source.setdefault(_source(row.cell).digest, []).append(row)
    cells = [next(iter(by_source.values()))[0].cell for by_source in columns.values()]
    sources = {part.digest: part for part in (*(cell.model for cell in cells), *(_source(row.cell) for row in rows))}
    order = list(sources)
    return Matrix(
        dataset=cells[0].dataset.name,
        threat=replace(threat, curve=()),
        attack=labels.attack(cells[0]),
        sources=tuple(map(labels, sources.values())),
        evaluated=tuple(replace(labels.system(cell), access="").line for cell in cells),
        rates=tuple(tuple(_rate(by_source.get(digest, ())) for by_source in columns.values()) for digest in order),
        own=tuple(
            order.index(cell.model.digest) if cell.model.digest in by_source else None
            for cell, by_source in zip(cells, columns.values(), strict=True)
        ),
        beyond=tuple(
            _beyond(by_source, cell.model.digest) for cell, by_source in zip(cells, columns.values(), strict=True)
        ),
    )


def _source(cell: Cell) -> Component:
    """The model that the examples of ``cell`` are made on."""
    return cell.source or cell.model


def _rate(rows: Sequence[Row]) -> Share | None:
    """The share of attacked inputs that any of ``rows`` (the same attack, by other seeds) breaks."""
    if not rows or not rows[0].masks().clean_correct.any():
        return None
    return Share.of(_broken(rows)[rows[0].masks().clean_correct], [row.key for row in rows])


def _beyond(by_source: Mapping[str, Sequence[Row]], own: str) -> int:
    """How many examples fell to some other source than ``own`` alone."""
    transferred = [row for source, rows in by_source.items() if source != own for row in rows]
    if own not in by_source or not transferred:
        return 0
    return int((_broken(transferred) & ~_broken(by_source[own])).sum())


def _broken(rows: Iterable[Row]) -> Array:
    """bool (n,): the examples that any of ``rows`` breaks."""
    return np.logical_or.reduce([row.masks().success for row in rows])
