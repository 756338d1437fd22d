"""Intervals, tests and thresholds, against SciPy and against their own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchbox.statistics import bootstrap_median, conservative_threshold, mcnemar, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 10), (9911, 10_000), (1, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_agrees_with_scipy(successes: int, n: int, confidence: float) -> None:
    truth = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")

    assert wilson(successes, n, confidence) == pytest.approx((truth.low, truth.high), abs=1e-12)


def test_wilson_covers_the_share_and_is_exact_at_the_ends() -> None:
    for n in (1, 3, 17, 1000):
        for successes in (0, 1, n // 2, n):
            low, high = wilson(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="need 0 <= successes <= n"):
        wilson(successes, n)


@pytest.mark.parametrize(("b", "c"), [(0, 1), (5, 5), (2, 9), (9, 2), (0, 12), (140, 190), (1200, 1050)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    assert mcnemar(b, c) == pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue, rel=1e-9)


def test_mcnemar_without_differences_says_nothing_and_refuses_negative_counts() -> None:
    assert mcnemar(0, 0) == 1.0
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 3)


@pytest.mark.parametrize("n", [1, 10, 19, 20, 21, 100, 397])
@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.05, 0.1, 0.29, 0.99])
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_never_overspends_its_budget_and_is_the_lowest_such_score(n: int, fpr: float, ties: bool) -> None:
    scores = np.random.default_rng(n).normal(size=n).astype(np.float32)
    scores = np.round(scores) if ties else scores

    threshold = conservative_threshold(scores, fpr)

    assert np.sum(scores > threshold) <= fpr * n + 1e-9
    lower = scores[scores < threshold]
    if len(lower):
        assert np.sum(scores > lower.max()) > fpr * n


def test_the_threshold_spends_a_budget_that_only_rounding_would_lose() -> None:
    assert 0.29 * 100 < 29  # in floating point
    assert conservative_threshold(np.arange(100.0), 0.29) == 70.0


def test_scores_that_are_not_finite_count_as_flagged() -> None:
    scores = np.array([1.0, 2.0, 3.0, np.nan, np.inf, -np.inf, 4.0, 5.0, 6.0, 7.0])

    assert conservative_threshold(scores, 0.3) == 7.0
    assert conservative_threshold(scores, 0.4) == 6.0
    assert conservative_threshold(scores, 0.2) == math.inf
    assert conservative_threshold(np.array([]), 0.5) == math.inf


@pytest.mark.parametrize("fpr", [-0.1, 1.0, float("nan")])
def test_the_threshold_refuses_impossible_rates(fpr: float) -> None:
    with pytest.raises(ValueError, match="false-positive rate"):
        conservative_threshold(np.ones(3), fpr)


@pytest.mark.parametrize("n", [1, 2, 15, 100, 501])
def test_the_bootstrap_of_a_median_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).gamma(2.0, size=n)
    resampled = np.median(np.random.default_rng(1).choice(values, (20_000, n)), axis=1)
    truth = np.quantile(resampled, [0.025, 0.975])

    median, low, high = bootstrap_median(values)

    assert median == pytest.approx(np.median(values))
    assert low <= median <= high
    ranks = [np.searchsorted(np.sort(values), bounds) / n for bounds in ((low, high), truth)]
    np.testing.assert_allclose(*ranks, atol=1.01 / n + 0.004)  # a bound is one value or its neighbour
    assert bootstrap_median(values) == (median, low, high)


def test_the_bootstrap_knows_infinities_and_no_values() -> None:
    assert bootstrap_median(np.array([1.0, 2.0, np.inf])) == (2.0, 1.0, math.inf)
    assert bootstrap_median(np.array([1.0, np.inf])) == (math.inf, 1.0, math.inf)
    assert all(math.isnan(bound) for bound in bootstrap_median(np.zeros(0)))
    assert bootstrap_median(np.full(9, 3.0)) == (3.0, 3.0, 3.0)
