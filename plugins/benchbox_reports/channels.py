"""Comparing the channels of layers: top k, overlap with its significance, rank correlation. NumPy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from benchbox.domain import Array


def top_count(width: int, share: float = 0.1) -> int:
    """How many channels of a layer of ``width`` are its top ``share``: rounded down, but at least 1."""
    return max(1, math.floor(share * width + 1e-9))  # 0.29 * 100 is 28.999999999999996


def top(values: Array, k: int) -> list[int]:
    """The numbers of the ``k`` channels with the highest ``values`` (c,), from the highest; of equal ones the first.

    Channels without a value (NaN) are never among them.
    """
    order = np.argsort(-values, kind="stable")  # NaN goes last
    return [int(channel) for channel in order[:k] if not np.isnan(values[channel])]


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many channels two top lists share. ``p`` is the chance of sharing at least so many, were they unrelated."""

    shared: int
    jaccard: float
    expected: float  # shared channels of unrelated lists
    p: float


def overlap(one: Array, other: Array, k: int) -> Overlap | None:
    """The overlap of the top ``k`` channels of two layers of equal width; None where either has no values.

    ``p`` is the upper tail of the hypergeometric distribution (Fisher's exact test, one-sided); 1 where k is the width.
    """
    first, second = set(top(one, k)), set(top(other, k))
    if not first or not second:
        return None
    shared, width = len(first & second), len(one)
    return Overlap(
        shared,
        jaccard=shared / len(first | second),
        expected=len(first) * len(second) / width,
        p=hypergeometric_tail(shared, width, len(first), len(second)),
    )


def hypergeometric_tail(shared: int, width: int, marked: int, drawn: int) -> float:
    """The chance that of ``drawn`` of ``width`` channels, ``marked`` of them marked, at least ``shared`` are marked."""
    ways = sum(
        math.comb(marked, hits) * math.comb(width - marked, drawn - hits)
        for hits in range(shared, min(marked, drawn) + 1)
    )
    return ways / math.comb(width, drawn)


def rank_correlation(one: Array, other: Array) -> float | None:
    """Spearman's ρ over the channels that have both values; None for fewer than three, or where one does not vary."""
    both = ~(np.isnan(one) | np.isnan(other))
    first, second = ranks(one[both]), ranks(other[both])
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def ranks(values: Array) -> Array:
    """The ranks of ``values`` (c,) from 1, float64; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def ratio(one: float, other: float) -> float | None:
    """``other / one``, or None where that is undefined."""
    return other / one if one and math.isfinite(other / one) else None
