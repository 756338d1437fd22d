"""Built-in defenses that are expensive to fit are fitted once; sweeps of what comes afterwards share the fit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import benchbox
from benchbox.config import Settings
from benchbox.domain import Record
from benchbox.registry import Registry
from benchbox.runner import run
from builders import Silent

GRID = """
name = "fitted"
examples = 20

[dataset]
name = "digits"

[[model]]
name = "digits-cnn"
weights = "standard"

[[threat]]
norm = "linf"
eps = 0.1

[[attack]]
name = "fgsm"

[[defense]]
"""
COSTLY = {
    "lesci": 'name = "lesci"\nrank = 16',
    "mahalanobis-features": 'name = "mahalanobis-features"',
    "kernel-density": 'name = "kernel-density"',
    "lid": 'name = "lid"\nreferences = 50',
    "pca-bottleneck": 'name = "pca-bottleneck"\nrank = 16',
    "vector-quantisation": 'name = "vector-quantisation"\ncodes = 20',
    "ml-loo": 'name = "ml-loo"\npairs = 40\nheld_out = 100',
    "ml-loo single": 'name = "ml-loo"\nform = "single"\nstatistics = ["std"]\nreference = "mean"\nheld_out = 100',
    "max-softmax": 'name = "confidence-detector"',
    "entropy": 'name = "confidence-detector"\nscore = "entropy"',
    "energy": 'name = "confidence-detector"\nscore = "energy"',
    "feature-squeezing": 'name = "feature-squeezing"',
    "attribution-detector": 'name = "attribution-detector"\ntail = "both"',
    "attribution-consistency": 'name = "attribution-consistency"\ntransform = "bit-depth"',
    "attribution-anomaly": 'name = "attribution-anomaly"',
    "attribution-anomaly by a forest": 'name = "attribution-anomaly"\nanomaly = "isolation-forest"',
    "attribution-ensemble": 'name = "attribution-ensemble"\npairs = 40\ntrees = 20',
    "attribution-ensemble, linear": 'name = "attribution-ensemble"\npairs = 40\ncombine = "logistic-regression"',
    "attribution-mask": 'name = "attribution-mask"\nreplacement = "mean"',
}
Run = Callable[[str], tuple[list[str], list[Record]]]


@pytest.fixture
def found(tmp_path: Path, settings: Settings) -> Run:
    """Runs the grid with a defense, known cells included; gives how each cell's model was fitted, and the records."""
    registry = Registry.discover()

    def start(defense: str) -> tuple[list[str], list[Record]]:
        database = f"sqlite:///{tmp_path}/{len(list(tmp_path.glob('*.db')))}.db"  # each run has its own results
        (tmp_path / "grid.toml").write_text(GRID + defense)
        summary = run(tmp_path / "grid.toml", settings.model_copy(update={"database": database}), registry, Silent())
        assert summary.exit_code == 0
        results = benchbox.open_results(database)
        return [row.environment["fit"] for row in results.rows()], [results.record(row.key) for row in results.rows()]

    return start


@pytest.mark.parametrize("name", COSTLY)
def test_a_second_run_fits_nothing_and_finds_the_same(name: str, found: Run) -> None:
    first, (before,) = found(COSTLY[name])

    second, (after,) = found(COSTLY[name])

    assert (first, second) == (["computed"], ["from the cache"])
    assert before.attacked.any()
    for part in fields(before):
        if part.name not in ("seconds", "clean_evidence", "evidence"):
            np.testing.assert_array_equal(getattr(after, part.name), getattr(before, part.name), part.name)
    for score, values in before.evidence.items():
        np.testing.assert_array_equal(after.evidence[score], values, score)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lesci", "sweep.threshold = [0.3, 0.6, 0.9]"),
        ("lesci", "sweep.k = [1, 10, 20]"),
        ("pca-bottleneck", "sweep.centred = [true, false]"),
        ("vector-quantisation", 'sweep.surrogate = ["soft", "straight-through"]'),
        ("ml-loo", "sweep.samples = [8, 16]"),
    ],
)
def test_a_sweep_of_what_comes_after_the_fit_fits_once(name: str, options: str, found: Run) -> None:
    fits, records = found(f"{COSTLY[name]}\n{options}")

    assert sorted(fits) == ["computed"] + ["from the cache"] * (len(records) - 1)


def test_another_rank_is_another_fit(found: Run) -> None:
    fits, _ = found('name = "pca-bottleneck"\nsweep.rank = [8, 16]')

    assert fits == ["computed", "computed"]


def test_the_results_of_a_shared_fit_are_those_of_a_fit_of_their_own(found: Run, settings: Settings) -> None:
    found('name = "pca-bottleneck"\nrank = 16')  # centred, whose mean is kept
    shared, (from_cache,) = found('name = "pca-bottleneck"\nrank = 16\ncentred = false')
    shutil.rmtree(settings.fitted_dir)

    own, (alone,) = found('name = "pca-bottleneck"\nrank = 16\ncentred = false')

    assert (shared, own) == (["from the cache"], ["computed"])
    np.testing.assert_array_equal(from_cache.loss, alone.loss)


@pytest.mark.parametrize(
    ("defense", "message"),
    [
        ('name = "mahalanobis-features"\nfpr = 0.0001', "too few to fix a false-positive rate of 0.0001: 10000 are"),
        ('name = "kernel-density"\nfpr = 0.0001', "too few to fix a false-positive rate of 0.0001: 10000 are needed"),
        ('name = "confidence-detector"\nfpr = 0.0001', "too few to fix a false-positive rate of 0.0001: 10000 are"),
        ('name = "attribution-detector"\nfpr = 0.0001', "too few to fix a false-positive rate of 0.0001: 10000 are"),
        ('name = "lesci"\nrank = 5000', "rank 5000 is more than the .* features of .*: choose at most"),
        ('name = "lid"\nreferences = 5000', "is less than references = 5000; lower it or enlarge the split"),
    ],
)
def test_what_cannot_be_fitted_fails_its_cells_with_the_reason_and_keeps_nothing(
    defense: str, message: str, tmp_path: Path, settings: Settings
) -> None:
    (tmp_path / "grid.toml").write_text(GRID + defense)

    summary = run(tmp_path / "grid.toml", settings, Registry.discover(), Silent())

    failures = benchbox.open_results(settings.database).failures()
    assert summary.exit_code == 1
    assert failures
    assert all(re.search(message, failure.error) for failure in failures)
    assert not list(tmp_path.rglob("*.safetensors"))
