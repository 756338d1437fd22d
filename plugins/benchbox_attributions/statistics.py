"""What one attribution map is like: location and scale, shape, concentration, place. Batched and differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchbox_attributions.dispersion import Statistic, dispersion, quantile

Reduction = Literal["sum", "abs-sum", "l2", "none"]
"""How a pixel's channels become one number; with ``none`` each value counts by itself."""

STEP = 0.1
"""Width of the slope that a count gets, in mean magnitudes of its map."""


def statistics(
    phi: Float[Tensor, "n c h w"], reduction: Reduction = "sum", names: Sequence[str] | None = None
) -> dict[str, Float[Tensor, " n"]]:
    """The named statistics (by default all :data:`STATISTICS`, in their order) of each attribution map.

    Channels are reduced first; a are the d values left, p = |a| / Σ|a|. In units of the attribution: ``mean``,
    ``median``, ``std``, ``mean-abs-deviation``, ``mad`` (median |a - median|), ``iqr``, ``range``, ``l1``, ``l2``,
    ``max-abs`` and ``total-variation`` (Σ |difference| of pixels above and beside each other); squared: ``variance``.
    Pure numbers: ``skew`` and ``excess-kurtosis`` (population moments; the signs are scipy's, not ML-LOO's), ``gini``
    in [0, 1 - 1/d] (Hurley & Rickard 2009, arXiv 0811.4706), ``entropy`` of p in nats, ``participation`` 1 / Σp²,
    ``effective-pixels`` (how many |a| exceed 1 % of the largest), ``top-1-percent-mass`` and ``top-10-percent-mass``
    (the share of Σ|a| that the ⌈d / 100⌉, ⌈d / 10⌉ largest hold), ``positive-fraction``. In pixels, with p as
    weights: ``centre-row``, ``centre-column`` (0 is the first), ``spread`` (root mean square distance from there).

    An all-zero map counts as evenly spread (p = 1/d: Gini 0, entropy ln d), a constant one has skew and kurtosis 0;
    :func:`degenerate` tells them. All statistics of a map that is not finite are NaN. ``float64`` stays, everything
    else is computed in ``float32``. Quantiles and counts have the slope of smooth stand-ins, so that an attacker can
    follow them; their values are exact.

    Raises ValueError for a name that does not exist.
    """
    chosen = tuple(STATISTICS) if names is None else tuple(names)
    unknown = [name for name in chosen if name not in _STATISTICS]
    if unknown:
        raise ValueError(f"there is no statistic {unknown[0]!r}; there are {', '.join(STATISTICS)}")
    maps = Maps(reduced(phi, reduction))
    return {name: torch.where(maps.finite, _STATISTICS[name](maps), torch.nan) for name in chosen}


def degenerate(phi: Float[Tensor, "n c h w"], reduction: Reduction = "sum") -> Bool[Tensor, " n"]:
    """Which maps are the same everywhere, so that shape and concentration are conventions and not findings."""
    values = Maps(reduced(phi, reduction)).values
    return values.amax(1) == values.amin(1)


def reduced(phi: Float[Tensor, "n c h w"], reduction: Reduction) -> Float[Tensor, "n k h w"]:
    """``phi`` with its channels made one (k = 1), or all of them (k = c) for ``none``; at least float32."""
    phi = phi.to(torch.promote_types(phi.dtype, torch.float32))
    match reduction:
        case "sum":
            return phi.sum(1, keepdim=True)
        case "abs-sum":
            return phi.abs().sum(1, keepdim=True)
        case "l2":
            return torch.linalg.vector_norm(phi, dim=1, keepdim=True)  # its slope at 0 is 0
        case "none":
            return phi


