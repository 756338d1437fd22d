"""FAB: the fast adaptive boundary attack."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, MinimumNormAttack, RowRandom, Rows, StepAttack, adversarial_loss, fooled
from benchbox.domain import Norm, Threat
from benchbox_attacks.balls import uniform_in_ball
from benchbox_attacks.evaluation import choose
from benchbox_attacks.fmn import DUAL
from benchbox_attacks.hyperplanes import shortest_move
from benchbox_attacks.losses import runner_up
from benchbox_attacks.nearest import length, per_row

REFINEMENTS = 3  # points of the final search
BEYOND = 0.05  # how far behind the estimated boundary these lie, as a share of what is left: seen from both sides


class FAB(MinimumNormAttack, StepAttack):
    """Steps to the decision boundary, linearised where the row stands, a little beyond it and with a bias towards the
    clean input; from an adversarial point a part of the way back is made first (Croce & Hein, ICML 2020, "Minimally
    distorted adversarial examples with a fast adaptive boundary attack", Algorithm 1).

    A row evaluates the clean input and each of the ``steps`` points that follow, then three points of the final
    search, by regula falsi between the clean input and the nearest adversarial point. Where none is known it goes on
    stepping instead. With an infinite eps the nearest adversarial point is handed out in the end; with a finite one a
    row leaves at the first one within it, and hands out the clean input where there is none.

    Tries 0, 1, 2 … step to the boundary with the most likely wrong class, the next one, and so on; those beyond the
    last class end at the clean input. Under a targeted threat there is one boundary, that of the target with the
    strongest other class, and one try. Further ``restarts`` begin at a random point.

    Two things differ, as each step is to cost one pass (the paper's makes one more). An adversarial point that is the
    nearest so far is linearised itself, in place of the one to which the row moves back; from any other the way back
    is a step of its own. And as a row does not know what other rows found, the radius of its random start goes by
    the linearised model at the clean input, not by the nearest point so far.
    """

    name = "fab"
    version = 2  # cheaper arithmetic, which rounds differently
    norms = ("linf", "l2", "l1")
    needs = "gradients"
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        steps: int = Field(100, ge=1, description="steps of each try")
        targets: int = Field(
            9, ge=0, description="how many of the likeliest wrong classes to aim at; 0: in each step the nearest of all"
        )
        restarts: int = Field(
            1, ge=1, description="tries per example, or per target class; those after the first are random"
        )
        alpha_max: float = Field(0.1, ge=0, le=1, description="the largest bias towards the clean input")
        eta: float = Field(1.05, ge=1, description="overshoot: 1 ends on the linearised boundary")
        beta: float = Field(0.9, gt=0, le=1, description="what is left of the change after the way back")

    options: Options

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.options.restarts > 1

    @property
    def restarts(self) -> int:
        return self.options.restarts * self._ranks

    @property
    def passes(self) -> int | None:
        """A forward and a backward pass at each point of each try; one per class where no class is aimed at."""
        return None if self.options.targets == 0 else 3 * self.restarts * (self._last + 1)

    @property
    def _ranks(self) -> int:
        return self.options.targets or 1

    @property
    def _last(self) -> int:
        """The step at which a row ends."""
        return self.options.steps + REFINEMENTS

    def perturb(
        self, model: AttackTarget, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom
    ) -> Float[Tensor, "n c h w"]:
        """See :meth:`benchbox.api.MinimumNormAttack.perturb`; the engine steps the rows itself instead."""
        best, loss = x, x.new_full((len(x),), -torch.inf)
        for restart in range(self.restarts):
            rows = self.start(x, y, threat, rng).replace(restart=torch.full_like(y, restart))
            while not rows.done.all():
                rows = self.step(model, rows, threat)
            better = rows.state["loss"] > loss
            best, loss = torch.where(per_row(better), rows.best, best), torch.where(better, rows.state["loss"], loss)
        return best

    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """See :meth:`benchbox.api.StepAttack.start`."""
        row = x.new_zeros(len(x))
        return Rows.begin(
            x, y, rng,
            point=x,  # to be evaluated next
            begin=x,  # where a warm row goes after it has looked at its clean input
            warm=torch.zeros_like(y, dtype=torch.bool),
            target=y,
            nearest=x,  # adversarial point
            loss=row - torch.inf,  # minus its distance
            margin=row,  # its margin
            inside=row,  # the share of the way to it at which the model is not fooled
            inside_margin=row,  # the margin there
        )  # fmt: skip

    def begin_at(self, rows: Rows, points: Float[Tensor, "n c h w"]) -> Rows:
        """See :meth:`benchbox.api.StepAttack.begin_at`."""
        return rows.replace(state=rows.state | {"begin": points, "warm": torch.ones_like(rows.state["warm"])})

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """Evaluate the current points and move on from them."""
        looking = rows.step == 0
        point = rows.state["point"].detach().requires_grad_()
        logits = model.logits(point, rows.y, threat.targeted)
        rank = rows.restart % self._ranks
        target = torch.where(looking, runner_up(logits.detach(), rows.y, rank), rows.state["target"])
        gap, slope = self._boundary(point, logits, rows.y, target, threat)
        point, logits = point.detach(), logits.detach()

        back = rows.x - point
        adversarial, distance = fooled(logits, rows.y, threat), length(back, threat.norm)
        margin = adversarial_loss(logits, rows.y, threat, "margin")
        state = self._noted(rows, point, adversarial, distance, margin) | {"target": target}
        share = (1 - self.options.beta) * adversarial.to(point.dtype)  # of the way back that is made first
        base = torch.addcmul(point, per_row(share), back) if adversarial.any() else point
        along = torch.linalg.vecdot(slope.flatten(1), back.flatten(1))
        moved, reach = self._moved(rows.x, base, slope, -gap - share * along, -gap - along, threat.norm)
        moved = choose(adversarial & (distance > -state["loss"]), base, moved)
        jumping = looking & (state["warm"] | (rows.restart >= self._ranks))
        if jumping.any():
            moved = choose(jumping, self._begin(rows, reach, threat), moved)
        refining = (rows.step >= self.options.steps) & state["loss"].isfinite()
        if refining.any():
            moved = choose(refining, rows.x + per_row(_share(state)) * (state["nearest"] - rows.x), moved)
        state["point"] = moved

        missing = looking & (rank > (0 if threat.targeted else logits.shape[1] - 2))
        done = (rows.step >= self._last) | missing
        if math.isinf(threat.eps):
            best, broken = state["nearest"], done & state["loss"].isfinite()
        else:
            broken = adversarial & (distance <= threat.eps)
            best = choose(broken, point, rows.best)
        return rows.replace(best=best, broken=broken, done=done, step=rows.step + 1, state=state)

    def _boundary(
        self, point: Tensor, logits: Tensor, y: Tensor, target: Tensor, threat: Threat
    ) -> tuple[Tensor, Tensor]:
        """By how much (n,) the class aimed at leads, and the slope (n, c, h, w) of that lead."""
        if threat.targeted:
            lead = adversarial_loss(logits, y, threat, "margin")
        elif self.options.targets:
            lead = _lead(logits, target, y)
        else:
            return _nearest_boundary(point, logits, y, threat.norm)
        (slope,) = torch.autograd.grad(lead.sum(), point)
        return lead.detach(), slope

    def _noted(
        self, rows: Rows, point: Tensor, adversarial: Tensor, distance: Tensor, margin: Tensor
    ) -> dict[str, Tensor]:
        """The state with what the evaluation of ``point`` has shown."""
        state, found = rows.state, rows.state["loss"].isfinite()
        nearer = adversarial & (distance < -state["loss"])
        refined = (rows.step > self.options.steps) & found
        share = torch.where(refined, _share(state), 1.0)
        failed = refined & ~adversarial
        return state | {
            "nearest": choose(nearer, point, state["nearest"]),
            "loss": torch.where(nearer, -distance, state["loss"]),
            "margin": torch.where(nearer, margin, state["margin"]),
            "inside": torch.where(failed, share, torch.where(nearer, state["inside"] / share, state["inside"])),
            "inside_margin": torch.where(failed | (rows.step == 0), margin, state["inside_margin"]),
        }

    def _moved(
        self, x: Tensor, base: Tensor, slope: Tensor, gain: Tensor, clean_gain: Tensor, norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """The next point (§3.2), and how far (n,) the boundary is from the clean input, were the model linear.

        The boundary is where the lead has gained ``gain`` (n,) from ``base``, ``clean_gain`` from ``x``.
        """
        move, clean = shortest_move(base, slope, gain, norm), shortest_move(x, slope, clean_gain, norm)
        here, reach = length(move, norm), length(clean, norm)
        ratio = here / (here + reach).clamp_min(torch.finfo(x.dtype).tiny)
        bias, eta = per_row(ratio.clamp_max(self.options.alpha_max)), self.options.eta
        return torch.add(base, move, alpha=eta).lerp_(torch.add(x, clean, alpha=eta), bias).clamp_(0.0, 1.0), reach

    def _begin(self, rows: Rows, reach: Tensor, threat: Threat) -> Tensor:
        """Where rows go from the clean input: to a given point, or to a random one half of the ``reach`` (n,) off."""
        offset = uniform_in_ball(rows.x, threat.norm, 1.0, rows.rng)
        radius = reach.clamp_max(threat.eps) / 2
        random = (rows.x + per_row(radius / length(offset, threat.norm)) * offset).clamp(0.0, 1.0)
        return torch.where(per_row(rows.state["warm"]), rows.state["begin"], random)


def _lead(logits: Tensor, target: Tensor, y: Tensor) -> Tensor:
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def _nearest_boundary(point: Tensor, logits: Tensor, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Lead and slope of the class whose boundary with ``y`` is the nearest, were the model linear (eq. 7)."""
    gap, slope = torch.zeros_like(logits[:, 0].detach()), torch.zeros_like(point)
    nearest = torch.full_like(gap, torch.inf)
    ranks = logits.shape[1] - 1
    for rank in range(ranks):
        lead = _lead(logits, runner_up(logits.detach(), y, torch.full_like(y, rank)), y)
        (gradient,) = torch.autograd.grad(lead.sum(), point, retain_graph=rank + 1 < ranks)
        lead = lead.detach()
        away = lead.abs() / length(gradient, DUAL[norm]).clamp_min(torch.finfo(gradient.dtype).tiny)
        nearer = away < nearest
        gap, nearest = torch.where(nearer, lead, gap), torch.where(nearer, away, nearest)
        slope = torch.where(per_row(nearer), gradient, slope)
    return gap, slope.detach()


def _share(state: dict[str, Tensor]) -> Tensor:
    """The share (n,) of the way to the nearest adversarial point at which the boundary is looked for next."""
    rise = (state["margin"] - state["inside_margin"]).clamp_min(torch.finfo(state["margin"].dtype).tiny)
    share = state["inside"] + (1 - state["inside"]) * (-state["inside_margin"] / rise).clamp(0.0, 1.0)
    return share + BEYOND * (1 - share)
