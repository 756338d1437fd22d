"""Auto-PGD: projected gradient descent that chooses its own step sizes."""

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
from benchbox_attacks import apgd_l1, apgd_steps
from benchbox_attacks.balls import uniform_in_ball
from benchbox_attacks.evaluation import choose, evaluate
from benchbox_attacks.losses import dlr, runner_up, targeted_dlr
from benchbox_attacks.pgd import PGD, small_steps


class APGD(StepAttack):
    """Gradient steps with momentum whose size starts at 2 eps and is halved, for each row by itself, at checkpoints
    where the loss rose too seldom or its maximum stands still; the row then goes on from its best point (Croce &
    Hein, ICML 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", Alg. 1). In L1 the steps are sparse, and a try comes from larger balls (Croce & Hein, ICML 2021, "Mind the
    box: l1-APGD for sparse adversarial attacks on image classifiers").

    A row evaluates its random start and each of the ``steps`` points that follow: it leaves at the first one that
    fools the model, and otherwise hands out the one of highest loss. With the loss "dlr-targeted" each try first
    looks at the clean input: tries 0, 1, 2 … aim at its most likely wrong class, the next one, and so on; those beyond
    the last class end there. Under a targeted threat all tries aim at its target, by the loss "dlr".

    The losses are ratios of differences of logits. Where classes are too few (less than three for "dlr", less than
    four for "dlr-targeted") they fall back to the difference itself, the margin.
    """

    name = "apgd"
    norms = ("linf", "l2", "l1")
    needs = "gradients"
    stochastic = True
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        steps: int = Field(100, ge=1, description="gradient steps of each try")
        restarts: int = Field(1, ge=1, description="tries per example, or per target class; one success is enough")
        loss: Literal["ce", "dlr", "dlr-targeted"] = Field(
            "ce",
            description="cross entropy, or the difference of logits ratio, untargeted or at one class after another",
        )
        eot_samples: int = Field(1, ge=1, description="passes that each gradient is the mean of, for random defenses")
        targets: int = Field(
            9, ge=1, description="with dlr-targeted: how many of the likeliest wrong classes to aim at"
        )

        @model_validator(mode="after")
        def _targets_are_aimed_at(self) -> Self:
            if self.targets != 9 and self.loss != "dlr-targeted":
                raise ValueError(f'targets has no meaning for loss = "{self.loss}": set loss = "dlr-targeted"')
            return self

    options: Options

    @property
    def restarts(self) -> int:
        return self.options.restarts * (self.options.targets if self._looks else 1)

    @property
    def passes(self) -> int:
        """A forward and a backward pass at each point of each try, for each sample."""
        return 3 * self.options.eot_samples * self.restarts * (self.options.steps + 1 + self._looks)

    @property
    def min_classes(self) -> int:
        """The losses look at the third logit, the targeted one at the fourth."""
        return {"ce": 2, "dlr": 3, "dlr-targeted": 4}[self.options.loss]

    @property
    def _looks(self) -> int:
        """How many steps of a row are spent on the clean input."""
        return int(self.options.loss == "dlr-targeted")

    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """See :meth:`benchbox.api.StepAttack.start`."""
        if threat.norm == "l1":
            begin = apgd_l1.first_point(x, threat.eps, rng)
            state = apgd_l1.begin(begin, x, threat.eps)
        else:
            begin = (x + uniform_in_ball(x, threat.norm, threat.eps, rng)).clamp_(0.0, 1.0)
            state = apgd_steps.begin(x, y, threat.eps)
        return Rows.begin(
            x, y, rng,
            point=x if self._looks else begin,  # to be evaluated next
            previous=begin,  # the point before it; for a row that looks at its clean input, the one after it
            gradient=torch.zeros_like(x),  # at the best point
            loss=x.new_full((len(x),), -torch.inf),  # of the best point
            target=y,
            **state,
        )  # fmt: skip

    def begin_at(self, rows: Rows, points: Float[Tensor, "n c h w"]) -> Rows:
        """See :meth:`benchbox.api.StepAttack.begin_at`. A row that looks at its clean input does that first."""
        state = rows.state | {"previous": points} | ({} if self._looks else {"point": points})
        if "count" in state:
            state |= apgd_l1.sparsity(points, rows.x)
        return rows.replace(state=state)

    def polish(self) -> PGD:
        """See :meth:`benchbox.api.StepAttack.polish`."""
        return small_steps("ce" if self.options.loss == "ce" else "margin", self.options.eot_samples)

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """Evaluate the current points and move on from them."""
        at = rows.step - self._looks  # k of Alg. 1, -1 where the clean input is looked at
        looking = at < 0
        seen = evaluate(model, rows, threat, partial(self._loss, rows=rows, threat=threat), self.options.eot_samples)
        broken = seen.broken
        if threat.norm == "l1":
            broken = broken & (looking | apgd_l1.last_stage(at, self.options.steps))

        better = broken | (rows.state["loss"] == -torch.inf) | (seen.loss > rows.state["loss"])
        loss = torch.where(better, seen.loss, rows.state["loss"])
        state = rows.state | {
            "gradient": choose(better, seen.gradient, rows.state["gradient"]),
            "loss": torch.where(looking, -torch.inf, loss),
        }
        done = at >= self.options.steps
        if self._looks:
            done = done | (looking & self._beyond(rows, seen.logits.shape[1]))
            state["target"] = self._target(seen.logits, rows, looking)
        rows = rows.replace(best=choose(better, seen.point, rows.best), broken=broken, done=done, state=state)
        advance = apgd_l1.advance if threat.norm == "l1" else apgd_steps.advance
        state = advance(rows, seen, at, threat, self.options.steps)
        if self._looks:
            state |= {name: choose(looking, rows.state["previous"], state[name]) for name in ("point", "previous")}
        return rows.replace(step=rows.step + 1, state=state)

    def _target(self, logits: Tensor, rows: Rows, looking: Tensor) -> Tensor:
        return torch.where(looking, runner_up(logits, rows.y, self._rank(rows)), rows.state["target"])

    def _rank(self, rows: Rows) -> Tensor:
        return rows.restart % self.options.targets

    def _beyond(self, rows: Rows, classes: int) -> Tensor:
        """Whether there is no such wrong class."""
        return self._rank(rows) > classes - 2

    def _loss(self, logits: Tensor, rows: Rows, threat: Threat) -> Tensor:
        if self.options.loss == "ce":
            return adversarial_loss(logits, rows.y, threat, "ce")
        if self.options.loss == "dlr" or threat.targeted:
            return dlr(logits, rows.y, threat)
        return targeted_dlr(logits, rows.y, rows.state["target"])
