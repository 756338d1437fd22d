"""The parameters that a perturbation of one layer, or of all, changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchbox.api import ContractError, target_layers


def copied_weights(
    model: nn.Module, targets: tuple[type[nn.Module], ...], layer: str, include_bias: bool = False
) -> dict[str, Tensor]:
    """Copies of the parameters to change, by name: weights, and biases on request.

    A parameter that several layers share comes once. Raises ContractError for a layer that does not exist, whose
    weight is computed anew at each use (a change would have no effect), or whose weight is not finite.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, part in target_layers(model, targets, layer).items():
        own = dict(part.named_parameters(recurse=False))
        if "weight" not in own:
            raise ContractError(
                f"the weight of layer {name!r} is no parameter of it (weight norm, pruning or another "
                "parametrisation): fold it in before perturbing, for example with remove_parametrizations"
            )
        for kind in ("weight", "bias") if include_bias else ("weight",):
            if kind not in own or id(own[kind]) in seen:
                continue
            seen.add(id(own[kind]))
            if not torch.isfinite(own[kind]).all():
                raise ContractError(f"the {kind} of layer {name!r} is not finite: use other weights")
            found[f"{name}.{kind}" if name else kind] = own[kind].detach().clone()
    return found
