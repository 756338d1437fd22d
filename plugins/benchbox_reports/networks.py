"""The networks among results: one for each model and weight perturbation, with all that is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchbox.labels import Labels
from benchbox.results import Measured, Results, Row

ALL = "*"
"""The probes' subject for all layers together."""
PROBES = {
    "weight-norms": {
        name: name for name in ("frobenius", "spectral", "total", "sum-of-norms", "parameters", "position")
    },
    "gradient-norms": {"clean.weights": "gradient"},
}
"""Which values of which probe are taken, and what they are called here."""


@dataclass(slots=True)
class NetworkRow:
    """A network without a defense. Accuracies are shares; None where a split was not evaluated."""

    label: str
    perturbed: bool
    train: float | None = None
    trains: int | None = None  # how many images that is
    test: float | None = None
    tests: int | None = None
    gradient_split: str | None = None  # where the gradients were taken; the train split where there is a choice
    norms: dict[str, dict[str, float | None]] = field(default_factory=dict)  # by layer, then by quantity

    @property
    def gap(self) -> float | None:
        """The generalisation gap."""
        return None if self.train is None or self.test is None else self.train - self.test

    def value(self, layer: str, name: str) -> float | None:
        return self.norms.get(layer, {}).get(name)


def networks(results: Results) -> dict[str, list[NetworkRow]]:
    """The networks by the name of their data set, in the results' order.

    Where one was evaluated on several numbers of examples of a split, the largest counts.
    """
    rows = results.rows(defense=None)
    labels = Labels(row.cell for row in rows)
    measured = _measured(results)
    found: dict[str, dict[tuple[Any, ...], NetworkRow]] = {}
    for row in rows:
        cell = row.cell
        identity = (cell.model.digest, cell.weight_perturbation and cell.weight_perturbation.digest, cell.prefix_seed)
        network = found.setdefault(cell.dataset.name, {}).setdefault(
            identity, NetworkRow(labels.system(cell).line, cell.weight_perturbation is not None)
        )
        _add_accuracy(network, row)
        for probe, by_layer in measured.get(row.key, {}).items():
            _add_norms(network, str(row.cell.dataset.options.get("split", "test")), probe, by_layer)
    return {name: list(by_identity.values()) for name, by_identity in found.items()}


def _measured(results: Results) -> dict[str, dict[str, Measured]]:
    """By key of the cell and probe: values by layer and name."""
    found: dict[str, dict[str, Measured]] = {}
    for probe in PROBES:
        for row, _, values in results.measured(probe, defense=None):
            found.setdefault(row.key, {}).setdefault(probe, values)
    return found


def _add_accuracy(network: NetworkRow, row: Row) -> None:
    count = row.cell.examples
    if row.cell.dataset.options.get("split") == "train":
        if count > (network.trains or 0):
            network.train, network.trains = float(row.masks().clean_correct.mean()), count
    elif count > (network.tests or 0):
        network.test, network.tests = float(row.masks().clean_correct.mean()), count


def _add_norms(network: NetworkRow, split: str, probe: str, by_layer: Measured) -> None:
    if probe == "gradient-norms":
        if network.gradient_split in (split, "train"):
            return
        network.gradient_split = split
    for layer, values in by_layer.items():
        taken = {own: values[name] for name, own in PROBES[probe].items() if name in values}
        if taken:
            network.norms.setdefault(layer, {}).update(taken)
