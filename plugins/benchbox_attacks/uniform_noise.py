"""Uniform noise: the control that should find next to nothing."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, RowRandom, Rows, StepAttack, fooled
from benchbox.domain import Threat
from benchbox_attacks.balls import uniform_in_ball


class UniformNoise(StepAttack):
    """Draws points uniformly from the ball and stops at the first that fools the model.

    A model that it breaks is not robust to anything, and an attack that finds no more than it has failed.
    """

    name = "uniform-noise"
    norms = ("linf", "l2", "l1")
    needs = "decisions"
    stochastic = True
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        draws: int = Field(10, ge=1, description="points per example")

    options: Options

    @property
    def passes(self) -> int:
        """One forward pass per draw."""
        return self.options.draws

    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """See :meth:`benchbox.api.StepAttack.start`."""
        return Rows.begin(x, y, rng)

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """One draw."""
        noise = uniform_in_ball(rows.x, threat.norm, threat.eps, rows.rng)
        point = (rows.x + noise).clamp(0.0, 1.0)
        with torch.no_grad():
            broken = fooled(model.logits(point, rows.y, threat.targeted), rows.y, threat)
        step = rows.step + 1
        return rows.replace(best=point, broken=broken, done=step >= self.options.draws, step=step)
