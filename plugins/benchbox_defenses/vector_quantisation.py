"""vector-quantisation: activations are replaced by the nearest entry of a codebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.bank import unit
from benchbox_defenses.codebook import Distance, codebook_spread, fit_codes, nearest_code, similarities
from benchbox_defenses.place import BATCH, Place, changed_pass, find_place, read_pass, straight_through

SAMPLE = 20_000
"""Vectors that the codebook is fitted on at most, evenly spaced among all."""

SHARPNESS = 3.0
"""How hard the soft assignment is, in units of 1 / the codebook's spread; weaker and straight-through attacks are worse
than ones that do not know the codebook."""

Unit = Literal["place", "image"]


class Quantised(api.Protected):
    """The model with a codebook behind one of its layers. It is its own surrogate: the values are exact, and the
    derivative is that of the activation itself or of a soft assignment to the codes.

    ``spread`` is by how much the calibration vectors miss their code, in the units of the similarity.
    """

    codes: Tensor

    def __init__(
        self,
        model: nn.Module,
        place: Place,
        codes: Float[Tensor, "c d"],
        spread: float,
        options: VectorQuantisation.Options,
    ) -> None:
        super().__init__(model)
        self.place, self.spread, self.options = place, spread, options
        self.register_buffer("codes", codes)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return changed_pass(self.model, self.place, x, self.quantised)

    def quantised(self, activation: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Each vector's nearest code; by cosine a vector 0 has none and stays."""
        with torch.no_grad():
            vectors = vectors_of(activation, self.options.unit)
            index, _ = nearest_code(vectors, self.codes, self.options.distance, self.options.memory)
            codes = self.codes[index]
            if self.options.distance == "cosine":
                codes = torch.where(unit(vectors).any(1, keepdim=True), codes, vectors)
            value = activation_of(codes, activation.shape, self.options.unit)
        if not (torch.is_grad_enabled() and activation.requires_grad):
            return value
        return straight_through(self._soft(activation) if self.options.surrogate == "soft" else activation, value)

    def _soft(self, activation: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """The mean of all codes, weighted by a softmax of their similarity (Agustsson et al. 2017, arXiv 1704.00648,
        §3.1). Holds the similarities of all vectors to all codes."""
        similarity = similarities(vectors_of(activation, self.options.unit), self.codes, self.options.distance)
        weights = torch.softmax(SHARPNESS / self.spread * similarity, 1)
        return activation_of(weights @ self.codes, activation.shape, self.options.unit)


def vectors_of(activation: Float[Tensor, "n ..."], part: Unit) -> Float[Tensor, "v d"]:
    """One vector per image, or the channels (the second axis) at each place."""
    return activation.flatten(1) if part == "image" else activation.movedim(1, -1).flatten(0, -2)


def activation_of(vectors: Float[Tensor, "v d"], shape: torch.Size, part: Unit) -> Float[Tensor, "n ..."]:
    """The way back from :func:`vectors_of`."""
    if part == "image":
        return vectors.view(shape)
    return vectors.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


class VectorQuantisation(api.Defense):
    """A vector quantisation layer (van den Oord et al. 2017, arXiv 1711.00937, §3.1) put into a trained model.

    As in the team's code for the NIPS 2018 Adversarial Vision Challenge (Simsso/NIPS-2018-Adversarial-Vision-Challenge:
    the layers by L2 distance and by cosine), but the codes are fitted to the model's own activations by k-means
    instead of being trained with it.
    """

    name = "vector-quantisation"
    unfitted = ("surrogate",)

    class Options(api.Options):
        layer: str | None = Field(
            None, description="the layer behind which it stands; left out: before the last linear layer"
        )
        codes: int = Field(64, ge=2, description="entries of the codebook")
        distance: Distance = Field("l2", description="what the nearest entry is: Euclidean, or the largest cosine")
        unit: Unit = Field(
            "place", description="what is replaced as a whole: the channels at each place, or an image's activations"
        )
        surrogate: Literal["soft", "straight-through"] = Field(
            "soft", description="what an adaptive attacker differentiates: a soft assignment, or nothing of it"
        )
        memory: int = Field(256, ge=1, description="MiB that the similarities of a query may take")

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fits the codebook on vectors of all calibration images, at most ``SAMPLE`` of them, evenly spaced.

        Raises ContractError for a layer that does not exist, and where there are fewer distinct vectors than codes.
        """
        place, options = find_place(model, self.options.layer, self.name), self.options
        with torch.no_grad():
            first = vectors_of(read_pass(model, place, calibration.images[:1])[0], options.unit)
            total = len(first) * len(calibration)
            wanted = torch.linspace(0, total - 1, min(SAMPLE, total), dtype=torch.float64).round().long()
            wanted, start, kept = wanted.to(first.device), 0, []
            for images in torch.split(calibration.images, BATCH):
                vectors = vectors_of(read_pass(model, place, images)[0], options.unit)
                kept.append(vectors[wanted[(wanted >= start) & (wanted < start + len(vectors))] - start])
                start += len(vectors)
            vectors = torch.cat(kept)
            codes = fit_codes(vectors, options.codes, options.distance, options.memory).to(first.dtype)
        if len(codes) < options.codes:
            raise api.ContractError(
                f"{self.name}: {place} has only {len(codes)} distinct vectors on the calibration images, fewer than "
                f"codes = {options.codes}: lower codes or choose another layer"
            )
        spread = codebook_spread(vectors, codes, options.distance, options.memory)
        return {"codes": codes, "spread": torch.tensor(spread, dtype=torch.float64)}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Quantised:
        """See :meth:`benchbox.api.Defense.build`."""
        place = find_place(model, self.options.layer, self.name)
        return Quantised(model, place, fitted["codes"], fitted["spread"].item(), self.options)
