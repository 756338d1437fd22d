"""Who is ranked on a board and where, and why others are not."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from benchbox.boards import boards_of
from benchbox.domain import Flag
from benchbox.results import Failure, Results
from made_rows import DAY, FailingSource, line_of, made_row, part

DEFINITION = """
title = "Digits"
dataset = "digits"
norm = "linf"
eps = 0.1
"""


class TestRanks:
    def test_they_follow_the_worst_case_and_ties_share_one(self, board):
        robust = {"a": "11110000", "b": "11111100", "c": "00001111", "d": "10000000"}
        rows = [made_row(model=model, clean="1" * 8, robust=mask) for model, mask in robust.items()]

        made = board(*rows)

        assert [(line.rank, line.names.model) for line in made.standings] == [(1, "b"), (2, "a"), (2, "c"), (4, "d")]

    def test_neighbours_are_compared_on_the_same_examples(self, board):
        # b alone is right on 9 examples, a alone on 1: the exact test of 1 in 10
        rows = [
            made_row(model="a", clean="1" * 20, robust="1" * 10 + "0" * 9 + "1"),
            made_row(model="b", clean="1" * 20, robust="1" * 10 + "1" * 9 + "0"),
        ]

        first, second = board(*rows).standings

        assert first.p_above is None
        assert not first.like_above
        assert second.p_above == pytest.approx(binomtest(1, 10).pvalue)
        assert not second.like_above

    def test_neighbours_that_do_not_differ_significantly_are_marked(self, board):
        rows = [
            made_row(model="a", clean="1" * 20, robust="1" * 12 + "0" * 8),
            made_row(model="b", clean="1" * 20, robust="1" * 10 + "0" * 10),
        ]

        second = board(*rows).standings[1]

        assert second.p_above == pytest.approx(0.5)
        assert second.rank == 2
        assert second.like_above

    def test_a_definition_can_rank_by_clean_accuracy(self, board):
        rows = [made_row(model="a", clean="1110", robust="1110"), made_row(model="b", clean="1111", robust="1000")]

        made = board(*rows, definition=DEFINITION + 'rank_by = "clean"')

        assert [line.names.model for line in made.standings] == ["b", "a"]


class TestUnranked:
    def test_an_oblivious_result_is_shown_and_counts_against_the_adaptive_one(self, board):
        rows = [
            made_row(clean="1111", robust="0111", defense="mask", access="adaptive"),
            made_row(clean="1111", robust="1110", defense="mask", access="oblivious"),
        ]

        made = board(*rows)

        adaptive, oblivious = line_of(made, access="adaptive"), line_of(made, access="oblivious")
        assert adaptive.rank == 1
        assert adaptive.attacks["pgd"].value == 3 / 4
        assert adaptive.robust.value == 2 / 4
        assert oblivious.rank is None
        assert oblivious.reasons == ("oblivious attacker",)
        assert oblivious.robust.value == 3 / 4

    def test_oblivious_and_adaptive_stand_side_by_side_with_the_drop_between_them(self, board):
        """Two attackers who do not know the mask break example 3 and example 2, one who does breaks 0 and 3."""
        rows = [
            made_row(clean="1111", robust="0110", defense="mask", access="adaptive"),
            made_row(clean="1111", robust="1110", defense="mask", access="oblivious"),
            made_row(clean="1111", robust="1101", defense="mask", attack="square", access="oblivious"),
        ]

        made = board(*rows)

        adaptive = line_of(made, access="adaptive")
        assert adaptive.oblivious.value == 2 / 4
        assert adaptive.oblivious.keys == tuple(row.key for row in rows[1:])
        assert adaptive.robust.value == 1 / 4  # examples 2 and 3 fall to the oblivious ones
        assert adaptive.drop == 1 / 4

    @pytest.mark.parametrize("access", ["adaptive", "oblivious"])
    def test_there_is_no_drop_where_one_side_is_missing(self, board, access):
        made = board(made_row(clean="11", robust="10", defense="mask", access=access))

        assert line_of(made, access=access).drop is None

    def test_examples_made_on_another_model_are_no_side_of_the_drop(self, board):
        made = board(
            made_row(clean="11", robust="10", defense="mask", access="adaptive"),
            made_row(clean="11", robust="00", defense="mask", source="other"),
        )

        assert {line.drop for line in made.standings} == {None}
        assert line_of(made, access="adaptive").oblivious is None

    def test_transferred_examples_have_lines_of_their_own_and_count_against_no_other(self, board):
        """Else a model would lose robust accuracy by the company in which it was evaluated."""
        rows = [
            made_row(model="a", clean="1111", robust="0111"),
            made_row(model="a", clean="1111", robust="1100", source="b"),
            made_row(model="a", clean="1111", robust="0111", source="c"),
        ]

        made = board(*rows)

        own, from_b, from_c = (line_of(made, access=access) for access in ("", "transfer from b", "transfer from c"))
        assert (own.rank, own.robust.value) == (1, 3 / 4)
        assert (from_b.rank, from_b.robust.value) == (None, 2 / 4)
        assert from_b.reasons == ("transferred examples", "breaks 2 that white-box attacks do not")
        assert from_c.reasons == ("transferred examples",)
        assert made.sweeps == ()

    def test_transferred_examples_do_not_make_a_line_complete(self, board):
        rows = [
            made_row(model="a", clean="11", robust="10", attack="pgd"),
            made_row(model="a", clean="11", robust="10", attack="square", source="b"),
        ]

        assert line_of(board(*rows), access="").missing == ("square",)

    def test_an_attack_that_was_stopped_early_stands_apart_from_the_whole_one(self, board):
        rows = [
            made_row(model="a", clean="1111", robust="0111"),
            made_row(model="b", clean="1111", robust="1111", max_passes=10),
        ]

        made = board(*rows)

        assert made.attacks == ("pgd", "pgd within 10 passes")
        assert line_of(made, model="b").missing == ("pgd",)

    def test_a_definition_asks_for_whole_attacks(self, board):
        made = board(
            made_row(clean="11", robust="11", max_passes=10),
            definition=DEFINITION + 'required = ["pgd"]',
        )

        assert made.standings[0].missing == ("pgd",)

    def test_cells_of_a_curve_belong_to_the_board_of_their_radius(self, board):
        rows = [
            made_row(model="a", clean="1111", robust="0111"),
            made_row(model="b", clean="1111", robust="0011", curve=(0.05, 0.1)),
        ]

        assert [line.names.model for line in board(*rows).standings if line.rank] == ["a", "b"]

    def test_a_line_without_an_attack_that_others_met_says_which(self, board):
        rows = [
            made_row(model="a", clean="1111", robust="1100", attack="pgd"),
            made_row(model="a", clean="1111", robust="1000", attack="square"),
            made_row(model="b", clean="1111", robust="1111", attack="pgd"),
        ]

        made = board(*rows)

        incomplete = line_of(made, model="b")
        assert incomplete.rank is None
        assert incomplete.reasons == ("missing: square",)
        assert "square" not in incomplete.attacks
        assert made.standings[0].rank == 1

    def test_an_oblivious_attack_does_not_make_an_adaptive_line_complete(self, board):
        rows = [
            made_row(clean="11", robust="10", defense="mask", attack="pgd", access="adaptive"),
            made_row(clean="11", robust="10", defense="mask", attack="square", access="oblivious"),
        ]

        assert line_of(board(*rows), access="adaptive").missing == ("square",)

    def test_a_definition_can_require_an_attack_with_options(self, board):
        weak, strong = part("attack", "pgd", steps=5), part("attack", "pgd", steps=40)
        rows = [
            made_row(model="a", clean="11", robust="10", attack=strong),
            made_row(model="b", clean="11", robust="11", attack=weak),
        ]

        made = board(*rows, definition=DEFINITION + 'required = [{ name = "pgd", steps = 40 }]')

        assert line_of(made, model="a").rank == 1
        assert line_of(made, model="b").reasons == ("missing: pgd (steps=40)",)

    def test_a_flagged_line_names_its_flags(self, board):
        flag = Flag("zero-gradient", "9 of 16 inputs", "use BPDA")
        rows = [
            made_row(model="a", clean="11", robust="11", flags=[flag]),
            made_row(model="b", clean="11", robust="10"),
        ]

        made = board(*rows)

        assert line_of(made, model="b").rank == 1
        assert line_of(made, model="a").reasons == ("flagged: zero-gradient",)
        assert line_of(made, model="a").flags == (flag,)

    def test_a_failed_cell_stands_beneath_the_board_with_its_error(self):
        done, failed = made_row(clean="11", robust="10"), made_row(clean="11", robust="10", attack="square")
        failure = Failure(failed.cell, "ContractError: it left its budget", DAY, ("tests",))

        (made,) = boards_of(Results(FailingSource([done], [failure])), "tests")

        assert made.failures == {"cnn · square · linf 0.1": "ContractError: it left its budget"}
