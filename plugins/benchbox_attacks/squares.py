"""Where Square Attack starts and what it tries next, in the L-infinity, the L2 and the L1 ball.

Andriushchenko et al., ECCV 2020, Alg. 2 and 3; L1 after Croce & Hein, ICML 2021. Inputs ``x`` and points are
contiguous (n, c, h, w). A proposal reads and writes nothing but the pixels of its squares, which all have one side:
``rows`` int64 (g,) says which inputs get one, ``numbers`` float64 (g, draws) holds what each drew, uniform on [0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from benchbox.api import RowRandom
from benchbox.domain import Norm

TILES = 5  # tiles along the shorter side of an image


@dataclass(frozen=True, slots=True)
class Change:
    """New values of one square of some rows: ``index`` int64 (g, c, pixels) counts the numbers of the whole batch."""

    rows: Tensor
    index: Tensor
    old: Tensor
    new: Tensor

    def write(self, point: Tensor, keep: Tensor | None = None) -> None:
        """Set the square in ``point`` to the new values, or, where ``keep``, bool (n,), is false, to the old ones."""
        values = self.new if keep is None else torch.where(keep[self.rows][:, None, None], self.new, self.old)
        point.view(-1).index_copy_(0, self.index.flatten(), values.flatten())


def draws(norm: Norm, channels: int) -> int:
    """How many numbers a row draws for a proposal: a sign for each channel, and places."""
    return channels + (2 if norm == "linf" else 5)


def stripes(x: Tensor, eps: float, rng: RowRandom) -> Tensor:
    """``x`` with vertical stripes, one pixel wide, of +eps or -eps in each channel (§3.3)."""
    return (x + eps * _signs(rng, (x.shape[1], 1, x.shape[3]), x.dtype)).clamp(0.0, 1.0)


def fill(point: Tensor, x: Tensor, rows: Tensor, side: int, numbers: Tensor, eps: float) -> list[Change]:
    """Set one square of ``point``, in place, to +eps or -eps in each channel (Alg. 2).

    A square that already has these values gets the opposite ones: the query would tell nothing.
    """
    channels = x.shape[1]
    index = _square(x, rows, side, numbers[:, channels:])
    clean, old = _read(x, index), _read(point, index)
    shift = eps * torch.where(numbers[:, :channels, None] < 0.5, 1.0, -1.0).to(x.dtype)
    new = (clean + shift).clamp(0.0, 1.0)
    same = (new == old).flatten(1).all(1)[:, None, None]
    change = Change(rows, index, old, torch.where(same, (clean - shift).clamp(0.0, 1.0), new))
    change.write(point)
    return [change]


def tiles(x: Tensor, norm: Norm, eps: float, rng: RowRandom) -> Tensor:
    """``x`` with a grid of bumps, each of a random sign in each channel, of length eps altogether (§3.4)."""
    height, width = x.shape[2:]
    side = -(-min(height, width) // TILES)
    down, across = -(-height // side), -(-width // side)
    shape = bump(side, norm).to(x.device, x.dtype).repeat(down, across)
    signs = _signs(rng, (x.shape[1], down, across), x.dtype).repeat_interleave(side, 2).repeat_interleave(side, 3)
    offset = (signs * shape)[:, :, :height, :width].flatten(1)
    offset = eps * offset / _root(spent(offset, norm), norm)[:, None].to(x.dtype)
    return (x + offset.view_as(x)).clamp(0.0, 1.0)


def move(
    point: Tensor, x: Tensor, rows: Tensor, side: int, numbers: Tensor, unused: Tensor, norm: Norm
) -> tuple[list[Change], Tensor]:
    """Clear one square of ``point``, in place, and give what it had, with all that is left of eps, to another, whose
    offset is turned towards a bump (Alg. 3).

    ``unused`` float64 (g,), the budget less what the point has spent, comes back as it is afterwards.
    """
    channels = x.shape[1]
    gaining, losing = (_square(x, rows, side, numbers[:, at : at + 2]) for at in (channels, channels + 2))
    clean, old = _read(x, gaining), _read(point, gaining)
    bare, full = _read(x, losing), _read(point, losing)
    cleared = Change(rows, losing, full, bare)
    cleared.write(point)
    left = _read(point, gaining).double() - clean  # without the pixels that are in both squares
    pooled = spent(full.double() - bare, norm) + spent(left, norm)

    shape = _bumps(side, norm, x.device)[(numbers[:, -1] < 0.5).long()][:, None]
    nudge = torch.where(numbers[:, :channels, None] < 0.5, shape, -shape)
    towards = nudge + _unit(old.double() - clean, norm)
    towards = torch.where((towards != 0).any(2, True), towards, nudge)  # a single pixel can cancel out
    share = (pooled + unused[:, None] / channels).clamp_min(0.0)
    new = (clean + _unit(towards, norm) * _root(share, norm)[..., None]).clamp(0.0, 1.0).to(x.dtype)
    gained = Change(rows, gaining, old, new)
    gained.write(point)
    return [cleared, gained], unused + (pooled - spent(new.double() - clean, norm)).sum(1)


def budget(norm: Norm, eps: float) -> float:
    """What an offset of length ``eps`` takes, in the measure of :func:`spent`."""
    return eps**2 if norm == "l2" else eps


def spent(offset: Tensor, norm: Norm) -> Tensor:
    """What ``offset`` takes of the budget along its last axis, float64: the sum of squares in L2, of sizes in L1."""
    return (offset.square() if norm == "l2" else offset.abs()).sum(-1, dtype=torch.float64)


@lru_cache(maxsize=64)
def bump(side: int, norm: Norm) -> Tensor:
    """The shape η of §3.4, float64 (side, side): a positive and a negative pyramid side by side.

    A pyramid of radius n rises by 1 / (n + 1 - k)^2 at its k-th step, in L1 by the square of that.
    """
    line = torch.arange(side)
    radius = side // 2
    centre = torch.where(line < radius, radius // 2, radius + (side - radius) // 2)
    level = radius - torch.maximum((line - radius).abs()[:, None], (line - centre).abs())
    rise = 1 / torch.arange(radius + 1, 0, -1, dtype=torch.float64) ** (2 if norm == "l2" else 4)
    return rise.cumsum(0)[level.clamp_min(0)] * torch.where(line < radius, 1, -1)


@lru_cache(maxsize=64)
def _bumps(side: int, norm: Norm, device: torch.device) -> Tensor:
    """The bump and the one that lies on its side, each of length one, float64 (2, pixels)."""
    shape = bump(side, norm)
    return _unit(torch.stack([shape, shape.T]).flatten(1), norm).to(device)


@lru_cache(maxsize=64)
def _pixels(shape: torch.Size, side: int, device: torch.device) -> Tensor:
    """Where the numbers of a square lie in an image of this shape (c, h, w), from its corner on: (c, pixels)."""
    offsets = torch.arange(math.prod(shape), device=device).reshape(shape)
    return offsets[:, :side, :side].flatten(1)


def _square(x: Tensor, rows: Tensor, side: int, place: Tensor) -> Tensor:
    """Index (g, c, pixels) of a square of this side, whose corner the first two of ``place`` pick."""
    _, channels, height, width = x.shape
    line, column = (place[:, 0] * (height - side + 1)).long(), (place[:, 1] * (width - side + 1)).long()
    corner = (rows * (channels * height) + line) * width + column
    return corner[:, None, None] + _pixels(x.shape[1:], side, x.device)


def _read(images: Tensor, index: Tensor) -> Tensor:
    return images.view(-1).index_select(0, index.flatten()).view_as(index)


def _signs(rng: RowRandom, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return 1 - 2 * rng.integers(2, shape).to(dtype)


def _root(amount: Tensor, norm: Norm) -> Tensor:
    """The length of an offset that takes this much."""
    return amount.sqrt() if norm == "l2" else amount


def _unit(offset: Tensor, norm: Norm) -> Tensor:
    """``offset`` with length one along its last axis; zero stays zero."""
    return offset / _root(spent(offset, norm), norm).clamp_min(torch.finfo(torch.float64).tiny)[..., None]
