"""How widely values are spread: the seven statistics of ML-LOO (arXiv 1906.03499), differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

RANKS = 0.02
"""How far the slope of a quantile reaches, as a share of all values to either side."""

Statistic = Literal["std", "variance", "mean-abs-deviation", "kurtosis", "skewness", "iqr", "mad"]


def dispersion(values: Float[Tensor, "n d"], statistic: Statistic) -> Float[Tensor, " n"]:
    """One statistic per row, with the conventions of the authors' code: population moments, linear quantiles,
    *negated* excess kurtosis and skewness.

    A constant row has dispersion 0 in every statistic, also where a moment ratio would be 0 / 0.
    """
    return _STATISTICS[statistic](values)


def _variance(values: Tensor) -> Tensor:
    return (values - values.mean(1, keepdim=True)).square().mean(1)


def _std(values: Tensor) -> Tensor:
    variance = _variance(values)
    spread = variance != 0  # the root has no slope at 0; unknown values stay unknown
    return torch.where(spread, variance, 1.0).sqrt() * spread


def _mean_absolute_deviation(values: Tensor) -> Tensor:
    return (values - values.mean(1, keepdim=True)).abs().mean(1)


def _kurtosis(values: Tensor) -> Tensor:
    standard, spread = _standardised(values)
    return torch.where(spread, 3 - standard.pow(4).mean(1), 0.0)


def _skewness(values: Tensor) -> Tensor:
    standard, spread = _standardised(values)
    return torch.where(spread, -standard.pow(3).mean(1), 0.0)


def _iqr(values: Tensor) -> Tensor:
    return quantile(values, 0.75) - quantile(values, 0.25)


def _mad(values: Tensor) -> Tensor:
    return quantile((values - quantile(values, 0.5)[:, None]).abs(), 0.5)


def _standardised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, and which rows are not constant up to rounding."""
    largest = values.detach().abs().amax(1, keepdim=True)
    values = values / torch.where(largest > 0, largest, 1.0)  # else powers of small attributions underflow
    centred = values - values.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    spread = variance > 100 * torch.finfo(values.dtype).eps ** 2
    spread |= variance.isnan()  # unknown is not constant: it stays NaN
    return centred / torch.where(spread, variance, 1.0).sqrt()[:, None], spread


def quantile(values: Float[Tensor, "n d"], q: float) -> Float[Tensor, " n"]:
    """Linear interpolation, as numpy.quantile; torch.quantile refuses large batches.

    The slope is spread over the neighbouring ranks: by itself a quantile depends on two values only, and an attacker
    who pushes these two past their neighbours has changed nothing.
    """
    ordered = values.sort(1).values
    position, last = q * (values.shape[1] - 1), values.shape[1] - 1
    low, reach = int(position), RANKS * values.shape[1]
    exact = torch.lerp(ordered[:, low], ordered[:, min(low + 1, last)], position - low).detach()
    around = ordered[:, max(0, math.floor(position - reach)) : math.ceil(position + reach) + 1].mean(1)
    return exact + (around - around.detach())


_STATISTICS: dict[Statistic, Callable[[Tensor], Tensor]] = {
    "std": _std,
    "variance": _variance,
    "mean-abs-deviation": _mean_absolute_deviation,
    "kurtosis": _kurtosis,
    "skewness": _skewness,
    "iqr": _iqr,
    "mad": _mad,
}
