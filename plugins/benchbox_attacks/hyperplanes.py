"""The shortest way to a hyperplane inside the image range; tensors (n, c, h, w), one hyperplane per row.

Croce & Hein, ICML 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack", §3.1 and
appendix: by the optimality conditions every value moves equally far in L-infinity and in proportion to its slope in
L2, until it meets its bound; in L1 the steepest values move to theirs, one after another.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from benchbox.api import ContractError
from benchbox.domain import Norm


def shortest_move(
    points: Float[Tensor, "n c h w"], slope: Float[Tensor, "n c h w"], gain: Float[Tensor, " n"], norm: Norm
) -> Float[Tensor, "n c h w"]:
    """The move of least ``norm`` along which a linear function with this ``slope`` gains ``gain``, of any sign, and
    which leaves ``points`` in [0, 1].

    Where the image range does not let it gain so much, the move that gains most; values without slope stay where they
    are. Computed in the dtype of ``points``. Raises ContractError for other norms than linf, l2 and l1.
    """
    steepest = slope.flatten(1).abs().amax(1, keepdim=True)
    scale = torch.where(steepest > 0, steepest, 1.0)  # squares of small slopes would vanish
    rate = slope.flatten(1) / scale * torch.where(gain < 0, -1.0, 1.0)[:, None].to(slope.dtype)
    need = gain.abs()[:, None] / scale
    base = points.flatten(1)
    room = torch.where(rate > 0, 1 - base, base) * (rate != 0)
    size = rate.abs()
    if norm == "linf":
        moves = torch.minimum(_level(size, room, need), room)
    elif norm == "l2":
        ratio = torch.where(size > 0, room / size, 0.0)
        moves = torch.minimum(torch.minimum(_level(size**2, ratio, need), ratio) * size, room)
    elif norm == "l1":
        moves = _one_after_another(size, room, need)
    else:
        raise ContractError(f"no way to a hyperplane is defined for norm {norm!r}: use linf, l2 or l1")
    within = (size * room).sum(1, keepdim=True) > need
    return (rate.sign() * torch.where(within, moves, room)).reshape(points.shape)


def _level(weight: Tensor, cap: Tensor, need: Tensor) -> Tensor:
    """The level t (n, 1) at which ``weight`` * min(t, ``cap``) (n, d) add up to ``need`` (n, 1), if there is one.

    Newton's method from below: the sum is concave in t, so the levels only rise, each fills what caps below it, and
    after a few of them nothing changes any more. A row that is done stays as it is while others go on.
    """
    filling = weight * cap
    level = need / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    while True:
        full = cap < level
        filled = torch.where(full, filling, 0.0).sum(1, keepdim=True)
        rising = torch.where(full, 0.0, weight).sum(1, keepdim=True)
        higher = torch.where(rising > 0, (need - filled) / rising, level).maximum(level)
        if not (higher > level).any():  # also where a slope is not a number
            return level
        level = higher


def _one_after_another(size: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Moves (n, d) that use up the ``room`` of the largest ``size`` first, until they gain ``need``."""
    steep, order = size.sort(dim=1, descending=True, stable=True)
    free = room.gather(1, order)
    gains = steep * free
    missing = (need - (gains.cumsum(1) - gains)).clamp_min(0.0)
    moves = torch.where(steep > 0, torch.minimum(missing / steep, free), 0.0)
    return torch.zeros_like(moves).scatter(1, order, moves)
