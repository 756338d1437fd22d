"""The few statistics that metrics, boards and detectors share; NumPy and the standard library only."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from benchbox.domain import Array


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927, JASA 22:209-212; Brown, Cai & DasGupta 2001, §3.1.1).

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and n successes. With n = 0 nothing is
    known: (0, 1). Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: need 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = successes / n, 1 + z * z / n
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else (centre - reach) / weight  # exact at the ends, where rounding would show
    high = 1.0 if successes == n else (centre + reach) / weight
    return low, high


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact p-value for "both are equally often right", from the examples on which two systems differ.

    ``b`` examples only the first got right, ``c`` only the second (McNemar 1947; the exact binomial form: under the
    null hypothesis b ~ Binomial(b + c, 1/2)). 1 where they never differ. Raises ValueError for negative counts.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts of differing examples cannot be negative: {b}, {c}")
    n, term, tail = b + c, 1, 0
    for k in range(min(b, c) + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # the next binomial coefficient, in exact integers
    return min(1.0, tail / (1 << (n - 1))) if n else 1.0


def conservative_threshold(scores: Array, fpr: float) -> float:
    """The lowest of the clean ``scores`` (n,) such that at most ``fpr`` * n of them lie strictly above it.

    Whatever exceeds the returned value is flagged. Ties stay below, and a score that is not finite counts as flagged;
    if those alone overspend the budget, the answer is infinity, and so it is where there are no scores at all.
    Raises ValueError unless 0 <= fpr < 1.
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"a false-positive rate is at least 0 and below 1, not {fpr!r}")
    if not len(scores):
        return math.inf
    ordered = np.sort(np.where(np.isfinite(scores), scores, np.inf))
    allowed = math.floor(fpr * len(ordered) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return float(ordered[len(ordered) - 1 - allowed])


def bootstrap_median(values: Array, confidence: float = 0.95, resamples: int = 10_000) -> tuple[float, float, float]:
    """The median of ``values`` (n,) and its percentile bootstrap interval (Efron 1979, Annals of Statistics 7:1-26).

    Infinities are values like others, at the ends of the order. Resampling is seeded: equal values give equal bounds.
    The median of a resample depends on the ranks that it has in its middle alone, and those are drawn directly: the
    k-th of n uniform numbers is Beta(k, n - k + 1), and the next one follows it after the least of n - k others.
    NaN for no values.
    """
    if not len(values):
        return math.nan, math.nan, math.nan
    ordered, n = np.sort(values.astype(float)), len(values)
    middle = (n + 1) // 2
    rng = np.random.default_rng(0)
    below = rng.beta(middle, n - middle + 1, resamples)
    above = below if n % 2 else below + (1 - below) * rng.beta(1, n - middle, resamples)
    low, high = (ordered[np.minimum((place * n).astype(int), n - 1)] for place in (below, above))
    medians = np.sort((low + high) / 2)
    tail = math.floor((1 - confidence) / 2 * resamples)
    return (
        float(ordered[middle - 1] + ordered[n // 2]) / 2, float(medians[tail]), float(medians[resamples - 1 - tail]),
    )  # fmt: skip