@dataclass(frozen=True)
class Maps:
    """Reduced maps (n, k, h, w) in the forms that the statistics are made of, each worked out once."""

    maps: Tensor

    @cached_property
    def values(self) -> Float[Tensor, "n d"]:
        return self.maps.flatten(1)

    @cached_property
    def finite(self) -> Bool[Tensor, " n"]:
        return self.values.detach().isfinite().all(1)

    @cached_property
    def shares(self) -> Float[Tensor, "n d"]:
        """p, which sums to 1."""
        size = self.values.abs()
        size = size / _or_one(size.detach().amax(1, keepdim=True))  # else sums of tiny values lose their digits
        total = size.sum(1, keepdim=True)
        return torch.where(total == 0, 1 / size.shape[1], size / _or_one(total))

    @cached_property
    def ordered(self) -> Float[Tensor, "n d"]:
        """The shares, ascending."""
        return self.shares.sort(1).values

    @cached_property
    def centre(self) -> tuple[Tensor, Tensor]:
        """The row and the column of the centre of mass, each (n,)."""
        weights, rows, columns = self.placed
        return (weights * rows).sum((1, 2)), (weights * columns).sum((1, 2))

    @cached_property
    def placed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The share of each pixel (n, h, w), and the rows (h, 1) and columns (w) of pixels."""
        weights = self.shares.view(self.maps.shape).sum(1)
        height, width = weights.shape[1:]
        return weights, torch.arange(height).to(weights)[:, None], torch.arange(width).to(weights)


def _or_one(size: Tensor) -> Tensor:
    return torch.where(size == 0, 1.0, size)


def _gini(maps: Maps) -> Tensor:
    d = maps.values.shape[1]
    return ((2 * torch.arange(1, d + 1).to(maps.values) - d - 1) * maps.ordered).sum(1) / d


def _entropy(maps: Maps) -> Tensor:
    p = torch.where(maps.shares > 0, maps.shares, 1.0)  # 0 ln 0 = 0, also in the slope
    return -(p * p.log()).sum(1)


def _spread(maps: Maps) -> Tensor:
    weights, rows, columns = maps.placed
    row, column = (centre[:, None, None] for centre in maps.centre)
    variance = (weights * ((rows - row).square() + (columns - column).square())).sum((1, 2))
    return _or_one(variance).sqrt() * (variance != 0)


def _total_variation(maps: Maps) -> Tensor:
    return maps.maps.diff(dim=2).abs().sum((1, 2, 3)) + maps.maps.diff(dim=3).abs().sum((1, 2, 3))


def _count(above: Tensor, scale: Tensor) -> Tensor:
    """How many entries of each row of ``above`` (n, d) are positive, with the slope of a sigmoid."""
    exact = (above > 0).to(above).sum(1)
    soft = (above / (STEP * scale[:, None])).sigmoid().sum(1)
    return exact + (soft - soft.detach())


def _effective_pixels(maps: Maps) -> Tensor:
    p = maps.shares
    return _count(p - 0.01 * p.amax(1, keepdim=True), p.detach().mean(1))


def _positive_fraction(maps: Maps) -> Tensor:
    values = maps.values
    return _count(values, _or_one(values.detach().abs().mean(1))) / values.shape[1]


def _top_mass(share: float) -> Callable[[Maps], Tensor]:
    return lambda maps: maps.ordered[:, -math.ceil(share * maps.values.shape[1]) :].sum(1)


def _dispersion(statistic: Statistic, sign: int = 1) -> Callable[[Maps], Tensor]:
    return lambda maps: sign * dispersion(maps.values, statistic)


_STATISTICS: dict[str, Callable[[Maps], Tensor]] = {
    "mean": lambda maps: maps.values.mean(1),
    "median": lambda maps: quantile(maps.values, 0.5),
    "std": _dispersion("std"),
    "variance": _dispersion("variance"),
    "mean-abs-deviation": _dispersion("mean-abs-deviation"),
    "mad": _dispersion("mad"),
    "iqr": _dispersion("iqr"),
    "range": lambda maps: maps.values.amax(1) - maps.values.amin(1),
    "l1": lambda maps: maps.values.abs().sum(1),
    "l2": lambda maps: torch.linalg.vector_norm(maps.values, dim=1),
    "max-abs": lambda maps: maps.values.abs().amax(1),
    "skew": _dispersion("skewness", -1),
    "excess-kurtosis": _dispersion("kurtosis", -1),
    "gini": _gini,
    "entropy": _entropy,
    "participation": lambda maps: 1 / maps.shares.square().sum(1),
    "effective-pixels": _effective_pixels,
    "top-1-percent-mass": _top_mass(0.01),
    "top-10-percent-mass": _top_mass(0.1),
    "positive-fraction": _positive_fraction,
    "total-variation": _total_variation,
    "centre-row": lambda maps: maps.centre[0],
    "centre-column": lambda maps: maps.centre[1],
    "spread": _spread,
}

STATISTICS = tuple(_STATISTICS)
"""The names of all statistics."""
