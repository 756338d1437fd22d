"""The parameters that a perturbation of one layer, or of all, changes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchbox.api import ContractError, target_layers

Kinds = tuple[type[nn.Module], ...]


def copied_weights(model: nn.Module, targets: Kinds, layer: str, include_bias: bool = False) -> dict[str, Tensor]:
    """Copies of the parameters to change, by name: weights, and biases on request.

    A parameter that several layers share comes once, and one without entries not at all. Raises ContractError for a
    layer that does not exist, whose weight is computed anew at each use (a change would have no effect) or empty, or
    whose weight is not finite.
    """
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, int, int]] = set()
    layers = target_layers(model, targets, layer)
    for name, kind, parameter in _parameters(layers, include_bias):
        if parameter.numel() == 0 or _place(parameter) in seen:
            continue
        seen.add(_place(parameter))
        if not torch.isfinite(parameter).all():
            raise ContractError(f"the {kind} of layer {name!r} is not finite: use other weights")
        found[f"{name}.{kind}" if name else kind] = parameter.detach().clone()
    if not found:
        raise ContractError(
            f"{', '.join(map(repr, layers))}: no weights to perturb, the layer is empty. Leave it out of the grid"
        )
    return found


def layers_with_own_weights(model: nn.Module, targets: Kinds) -> list[str]:
    """The layers that ``layer = "@each"`` stands for: without empty ones, and of tied ones the first alone.

    Raises ContractError, with a reason, when there is none.
    """
    seen: set[tuple[int, int, int]] = set()
    names = []
    for name, part in target_layers(model, targets).items():
        weight = dict(part.named_parameters(recurse=False)).get("weight")
        if weight is not None:
            if weight.numel() == 0 or _place(weight) in seen:
                continue
            seen.add(_place(weight))
        names.append(name)  # one whose weight is computed, too: apply says what to do
    if not names:
        raise ContractError("the model has no layer to perturb, they are all empty. Leave it out of the grid")
    return names


def _parameters(layers: dict[str, nn.Module], include_bias: bool) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name of the layer, "weight" or "bias", and the parameter."""
    for name, part in layers.items():
        own = dict(part.named_parameters(recurse=False))
        if "weight" not in own:
            if getattr(part, "affine", True) is False:  # a batch norm without parameters
                continue
            raise ContractError(
                f"the weight of layer {name!r} is no parameter of it (weight norm, pruning or another "
                "parametrisation): fold it in before perturbing, for example with remove_parametrizations"
            )
        for kind in ("weight", "bias") if include_bias else ("weight",):
            if kind in own:
                yield name, kind, own[kind]


def _place(parameter: Tensor) -> tuple[int, int, int]:
    """Equal for parameters that share their memory, as tied ones do, also where one is a view of the other."""
    return parameter.untyped_storage().data_ptr(), int(parameter.storage_offset()), parameter.numel()
