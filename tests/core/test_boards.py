"""Boards: worst case, ranks, what is not ranked and why, sweeps, definitions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest

from benchbox.boards import Board, boards_of
from benchbox.domain import Flag
from benchbox.errors import GridError
from benchbox.labels import Labels
from benchbox.ranking import Standing
from benchbox.results import Failure, Results
from benchbox.rows import Row
from made_rows import DAY, FailingSource, made_row, part, published

DEFINITION = """
title = "Digits"
dataset = "digits"
norm = "linf"
eps = 0.1
"""


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., Board]:
    """The one board of hand-written rows, by a definition where one is given."""

    def make(*rows: Row, definition: str | None = None) -> Board:
        path = tmp_path / "board.toml"
        if definition is not None:
            path.write_text(definition)
        made = boards_of(published(rows, tmp_path), None, path if definition is not None else None)
        assert len(made) == 1
        return made[0]

    return make


@pytest.fixture
def definition_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "board.toml"
        path.write_text(text)
        return path

    return write


def line_of(board: Board, **names: str) -> Standing:
    """The one line with these names."""
    found = [line for line in board.standings if all(getattr(line.names, key) == text for key, text in names.items())]
    assert len(found) == 1, f"{len(found)} lines are {names}"
    return found[0]


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

    @pytest.mark.parametrize("name", ["incomplete-optimisation", "stochastic-without-eot", "transfer-failure"])
    @pytest.mark.parametrize(("strong", "rank"), [("1" * 6 + "0000", 1), ("1" * 9 + "0", None)])
    def test_a_weak_attack_is_no_doubt_beside_one_that_breaks_as_much(self, board, strong, rank, name):
        flag = Flag(name, "its steps are too short", "more steps")
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


class TestDefinitions:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (DEFINITION + 'colums = ["clean"]', "board.toml:colums: unknown field. Did you mean 'columns'?"),
            (DEFINITION + 'columns = ["claen"]', "board.toml:columns: unknown column 'claen'. Did you mean 'clean'?"),
            (DEFINITION + 'columns = ["clean", "clean"]', "board.toml:columns: 'clean' stands twice"),
            (DEFINITION.replace("0.1", "-0.1"), r"board.toml:eps\[0\]: Input should be greater than 0"),
            (DEFINITION.replace("0.1", "[0.1, 0.1]"), "board.toml:eps: a radius stands twice"),
            (DEFINITION.replace("0.1", "nan"), r"board.toml:eps\[0\]: Input should be a finite number"),
            (DEFINITION.replace('"linf"', '"inf"'), "board.toml:norm: Input should be 'linf'"),
            (DEFINITION.replace("eps = 0.1", ""), "norm and eps belong together"),
            (DEFINITION + "rank_by = 3", "board.toml:rank_by: Input should be 'robust' or 'clean'"),
            (DEFINITION + "required = [{ steps = 3 }]", r"board.toml:required\[0\].name: Field required"),
            ('title = "x"\ndataset = "digits"', "without a norm there is no attack"),
            ("title = ", "board.toml: no valid TOML"),
            (DEFINITION.replace("digits", "digts"), "board.toml:dataset: .* 'digts'. Did you mean 'digits'?"),
            (DEFINITION + 'columns = ["accuracy/robst"]', r"board.toml:columns\[0\]: .*Did you mean 'accuracy/robust'"),
        ],
    )
    def test_a_mistake_is_one_error_with_place_cause_and_fix(self, definition_file, tmp_path, text, message):
        results = published([made_row(clean="11", robust="10")], tmp_path)

        with pytest.raises(GridError, match=message):
            boards_of(results, None, definition_file(text))

    def test_a_radius_without_results_is_an_empty_board(self, definition_file, tmp_path):
        results = published([made_row(clean="11", robust="10")], tmp_path)

        made = boards_of(results, None, definition_file(DEFINITION.replace("0.1", '[0.1, "8/255"]')))

        assert [len(board.standings) for board in made] == [1, 0]

    def test_any_score_can_be_a_column(self, board):
        rows = [
            made_row(clean="11", robust="10", attack=attack, scores={("loss", "adversarial"): value})
            for attack, value in (("pgd", 2.5), ("square", 1.5))
        ]

        made = board(*rows, definition=DEFINITION + 'columns = ["clean", "loss/adversarial"]')

        assert {score.value for score in made.standings[0].scores["loss/adversarial"]} == {1.5, 2.5}

    def test_the_shipped_ones_are_valid(self):
        from benchbox.definitions import load_definition
        from benchbox.shipped import shipped

        files = sorted((shipped("leaderboard") / "boards").glob("*.toml"))

        assert {load_definition(file).dataset for file in files} >= {"digits", "mnist"}


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
