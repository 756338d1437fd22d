"""How many weights of each layer are not zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from benchbox import api


class WeightDensity(api.Probe):
    """Per convolution and linear layer its number of weights, how many are not zero, and their share, the density; and
    its ``position`` among the network's modules, for reports to list layers by.

    Beside the intact model's it says which share of its weights a filter or pruning has kept. Layers that share one
    parameter count once, by their first name. Biases are not looked at.
    """

    name = "weight-density"
    axis = "layer"

    def measure(self, model: nn.Module, batch: api.Batch, rng: torch.Generator) -> Mapping[str, Mapping[str, float]]:
        """See :meth:`benchbox.api.Probe.measure`; raises ContractError for a model without such a layer."""
        network = model.model if isinstance(model, api.Protected) else model
        found: dict[str, dict[str, float]] = {}
        seen: set[int] = set()
        for name, part in api.target_layers(network, api.WeightPerturbation.targets).items():
            weight = part.weight
            if not isinstance(weight, torch.Tensor) or weight.numel() == 0 or id(weight) in seen:
                continue
            seen.add(id(weight))
            count = weight.numel()
            nonzero = int(weight.count_nonzero())
            values = {"weights": count, "nonzero": nonzero, "density": nonzero / count, "position": len(found)}
            found[name or "layer"] = values
        return found
