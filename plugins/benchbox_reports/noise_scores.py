"""Summaries of accuracy against the level of noise on the weights; pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def noise_area(levels: Sequence[float], accuracy: Sequence[float], intact: float) -> float | None:
    """The mean of accuracy / intact over the logarithm of the levels (n >= 2, above 0, rising), by trapezoids.

    1 where noise does nothing. None for a single level, or where the intact model has no accuracy.
    """
    if len(levels) < 2 or intact <= 0:
        return None
    x, y = np.log(np.asarray(levels, np.float64)), np.asarray(accuracy, np.float64) / intact
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / (x[-1] - x[0]))


def half_level(levels: Sequence[float], accuracy: Sequence[float], intact: float, chance: float) -> float | None:
    """The level at which accuracy above chance first falls to half of the intact model's; the critical-layer index.

    Interpolated linearly in the logarithm of the levels (above 0, rising). Infinity where accuracy never falls so far,
    the first level where it has done so already; None where the intact model is not above chance.
    """
    if intact <= chance:
        return None
    left = [(value - chance) / (intact - chance) for value in accuracy]
    for place, value in enumerate(left):
        if value <= 0.5:
            if place == 0:
                return levels[0]
            share = (left[place - 1] - 0.5) / (left[place - 1] - value)
            return math.exp((1 - share) * math.log(levels[place - 1]) + share * math.log(levels[place]))
    return math.inf
