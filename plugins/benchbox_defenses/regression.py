"""Logistic regression of clean against adversarial features, fitted by scikit-learn and evaluated by torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchbox import api


class Regression(nn.Module):
    """The log-odds of "adversarial": a linear function of features (n, f)."""

    weight: Tensor

    def __init__(self, weight: Float[Tensor, " f"], intercept: float) -> None:
        super().__init__()
        self.intercept = intercept
        self.register_buffer("weight", weight)

    def fitted(self) -> dict[str, Tensor]:
        """As a part of what a defense is fitted to; :meth:`of` makes it again."""
        return {"weight": self.weight, "intercept": torch.tensor(self.intercept, dtype=torch.float64)}

    @classmethod
    def of(cls, fitted: Mapping[str, Tensor]) -> Self:
        return cls(fitted["weight"], fitted["intercept"].item())

    def forward(self, features: Float[Tensor, "n f"]) -> Float[Tensor, " n"]:
        # a sum per row: a matrix product would round differently in batches of other sizes
        return ((features * self.weight).sum(1) + self.intercept).to(features.dtype)


def fit_regression(
    clean: Float[Tensor, "n f"], adversarial: Float[Tensor, "n f"], scaling: bool, who: str
) -> Regression:
    """scikit-learn's ``LogisticRegressionCV`` (L2, 10 values of C, 5 folds): what the authors of ML-LOO use, without
    ``scaling``. With it features get mean 0 and variance 1 first, which the answer has multiplied out again.

    Raises ContractError, in the name of ``who``, when features are not finite or all the same.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import: only who fits pays for it
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.preprocessing import StandardScaler

    both = torch.cat([clean, adversarial])
    if lost := int((~both.isfinite()).any(1).sum()):
        raise api.ContractError(
            f"{who}: attributions are not finite on {lost} of {len(both)} images to learn from: check the model's "
            "logits and activations"
        )
    if bool((both == both[0]).all()):
        raise api.ContractError(
            f"{who}: each feature is the same on all {len(both)} images; choose other units or statistics"
        )
    x = both.double().cpu().numpy()
    scaler = StandardScaler(with_mean=scaling, with_std=scaling).fit(x)
    y = [0] * len(clean) + [1] * len(adversarial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the folds of an extreme C; what is chosen is validated
        warnings.simplefilter("ignore", FutureWarning)
        found = LogisticRegressionCV(scoring="accuracy", max_iter=1000).fit(scaler.transform(x), y)
    weight = torch.as_tensor(found.coef_[0] / (scaler.scale_ if scaling else 1.0))
    intercept = float(found.intercept_[0]) - (float(weight @ torch.as_tensor(scaler.mean_)) if scaling else 0.0)
    return Regression(weight.to(clean.device), intercept)
