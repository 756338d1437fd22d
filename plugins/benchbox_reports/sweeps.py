"""Accuracy along sweeps of weight perturbations."""

from __future__ import annotations

from pathlib import Path

from benchbox import api, plots
from benchbox.results import Results
from benchbox_reports.figures import FigureOptions, by_figure


class Sweeps(api.Report):
    """Clean and robust accuracy along each sweep, beside the intact model: a figure per data set, norm and eps."""

    name = "sweeps"
    Options = FigureOptions

    def render(self, results: Results, out: Path) -> list[Path]:
        drawn = {
            stem: figure
            for stem, rows in by_figure(results.rows(), radius=True).items()
            if (figure := plots.accuracy_against_sweep(rows))
        }
        return [plots.save(figure, out / f"{self.name}-{stem}.{self.options.format}") for stem, figure in drawn.items()]
