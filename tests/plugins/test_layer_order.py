"""Reports list layers as they follow one another in the network: fc, the last one, is not before layer1."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from benchbox.domain import Component, Measurement, Record
from benchbox.errors import StoreError
from benchbox.registry import Registry
from benchbox.results import Results, Row
from benchbox.systems import systems
from benchbox_reports.layer_order import in_order, positions
from benchbox_reports.noise_curves import curves
from made_rows import FailingSource, made_row, part

LAYERS = ["conv1", "layer1.0.conv1", "layer10.conv1", "fc"]
STUDIES = {
    "synaptic-scores": ("synaptic-filter", {"filter": "high-pass", "range": "layer", "scale": "value"}, "threshold"),
    "noise-curves": ("weight-noise", {"mode": "relative-norm", "include_bias": False}, "level"),
}


@dataclass(frozen=True)
class Measured(FailingSource):
    """Rows whose networks were measured by a probe."""

    names: dict[str, float] = field(default_factory=dict)  # values of every layer
    placed: bool = True

    def measurements(self, row: Row) -> list[Measurement]:
        found = []
        for place, layer in sorted(enumerate(LAYERS), key=lambda item: item[1]):  # as the database gives them
            values = self.names | ({"position": float(place)} if self.placed else {})
            found += [Measurement("weight-norms#1", layer, name, value) for name, value in values.items()]
        return found

    def record(self, row: Row) -> Record:
        raise StoreError("verdicts alone")


def perturbed(study: str, layer: str, level: float) -> Component:
    name, options, swept = STUDIES[study]
    return part("weight_perturbation", name, layer=layer, **options, **{swept: level})  # type: ignore[arg-type]


def study(name: str, placed: bool = True) -> Measured:
    intact = made_row(clean="1111", attack=None)
    rows = [
        made_row(clean="1100", attack=None, perturbation=perturbed(name, layer, level), prefix_seed=0)
        for layer in sorted(["*", *LAYERS]) for level in (0.1, 0.5)
    ]  # fmt: skip
    return Measured([intact, *rows], placed=placed)


def test_layers_stand_at_their_places_and_patterns_behind_them() -> None:
    (intact, *_) = systems(study("noise-curves").held[:1])
    places = positions(Results(study("noise-curves")), intact)

    assert in_order(["*", "conv1", "fc", "layer*", "layer1.0.conv1", "layer10.conv1"], places) == [
        *LAYERS,
        "*",
        "layer*",
    ]


def test_without_places_the_order_is_that_of_the_results() -> None:
    unplaced = study("noise-curves", placed=False)

    assert positions(Results(unplaced), systems(unplaced.held[:1])[0]) == {}
    assert in_order(["fc", "conv1"], {}) == ["fc", "conv1"]


def test_a_table_of_filtering_scores_lists_layers_in_the_order_of_the_network(tmp_path: Path) -> None:
    _, page, *_ = Registry.discover().create("report", "synaptic-scores", {}).render(
        Results(study("synaptic-scores")), tmp_path
    )  # fmt: skip

    lines = [line.split("|")[1].strip() for line in page.read_text().splitlines() if line.startswith("|")]
    assert lines[2:] == [*LAYERS, "all layers"]


@pytest.mark.parametrize("placed", [True, False])
def test_curves_of_noise_are_in_the_order_of_the_network(placed: bool) -> None:
    source = study("noise-curves", placed=placed)
    intact, *points = systems(source.held)

    found = curves(points, positions(Results(source), intact))

    assert list(found) == ([*LAYERS, "*"] if placed else sorted(["*", *LAYERS]))


def test_a_table_of_models_lists_layers_in_the_order_of_the_network(tmp_path: Path) -> None:
    row = replace(made_row(clean="1111", attack=None), evaluation_id=1)
    source = Measured([row], names={"frobenius": 1.0, "spectral": 1.0})
    report = Registry.discover().create("report", "model-table", {})

    page, table = report.render(Results(source), tmp_path)

    head = next(line for line in page.read_text().splitlines() if "fc" in line)
    assert [name.strip() for name in head.strip("|").split("|")] == ["model", *LAYERS]
    columns = [name for name in table.read_text().splitlines()[0].split(",") if name.startswith("frobenius.")]
    assert columns == [*(f"frobenius.{layer}" for layer in LAYERS), "frobenius.all"]
