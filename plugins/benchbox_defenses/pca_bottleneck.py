"""pca-bottleneck: only what lies in the leading principal components of a layer's activations passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.place import BATCH, Place, changed_pass, find_place, read_pass
from benchbox_defenses.principal import principal_components


class Narrowed(api.Protected):
    """The model with a linear projection behind one of its layers. It is its own surrogate, with the exact gradient."""

    mean: Tensor
    components: Tensor

    def __init__(
        self, model: nn.Module, place: Place, mean: Float[Tensor, " m"], components: Float[Tensor, "m r"]
    ) -> None:
        super().__init__(model)
        self.place = place
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return changed_pass(self.model, self.place, x, self.narrowed)

    def narrowed(self, activation: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """The nearest activation (L2) in the affine space of the components."""
        centred = activation.flatten(1) - self.mean
        return (self.mean + (centred @ self.components) @ self.components.T).view(activation.shape)


class PcaBottleneck(api.Defense):
    """Projects the activations of a layer on their leading principal components and back: x -> x P P⁺.

    Submitted to the NIPS 2018 Adversarial Vision Challenge (Simsso/NIPS-2018-Adversarial-Vision-Challenge) behind a
    ResNet's second block. There the components are those of centred activations but the input is not centred before
    it is projected (``centred = false``), which bends also inputs that lie in the space of the components.
    """

    name = "pca-bottleneck"
    unfitted = ("centred",)

    class Options(api.Options):
        layer: str | None = Field(
            None, description="the layer behind which it stands; left out: before the last linear layer"
        )
        rank: int = Field(64, ge=1, description="principal components that pass")
        centred: bool = Field(True, description="whether the mean is taken off first and put back afterwards")

    def fit(self, model: nn.Module, calibration: api.Examples, rng: torch.Generator) -> dict[str, Tensor]:
        """Fits the components on all calibration images.

        Raises ContractError for a layer that does not exist and for a ``rank`` above the number of features or above
        what the calibration images can tell.
        """
        place = find_place(model, self.options.layer, self.name)
        with torch.no_grad():
            activation = read_pass(model, place, calibration.images[:1])[0]
            self._check(activation[0].numel(), len(calibration), place)

            def blocks() -> Iterator[Tensor]:
                for images in torch.split(calibration.images, BATCH):
                    yield read_pass(model, place, images)[0].flatten(1)

            found = principal_components(blocks, self.options.rank)
        return {"mean": found.mean.to(activation.dtype), "components": found.components.to(activation.dtype)}

    def build(self, model: nn.Module, fitted: Mapping[str, Tensor], rng: torch.Generator) -> Narrowed:
        """See :meth:`benchbox.api.Defense.build`."""
        mean = fitted["mean"] if self.options.centred else torch.zeros_like(fitted["mean"])
        return Narrowed(model, find_place(model, self.options.layer, self.name), mean, fitted["components"])

    def _check(self, features: int, count: int, place: Place) -> None:
        rank, most = self.options.rank, min(features, count - 1)
        if rank > most:
            raise api.ContractError(
                f"{self.name}: rank {rank} is more than {count} calibration images and the {features} features of "
                f"{place} allow: choose at most {most}"
            )
