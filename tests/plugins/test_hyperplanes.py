"""The shortest ways to a hyperplane inside the image range, against independent solvers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from benchbox.api import ContractError
from benchbox.domain import Norm
from benchbox_attacks.hyperplanes import shortest_move
from benchbox_attacks.nearest import length

NORMS: list[Norm] = ["linf", "l2", "l1"]
every_norm = pytest.mark.parametrize("norm", NORMS)


def solved(point: Tensor, slope: Tensor, gain: float, norm: Norm) -> float:
    """The length of the shortest move, by scipy's solvers; infinite where the range does not let it gain so much."""
    x, w = point.numpy(), slope.numpy()
    d = len(x)
    if norm == "l2":
        # A feasible start first; the objective is smooth and convex, so that the local minimum is the one.
        begin = linprog(np.zeros(d), A_eq=w[None], b_eq=[gain], bounds=list(zip(-x, 1 - x, strict=True)))
        if begin.status != 0:
            return math.inf
        found = minimize(
            lambda m: m @ m, begin.x, jac=lambda m: 2 * m, method="SLSQP", bounds=list(zip(-x, 1 - x, strict=True)),
            constraints={"type": "eq", "fun": lambda m: w @ m - gain, "jac": lambda m: w},
            options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        return float(np.sqrt(found.fun))
    # Variables: the move and bounds on its values, one for all of them (linf) or one each (l1).
    spare = 1 if norm == "linf" else d
    bound = np.ones((d, 1)) if norm == "linf" else np.eye(d)
    result = linprog(
        np.r_[np.zeros(d), np.ones(spare)],
        A_ub=np.block([[np.eye(d), -bound], [-np.eye(d), -bound]]), b_ub=np.zeros(2 * d),
        A_eq=np.r_[w, np.zeros(spare)][None], b_eq=[gain],
        bounds=list(zip(np.r_[-x, np.zeros(spare)], np.r_[1 - x, np.full(spare, np.inf)], strict=True)),
    )  # fmt: skip
    return float(result.fun) if result.status == 0 else math.inf


@every_norm
def test_no_other_move_is_shorter(norm: Norm) -> None:
    """Points in the range, on its edge and in its corners; some values without slope; from easy to impossible gains."""
    rng = torch.Generator().manual_seed(0)
    points = (1.6 * torch.rand(16, 1, 3, 3, dtype=torch.float64, generator=rng) - 0.3).clamp(0, 1)
    slope = torch.randn(16, 1, 3, 3, dtype=torch.float64, generator=rng)
    slope[::4, :, 1] = 0.0
    gain = torch.randn(16, dtype=torch.float64, generator=rng) * torch.linspace(0.1, 3.0, 16, dtype=torch.float64)

    moves = shortest_move(points, slope, gain, norm)

    exact = torch.tensor(
        [solved(p.flatten(), w.flatten(), float(g), norm) for p, w, g in zip(points, slope, gain, strict=True)]
    )
    possible, gained = exact.isfinite(), (slope * moves).flatten(1).sum(1)
    assert 4 < possible.sum() < 15
    assert (points + moves).min() >= 0
    assert (points + moves).max() <= 1
    torch.testing.assert_close(gained[possible], gain[possible], rtol=0, atol=1e-12)
    torch.testing.assert_close(length(moves, norm)[possible], exact[possible].double(), rtol=0, atol=1e-6)


@every_norm
def test_where_the_hyperplane_is_out_of_reach_all_values_go_as_far_as_they_can(norm: Norm) -> None:
    points = torch.tensor([0.2, 0.4, 1.0, 0.5]).reshape(1, 1, 2, 2)
    slope = torch.tensor([1.0, -2.0, 3.0, 0.0]).reshape(1, 1, 2, 2)

    up = shortest_move(points, slope, torch.tensor([100.0]), norm)
    down = shortest_move(points, slope, torch.tensor([-100.0]), norm)

    torch.testing.assert_close(up.flatten(), torch.tensor([0.8, -0.4, 0.0, 0.0]))
    torch.testing.assert_close(down.flatten(), torch.tensor([-0.2, 0.6, -1.0, 0.0]))


@every_norm
@pytest.mark.parametrize("gain", [-1.0, 0.0, 1.0])
def test_without_a_slope_or_a_need_nothing_moves(norm: Norm, gain: float) -> None:
    points, need = torch.rand(3, 1, 2, 2), torch.full((3,), gain)

    assert (shortest_move(points, torch.zeros(3, 1, 2, 2), need, norm) == 0).all()
    assert (shortest_move(points, torch.randn(3, 1, 2, 2), torch.zeros(3), norm) == 0).all()


@every_norm
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_slope_does_not_matter(norm: Norm, scale: float) -> None:
    """Squares of such numbers are none in float32."""
    points, slope = torch.rand(5, 1, 4, 4), torch.randn(5, 1, 4, 4)
    gain = torch.linspace(-0.5, 0.5, 5)

    scaled = shortest_move(points, slope * scale, gain * scale, norm)

    torch.testing.assert_close(scaled, shortest_move(points, slope, gain, norm), rtol=1e-4, atol=1e-6)


def test_other_norms_are_refused() -> None:
    with pytest.raises(ContractError, match="use linf, l2 or l1"):
        shortest_move(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2), torch.ones(1), "l0")
