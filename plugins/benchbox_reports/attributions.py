"""What attacks do to attributions, and how good these are as explanations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import Field

from benchbox import plots
from benchbox.api import Report
from benchbox.domain import format_eps
from benchbox.labels import Labels
from benchbox.render import markdown_text
from benchbox.results import Results, Row
from benchbox.tables import NORMS
from benchbox_reports.explained import Explained
from benchbox_reports.explained_figure import side_by_side
from benchbox_reports.explained_page import INTRODUCTION, counted, quality_section, statistics_section
from benchbox_reports.figures import FigureOptions, by_figure

Section = Callable[[Explained], list[str]]
PROBES: dict[str, tuple[str, Section]] = {
    "attribution-statistics": ("statistics", statistics_section),
    "attribution-quality": ("quality", quality_section),
}


class Attributions(Report):
    """Tables and figures of the probes `attribution-statistics` and `attribution-quality`: a page per data set and
    threat, on it the medians of every statistic, similarity and measure of quality for each model and attack, clean
    beside adversarial, and a picture of their distributions.
    """

    name = "attributions"

    class Options(FigureOptions):
        statistics: tuple[str, ...] = Field(
            ("std", "iqr", "l1", "gini", "entropy", "excess-kurtosis"), min_length=1,
            description="the statistics that are drawn; the tables have all",
        )  # fmt: skip

    options: Options

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`; needs a grid with one of the two probes."""
        measured = [
            (probe, row, tag, Explained.of(values))
            for probe in PROBES
            for row, tag, values in results.measured(probe)
            if row.cell.attack and row.cell.threat
        ]
        labels = Labels(row.cell for _, row, *_ in measured)
        paths: list[Path] = []
        for stem, rows in by_figure((row for _, row, *_ in measured), radius=True).items():
            keys = {row.key for row in rows}
            page = out / f"{self.name}-{re.sub(r'[^A-Za-z0-9.]+', '-', stem)}.md"
            parts, figures = [f"# Attributions: {markdown_text(_threat(stem, rows))}", INTRODUCTION], list[Path]()
            for probe, row, tag, found in measured:
                if row.key in keys:
                    figure = page.with_name(f"{page.stem}-{len(figures) + 1}.{self.options.format}")
                    twins = {other for _, one, other, _ in measured if one.key == row.key and other.startswith(probe)}
                    options = f", {tag}" if len(twins) > 1 else ""
                    heading = f"{labels.system(row.cell).line}, {labels.attack(row.cell)}{_seed(row)}{options}"
                    parts += self._section(probe, heading, found, figure)
                    figures.append(figure)
            page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
            paths += [page, *figures]
        return paths

    def _section(self, probe: str, heading: str, found: Explained, figure: Path) -> list[str]:
        """Draws the figure ``figure`` as well."""
        word, section = PROBES[probe]
        names = found.names()
        chosen = [name for name in self.options.statistics if name in names] if word == "statistics" else names
        title = f"{word} of attributions: {heading}"
        plots.save(side_by_side(title, found, chosen or names), figure)
        picture = f"![{word} of attributions]({figure.name})"
        return [f"## {markdown_text(heading)}: {word}", counted(found), *section(found), picture]


def _threat(stem: str, rows: Sequence[Row]) -> str:
    threat = rows[0].cell.threat
    name = rows[0].cell.dataset.name
    return f"{name}, {NORMS[threat.norm]} ε = {format_eps(threat.eps)}" if threat else stem


def _seed(row: Row) -> str:
    return "" if row.cell.seed is None else f", seed {row.cell.seed}"
