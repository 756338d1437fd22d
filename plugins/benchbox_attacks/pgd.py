"""Projected gradient descent."""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, RowRandom, Rows, StepAttack, adversarial_loss
from benchbox.domain import Threat
from benchbox_attacks.balls import project, steepest, uniform_in_ball
from benchbox_attacks.evaluation import Evaluation, choose, evaluate
from benchbox_attacks.l1_ball import linear_maximum


class PGD(StepAttack):
    """Steps along the sign (L2: the direction) of the loss gradient, each projected back into the ball and the image
    range (Madry et al., ICLR 2018, §2.1). In L1 along the signs of the largest entries alone (Tramèr & Boneh, NeurIPS
    2019, "Adversarial training and robustness for multiple perturbations", §2: SLIDE).

    A row evaluates the starting point and each of the ``steps`` points that follow: it leaves at the first one that
    fools the model, and otherwise hands out the one of highest loss.
    """

    name = "pgd"
    norms = ("linf", "l2", "l1")
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

        sparsity: float = Field(0.05, gt=0, le=1, description="in l1: the share of the values that a step changes")
        eot_samples: int = Field(1, ge=1, description="passes that each gradient is the mean of, for random defenses")

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
        """A forward and a backward pass at each point of each restart, for each sample."""
        return 3 * self.options.eot_samples * self.options.restarts * (self.options.steps + 1)

    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """See :meth:`benchbox.api.StepAttack.start`."""
        point = x
        if self.options.random_start:
            point = (x + uniform_in_ball(x, threat.norm, threat.eps, rng)).clamp(0.0, 1.0)
        return Rows.begin(x, y, rng, point=point, loss=x.new_full((len(x),), -torch.inf))

    def begin_at(self, rows: Rows, points: Float[Tensor, "n c h w"]) -> Rows:
        """See :meth:`benchbox.api.StepAttack.begin_at`."""
        return rows.replace(state=rows.state | {"point": points})

    def polish(self) -> PGD:
        """See :meth:`benchbox.api.StepAttack.polish`."""
        return small_steps(self.options.loss, self.options.eot_samples)

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """Evaluate the current points and move on from them."""
        loss = partial(adversarial_loss, y=rows.y, threat=threat, kind=self.options.loss)
        seen = evaluate(model, rows, threat, loss, self.options.eot_samples)
        better = seen.broken | (rows.step == 0) | (seen.loss > rows.state["loss"])
        return rows.replace(
            best=choose(better, seen.point, rows.best),
            broken=seen.broken,
            done=rows.step >= self.options.steps,
            step=rows.step + 1,
            state={
                "point": project(self._moved(seen, threat), rows.x, threat.norm, threat.eps),
                "loss": torch.where(better, seen.loss, rows.state["loss"]),
            },
        )

    def _moved(self, seen: Evaluation, threat: Threat) -> Tensor:
        """The points one step on, not yet projected. In L1 a value that is at its bound leaves its share to the next:
        else steps would be spent on values that cannot move."""
        size = self._step_size(threat.eps)
        if threat.norm != "l1":
            return torch.add(seen.point, steepest(seen.gradient, threat.norm), alpha=size)
        count = max(1, round(self.options.sparsity * seen.point[0].numel()))
        return linear_maximum(seen.gradient, seen.point, size, most=size / count)

    def _step_size(self, eps: float) -> float:
        options = self.options
        return options.step_size or options.relative_step * eps / options.steps


def small_steps(loss: Literal["ce", "margin"], eot_samples: int) -> PGD:
    """A short search around the points that it begins at: ten steps of a twentieth of the budget."""
    return PGD(PGD.Options(steps=10, relative_step=0.5, random_start=False, loss=loss, eot_samples=eot_samples))
