"""Distances in every norm, and what counts as within a budget."""

from __future__ import annotations

import math

import pytest
import torch

from benchbox.budget import allowance, distances
from benchbox.domain import Threat


def test_distances_are_the_norms() -> None:
    clean = torch.zeros(1, 1, 2, 2)
    moved = torch.tensor([[[[0.3, -0.4], [0.0, 0.0]]]])

    found = {norm: float(value) for norm, value in distances(clean, moved).items()}

    assert found == pytest.approx({"linf": 0.4, "l2": 0.5, "l1": 0.7, "l0": 2.0})


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_allowance_covers_rounding_and_hardly_more(norm: str) -> None:
    threat, values = Threat(norm, 8 / 255), 3072  # type: ignore[arg-type]
    clean = torch.rand(1000, values, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = torch.full((values,), {"linf": 1.0, "l2": 1 / math.sqrt(values), "l1": 1 / values}[norm] * threat.eps)
    rounded = (clean.float() + step.float()).double()

    found = distances(clean.float().reshape(1000, 3, 32, 32), rounded.float().reshape(1000, 3, 32, 32))[norm]

    assert float(found.max()) <= allowance(threat, values)
    assert allowance(threat, values) < threat.eps * 1.01
