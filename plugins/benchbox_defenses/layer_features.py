"""Activations of named layers, pooled to one vector per image, from the same pass that gives the logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchbox import api

BATCH = 256


class FeatureReader:
    """``reader(x)`` gives logits (n, k) and the features (n, d) of each layer, differentiable where ``x`` is.

    ``layers`` are names from ``model.named_modules()``; None stands for the penultimate features: what enters the last
    ``nn.Linear``. Axes behind the second one (of a convolution: the places) are averaged. Of a layer that a pass calls
    more than once the first call counts. Leaves no hooks behind.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str | None], who: str) -> None:
        """Raises ContractError, in the name of ``who``, for a layer that does not exist, with the names that do."""
        modules = dict(model.named_modules())
        linear = [name for name, part in modules.items() if isinstance(part, nn.Linear)]
        known = ", ".join(repr(name) for name, part in modules.items() if name and not list(part.children())) or "none"
        for layer in layers:
            if layer is not None and (layer not in modules or not layer):
                raise api.ContractError(f"{who}: the model has no layer {layer!r}. Its layers: {known}")
            if layer is None and not linear:
                raise api.ContractError(
                    f"{who}: the model has no nn.Linear, whose input would be the penultimate features; name a layer. "
                    f"Its layers: {known}"
                )
        self.model, self.layers, self.who = model, tuple(layers), who
        self._parts = [modules[linear[-1] if layer is None else layer] for layer in layers]

    def __call__(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], list[Float[Tensor, "n d"]]]:
        """Raises ContractError when a layer gives no activations (n, …) in the pass."""
        kept: dict[int, Tensor] = {}
        handles = [
            part.register_forward_pre_hook(partial(self._entering, kept, number))
            if layer is None
            else part.register_forward_hook(partial(self._leaving, kept, number))
            for number, (part, layer) in enumerate(zip(self._parts, self.layers, strict=True))
        ]
        try:
            logits = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        for number, layer in enumerate(self.layers):
            if number not in kept or len(kept[number]) != len(x):
                raise api.ContractError(
                    f"{self.who}: {_called(layer)} gave no activations per image in a pass: choose another"
                )
        return logits, [kept[number] for number in range(len(self.layers))]

    def _entering(self, kept: dict[int, Tensor], number: int, part: nn.Module, inputs: tuple[object, ...]) -> None:
        self._keep(kept, number, inputs[0])

    def _leaving(
        self, kept: dict[int, Tensor], number: int, part: nn.Module, inputs: tuple[object, ...], output: object
    ) -> None:
        self._keep(kept, number, output)

    def _keep(self, kept: dict[int, Tensor], number: int, activation: object) -> None:
        if number not in kept and isinstance(activation, Tensor) and activation.ndim >= 2:
            kept[number] = pooled(activation)

    @torch.no_grad()
    def read(self, images: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n d"]]:
        """The features of any number of ``images``, batch by batch and without gradients, to fit something on.

        Raises ContractError when some are not finite.
        """
        parts = [self(part)[1] for part in torch.split(images, BATCH)]
        features = [torch.cat([part[number] for part in parts]) for number in range(len(self.layers))]
        for layer, found in zip(self.layers, features, strict=True):
            if lost := int((~found.isfinite()).any(1).sum()):
                raise api.ContractError(
                    f"{self.who}: the activations of {_called(layer)} are not finite on {lost} of {len(images)} "
                    "calibration images: check the model's weights and its normalisation"
                )
        return features


def _called(layer: str | None) -> str:
    return "the penultimate layer" if layer is None else f"layer {layer!r}"


def pooled(activation: Float[Tensor, "n d *places"]) -> Float[Tensor, "n d"]:
    """The mean over all places; a copy, because the next layer may work in place."""
    return activation.flatten(2).mean(2) if activation.ndim > 2 else activation.clone()


def distances(features: Float[Tensor, "n d"], references: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Euclidean, row by row: through a matrix product small ones would be rounding, and depend on the batch."""
    return torch.cdist(features, references, compute_mode="donot_use_mm_for_euclid_dist")


def class_means(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int) -> Float[Tensor, "k d"]:
    """The mean feature vector of each class; every class must occur."""
    own = nn.functional.one_hot(labels, classes).to(features.dtype)
    return own.T @ features / own.sum(0)[:, None]
