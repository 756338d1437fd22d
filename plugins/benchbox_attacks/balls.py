"""Geometry of the norm balls that attacks move in; tensors (n, c, h, w), one ball per row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchbox.api import ContractError, RowRandom
from benchbox.domain import Norm
from benchbox_attacks.l1_ball import project_l1, sparse_steepest


def flat_norm(delta: Tensor) -> Tensor:
    """Euclidean norm of each row, (n, 1, 1, 1), at least the smallest normal number; tiny entries do not underflow."""
    tiny = torch.finfo(delta.dtype).tiny
    largest = delta.abs().flatten(1).amax(1).clamp_min(tiny)[:, None, None, None]
    return (torch.linalg.vector_norm(delta / largest, dim=(1, 2, 3), keepdim=True) * largest).clamp_min(tiny)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The unit step that raises a linear function with this ``gradient`` most; zero where the gradient is zero."""
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        return gradient / flat_norm(gradient)
    if norm == "l1":
        return sparse_steepest(gradient, torch.ones(len(gradient), dtype=torch.int64, device=gradient.device))
    raise ContractError(f"no steepest step is defined for norm {norm!r}: use linf, l2 or l1")


def project(moved: Tensor, x: Tensor, norm: Norm, eps: float) -> Tensor:
    """``moved`` brought into the ball around ``x`` and then into [0, 1]; the second never leaves the ball.

    In L1 it is the nearest point of both, which it is not in L2.
    """
    if norm == "l1":
        return project_l1(moved, x, eps)
    delta = moved - x  # the rest works in this one piece of memory: getting more of it costs as much as the arithmetic
    if norm == "linf":
        delta.clamp_(-eps, eps)
    elif norm == "l2":
        delta.mul_((eps / flat_norm(delta)).clamp_max_(1.0))
    else:
        raise ContractError(f"no projection is defined for norm {norm!r}: use linf, l2 or l1")
    return delta.add_(x).clamp_(0.0, 1.0)


def uniform_in_ball(x: Tensor, norm: Norm, eps: float, rng: RowRandom) -> Tensor:
    """Offsets uniform in the ball of radius ``eps``, in the shape and dtype of ``x``.

    L1 by normalised exponentials with one coordinate more than asked, L2 by a normal direction and a radius of
    u^(1/d) (Barthe, Guédon, Mendelson, Naor 2005, "A probabilistic approach to the geometry of the l_p^n-ball").
    """
    shape, size = x.shape[1:], math.prod(x.shape[1:])
    if norm == "linf":
        return (2 * rng.uniform(shape, x.dtype) - 1) * eps
    if norm == "l2":
        direction = rng.normal(shape, x.dtype)
        radius = eps * rng.uniform((1, 1, 1), x.dtype) ** (1 / size)
        return direction / flat_norm(direction) * radius
    if norm == "l1":
        spacings = -torch.log1p(-rng.uniform((size + 1,), torch.float64))
        shares = (spacings[:, :size] / spacings.sum(1, keepdim=True)).reshape(x.shape).to(x.dtype)
        signs = 1 - 2 * rng.integers(2, shape).to(x.dtype)
        return eps * shares * signs
    raise ContractError(f"no uniform distribution is defined for norm {norm!r}: use linf, l2 or l1")
