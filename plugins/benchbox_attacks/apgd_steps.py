"""How APGD steps in L-infinity and L2: momentum, and step sizes that are halved at checkpoints.

Croce & Hein, ICML 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", Alg. 1. ``at`` (int64 (n,)) is k there: how many points the row has evaluated before, -1 where it only looked
at its clean input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchbox.api import Rows
from benchbox.domain import Threat
from benchbox_attacks.balls import project, steepest
from benchbox_attacks.evaluation import Evaluation, choose

MOMENTUM = 0.75  # α of eq. 2: the share of the new direction; the rest is the last move
RISES = 0.75  # ρ of condition 1: the share of steps that must raise the loss


def begin(x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    """What rows have to remember from step to step, besides their points and the gradient at the best one."""
    row = x.new_zeros(len(x))
    return {
        "last": row + torch.inf,  # loss of the point before: the first one is no rise
        "size": row + 2 * eps,
        "rises": torch.zeros_like(y),  # since the last checkpoint
        "halved": torch.ones_like(y, dtype=torch.bool),  # at the last checkpoint
        "marked": row - torch.inf,  # loss of the best point at the last checkpoint
    }


def advance(rows: Rows, seen: Evaluation, at: Tensor, threat: Threat, steps: int) -> dict[str, Tensor]:
    """The state after the step that follows evaluation ``at``; ``rows.best`` and the loss are up to date."""
    looking = at < 0
    rises = rows.state["rises"] + (seen.loss > rows.state["last"])
    state = rows.state | {"rises": rises, "last": torch.where(looking, torch.inf, seen.loss)}
    halve, state = _checkpoint(state, at, steps)
    origin = choose(halve, rows.best, seen.point)
    direction = steepest(choose(halve, state["gradient"], seen.gradient), threat.norm)
    moved = _move(rows, state["size"], origin, direction, at, threat)
    return state | {"point": moved, "previous": origin}


def _checkpoint(state: dict[str, Tensor], at: Tensor, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Which rows halve their step size after evaluation ``at``, and the state with the checkpoints' books."""
    spans = torch.tensor(checkpoint_spans(steps), device=at.device)[at.clamp_min(0)]
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
    stepped = project(torch.addcmul(origin, size[:, None, None, None], direction), rows.x, threat.norm, threat.eps)
    straight = (2 * origin).sub_(rows.state["previous"])  # the last move once more
    moved = choose(at > 0, straight.lerp_(stepped, MOMENTUM), stepped)
    return project(moved, rows.x, threat.norm, threat.eps)
