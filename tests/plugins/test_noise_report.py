"""The report of noise on the weights, and its summaries on curves that are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchbox.registry import Registry
from benchbox.results import Results, Row
from benchbox_reports.noise_scores import half_level, noise_area
from made_rows import made_row, part, published

LEVELS = [1e-3, 1e-2, 1e-1, 1.0]


# ------------------------------------------------------------------------------------------------ summaries


def test_noise_that_does_nothing_has_area_one_and_no_half_level() -> None:
    assert noise_area(LEVELS, [0.9] * 4, 0.9) == pytest.approx(1)
    assert half_level(LEVELS, [0.9] * 4, 0.9, 0.1) == math.inf


def test_accuracy_that_falls_evenly_in_the_logarithm_has_area_and_half_level_in_the_middle() -> None:
    levels = np.geomspace(1e-4, 1.0, 10).tolist()
    falling = np.linspace(0.9, 0.1, 10).tolist()

    assert half_level(levels, falling, 0.9, 0.1) == pytest.approx(1e-2)
    assert noise_area(levels, falling, 0.9) == pytest.approx(0.5 / 0.9)


def test_areas_do_not_depend_on_how_densely_a_part_is_sampled() -> None:
    assert noise_area([0.01, 0.1, 1.0], [1.0, 0.5, 0.0], 1.0) == pytest.approx(0.5)
    assert noise_area([0.01, 0.1, 0.1 * 10**0.5, 1.0], [1.0, 0.5, 0.25, 0.0], 1.0) == pytest.approx(0.5)


def test_the_half_level_is_where_accuracy_first_falls_so_far() -> None:
    assert half_level(LEVELS, [0.9, 0.5, 0.9, 0.1], 0.9, 0.1) == pytest.approx(1e-2)
    assert half_level(LEVELS, [0.3, 0.1, 0.1, 0.1], 0.9, 0.1) == LEVELS[0]


def test_summaries_of_nothing_are_undefined() -> None:
    assert noise_area([0.1], [0.5], 0.9) is None
    assert noise_area(LEVELS, [0.0] * 4, 0.0) is None
    assert half_level(LEVELS, [0.1] * 4, 0.1, 0.1) is None


# ------------------------------------------------------------------------------------------------ the report


def verdicts(share: float) -> str:
    right = round(20 * share)
    return "1" * right + "0" * (20 - right)


def point(layer: str, level: float, draw: int, clean: float, attacked: bool = True) -> Row:
    options = {"layer": layer, "mode": "relative-norm", "level": level, "draw": draw, "include_bias": False}
    perturbation = part("weight_perturbation", "weight-noise", **options)
    robust = verdicts(clean / 2) if attacked else None
    return made_row(clean=verdicts(clean), robust=robust, perturbation=perturbation, prefix_seed=0)


def study(tmp_path: Path, intact: bool = True) -> Results:
    """Two draws of noise on two layers: conv2 falls to nothing at the last level, conv1 not at all."""
    rows = [made_row(clean=verdicts(1.0), robust=verdicts(0.5))] if intact else []
    for draw, shift in ((0, 0.1), (1, -0.1)):
        rows += [point("conv1", level, draw, 1.0) for level in LEVELS]
        rows += [
            point("conv2", level, draw, share) for level, share in zip(LEVELS, (1, 1, 0.5 + shift, 0), strict=True)
        ]
    return published(rows, tmp_path)


def render(results: Results, out: Path, **options: object) -> list[Path]:
    return Registry.discover().create("report", "noise-scores", options).render(results, out)


def test_the_most_critical_layer_comes_first(tmp_path: Path) -> None:
    figure, page = render(study(tmp_path), tmp_path, classes=1000)

    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = [[text.strip() for text in line.strip("|").split("|")] for line in page.read_text().splitlines()
             if line.startswith("|")]  # fmt: skip
    assert lines[2][:4] == ["conv2", "4", "2", "0.667"]
    assert float(lines[2][4]) == pytest.approx(0.1, abs=1e-3)
    assert lines[2][5:] == ["0.141", "0.667"]
    assert lines[3] == ["conv1", "4", "2", "1.000", "∞", "0.000", "1.000"]


def test_where_nothing_was_attacked_there_is_no_column_for_it(tmp_path: Path) -> None:
    noisy = [point("conv1", level, draw, 1.0, attacked=False) for level in LEVELS for draw in (0, 1)]
    alone = published([made_row(clean=verdicts(1.0)), *noisy], tmp_path)

    _, page = render(alone, tmp_path, classes=10)

    table = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert table[0].split("|")[-2].strip() == "largest sd"
    assert [text.strip() for text in table[2].split("|")[1:-1]] == ["conv1", "4", "2", "1.000", "∞", "0.000"]


def test_without_the_number_of_classes_there_is_no_half_level(tmp_path: Path) -> None:
    _, page = render(study(tmp_path), tmp_path)

    assert "missing" in page.read_text()


def test_without_the_intact_model_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    assert render(study(tmp_path, intact=False), out) == []
    assert list(out.iterdir()) == []
