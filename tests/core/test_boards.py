"""Boards: worst case, attackers, sweeps, what stands on them without a definition."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest

from benchbox.boards import boards_of
from benchbox.domain import Flag
from benchbox.labels import Labels
from benchbox.results import Results
from benchbox.rows import Row
from made_rows import FailingSource, line_of, made_row, part, published

DEFINITION = """
title = "Digits"
dataset = "digits"
norm = "linf"
eps = 0.1
"""


class TestWorstCase:
    def test_it_is_the_and_of_the_masks_not_the_minimum_of_the_averages(self, board):
        rows = [
            made_row(clean="11110", robust="00110", attack="pgd"),
            made_row(clean="11110", robust="11000", attack="square"),
        ]

        line = board(*rows).standings[0]

        assert line.attacks["pgd"].value == 2 / 5
        assert line.attacks["square"].value == 2 / 5
        assert line.robust.value == 0
        assert line.clean.value == 4 / 5

    def test_its_interval_is_wilsons(self, board):
        line = board(made_row(clean="1" * 100, robust="1" * 93 + "0" * 7)).standings[0]

        expected = binomtest(93, 100).proportion_ci(method="wilson")
        assert (line.robust.low, line.robust.high) == pytest.approx((expected.low, expected.high))
        assert line.robust.n == 100

    def test_it_names_every_cell_that_it_was_made_from(self, board):
        rows = [made_row(clean="11", robust="10", attack=name) for name in ("pgd", "square")]

        made = board(*rows)

        assert set(made.standings[0].robust.keys) == {row.key for row in rows} == set(made.cells)
        assert made.standings[0].attacks["pgd"].keys == (rows[0].key,)

    def test_seeds_of_an_attack_count_together(self, board):
        rows = [made_row(clean="111", robust=robust, seed=seed) for seed, robust in enumerate(("011", "110"))]

        line = board(*rows).standings[0]

        assert line.attacks["pgd"].value == line.robust.value == 1 / 3

    def test_a_randomly_perturbed_model_is_another_system_for_every_seed(self, board):
        noise = part("weight_perturbation", "weight-noise", layer="*", level=0.1)
        rows = [
            made_row(clean="111", robust=robust, perturbation=noise, seed=seed, prefix_seed=seed)
            for seed, robust in enumerate(("011", "110"))
        ]

        made = board(*rows, definition=DEFINITION + 'sweeps = "rows"')

        assert [line.names.perturbation for line in made.standings] == ["weight-noise, seed 0", "weight-noise, seed 1"]
        assert [line.robust.value for line in made.standings] == [2 / 3, 2 / 3]

    def test_a_targeted_attack_has_a_column_of_its_own(self, board):
        rows = [made_row(clean="111", robust="110"), made_row(clean="111", robust="111", targeted=True)]

        assert set(board(*rows).attacks) == {"pgd", "pgd targeted"}


class TestAttackers:
    def test_every_line_says_whom_it_met(self, board):
        rows = [
            made_row(model="open", clean="1111", robust="1100"),
            made_row(model="noise-only", clean="1111", robust="1110", attack="square", backwards=0),
            made_row(clean="1111", robust="1110", defense="mask"),
            made_row(clean="1111", robust="1110", defense="mask", access="oblivious"),
            made_row(clean="1111", robust="1110", defense="jpeg", attack="square", backwards=0),
        ]

        made = board(*rows)

        assert {(line.names.model, line.names.defense, line.attacker) for line in made.standings} == {
            ("open", "none", "white-box"),
            ("noise-only", "none", "black-box only"),
            ("cnn", "mask", "adaptive"),
            ("cnn", "mask", "oblivious"),
            ("cnn", "jpeg", "adaptive, black-box only"),
        }

    def test_a_black_box_attack_that_wins_casts_doubt_on_those_with_gradients(self, board):
        rows = [
            made_row(clean="1" * 10, robust="1" * 8 + "00", attack="pgd"),
            made_row(clean="1" * 10, robust="00" + "1" * 8, attack="square", backwards=0),
        ]

        (line,) = board(*rows).standings

        assert line.rank is None
        assert line.reasons == ("flagged: black-box-beats-white-box",)
        assert "break 2 of 10 examples" in line.flags[0].detail

    @pytest.mark.parametrize(
        ("square", "backwards"),
        [
            ("0" + "1" * 9, 0),  # one example is no sign
            ("1" * 7 + "000", 0),  # one more than pgd, whose two it breaks as well
            ("00" + "1" * 8, 10),  # it has gradients, too
        ],
    )
    def test_otherwise_there_is_no_doubt(self, board, square, backwards):
        rows = [
            made_row(clean="1" * 10, robust="1" * 8 + "00", attack="pgd"),
            made_row(clean="1" * 10, robust=square, attack="square", backwards=backwards),
        ]

        assert board(*rows).standings[0].rank == 1

    def test_two_examples_of_very_many_are_no_sign(self, board):
        rows = [
            made_row(clean="1" * 2000, robust="1" * 2000, attack="pgd"),
            made_row(clean="1" * 2000, robust="00" + "1" * 1998, attack="square", backwards=0),
        ]

        assert board(*rows).standings[0].rank == 1

    def test_a_line_without_gradients_is_marked_and_not_doubted(self, board):
        (line,) = board(made_row(clean="1111", robust="0000", attack="square", backwards=0)).standings

        assert line.rank == 1
        assert line.attacker == "black-box only"

    @pytest.mark.parametrize(("strong", "rank"), [("1" * 6 + "0000", 1), ("1" * 9 + "0", None)])
    def test_a_weak_attack_is_no_doubt_beside_one_that_breaks_as_much(self, board, strong, rank):
        flag = Flag("incomplete-optimisation", "its steps are too short", "more steps")
        rows = [
            made_row(clean="1" * 10, robust="1" * 7 + "000", attack="mi-fgsm", flags=[flag]),
            made_row(clean="1" * 10, robust=strong, attack="apgd"),
        ]

        assert board(*rows).standings[0].rank == rank

    def test_gradients_that_vanish_are_a_doubt_whatever_else_was_tried(self, board):
        flag = Flag("zero-gradient", "9 of 16 inputs", "use BPDA")
        rows = [
            made_row(clean="1" * 10, robust="1" * 7 + "000", attack="pgd", flags=[flag]),
            made_row(clean="1" * 10, robust="1" * 6 + "0000", attack="fgsm"),
        ]

        assert board(*rows).standings[0].rank is None


class TestSweeps:
    def rows(self) -> list[Row]:
        def swept(threshold: float, robust: str, attack: str = "pgd") -> Row:
            options = {"filter": "low-pass", "layer": "conv1", "threshold": threshold}
            perturbation = part("weight_perturbation", "synaptic-filter", **options)
            return made_row(clean="11110", robust=robust, perturbation=perturbation, attack=attack)

        return [
            made_row(clean="11111", robust="11110", attack="pgd"),
            made_row(clean="11111", robust="00000", attack="square"),
            swept(0.0, "11100"), swept(0.5, "11000"), swept(1.0, "00000"), swept(1.0, "00000", attack="square"),
        ]  # fmt: skip

    def test_they_are_one_line_with_the_lowest_middle_and_highest_point(self, board):
        made = board(*self.rows())

        (sweep,) = made.sweeps
        assert sweep.names.line == "cnn · synaptic-filter (low-pass)"
        assert sweep.points == 3
        assert (sweep.robust.low.value, sweep.robust.median.value, sweep.robust.high.value) == (0, 2 / 5, 3 / 5)
        assert sweep.worst_point == "threshold=1"

    def test_the_intact_model_beside_them_met_the_same_attacks(self, board):
        (sweep,) = board(*self.rows()).sweeps

        assert sweep.attacks == ("pgd",)  # square did not meet every point
        assert sweep.intact_robust.value == 4 / 5
        assert sweep.intact_clean.value == 1

    def test_only_the_intact_model_is_ranked_and_its_attacks_are_the_required_ones(self, board):
        made = board(*self.rows())

        assert [(line.rank, line.names.perturbation) for line in made.standings] == [(1, "intact")]
        assert len(made.points) == 3

    def test_a_definition_can_list_every_point(self, board):
        made = board(*self.rows(), definition=DEFINITION + 'sweeps = "rows"\nrequired = ["pgd"]')

        assert not made.sweeps
        assert len(made.standings) == 4

    def test_a_single_perturbation_is_a_line_like_others(self, board):
        rows = [row for row in self.rows() if row.cell.weight_perturbation is None or row.key == self.rows()[3].key]

        made = board(*rows)

        assert not made.sweeps
        assert line_of(made, perturbation="synaptic-filter").reasons == ("missing: square",)


class TestDefaults:
    def test_there_is_a_board_per_data_set_norm_and_radius(self, tmp_path):
        rows = [
            made_row(clean="11", robust="10", dataset=dataset, norm=norm, eps=eps)
            for dataset in ("digits", "mnist") for norm, eps in (("linf", 0.1), ("linf", 0.2), ("l2", 1.0))
        ]  # fmt: skip

        made = boards_of(published(rows, tmp_path))

        assert {(board.dataset, board.threat.norm, board.threat.eps) for board in made} == {
            (dataset, norm, eps)
            for dataset in ("digits", "mnist") for norm, eps in (("linf", 0.1), ("linf", 0.2), ("l2", 1.0))
        }  # fmt: skip
        assert len(made) == 6

    def test_results_on_other_examples_are_never_on_one_board(self, tmp_path):
        rows = [made_row(clean="11", robust="10"), made_row(clean="1111", robust="1000")]

        assert sorted(board.examples for board in boards_of(published(rows, tmp_path))) == [2, 4]

    def test_without_attacks_clean_accuracy_is_ranked(self, tmp_path):
        rows = [made_row(model=model, clean=clean) for model, clean in (("a", "110"), ("b", "111"))]

        (made,) = boards_of(published(rows, tmp_path))

        assert [(line.rank, line.names.model) for line in made.standings] == [(1, "b"), (2, "a")]
        assert made.standings[0].robust is None

    def test_a_grid_shows_only_what_it_asked_for(self, tmp_path):
        rows = [made_row(model=model, clean="11", robust="10", grid=model) for model in ("a", "b")]

        (made,) = boards_of(published(rows, tmp_path), "a")

        assert [line.names.model for line in made.standings] == ["a"]

    def test_namesakes_are_told_apart_by_the_options_in_which_they_differ(self, tmp_path):
        models = [part("model", "cnn", weights=weights, width=16) for weights in ("standard", "pgd")]
        attacks = [part("attack", "pgd", steps=steps, loss="ce") for steps in (10, 40)]
        rows = [made_row(model=model, attack=attack, clean="11", robust="10") for model in models for attack in attacks]

        (made,) = boards_of(published(rows, tmp_path))

        assert {line.names.model for line in made.standings} == {"cnn (standard)", "cnn (pgd)"}
        assert made.attacks == ("pgd (steps=10)", "pgd (steps=40)")

    def test_the_protocol_says_how_it_was_measured(self, board):
        attack = part("attack", "pgd", steps=40, restarts=2)

        protocol = board(made_row(clean="11", robust="10", attack=attack, seed=3)).protocol

        assert protocol["Attacks"] == ("pgd v1 of benchbox; restarts=2, steps=40",)
        assert protocol["Examples"] == ("the first 2 test examples of digits v1 of benchbox",)
        assert protocol["Seeds"] == ("3",)
        assert protocol["Evaluated"] == ("2026-11-02",)
        assert protocol["Versions"] == ("python 3.11.7, torch 2.13.0",)


def test_no_board_needs_torch():
    program = "import sys, benchbox.boards, benchbox.render, benchbox.plots; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


def test_weight_files_are_told_apart_by_their_names_alone() -> None:
    """Digests, folders and whatever else differs with a weight file would only make the names long."""
    models = [
        part("model", "checkpoint", weights=f"../models/{name}.pth", sha256=name * 8, builder=f"nets:{name}")
        for name in ("first", "second")
    ]

    labels = Labels([made_row(clean="1", model=model).cell for model in models])

    assert [labels(model) for model in models] == ["checkpoint (first)", "checkpoint (second)"]


def test_results_on_the_train_split_have_a_board_of_their_own_that_says_so(tmp_path: Path) -> None:
    usual = made_row(clean="1100")
    seen = replace(usual, cell=replace(usual.cell, dataset=part("dataset", "digits", split="train")))

    titles = [made.title for made in boards_of(Results(FailingSource([usual, seen])))]

    assert sorted(titles) == ["digits", "digits, train split"]
