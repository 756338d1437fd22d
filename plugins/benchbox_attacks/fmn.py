"""FMN: fast minimum-norm attacks in four norms."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, MinimumNormAttack, RowRandom, adversarial_loss, fooled
from benchbox.domain import Norm, Threat
from benchbox_attacks.balls import steepest
from benchbox_attacks.nearest import Nearest, annealed, length, per_row

DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}


class FMN(MinimumNormAttack):
    """Normalised gradient steps on the margin inside a ball whose radius follows the decision boundary: estimated to
    first order until an adversarial point is known, then shrunk after each adversarial point and grown after each
    other one (Pintor et al., NeurIPS 2021, "Fast minimum-norm adversarial attacks through adaptive norm
    constraints", Algorithm 1 and §2). The search starts at the input itself.

    Two things differ. The first radius is the estimate and ``gamma`` more, and grows at least by ``gamma`` per step,
    as neither a point on the boundary nor one that the image range holds back is adversarial. And in L0 the values
    that stay are not the largest changes, but those that the gradient values most: a change counts by what fits into
    the image range, times its slope.
    """

    name = "fmn"
    norms = ("linf", "l2", "l1", "l0")
    needs = "gradients"
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        steps: int = Field(300, ge=1, description="gradient steps; the paper uses 1,000")
        step_size: float | None = Field(
            None, gt=0, description="L2 length of the first step, the last is a hundredth of it; 1, and 10 in L0"
        )
        gamma: float = Field(0.05, gt=0, lt=1, description="the share by which the radius changes at first")
        last_gamma: float = Field(0.0001, gt=0, lt=1, description="the share by which the radius changes in the end")

    options: Options

    @property
    def passes(self) -> int:
        """A forward and a backward pass at the input and at each of the points that follow."""
        return 3 * (self.options.steps + 1)

    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """See :meth:`benchbox.api.MinimumNormAttack.perturb`."""
        options, norm = self.options, threat.norm
        first_pace = options.step_size or (10.0 if norm == "l0" else 1.0)
        nearest, point, radius = Nearest(x, norm), x, x.new_zeros(len(x))
        furthest = length(torch.ones_like(x), norm)
        for step in range(options.steps + 1):
            leaf = point.detach().requires_grad_()
            logits = model.logits(leaf, y, threat.targeted)
            margin = adversarial_loss(logits, y, threat, "margin")
            (gradient,) = torch.autograd.grad(margin.sum(), leaf)
            adversarial = fooled(logits.detach(), y, threat)
            nearest.see(point, adversarial)

            share = step / options.steps
            reach = length(point - x, norm) + (1 + options.gamma) * _to_boundary(margin.detach(), gradient, norm)
            searched = torch.maximum(reach, radius * (1 + options.gamma))
            gamma = annealed(options.gamma, options.last_gamma, share)
            followed = _adapted(radius, gamma, norm, adversarial, nearest.distance)
            radius = torch.where(nearest.found, followed, searched).minimum(furthest)

            pace = annealed(first_pace, first_pace / 100, share)
            move = point - x + pace * steepest(gradient, "l2")
            kept = _most_valued(x, move, gradient, radius) if norm == "l0" else _project(move, norm, radius)
            point = (x + kept).clamp(0.0, 1.0)
        return nearest.best


def _to_boundary(margin: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    """How far the decision boundary is to first order, (n,); in L0, where no slope says that, one value more."""
    if norm == "l0":
        return torch.ones_like(margin)
    return margin.abs() / length(gradient, DUAL[norm]).clamp_min(torch.finfo(gradient.dtype).tiny)


def _adapted(radius: Tensor, gamma: float, norm: Norm, adversarial: Tensor, best: Tensor) -> Tensor:
    """The radius after a point that was or was not ``adversarial``; after one it is at most the ``best`` distance."""
    shrunk, grown = radius * (1 - gamma), radius * (1 + gamma)
    if norm == "l0":  # in whole values, at least one at a time
        shrunk, grown = torch.minimum(shrunk.floor(), radius - 1), torch.maximum(grown.floor(), radius + 1)
    return torch.where(adversarial, torch.minimum(shrunk, best), grown).clamp_min(0.0)


def _project(move: Tensor, norm: Norm, radius: Tensor) -> Tensor:
    """The nearest point, in the Euclidean sense, in each row's ball of its ``radius`` (n,) around zero.

    L1 by soft thresholding (Duchi et al., ICML 2008, "Efficient projections onto the l1-ball", Figure 1).
    """
    if norm == "linf":
        return torch.clamp(move, -per_row(radius), per_row(radius))
    if norm == "l2":
        size = length(move, "l2").clamp_min(torch.finfo(move.dtype).tiny)
        return move * per_row((radius / size).clamp_max(1.0))
    ordered = move.abs().flatten(1).sort(dim=1, descending=True).values
    count = torch.arange(1, ordered.shape[1] + 1, device=move.device)
    excess = (ordered.cumsum(1) - radius[:, None]) / count
    last = (ordered > excess).sum(1, keepdim=True).clamp_min(1) - 1
    threshold = per_row(excess.gather(1, last).clamp_min(0.0)[:, 0])
    return move.sign() * (move.abs() - threshold).clamp_min(0.0)


def _most_valued(x: Tensor, move: Tensor, gradient: Tensor, radius: Tensor) -> Tensor:
    """``move``, as far as the image range lets it, on the ``radius`` values where it gains most to first order."""
    possible = (x + move).clamp(0.0, 1.0) - x
    order = (possible * gradient).abs().flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1).reshape(x.shape)
    return torch.where(rank < per_row(radius), possible, 0.0)
