"""What a grid will cost: bounds of transferred and of limited cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchbox.config import Settings
from benchbox.estimate import estimate
from benchbox.registry import Registry

GridFile = Callable[..., Path]
PGD = {'name = "toy-attack"': 'name = "pgd"\nsteps = 1000'}


def test_transferred_cells_have_a_bound(grid_file: GridFile, settings: Settings, toys: Registry) -> None:
    two = {'name = "toy-linear"': 'name = "toy-linear"\n[[model]]\nname = "toy-misbehaving"\nhow = "constant"'}
    path = grid_file(replace=PGD | two | {"examples = 12": "examples = 12\ntransfer = true"})

    found = estimate(path, settings, toys)

    assert sum(item.cell.source is not None for item in found.cells) == 4
    assert all(item.seconds is not None and item.seconds > 0 for item in found.cells)


def test_a_limit_of_passes_lowers_the_bound(grid_file: GridFile, settings: Settings, toys: Registry) -> None:
    """At most 1.5 × 10 passes, a backward one counting as two, where the attack alone would make up to 3003."""
    free = estimate(grid_file(replace=PGD), settings, toys).seconds
    limit = {"examples = 12": "examples = 12\nmax_passes = 10"}

    limited = estimate(grid_file(replace=PGD | limit), settings, toys).seconds

    assert 0 < limited < free / 10
