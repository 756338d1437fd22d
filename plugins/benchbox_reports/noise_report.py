"""Noise on the weights, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field
from tabulate import tabulate

from benchbox import api, plots
from benchbox.errors import StoreError
from benchbox.labels import Labels
from benchbox.render import markdown_text
from benchbox.results import Results, Row
from benchbox.sweeps import intact_of, robust_under, shared_attacks, split_sweeps, sweep_names
from benchbox.systems import System, systems
from benchbox.tables import MISSING
from benchbox_reports.figures import FigureOptions, by_figure, data_name, threat_text
from benchbox_reports.layer_order import positions
from benchbox_reports.noise_curves import NoiseCurve, curves, layer_text
from benchbox_reports.noise_figure import draw
from benchbox_reports.noise_scores import half_level, noise_area

NOISE = "weight-noise"
HEADERS = ("layer", "levels", "draws", "AUC clean", "half level", "largest sd")
ATTACKED = "AUC robust"


@dataclass(frozen=True, slots=True)
class NoiseStudy:
    """One kind of noise on one model. ``intact`` and ``robust`` are the intact model's accuracies."""

    title: str
    curves: Mapping[str, NoiseCurve]  # by layer
    intact: float
    robust: float | None
    chance: float | None


class NoiseScores(api.Report):
    """Which layers stand noise: the area under accuracy against level, and the level that halves accuracy.

    A page per data set and threat: for each model and mode of ``weight-noise`` a table, the most critical layer first,
    and a figure of the curves with their spread over the draws.
    """

    name = "noise-scores"

    class Options(FigureOptions):
        classes: int | None = Field(None, ge=2, description="for chance level; by default those among the examples")

    options: Options

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`."""
        paths = []
        for stem, rows in by_figure(results.rows(), radius=True).items():
            threat = next((row.cell.threat for row in rows if row.cell.threat), None)
            sections = []
            for number, study in enumerate(self._studies(results, rows), start=1):
                figure = out / f"{self.name}-{stem}-{number}.{self.options.format}"
                title = f"{data_name(rows[0])}: {study.title}"
                plots.save(draw(title, study.curves, study.intact, study.robust, threat_text(threat)), figure)
                paths.append(figure)
                sections.append(
                    f"\n## {markdown_text(study.title)}\n\n{_table(study)}\n\n![the curves]({figure.name})\n"
                )
            if sections:
                page = out / f"{self.name}-{stem}.md"
                head = f"# Noise on the weights, {markdown_text(stem)}\n\n{EXPLAINED}"
                page.write_text(head + "".join(sections), encoding="utf-8")
                paths.append(page)
        return paths

    def _studies(self, results: Results, rows: Iterable[Row]) -> list[NoiseStudy]:
        found = [row for row in rows if row.cell.weight_perturbation is None or _is_noise(row)]
        labels = Labels(row.cell for row in found)
        alone, groups = split_sweeps(systems(found))
        made = []
        for group in groups:
            intact = intact_of(group, alone)
            if intact is None:
                continue
            classes = self.options.classes or _classes(results, intact)
            robust = robust_under(intact, shared_attacks(group))
            made.append(
                NoiseStudy(
                    sweep_names(group, labels).line, curves(group, positions(results, intact)), intact.clean.value,
                    robust.value if robust else None, 1 / classes if classes and classes > 1 else None,
                )
            )  # fmt: skip
        return made


def _table(study: NoiseStudy) -> str:
    lines = [(_half(curve, study), _line(name, curve, study)) for name, curve in study.curves.items()]
    lines.sort(key=lambda line: float("inf") if line[0] is None else line[0])
    heads = [*HEADERS, *([ATTACKED] if study.robust is not None else [])]
    align = ["left", *["right"] * (len(heads) - 1)]
    return tabulate([line for _, line in lines], heads, tablefmt="pipe", colalign=align, disable_numparse=True)


EXPLAINED = (
    "AUC is the mean of accuracy, relative to the intact model's, over the logarithm of the level. The half level is "
    "that at which clean accuracy above chance has fallen to half (∞: it never does). Accuracies are means over the "
    "draws; the largest sd is that of clean accuracy over the draws of one level, one model, so that it says nothing "
    "about other trainings. The most critical layer comes first.\n"
)


def _half(curve: NoiseCurve, study: NoiseStudy) -> float | None:
    return None if study.chance is None else half_level(curve.levels, curve.clean, study.intact, study.chance)


def _line(name: str, curve: NoiseCurve, study: NoiseStudy) -> list[str]:
    half = _half(curve, study)
    area = noise_area(curve.levels, curve.clean, study.intact)
    texts = ["∞" if half == float("inf") else _number(half, ".3g"), _number(curve.spread)]
    if study.robust is not None:
        texts.append(_number(noise_area(curve.levels, curve.robust, study.robust) if curve.robust else None))
    return [markdown_text(layer_text(name)), str(len(curve.levels)), str(curve.draws), _number(area), *texts]


def _number(value: float | None, form: str = ".3f") -> str:
    return MISSING if value is None else format(value, form)


def _is_noise(row: Row) -> bool:
    return row.cell.weight_perturbation is not None and row.cell.weight_perturbation.name == NOISE


def _classes(results: Results, system: System) -> int | None:
    try:
        return len(np.unique(results.record(system.rows[0].key).label))
    except StoreError:  # published results hold verdicts alone
        return None
