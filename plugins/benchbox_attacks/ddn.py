"""DDN: a search for the nearest adversarial input that decouples direction and norm."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, MinimumNormAttack, RowRandom, adversarial_loss, fooled
from benchbox.domain import Threat
from benchbox_attacks.balls import flat_norm, steepest
from benchbox_attacks.nearest import Nearest, annealed, per_row


class DDN(MinimumNormAttack):
    """Gradient steps on the cross entropy give the direction; the length is set apart from it: a little shorter after
    each adversarial point, a little longer after each other one (Rony et al., CVPR 2019, "Decoupling direction and
    norm for efficient gradient-based L2 adversarial attacks and defenses", Algorithm 1).

    As there, the step size falls along a cosine from 1 to 0.01. Points are not rounded to 8 bits.
    """

    name = "ddn"
    norms = ("l2",)
    needs = "gradients"
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        steps: int = Field(300, ge=1, description="gradient steps; the paper uses 100, 300 and 1,000")
        gamma: float = Field(0.05, gt=0, lt=1, description="the share by which the norm changes from step to step")
        initial_norm: float = Field(1.0, gt=0, description="L2 norm of the first step, in pixel units")

    options: Options

    @property
    def passes(self) -> int:
        """A forward and a backward pass at the input and at each of the points that follow."""
        return 3 * (self.options.steps + 1)

    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """See :meth:`benchbox.api.MinimumNormAttack.perturb`."""
        steps, gamma = self.options.steps, self.options.gamma
        nearest, point = Nearest(x, "l2"), x
        norm = x.new_full((len(x),), self.options.initial_norm)
        for step in range(steps + 1):
            leaf = point.detach().requires_grad_()
            logits = model.logits(leaf, y, threat.targeted)
            (gradient,) = torch.autograd.grad(adversarial_loss(logits, y, threat).sum(), leaf)
            adversarial = fooled(logits.detach(), y, threat)
            nearest.see(point, adversarial)
            change = point - x + annealed(1.0, 0.01, step / steps) * steepest(gradient, "l2")
            norm = norm * torch.where(adversarial, 1 - gamma, 1 + gamma)
            point = (x + per_row(norm) * change / flat_norm(change)).clamp(0.0, 1.0)
        return nearest.best
