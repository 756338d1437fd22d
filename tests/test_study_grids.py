"""The grids and recipes of the studies: they parse, and are as large as they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchbox.grid import expand, load_grid
from benchbox.recipe import load_recipe
from benchbox.registry import Registry

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "grids").glob("*.toml")), ids=lambda path: path.stem)
def test_every_grid_has_the_name_of_its_file(path: Path) -> None:
    assert load_grid(path).name == path.stem


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_names_plugins_that_exist(path: Path) -> None:
    recipe = load_recipe(path)

    Registry.discover().create("dataset", recipe.dataset.name, recipe.dataset.options)
    Registry.discover().create("model", recipe.model.name, recipe.model.options)


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("synaptic-digits", 2 * (1 + 4 * 3 * 13)),  # models x (intact + layers x filters x thresholds)
        ("noise-digits", 2 * 2 * (1 + 5 * 6 * 3)),  # splits x models x (intact + layers and all x levels x draws)
    ],
)
def test_the_grids_on_digits_are_as_large_as_they_say(name: str, cells: int, tmp_path: Path) -> None:
    plan = expand(load_grid(ROOT / "grids" / f"{name}.toml"), Registry.discover(), tmp_path)

    assert (len(plan.cells), plan.excluded) == (cells, ())


def test_there_are_500_noisy_models_in_one_grid() -> None:
    grid = load_grid(ROOT / "grids" / "noise-500-mnist.toml")

    models = sum(len(list(entry.choices())) for entry in grid.model)
    noises = [options for entry in grid.weight_perturbation for options in entry.choices()]
    assert models * len(noises) == 500
    assert len({options["level"] for options in noises}) == 10
    assert grid.examples == 10_000
