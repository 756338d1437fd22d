"""mahalanobis-features: refuse inputs whose features are far from those of every class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.detector import DetectorOptions, Scored, halves
from benchbox_defenses.layer_features import FeatureReader, class_means, distances

NAME = "mahalanobis-features"


class FarFromClasses(Scored):
    """The model, refusing where the nearest class mean is far in the metric of the shared covariance."""

    means: Tensor
    whitening: Tensor

    def __init__(self, reader: FeatureReader, means: Float[Tensor, "k d"], whitening: Float[Tensor, "d d"]) -> None:
        """``whitening`` W has W Wᵀ = the inverse of the covariance; ``means`` are those of the plain features."""
        super().__init__(reader.model, NAME)
        self.reader = reader
        self.register_buffer("whitening", whitening)
        self.register_buffer("means", means @ whitening)

    def assess(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        logits, (features,) = self.reader(x)
        return logits, distances(features @ self.whitening, self.means).amin(1).square()


def whitening_of(residuals: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """W with W Wᵀ = the inverse of the residuals' Ledoit-Wolf covariance (about 0), in their dtype and place.

    Raises ContractError when they are all 0.
    """
    from sklearn.covariance import LedoitWolf  # slow to import: only who fits pays for it

    if not residuals.any():
        raise api.ContractError(
            f"{NAME}: the features of each class are the same on all calibration images; choose another layer, or "
            "enlarge the calibration split where it has one image per class"
        )
    fitted = LedoitWolf(assume_centered=True).fit(residuals.double().cpu().numpy())
    return torch.linalg.cholesky(torch.as_tensor(fitted.precision_)).to(residuals)


class MahalanobisFeatures(api.Defense):
    """Class-conditional Gaussians with one shared covariance on a layer's features; the score is the squared
    Mahalanobis distance to the nearest class mean (Lee et al., NeurIPS 2018, arXiv 1807.03888, eq. 1 and 2).

    The covariance is shrunk (Ledoit & Wolf 2004), because layers are wide and calibration splits are small. Fitted on
    clean images only: the paper's input pre-processing, and its regression over layers, which learns from adversarial
    examples, are left out.
    """

    name = NAME
    detects = True

    class Options(DetectorOptions):
        layer: str | None = Field(
            None, description="a layer of the model by its name; without it what enters the last linear layer"
        )

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fits means and covariance on one half of the calibration images and the threshold on the other.

        Raises ContractError for an unknown layer, a class without images, features without variance, or too few images.
        """
        reader = FeatureReader(model, [self.options.layer], self.name)
        fit, held_out = halves(model, calibration, self.name)
        (features,) = reader.read(fit.images)
        means = class_means(features.double(), fit.labels, int(fit.labels.max()) + 1)
        residuals = features.double() - means[fit.labels]
        found = {"means": means.to(features), "whitening": whitening_of(residuals).to(features)}
        protected = FarFromClasses(reader, **found)
        protected.calibrate(held_out.images, self.options.fpr)
        return {**found, **protected.limits()}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> FarFromClasses:
        """See :meth:`benchbox.api.Defense.build`."""
        reader = FeatureReader(model, [self.options.layer], self.name)
        protected = FarFromClasses(reader, fitted["means"], fitted["whitening"])
        protected.set_limits(fitted)
        return protected
