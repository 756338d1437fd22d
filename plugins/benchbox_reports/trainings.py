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
    """The studies of each filter: the epochs of each network by themselves, all other models side by side.

    Only where there are two or more.
    """
    networks: dict[tuple[str, str], list[Study]] = {}
    for study in found:
        networks.setdefault((study.network, study.filter), []).append(study)
    groups: dict[tuple[str, bool], list[Study]] = {}
    for (network, name), group in networks.items():
        epochs = len(group) > 1 and all(KEPT.match(study.weights or "") for study in group)
        groups.setdefault((f"{network} · {name}" if epochs else name, epochs), []).extend(group)
    return [_training(*key, group, options) for key, group in groups.items() if len(group) > 1]


def _training(title: str, epochs: bool, group: Sequence[Study], options: SynapticOptions) -> Training:
    columns: dict[str, list[Mapping[str, Scores]]] = {}
    for study in sorted(group, key=_epoch) if epochs else group:
        head = f"epoch {_epoch(study)}" if epochs else study.model
        columns.setdefault(head, []).append(scores_of(study, options))
    return Training(title, columns, epochs)


def _epoch(study: Study) -> int:
    kept = KEPT.match(study.weights or "")
    return int(kept["epoch"]) if kept else 0
