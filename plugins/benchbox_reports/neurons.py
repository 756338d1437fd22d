"""Neuron sensitivity of a standard and a robust model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from benchbox import plots
from benchbox.api import Report
from benchbox.domain import format_eps
from benchbox.labels import Labels
from benchbox.results import Results, Row
from benchbox.tables import NORMS
from benchbox_reports.figures import FigureOptions, by_figure
from benchbox_reports.neuron_figure import sensitivity_by_layer
from benchbox_reports.neuron_page import markdown
from benchbox_reports.neuron_pairs import Neurons as Measurements
from benchbox_reports.neuron_pairs import neurons


@dataclass(frozen=True, slots=True)
class Study:
    """Models on the same examples under the same attack, from the one that it breaks most."""

    title: str
    models: dict[str, Measurements]
    robust: dict[str, float]  # robust accuracy under this attack
    noise: dict[str, tuple[Measurements, ...]]  # the same under noise on the weights, where that was measured


class Neurons(Report):
    """Sensitivity by layer of the intact, undefended models of a grid with the probe `neuron-sensitivity`: a figure and
    a page per data set, attack and threat. The model with the lowest robust accuracy is what the others are compared
    with: per-layer means and ratios, overlap of the most sensitive channels, rank correlation, stability. With the
    probe `weight-sensitivity`, too, each model's channels are compared with those that noise on its weights moves.
    """

    name = "neurons"

    class Options(FigureOptions):
        top: float = Field(0.1, gt=0, le=1, description="share of a layer's channels that count as its most sensitive")
        aligned: bool = Field(
            False, description="whether channels of one number correspond, as after fine-tuning one model from another"
        )

    options: Options

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`; needs a grid with ``[[probe]] name = "neuron-sensitivity"``."""
        paths: list[Path] = []
        for stem, study in _studies(results).items():
            figure = out / f"{self.name}-{stem}.{self.options.format}"
            page = figure.with_suffix(".md")
            plots.save(sensitivity_by_layer(study.title, study.models), figure)
            text = markdown(
                study.title,
                study.models,
                study.robust,
                study.noise,
                figure.name,
                self.options.top,
                self.options.aligned,
            )
            page.write_text(text, encoding="utf-8")
            paths += [figure, page]
        return paths


def _studies(results: Results) -> dict[str, Study]:
    """What belongs on one page, by the stem of its files."""
    found = results.measured("neuron-sensitivity", weight_perturbation=None, defense=None, source=None)
    noise: dict[str, list[Any]] = {}
    for row, _, values in results.measured("weight-sensitivity", weight_perturbation=None, defense=None, source=None):
        noise.setdefault(row.key, []).append(values)
    measured = [(row, tag, values) for row, tag, values in found if row.cell.attack and row.cell.threat]
    labels = Labels(row.cell for row, *_ in measured)
    groups: dict[str, dict[tuple[Any, ...], list[tuple[Row, Any]]]] = {}
    for stem, rows in by_figure((row for row, *_ in measured), radius=True).items():
        keys = {row.key for row in rows}
        for row, tag, values in measured:
            if row.key in keys:
                plain = re.sub(r"[^A-Za-z0-9.]+", "-", f"{stem}-{labels.attack(row.cell)}").strip("-")
                groups.setdefault(plain, {}).setdefault(_run_of(row, tag), []).append((row, values))
    return {
        name if number == 1 else f"{name}-{number}": _study(group, labels, noise)
        for name, by_run in groups.items()
        for number, group in enumerate(by_run.values(), start=1)
    }


def _run_of(row: Row, tag: str) -> tuple[Any, ...]:
    """What models must share to be compared, besides their examples: all of the attack, and the probe's options."""
    cell = row.cell
    attack = cell.attack.digest if cell.attack else ""
    return attack, cell.threat, cell.max_passes, cell.precision, cell.seed, tag


def _study(group: Sequence[tuple[Row, Any]], labels: Labels, noise: Mapping[str, list[Any]]) -> Study:
    robust = {labels(row.cell.model): float(row.masks().robust.mean()) for row, _ in group}
    values = {labels(row.cell.model): neurons(measured) for row, measured in group}
    shaken = {labels(row.cell.model): tuple(map(neurons, noise.get(row.key, ()))) for row, _ in group}
    cell = group[0][0].cell
    threat = f"{NORMS[cell.threat.norm]} ε = {format_eps(cell.threat.eps)}" if cell.threat else ""
    seed = "" if cell.seed is None else f", seed {cell.seed}"
    order = sorted(robust, key=lambda name: robust[name])
    return Study(
        f"{cell.dataset.name}: sensitivity of neurons under {labels.attack(cell)}, {threat}{seed}",
        {name: values[name] for name in order}, {name: robust[name] for name in order}, shaken,
    )  # fmt: skip
