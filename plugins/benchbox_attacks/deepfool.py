"""DeepFool: steps to the nearest boundary of the linearised model."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, MinimumNormAttack, RowRandom, fooled
from benchbox.domain import Norm, Threat
from benchbox_attacks.nearest import length, per_row


class DeepFool(MinimumNormAttack):
    """Linearises the model, steps to the nearest boundary with another class, and again from there until the
    prediction changes (Moosavi-Dezfooli, Fawzi, Frossard, CVPR 2016, Algorithm 2; §3.3, equations 10 to 12, for
    other norms than L2).

    The image range is respected after each step: what one value cannot give the next step takes from the others. A
    row stops at its first adversarial point, which is looked for ``overshoot`` beyond the steps made so far.
    """

    name = "deepfool"
    norms = ("linf", "l2")
    needs = "gradients"
    rejection_aware = True

    class Options(api.Options):
        steps: int = Field(50, ge=1, description="steps at most")
        overshoot: float = Field(0.02, gt=0, description="how much further than the boundary, as a share of the way")
        classes: int = Field(9, ge=1, description="how many of the other classes, the strongest first, are looked at")

    options: Options

    @property
    def passes(self) -> int:
        """In each step a forward pass and a backward pass per class, and a forward pass beyond the boundary."""
        return self.options.steps * (2 + 2 * self.options.classes)

    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """See :meth:`benchbox.api.MinimumNormAttack.perturb`."""
        best, point = x.clone(), x.clone()
        rows = torch.arange(len(x), device=x.device)
        for _ in range(self.options.steps):
            start, aim = x[rows], y[rows]
            leaf = point[rows].requires_grad_()
            logits = model.logits(leaf, aim)
            reached = fooled(logits.detach(), aim, threat)
            move = self._to_nearest_boundary(leaf, logits, aim, threat.norm)
            moved = (leaf.detach() + move).clamp(0.0, 1.0)
            beyond = (start + (1 + self.options.overshoot) * (moved - start)).clamp(0.0, 1.0)
            with torch.no_grad():
                passed = fooled(model.logits(beyond, aim), aim, threat)
            best[rows] = torch.where(per_row(reached), leaf.detach(), torch.where(per_row(passed), beyond, start))
            point[rows] = moved
            rows = rows[~(reached | passed)]
            if not len(rows):
                break
        return best

    def _to_nearest_boundary(self, leaf: Tensor, logits: Tensor, y: Tensor, norm: Norm) -> Tensor:
        """The smallest step that levels the true class with another one, were the model linear at ``leaf``."""
        others = logits.detach().scatter(1, y[:, None], -torch.inf)
        rivals = others.topk(min(self.options.classes, logits.shape[1] - 1), dim=1).indices
        shortest, move = torch.full_like(logits[:, 0].detach(), torch.inf), torch.zeros_like(leaf)
        tiny = torch.finfo(leaf.dtype).tiny
        for number in range(rivals.shape[1]):
            gap = (logits.gather(1, y[:, None]) - logits.gather(1, rivals[:, number : number + 1]))[:, 0]
            (slope,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=number + 1 < rivals.shape[1])
            gap = gap.detach().clamp_min(0.0)
            steepness = length(slope, "l1" if norm == "linf" else "l2").clamp_min(tiny)
            distance = gap / steepness
            direction = slope.sign() if norm == "linf" else slope / per_row(steepness)
            closer = distance < shortest
            move = torch.where(per_row(closer), -per_row(distance) * direction, move)
            shortest = torch.where(closer, distance, shortest)
        return move.detach()
