"""Orthogonal and Selective PGD: gradient descent against a classifier and its detector at once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, ContractError, RowRandom, Rows, StepAttack, adversarial_loss
from benchbox.domain import Threat
from benchbox_attacks.balls import flat_norm, project, steepest
from benchbox_attacks.evasion import Standing, seen
from benchbox_attacks.nearest import per_row

PARALLEL = 1e-5  # a remainder so much shorter than what it remained of is rounding


class DetectorPGD(StepAttack):
    """Steps that fool the classifier until it is fooled by a margin, and then steps that fool the detector
    (Bryniarski, Hingun, Pachuca, Wang, Carlini, "Evading Adversarial Example Detection Defenses with Orthogonal
    Projected Gradient Descent", ICLR 2022, arXiv 2106.15023; its eq. 6 prints the two projections exchanged).

    All steps are written as ascents, so that there is one sign: of the attacker's loss, and of minus the suspicion.
    The paper aims at a target class; untargeted threats raise the loss of the true class here. Steps have one size
    and start at the input. A row leaves at the first point that is misclassified by the margin *and* accepted; else
    it hands out the misclassified point of least suspicion, or the one that came nearest to being misclassified.
    """

    norms = ("linf", "l2")
    needs = "gradients"
    targeted = True
    rejection_aware = True
    needs_detector = True
    gradients: int

    class Options(api.Options):
        steps: int = Field(100, ge=1, description="gradient steps; 1,000 in the paper")
        step_share: float = Field(0.1, gt=0, description="the step size as a share of eps")
        margin: float = Field(
            0.05, ge=0, description="the lead in logits that counts as fooled; then the detector is next"
        )
        loss: Literal["ce", "margin"] = Field("ce", description="cross entropy, or the margin of the best wrong class")

    options: Options

    @property
    def passes(self) -> int:
        """A forward pass and ``gradients`` backward passes at the input and at each of the points that follow."""
        return (1 + 2 * self.gradients) * (self.options.steps + 1)

    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """See :meth:`benchbox.api.StepAttack.start`."""
        return Rows.begin(x, y, rng, point=x, loss=x.new_full((len(x),), -torch.inf))

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """Evaluate the current points and move on from them. Raises ContractError where nothing detects."""
        if not model.rejects:
            raise ContractError(f'{self.name} needs a detector: a target whose output has a "rejected" column')
        point = rows.state["point"].detach().requires_grad_()
        standing = Standing.of(model, model(point), rows.y, threat)
        loss = adversarial_loss(standing.classes, rows.y, threat, self.options.loss)
        turned = standing.lead.detach() > self.options.margin
        ascent = self.ascent(point, loss, -standing.suspicion, turned)

        evaluated = seen(rows, point, standing, self.options.steps, self.options.margin)
        moved = point.detach() + self.options.step_share * threat.eps * steepest(ascent, threat.norm)
        following = project(moved, rows.x, threat.norm, threat.eps)
        return evaluated.replace(state=evaluated.state | {"point": following})

    @abstractmethod
    def ascent(
        self, point: Tensor, loss: Float[Tensor, " n"], trust: Float[Tensor, " n"], turned: Bool[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """The direction to move in: ``loss`` and ``trust`` are to rise, the latter where the attack has ``turned`` to
        the detector; both have a graph back to ``point``."""


class SelectivePGD(DetectorPGD):
    """:class:`DetectorPGD` that follows one gradient alone at a time, the classifier's or the detector's."""

    name = "selective-pgd"
    gradients = 1

    def ascent(self, point: Tensor, loss: Tensor, trust: Tensor, turned: Tensor) -> Tensor:
        """See :meth:`DetectorPGD.ascent`."""
        (gradient,) = torch.autograd.grad(torch.where(turned, trust, loss).sum(), point)
        return gradient


class OrthogonalPGD(DetectorPGD):
    """:class:`DetectorPGD` that takes from each gradient its part along the other one, so that (to first order, and
    exactly so in L2) a step for the one leaves the other as it is. In L-infinity the sign of the rest is taken, as
    in the paper. Where the two gradients are parallel there is no rest, and the step is that of Selective PGD.
    """

    name = "orthogonal-pgd"
    gradients = 2

    def ascent(self, point: Tensor, loss: Tensor, trust: Tensor, turned: Tensor) -> Tensor:
        """See :meth:`DetectorPGD.ascent`."""
        (fooling,) = torch.autograd.grad(loss.sum(), point, retain_graph=True)
        (passing,) = torch.autograd.grad(trust.sum(), point)
        return torch.where(per_row(turned), without(passing, fooling), without(fooling, passing))


def without(vector: Float[Tensor, "n c h w"], other: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Each row's ``vector`` without its part along ``other``; the ``vector`` itself where the two are parallel."""
    unit = other / flat_norm(other)
    rest = vector - (vector * unit).sum((1, 2, 3), keepdim=True) * unit
    return torch.where(flat_norm(rest) <= PARALLEL * flat_norm(vector), vector, rest)
