"""The report of filtering scores: what it says of sweeps that were made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchbox.domain import Measurement
from benchbox.errors import StoreError
from benchbox.registry import Registry
from benchbox.results import Results, Row
from made_rows import FailingSource, made_row, part, published

THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0)
NONZERO = {"conv1": 100, "linear1": 400}


@dataclass(frozen=True)
class Counted(FailingSource):
    """Rows with what the probe counted, by key."""

    nonzero: dict[str, dict[str, int]] = field(default_factory=dict)

    def measurements(self, row: Row) -> list[Measurement]:
        counts = self.nonzero.get(row.key, {})
        return [Measurement("weight-density#1", layer, "nonzero", float(count)) for layer, count in counts.items()]

    def record(self, row: Row):
        raise StoreError("published results hold verdicts alone")


def verdicts(share: float) -> str:
    """Verdicts on 20 examples, of which this share is right."""
    right = round(20 * share)
    return "1" * right + "0" * (20 - right)


def point(layer: str, threshold: float, clean: float, robust: float, source: str | None = None) -> Row:
    perturbation = part(
        "weight_perturbation", "synaptic-filter", layer=layer, filter="high-pass", threshold=threshold,
        range="layer", scale="value", pulse_width=1 / 24,
    )  # fmt: skip
    return made_row(clean=verdicts(clean), robust=verdicts(robust), perturbation=perturbation, source=source)


def study(intact: Row | None, counted: bool = True) -> Results:
    """conv1 loses accuracy in proportion to its weights, linear1 clean accuracy half as fast and none under attack."""
    rows, nonzero = [] if intact is None else [intact], {}
    for threshold in THRESHOLDS:
        left = 1 - threshold
        for layer, clean, robust in (("linear1", 1 - threshold / 2, 0.5), ("conv1", left, left / 2)):
            row = point(layer, threshold, clean, robust)
            rows.append(row)
            nonzero[row.key] = NONZERO | {layer: round(NONZERO[layer] * left)}
    if intact:
        nonzero[intact.key] = NONZERO
    return Results(Counted(rows, nonzero=nonzero if counted else {}))


INTACT = made_row(clean=verdicts(1.0), robust=verdicts(0.5))


def render(results: Results, out: Path, **options: object) -> list[Path]:
    return Registry.discover().create("report", "synaptic-scores", options).render(results, out)


def table(page: Path) -> dict[str, list[str]]:
    """The lines of the table by layer."""
    lines = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return {fields[0].strip(): [text.strip() for text in fields[1:]] for fields in lines[2:]}


def test_scores_and_classes_of_a_sweep_by_hand(tmp_path):
    figure, page, curves = render(study(INTACT), tmp_path, classes=10)

    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert curves.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert table(page) == {
        "conv1": ["5", "0.500", "+0.000", "robust", "+0.000", "robust", "+0.000", "robust", "-0.056"],
        "linear1": ["5", "0.500", "+0.250", "antifragile", "+0.500", "antifragile", "+0.250", "antifragile", "+0.222"],
    }
    text = page.read_text()
    assert "On 20 examples under pgd (L∞ ε = 0.1)" in text
    assert "Fragile: below -0.05; antifragile: above 0.05" in text
    assert "by the rule: simpson" in text


def test_a_fixed_set_is_compared_with_the_intact_model_that_it_was_made_on(tmp_path):
    """The intact model meets its own examples white-box; what it had is the reference of a fixed set, too."""
    rows = [INTACT]
    nonzero = {INTACT.key: NONZERO}
    for threshold in THRESHOLDS:
        row = point("conv1", threshold, 1 - threshold, (1 - threshold) / 2, source="cnn")
        rows.append(row)
        nonzero[row.key] = NONZERO | {"conv1": round(100 * (1 - threshold))}

    _, page, _ = render(Results(Counted(rows, nonzero=nonzero)), tmp_path)

    assert "fixed set" in page.read_text().splitlines()[0]
    assert table(page)["conv1"][2:7:2] == ["+0.000"] * 3


def test_the_tolerance_and_the_first_step_are_options(tmp_path):
    _, page, _ = render(study(INTACT), tmp_path, tolerance=0.3, baseline="first-step", rule="trapezoid")

    assert [table(page)["linear1"][column] for column in (3, 5, 7)] == ["robust", "antifragile", "robust"]
    text = page.read_text()
    assert "relative to that at the first point" in text
    assert "by the rule: trapezoid" in text


def test_without_the_probe_only_the_difference_is_defined(tmp_path):
    _, page, _ = render(study(INTACT, counted=False), tmp_path)

    assert table(page)["linear1"] == [
        "5", "missing", "missing", "undefined", "missing", "undefined", "+0.250", "antifragile", "missing"
    ]  # fmt: skip
    assert "add the probe weight-density to the grid" in page.read_text()


def test_scores_of_a_model_that_is_always_wrong_are_undefined_and_it_says_so(tmp_path):
    _, page, _ = render(study(made_row(clean=verdicts(0.0), robust=verdicts(0.0))), tmp_path)

    assert set(table(page)["conv1"][1:]) == {"0.500", "missing", "undefined"}
    assert "The intact model has no clean accuracy" in page.read_text()
    assert "no accuracy left under attack" in page.read_text()


def test_a_layer_with_a_single_point_has_no_score(tmp_path):
    rows = [INTACT, *(point("conv1", threshold, 0.5, 0.5) for threshold in (0.0, 1.0)), point("linear1", 0.5, 0.5, 0.5)]

    _, page, _ = render(Results(Counted(rows)), tmp_path)

    assert table(page)["linear1"][0] == "1"
    assert "A sweep of one point has no area" in page.read_text()


def test_published_results_give_what_needs_no_measurements(tmp_path):
    rows = study(INTACT).rows()

    _, page, _ = render(published(rows, tmp_path), tmp_path)

    assert table(page)["linear1"][6] == "+0.250"


def test_filters_without_attacks_have_a_clean_score(tmp_path):
    rows = [made_row(clean=verdicts(1.0))]
    for threshold in THRESHOLDS:
        row = point("conv1", threshold, 1.0, 1.0)
        rows.append(made_row(clean=verdicts(1.0), perturbation=row.cell.weight_perturbation))
    nonzero = {row.key: {"conv1": 10 - 2 * index} for index, row in enumerate(rows[1:])} | {rows[0].key: {"conv1": 10}}

    _, page, _ = render(Results(Counted(rows, nonzero=nonzero)), tmp_path)

    assert table(page)["conv1"][1:6] == ["0.600", "+0.400", "antifragile", "missing", "undefined"]


@pytest.mark.parametrize("intact", [None, INTACT], ids=["no intact model", "no filter"])
def test_there_is_no_report_without_both_an_intact_and_a_filtered_model(tmp_path, intact):
    results = study(None) if intact is None else Results(Counted([intact]))

    assert render(results, tmp_path) == []
    assert list(tmp_path.iterdir()) == []
