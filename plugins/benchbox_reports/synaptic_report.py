"""Filtering scores per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field
from tabulate import tabulate

from benchbox import api, plots
from benchbox.domain import Threat
from benchbox.render import markdown_text
from benchbox.results import Results
from benchbox.tables import MISSING
from benchbox_reports.figures import FigureOptions, by_figure, threat_text
from benchbox_reports.layer_sweeps import PROBE, Study, studies
from benchbox_reports.synaptic_figure import draw, draw_curves
from benchbox_reports.synaptic_scores import Rule, Scores, classify, filtering_scores

HEADERS = (
    "layer",
    "points",
    "mean share kept",
    "S clean",
    "class",
    "S adv",
    "class",
    "S diff",
    "class",
    "S clean above chance",
)


class SynapticOptions(FigureOptions):
    tolerance: float = Field(0.05, ge=0, description="scores up to it, of either sign, are robust; none is published")
    baseline: Literal["intact", "first-step"] = Field(
        "intact",
        description="accuracies are relative to the intact model's, or (as in the notebooks) the first point's",
    )
    rule: Rule = Field("simpson", description="of integration; trapezoid where the points are unfit for Simpson's")
    classes: int | None = Field(None, ge=2, description="for chance level; by default those among the examples")


def scores_of(study: Study, options: SynapticOptions) -> dict[str, Scores]:
    """The scores of each layer as the options ask for them."""
    first, classes = options.baseline == "first-step", options.classes or study.classes
    return {
        name: filtering_scores(
            sweep, first_step=first, rule=options.rule, classes=classes if classes and classes > 1 else None
        )
        for name, sweep in study.layers.items()
    }


class SynapticScores(api.Report):
    """Which layers are fragile, robust or antifragile under ``synaptic-filter``: scores with their classes, heat maps.

    A table and two figures per data set, threat, model and filter. S_clean and S_adv need the probe ``weight-density``
    in the grid. Adversarial accuracy is benchbox's robust accuracy: clean input classified correctly and no success.
    """

    name = "synaptic-scores"
    Options = SynapticOptions
    options: SynapticOptions

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`."""
        paths: dict[Path, None] = {}
        for stem, rows in by_figure(results.rows(), radius=True).items():
            found, missing = studies(results, rows)
            threat = next((row.cell.threat for row in rows if row.cell.threat), None)
            for study in found:
                scores = scores_of(study, self.options)
                plain = re.sub(r"[^A-Za-z0-9.]+", "-", study.title).strip("-")
                figure, number = out / f"{self.name}-{stem}-{plain}.{self.options.format}", 1
                while figure in paths:  # titles that differ in signs alone
                    number += 1
                    figure = figure.with_name(f"{self.name}-{stem}-{plain}-{number}.{self.options.format}")
                page = figure.with_suffix(".md")
                curves = figure.with_stem(f"{figure.stem}-curves")
                plots.save(draw(study, scores, self.options.tolerance, threat_text(threat)), figure)
                plots.save(draw_curves(study, threat_text(threat)), curves)
                page.write_text(
                    self._page(study, scores, threat, missing, figure.name)
                    + f"\n![accuracy and weights kept along the sweep]({curves.name})\n",
                    encoding="utf-8",
                )
                paths |= {figure: None, page: None, curves: None}
        return list(paths)

    def _page(
        self, study: Study, scores: Mapping[str, Scores], threat: Threat | None, missing: list[str], figure: str
    ) -> str:
        align = ["left", *("left" if head == "class" else "right" for head in HEADERS[1:])]
        lines = [self._line(study, name, score) for name, score in scores.items()]
        table = tabulate(lines, HEADERS, tablefmt="pipe", colalign=align, disable_numparse=True)
        attacks = (
            f" under {', '.join(map(markdown_text, study.attacks))} ({threat_text(threat)})" if study.attacks else ""
        )
        reference = "the intact model's" if self.options.baseline == "intact" else "that at the first point"
        rules = " and ".join(sorted({score.rule for score in scores.values()}))
        notes = [f"- {markdown_text(text)}" for text in (*_undefined(study), *missing)]
        return (
            f"# {markdown_text(study.title)}\n\n"
            f"On {study.examples:,} examples{attacks}. A score is the mean over the sweep of accuracy, relative to "
            f"{reference}, less the share of weights kept; S diff is S adv less S clean. Above 0 the network does "
            "better than its compression; accuracy that stays as it was scores 1 less the mean share kept. "
            f"Fragile: below -{self.options.tolerance:g}; antifragile: above {self.options.tolerance:g}; else robust. "
            f"Integrated by the rule: {rules}.\n\n"
            f"{table}\n" + ("\n" + "\n".join(notes) + "\n" if notes else "") + f"\n![the same as a picture]({figure})\n"
        )

    def _line(self, study: Study, name: str, score: Scores) -> list[str]:
        layer = "all layers" if name == "*" else markdown_text(name)
        fields = [layer, str(len(study.layers[name].places)), _number(score.kept)]
        for value in (score.clean, score.adversarial, score.difference):
            fields += [_number(value, sign=True), classify(value, self.options.tolerance) or "undefined"]
        return [*fields, _number(score.above_chance, sign=True)]


def _undefined(study: Study) -> list[str]:
    """Why some scores are undefined."""
    sweeps = study.layers.values()
    reasons = [
        (
            any(sweep.kept is None for sweep in sweeps),
            f"The shares of weights kept are not known: add the probe {PROBE} to the grid.",
        ),
        (
            any(sweep.intact_clean == 0 for sweep in sweeps),
            "The intact model has no clean accuracy, so that nothing can be relative to it.",
        ),
        (
            any(sweep.intact_adversarial == 0 for sweep in sweeps),
            "The intact model has no accuracy left under attack: choose a smaller eps.",
        ),
        (
            any(len(sweep.places) < 2 for sweep in sweeps),
            "A sweep of one point has no area: sweep.threshold needs at least two.",
        ),
    ]
    return [reason for applies, reason in reasons if applies]


def _number(value: float | None, sign: bool = False) -> str:
    return MISSING if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"
