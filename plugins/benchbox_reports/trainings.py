"""Filtering scores of several trainings of a network: epochs, initialisations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchbox_reports.layer_sweeps import Study
from benchbox_reports.synaptic_report import SynapticOptions, scores_of
from benchbox_reports.synaptic_scores import Scores

KEPT = re.compile(r"(?:^|.*/)(?P<training>[^/]+)-epoch-(?P<epoch>\d+)\.safetensors$")
"""What `benchbox train` calls the weights that a recipe keeps: training and epoch."""


@dataclass(frozen=True, slots=True)
class Training:
    """The scores of all epochs, or of models that are no epochs of one training.

    ``columns`` by their heads, epochs in order; in each, the scores of every initialisation, layer by layer.
    """

    title: str
    columns: Mapping[str, Sequence[Mapping[str, Scores]]]
    epochs: bool

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(layer for models in self.columns.values() for scores in models for layer in scores))

    def values(self, head: str, layer: str, field: str) -> list[float]:
        """A score of one layer in each initialisation; undefined ones are left out."""
        found = (getattr(scores[layer], field) for scores in self.columns[head] if layer in scores)
        return [value for value in found if value is not None]


def trainings(found: Sequence[Study], options: SynapticOptions) -> list[Training]:
    """The studies of each filter that met two models or more."""
    by_filter: dict[str, list[Study]] = {}
    for study in found:
        by_filter.setdefault(study.filter, []).append(study)
    return [_training(title, group, options) for title, group in by_filter.items() if len(group) > 1]


def _training(title: str, group: Sequence[Study], options: SynapticOptions) -> Training:
    epochs = [int(match["epoch"]) for study in group if (match := KEPT.match(study.weights or ""))]
    columns: dict[str, list[Mapping[str, Scores]]] = {}
    if len(epochs) < len(group):
        for study in group:
            columns.setdefault(study.model, []).append(scores_of(study, options))
        return Training(title, columns, epochs=False)
    for epoch, study in sorted(zip(epochs, group, strict=True), key=lambda pair: pair[0]):
        columns.setdefault(f"epoch {epoch}", []).append(scores_of(study, options))
    return Training(title, columns, epochs=True)
