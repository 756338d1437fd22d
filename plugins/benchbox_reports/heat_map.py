"""Attack × defense."""

from __future__ import annotations

from pathlib import Path

from benchbox import api, plots
from benchbox.results import Results
from benchbox_reports.figures import FigureOptions, by_figure


class HeatMap(api.Report):
    """Robust accuracy of each intact model and defense under each attack: a figure per data set, norm and eps."""

    name = "heat-map"
    Options = FigureOptions

    def render(self, results: Results, out: Path) -> list[Path]:
        attacked = [row for row in results.rows(weight_perturbation=None, source=None) if row.cell.attack]
        return [
            plots.save(plots.heat_map(rows), out / f"{self.name}-{stem}.{self.options.format}")
            for stem, rows in by_figure(attacked, radius=True).items()
        ]
