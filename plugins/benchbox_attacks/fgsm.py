"""The fast gradient method: one step of the whole budget."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchbox.api import AttackTarget, BudgetAttack, RowRandom, adversarial_loss
from benchbox.domain import Threat
from benchbox_attacks.balls import project, steepest
from benchbox_attacks.l1_ball import linear_maximum


class FGSM(BudgetAttack):
    """One step along the sign of the gradient of the cross entropy (Goodfellow, Shlens, Szegedy, ICLR 2015, §4); in
    L2 along the normalised gradient (Miyato et al., ICLR 2016); in L1 to the point that would be the worst if the
    model were linear. One forward and one backward pass."""

    name = "fgsm"
    norms = ("linf", "l2", "l1")
    needs = "gradients"
    targeted = True
    rejection_aware = True
    passes = 3

    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """See :meth:`benchbox.api.BudgetAttack.perturb`."""
        gradient = loss_gradient(model, x, y, threat)
        if threat.norm == "l1":
            return linear_maximum(gradient, x, threat.eps)
        return project(x + threat.eps * steepest(gradient, threat.norm), x, threat.norm, threat.eps)


def loss_gradient(
    model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat
) -> Float[Tensor, "n c h w"]:
    """The gradient, at ``x``, of the cross entropy that an attacker raises. One forward and one backward pass."""
    point = x.detach().clone().requires_grad_()
    loss = adversarial_loss(model.logits(point, y, threat.targeted), y, threat).sum()
    (gradient,) = torch.autograd.grad(loss, point)
    return gradient
