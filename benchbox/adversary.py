"""What training does to images: augmentation, and the adversary of Madry et al. 2018, "Towards Deep Learning Models
Resistant to Adversarial Attacks", §2.1. The attacks that benchmarks use are plugins; this one serves training alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchbox.api import Examples
from benchbox.recipe import Adversary, Augmentation

BATCH = 500  # images per pass where no gradient of the weights is needed


def augment(images: Tensor, options: Augmentation, rng: torch.Generator) -> Tensor:
    """Randomly shifted (black comes in at the edges) and mirrored copies of ``images`` (n, c, h, w)."""
    count, channels, height, width = images.shape
    device = images.device
    if options.pad_crop:
        padded = functional.pad(images, (options.pad_crop,) * 4)
        shift = torch.randint(2 * options.pad_crop + 1, (2, count, 1), generator=rng, device=device)
        rows = (shift[0] + torch.arange(height, device=device))[:, None, :, None]
        columns = (shift[1] + torch.arange(width, device=device))[:, None, None, :]
        image = torch.arange(count, device=device)[:, None, None, None]
        images = padded[image, torch.arange(channels, device=device)[None, :, None, None], rows, columns]
    if options.flip:
        chosen = torch.rand((count, 1, 1, 1), generator=rng, device=device) < 0.5
        images = torch.where(chosen, images.flip(3), images)
    return images


def pgd(
    model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, rng: torch.Generator, share: float = 1.0,
    loss_of: Callable[[Tensor], Tensor] | None = None, start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Images in [0, 1] within ``share`` of the adversary's eps of ``x`` (n, c, h, w) that raise the cross entropy, or
    what ``loss_of`` makes of the logits (n, k): a sum over the images.

    The last iterate of projected gradient descent, from ``start`` where it is given (put into the ball and the range)
    instead of where the adversary says; the model must be in evaluation mode.
    """
    eps = adversary.eps * share
    length = (adversary.step_size or 2.5 * adversary.eps / adversary.steps) * share
    if start is not None:
        delta = _project(start - x, eps, adversary.norm)
    else:
        delta = _random_in_ball(x, eps, adversary.norm, rng) if adversary.random_start else torch.zeros_like(x)
    adversarial = (x + delta).clamp(0, 1)
    for _ in range(adversary.steps):
        adversarial.requires_grad_()
        logits = model(adversarial)
        loss = loss_of(logits) if loss_of else functional.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        moved = adversarial.detach() + length * _direction(gradient, adversary.norm)
        adversarial = (x + _project(moved - x, eps, adversary.norm)).clamp(0, 1)
    return adversarial


def _random_in_ball(x: Tensor, eps: float, norm: str, rng: torch.Generator) -> Tensor:
    """Uniform in the ball, one point per image."""
    if norm == "linf":
        return (2 * torch.rand(x.shape, generator=rng, device=x.device) - 1) * eps
    direction = _direction(torch.randn(x.shape, generator=rng, device=x.device), "l2")
    radius = torch.rand((len(x), 1, 1, 1), generator=rng, device=x.device) ** (1 / x[0].numel())
    return direction * radius * eps


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """The step of norm 1 that raises the loss most."""
    if norm == "linf":
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]


def _project(delta: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1)[:, None, None, None]


def correct(model: nn.Module, examples: Examples) -> Tensor:
    """bool (n,): which images are classified correctly."""
    with torch.no_grad():
        parts = torch.split(examples.images, BATCH)
        return torch.cat([model(part).argmax(1) for part in parts]) == examples.labels


def robust_mask(
    model: nn.Module, examples: Examples, adversary: Adversary, restarts: int, rng: torch.Generator
) -> Tensor:
    """bool (n,): which images are classified correctly, clean and after each of ``restarts`` tries."""
    robust = correct(model, examples)
    for _ in range(restarts):
        for index in torch.split(robust.nonzero()[:, 0], BATCH):
            some = examples.take(index)
            attacked = Examples(pgd(model, some.images, some.labels, adversary, rng), some.labels)
            robust[index] = correct(model, attacked)
    return robust
