"""Names of attacks that average over draws where what they meet is random."""

from __future__ import annotations

from collections.abc import Callable

from benchbox.boards import Board
from benchbox.domain import Component
from benchbox.labels import Labels
from made_rows import made_row, part


def pgd(eot_samples: int, steps: int = 40) -> Component:
    return part("attack", "pgd", steps=steps, eot_samples=eot_samples)


def test_draws_that_depend_on_what_is_met_make_no_other_attack() -> None:
    rows = [
        made_row(clean="11", robust="10", attack=pgd(1)),
        made_row(clean="11", robust="10", defense="random-noise", attack=pgd(10)),
    ]

    labels = Labels(row.cell for row in rows)

    assert [labels.attack(row.cell) for row in rows] == ["pgd", "pgd"]


def test_draws_that_were_compared_on_one_system_tell_attacks_apart() -> None:
    rows = [made_row(clean="11", robust="10", defense="random-noise", attack=pgd(draws)) for draws in (1, 10)]

    labels = Labels(row.cell for row in rows)

    assert [labels.attack(row.cell) for row in rows] == ["pgd (eot_samples=1)", "pgd (eot_samples=10)"]


def test_other_options_still_tell_attacks_apart() -> None:
    rows = [
        made_row(clean="11", robust="10", attack=pgd(1, steps=20)),
        made_row(clean="11", robust="10", attack=pgd(1, steps=40)),
        made_row(clean="11", robust="10", defense="random-noise", attack=pgd(10, steps=40)),
    ]

    labels = Labels(row.cell for row in rows)

    assert [labels.attack(row.cell) for row in rows] == ["pgd (steps=20)", "pgd (steps=40)", "pgd (steps=40)"]


def test_a_board_has_one_column_for_them_and_misses_none(board: Callable[..., Board]) -> None:
    rows = [
        made_row(model="a", clean="11", robust="10", attack=pgd(1)),
        made_row(model="b", clean="11", robust="00", defense="random-noise", attack=pgd(10)),
    ]

    made = board(*rows)

    assert [(line.rank, list(line.attacks), line.missing) for line in made.standings] == [
        (1, ["pgd"], ()),
        (2, ["pgd"], ()),
    ]
