"""Adversarial inputs that a detector learns from, made of calibration images; no attack of a grid is needed for it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from benchbox import api
from benchbox_defenses.detector import spread

BATCH = 256
BISECTIONS = 10
FEWEST = 10
"""Pairs below which nothing can be learnt, let alone cross-validated."""


class PairOptions(api.Options):
    """How the adversarial inputs are made that a detector learns from."""

    attack: Literal["pgd", "nearest", "both"] = Field(
        "nearest",
        description="what the detector learns from: PGD in L-inf; the points nearest to the image, on the way to those "
        "of PGD, that are still misclassified; or in turn the one and the other",
    )
    eps: float = Field(0.1, gt=0, le=1, description="radius of PGD, in the [0, 1] range of pixels")
    steps: int = Field(10, ge=1, description="steps of PGD; 1 is FGSM")
    pairs: int = Field(400, ge=FEWEST, description="pairs of an image and its adversarial version, at most")


def adversarial_pairs(
    model: nn.Module, examples: api.Examples, options: PairOptions, who: str
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
    """Images that ``model`` classifies correctly, and for each its adversarial version, which it does not.

    Of attacks that failed nothing is kept. PGD starts at the image and takes steps of 2.5 eps / steps (Madry et al.,
    ICLR 2018, §2.1); "nearest" is found by bisection of the line. Raises ContractError, in the name of ``who``, for
    fewer than 10 pairs.
    """
    parts = [
        _attack(model, images, labels, options)
        for images, labels in zip(torch.split(examples.images, BATCH), torch.split(examples.labels, BATCH), strict=True)
    ]
    adversarial, paired = (torch.cat(column) for column in zip(*parts, strict=True))
    if int(paired.sum()) < FEWEST:
        raise api.ContractError(
            f"{who}: PGD with eps = {options.eps:g} and {options.steps} steps fools the model on {int(paired.sum())} "
            f"of {len(examples)} calibration images, and {FEWEST} are needed; raise eps or steps, or enlarge "
            "the calibration split"
        )
    index = spread(api.Examples(examples.images[paired], paired.nonzero()[:, 0]), options.pairs).labels
    return examples.images[index], adversarial[index]


def _attack(
    model: nn.Module, x: Tensor, y: Tensor, options: PairOptions
) -> tuple[Float[Tensor, "n c h w"], Bool[Tensor, " n"]]:
    """The adversarial versions, and which rows are correct before and misclassified after."""
    far = pgd(model, x, y, options.eps, options.steps)
    paired = ~_wrong(model, x, y) & _wrong(model, far, y)
    if options.attack == "pgd":
        return far, paired
    near = nearest(model, x, far, y)
    if options.attack == "nearest":
        return near, paired
    even = ((paired.cumsum(0) % 2) == 0)[:, None, None, None]
    return torch.where(even, near, far), paired


def pgd(
    model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], eps: float, steps: int
) -> Float[Tensor, "n c h w"]:
    """The last of ``steps`` points of projected gradient ascent on the cross entropy, within ``eps`` in L∞ of ``x``."""
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    point = x
    with torch.enable_grad():
        for _ in range(steps):
            point = point.detach().clone().requires_grad_()
            loss = nn.functional.cross_entropy(model(point.clone()), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
            point = (point.detach() + 2.5 * eps / steps * gradient.sign()).clamp(low, high)
    return point.detach()


def nearest(
    model: nn.Module, x: Float[Tensor, "n c h w"], far: Float[Tensor, "n c h w"], y: Int[Tensor, " n"]
) -> Float[Tensor, "n c h w"]:
    """Between ``x`` and the misclassified ``far``, the misclassified point that bisection comes to."""
    shape = (len(x), 1, 1, 1)
    inner, outer = x.new_zeros(shape), x.new_ones(shape)
    for _ in range(BISECTIONS):
        middle = (inner + outer) / 2
        wrong = _wrong(model, torch.lerp(x, far, middle), y).view(shape)
        inner, outer = torch.where(wrong, inner, middle), torch.where(wrong, middle, outer)
    return torch.lerp(x, far, outer)


@torch.no_grad()
def _wrong(model: nn.Module, x: Tensor, y: Tensor) -> Bool[Tensor, " n"]:
    return model(x.clone()).argmax(1) != y
