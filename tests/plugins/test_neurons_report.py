"""The report `neurons`: its comparisons, its page, and the grid that it was made for, from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

import benchbox
from benchbox.config import Settings
from benchbox.registry import Registry
from benchbox.results import Results
from benchbox.runner import run
from benchbox_reports.channels import hypergeometric_tail, overlap, rank_correlation, ratio, top, top_count
from benchbox_reports.neuron_page import markdown
from benchbox_reports.neuron_pairs import correspondence, neurons, pair

GRID = Path(__file__).parents[2] / "grids" / "neurons-digits.toml"
NAN = float("nan")


# ---- comparing channels


def test_the_top_channels_are_the_highest_and_the_first_among_equals() -> None:
    assert top(np.array([0.1, 0.5, NAN, 0.5, 0.9]), 3) == [4, 1, 3]
    assert top(np.array([NAN, 0.0]), 2) == [1]


@pytest.mark.parametrize(
    ("width", "share", "count"), [(16, 0.1, 1), (64, 0.1, 6), (3, 0.1, 1), (100, 0.29, 29), (5, 1.0, 5)]
)
def test_the_top_share_of_a_layer_is_at_least_one_channel(width: int, share: float, count: int) -> None:
    assert top_count(width, share) == count


@pytest.mark.parametrize(
    ("shared", "width", "marked", "drawn"), [(0, 10, 3, 3), (1, 64, 6, 6), (4, 20, 5, 7), (3, 3, 3, 3)]
)
def test_the_chance_of_an_overlap_is_the_hypergeometric_tail(shared: int, width: int, marked: int, drawn: int) -> None:
    expected = scipy.stats.hypergeom.sf(shared - 1, width, marked, drawn)

    assert hypergeometric_tail(shared, width, marked, drawn) == pytest.approx(expected)


def test_overlaps_of_lists_that_are_known() -> None:
    rising = np.arange(10.0)

    same, none, all_ = overlap(rising, rising, 2), overlap(rising, -rising, 2), overlap(rising, -rising, 10)

    assert same is not None
    assert (same.shared, same.jaccard, same.expected) == (2, 1, 0.4)
    assert same.p == pytest.approx(1 / 45)  # one of the pairs among ten
    assert none is not None
    assert (none.shared, none.jaccard, none.p) == (0, 0, 1)
    assert all_ is not None
    assert (all_.jaccard, all_.p) == (1, 1)  # at k = width the lists say nothing
    assert overlap(rising, np.full(10, NAN), 2) is None


def test_the_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, 30).astype(float), rng.random(30)  # with ties
    one[3] = NAN
    known = ~np.isnan(one)

    assert rank_correlation(one, other) == pytest.approx(scipy.stats.spearmanr(one[known], other[known]).statistic)
    assert rank_correlation(np.zeros(5), other[:5]) is None
    assert rank_correlation(one[:2], other[:2]) is None


@pytest.mark.parametrize(
    ("one", "other", "found"), [(2.0, 1.0, 0.5), (0.0, 1.0, None), (NAN, 1.0, None), (1.0, NAN, None)]
)
def test_a_ratio_that_is_undefined_is_none(one: float, other: float, found: float | None) -> None:
    assert ratio(one, other) == found


# ---- models by hand


def measured(**layers: list[float]) -> Any:
    """Measurements in which σ of each layer's channels is as given, in the order of the forward pass."""
    values: dict[str, dict[str, float | None]] = {
        "*:*": {
            "pairs.all": 10.0, "pairs.broken": 4.0, "pairs.held": 6.0, "unmoved": 0.0,
            "dx.all": 0.1, "dx.broken": 0.05, "dx.held": 0.2,
        }
    }  # fmt: skip
    for position, (layer, sigmas) in enumerate(layers.items()):
        values[f"{layer}:*"] = {"position": float(position), "dead": float(sigmas.count(0.0))}
        for channel, sigma in enumerate(sigmas):
            forms = {"abs": sigma, "std": 2 * sigma, "abs.broken": sigma, "abs.held": 2 * sigma}
            values[f"{layer}:{channel}"] = {**forms, "abs.even": sigma, "abs.odd": -sigma}
    return dict(sorted(values.items()))  # as a database gives them


