"""The definition files of boards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchbox.boards import boards_of
from benchbox.errors import GridError
from made_rows import made_row, published

DEFINITION = """
title = "Digits"
dataset = "digits"
norm = "linf"
eps = 0.1
"""


@pytest.fixture
def definition_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "board.toml"
        path.write_text(text)
        return path

    return write


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
