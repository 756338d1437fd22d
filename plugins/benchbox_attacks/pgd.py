"""Projected gradient descent."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, RowRandom, Rows, StepAttack, adversarial_loss, fooled
from benchbox.domain import Threat
from benchbox_attacks.balls import project, steepest, uniform_in_ball


class PGD(StepAttack):
    """Steps along the sign (L2: the direction) of the loss gradient, each projected back into the ball and the image
    range (Madry et al., ICLR 2018, §2.1).

    A row evaluates the starting point and each of the ``steps`` points that follow: it leaves at the first one that
    fools the model, and otherwise hands out the one of highest loss.
    """

    name = "pgd"
    norms = ("linf", "l2")
    needs = "gradients"
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        steps: int = Field(40, ge=1, description="gradient steps of each restart")
        step_size: float | None = Field(None, gt=0, description="in pixel units; overrides relative_step")
        relative_step: float = Field(2.5, gt=0, description="the step size is relative_step * eps / steps")
        restarts: int = Field(1, ge=1, description="tries per example; one success is enough")
        random_start: bool = Field(True, description="start at a random point of the ball instead of the input")
        loss: Literal["ce", "margin"] = Field("ce", description="cross entropy, or the margin of the best wrong class")

        @model_validator(mode="after")
        def _restarts_differ(self) -> Self:
            if self.restarts > 1 and not self.random_start:
                raise ValueError("restarts without a random start are all the same: set random_start or restarts = 1")
            return self

    options: Options

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.options.random_start

    @property
    def restarts(self) -> int:
        return self.options.restarts

    @property
    def passes(self) -> int:
        """A forward and a backward pass at each point of each restart."""
        return 3 * self.options.restarts * (self.options.steps + 1)

    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """See :meth:`benchbox.api.StepAttack.start`."""
        point = x
        if self.options.random_start:
            point = (x + uniform_in_ball(x, threat.norm, threat.eps, rng)).clamp(0.0, 1.0)
        return Rows.begin(x, y, rng, point=point, loss=x.new_full((len(x),), -torch.inf))

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """Evaluate the current points and move on from them."""
        point = rows.state["point"].detach().requires_grad_()
        logits = model.logits(point, rows.y, threat.targeted)
        loss = adversarial_loss(logits, rows.y, threat, self.options.loss)
        (gradient,) = torch.autograd.grad(loss.sum(), point)
        point, loss, broken = point.detach(), loss.detach(), fooled(logits.detach(), rows.y, threat)

        better = broken | (rows.step == 0) | (loss > rows.state["loss"])
        moved = point + self._step_size(threat.eps) * steepest(gradient, threat.norm)
        return rows.replace(
            best=torch.where(better[:, None, None, None], point, rows.best),
            broken=broken,
            done=rows.step >= self.options.steps,
            step=rows.step + 1,
            state={
                "point": project(moved, rows.x, threat.norm, threat.eps),
                "loss": torch.where(better, loss, rows.state["loss"]),
            },
        )

    def _step_size(self, eps: float) -> float:
        options = self.options
        return options.step_size or options.relative_step * eps / options.steps
