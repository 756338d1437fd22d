"""Reports: figures of many cells, written into a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchbox.errors import BenchboxError
from benchbox.registry import Registry
from benchbox.results import Results
from made_rows import made_row, part, published

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Two data sets under two norms, and a sweep on one of them."""
    rows = [
        made_row(dataset=dataset, norm=norm, eps=eps, attack=attack, clean="1110", robust="1100")
        for dataset in ("digits", "mnist") for norm, eps in (("linf", 0.1), ("linf", 8 / 255), ("l2", 0.5))
        for attack in ("pgd", "square")
    ]  # fmt: skip
    rows += [
        made_row(clean="1110", robust="1000", perturbation=part("weight_perturbation", "weight-noise", level=level))
        for level in (0.1, 0.2)
    ]
    return published(rows, tmp_path)


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("accuracy-curves", {f"{dataset}-{norm}" for dataset in ("digits", "mnist") for norm in ("linf", "l2")}),
        (
            "heat-map",
            {f"{data}-{threat}" for data in ("digits", "mnist") for threat in ("linf-0.1", "linf-8-255", "l2-0.5")},
        ),
        ("sweeps", {"digits-linf-0.1"}),
    ],
)
def test_a_report_writes_a_figure_for_what_belongs_together(registry, results, tmp_path, name, figures):
    report = registry.create("report", name, {})

    paths = report.render(results, tmp_path)

    assert {path.name for path in paths} == {f"{name}-{figure}.png" for figure in figures}
    assert all(path.read_bytes().startswith(PNG) for path in paths)


@pytest.mark.parametrize("name", ["accuracy-curves", "heat-map", "sweeps"])
def test_a_report_with_nothing_to_say_writes_nothing(registry, tmp_path, name):
    results = published([made_row(clean="11")], tmp_path / "published")
    out = tmp_path / "out"
    out.mkdir()

    assert registry.create("report", name, {}).render(results, out) == []
    assert list(out.iterdir()) == []


def test_figures_can_be_svg(registry, results, tmp_path):
    paths = registry.create("report", "sweeps", {"format": "svg"}).render(results, tmp_path)

    assert [path.suffix for path in paths] == [".svg"]
    assert b"<svg" in paths[0].read_bytes()


def test_results_on_other_examples_get_figures_of_their_own(registry, tmp_path):
    rows = [made_row(clean=clean, robust=clean) for clean in ("11", "1111")]

    paths = registry.create("report", "heat-map", {}).render(published(rows, tmp_path), tmp_path)

    assert sorted(path.name.split("-")[3] for path in paths) == ["2", "4"]


def test_an_unknown_format_is_an_error(registry):
    with pytest.raises(BenchboxError, match="'png' or 'svg'"):
        registry.create("report", "sweeps", {"format": "pdf"})
