"""Grids that ask for security curves or for mixed precision, on the digits network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from benchbox.domain import Execution, Record
from benchbox.grid import expand, load_grid
from benchbox.registry import Registry
from benchbox.runner import jobs_of
from benchbox.worker import run_job

GRID = """
name = "curves"
examples = 60
{grid}
[dataset]
name = "digits"

[[model]]
name = "digits-cnn"
weights = "pgd"

[[threat]]
norm = "linf"
eps = {eps}
{threat}
[[attack]]
name = "pgd"
steps = 10
"""

Records = Mapping[float, Record]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Records]:
    registry, folder = Registry.discover(), tmp_path_factory.mktemp("curves")

    def compute(eps: list[float], grid: str = "", threat: str = "", batch_size: int = 60) -> Records:
        path = folder / "grid.toml"
        path.write_text(GRID.format(eps=eps, grid=grid, threat=threat))
        plan = expand(load_grid(path), registry, folder)
        execution = Execution(folder, batch_size=batch_size, threads=1)
        records = {}
        for job in jobs_of(plan.cells, execution, plan):
            eps_of = {cell.key: cell.threat.eps for cell in job.cells if cell.threat}
            for outcome in run_job(job, registry):
                assert outcome.record is not None, outcome.error
                records[eps_of[outcome.key]] = outcome.record
        return records

    return compute


RADII = [0.05, 0.1, 0.15, 0.2]


def test_a_curve_pays_the_full_price_of_an_example_at_most_once(run) -> None:
    curve, apart = run(RADII, threat="curve = true"), run(RADII)

    spent = sum(record.forwards for record in curve.values())
    full = 11  # forward passes of PGD's ten steps
    in_vain = sum(((record.forwards == full) & ~record.success).astype(int) for record in curve.values())
    assert (in_vain <= 1).all()
    assert spent.sum() < 0.6 * sum(record.forwards.sum() for record in apart.values())


def test_a_curve_never_rises_and_is_about_as_strong_as_separate_searches(run) -> None:
    curve, apart = run(RADII, threat="curve = true"), run(RADII)

    robust = [int(curve[radius].robust.sum()) for radius in RADII]
    separate = [int(apart[radius].robust.sum()) for radius in RADII]
    assert robust == sorted(robust, reverse=True)
    assert all(abs(one - other) <= 2 for one, other in zip(robust, separate, strict=True))
    assert separate[0] - separate[-1] > 5  # radii over which something happens


def test_every_point_of_a_curve_is_within_its_own_radius(run) -> None:
    for radius, record in run(RADII, threat="curve = true").items():
        assert (record.linf <= radius * (1 + 1e-6)).all()
        assert (record.linf[record.success] > 0).all()


def test_a_curve_does_not_depend_on_the_batch_size(run) -> None:
    one, other = (run(RADII, threat="curve = true", batch_size=size) for size in (7, 60))

    for radius in RADII:
        differing = int((one[radius].success != other[radius].success).sum())
        assert differing <= 1
        np.testing.assert_allclose(one[radius].forwards.sum(), other[radius].forwards.sum(), rtol=0.05)


@pytest.mark.parametrize("units", [{}, {"amx_bf16": True}], ids=["without bfloat16", "with bfloat16"])
def test_mixed_precision_finds_what_float32_finds(run, monkeypatch, units) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)

    exact, mixed = run([0.15]), run([0.15], grid='precision = "mixed"')

    assert 5 < exact[0.15].robust.sum() < 55
    assert abs(int(exact[0.15].robust.sum()) - int(mixed[0.15].robust.sum())) <= 1
    assert (mixed[0.15].claimed == mixed[0.15].success).all()  # a claim was confirmed by the float32 model


def test_max_passes_caps_what_an_example_may_cost(run) -> None:
    record = run([0.05], grid="max_passes = 8")[0.05]

    assert ((record.forwards + record.backwards)[record.attacked & ~record.success] == 8).all()
