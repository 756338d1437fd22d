"""The fast gradient method without the image range, as studies of weights have used it."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from benchbox.api import AttackTarget, BudgetAttack, RowRandom
from benchbox.domain import Threat
from benchbox_attacks.balls import steepest
from benchbox_attacks.fgsm import loss_gradient


class UnclippedFGSM(BudgetAttack):
    """One step of the whole budget, as ``fgsm`` makes it, that is not clipped to [0, 1] afterwards: what it hands out
    need be no image, and results with such inputs are flagged and not ranked. For comparison with the notebooks of the
    synaptic filtering study (SynapFilter/InferLink), whose clamp is commented out; there eps counts in units of the
    normalised input, 0.3081 of a pixel range on MNIST. One forward and one backward pass."""

    name = "fgsm-unclipped"
    norms = ("linf", "l2", "l1")
    needs = "gradients"
    targeted = True
    rejection_aware = True
    in_range = False
    passes = 3

    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """See :meth:`benchbox.api.BudgetAttack.perturb`."""
        return x + threat.eps * steepest(loss_gradient(model, x, y, threat), threat.norm)
