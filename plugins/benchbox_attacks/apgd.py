"""Auto-PGD: projected gradient descent that chooses its own step sizes."""

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
from benchbox_attacks.losses import dlr, runner_up, targeted_dlr

MOMENTUM = 0.75  # α of eq. 2: the share of the new direction; the rest is the last move
RISES = 0.75  # ρ of condition 1: the share of steps that must raise the loss


class APGD(StepAttack):
    """Gradient steps with momentum whose size starts at 2 eps and is halved, for each row by itself, at checkpoints
    where the loss rose too seldom or its maximum stands still; the row then goes on from its best point (Croce &
    Hein, ICML 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", Alg. 1).

    A row evaluates its random start and each of the ``steps`` points that follow: it leaves at the first one that
    fools the model, and otherwise hands out the one of highest loss. With the loss "dlr-targeted" each try first
    looks at the clean input: tries 0, 1, 2 … aim at its most likely wrong class, the next one, and so on; those beyond
    the last class end there. Under a targeted threat all tries aim at its target, by the loss "dlr".

    The losses are ratios of differences of logits. Where classes are too few (less than three for "dlr", less than
    four for "dlr-targeted") they fall back to the difference itself, the margin.
    """

    name = "apgd"
    norms = ("linf", "l2")
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
        """A forward and a backward pass at each point of each try."""
        return 3 * self.restarts * (self.options.steps + 1 + self._looks)

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
        begin = (x + uniform_in_ball(x, threat.norm, threat.eps, rng)).clamp(0.0, 1.0)
        row = x.new_zeros(len(x))
        return Rows.begin(
            x, y, rng,
            point=x if self._looks else begin,  # to be evaluated next
            previous=begin,  # the point before it; for a row that looks at its clean input, the one after it
            gradient=torch.zeros_like(x),  # at the best point
            loss=row - torch.inf,  # of the best point
            last=row + torch.inf,  # loss of the point before: the first one is no rise
            size=row + 2 * threat.eps,
            rises=torch.zeros_like(y),  # since the last checkpoint
            halved=torch.ones_like(y, dtype=torch.bool),  # at the last checkpoint
            marked=row - torch.inf,  # loss of the best point at the last checkpoint
            target=y,
        )  # fmt: skip

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """Evaluate the current points and move on from them."""
        at = rows.step - self._looks  # k of Alg. 1, -1 where the clean input is looked at
        looking = at < 0
        point = rows.state["point"].detach().requires_grad_()
        logits = model.logits(point, rows.y, threat.targeted)
        target = self._target(logits.detach(), rows, looking)
        losses = self._loss(logits, rows.y, target, threat)
        (gradient,) = torch.autograd.grad(losses.sum(), point)
        point, loss, broken = point.detach(), losses.detach(), fooled(logits.detach(), rows.y, threat)

        better = broken | (at <= 0) | (loss > rows.state["loss"])
        best = _where(better, point, rows.best)
        state = rows.state | {
            "target": target,
            "gradient": _where(better, gradient, rows.state["gradient"]),
            "loss": torch.where(looking, -torch.inf, torch.where(better, loss, rows.state["loss"])),
            "last": torch.where(looking, torch.inf, loss),
            "rises": rows.state["rises"] + (loss > rows.state["last"]),
        }
        halve, state = self._checkpoint(state, at)
        origin = _where(halve, best, point)
        direction = steepest(_where(halve, state["gradient"], gradient), threat.norm)
        moved = _move(rows, state["size"], origin, direction, at, threat)
        state["point"] = _where(looking, rows.state["previous"], moved)
        state["previous"] = _where(looking, rows.state["previous"], origin)
        done = (at >= self.options.steps) | (looking & self._beyond(rows, logits.shape[1]))
        return rows.replace(best=best, broken=broken, done=done, step=rows.step + 1, state=state)

    def _target(self, logits: Tensor, rows: Rows, looking: Tensor) -> Tensor:
        if not self._looks:
            return rows.state["target"]
        return torch.where(looking, runner_up(logits, rows.y, self._rank(rows)), rows.state["target"])

    def _rank(self, rows: Rows) -> Tensor:
        return rows.restart % self.options.targets

    def _beyond(self, rows: Rows, classes: int) -> Tensor:
        """Whether there is no such wrong class."""
        return self._rank(rows) > classes - 2

    def _loss(self, logits: Tensor, y: Tensor, target: Tensor, threat: Threat) -> Tensor:
        if self.options.loss == "ce":
            return adversarial_loss(logits, y, threat, "ce")
        if self.options.loss == "dlr" or threat.targeted:
            return dlr(logits, y, threat)
        return targeted_dlr(logits, y, target)

    def _checkpoint(self, state: dict[str, Tensor], at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Which rows halve their step size after evaluation ``at``, and the state with the checkpoints' books."""
        spans = torch.tensor(checkpoint_spans(self.options.steps), device=at.device)[at.clamp_min(0)]
        checked = (at >= 0) & (spans >= 0)
        seldom = state["rises"] < RISES * spans
        stuck = ~state["halved"] & (state["loss"] == state["marked"])
        halve = checked & (seldom | stuck)
        return halve, state | {
            "size": torch.where(halve, state["size"] / 2, state["size"]),
            "rises": torch.where(checked, 0, state["rises"]),
            "halved": torch.where(checked, halve, state["halved"]),
            "marked": torch.where(checked, state["loss"], state["marked"]),
        }


def checkpoint_spans(steps: int) -> list[int]:
    """For each evaluation 0 … ``steps``: if it is a checkpoint, the steps since the one before, else -1.

    Checkpoints are at ceil(p_j * steps) with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)
    (§3.2), reckoned in whole hundredths.
    """
    spans = [0] + [-1] * steps
    hundredths, stride, last = 22, 22, 0
    while hundredths <= 100:
        mark = -(-hundredths * steps // 100)
        if mark > last:
            spans[mark], last = mark - last, mark
        stride = max(stride - 3, 6)
        hundredths += stride
    return spans


def _move(rows: Rows, size: Tensor, origin: Tensor, direction: Tensor, at: Tensor, threat: Threat) -> Tensor:
    """Eq. 2: a projected step, of which the momentum keeps a part; the first step has nothing to remember."""
    stepped = project(origin + size[:, None, None, None] * direction, rows.x, threat.norm, threat.eps)
    share = torch.where(at > 0, MOMENTUM, 1.0).to(origin.dtype)[:, None, None, None]
    remembered = (1 - share) * (origin - rows.state["previous"])
    return project(origin + share * (stepped - origin) + remembered, rows.x, threat.norm, threat.eps)


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Images of ``one`` where the row's ``condition`` holds, else of ``other``."""
    return torch.where(condition[:, None, None, None], one, other)
