"""What the reports share: the choice of a file format, and rows put together by what one figure can show."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import Any, Literal

from matplotlib.figure import Figure
from pydantic import Field

from benchbox import api
from benchbox.domain import Threat, format_eps
from benchbox.results import Row
from benchbox.tables import NORMS


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


def data_name(row: Row) -> str:
    """The data set, and the split where it is not that for tests."""
    dataset = row.cell.dataset
    return f"{dataset.name}-train" if dataset.options.get("split") == "train" else dataset.name


def _example_sets(rows: Iterable[Row]) -> dict[str, set[tuple[str, int]]]:
    """By data set, the sets of examples that there are results on."""
    sets: dict[str, set[tuple[str, int]]] = {}
    for row in rows:
        sets.setdefault(data_name(row), set()).add(_examples(row))
    return sets


def _stem(row: Row, sets: dict[str, set[tuple[str, int]]]) -> str:
    name, dataset = data_name(row), row.cell.dataset
    return name + (f"-{row.cell.examples}-{dataset.digest[:6]}" if len(sets[name]) > 1 else "")


def _examples(row: Row) -> tuple[str, int]:
    return row.cell.dataset.digest, row.cell.examples


def threat_text(threat: Threat | None) -> str:
    """What the adversary may do, for titles; empty where nobody attacks."""
    return f"{NORMS[threat.norm]} ε = {format_eps(threat.eps)}" if threat else ""


def frame(figure: Figure, title: str, ax: Any) -> None:
    """Put ``title`` above and the legend of ``ax`` below a figure, both broken to its width."""
    width = float(figure.get_figwidth())
    figure.suptitle(textwrap.fill(title, int(7.2 * width)))
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        columns = min(len(labels), max(1, int(width / (0.085 * max(map(len, labels)) + 0.75))))
        figure.set_figheight(float(figure.get_figheight()) + 0.22 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)
