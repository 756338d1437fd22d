"""The tables of the report `attributions`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tabulate import tabulate

from benchbox.render import markdown_text
from benchbox_reports.explained import Explained
from benchbox_reports.explained_figure import BETTER

INTRODUCTION = (
    "Arrows lead from the median over all clean inputs to the median over the adversarial inputs that misled the "
    "model; in brackets is the AUROC, the chance that a misled input has the higher value than a clean one: 0.5 tells "
    "nothing, and 0 as much as 1. An AUROC against an attack that does not know of a statistic says nothing about one "
    "that does."
)
SIMILARITY = "How alike the attributions of a clean input and of its adversarial version are: medians over the misled."
UNDEFINED = "–"
Cell = Callable[[Explained, str, str], str]


def counted(found: Explained) -> str:
    """How many examples the medians are over."""
    counts = found.counts
    return (
        f"{counts['examples']} examples, {counts['pairs']} of them classified correctly, "
        f"{counts['misled']} misled by the attack."
    )


def statistics_section(found: Explained) -> list[str]:
    """Text and tables of what `attribution-statistics` measured."""
    lost = {
        f"{method}, {side}": int(count)
        for method in found.methods
        for side in ("clean", "adversarial")
        if (count := found.whole.get(f"{method}:{side}.not-finite"))
    }
    told = "; ".join(f"{markdown_text(what)}: {count}" for what, count in lost.items())
    notes = [f"Attributions that are not finite and left out: {told}."] if lost else []
    tables = _table(found, found.names(), _told), _table(found, found.similarities(), _alike)
    return [*notes, tables[0], SIMILARITY, tables[1]]


def quality_section(found: Explained) -> list[str]:
    """Text and table of what `attribution-quality` measured."""
    return [_table(found, found.names(), _change, better=True)]


def _told(found: Explained, method: str, name: str) -> str:
    auroc = found.whole.get(f"{method}:{name}.auroc")
    return f"{_change(found, method, name)} ({UNDEFINED if auroc is None else f'{auroc:.2f}'})"


def _change(found: Explained, method: str, name: str) -> str:
    if (method, "clean", name) not in found.values:
        return UNDEFINED
    before, after = (found.whole.get(f"{method}:{side}.{name}.median") for side in ("clean", "adversarial"))
    return f"{number(before)} → {number(after)}"


def _alike(found: Explained, method: str, name: str) -> str:
    return number(found.whole.get(f"{method}:{name}.median"))


def number(value: float | None) -> str:
    """Three significant digits, and a dash for what is undefined."""
    return UNDEFINED if value is None else f"{value:.3g}"


def _table(found: Explained, names: Sequence[str], cell: Cell, better: bool = False) -> str:
    lines = [
        [f"{name} ({BETTER[name]} is better)" if better and name in BETTER else name]
        + [cell(found, method, name) for method in found.methods]
        for name in names
    ]
    heads = ["", *map(markdown_text, found.methods)]
    align = ["left", *["right"] * len(found.methods)]
    return tabulate(lines, heads, tablefmt="pipe", colalign=align, disable_numparse=True)
