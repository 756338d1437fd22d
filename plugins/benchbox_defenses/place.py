"""A place inside a model where a defense reads or replaces the activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from benchbox import api

BATCH = 256
"""Calibration images that go through the model at once."""

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """What leaves the module called ``layer``, or what enters it."""

    layer: str
    entering: bool = False

    def __str__(self) -> str:
        return f"what {'enters' if self.entering else 'leaves'} layer {self.layer!r}"


def find_place(model: nn.Module, layer: str | None, who: str) -> Place:
    """What leaves ``layer``, or, where that is None, what enters the last linear layer.

    Raises ContractError, with the names that exist, when there is no such layer.
    """
    modules = {name: part for name, part in model.named_modules() if name}
    if layer is None:
        linear = [name for name, part in modules.items() if isinstance(part, nn.Linear)]
        if linear:
            return Place(linear[-1], entering=True)
    elif layer in modules:
        return Place(layer)
    known = ", ".join(repr(name) for name, part in modules.items() if not list(part.children())) or "none"
    what = "no linear layer: set layer" if layer is None else f"no layer {layer!r}"
    raise api.ContractError(f"{who}: the model has {what}. Its layers: {known}")


def changed_pass(model: nn.Module, place: Place, x: Float[Tensor, "n c h w"], change: Change) -> Float[Tensor, "n k"]:
    """The logits of ``model`` for ``x`` when ``change`` replaces the activations (n, …) at ``place``.

    Raises ContractError when the place is not passed exactly once, or not by one tensor with a row per image.
    """
    calls = 0

    def intercept(activation: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if not isinstance(activation, Tensor) or activation.ndim < 2 or len(activation) != len(x):
            raise api.ContractError(f"{place} is no tensor with one row per image: choose another layer")
        return change(activation)

    part = model.get_submodule(place.layer)
    if place.entering:
        handle = part.register_forward_pre_hook(lambda _, inputs: (intercept(inputs[0]), *inputs[1:]))
    else:
        handle = part.register_forward_hook(lambda _, inputs, output: intercept(output))
    try:
        logits = model(x)
    finally:
        handle.remove()
    if calls != 1:
        raise api.ContractError(f"{place} occurs {calls} times in a pass: choose a layer that runs once")
    return logits


def read_pass(
    model: nn.Module, place: Place, x: Float[Tensor, "n c h w"]
) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n k"]]:
    """The activations at ``place`` and the logits, from one pass."""
    kept: list[Tensor] = []

    def keep(activation: Tensor) -> Tensor:
        kept.append(activation.clone())  # the next layer may work in place
        return activation

    logits = changed_pass(model, place, x, keep)
    return kept[0], logits


class StraightThrough(torch.autograd.Function):
    """``straight_through(x, value)`` is ``value`` and has the derivative of ``x`` (Bengio et al. 2013, arXiv 1308.3432;
    as a way round a defense: BPDA, Athalye et al. 2018, arXiv 1802.00420)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value`` with the derivative of ``x``."""
    return StraightThrough.apply(x, value.detach())
