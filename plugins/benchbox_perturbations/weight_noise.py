"""Gaussian noise on the weights."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from benchbox.api import ContractError, WeightPerturbation
from benchbox_perturbations.weights import copied_weights

Mode = Literal["relative-norm", "relative-std", "multiplicative", "absolute"]


class WeightNoise(WeightPerturbation):
    """Adds noise of size ``level`` to the weights; ξ is standard normal, each layer W is treated by itself:

    ``relative-norm`` W + level · ‖W‖ · ξ / ‖ξ‖, so that ‖ΔW‖ / ‖W‖ = level exactly (Frobenius norms; per layer what
    Li et al., NeurIPS 2018, "Visualizing the loss landscape of neural nets", §4, do per filter);
    ``relative-std`` W + level · std(W) · ξ; ``multiplicative`` W · (1 + level · ξ); ``absolute`` W + level · ξ.

    All levels and modes of one ``draw`` share their ξ (common random numbers), so that a sweep over levels follows one
    direction; ``draw`` enters only the seed and makes several draws several cells.
    """

    name = "weight-noise"
    stochastic = True
    unseeded = ("level", "mode")

    class Options(WeightPerturbation.Options):
        mode: Mode = Field("relative-norm", description="what the noise is in proportion to")
        level: float = Field(ge=0, description="size of the noise, in the unit of the mode")
        draw: int = Field(0, ge=0, description="number of the draw")
        include_bias: bool = Field(False, description="whether biases are perturbed, too")

    options: Options

    def weights(self, model: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
        """See :meth:`benchbox.api.WeightPerturbation.weights`.

        Raises ContractError where a relative noise has nothing to be relative to: a weight of zeros (``relative-std``:
        of equal values). Biases of zeros, as after initialisation, stay what they are.
        """
        options = self.options
        weights = copied_weights(model, self.targets, options.layer, options.include_bias)
        for name, weight in weights.items():
            drawn = torch.randn(weight.shape, generator=rng, device=rng.device).to(weight)
            if options.mode != "absolute" and not name.endswith("bias"):
                _check_scale(name, weight, options.mode)
            weight.add_(options.level * direction(weight, drawn, options.mode))
        return weights


def _check_scale(name: str, weight: Tensor, mode: Mode) -> None:
    lowest, highest = weight.aminmax()
    if lowest == highest and (mode == "relative-std" or highest == 0):
        raise ContractError(
            f"{name!r} is constant, so that {mode} noise has no scale: "
            'use mode = "absolute", or leave the layer out of the grid'
        )


def direction(weight: Tensor, drawn: Tensor, mode: Mode) -> Tensor:
    """The noise of level 1 that standard normal numbers ``drawn`` make of ``weight``; both of one shape."""
    if mode == "relative-norm":
        return drawn * (weight.norm() / drawn.norm())
    if mode == "relative-std":
        return drawn * weight.std(correction=0)
    if mode == "multiplicative":
        return drawn * weight
    return drawn
