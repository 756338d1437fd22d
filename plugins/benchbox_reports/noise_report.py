"""Noise on the weights, layer by layer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from tabulate import tabulate

from benchbox import api
from benchbox.errors import StoreError
from benchbox.labels import Labels
from benchbox.render import markdown_text
from benchbox.results import Results, Row
from benchbox.sweeps import intact_of, robust_under, shared_attacks, split_sweeps, sweep_names
from benchbox.systems import System, systems
from benchbox.tables import MISSING
from benchbox_reports.figures import by_figure
from benchbox_reports.noise_scores import half_level, noise_area

NOISE = "weight-noise"
HEADERS = ("layer", "levels", "draws", "AUC clean", "half level", "largest sd", "AUC robust")


@dataclass(frozen=True, slots=True)
class NoiseCurve:
    """Mean accuracies of one layer over the draws, at rising levels above 0; ``spread`` is a level's largest sd."""

    levels: Sequence[float]
    draws: int  # the fewest of any level
    clean: Sequence[float]
    spread: float | None  # None for a single draw
    robust: Sequence[float] | None


class NoiseScores(api.Report):
    """Which layers stand noise: the area under accuracy against level, and the level that halves accuracy.

    A table per data set and threat, for each model and mode of ``weight-noise``, the most critical layer first.
    """

    name = "noise-scores"

    class Options(api.Options):
        classes: int | None = Field(None, ge=2, description="for chance level; by default those among the examples")

    options: Options

    def render(self, results: Results, out: Path) -> list[Path]:
        """See :meth:`benchbox.api.Report.render`."""
        paths = []
        for stem, rows in by_figure(results.rows(), radius=True).items():
            tables = self._tables(results, rows)
            if tables:
                path = out / f"{self.name}-{stem}.md"
                path.write_text(
                    f"# Noise on the weights, {markdown_text(stem)}\n\n{EXPLAINED}" + "".join(tables), encoding="utf-8"
                )
                paths.append(path)
        return paths

    def _tables(self, results: Results, rows: Iterable[Row]) -> list[str]:
        found = [row for row in rows if row.cell.weight_perturbation is None or _is_noise(row)]
        labels = Labels(row.cell for row in found)
        alone, groups = split_sweeps(systems(found))
        tables = []
        for group in groups:
            intact = intact_of(group, alone)
            if intact is None:
                continue
            classes = self.options.classes or _classes(results, intact)
            chance = 1 / classes if classes and classes > 1 else None
            robust = robust_under(intact, shared_attacks(group))
            lines = [
                (
                    _half(curve, intact.clean.value, chance),
                    _line(name, curve, intact, robust.value if robust else None, chance),
                )
                for name, curve in curves(group).items()
            ]
            lines.sort(key=lambda line: float("inf") if line[0] is None else line[0])
            align = ["left", *["right"] * (len(HEADERS) - 1)]
            table = tabulate(
                [line for _, line in lines], HEADERS, tablefmt="pipe", colalign=align, disable_numparse=True
            )
            tables.append(f"\n## {markdown_text(sweep_names(group, labels).line)}\n\n{table}\n")
        return tables


EXPLAINED = (
    "AUC is the mean of accuracy, relative to the intact model's, over the logarithm of the level. The half level is "
    "that at which clean accuracy above chance has fallen to half (∞: it never does). Accuracies are means over the "
    "draws; the largest sd is that of clean accuracy over the draws of one level, one model, so that it says nothing "
    "about other trainings. The most critical layer comes first.\n"
)


def curves(group: Iterable[System]) -> dict[str, NoiseCurve]:
    """The curves of the points of one sweep by layer, with other options that differ; level 0 has no logarithm."""
    group = list(group)
    shared = shared_attacks(group)
    lines: dict[str, dict[float, list[System]]] = {}
    for system in group:
        options = _options(system)
        if options.get("level", 0) > 0:
            extra = "".join(f", {name}" for name in ("include_bias", "include_batch_norm") if options.get(name))
            name = str(options.get("layer", "*")) + extra.replace("include_", "with ")
            lines.setdefault(name, {}).setdefault(float(options["level"]), []).append(system)
    return {name: _curve(dict(sorted(by_level.items())), shared) for name, by_level in lines.items()}


def _curve(by_level: Mapping[float, Sequence[System]], attacks: Any) -> NoiseCurve:
    clean = [[system.clean.value for system in points] for points in by_level.values()]
    robust = [
        [share.value for system in points if (share := robust_under(system, attacks))] for points in by_level.values()
    ]
    draws = min(map(len, clean))
    return NoiseCurve(
        levels=list(by_level),
        draws=draws,
        clean=[statistics.fmean(values) for values in clean],
        spread=max(statistics.stdev(values) for values in clean) if draws > 1 else None,
        robust=[statistics.fmean(values) for values in robust] if all(robust) else None,
    )


def _half(curve: NoiseCurve, intact: float, chance: float | None) -> float | None:
    return None if chance is None else half_level(curve.levels, curve.clean, intact, chance)


def _line(name: str, curve: NoiseCurve, intact: System, robust: float | None, chance: float | None) -> list[str]:
    half = _half(curve, intact.clean.value, chance)
    area = noise_area(curve.levels, curve.clean, intact.clean.value)
    robust_area = noise_area(curve.levels, curve.robust, robust) if curve.robust and robust else None
    layer = name.replace("*", "all layers", 1) if name.startswith("*") else name
    texts = ["∞" if half == float("inf") else _number(half, ".3g"), _number(curve.spread), _number(robust_area)]
    return [markdown_text(layer), str(len(curve.levels)), str(curve.draws), _number(area), *texts]


def _number(value: float | None, form: str = ".3f") -> str:
    return MISSING if value is None else format(value, form)


def _is_noise(row: Row) -> bool:
    return row.cell.weight_perturbation is not None and row.cell.weight_perturbation.name == NOISE


def _options(system: System) -> Mapping[str, Any]:
    perturbation = system.cell.weight_perturbation
    return perturbation.options if perturbation else {}


def _classes(results: Results, system: System) -> int | None:
    try:
        return len(np.unique(results.record(system.rows[0].key).label))
    except StoreError:  # published results hold verdicts alone
        return None
