"""momentum: an attack in twenty lines."""

import torch
from pydantic import Field

from benchbox import api


class Momentum(api.BudgetAttack):
    """Momentum iterative FGSM (Dong et al., CVPR 2018, "Boosting Adversarial Attacks with Momentum", algorithm 1)."""

    name, norms, needs = "momentum", ("linf",), "gradients"
    targeted = rejection_aware = True

    class Options(api.Options):
        steps: int = Field(10, ge=1, description="gradient steps of size eps / steps")
        decay: float = Field(1.0, ge=0, description="how much of the past direction is kept")

    @property
    def passes(self):
        return 3 * self.options.steps  # a forward pass, and a backward pass that counts as two

    def perturb(self, model, x, y, threat, rng):
        adversarial, momentum = x, torch.zeros_like(x)
        for _ in range(self.options.steps):
            point = adversarial.clone().requires_grad_()
            loss = api.adversarial_loss(model.logits(point, y, threat.targeted), y, threat)
            (gradient,) = torch.autograd.grad(loss.sum(), point)
            scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
            momentum = self.options.decay * momentum + gradient / scale
            adversarial = adversarial + threat.eps / self.options.steps * momentum.sign()
            adversarial = adversarial.clamp(x - threat.eps, x + threat.eps).clamp(0, 1)
        return adversarial
