"""Filtering scores across trainings: epochs, initialisations, models."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from benchbox import api, plots
from benchbox.render import markdown_text
from benchbox.results import Results
from benchbox.tables import MISSING
from benchbox_reports.figures import by_figure, threat_text
from benchbox_reports.layer_sweeps import studies
from benchbox_reports.synaptic_report import SynapticOptions
from benchbox_reports.synaptic_scores import classify
from benchbox_reports.trainings import Training, trainings
from benchbox_reports.trainings_figure import draw

KINDS = {"S clean": "clean", "S adv": "adversarial", "S diff": "difference"}


class SynapticTrainings(api.Report):
    """How the scores of ``synaptic-filter`` change over the epochs of a training, as mean and standard deviation over
    its initialisations, or from model to model: a page per data set, threat and filter, with a figure over epochs.

    Epochs are known by the names of the weights that `benchbox train` writes for ``keep`` in a recipe; trainings of
    one network that differ in their names alone count as its initialisations.
    """

    name = "synaptic-trainings"
    Options = SynapticOptions
    options: SynapticOptions

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`. Writes nothing where a filter met fewer than two models."""
        paths = []
        for stem, rows in by_figure(results.rows(), radius=True).items():
            threat = threat_text(next((row.cell.threat for row in rows if row.cell.threat), None))
            found, _ = studies(results, rows)
            for number, training in enumerate(trainings(found, self.options), start=1):
                page = out / f"{self.name}-{stem}-{number}.md"
                text = self._page(training, threat)
                if training.epochs:
                    figure = page.with_suffix(f".{self.options.format}")
                    plots.save(draw(training, threat), figure)
                    text += f"\n![the same as a picture]({figure.name})\n"
                    paths.append(figure)
                page.write_text(text, encoding="utf-8")
                paths.append(page)
        return paths

    def _page(self, training: Training, threat: str) -> str:
        counts = sorted({len(models) for models in training.columns.values()})
        several = (
            f"Mean ± standard deviation over {' or '.join(map(str, counts))} initialisations. "
            if counts[-1] > 1
            else ""
        )
        sections = []
        for kind, field in KINDS.items():
            lines = [
                [
                    "all layers" if layer == "*" else markdown_text(layer),
                    *(self._entry(training.values(head, layer, field)) for head in training.columns),
                ]
                for layer in training.layers
            ]
            heads = ["layer", *map(markdown_text, training.columns)]
            align = ["left", *["right"] * len(training.columns)]
            table = tabulate(lines, heads, tablefmt="pipe", colalign=align, disable_numparse=True)
            sections.append(f"\n## {kind}\n\n{table}\n")
        attacked = f" Attacked within {threat}." if threat else ""
        return (
            f"# Filtering scores across trainings: {markdown_text(training.title)}\n\n{several}F: fragile (below "
            f"-{self.options.tolerance:g}), A: antifragile (above {self.options.tolerance:g}), R: robust, by the mean."
            f"{attacked}\n{''.join(sections)}"
        )

    def _entry(self, values: Sequence[float]) -> str:
        if not values:
            return MISSING
        mean = statistics.fmean(values)
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{mean:+.3f}{spread} {(classify(mean, self.options.tolerance) or ' ')[0].upper()}"
