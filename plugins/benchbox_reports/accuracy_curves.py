"""Accuracy against the radius."""

from __future__ import annotations

from pathlib import Path

from benchbox import api, plots
from benchbox.results import Results
from benchbox_reports.figures import FigureOptions, by_figure


class AccuracyCurves(api.Report):
    """Worst-case robust accuracy of the intact models against eps: a figure per data set and norm."""

    name = "accuracy-curves"
    Options = FigureOptions

    def render(self, results: Results, out: Path) -> list[Path]:
        attacked = [row for row in results.rows(weight_perturbation=None, source=None) if row.cell.attack]
        return [
            plots.save(plots.accuracy_against_eps(rows), out / f"{self.name}-{stem}.{self.options.format}")
            for stem, rows in by_figure(attacked, radius=False).items()
        ]
