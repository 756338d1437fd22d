"""What the reports share: the choice of a file format, and rows put together by what one figure can show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from benchbox import api
from benchbox.domain import format_eps
from benchbox.results import Row


class FigureOptions(api.Options):
    format: Literal["png", "svg"] = Field(default="png", description="format of the figures")


def by_examples(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows on the same examples under any threat, by the stem of a file name."""
    rows = list(rows)
    sets = _example_sets(rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_stem(row, sets), []).append(row)
    return groups


def by_figure(rows: Iterable[Row], radius: bool) -> dict[str, list[Row]]:
    """Rows on the same examples under the same norm (and the same ``radius``, if asked), by the stem of a file name."""
    rows = list(rows)
    sets = _example_sets(rows)
    figures: dict[str, list[Row]] = {}
    for row in rows:
        threat, stem = row.cell.threat, _stem(row, sets)
        if threat:
            stem += f"-{threat.norm}" + (f"-{format_eps(threat.eps).replace('/', '-')}" if radius else "")
        figures.setdefault(stem, []).append(row)
    return figures


def _example_sets(rows: Iterable[Row]) -> dict[str, set[tuple[str, int]]]:
    """By data set, the sets of examples that there are results on."""
    sets: dict[str, set[tuple[str, int]]] = {}
    for row in rows:
        sets.setdefault(row.cell.dataset.name, set()).add(_examples(row))
    return sets


def _stem(row: Row, sets: dict[str, set[tuple[str, int]]]) -> str:
    dataset = row.cell.dataset
    several = len(sets[dataset.name]) > 1
    return dataset.name + (f"-{row.cell.examples}-{dataset.digest[:6]}" if several else "")


def _examples(row: Row) -> tuple[str, int]:
    return row.cell.dataset.digest, row.cell.examples