def test_layers_are_compared_in_the_order_in_which_they_run() -> None:
    standard = neurons(measured(stem=[1.0, 2.0, 3.0], block=[4.0, 0.0]))
    robust = neurons(measured(stem=[0.5, 1.0, 1.5], block=[0.0, 1.0]))

    stem, block = pair(standard, robust, share=0.4)

    assert (stem.layer, stem.channels, stem.k, stem.means["abs"], stem.ratios["abs"]) == ("stem", 3, 1, (2, 1), 0.5)
    assert (stem.overlap and stem.overlap.shared, stem.correlation) == (1, pytest.approx(1))
    assert (block.overlap and block.overlap.shared, block.correlation, block.dead) == (0, None, (1, 1))
    assert [half and half.shared for half in stem.stability] == [0, 0]
    assert standard.highest("std", 2) == [("block", 0, 8.0), ("stem", 2, 6.0)]


def test_channels_that_are_dead_in_both_models_are_no_agreement() -> None:
    """They correlate by being dead: with them ρ is 0.74."""
    one, other = [0.0, 0.0, 0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 3.0, 2.0, 1.0]

    (line,) = pair(neurons(measured(stem=one)), neurons(measured(stem=other)), share=0.5)

    assert rank_correlation(np.array(one), np.array(other)) == pytest.approx(11.5 / 15.5)
    assert line.correlation == pytest.approx(-1)


@pytest.mark.parametrize(
    ("other", "aligned", "found"),
    [
        (measured(stem=[1.0, 2.0]), False, "unknown"),
        (measured(stem=[1.0, 2.0]), True, "stated"),
        (measured(stem=[1.0, 2.0, 3.0]), True, "other layers"),
        (measured(trunk=[1.0, 2.0]), False, "other layers"),
    ],
)
def test_whether_channel_numbers_correspond(other: Any, aligned: bool, found: str) -> None:
    assert correspondence(neurons(measured(stem=[1.0, 2.0])), neurons(other), aligned) == found


def test_no_overlap_is_shown_between_networks_with_other_layers() -> None:
    one, other = neurons(measured(stem=[1.0, 2.0], block=[3.0])), neurons(measured(stem=[1.0, 2.0], block=[3.0, 4.0]))

    page = markdown("t", {"small": one, "wide": other}, {"small": 0.5, "wide": 0.9}, {}, "f.png", 0.1, aligned=False)

    assert "Channel numbers do not correspond" in page
    (line,) = (line for line in page.splitlines() if line.startswith("| stem") and line.count("–") > 2)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["1", *["–"] * 5, "0 of 1", "0 of 1"]
    assert not [line for line in page.splitlines() if line.startswith("| block") and line.count("of") == 2]


def test_a_page_of_a_model_that_never_broke() -> None:
    values = measured(stem=[1.0, 2.0])
    values["*:*"] |= {"pairs.broken": 0.0, "dx.broken": None}
    values["stem:0"]["abs.broken"] = values["stem:1"]["abs.broken"] = None

    page = markdown("t", {"strong": neurons(values)}, {"strong": 1.0}, {}, "f.png", 0.5, aligned=False)

    assert "There is no second model" in page
    (line,) = (line for line in page.splitlines() if line.startswith("| stem"))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["–", "3", "–", "15", "1 (2)"]


def test_a_page_compares_the_attack_with_noise_on_the_weights() -> None:
    """Ten channels that both move in the same order: the two most sensitive are shared, by chance 1 in 45 times."""
    attacked, noisy = (measured(stem=[scale * value for value in range(1, 11)]) for scale in (1.0, 3.0))
    for subject, values in noisy.items():
        if subject not in ("stem:*", "*:*"):
            values["norm-level"] = (values["abs"] or 0.0) / 0.25

    page = markdown("t", {"m": neurons(attacked)}, {"m": 0.5}, {"m": [neurons(noisy)]}, "f.png", 0.2, aligned=False)

    assert "Under noise on the weights (‖Δ‖ / ‖W‖ = 0.25 in each layer)" in page
    line = page.split("σ_w/sd", 1)[1].splitlines()[2]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert [cells[0], cells[1], *cells[3:]] == ["stem", "16.5", "2 of 2", "0.0222", "1"]


def test_the_most_sensitive_channels_of_each_class_are_listed() -> None:
    values = measured(stem=[1.0, 2.0, 3.0])
    values["*:*"] |= {"pairs.class.2": 7.0, "pairs.class.10": 3.0}
    for channel, (two, ten) in enumerate([(0.1, 0.3), (0.5, 0.2), (0.4, 0.1)]):
        values[f"stem:{channel}"] |= {"abs.class.2": two, "abs.class.10": ten}

    page = markdown("t", {"m": neurons(values)}, {"m": 0.5}, {}, "f.png", 0.6, aligned=False)

    lines = page.split("inputs of each true class", 1)[1].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0] == ["class", "pairs N", "stem"]
    assert cells[2:] == [["2", "7", "1"], ["10", "3", "0"]]


# ---- from end to end


