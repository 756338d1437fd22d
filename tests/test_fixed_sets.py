"""Fixed sets of adversarial examples from a grid to its files and back: kept once, verified network by network."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchbox
from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.errors import StoreError
from benchbox.registry import Registry
from benchbox.rows import Row
from benchbox.runner import run
from benchbox.verification import verify_cell

GRID = """
name = "fixed"
examples = 30
perturbed_access = ["fixed"]
[dataset]
name = "digits"
[[model]]
name = "digits-cnn"
weights = "standard"
[[weight_perturbation]]
name = "synaptic-filter"
filter = "high-pass"
layer = "conv1"
sweep.threshold = [0.1, 0.3, 0.5]
[[threat]]
norm = "linf"
eps = 0.1
[[attack]]
name = "{attack}"
"""


def rows_of(attack: str, settings: Settings) -> list[Row]:
    """The filtered networks' results."""
    path = settings.output / "grid.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(GRID.format(attack=attack))
    assert run(path, settings, Registry.discover(), RunProgress(quiet=True)).failures == []
    return [row for row in benchbox.open_results(settings.database).rows() if row.cell.fixed]


def files(settings: Settings) -> list[Path]:
    assert settings.examples_dir
    return sorted(settings.examples_dir.rglob("*.npz"))


def test_a_fixed_set_is_one_file_for_all_networks(settings: Settings) -> None:
    rows = rows_of("fgsm", settings)

    assert len({row.key for row in rows}) == 3
    assert len({row.examples_sha256 for row in rows}) == 1
    assert len(files(settings)) == 2  # and what the intact network met itself


@pytest.mark.parametrize("attack", ["fgsm", "deepfool"])
def test_each_network_is_verified_on_what_of_the_set_it_met(attack: str, settings: Settings) -> None:
    attacked = set()
    for row in rows_of(attack, settings):
        met = int(benchbox.open_results(settings.database).record(row.key).attacked.sum())
        attacked.add(met)

        verification = verify_cell(row.key, settings)

        assert verification.differences == ()
        assert verification.count == met
    assert len(attacked) > 1  # the networks are wrong about different inputs


def test_a_changed_file_of_a_fixed_set_is_noticed(settings: Settings) -> None:
    row = rows_of("fgsm", settings)[0]
    (path,) = (path for path in files(settings) if path.name.startswith(row.cell.intact.key))
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    with pytest.raises(StoreError, match="is not the file that was stored"):
        verify_cell(row.key, settings)
