"""attribution-anomaly: refuse inputs whose attribution is unlike those of clean images of the predicted class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_attributions.attribution import predicted
from benchbox_attributions.methods import InputXGradient, Method
from benchbox_defenses.detector import BATCH, DetectorOptions, halves
from benchbox_defenses.map_statistics import Judge, Judged, MapStatistics, StatisticOptions

NAME = "attribution-anomaly"
NEIGHBOURS = 20  # of the local outlier factor, as its authors advise for a start
OUTLIERS = 0.1  # the share of clean images outside the one-class support vector machine's border
LEAST = 1e-6
"""Variances below this share of their mean are rounding: where the shrinkage of few images is none."""

Anomaly = Literal["z-score", "mahalanobis", "isolation-forest", "local-outlier-factor", "one-class-svm"]


class Gaussians(Judge):
    """Per group of classes, how far features are from the clean ones: robust z-scores, or the Mahalanobis distance.

    Features are taken relative to their median and 1.4826 · MAD (where that is 0 their standard deviation, where that
    is 0 the number 1); the largest |z|, or the distance by the Ledoit-Wolf covariance of all of them.
    """

    centre: Tensor
    spread: Tensor
    mean: Tensor
    whitening: Tensor
    group: Tensor

    def __init__(self, groups: Sequence[Float[Tensor, "m f"]], group: Int[Tensor, " k"], largest: bool) -> None:
        """``group`` says for each class which of the ``groups`` of clean features is its own."""
        super().__init__()
        self.largest = largest
        centre = torch.stack([part.median(0).values for part in groups])
        spread = torch.stack([_spread(part) for part in groups])
        fitted = [_gaussian((part - centre[number]) / spread[number]) for number, part in enumerate(groups)]
        self.register_buffer("group", group)
        self.register_buffer("centre", centre)
        self.register_buffer("spread", spread)
        self.register_buffer("mean", torch.stack([mean for mean, _ in fitted]))
        self.register_buffer("whitening", torch.stack([whitening for _, whitening in fitted]))

    def standard(self, features: Float[Tensor, "n f"], classes: Int[Tensor, " n"]) -> Float[Tensor, "n f"]:
        """Robust z-scores."""
        own = self.group[classes]
        return (features.to(self.centre) - self.centre[own]) / self.spread[own]

    def score(self, features: Float[Tensor, "n f"], classes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        z = self.standard(features, classes)
        if self.largest:
            return z.abs().amax(1).to(features.dtype)
        own = self.group[classes]
        away = torch.einsum("nf,nfg->ng", z - self.mean[own], self.whitening[own])
        return torch.linalg.vector_norm(away, dim=1).to(features.dtype)


class Outliers(Judge):
    """Per group, how unusual scikit-learn's ``estimators`` find features; the slope is the Mahalanobis distance's, on
    the scale of their own scores."""

    def __init__(
        self, estimators: Sequence[Any], gaussians: Gaussians, features: Float[Tensor, "m f"], classes: Tensor
    ) -> None:
        """The scales are matched on clean ``features`` of the predicted ``classes``."""
        super().__init__()
        self.estimators, self.gaussians = list(estimators), gaussians
        own, theirs = (float(judge.score(features, classes).double().std()) for judge in (self, gaussians))
        self.ratio = own / theirs if theirs else 1.0

    def score(self, features: Float[Tensor, "n f"], classes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        z = self.gaussians.standard(features, classes)
        own, known = self.gaussians.group[classes], z.isfinite().all(1)
        score = features.new_full((len(features),), torch.nan)
        for number, estimator in enumerate(self.estimators):
            mine = known & (own == number)
            if mine.any():
                normal = estimator.score_samples(z[mine].cpu().numpy())
                score[mine] = -torch.as_tensor(normal).to(features)
        return score

    def stand_in(self, features: Float[Tensor, "n f"], classes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.ratio * self.gaussians.score(features, classes)


def _spread(features: Float[Tensor, "m f"]) -> Float[Tensor, " f"]:
    mad = 1.4826 * (features - features.median(0).values).abs().median(0).values
    spread = torch.where(mad > 0, mad, features.std(0, correction=0))
    return torch.where(spread > 0, spread, 1.0)


def _gaussian(z: Float[Tensor, "m f"]) -> tuple[Float[Tensor, " f"], Float[Tensor, "f f"]]:
    """The mean, and W with W Wᵀ = the inverse of the covariance (Ledoit & Wolf 2004); of equal rows W is 0."""
    from sklearn.covariance import LedoitWolf  # slow to import: only who fits pays for it

    mean = z.mean(0)
    if bool((z == z[0]).all()):
        return mean, torch.zeros(z.shape[1], z.shape[1], dtype=z.dtype, device=z.device)
    fitted = LedoitWolf().fit(z.cpu().numpy())
    values, vectors = torch.linalg.eigh(torch.as_tensor(fitted.covariance_).to(z))
    return mean, vectors / values.clamp_min(LEAST * values.mean()).sqrt()


def _estimator(anomaly: Anomaly, count: int) -> Any:
    """The detector as scikit-learn has it; of its random numbers none depends on a seed of the grid."""
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor
    from sklearn.svm import OneClassSVM

    if anomaly == "isolation-forest":
        return IsolationForest(random_state=0)
    if anomaly == "local-outlier-factor":
        return LocalOutlierFactor(n_neighbors=min(NEIGHBOURS, count - 1), novelty=True)
    return OneClassSVM(nu=OUTLIERS)


class AttributionAnomaly(api.Defense):
    """Statistics of an attribution map, and how unusual they are among those of clean images that get the same
    prediction; nothing adversarial is learnt from.

    The score is the largest robust z-score, the Mahalanobis distance, or what scikit-learn's isolation forest (Liu et
    al. 2008), local outlier factor (Breunig et al. 2000) or one-class support vector machine (Schölkopf et al. 2001)
    say. The last three have no useful gradient: their surrogate has their values and the Mahalanobis distance's slope.
    Attributions without a gradient of their own lend theirs from ``input-x-gradient``.
    """

    name = NAME
    detects = True

    class Options(DetectorOptions, StatisticOptions):
        attribution: Method = Field(InputXGradient(), description="the attribution method, with its options")
        anomaly: Anomaly = Field("mahalanobis", description="what measures how unusual the statistics are")
        least: int = Field(
            30, ge=10, description="images of a predicted class that are enough for a fit of its own; others are pooled"
        )

    options: Options

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fits on one half of the calibration images and fixes the threshold on the other.

        What costs is to explain the images. Their statistics are kept, of which the estimators, which are no tensors,
        are made again in no time, and alike: none of their draws depends on a seed.

        Raises ContractError when the model does not support the attribution, when attributions are not finite or tell
        nothing apart, and for too few images.
        """
        options = self.options
        fit, held_out = halves(model, calibration, self.name)
        features = MapStatistics(model, [options.attribution], options)
        seen = {
            "features": features.read(fit.images, self.name).double(),
            "classes": torch.cat([predicted(model, part) for part in torch.split(fit.images, BATCH)]),
            "number": torch.tensor(self._classes(model, fit)),
        }
        protected = Judged(model, NAME, features, self._judge(seen))
        protected.calibrate(held_out.images, options.fpr)
        return {**seen, **protected.limits()}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Judged:
        """See :meth:`benchbox.api.Defense.build`."""
        features = MapStatistics(model, [self.options.attribution], self.options)
        protected = Judged(model, NAME, features, self._judge(fitted))
        protected.set_limits(fitted)
        return protected

    @staticmethod
    @torch.no_grad()
    def _classes(model: nn.Module, examples: api.Examples) -> int:
        return model(examples.images[:1].clone()).shape[1]

    def _judge(self, seen: Mapping[str, Tensor]) -> Judge:
        """Fit one group per class that has images enough, and group 0 on everything for the rest."""
        features, classes, number = seen["features"], seen["classes"], int(seen["number"])
        groups, group = [features], torch.zeros(number, dtype=torch.int64, device=features.device)
        for name, count in enumerate(classes.bincount(minlength=number).tolist()):
            if count >= self.options.least:
                group[name] = len(groups)
                groups.append(features[classes == name])
        gaussians = Gaussians(groups, group, largest=self.options.anomaly == "z-score")
        if self.options.anomaly in ("z-score", "mahalanobis"):
            return gaussians
        estimators = [
            _estimator(self.options.anomaly, len(part)).fit(
                ((part - gaussians.centre[index]) / gaussians.spread[index]).cpu().numpy()
            )
            for index, part in enumerate(groups)
        ]
        return Outliers(estimators, gaussians, features, classes)
