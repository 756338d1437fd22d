"""Square Attack: random search with squares, from scores alone."""

from __future__ import annotations

import bisect
import math

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, RowRandom, Rows, StepAttack, adversarial_loss, fooled
from benchbox.domain import Threat
from benchbox_attacks.squares import fill, move, stripes, tiles

HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)  # queries, of 10,000, at which p is halved


class Square(StepAttack):
    """Changes one square at a time and keeps what raises the margin loss (Andriushchenko, Croce, Flammarion & Hein,
    ECCV 2020, "Square Attack: a query-efficient black-box adversarial attack via random search", Alg. 1 to 3).

    The point always lies on the border of the ball: in L-infinity it starts with vertical stripes and fills squares
    with +-eps, in L2 it starts with tiles and moves the budget of one square into another. A square covers the share
    p of the image, which starts at ``p_init`` and is halved at fixed shares of the queries (§3.1).

    A row makes one query per step, leaves at the first point that fools the model, and otherwise hands out the one
    of highest margin.
    """

    name = "square"
    norms = ("linf", "l2")
    needs = "scores"
    stochastic = True
    targeted = True
    rejection_aware = True

    class Options(api.Options):
        queries: int = Field(5000, ge=1, description="queries per example")
        p_init: float = Field(0.8, gt=0, le=1, description="share of the image that the first squares cover")

    options: Options

    @property
    def passes(self) -> int:
        """One forward pass per query."""
        return self.options.queries

    def start(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], threat: Threat, rng: RowRandom) -> Rows:
        """See :meth:`benchbox.api.StepAttack.start`."""
        begin = (stripes if threat.norm == "linf" else tiles)(x, threat.eps, rng)
        return Rows.begin(x, y, rng, best=begin, loss=x.new_full((len(x),), -torch.inf))

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """One query: of the starting point first, then of a change to the best point so far."""
        propose = fill if threat.norm == "linf" else move
        changed = propose(rows.best, rows.x, self._sides(rows), threat.eps, rows.rng)
        first = rows.step == 0
        point = torch.where(first[:, None, None, None], rows.best, changed)
        with torch.no_grad():
            logits = model.logits(point, rows.y, threat.targeted)
        loss, broken = adversarial_loss(logits, rows.y, threat, "margin"), fooled(logits, rows.y, threat)

        better = broken | first | (loss > rows.state["loss"])
        step = rows.step + 1
        return rows.replace(
            best=torch.where(better[:, None, None, None], point, rows.best),
            broken=broken,
            done=step >= self.options.queries,
            step=step,
            state={"loss": torch.where(better, loss, rows.state["loss"])},
        )

    def _sides(self, rows: Rows) -> Tensor:
        """Side of the next square of each row, in pixels, int64 (n,)."""
        height, width = rows.x.shape[2:]
        sides = [
            min(max(1, round(math.sqrt(share(step, self.options) * height * width))), height, width)
            for step in rows.step.tolist()
        ]
        return torch.tensor(sides, device=rows.x.device)


def share(step: int, options: Square.Options) -> float:
    """p at this query: the share of the image that a square covers."""
    halved = bisect.bisect_left(HALVINGS, step * 10_000 / options.queries)
    return float(options.p_init / 2**halved)
