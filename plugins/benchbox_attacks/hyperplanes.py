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
    flat, base = slope.flatten(1), points.flatten(1)
    steepest = flat.abs().amax(1, keepdim=True)
    scale = torch.where(steepest > 0, steepest, 1.0)  # squares of small slopes would vanish
    rate = flat / (scale * torch.where(gain < 0, -1.0, 1.0)[:, None])
    need, way, size = gain.abs()[:, None] / scale, rate.sign(), rate.abs()
    room = way.clamp_min(0).addcmul_(way, base, value=-1)  # 1 - base upwards, base downwards, 0 without slope
    within = _inner(size, room) > need
    if norm == "linf":
        moves = torch.minimum(_enough(_level(size, room, need), within), room)
    elif norm == "l2":
        ratio = room / size.clamp_min(torch.finfo(size.dtype).tiny)
        moves = torch.minimum(_enough(_level(size**2, ratio, need), within) * size, room)
    elif norm == "l1":
        moves = torch.where(within, _one_after_another(size, room, need), room)
    else:
        raise ContractError(f"no way to a hyperplane is defined for norm {norm!r}: use linf, l2 or l1")
    return (way * moves).reshape(points.shape)


def _level(weight: Tensor, cap: Tensor, need: Tensor) -> Tensor:
    """The level t (n, 1) at which ``weight`` * min(t, ``cap``) (n, d) add up to ``need`` (n, 1), if there is one.

    Newton's method from below: the sum is concave in t, so the levels only rise, each fills what caps below it, and
    after a few of them nothing changes any more but the last bits. Products of signs stand for masks: on a CPU
    operations on bool tensors take ten times as long.
    """
    number = torch.finfo(weight.dtype)
    level = need / _inner(weight, cap.sign()).clamp_min(number.tiny)
    while True:
        rising = _inner(weight, (cap - level).clamp_min_(0).sign_())
        missing = need - _inner(weight, torch.minimum(cap, level))
        higher = torch.where(rising > 0, level + missing / rising, level)
        if not (higher - level > 8 * number.eps * level).any():  # also where a slope is not a number
            return level
        level = higher.maximum(level)


def _enough(level: Tensor, within: Tensor) -> Tensor:
    """``level`` where it is ``within`` reach, else one above all caps."""
    return torch.where(within, level, torch.finfo(level.dtype).max)


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of each row, (n, 1)."""
    return torch.linalg.vecdot(one, other)[:, None]


def _one_after_another(size: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Moves (n, d) that use up the ``room`` of the largest ``size`` first, until they gain ``need``."""
    steep, order = size.sort(dim=1, descending=True, stable=True)
    free = room.gather(1, order)
    gains = steep * free
    missing = (need - (gains.cumsum(1) - gains)).clamp_min(0.0)
    moves = torch.where(steep > 0, torch.minimum(missing / steep, free), 0.0)
    return torch.zeros_like(moves).scatter(1, order, moves)
