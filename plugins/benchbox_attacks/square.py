"""Square Attack: random search with squares, from scores alone."""

from __future__ import annotations

import bisect
import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from benchbox import api
from benchbox.api import AttackTarget, RowRandom, Rows, StepAttack, adversarial_loss, fooled
from benchbox.domain import Norm, Threat
from benchbox_attacks.squares import Change, budget, draws, fill, move, spent, stripes, tiles

HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)  # queries, of 10,000, at which p is halved


class Square(StepAttack):
    """Changes one square at a time and keeps what raises the margin loss (Andriushchenko, Croce, Flammarion & Hein,
    ECCV 2020, "Square Attack: a query-efficient black-box adversarial attack via random search", Alg. 1 to 3).

    The point always lies on the border of the ball: in L-infinity it starts with vertical stripes and fills squares
    with +-eps, in L2 and L1 it starts with tiles and moves the budget of one square into another; L1 differs in how
    length is measured and in its more pointed bumps (Croce & Hein, ICML 2021, "Mind the box", §5). A square covers
    the share p of the image, which starts at ``p_init`` and is halved at fixed shares of the queries (§3.1).

    A row makes one query per step, leaves at the first point that fools the model, and otherwise hands out the one
    of highest margin.
    """

    name = "square"
    version = 2  # odd sides in L2, no wasted squares in L-infinity
    norms = ("linf", "l2", "l1")
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
        x = x.contiguous()
        begin = stripes(x, threat.eps, rng) if threat.norm == "linf" else tiles(x, threat.norm, threat.eps, rng)
        state = {"unused": torch.zeros(len(x), dtype=torch.float64, device=x.device)}
        return Rows.begin(x, y, rng, best=begin, loss=x.new_full((len(x),), -torch.inf), **state)

    def begin_at(self, rows: Rows, points: Float[Tensor, "n c h w"]) -> Rows:
        """See :meth:`benchbox.api.StepAttack.begin_at`: the first query is ``points``, the squares change them."""
        return rows.replace(best=points.to(rows.x))

    def step(self, model: AttackTarget, rows: Rows, threat: Threat) -> Rows:
        """One query: of the starting point first, then of a change to the best point so far."""
        point = rows.best.clone(memory_format=torch.contiguous_format)
        changes, unused = self._change(point, rows, threat)
        with torch.no_grad():
            logits = model.logits(point, rows.y, threat.targeted)
        loss, broken = adversarial_loss(logits, rows.y, threat, "margin"), fooled(logits, rows.y, threat)

        better = broken | (loss > rows.state["loss"]) | (rows.step == 0)
        for change in changes:
            change.write(point, keep=better)
        step = rows.step + 1
        return rows.replace(
            best=point,
            broken=broken,
            done=step >= self.options.queries,
            step=step,
            state={
                "loss": torch.where(better, loss, rows.state["loss"]),
                "unused": torch.where(better, unused, rows.state["unused"]),
            },
        )

    def _change(self, point: Tensor, rows: Rows, threat: Threat) -> tuple[list[Change], Tensor]:
        """Change ``point`` in place, the rows with equal sides together; what was changed, and what is then unused."""
        numbers = rows.rng.uniform((draws(threat.norm, point.shape[1]),), torch.float64)
        side_of = sides(self.options, threat.norm, *point.shape[2:])[rows.step.cpu()]
        changes, unused = [], rows.state["unused"].clone()
        for side in sorted(set(side_of.tolist())):
            chosen = (side_of == side).nonzero()[:, 0].to(point.device)
            if threat.norm == "linf":
                changes += fill(point, rows.x, chosen, side, numbers[chosen], threat.eps) if side else []
            elif side:
                moved, unused[chosen] = move(point, rows.x, chosen, side, numbers[chosen], unused[chosen], threat.norm)
                changes += moved
            else:
                offset = (point[chosen].double() - rows.x[chosen]).flatten(1)
                unused[chosen] = budget(threat.norm, threat.eps) - spent(offset, threat.norm)
        return changes, unused


@lru_cache(maxsize=16)
def sides(options: Square.Options, norm: Norm, height: int, width: int) -> Tensor:
    """Side of the square at each query, in pixels, int64 (queries,); 0 at the first, which meets the starting point.

    Where the budget of a square is moved, sides are odd, as in the authors' code: a bump needs room. They are also at
    least 3, as there, but not after the last halving: on small images single pixels finish what squares began.
    """
    steps, last = range(1, options.queries), HALVINGS[-1] * options.queries / 10_000
    lengths = [max(1, round(math.sqrt(share(step, options) * height * width))) for step in steps]
    if norm != "linf":
        lengths = [max(1 if step > last else 3, side + 1 - side % 2) for step, side in zip(steps, lengths, strict=True)]
    return torch.tensor([0] + [min(side, height, width) for side in lengths])


def share(step: int, options: Square.Options) -> float:
    """p at this query: the share of the image that a square covers."""
    halved = bisect.bisect_left(HALVINGS, step * 10_000 / options.queries)
    return float(options.p_init / 2**halved)
