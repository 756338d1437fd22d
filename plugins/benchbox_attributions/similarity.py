"""How alike two attribution maps are, such as those of an image and of its adversarial version."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from benchbox_attributions.statistics import Maps, Reduction, reduced

TOP = 0.1
"""The share of a map's values that count as its top."""
SIGMA, RADIUS = 1.5, 5  # of the Gaussian window of SSIM: 11 x 11 pixels
C1, C2 = 0.01**2, 0.03**2


def similarity(
    one: Float[Tensor, "n c h w"],
    other: Float[Tensor, "n c h w"],
    reduction: Reduction = "sum",
    names: Sequence[str] | None = None,
) -> dict[str, Float[Tensor, " n"]]:
    """The named :data:`SIMILARITIES`, by default all, of the maps in pairs, channels reduced; a and b are their values.

    1 for equal maps: ``cosine``; ``pearson``; ``spearman`` (mean ranks for ties); ``top-iou`` (intersection over union
    of the places of the ⌈d / 10⌉ largest |a| and |b|; of equal values the first); ``ssim`` (Wang et al. 2004, doi
    10.1109/TIP.2003.819861, of maps stretched to [0, 1], over the places where its Gaussian window of 11 x 11 pixels
    fits; on smaller maps the window is the largest odd one that fits; the mean over channels that were not reduced).
    0 for equal maps: ``relative-change`` ‖a - b‖₂ / ‖a‖₂, the only one that is not symmetric; ``wasserstein`` and
    ``kolmogorov-smirnov``, distances of the distributions of values wherever these are, the former in units of the
    attribution; ``jensen-shannon``, the divergence of |a| / Σ|a| from |b| / Σ|b| in nats, at most ln 2.

    An all-zero map has cosine 0 with every map, a constant one correlations 0; the relative change of an all-zero map
    is 0 to another such and otherwise NaN. All are NaN where a map is not finite. Differentiable but for ``spearman``,
    ``top-iou`` and ``kolmogorov-smirnov``, which are piecewise constant.
    """
    chosen = {name: _SIMILARITIES[name] for name in names or SIMILARITIES}
    pair = _Pair(Maps(reduced(one, reduction)), Maps(reduced(other, reduction)))
    finite = pair.one.finite & pair.other.finite
    return {name: torch.where(finite, measure(pair), torch.nan) for name, measure in chosen.items()}


@dataclass(frozen=True)
class _Pair:
    one: Maps
    other: Maps

    @property
    def values(self) -> tuple[Tensor, Tensor]:
        return self.one.values, self.other.values


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of the rows; 0 where one is zero, which is judged after scaling so that tiny rows are rows like others."""
    a, b = (row / _largest(row) for row in (a, b))
    lengths = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / torch.where(lengths == 0, 1.0, lengths)


def _largest(rows: Tensor) -> Tensor:
    size = rows.detach().abs().amax(1, keepdim=True)
    return torch.where(size == 0, 1.0, size)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    return _cosine(_centred(a), _centred(b))


def _centred(rows: Tensor) -> Tensor:
    rows = rows / _largest(rows)
    centred = rows - rows.mean(1, keepdim=True)
    constant = rows.detach().amax(1, keepdim=True) == rows.detach().amin(1, keepdim=True)
    return torch.where(constant, 0.0, centred)  # what rounding leaves of a constant row is no finding


def _ranks(rows: Tensor) -> Tensor:
    """Equal values share the mean of their ranks."""
    rows = rows.detach()
    ordered = rows.sort(1).values
    below = torch.searchsorted(ordered, rows) + torch.searchsorted(ordered, rows, right=True)
    return (below + 1).to(rows) / 2


def _top_iou(a: Tensor, b: Tensor) -> Tensor:
    count = math.ceil(TOP * a.shape[1])
    tops = []
    for rows in (a, b):
        order = rows.detach().abs().argsort(dim=1, descending=True, stable=True)
        tops.append(torch.zeros_like(rows, dtype=torch.bool).scatter(1, order[:, :count], True))
    shared = (tops[0] & tops[1]).sum(1).to(a)
    return shared / (2 * count - shared)


def _ssim(pair: _Pair) -> Tensor:
    a, b = (_stretched(maps) for maps in (pair.one, pair.other))
    height, width = a.shape[2:]
    radius = min(RADIUS, (min(height, width) - 1) // 2)
    places = torch.arange(-radius, radius + 1).to(a)
    weights = (-places.square() / (2 * SIGMA**2)).exp()
    window = torch.outer(weights, weights) / weights.sum().square()

    def mean(maps: Tensor) -> Tensor:
        means = functional.conv2d(maps.flatten(0, 1)[:, None], window[None, None]).flatten(1)
        return means.view(*maps.shape[:2], means.shape[1])

    mean_a, mean_b = mean(a), mean(b)
    spread = mean(a * a) - mean_a.square() + mean(b * b) - mean_b.square()
    shared = mean(a * b) - mean_a * mean_b
    means = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    return (means * (2 * shared + C2) / (spread + C2)).mean((1, 2))


def _stretched(maps: Maps) -> Tensor:
    """Each map from 0 to 1; a constant one is 0."""
    low, high = (bound[:, None, None, None] for bound in (maps.values.amin(1), maps.values.amax(1)))
    return (maps.maps - low) / torch.where(high == low, 1.0, high - low)


def _relative_change(a: Tensor, b: Tensor) -> Tensor:
    change, size = torch.linalg.vector_norm(a - b, dim=1), torch.linalg.vector_norm(a, dim=1)
    undefined = torch.where(change == 0, 0.0, torch.nan)
    return torch.where(size == 0, undefined, change / torch.where(size == 0, 1.0, size))


def _wasserstein(a: Tensor, b: Tensor) -> Tensor:
    return (a.sort(1).values - b.sort(1).values).abs().mean(1)


def _kolmogorov_smirnov(a: Tensor, b: Tensor) -> Tensor:
    a, b = (rows.detach().sort(1).values for rows in (a, b))
    places = torch.cat([a, b], 1)
    below = [torch.searchsorted(rows, places, right=True) for rows in (a, b)]
    return (below[0] - below[1]).abs().amax(1).to(a) / a.shape[1]


def _jensen_shannon(pair: _Pair) -> Tensor:
    p, q = pair.one.shares, pair.other.shares
    middle = torch.where(p + q > 0, (p + q) / 2, 1.0)
    return sum(((part * (_or_one(part) / middle).log()).sum(1) / 2 for part in (p, q)), torch.zeros(()).to(p))


def _or_one(part: Tensor) -> Tensor:
    return torch.where(part > 0, part, 1.0)  # 0 ln 0 = 0, also in the slope


_SIMILARITIES: dict[str, Callable[[_Pair], Tensor]] = {
    "cosine": lambda pair: _cosine(*pair.values),
    "pearson": lambda pair: _pearson(*pair.values),
    "spearman": lambda pair: _pearson(*map(_ranks, pair.values)),
    "top-iou": lambda pair: _top_iou(*pair.values),
    "ssim": _ssim,
    "relative-change": lambda pair: _relative_change(*pair.values),
    "wasserstein": lambda pair: _wasserstein(*pair.values),
    "kolmogorov-smirnov": lambda pair: _kolmogorov_smirnov(*pair.values),
    "jensen-shannon": _jensen_shannon,
}

SIMILARITIES = tuple(_SIMILARITIES)
"""The names of all measures of similarity and of distance."""
