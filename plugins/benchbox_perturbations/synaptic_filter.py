"""The synaptic filter: weights in a part of their range are set to zero."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from benchbox.api import ContractError, WeightPerturbation
from benchbox_perturbations.weights import copied_weights, layers_with_own_weights

Filter = Literal["high-pass", "low-pass", "pulse"]


class SynapticFilter(WeightPerturbation):
    """Sets to zero what a filter at ``threshold`` does not let pass: signed weights, never biases or batch norms.
    Nothing is rescaled or retrained.

    Ideal high-pass, ideal low-pass and pulse wave after Pravin, Martino, Nicosia, Ojha (2024), "Fragility, robustness
    and antifragility in deep learning", Artificial Intelligence 327:104060.

    What the authors' notebooks do: ``range = "layer"`` for one layer and ``range = "fixed"`` for all together, 25
    thresholds from 0 to 1, ``pulse_width = 0.04`` (which leaves gaps of 4 % of the range between bands).

    ``threshold`` runs along the sweep: high-pass removes the weights up to it from the lowest, low-pass those from the
    highest down; at 0 that is the first weight, at 1 all of them. The pulse removes a band that moves from the lowest
    to the highest. With ``range = "fixed"`` weights beyond -1 or 1 lie outside the sweep.
    """

    name = "synaptic-filter"

    class Options(WeightPerturbation.Options):
        filter: Filter = Field(description="which weights are set to zero as the threshold rises")
        threshold: float = Field(ge=0, le=1, description="position in the sweep: 0 is its start, 1 its end")
        range: Literal["pooled", "layer", "fixed"] = Field(
            "pooled", description="what the sweep runs over: all filtered weights, those of each layer, or -1 to 1"
        )
        scale: Literal["value", "quantile"] = Field(
            "value", description="along the values of the weights, or along their ranks"
        )
        pulse_width: float = Field(
            1 / 24, gt=0, le=1, description="width of the band as a share of the range; 1/24: 25 thresholds tile it"
        )

        @model_validator(mode="after")
        def _fixed_has_values(self) -> Self:
            if self.range == "fixed" and self.scale == "quantile":
                raise ValueError('scale = "quantile" has no fixed range: use range = "pooled" or "layer"')
            return self

    options: Options

    def weights(self, model: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
        """See :meth:`benchbox.api.WeightPerturbation.weights`.

        Raises ContractError where all weights of a range are equal, so that it has no beginning and no end.
        """
        options = self.options
        weights = copied_weights(model, self.targets, options.layer)
        pool = torch.cat([weight.flatten() for weight in weights.values()])
        for name, weight in weights.items():
            reference = weight.flatten() if options.range == "layer" else pool
            where = self._positions(weight, reference, name if options.range == "layer" else options.layer)
            weight.masked_fill_(removed(where, options.filter, options.threshold, options.pulse_width), 0.0)
        return weights

    def layers(self, model: nn.Module) -> list[str]:
        """See :meth:`benchbox.api.WeightPerturbation.layers`; layers that share their weight count once."""
        return layers_with_own_weights(model, self.targets)

    def _positions(self, weight: Tensor, reference: Tensor, place: str) -> Tensor:
        """Where each weight lies in the range, float64: 0 is its lowest, 1 its highest value, both exactly."""
        if self.options.range == "fixed":
            return (weight.double() + 1) / 2
        lowest, highest = reference.aminmax()
        if lowest == highest:
            raise ContractError(
                f"all weights of {place!r} equal {float(lowest):g}: a sweep over their range is undefined. "
                "Leave the layer out of the grid"
            )
        if self.options.scale == "value":
            low, high = lowest.double(), highest.double()
            return weight.double().sub_(low).div_(high - low)
        ranks = torch.searchsorted(reference.sort().values, weight.contiguous()).double()
        return ranks / (reference < highest).sum()


def removed(position: Tensor, kind: Filter, threshold: float, pulse_width: float) -> Tensor:
    """Which weights the filter sets to zero, bool in the shape of ``position`` (their places in the range, 0 to 1).

    The pulse's band is half open: its upper end belongs to the next one.
    """
    if kind == "high-pass":
        return position <= threshold
    if kind == "low-pass":
        return position >= 1 - threshold
    return (position >= threshold - pulse_width / 2) & (position < threshold + pulse_width / 2)
