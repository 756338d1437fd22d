"""Geometry of the L1 ball within the image range; tensors (n, c, h, w), one ball per row.

Croce & Hein, ICML 2021, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", §2 and §3. Unlike
in L-infinity and L2, the nearest point of ball and range together is not found by way of the nearest point of the
ball, and the best step within both is far less sparse than the best step within the ball alone.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def project_l1(
    moved: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"], eps: float | Float[Tensor, " n"]
) -> Float[Tensor, "n c h w"]:
    """The nearest point to ``moved`` within ``eps`` (of all rows, or of each) of ``x`` and in [0, 1] (§2), reckoned
    in float64.

    Each value keeps its direction and moves by clamp(|wish| - λ, 0, room), with the smallest λ >= 0 for which that
    adds up to no more than ``eps``. The sum falls with λ along straight lines whose corners are |wish| and
    |wish| - room, so that λ follows from the sorted corners.
    """
    base = x.double().flatten(1)
    wish = moved.double().flatten(1) - base
    room = torch.where(wish > 0, 1 - base, base)
    size = wish.abs()
    reach = torch.minimum(size, room)
    limit = torch.as_tensor(eps, dtype=base.dtype, device=base.device).expand(len(base))
    outside = (reach.sum(1) > limit).nonzero()[:, 0]
    if len(outside):
        size, room = size[outside], room[outside]
        move = (size - _shrinkage(size, room, limit[outside, None])).clamp_min_(0.0)
        reach[outside] = torch.minimum(move, room, out=move)
    return (base + reach.copysign_(wish)).to(x.dtype).view_as(x)


def _shrinkage(size: Tensor, room: Tensor, limit: Tensor) -> Tensor:
    """λ of rows (m, d) whose moves add up to more than their ``limit`` (m, 1), as (m, 1)."""
    corners, order = torch.cat([size, (size - room).clamp_min_(0.0)], 1).sort(1, descending=True)
    moving = torch.where(order < size.shape[1], 1.0, -1.0).to(size.dtype).cumsum(1)  # values between two corners
    total = ((corners[:, :-1] - corners[:, 1:]) * moving[:, :-1]).cumsum(1)  # what they move by at the lower corner
    first = (total <= limit).sum(1, keepdim=True).clamp_max(total.shape[1] - 1)  # the first one beyond the limit
    above = (total.gather(1, first) - limit) / moving.gather(1, first).clamp_min(1.0)
    return corners.gather(1, first + 1) + above


def sparse_steepest(gradient: Float[Tensor, "n c h w"], count: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Steps of L1 norm 1 along the signs of each row's ``count`` (at least 1) largest entries; values as large as the
    smallest of them move, too, and rows without a gradient not at all (§3)."""
    size = gradient.abs().flatten(1)
    largest = size.topk(int(count.max()), dim=1).values if len(size) else size
    least = largest.gather(1, count[:, None] - 1)
    steps = (gradient.sign().flatten(1) * (size >= least)).view_as(gradient)
    return steps / steps.abs().sum((1, 2, 3), keepdim=True).clamp_min(1.0)


def linear_maximum(
    gradient: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"], eps: float, most: float = math.inf
) -> Float[Tensor, "n c h w"]:
    """The point within ``eps`` of ``x`` and in [0, 1], no value by more than ``most`` off, where a linear function with
    this ``gradient`` is largest: the values of the largest slope move to their bounds, one after another, until
    ``eps`` is spent (§3)."""
    base, slope = x.double().flatten(1), gradient.flatten(1)
    room = torch.where(slope > 0, 1 - base, base).clamp_max_(most) * (slope != 0)
    order = slope.abs().argsort(dim=1, descending=True, stable=True)
    ordered = room.gather(1, order)
    left = (eps - (ordered.cumsum(1) - ordered)).clamp_min_(0.0)
    moves = torch.zeros_like(room).scatter_(1, order, torch.minimum(ordered, left))
    return (base + moves * slope.sign()).to(x.dtype).view_as(x)
