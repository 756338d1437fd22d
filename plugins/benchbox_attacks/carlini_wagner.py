"""Carlini and Wagner's L2 attack."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, MinimumNormAttack, RowRandom, adversarial_loss, fooled
from benchbox.domain import Threat
from benchbox_attacks.nearest import Nearest

INSIDE = 0.999
"""Where black and white lie on tanh's way to -1 and 1: at the ends themselves they would have no gradient."""


class CarliniWagner(MinimumNormAttack):
    """Minimises the squared distance plus c times the hinge of the margin over w, where the image is
    (tanh(w) + 1) / 2, with Adam, and searches c per image by bisection (Carlini & Wagner, S&P 2017, "Towards
    evaluating the robustness of neural networks", §V and §VI-A, with the hinge f6).

    The image range is stretched by a thousandth before tanh covers it and clamped afterwards, so that black and white
    pixels can move from the start. The paper bisects 20 times over 10,000 steps each.
    """

    name = "carlini-wagner"
    norms = ("l2",)
    needs = "gradients"
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        steps: int = Field(1000, ge=1, description="steps of Adam for each c")
        search_steps: int = Field(9, ge=1, description="values of c that are tried for each image")
        initial_c: float = Field(0.01, gt=0, description="the first c; ten times as much while nothing is found")
        learning_rate: float = Field(0.01, gt=0, description="Adam's learning rate, in units of w")
        confidence: float = Field(0.0, ge=0, description="the margin of logits, kappa, that the hinge asks for")

    options: Options

    @property
    def passes(self) -> int:
        """A forward and a backward pass at each point of each search."""
        return 3 * self.options.search_steps * self.options.steps

    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """See :meth:`benchbox.api.MinimumNormAttack.perturb`."""
        nearest = Nearest(x, "l2")
        c = x.new_full((len(x),), self.options.initial_c)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.options.search_steps):
            enough = self._minimise(model, x, y, threat, c, nearest)
            high, low = torch.where(enough, c, high), torch.where(enough, low, c)
            c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
        return nearest.best

    def _minimise(
        self, model: AttackTarget, x: Tensor, y: Tensor, threat: Threat, c: Tensor, nearest: Nearest
    ) -> Tensor:
        """Search with these ``c`` (n,) and show ``nearest`` every point; returns which rows met an adversarial one."""
        w = torch.atanh((2 * x - 1) * INSIDE).requires_grad_()
        first = torch.tanh(w.detach())  # so that the search starts exactly at x, without rounding
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        met = torch.zeros_like(y, dtype=torch.bool)
        for step in range(1, self.options.steps + 1):
            stretched = x + (torch.tanh(w) - first) / (2 * INSIDE)
            point = stretched + (stretched.clamp(0.0, 1.0) - stretched).detach()  # the gradient passes the clamp
            logits = model.logits(point, y, threat.targeted)
            hinge = (self.options.confidence - adversarial_loss(logits, y, threat, "margin")).clamp_min(0.0)
            objective = (point - x).square().flatten(1).sum(1) + c * hinge
            (gradient,) = torch.autograd.grad(objective.sum(), w)
            adversarial = fooled(logits.detach(), y, threat)
            nearest.see(point.detach(), adversarial)
            met |= adversarial
            move, mean, square = adam(gradient, mean, square, step)
            w = (w.detach() - self.options.learning_rate * move).requires_grad_()
        return met


def adam(gradient: Tensor, mean: Tensor, square: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The direction of Adam's step number ``step``, counted from 1, and its new running averages (Kingma & Ba, ICLR
    2015, Algorithm 1, with its constants). torch's own takes every process several seconds to import.
    """
    mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
    return mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8), mean, square
