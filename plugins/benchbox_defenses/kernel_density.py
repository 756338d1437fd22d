"""kernel-density: refuse inputs whose features lie where the predicted class has few of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.detector import DetectorOptions, Scored, halves
from benchbox_defenses.layer_features import FeatureReader, distances

NAME = "kernel-density"


class InThinAir(Scored):
    """The model, refusing where the density of the predicted class's features is low."""

    features: Tensor
    labels: Tensor

    def __init__(
        self, reader: FeatureReader, features: Float[Tensor, "m d"], labels: Int[Tensor, " m"], width: float
    ) -> None:
        super().__init__(reader.model, NAME)
        self.reader, self.width = reader, width
        self.register_buffer("features", features)
        self.register_buffer("labels", labels)

    def assess(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        logits, (features,) = self.reader(x)
        own = logits.argmax(1)[:, None] == self.labels
        return logits, -log_density(distances(features, self.features), own, self.width)


def log_density(distance: Float[Tensor, "n m"], own: Bool[Tensor, "n m"], width: float) -> Float[Tensor, " n"]:
    """ln of the mean of exp(-distance² / width²) over each row's ``own`` columns, of which there must be one.

    The logarithm orders inputs as the density does and has values, and a slope, where the density underflows.
    """
    exponent = -(distance / width).square()
    return exponent.masked_fill(~own, -torch.inf).logsumexp(1) - own.sum(1).to(distance.dtype).log()


def typical_distance(features: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> float:
    """The median over classes of the median distance between two images of a class; NaN where no class has two."""
    classes = [features[labels == c] for c in range(int(labels.max()) + 1)]
    known = [torch.pdist(part).median() for part in classes if len(part) > 1]
    return float(torch.stack(known).median()) if known else math.nan


class KernelDensity(api.Defense):
    """A Gaussian kernel density of the predicted class's features (Feinman et al. 2017, "Detecting Adversarial Samples
    from Artifacts", arXiv 1703.00410, §4.1); the score is minus its logarithm.

    The authors chose a width per data set (1.2 on MNIST, 0.26 on CIFAR-10) with adversarial examples at hand; here it
    is relative to the typical distance of clean features. Their Bayesian uncertainty needs dropout and is left out.
    """

    name = NAME
    detects = True

    class Options(DetectorOptions):
        layer: str | None = Field(
            None, description="a layer of the model by its name; without it what enters the last linear layer"
        )
        width: float = Field(
            0.5, gt=0, description="the kernel's width as a share of the median distance of two images of a class"
        )
        references: int = Field(1000, ge=1, description="images per class, at most, that the density is made of")

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Takes the references from one half of the calibration images and the threshold from the other.

        Raises ContractError for an unknown layer, a class without images, features that are all the same, or too few
        images.
        """
        reader = FeatureReader(model, [self.options.layer], self.name)
        fit, held_out = halves(model, calibration, self.name)
        own = fit.labels[:, None] == fit.labels
        fit = fit.take(own.tril().sum(1) <= self.options.references)
        (features,) = reader.read(fit.images)
        typical = typical_distance(features, fit.labels)
        if not typical > 0:
            raise api.ContractError(
                f"{self.name}: two images of a class have the same features, or no class has two images to fit on; "
                "choose another layer or enlarge the calibration split"
            )
        width = self.options.width * typical
        protected = InThinAir(reader, features, fit.labels, width)
        protected.calibrate(held_out.images, self.options.fpr)
        kernel = torch.tensor(width, dtype=torch.float64)
        return {"features": features, "labels": fit.labels, "width": kernel, **protected.limits()}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> InThinAir:
        """See :meth:`benchbox.api.Defense.build`."""
        reader = FeatureReader(model, [self.options.layer], self.name)
        protected = InThinAir(reader, fitted["features"], fitted["labels"], fitted["width"].item())
        protected.set_limits(fitted)
        return protected
