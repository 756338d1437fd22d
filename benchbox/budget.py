"""Budgets: what an attack may hand out, checked to the last bit; nothing is ever clipped for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchbox.domain import Threat
from benchbox.errors import ContractError


def check_range(name: str, images: Tensor, in_range: bool = True) -> None:
    """Raise ContractError unless ``images`` are finite and, for an attack that is ``in_range``, in [0, 1]."""
    broken = int((~torch.isfinite(images)).flatten(1).any(1).sum())
    if broken:
        raise ContractError(f"attack {name!r} returned NaN or infinite pixels in {broken} of {len(images)} inputs")
    if in_range and len(images) and (float(images.min()) < 0 or float(images.max()) > 1):
        raise ContractError(
            f"attack {name!r} left the image range: pixels from {float(images.min()):.6g} to "
            f"{float(images.max()):.6g}; clamp to [0, 1] before returning"
        )


def distances(clean: Tensor, adversarial: Tensor) -> dict[str, Tensor]:
    """The norms of the perturbations, float32 (n,) each, summed in float64."""
    delta = (adversarial.double() - clean.double()).flatten(1)
    size = delta.abs()
    norms = {"linf": size.amax(1), "l2": delta.norm(dim=1), "l1": size.sum(1), "l0": (size > 0).sum(1)}
    return {norm: value.float() for norm, value in norms.items()}


def allowance(threat: Threat, values: int) -> float:
    """The largest distance that counts as within ``threat`` for inputs of ``values`` numbers.

    Beyond eps it allows for the rounding of float32 images: half an ulp at 1 per number, and 1e-6 of eps.
    """
    half_ulp = 2.0**-24
    rounding = {"linf": half_ulp, "l2": half_ulp * math.sqrt(values), "l1": half_ulp * values, "l0": 0.0}[threat.norm]
    return threat.eps * (1 + 1e-6) + rounding
