"""The statistics of spread against known values, numpy and scipy, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchbox_attributions.dispersion import dispersion

MOMENTS = ("std", "variance", "mean-abs-deviation", "kurtosis", "skewness")
STATISTICS = (*MOMENTS, "iqr", "mad")


@pytest.mark.parametrize(
    ("values", "truth"),
    [
        ([0, 1, 2, 3, 4], (2**0.5, 2, 1.2, 1.3, 0, 2, 1)),
        ([0, 0, 0, 0, 10], (4, 16, 3.2, -0.25, -1.5, 0, 0)),
        ([7, 7, 7, 7], (0, 0, 0, 0, 0, 0, 0)),
        ([0.1, 0.1, 0.1], (0, 0, 0, 0, 0, 0, 0)),  # a mean that rounding moves
        ([0, 0], (0, 0, 0, 0, 0, 0, 0)),
    ],
)
def test_dispersion_of_known_vectors(values: list[float], truth: tuple[float, ...]) -> None:
    found = [float(dispersion(torch.tensor([values], dtype=torch.float32), name)) for name in STATISTICS]

    assert found == pytest.approx(truth, abs=2e-6)


@pytest.mark.parametrize("size", [64, 65])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e6])
def test_dispersion_agrees_with_numpy_and_scipy(size: int, scale: float) -> None:
    values = np.random.default_rng(size).gamma(2.0, scale, (5, size))
    truth = {
        "std": values.std(1),
        "variance": values.var(1),
        "mean-abs-deviation": np.abs(values - values.mean(1, keepdims=True)).mean(1),
        "kurtosis": -stats.kurtosis(values, axis=1),
        "skewness": -stats.skew(values, axis=1),
        "iqr": stats.iqr(values, axis=1),
        "mad": stats.median_abs_deviation(values, axis=1),
    }

    for name in STATISTICS:
        found = dispersion(torch.tensor(values, dtype=torch.float32), name).numpy()
        np.testing.assert_allclose(found, truth[name], rtol=2e-4, atol=0)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_constant_rows_have_a_gradient_and_unknown_values_stay_unknown(statistic: Any) -> None:
    x = torch.full((1, 9), 0.5, requires_grad=True)

    dispersion(x, statistic).sum().backward()

    assert x.grad is not None
    assert x.grad.isfinite().all()
    spoilt = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]])
    assert dispersion(spoilt, statistic).isfinite().tolist() == [False, True]


@pytest.mark.parametrize("statistic", ["iqr", "mad"])
def test_the_slope_of_a_quantile_is_spread_over_its_neighbours(statistic: Any) -> None:
    values = torch.randn(1, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    value = dispersion(values, statistic)
    slope = torch.autograd.grad(value.sum(), values)[0]

    assert (slope != 0).sum() > 20  # the exact slope has at most 6 entries
    torch.testing.assert_close(slope.sum(), torch.zeros(()).double(), atol=0.1, rtol=0)  # shifting all changes nothing
    torch.testing.assert_close((slope * values).sum(1), value, atol=0.05, rtol=0)  # Euler: it is homogeneous
