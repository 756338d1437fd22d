"""The momentum iterative fast gradient method."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, RowRandom, Rows, StepAttack, adversarial_loss
from benchbox.domain import Threat
from benchbox_attacks.balls import project, steepest
from benchbox_attacks.evaluation import choose, evaluate
from benchbox_attacks.nearest import length, per_row


class MIFGSM(StepAttack):
    """Steps along the sign (L2: the direction) of a decaying sum of gradients, each divided by its L1 norm, from the
    input to the border of the ball (Dong et al., CVPR 2018, "Boosting adversarial attacks with momentum",
    Algorithm 1 and equation 9).

    A row leaves at the first point that fools the model, and otherwise hands out the one of highest loss.
    """

    name = "mi-fgsm"
    norms = ("linf", "l2")
    needs = "gradients"
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        steps: int = Field(10, ge=1, description="gradient steps, each of length eps / steps")
        decay: float = Field(
            1.0, ge=0, description="the share of the sum that is kept; 0 forgets all gradients at once"
        )

    options: Options

    @property
    def passes(self) -> int:
        """A forward and a backward pass at the input and at each of the points that follow."""
        return 3 * (self.options.steps + 1)

    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """See :meth:`benchbox.api.StepAttack.start`."""
        return Rows.begin(x, y, rng, point=x, momentum=torch.zeros_like(x), loss=x.new_full((len(x),), -torch.inf))

    def begin_at(self, rows: Rows, points: Float[Tensor, "n c h w"]) -> Rows:
        """See :meth:`benchbox.api.StepAttack.begin_at`."""
        return rows.replace(state=rows.state | {"point": points})

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """Evaluate the current points and move on from them."""
        seen = evaluate(model, rows, threat, partial(adversarial_loss, y=rows.y, threat=threat))
        better = seen.broken | (rows.step == 0) | (seen.loss > rows.state["loss"])
        size = per_row(length(seen.gradient, "l1").clamp_min(torch.finfo(seen.gradient.dtype).tiny))
        momentum = (self.options.decay * rows.state["momentum"]).add_(seen.gradient / size)
        direction = steepest(momentum, threat.norm)
        moved = torch.add(seen.point, direction, alpha=threat.eps / self.options.steps)
        return rows.replace(
            best=choose(better, seen.point, rows.best),
            broken=seen.broken,
            done=rows.step >= self.options.steps,
            step=rows.step + 1,
            state={
                "point": project(moved, rows.x, threat.norm, threat.eps),
                "momentum": momentum,
                "loss": torch.where(better, seen.loss, rows.state["loss"]),
            },
        )
