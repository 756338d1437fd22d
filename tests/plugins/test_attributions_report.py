"""The report `attributions`, and the grid that it was made for, from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import benchbox
from benchbox.config import Settings
from benchbox.registry import Registry
from benchbox.results import Measured, Results
from benchbox.runner import run
from benchbox_reports.explained import Explained
from benchbox_reports.explained_figure import side_by_side
from benchbox_reports.explained_page import counted, quality_section, statistics_section

GRID = Path(__file__).parents[2] / "grids" / "attributions-digits.toml"


def measured() -> Measured:
    """What a probe might have told of three examples, of which the last is misled, as a database gives it."""
    return {
        "*": {
            "examples": 3.0, "pairs": 2.0, "misled": 1.0, "lrp:clean.gini.median": 0.2,
            "lrp:adversarial.gini.median": 0.75, "lrp:gini.auroc": 0.875, "lrp:cosine.median": -0.5,
            "lrp:clean.not-finite": 1.0, "lrp:adversarial.not-finite": 0.0,
        },
        "0": {"pair": 1.0, "misled": 0.0, "lrp:clean.gini": 0.1, "lrp:adversarial.gini": 0.4, "lrp:cosine": 0.9},
        "1": {"pair": 0.0, "misled": 0.0, "lrp:clean.gini": None, "lrp:adversarial.gini": 0.5, "lrp:cosine": None},
        "2": {"pair": 1.0, "misled": 1.0, "lrp:clean.gini": 0.3, "lrp:adversarial.gini": 0.75, "lrp:cosine": -0.5},
    }  # fmt: skip


def test_adversarial_values_are_those_of_the_misled_and_clean_ones_all_that_are_finite() -> None:
    found = Explained.of(measured())

    assert found.methods == ["lrp"]
    assert found.counts == {"examples": 3, "pairs": 2, "misled": 1}
    assert found.values["lrp", "clean", "gini"].tolist() == [0.1, 0.3]
    assert found.values["lrp", "adversarial", "gini"].tolist() == [0.75]
    assert (found.names(), found.similarities()) == (["gini"], ["cosine"])


def test_the_tables_hold_medians_aurocs_and_what_was_left_out() -> None:
    found = Explained.of(measured())

    page = "\n".join([counted(found), *statistics_section(found)])

    assert "3 examples, 2 of them classified correctly, 1 misled" in page
    assert "not finite and left out: lrp, clean: 1." in page
    lines = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in page.splitlines() if line[:1] == "|"}
    assert lines["gini"] == "0.2 → 0.75 (0.88)"
    assert lines["cosine"] == "-0.5"


def test_what_is_undefined_is_a_dash() -> None:
    values = measured()
    values["*"] |= {"misled": 0.0, "lrp:adversarial.gini.median": None, "lrp:gini.auroc": None}
    values["2"]["misled"] = 0.0
    found = Explained.of(values)

    assert "0.2 → – (–)" in "\n".join(statistics_section(found))
    assert "0.2 → –" in quality_section(found)[0]
    assert len(side_by_side("nobody misled", found, ["gini"]).axes) == 1


# ------------------------------------------------------------------------------------------------ from end to end


class Silent:
    """A progress display that says nothing."""

    def begin(self, *_: Any) -> None: ...

    finished = warn = begin

    def end(self) -> None: ...


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the shipped grid."""
    folder = tmp_path_factory.mktemp("attributions")
    settings = Settings(database=f"sqlite:///{folder}/r.db", output=folder, data_dir=folder, executor="inline")
    summary = run(GRID, settings, Registry.discover(), Silent())
    assert (summary.computed, summary.failures) == (4, [])
    return benchbox.open_results(settings.database)


def test_the_shipped_grid_measures_both_probes_in_every_cell(studied: Results) -> None:
    for probe in ("attribution-statistics", "attribution-quality"):
        found = studied.measured(probe)
        assert len(found) == 4
        for row, _, values in found:
            assert not row.flags
            count = int(values["*"]["examples"] or 0)
            success = studied.record(row.key).success[:count]
            assert values["*"]["misled"] == success.sum()
            assert [values[str(number)]["misled"] for number in range(count)] == success.tolist()


def test_pgd_spreads_input_times_gradient_over_more_pixels_and_noise_of_its_size_does_not(studied: Results) -> None:
    """What the grid is for: on the standard network the Gini index tells the two apart, oblivious as PGD is of it."""
    gini = {
        row.cell.attack.name: values["*"]["input-x-gradient:gini.auroc"]
        for row, _, values in studied.measured("attribution-statistics", attack=["pgd", "uniform-noise"])
        if row.cell.attack and row.cell.model.options["weights"] == "standard"
    }
    alike = {
        (row.cell.attack.name): np.median([v["input-x-gradient:spearman"] for s, v in values.items() if s != "*"])
        for row, _, values in studied.measured("attribution-statistics")
        if row.cell.attack and row.cell.model.options["weights"] == "standard"
    }

    assert gini["pgd"] is not None
    assert gini["pgd"] < 0.35
    assert alike["pgd"] < alike["uniform-noise"]


def test_the_report_is_a_page_with_a_picture_per_probe_and_cell(studied: Results, tmp_path: Path) -> None:
    report = Registry.discover().create("report", "attributions", {"statistics": ["gini", "entropy"]})

    page, *figures = report.render(studied, tmp_path)

    assert page.name == "attributions-digits-linf-0.1.md"
    text = page.read_text(encoding="utf-8")
    assert text.count("\n## ") == len(figures) == 8
    ((_, _, values),) = [
        found for found in studied.measured("attribution-statistics", attack="pgd")
        if found[0].cell.model.options["weights"] == "standard"
    ]  # fmt: skip
    section = text.split("## digits-cnn (standard), pgd, seed 0: statistics")[1]
    assert f"({values['*']['feature-ablation:gini.auroc']:.2f})" in section.split("##")[0]
    for figure in figures:
        assert f"]({figure.name})" in text
        assert np.asarray(Image.open(figure)).std() > 10


def test_results_without_the_probes_are_no_report(
    grid_file: Callable[..., Path], settings: Settings, toys: Registry, tmp_path: Path
) -> None:
    run(grid_file(), settings, toys, Silent())
    report = toys.create("report", "attributions", {})

    assert report.render(benchbox.open_results(settings.database), tmp_path) == []


def test_a_method_that_the_model_does_not_support_is_a_flag_that_names_the_layers(
    grid_file: Callable[..., Path], settings: Settings
) -> None:
    text = GRID.read_text().split("[[probe]]")[0].replace("examples = 150", "examples = 20")
    probe = '[[probe]]\nname = "attribution-statistics"\nattributions = [{ method = "grad-cam", layer = "conv9" }]\n'

    run(grid_file(text=text + probe), settings, Registry.discover(), Silent())

    for row in benchbox.open_results(settings.database).rows():
        (flag,) = row.flags
        assert flag.name == "probe-failed"
        assert "no layer 'conv9'" in flag.detail
        assert "'conv1'" in flag.detail
