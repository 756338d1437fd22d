"""lid: refuse inputs around which the features of clean images fill many dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.detector import DetectorOptions, Scored, halves
from benchbox_defenses.layer_features import FeatureReader, distances

NAME = "lid"
LARGEST = 1e6
"""The dimension reported where all neighbours are equally far, and it would be infinite."""


class ManyDimensions(Scored):
    """The model, refusing where the mean of the layers' standardised dimensions is large."""

    def __init__(self, reader: FeatureReader, references: Sequence[Float[Tensor, "m d"]], k: int) -> None:
        super().__init__(reader.model, NAME)
        self.reader, self.k, self.references = reader, k, list(references)
        self.mean, self.std = [0.0] * len(references), [1.0] * len(references)

    def standardise(self, images: Float[Tensor, "n c h w"]) -> None:
        """Give each layer's dimension mean 0 and variance 1 on ``images``, so that no layer outweighs the others."""
        features = self.reader.read(images)
        with torch.no_grad():
            found = [self._dimension(number, part).double() for number, part in enumerate(features)]
        self.mean = [float(dimension.mean()) for dimension in found]
        self.std = [float(dimension.std(correction=0)) or 1.0 for dimension in found]

    def assess(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        logits, features = self.reader(x)
        standard = [
            (self._dimension(number, part) - self.mean[number]) / self.std[number]
            for number, part in enumerate(features)
        ]
        return logits, torch.stack(standard).mean(0)

    def _dimension(self, number: int, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return local_dimension(distances(features, self.references[number]), self.k)


def local_dimension(distance: Float[Tensor, "n m"], k: int) -> Float[Tensor, " n"]:
    """The maximum-likelihood estimate from the k nearest of m references: -1 / mean of ln(r_i / r_k), i = 1 … k
    (Amsaleg et al., KDD 2015; Ma et al., ICLR 2018, arXiv 1801.02613, eq. 4).

    A reference at distance 0 counts as very near; where all k are equally far the answer is ``LARGEST``.
    """
    nearest = distance.topk(k, dim=1, largest=False).values.clamp_min(torch.finfo(distance.dtype).tiny)
    spread = -(nearest / nearest[:, -1:]).log().mean(1)
    return 1 / spread.clamp_min(1 / LARGEST)


class LocalDimension(api.Defense):
    """Thresholds the local intrinsic dimensionality of an input's features among those of clean images (Ma et al.,
    ICLR 2018, "Characterizing Adversarial Subspaces Using Local Intrinsic Dimensionality").

    The authors compare with a mini-batch of clean images and learn from adversarial examples how to weigh the layers;
    here the references are fixed and the layers weigh the same, so that clean images are all that is needed.
    """

    name = NAME
    detects = True

    class Options(DetectorOptions):
        layers: list[str] = Field(
            [], description="layers of the model by name; without any what enters the last linear layer"
        )
        k: int = Field(20, ge=2, description="neighbours")
        references: int = Field(100, ge=2, description="clean images among which neighbours are looked for")

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Takes the references from one half of the calibration images and the threshold from the other.

        Raises ContractError for an unknown layer, a class without images, or too few images.
        """
        k, references = self.options.k, self.options.references
        if k >= references:
            raise api.ContractError(f"{self.name}: {references} references have no {k} neighbours and one to spare")
        reader = FeatureReader(model, self.options.layers or [None], self.name)
        fit, held_out = halves(model, calibration, self.name)
        if len(fit) < references:
            raise api.ContractError(
                f"{self.name}: half of the calibration split, {len(fit)} images, is less than references = "
                f"{references}; lower it or enlarge the split"
            )
        protected = ManyDimensions(reader, reader.read(fit.images[:references]), k)
        protected.standardise(held_out.images)
        protected.calibrate(held_out.images, self.options.fpr)
        moments = torch.tensor([protected.mean, protected.std], dtype=torch.float64)
        layers = {f"references.{number}": part for number, part in enumerate(protected.references)}
        return {**layers, "moments": moments, **protected.limits()}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> ManyDimensions:
        """See :meth:`benchbox.api.Defense.build`."""
        reader = FeatureReader(model, self.options.layers or [None], self.name)
        references = [fitted[f"references.{number}"] for number in range(len(reader.layers))]
        protected = ManyDimensions(reader, references, self.options.k)
        protected.mean, protected.std = fitted["moments"].tolist()
        protected.set_limits(fitted)
        return protected
