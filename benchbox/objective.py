"""What training minimises: cross entropy on clean or adversarial images, TRADES, adversarial logit pairing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from benchbox.adversary import pgd
from benchbox.recipe import Recipe

NEAR = 1e-3
"""Standard deviation of the noise at which TRADES' adversary starts: at the clean image itself it has no gradient."""


def objective(
    recipe: Recipe, model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], rng: torch.Generator,
    share: float = 1.0, train: Callable[[nn.Module], object] = nn.Module.train,
) -> Float[Tensor, ""]:  # fmt: skip
    """The mean loss of ``model`` on n images by the recipe's method, with ``share`` of the adversary's eps.

    The adversary meets the model in evaluation mode, the loss is taken in training mode, into which
    ``train`` puts it; it is left in that.
    """
    if recipe.method == "pgd" and recipe.pgd:
        x = pgd(model, x, y, recipe.pgd, rng, share)
    elif recipe.method == "alp" and recipe.alp:
        adversarial = pgd(model, x, y, recipe.alp, rng, share)
        train(model)
        return pairing(model(x), model(adversarial), y, recipe.alp.weight, recipe.label_smoothing)
    elif recipe.method == "trades" and recipe.trades:
        with torch.no_grad():
            clean = model(x)
        start = x + NEAR * torch.randn(x.shape, generator=rng, device=x.device)
        adversarial = pgd(model, x, y, recipe.trades, rng, share, lambda logits: divergence(clean, logits).sum(), start)
        train(model)
        return trades(model(x), model(adversarial), y, recipe.trades.beta, recipe.label_smoothing)
    train(model)
    return functional.cross_entropy(model(x), y, label_smoothing=recipe.label_smoothing)


def trades(
    clean: Float[Tensor, "n k"], adversarial: Float[Tensor, "n k"], y: Int[Tensor, " n"], beta: float,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:  # fmt: skip
    """Cross entropy of the clean logits plus ``beta`` times the divergence of the adversarial ones from them, in nats
    (Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy", arXiv 1901.08573, eq. 5
    and algorithm 1; beta is their 1 / lambda)."""
    return functional.cross_entropy(clean, y, label_smoothing=smoothing) + beta * divergence(clean, adversarial).mean()


def divergence(clean: Float[Tensor, "n k"], adversarial: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """KL(softmax of ``clean`` || softmax of ``adversarial``), in nats."""
    reference, other = functional.log_softmax(clean, 1), functional.log_softmax(adversarial, 1)
    return (reference.exp() * (reference - other)).sum(1)


def pairing(
    clean: Float[Tensor, "n k"], adversarial: Float[Tensor, "n k"], y: Int[Tensor, " n"], weight: float,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:  # fmt: skip
    """The mean cross entropy over clean and adversarial images, half each, plus ``weight`` times the mean squared L2
    distance of their logits (Kannan, Kurakin & Goodfellow 2018, "Adversarial Logit Pairing", arXiv 1803.06373, §3.1).

    On its own no defense: Engstrom, Ilyas & Athalye 2018 (arXiv 1807.10272) broke the paper's networks.
    """
    both, labels = torch.cat([clean, adversarial]), torch.cat([y, y])
    apart = (clean - adversarial).square().sum(1).mean()
    return functional.cross_entropy(both, labels, label_smoothing=smoothing) + weight * apart
