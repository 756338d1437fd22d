"""The L1 ball within the image range, against solvers that know nothing of sorted corners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from benchbox.api import AttackTarget, Examples
from benchbox.budget import allowance, distances
from benchbox.domain import Threat
from benchbox.engine import search
from benchbox.testing.oracles import LinearModel
from benchbox_attacks.balls import project, steepest
from benchbox_attacks.fgsm import FGSM
from benchbox_attacks.l1_ball import linear_maximum, project_l1, sparse_steepest
from benchbox_attacks.pgd import PGD


def scattered(shape: tuple[int, ...], spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Centres in [0, 1], some of their values on its borders, and points around them, float64."""
    rng = torch.Generator().manual_seed(seed)
    x = (1.6 * torch.rand(shape, generator=rng, dtype=torch.float64) - 0.3).clamp(0, 1)
    return x, x + spread * torch.randn(shape, generator=rng, dtype=torch.float64)


def bisected(moved: Tensor, x: Tensor, eps: float) -> Tensor:
    """The projection by halving the interval of the budget's multiplier: clamp(x + soft threshold) adds up to eps."""

    def at(multiplier: float) -> Tensor:
        wish = moved - x
        return (x + wish.sign() * (wish.abs() - multiplier).clamp_min(0)).clamp(0, 1)

    low, high = 0.0, float((moved - x).abs().max())
    if (at(0.0) - x).abs().sum() <= eps:
        return at(0.0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (at(middle) - x).abs().sum() > eps else (low, middle)
    return at(high)


@pytest.mark.parametrize("shape", [(20, 1, 28, 28), (20, 3, 5, 7), (20, 1, 1, 1)])
@pytest.mark.parametrize("spread", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("eps", [1e-6, 0.3, 4.0, 1e4])
def test_the_projection_is_what_bisection_finds(shape: tuple[int, ...], spread: float, eps: float) -> None:
    x, moved = scattered(shape, spread)

    found = project_l1(moved, x, eps)

    expected = torch.cat([bisected(moved[row, None], x[row, None], eps) for row in range(len(x))])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.2, 1.0])
def test_the_projection_is_what_a_general_solver_finds(eps: float) -> None:
    """SLSQP on the definition: the nearest x + up - down with up, down >= 0 that add up to no more than eps."""
    x, moved = scattered((5, 1, 2, 3), 0.5)

    for centre, point, found in zip(x, moved, project_l1(moved, x, eps), strict=True):
        start, wish = centre.flatten().numpy(), point.flatten().numpy()
        bounds = [(0, 1 - value) for value in start] + [(0, value) for value in start]
        solved = minimize(
            lambda v, start=start, wish=wish: float(np.sum((start + v[:6] - v[6:] - wish) ** 2)),
            np.zeros(12), bounds=bounds, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
            constraints={"type": "ineq", "fun": lambda v: eps - v.sum()},
        )  # fmt: skip
        assert found.flatten().numpy() == pytest.approx(start + solved.x[:6] - solved.x[6:], abs=1e-5)


def test_cutting_first_to_the_ball_and_then_to_the_range_gives_budget_away() -> None:
    """One value has no room left: all of the budget belongs to the other."""
    x, moved = torch.tensor([[[[1.0, 0.5]]]]), torch.tensor([[[[1.4, 0.9]]]])

    torch.testing.assert_close(project(moved, x, "l1", 0.3), torch.tensor([[[[1.0, 0.8]]]]))


@pytest.mark.parametrize("eps", [1e-6, 0.5, 12.0, 300.0])
def test_float32_points_stay_in_budget_and_in_range_to_the_last_bit(eps: float) -> None:
    x, moved = (points.float() for points in scattered((50, 3, 32, 32), 0.5))

    found = project(moved, x, "l1", eps)

    assert found.dtype == torch.float32
    assert distances(x, found)["l1"].max() <= allowance(Threat("l1", eps), 3072)
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(project(found, x, "l1", eps), found, rtol=0, atol=1e-7)


def test_points_inside_stay_where_they_are_and_rows_do_not_meet() -> None:
    x, moved = (points.float() for points in scattered((7, 1, 5, 3), 0.2))
    moved = moved.clamp(0, 1)
    budget = 1.001 * float(distances(x, moved)["l1"].median())

    together = project(moved, x, "l1", budget)

    inside = distances(x, moved)["l1"] <= budget
    assert torch.equal(together[inside], moved[inside])
    for row in range(7):
        assert torch.equal(project(moved[row, None], x[row, None], "l1", budget)[0], together[row])


@pytest.mark.parametrize("most", [0.15, 2.0])
def test_a_linear_function_is_largest_where_linear_programming_says(most: float) -> None:
    x, gradient = scattered((10, 1, 3, 4), 1.0)

    for centre, slope, found in zip(x, gradient, linear_maximum(gradient, x, 1.3, most), strict=True):
        start, weight = centre.flatten().numpy(), slope.flatten().numpy()
        bounds = [(0, min(most, 1 - value)) for value in start] + [(0, min(most, value)) for value in start]
        solved = linprog(np.concatenate([-weight, weight]), A_ub=np.ones((1, 24)), b_ub=[1.3], bounds=bounds)
        assert float((slope * (found - centre)).sum()) == pytest.approx(-solved.fun, abs=1e-9)
        assert float((found - centre).abs().sum()) <= 1.3 + 1e-9


def attacked(attack: FGSM | PGD, far: float, factor: float) -> int:
    """How many of six inputs fall to ``factor`` times their exact distance; the larger ``far``, the more values it
    takes to move."""
    model = LinearModel.random(2, (1, 8, 8), seed=0)
    images = 0.3 + 0.4 * torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model.bias = model.bias + far * torch.eye(2)[0]
    labels = model(images).argmax(1)
    distances = model.distance(images, labels, "l1").tolist()
    return sum(
        bool(
            search(
                attack, AttackTarget(model, 2), Examples(images[row, None], labels[row, None]), torch.tensor([row]),
                Threat("l1", factor * eps), seed=0, batch_size=1,
            ).claimed
        )
        for row, eps in enumerate(distances)
    )  # fmt: skip


@pytest.mark.parametrize("far", [0.0, 6.0])
@pytest.mark.parametrize(
    "attack",
    [
        FGSM(FGSM.Options()),
        PGD(PGD.Options(sparsity=0.01, steps=100)),
        PGD(PGD.Options(sparsity=0.01, random_start=False)),
    ],
    ids=["fgsm", "pgd", "pgd-from-the-input"],
)
def test_fgsm_and_pgd_fall_at_the_exact_distance(attack: FGSM | PGD, far: float) -> None:
    assert (attacked(attack, far, 0.99), attacked(attack, far, 1.01)) == (0, 6)


def test_sparse_steps_go_along_the_largest_entries() -> None:
    gradient = torch.tensor([[0.1, -3.0, 0.0, 2.0], [1.0, 1.0, 0.5, -1.0], [0.0, 0.0, 0.0, 0.0]]).reshape(3, 1, 2, 2)

    steps = sparse_steepest(gradient, torch.tensor([2, 1, 3])).flatten(1)

    expected = torch.tensor([[0.0, -1 / 2, 0.0, 1 / 2], [1 / 3, 1 / 3, 0.0, -1 / 3], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(steps, expected)
    torch.testing.assert_close(steepest(gradient, "l1")[0].flatten(), torch.tensor([0.0, -1.0, 0.0, 0.0]))