class Silent:
    """A progress display that says nothing."""

    def begin(self, *_: Any) -> None: ...

    finished = warn = begin

    def end(self) -> None: ...


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """The shipped grid, run into a database; with the folder of its pages."""
    folder = tmp_path_factory.mktemp("neurons")
    settings = Settings(database=f"sqlite:///{folder}/r.db", output=folder, data_dir=folder, executor="inline")
    summary = run(GRID, settings, Registry.discover(), Silent())
    assert (summary.computed, summary.failures) == (4, [])
    return benchbox.open_results(settings.database), folder


def test_the_shipped_grid_measures_every_probe_in_every_cell(studied: tuple[Results, Path]) -> None:
    results, _ = studied

    for probe in ("neuron-sensitivity", "weight-sensitivity", "weight-norms", "gradient-norms"):
        assert len(results.measured(probe)) == 4
    assert all(not row.flags for row in results.rows())
    for row, _, values in results.measured("weight-norms", attack="pgd"):
        assert values["*"]["parameters"] == 38282, row.cell.label
        assert set(values) == {"conv1", "conv2", "linear1", "linear2", "*"}
    for row, _, values in results.measured("neuron-sensitivity"):
        record = results.record(row.key)
        assert values["*:*"]["pairs.all"] == record.attacked.sum()
        assert values["*:*"]["pairs.broken"] == record.success.sum()


def test_adversarial_training_lowers_the_sensitivity_of_every_layer(studied: tuple[Results, Path]) -> None:
    """As Zhang et al. 2021 report; here for σ and for σ over the deviation, under FGSM and PGD."""
    results, _ = studied

    for attack in ("fgsm", "pgd"):
        found = {row.cell.model.options["weights"]: values for row, _, values in results.measured(
            "neuron-sensitivity", attack=attack)}  # fmt: skip
        for line in pair(neurons(found["standard"]), neurons(found["pgd"]), share=0.1):
            assert all(value is not None and value < 1 for value in line.ratios.values()), line


def test_the_report_is_a_page_and_a_picture_per_attack(studied: tuple[Results, Path], tmp_path: Path) -> None:
    results, _ = studied
    report = Registry.discover().create("report", "neurons", {})

    paths = report.render(results, tmp_path)

    assert [path.name for path in paths] == [
        f"neurons-digits-linf-0.1-{attack}.{kind}" for attack in ("fgsm", "pgd") for kind in ("png", "md")
    ]
    page = paths[1].read_text()
    assert page.startswith("# digits: sensitivity of neurons under fgsm, L∞ ε = 0.1\n")
    assert "## digits-cnn (pgd) against digits-cnn (standard)" in page  # the weaker one is the reference
    assert "Channel numbers need not correspond" in page
    assert "| relu3   |         64 |" in page
    assert page.count("Under noise on the weights (‖Δ‖ / ‖W‖ = 0.1 in each layer)") == 2
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    again = [path.read_bytes() for path in report.render(results, tmp_path)]
    assert again == [path.read_bytes() for path in paths]


def test_published_results_hold_no_measurements(studied: tuple[Results, Path], tmp_path: Path) -> None:
    results, _ = studied
    published = benchbox.open_results(results.publish(tmp_path / "published.json"))

    assert len(published.rows()) == 4
    assert published.measured("neuron-sensitivity") == []


def test_probes_with_other_options_are_measurements_of_their_own(
    grid_file: Any, settings: Settings, tmp_path: Path
) -> None:
    text = (
        GRID.read_text().replace("examples = 300", "examples = 20").replace('name = "neurons-digits"', 'name = "two"')
    )
    more = '[[probe]]\nname = "neuron-sensitivity"\nlayers = ["conv1"]'

    run(grid_file(more, text=text), settings, Registry.discover(), Silent())

    results = benchbox.open_results(settings.database)
    assert len(results.measured("neuron-sensitivity", attack="pgd")) == 4
    paths = Registry.discover().create("report", "neurons", {}).render(results, tmp_path)
    assert "neurons-digits-linf-0.1-pgd-2.md" in [path.name for path in paths]


def test_a_layer_that_does_not_exist_is_a_flag_with_the_names_that_do(grid_file: Any, settings: Settings) -> None:
    text = GRID.read_text().replace("examples = 300", "examples = 5")
    text = text.replace('name = "neuron-sensitivity"', 'name = "neuron-sensitivity"\nlayers = ["conv9"]')

    run(grid_file(text=text), settings, Registry.discover(), Silent())

    row, *_ = benchbox.open_results(settings.database).rows()
    (flag,) = row.flags
    assert flag.name == "probe-failed"
    assert "the network has no layer 'conv9'. Its layers: 'conv1', 'relu1'" in flag.detail
