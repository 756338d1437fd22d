"""Figures: what is drawn is what was measured; equal figures give equal bytes; nothing overlaps or leaks."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchbox import plots
from benchbox.curves import eps_panels, sweep_panels
from benchbox.errors import BenchboxError
from benchbox.rows import Row
from made_rows import made_row, part


def attacked_at_three_radii() -> list[Row]:
    """Two models, one of them also defended, under two attacks."""
    rows = []
    for eps, pgd, square in (
        (0.1, "1111100000", "1111111000"),
        (0.2, "1110000000", "0111111000"),
        (8 / 255, "1111111110", "1111111110"),
    ):
        for attack, robust in (("pgd", pgd), ("square", square)):
            rows.append(made_row(model="a", clean="1" * 10, robust=robust, eps=eps, attack=attack))
            rows.append(made_row(model="b", clean="1" * 9 + "0", robust=robust, eps=eps, attack=attack))
            for access in ("adaptive", "oblivious"):
                rows.append(made_row(
                    model="b", clean="1" * 9 + "0", robust=robust, eps=eps, attack=attack, defense="mask", access=access
                ))  # fmt: skip
    return rows


def swept(model: str = "cnn", **words: str) -> list[Row]:
    """The intact model, and two layers of it at three thresholds; at the last one nothing is left."""
    rows = [made_row(model=model, clean="1" * 10, robust="1" * 8 + "00")]
    for layer, (threshold, robust) in itertools.product(("conv1", "conv2"), ((1.0, 0), (0.0, 8), (0.5, 4))):
        options = {"filter": "low-pass", "layer": layer, "threshold": threshold, **words}
        perturbation = part("weight_perturbation", "synaptic-filter", **options)
        less = robust - 1 if layer == "conv2" and robust else robust
        robust_text = "1" * less + "0" * (10 - less)
        rows.append(made_row(model=model, clean="1" * 10, robust=robust_text, perturbation=perturbation))
    return rows


def drawn(figure: Any) -> Any:
    FigureCanvasAgg(figure).draw()
    return figure


class TestCurves:
    def test_a_line_starts_at_the_clean_accuracy_and_follows_the_worst_case(self):
        panel = next(panel for panel in eps_panels(attacked_at_three_radii()) if panel.title == "a")

        (curve,) = panel.curves
        assert curve.x == (0.0, 8 / 255, 0.1, 0.2)
        assert [share.value for share in curve.shares] == pytest.approx([1.0, 0.9, 0.5, 0.2])  # at 0.2: the AND

    def test_an_oblivious_line_is_dashed_in_the_colour_of_its_defense(self):
        panel = next(panel for panel in eps_panels(attacked_at_three_radii()) if panel.title == "b")

        lines = {curve.label: (curve.colour, curve.dashed) for curve in panel.curves}
        assert lines == {
            "no defense": ("no defense", False),
            "mask · adaptive": ("mask", False),
            "mask · oblivious": ("mask", True),
        }

    def test_a_sweep_has_a_line_per_layer_in_rising_order_and_the_intact_model_beside_it(self):
        (panel,) = sweep_panels(swept())

        robust = {curve.label: curve for curve in panel.curves if not curve.dashed}
        assert (panel.title, panel.axis) == ("cnn · synaptic-filter (low-pass)", "threshold")
        assert robust["conv1"].x == robust["conv2"].x == (0.0, 0.5, 1.0)
        assert [share.value for share in robust["conv1"].shares] == pytest.approx([0.8, 0.4, 0.0])
        assert [share.value for share in robust["conv2"].shares] == pytest.approx([0.7, 0.3, 0.0])
        assert {name: share.value for name, share in panel.references} == {"intact, robust": 0.8, "intact, clean": 1.0}

    def test_seeds_are_lines_of_their_own(self):
        rows = [
            made_row(
                clean="11", robust="10", seed=seed, prefix_seed=seed,
                perturbation=part("weight_perturbation", "weight-noise", layer="*", level=level),
            )
            for seed, level in itertools.product((0, 1), (0.1, 0.2))
        ]  # fmt: skip

        (panel,) = sweep_panels(rows)

        assert {curve.label for curve in panel.curves} == {"seed 0", "seed 1"}
        assert panel.axis == "level"

    def test_a_perturbation_at_one_setting_is_no_sweep(self):
        assert sweep_panels(swept()[:2]) == []


class TestFigures:
    def test_the_lines_of_a_figure_are_its_curves_in_percent(self):
        figure = plots.accuracy_against_eps(attacked_at_three_radii())

        (line,) = next(ax for ax in figure.axes if ax.get_title("left") == "a").get_lines()
        assert list(line.get_xdata()) == pytest.approx([0, 8 / 255, 0.1, 0.2])
        assert list(line.get_ydata()) == pytest.approx([100, 90, 50, 20])

    def test_intervals_are_drawn(self):
        figure = plots.accuracy_against_eps(attacked_at_three_radii())

        (band,) = next(ax for ax in figure.axes if ax.get_title("left") == "a").collections
        low, high = band.get_datalim(figure.axes[0].transData).intervaly
        assert low == pytest.approx(5.67, abs=0.01)  # 2 of 10: Wilson
        assert high == 100

    def test_the_heat_map_shows_every_attack_and_the_worst_case(self):
        rows = [row for row in attacked_at_three_radii() if row.cell.threat.eps == 0.2 and row.cell.model.name == "a"]

        ax = plots.heat_map(rows).axes[0]

        assert [label.get_text() for label in ax.get_xticklabels()] == ["pgd", "square", "worst case"]
        assert [text.get_text() for text in ax.texts] == ["30.0", "60.0", "20.0"]

    def test_the_heat_map_leaves_a_hole_where_nothing_was_evaluated(self):
        rows = [
            made_row(model="a", clean="11", robust="10", attack="pgd"),
            made_row(model="a", clean="11", robust="10", attack="square"),
            made_row(model="b", clean="11", robust="11", attack="pgd"),
        ]

        ax = plots.heat_map(rows).axes[0]

        assert len(ax.texts) == 5
        assert ax.patch.get_hatch()

    def test_a_geometric_sweep_has_a_log_axis_and_a_linear_one_has_not(self):
        noisy = [
            made_row(clean="11", robust="10", perturbation=part("weight_perturbation", "weight-noise", level=level))
            for level in (0.01, 0.1, 1.0)
        ]

        figures = [plots.accuracy_against_sweep(rows) for rows in (noisy, swept())]

        assert [figure.axes[0].get_xscale() for figure in figures] == ["log", "linear"]

    def test_no_texts_overlap(self):
        rows = attacked_at_three_radii()
        long = [
            made_row(
                model=f"a-network-with-quite-a-long-name-{number}", clean="11", robust="10", attack=attack,
                defense=defense, access="adaptive" if defense else None, eps=0.1,
            )
            for number in range(4) for attack in ("autoattack-reference", "uniform-noise", "pgd")
            for defense in (None, "attribution-detector")
        ]  # fmt: skip
        dense = [made_row(clean="11", robust="10", eps=eps / 255) for eps in (1, 2, 4, 6, 8, 16, 32, 64)]
        figures = [plots.accuracy_against_eps(some) for some in (dense, rows, long)]
        wordy = [row for name in ("first-network", "second-network") for row in swept(name, tie="pooled", mode="value")]
        figures += [plots.heat_map(long), plots.accuracy_against_sweep(swept()), plots.accuracy_against_sweep(wordy)]

        for figure in figures:
            boxes = texts_of(drawn(figure))
            for (text, box), (other, another) in itertools.combinations(boxes, 2):
                assert not overlap(box, another), f"{text!r} covers {other!r}"
            width, height = figure.canvas.get_width_height()
            for text, box in boxes:
                assert box.x0 >= -1, text
                assert box.y0 >= -1, text
                assert box.x1 <= width + 1, text
                assert box.y1 <= height + 1, text

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "no rows to draw"),
            ([made_row(clean="11", robust="10", norm=norm) for norm in ("linf", "l2")], "one norm, .* l2, linf"),
            ([made_row(clean="11", robust="10", dataset=name) for name in ("a", "b")], "one dataset, .* a, b"),
        ],
    )
    def test_rows_that_do_not_belong_together_are_an_error(self, rows, message):
        with pytest.raises(BenchboxError, match=message):
            plots.accuracy_against_eps(rows)

    def test_a_heat_map_shows_one_threat(self):
        with pytest.raises(BenchboxError, match=r"one threat, .* ε = 0\.1, .* ε = 0\.2"):
            plots.heat_map([made_row(clean="11", robust="10", eps=eps) for eps in (0.1, 0.2)])

    def test_nothing_swept_is_no_figure(self):
        assert plots.accuracy_against_sweep(attacked_at_three_radii()[:1]) is None


class TestFiles:
    @pytest.mark.parametrize("suffix", ["png", "svg"])
    def test_equal_figures_give_equal_bytes(self, tmp_path: Path, suffix):
        first, second = (
            plots.save(plots.accuracy_against_eps(attacked_at_three_radii()), tmp_path / f"{number}.{suffix}")
            for number in range(2)
        )

        assert first.read_bytes() == second.read_bytes()
        assert b"2026-" not in first.read_bytes()

    def test_settings_of_matplotlib_stay_as_they_are(self, tmp_path: Path):
        before = dict(matplotlib.rcParams)
        loaded = "matplotlib.pyplot" in sys.modules

        plots.save(plots.heat_map([made_row(clean="11", robust="10")]), tmp_path / "map.png")

        assert dict(matplotlib.rcParams) == before
        assert ("matplotlib.pyplot" in sys.modules) == loaded


def texts_of(figure: Any) -> list[tuple[str, Any]]:
    """Every text of a drawn figure with its box in pixels."""
    texts = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        if ax.get_visible():
            texts += [*ax.texts, ax.xaxis.label, ax.yaxis.label, ax._left_title, *tick_labels(ax)]
    renderer = figure.canvas.get_renderer()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]


def tick_labels(ax: Any) -> list[Any]:
    """The labels that are drawn: not those beyond the limits, nor those that a neighbour on the same axis shows."""
    (left, right), (bottom, top) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    across = [label for label in ax.get_xticklabels() if left <= label.get_position()[0] <= right]
    up = [label for label in ax.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    return [label for label in (*across, *up) if label.get_visible()]


def overlap(one: Any, other: Any) -> bool:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width > 1 and height > 1
