"""Where Square Attack starts and what it tries next, in the L-infinity and the L2 ball.

Andriushchenko et al., ECCV 2020, Alg. 2 and 3. Points and inputs (n, c, h, w), sides of squares int64 (n,); each row
draws from its own stream, and always equally many numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchbox.api import RowRandom
from benchbox_attacks.balls import project

TILES = 5  # tiles along the shorter side of an image


def stripes(x: Tensor, eps: float, rng: RowRandom) -> Tensor:
    """``x`` with vertical stripes, one pixel wide, of +eps or -eps in each channel (§3.3)."""
    return project(x + eps * _signs(rng, (x.shape[1], 1, x.shape[3]), x.dtype), x, "linf", eps)


def fill(point: Tensor, x: Tensor, side: Tensor, eps: float, rng: RowRandom) -> Tensor:
    """``point`` with one square set to +eps or -eps in each channel (Alg. 2)."""
    u, v = _square(x, side, rng)
    signs = _signs(rng, (x.shape[1], 1, 1), x.dtype)
    return torch.where(_inside(u, v, side)[:, None], project(x + eps * signs, x, "linf", eps), point)


def tiles(x: Tensor, eps: float, rng: RowRandom) -> Tensor:
    """``x`` with a grid of bumps, each of a random sign in each channel, of length eps altogether (§3.4)."""
    height, width = x.shape[2:]
    side = -(-min(height, width) // TILES)
    u, v = (along[None].expand(len(x), -1, -1) for along in _grid(x))
    shape = bump(u % side, v % side, torch.full((len(x),), side, device=x.device), x.dtype)
    signs = _signs(rng, (x.shape[1], -(-height // side), -(-width // side)), x.dtype)
    signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
    offset = signs * shape[:, None]
    return project(x + eps * offset / _length(offset, (1, 2, 3)), x, "l2", eps)


def move(point: Tensor, x: Tensor, side: Tensor, eps: float, rng: RowRandom) -> Tensor:
    """``point`` with the offset of one square set to zero and its length, with all that is left of eps, given to
    another square, whose offset is turned towards a bump (Alg. 3)."""
    offset = point - x
    u, v = _square(x, side, rng)
    gaining, losing = _inside(u, v, side)[:, None], _inside(*_square(x, side, rng), side)[:, None]
    turned = (rng.uniform((1, 1)) < 0.5).expand_as(u)
    shape = (bump(torch.where(turned, v, u), torch.where(turned, u, v), side, x.dtype))[:, None] * gaining
    signs = _signs(rng, (x.shape[1], 1, 1), x.dtype)

    unused = (eps**2 - (offset**2).sum((1, 2, 3), keepdim=True)).clamp_min(0.0)
    here = offset * gaining
    nudge = signs * shape / _length(shape, (1, 2, 3))
    towards = nudge + here / _length(here, (2, 3))
    towards = torch.where((towards != 0).any(-1, True).any(-2, True), towards, nudge)  # a single pixel can cancel out
    pooled = ((offset * (gaining | losing)) ** 2).sum((2, 3), keepdim=True) + unused / x.shape[1]
    given = towards / _length(towards, (2, 3)) * pooled.sqrt()
    return project(x + torch.where(gaining, given, offset * ~losing), x, "l2", eps)


def bump(u: Tensor, v: Tensor, side: Tensor, dtype: torch.dtype) -> Tensor:
    """The shape η of §3.4 at row ``u`` and column ``v`` (int64 (n, h, w)) of squares of these sides: a positive and a
    negative pyramid side by side; anything outside of 0 … side - 1."""
    side = side[:, None, None]
    radius, left = side // 2, side // 2
    centre = torch.where(v < left, left // 2, left + (side - left) // 2)
    level = radius - torch.maximum((u - radius).abs(), (v - centre).abs())
    heights = _heights(int(radius.max()), u.device).to(dtype)
    return heights[radius.expand_as(level), level.clamp(torch.zeros_like(radius), radius)] * torch.where(
        v < left, 1, -1
    )


def _heights(largest: int, device: torch.device) -> Tensor:
    """At [n, m] the sum over k = 0 … m of 1 / (n + 1 - k)^2, for n and m up to ``largest``; m beyond n is no level."""
    n = torch.arange(largest + 1, device=device, dtype=torch.float64)
    return (1 / (n[:, None] + 1 - n).clamp_min(1.0) ** 2).cumsum(1)


def _grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each pixel, int64 (h, w)."""
    rows, columns = (torch.arange(length, device=x.device) for length in x.shape[2:])
    return rows[:, None].expand(x.shape[2:]), columns.expand(x.shape[2:])


def _square(x: Tensor, side: Tensor, rng: RowRandom) -> tuple[Tensor, Tensor]:
    """Row and column of each pixel, int64 (n, h, w), counted from the corner of a random square within the image."""
    room = torch.tensor(x.shape[2:], device=x.device) - side[:, None] + 1
    corner = (rng.uniform((2,), torch.float64) * room).long()
    u, v = _grid(x)
    return u - corner[:, 0, None, None], v - corner[:, 1, None, None]


def _inside(u: Tensor, v: Tensor, side: Tensor) -> Tensor:
    side = side[:, None, None]
    return (u >= 0) & (u < side) & (v >= 0) & (v < side)


def _signs(rng: RowRandom, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return 1 - 2 * rng.integers(2, shape).to(dtype)


def _length(offset: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Euclidean length along ``axes``, never zero."""
    return torch.linalg.vector_norm(offset, dim=axes, keepdim=True).clamp_min(torch.finfo(offset.dtype).tiny)
