"""Statistics of attribution maps: known vectors, numpy and scipy as the oracle, degenerate maps, slopes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy import stats as scipy_stats

from benchbox_attributions.statistics import STATISTICS, Reduction, degenerate, reduced, statistics


def _maps(*rows: list[float]) -> torch.Tensor:
    """Maps (n, 1, 2, 2) with these values."""
    return torch.tensor(rows, dtype=torch.float64).view(-1, 1, 2, 2)


def _random_maps(n: int = 3, channels: int = 2, side: int = 7) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, channels, side, side + 1, generator=rng, dtype=torch.float64)


def _oracle(a: np.ndarray) -> dict[str, float]:
    """The same statistics of one map (h, w), the long way."""
    values, size = a.ravel(), np.abs(a).ravel()
    p, d = size / size.sum(), a.size
    largest_first = np.sort(p)[::-1]
    row, column = ndimage.center_of_mass(np.abs(a))
    rows, columns = np.indices(a.shape)
    distance = (rows - row) ** 2 + (columns - column) ** 2
    return {
        "mean": values.mean(),
        "median": float(np.median(values)),
        "std": values.std(),
        "variance": values.var(),
        "mean-abs-deviation": np.abs(values - values.mean()).mean(),
        "mad": float(scipy_stats.median_abs_deviation(values)),
        "iqr": float(scipy_stats.iqr(values)),
        "range": np.ptp(values),
        "l1": np.linalg.norm(values, 1),
        "l2": np.linalg.norm(values),
        "max-abs": size.max(),
        "skew": float(scipy_stats.skew(values)),
        "excess-kurtosis": float(scipy_stats.kurtosis(values)),
        # half the mean absolute difference of all pairs, over the mean
        "gini": float(np.abs(size[:, None] - size).mean() / (2 * size.mean())),
        "entropy": float(scipy_stats.entropy(p)),
        "participation": float(1 / (p**2).sum()),
        "effective-pixels": float((size > 0.01 * size.max()).sum()),
        "top-1-percent-mass": float(largest_first[: math.ceil(0.01 * d)].sum()),
        "top-10-percent-mass": float(largest_first[: math.ceil(0.1 * d)].sum()),
        "positive-fraction": float((values > 0).mean()),
        "total-variation": float(np.abs(np.diff(a, axis=0)).sum() + np.abs(np.diff(a, axis=1)).sum()),
        "centre-row": float(row),
        "centre-column": float(column),
        "spread": float(np.sqrt((p * distance.ravel()).sum())),
    }


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_all_statistics_agree_with_numpy_and_scipy(scale: float) -> None:
    phi = scale * _random_maps()

    found = statistics(phi, "sum")

    assert tuple(found) == STATISTICS
    for i, a in enumerate(phi.sum(1).numpy()):
        oracle = _oracle(a)
        assert {name: float(values[i]) for name, values in found.items()} == pytest.approx(oracle, rel=1e-9)


def test_the_test_vectors_of_the_specification() -> None:
    found = statistics(_maps([1, 1, 1, 1], [0, 0, 0, 1]))

    assert found["gini"].tolist() == pytest.approx([0, 0.75])
    assert found["entropy"].tolist() == pytest.approx([math.log(4), 0])
    assert found["std"].tolist() == pytest.approx([0, math.sqrt(3) / 4])
    assert found["participation"].tolist() == pytest.approx([4, 1])


def test_an_all_zero_map_counts_as_evenly_spread_and_is_called_degenerate() -> None:
    phi = _maps([0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 1])

    found = {name: values[0].item() for name, values in statistics(phi).items()}

    even = {"entropy": math.log(4), "participation": 4, "effective-pixels": 4, "centre-row": 0.5, "centre-column": 0.5}
    even |= {"top-1-percent-mass": 0.25, "top-10-percent-mass": 0.25, "spread": math.sqrt(0.5)}
    assert found == pytest.approx({name: even.get(name, 0) for name in STATISTICS})
    assert degenerate(phi).tolist() == [True, True, False]


def test_a_constant_map_has_neither_skew_nor_kurtosis() -> None:
    found = statistics(torch.full((1, 1, 5, 7), 0.1, dtype=torch.float32))

    assert found["skew"].item() == found["excess-kurtosis"].item() == 0
    assert found["std"].item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_map_that_is_not_finite_is_nan_in_every_statistic_and_leaves_its_neighbours_alone(spoilt: float) -> None:
    phi = _random_maps(2)
    phi[0, 0, 0, 0] = spoilt

    together, alone = statistics(phi), statistics(phi[1:])

    for name in STATISTICS:
        assert together[name][0].isnan(), name
        assert together[name][1] == alone[name][0], name


@pytest.mark.parametrize(
    ("reduction", "oracle"),
    [
        ("sum", lambda phi: phi.sum(1)),
        ("abs-sum", lambda phi: np.abs(phi).sum(1)),
        ("l2", lambda phi: np.sqrt((phi**2).sum(1))),
    ],
)
def test_channels_are_reduced_before_anything_else(reduction: Reduction, oracle: object) -> None:
    phi = _random_maps()

    maps = reduced(phi, reduction)

    assert callable(oracle)
    np.testing.assert_allclose(maps[:, 0].numpy(), oracle(phi.numpy()))
    assert statistics(phi, reduction)["l1"].tolist() == pytest.approx(np.abs(maps.numpy()).sum((1, 2, 3)).tolist())


def test_without_a_reduction_every_value_counts_and_places_are_still_pixels() -> None:
    phi = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    phi[0, 0, 3, 1] = 1.0
    phi[0, 2, 3, 1] = -1.0

    none, total = statistics(phi, "none"), statistics(phi, "sum")

    assert none["participation"].item() == pytest.approx(2)
    assert (none["centre-row"].item(), none["centre-column"].item(), none["spread"].item()) == (3, 1, 0)
    assert total["l1"].item() == 0  # they cancel


SMOOTH = tuple(set(STATISTICS) - {"median", "iqr", "mad", "effective-pixels", "positive-fraction"})


@pytest.mark.parametrize("reduction", ["sum", "abs-sum", "l2", "none"])
def test_slopes_are_those_of_finite_differences(reduction: Reduction) -> None:
    phi = _random_maps(2, 2, 3).requires_grad_()

    def stacked(maps: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(statistics(maps, reduction, sorted(SMOOTH)).values()), 1)

    assert torch.autograd.gradcheck(stacked, (phi,))


@pytest.mark.parametrize("name", ["median", "iqr", "mad", "effective-pixels", "positive-fraction"])
def test_quantiles_and_counts_have_a_slope_that_leads_where_they_grow(name: str) -> None:
    phi = _random_maps(1, 1, 15).pow(3).requires_grad_()
    before = statistics(phi, names=[name])[name]

    (slope,) = torch.autograd.grad(before.sum(), phi)
    after = statistics((phi + 0.1 * slope / slope.abs().max()).detach(), names=[name])[name]

    assert after.item() > before.item()


def test_slopes_are_finite_where_maps_are_zero() -> None:
    phi = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    phi[1, 0, 1, 1] = 1.0

    for reduction in ("sum", "abs-sum", "l2", "none"):
        leaf = phi.clone().requires_grad_()
        for values in statistics(leaf, reduction).values():
            (slope,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
            assert slope.isfinite().all()


def test_a_statistic_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"no statistic 'kurtosis'; there are mean, median, .*excess-kurtosis"):
        statistics(_random_maps(), names=["kurtosis"])
