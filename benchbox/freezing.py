"""Parameters that a training leaves as they are: layers by name, or single ones drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from benchbox.errors import GridError
from benchbox.recipe import Freeze


@dataclass(frozen=True)
class Frozen:
    """``modules`` stay in evaluation mode; ``held`` are a parameter, the mask of what stays (bool), and its values."""

    modules: Sequence[nn.Module] = ()
    held: Sequence[tuple[nn.Parameter, Tensor, Tensor]] = ()

    def train(self, model: nn.Module) -> None:
        """Put ``model`` into training mode, but for what is frozen: its batch norms keep their statistics."""
        model.train()
        for module in self.modules:
            module.eval()

    def restore(self) -> None:
        """Put single parameters back after a step, whatever the optimiser did to them (momentum and decay move all)."""
        with torch.no_grad():
            for parameter, mask, values in self.held:
                parameter[mask] = values


def freeze(model: nn.Module, options: Freeze | None, rng: torch.Generator, place: str) -> Frozen:
    """Freeze what ``options`` say in ``model``: parameters of frozen layers need no gradient any more.

    ``rng`` (on the CPU) draws single parameters, each with the same chance. Raises GridError, with ``place`` in front,
    for a name that matches no layer (and says which there are), and where nothing is left to train.
    """
    if options is None:
        return Frozen()
    if options.random:
        return _random(model, options.random, rng, place)
    modules = _layers(model, options.layers, place)
    for module in modules:
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise GridError(f"{place}.layers: all parameters are frozen, nothing is left to train. Name fewer layers")
    return Frozen(modules=modules)


def _layers(model: nn.Module, wanted: Sequence[str], place: str) -> list[nn.Module]:
    layers = {name: module for name, module in model.named_modules() if name and _has_state(module)}
    found: dict[str, nn.Module] = {}
    for pattern in wanted:
        chosen = {name: module for name, module in layers.items() if name == pattern or fnmatchcase(name, pattern)}
        if not chosen:
            known = ", ".join(repr(name) for name in layers) or "none"
            raise GridError(f"{place}.layers: the model has no layer {pattern!r}. Its layers: {known}")
        found |= chosen
    return list(found.values())


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _random(model: nn.Module, count: int, rng: torch.Generator, place: str) -> Frozen:
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    if count >= total:
        raise GridError(f"{place}.random: the model has {total:,} parameters, so that {count:,} leave nothing to train")
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=rng)[:count]] = True
    masks = torch.split(chosen, [parameter.numel() for parameter in parameters])
    held = []
    for parameter, flat in zip(parameters, masks, strict=True):
        mask = flat.reshape(parameter.shape).to(parameter.device)
        held.append((parameter, mask, parameter.detach()[mask].clone()))
    return Frozen(held=held)
