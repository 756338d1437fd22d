"""The report of filtering scores across epochs and initialisations, on sweeps whose scores are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_synaptic_report import NONZERO, THRESHOLDS, Counted, verdicts

from benchbox.registry import Registry
from benchbox.results import Results, Row
from benchbox_reports.synaptic_scores import Scores
from benchbox_reports.trainings import Training
from benchbox_reports.trainings_figure import draw
from made_rows import made_row, part


def rows_of(weights: str, slope: float, arch: str) -> list[Row]:
    """A network whose clean accuracy falls by ``slope`` times the share removed: S clean is (1 - slope) / 2."""
    model = part("model", "cnn", weights=weights, arch=arch, mean=[0.5], init_seed=0)
    rows = [made_row(clean=verdicts(1.0), robust=verdicts(0.5), model=model)]
    for threshold in THRESHOLDS:
        perturbation = part(
            "weight_perturbation", "synaptic-filter", layer="conv1", filter="high-pass", threshold=threshold,
            range="layer", scale="value", pulse_width=1 / 24,
        )  # fmt: skip
        clean = verdicts(1 - slope * threshold)
        rows.append(made_row(clean=clean, robust=verdicts(0.5), model=model, perturbation=perturbation))
    return rows


def results(slopes: dict[str, float], arch: Callable[[str], str] = lambda weights: "net") -> Results:
    rows = [row for weights, slope in slopes.items() for row in rows_of(weights, slope, arch(weights))]
    kept = {0: 1.0} | dict(enumerate((1 - threshold for threshold in THRESHOLDS), start=1))
    nonzero = {
        row.key: NONZERO | {"conv1": round(NONZERO["conv1"] * kept[place % 6])} for place, row in enumerate(rows)
    }
    return Results(Counted(rows, nonzero=nonzero))


def render(results: Results, out: Path, **options: Any) -> list[Path]:
    return Registry.discover().create("report", "synaptic-trainings", options).render(results, out)


def table(text: str) -> list[list[str]]:
    """The first table, without the line below its heads."""
    first = text[: text.index("## S adv")]
    lines = [line.strip("|").split("|") for line in first.splitlines() if line.startswith("|")]
    return [[field.strip() for field in line] for line in [lines[0], *lines[2:]]]


def test_epochs_are_columns_in_order_and_initialisations_are_averaged(tmp_path: Path) -> None:
    slopes = {"runs/a-epoch-10.safetensors": 1.0, "runs/a-epoch-2.safetensors": 0.0,
              "runs/b-epoch-10.safetensors": 0.8, "runs/b-epoch-2.safetensors": 0.4}  # fmt: skip

    figure, page = render(results(slopes), tmp_path, tolerance=0.1)

    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = page.read_text()
    assert "over 2 initialisations" in text
    assert table(text) == [
        ["layer", "epoch 2", "epoch 10"],
        ["conv1", "+0.400 ± 0.141 A", "+0.050 ± 0.071 R"],  # (0.5 + 0.3) / 2 and (0.0 + 0.1) / 2
    ]
    assert "Attacked within L∞ ε = 0.1" in text


def test_networks_are_kept_apart(tmp_path: Path) -> None:
    kept = {f"runs/{name}-epoch-{epoch}.safetensors": slope
            for name, slope in (("a", 0.0), ("b", 1.0)) for epoch in (1, 2)}  # fmt: skip

    found = render(results(kept, arch=lambda weights: f"net-{weights[5]}"), tmp_path)

    pages = [path for path in found if path.suffix == ".md"]
    titles = [page.read_text().splitlines()[0].split(": ")[1] for page in pages]
    assert [title.split(" · ")[0] for title in titles] == ["cnn (net-a)", "cnn (net-b)"]
    assert [table(page.read_text())[1][1] for page in pages] == ["+0.500 A", "+0.000 R"]


def test_models_that_are_no_epochs_stand_side_by_side_without_a_figure(tmp_path: Path) -> None:
    (page,) = render(results({"standard": 1.0, "pgd": 0.0}), tmp_path)

    text = page.read_text()
    assert table(text) == [
        ["layer", "cnn (pgd)", "cnn (standard)"], ["conv1", "+0.500 A", "+0.000 R"]
    ]  # fmt: skip
    assert "initialisations" not in text


@pytest.mark.parametrize("slopes", [{}, {"standard": 1.0}])
def test_there_is_nothing_to_compare_with_one_model(tmp_path: Path, slopes: dict[str, float]) -> None:
    assert render(results(slopes), tmp_path) == []


@pytest.mark.parametrize(
    ("count", "labels", "heights"),
    [(3, ["a", "b", "c"], [[0.1, 0.2]] * 3), (8, ["epoch 1", "epoch 2"], [[0.1] * 8, [0.2] * 8])],
)
def test_more_layers_than_colours_are_an_axis(count: int, labels: list[str], heights: list[list[float]]) -> None:
    columns = {
        f"epoch {epoch}": [
            {layer: Scores(epoch / 10, None, None, None, 0.5, "simpson") for layer in "abcdefgh"[:count]}
        ]
        for epoch in (1, 2)
    }

    (panel,) = draw(Training("t", columns, epochs=True), "").axes

    assert panel.get_legend_handles_labels()[1] == labels
    assert [list(bars.lines[0].get_ydata()) for bars in panel.containers] == heights
