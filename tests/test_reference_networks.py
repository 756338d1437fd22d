"""Our attacks against figures that others published for their own networks, on real MNIST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import benchbox
from benchbox.config import Settings
from benchbox.console import RunProgress
from benchbox.registry import Registry
from benchbox.runner import run

GRID = """
name = "published"
examples = {examples}
batch_size = 500
[dataset]
name = "mnist"
[[model]]
name = "checkpoint"
builder = "benchbox_models.reference:{builder}"
weights = "../models/{weights}"
[[threat]]
norm = "linf"
eps = {eps}
[[attack]]
{attack}
"""


@pytest.fixture
def scores(data_dir: Path, settings: Settings, tmp_path: Path) -> Any:
    """Runs an attack on one published network and returns its row."""

    def compute(**choice: Any) -> Any:
        if not (data_dir.parent / "models" / choice["weights"]).is_file():
            pytest.skip("the published networks do not lie beside the data folder")
        path = tmp_path / "grid.toml"
        path.write_text(GRID.format(**choice))
        here = settings.model_copy(update={"data_dir": data_dir, "keep_examples": False})
        summary = run(path, here, Registry.discover(), RunProgress(quiet=True))
        assert summary.failures == []
        (row,) = benchbox.open_results(here.database).rows()
        return row

    return compute


def test_wk17a_is_not_less_robust_than_its_exact_robustness(scores: Any) -> None:
    """MIPVerify (Tjeng, Xiao & Tedrake, ICLR 2019) decided every one of the 10,000 images by MILP: 4.38 % can be broken
    at 0.1. Below that a projection or a count is wrong; above 95.89 %, where their PGD stands, an attack is too weak.
    """
    attack = 'name = "apgd"\nloss = "dlr-targeted"\ntargets = 3\nsteps = 20'
    row = scores(builder="wk_net", weights="mipverify_WK17a_mnist.pth", examples=10_000, eps=0.1, attack=attack)

    assert row.value("accuracy", "clean") == 0.9811
    assert 0.9562 <= row.value("accuracy", "robust") <= 0.9589


def test_lenet5_falls_to_pgd_on_every_image(scores: Any) -> None:
    """AdverTorch's report: PGD with 40 steps of 0.01 at 0.3 succeeds on 100 %."""
    attack = 'name = "pgd"\nsteps = 40\nstep_size = 0.01'
    row = scores(builder="lenet5", weights="advertorch_lenet5_clntrained.pt", examples=500, eps=0.3, attack=attack)

    assert row.value("accuracy", "robust") == 0.0
