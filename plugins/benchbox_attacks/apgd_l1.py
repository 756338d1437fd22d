"""How APGD steps in L1: sparse steps, as sparse as the best point suggests, through larger balls into the right one.

Croce & Hein, ICML 2021, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", §3 and §4, with
the constants of the authors' package. ``at`` (int64 (n,)) is how many points the row has evaluated before, -1 where it
only looked at its clean input.

A try passes through balls of 3 eps, 2 eps and eps, with 30, 30 and 40 % of its evaluations; in each it begins at the
best point of the one before, projected. Before the last ball nothing counts as found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchbox.api import RowRandom, Rows
from benchbox.domain import Threat
from benchbox_attacks.evaluation import Evaluation, choose
from benchbox_attacks.l1_ball import project_l1, sparse_steepest

STAGES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # radius in eps, share of the evaluations
SPACING = 0.04  # checkpoints, as a share of a stage's evaluations
DENSITY = 1.5  # the best point has this many times as many changed values as the next steps
SPARSER = 0.95  # a step size starts anew where the best point has less than this share of its former changes
SHRINK, SMALLEST = 1.5, 0.1  # else it is divided by this, down to this share of the radius


def first_point(x: Tensor, eps: float, rng: RowRandom) -> Tensor:
    """A random point of the first ball: normal numbers, projected, so that few values change."""
    return project_l1(x + rng.normal(x.shape[1:], x.dtype), x, STAGES[0][0] * eps)


def begin(point: Tensor, x: Tensor, eps: float) -> dict[str, Tensor]:
    """What rows that begin at ``point`` have to remember, besides their points and the gradient at the best one."""
    return {"size": x.new_full((len(x),), STAGES[0][0] * eps)} | sparsity(point, x)


def sparsity(point: Tensor, x: Tensor) -> dict[str, Tensor]:
    """How many values of ``point`` differ from ``x``, and how many the next steps change, int64 (n,)."""
    changed = (point != x).flatten(1).sum(1)
    return {"changed": changed, "count": (changed / DENSITY).long().clamp_min(1)}


def last_stage(at: Tensor, steps: int) -> Tensor:
    """Which evaluations are made in the ball that was asked for, bool (n,)."""
    return at >= stage_starts(steps)[-1]


def stage_starts(steps: int) -> list[int]:
    """The first evaluation, of 0 … ``steps``, of each stage; the last stage has one at least."""
    starts, share = [], 0.0
    for _, part in STAGES:
        starts.append(int(share * (steps + 1)))
        share += part
    return starts


def advance(rows: Rows, seen: Evaluation, at: Tensor, threat: Threat, steps: int) -> dict[str, Tensor]:
    """The state after the step that follows evaluation ``at``; ``rows.best`` and the loss are up to date."""
    starts = torch.tensor(stage_starts(steps), device=at.device)
    radii = torch.tensor([factor * threat.eps for factor, _ in STAGES], dtype=torch.float64, device=at.device)
    stage = _stage(starts, at)
    radius, size = radii[stage], rows.state["size"]

    count, changed = rows.state["count"], rows.state["changed"]
    spacing = (SPACING * torch.diff(starts, append=starts.new_tensor([steps + 1]))).long().clamp_min(1)
    since = at - starts[stage]
    checked = (since > 0) & (since % spacing[stage] == 0)
    now = sparsity(rows.best, rows.x)
    sparser = checked & (now["changed"] < SPARSER * changed)
    shrunk = torch.maximum(size / SHRINK, SMALLEST * radius)
    size = torch.where(sparser, radius, torch.where(checked, shrunk, size)).to(size.dtype)
    count, changed = torch.where(checked, now["count"], count), torch.where(checked, now["changed"], changed)

    origin = choose(sparser, rows.best, seen.point)
    direction = sparse_steepest(choose(sparser, rows.state["gradient"], seen.gradient), count)
    moved = torch.addcmul(origin, size[:, None, None, None], direction)

    following = _stage(starts, at + 1)
    leaps = following > stage
    point = project_l1(choose(leaps, rows.best, moved), rows.x, radii[following])
    fresh = sparsity(point, rows.x)
    return rows.state | {
        "point": point,
        "size": torch.where(leaps, radii[following].to(size.dtype), size),
        "count": torch.where(leaps, fresh["count"], count),
        "changed": torch.where(leaps, fresh["changed"], changed),
        "loss": torch.where(leaps, -torch.inf, rows.state["loss"]),
    }


def _stage(starts: Tensor, at: Tensor) -> Tensor:
    return (at[:, None] >= starts).sum(1).clamp_min(1) - 1
