"""Random noise on the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchbox.api import ContractError, WeightPerturbation
from benchbox_perturbations.weights import copied_weights, layers_with_own_weights

Mode = Literal[
    "relative-norm", "relative-std", "multiplicative", "absolute", "filter-norm", "uniform", "magnitude-aware"
]
FLOOR = 1e-3
"""ε of ``magnitude-aware``: the standard deviation of the noise on a weight of zero."""


class WeightNoise(WeightPerturbation):
    """Adds noise of size ``level`` to the weights; ξ is standard normal, each layer W is treated by itself:

    ``relative-norm`` W + level · ‖W‖ · ξ / ‖ξ‖, so that ‖ΔW‖ / ‖W‖ = level exactly (Frobenius norms);
    ``filter-norm`` the same for each filter (output channel), after Li et al., NeurIPS 2018, "Visualizing the loss
    landscape of neural nets", §4; ``relative-std`` W + level · std(W) · ξ; ``multiplicative`` W · (1 + level · ξ);
    ``uniform`` W + u, u uniform with the root mean square level · rms(W); ``absolute`` W + level · ξ;
    ``magnitude-aware`` noise of variance level² W² + 0.001² (Jiang et al., ICLR 2020, "Fantastic generalization
    measures and where to find them"), which moves weights of zero as well, also at level 0.

    All levels and modes of one ``draw`` share their ξ (common random numbers; ``uniform`` takes u from ξ by the normal
    distribution function), so that a sweep over levels follows one direction; ``draw`` enters only the seed and makes
    several draws several cells.
    """

    name = "weight-noise"
    stochastic = True
    unseeded = ("level", "mode")

    class Options(WeightPerturbation.Options):
        mode: Mode = Field("relative-norm", description="what the noise is in proportion to")
        level: float = Field(ge=0, description="size of the noise, in the unit of the mode")
        draw: int = Field(0, ge=0, description="number of the draw")
        include_bias: bool = Field(False, description="whether biases are perturbed, too")
        include_batch_norm: bool = Field(
            False, description="whether the scales of batch norms (with include_bias: their shifts) are perturbed, too"
        )

        @model_serializer(mode="wrap")
        def _without_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
            """The option that came last is left out where it says nothing: older results keep their keys."""
            options: dict[str, Any] = dump(self)
            if not self.include_batch_norm:
                options.pop("include_batch_norm", None)
            return options

    options: Options

    def weights(self, model: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
        """See :meth:`benchbox.api.WeightPerturbation.weights`.

        Raises ContractError where a relative noise has nothing to be relative to: a weight of zeros (``relative-std``:
        of equal values). Biases of zeros, as after initialisation, stay what they are, and so do scales of batch norms.
        """
        options = self.options
        weights = copied_weights(model, self._perturbed, options.layer, options.include_bias)
        for name, weight in weights.items():
            drawn = torch.randn(weight.shape, generator=rng, device=rng.device).to(weight)
            if weight.dim() > 1:  # neither a bias nor a batch norm
                _check_scale(name, weight, options.mode)
            weight.add_(noise(weight, drawn, options.mode, options.level))
        return weights

    def layers(self, model: nn.Module) -> list[str]:
        """See :meth:`benchbox.api.WeightPerturbation.layers`; layers that share their weight count once."""
        return layers_with_own_weights(model, self._perturbed)

    @property
    def _perturbed(self) -> tuple[type[nn.Module], ...]:
        return (*self.targets, _BatchNorm) if self.options.include_batch_norm else self.targets


def _check_scale(name: str, weight: Tensor, mode: Mode) -> None:
    lowest, highest = weight.aminmax()
    relative = mode not in ("absolute", "magnitude-aware")
    if relative and lowest == highest and (mode == "relative-std" or highest == 0):
        raise ContractError(
            f"{name!r} is constant, so that {mode} noise has no scale: "
            'use mode = "absolute", or leave the layer out of the grid'
        )


def noise(weight: Tensor, drawn: Tensor, mode: Mode, level: float) -> Tensor:
    """What is added to ``weight``, made of the standard normal numbers ``drawn``; all of one shape."""
    if mode == "magnitude-aware":
        return drawn * (level**2 * weight.square() + FLOOR**2).sqrt()
    return level * DIRECTIONS[mode](weight, drawn)


def _per_filter(weight: Tensor, drawn: Tensor) -> Tensor:
    """``relative-norm`` for each first index; a vector (bias, batch norm) counts as one filter, as it has no others."""
    if weight.dim() < 2:
        return drawn * (weight.norm() / drawn.norm())
    sizes, lengths = (tensor.flatten(1).norm(dim=1) for tensor in (weight, drawn))
    return drawn * (sizes / lengths).reshape(-1, *[1] * (weight.dim() - 1))


def _uniform(weight: Tensor, drawn: Tensor) -> Tensor:
    """2 Φ(ξ) - 1 is uniform on (-1, 1), with standard deviation 1 / √3."""
    rms = weight.norm() / math.sqrt(weight.numel())
    return torch.erf(drawn / math.sqrt(2)) * (rms * math.sqrt(3))


DIRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relative-norm": lambda weight, drawn: drawn * (weight.norm() / drawn.norm()),
    "filter-norm": _per_filter,
    "relative-std": lambda weight, drawn: drawn * weight.std(correction=0),
    "multiplicative": lambda weight, drawn: drawn * weight,
    "uniform": _uniform,
    "absolute": lambda weight, drawn: drawn,
}
"""The noise of level 1, where it is in proportion to the level."""
