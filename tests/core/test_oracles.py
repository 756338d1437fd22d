"""The linear oracle's distances against general-purpose optimisers that know nothing of its formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from benchbox.domain import Norm
from benchbox.testing.oracles import LinearModel

SIZE = 6


@pytest.fixture
def model() -> LinearModel:
    return LinearModel.random(classes=3, shape=(1, 2, 3), seed=0)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 2, 3, generator=torch.Generator().manual_seed(1))


def _half_space(a: np.ndarray, c: float, x: np.ndarray, norm: Norm) -> float:
    """The distance from ``x`` to the z in the unit box with a.z + c <= 0."""
    if norm == "l2":
        result = minimize(
            lambda z: ((z - x) ** 2).sum(), x, jac=lambda z: 2 * (z - x), bounds=[(0, 1)] * SIZE, method="SLSQP",
            constraints=[{"type": "ineq", "fun": lambda z: -(a @ z + c), "jac": lambda z: -a}],
            options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        return float(np.sqrt(result.fun)) if result.success else np.inf
    if norm == "l0":
        gains = np.maximum(a * x, -a * (1 - x))
        subsets = (s for size in range(SIZE + 1) for s in itertools.combinations(range(SIZE), size))
        return next((len(s) for s in subsets if a @ x + c <= gains[list(s)].sum()), np.inf)
    slack = np.ones((SIZE, 1)) if norm == "linf" else np.eye(SIZE)  # |z - x| <= slack @ t, minimise sum t
    count = slack.shape[1]
    result = linprog(
        np.r_[np.zeros(SIZE), np.ones(count)],
        A_ub=np.block([[a[None], np.zeros((1, count))], [np.eye(SIZE), -slack], [-np.eye(SIZE), -slack]]),
        b_ub=np.r_[-c, x, -x], bounds=[(0, 1)] * SIZE + [(0, None)] * count,
    )  # fmt: skip
    return float(result.fun) if result.status == 0 else np.inf


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_distance_is_what_an_optimiser_finds(model: LinearModel, norm: Norm) -> None:
    x = images(25)
    y = torch.arange(25) % 3  # some are misclassified already, some classes may be out of reach
    weight, bias = model.weight.double().numpy(), model.bias.double().numpy()

    exact = model.distance(x, y, norm)

    for point, label, distance in zip(x.double().flatten(1).numpy(), y.tolist(), exact.tolist(), strict=True):
        found = min(
            _half_space(weight[label] - weight[other], bias[label] - bias[other], point, norm)
            for other in range(3)
            if other != label
        )
        assert distance == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_nearest_lies_in_the_box_and_no_longer_belongs_to_its_class(model: LinearModel, norm: Norm) -> None:
    x = images(25)
    y = model(x).argmax(1)

    nearest = model.nearest(x, y, norm)

    assert nearest.min() >= 0
    assert nearest.max() <= 1
    logits = model.double()(nearest)
    assert (logits.amax(1) - logits.gather(1, y[:, None])[:, 0]).min() > -1e-9
    if norm != "l0":  # there, as many values may reach several classes
        assert (logits.amax(1) - logits.gather(1, y[:, None])[:, 0]).max() < 1e-9


def test_what_cannot_be_reached_is_infinitely_far() -> None:
    model = LinearModel(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([10.0, 0.0]))
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])

    assert model.distance(x, y, "l2").isinf().all()
    assert model.nearest(x, y, "l2").isnan().all()


def test_a_misclassified_input_is_at_distance_zero(model: LinearModel) -> None:
    x = images(10)
    y = model(x).argmin(1)

    assert (model.distance(x, y, "linf") == 0).all()
