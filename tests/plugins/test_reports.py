"""Reports: figures of many cells, written into a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchbox.errors import BenchboxError
from benchbox.registry import Registry
from benchbox.results import Results
from benchbox.transfers import matrices
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


@pytest.mark.parametrize("name", ["accuracy-curves", "heat-map", "neurons", "sweeps", "transfer-matrix"])
def test_a_report_with_nothing_to_say_writes_nothing(registry, tmp_path, name):
    results = published([made_row(clean="11")], tmp_path / "published")
    out = tmp_path / "out"
    out.mkdir()

    assert registry.create("report", name, {}).render(results, out) == []
    assert list(out.iterdir()) == []


@pytest.fixture
def transfers(tmp_path: Path) -> Results:
    """Two models by hand; the second is met by two seeds of an attack, and defended once."""
    return published(
        [
            made_row(model="weak", clean="1110", robust="0000"),
            made_row(model="weak", clean="1110", robust="0110", source="strong"),
            made_row(model="strong", clean="1111", robust="0111", seed=0),
            made_row(model="strong", clean="1111", robust="1011", seed=1),
            made_row(model="strong", clean="1111", robust="1110", source="weak", seed=0),
            made_row(model="strong", clean="1111", robust="0111", source="weak", seed=1),
            made_row(model="strong", clean="0000", robust="0000", defense="mask", source="weak"),
            made_row(model="strong", clean="1111", robust="0000", defense="mask", access="oblivious"),
            made_row(model="strong", clean="1111", robust="0000", attack="square"),
            made_row(
                model="strong", clean="1111", robust="0000", source="weak",
                perturbation=part("weight_perturbation", "weight-noise", level=0.1),
            ),
        ],
        tmp_path / "published",
    )  # fmt: skip


def test_a_transfer_matrix_holds_the_success_rates_among_attacked_inputs(transfers):
    (matrix,) = matrices(transfers.rows())

    def rate(source, evaluated):
        share = matrix.rates[matrix.sources.index(source)][matrix.evaluated.index(evaluated)]
        return share and (round(share.value * share.n), share.n)

    assert set(matrix.sources) == {"weak", "strong"}
    assert set(matrix.evaluated) == {"weak", "strong", "strong · mask"}
    assert rate("weak", "weak") == (3, 3)
    assert rate("strong", "weak") == (1, 3)
    assert rate("strong", "strong") == (2, 4)  # of either seed
    assert rate("weak", "strong") == (2, 4)
    assert rate("weak", "strong · mask") is None  # nothing was left to attack
    assert rate("strong", "strong · mask") is None  # oblivious attackers know nothing of the mask
    own = dict(zip(matrix.evaluated, matrix.own, strict=True))
    assert {name: line if line is None else matrix.sources[line] for name, line in own.items()} == {
        "weak": "weak", "strong": "strong", "strong · mask": None,
    }  # fmt: skip
    assert dict(zip(matrix.evaluated, matrix.beyond, strict=True)) == {"weak": 0, "strong": 1, "strong · mask": 0}


def test_the_transfer_matrix_is_a_table_and_a_picture(registry, transfers, tmp_path):
    paths = registry.create("report", "transfer-matrix", {}).render(transfers, tmp_path)

    assert [path.name for path in paths] == [
        "transfer-matrix-digits-linf-0.1-pgd.png", "transfer-matrix-digits-linf-0.1-pgd.md",
    ]  # fmt: skip
    figure, table = (path.read_bytes() for path in paths)
    assert figure.startswith(PNG)
    lines = table.decode().splitlines()
    assert lines[0] == "# digits: success of pgd in %, L∞ ε = 0.1"
    (weak,) = (line for line in lines if line.startswith("| weak"))
    assert "**100.0** [43.9, 100.0]" in weak
    assert "50.0 [15.0, 85.0]" in weak
    assert "missing" in weak
    assert "that is too weak): strong 1." in table.decode()


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
