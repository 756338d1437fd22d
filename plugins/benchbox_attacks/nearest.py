"""The bookkeeping of minimum-norm attacks: how far a row is, and the nearest adversarial input that it has met."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchbox.domain import Norm
from benchbox_attacks.evaluation import choose


def length(change: Tensor, norm: Norm) -> Tensor:
    """The ``norm`` of each row of ``change`` (n, ...), as (n,) in its dtype."""
    if norm == "l0":
        return (change != 0).flatten(1).sum(1).to(change.dtype)
    if norm == "linf":
        return change.flatten(1).abs().amax(1)  # vector_norm and aminmax take ten times as long on a CPU
    return torch.linalg.vector_norm(change.flatten(1), ord={"l2": 2.0, "l1": 1.0}[norm], dim=1)


def per_row(values: Tensor) -> Tensor:
    """``values`` (n,) in a shape that goes with images, (n, 1, 1, 1)."""
    return values[:, None, None, None]


def annealed(first: float, last: float, share: float) -> float:
    """From ``first`` to ``last`` along half a cosine; ``share`` is how much of the way is done, 0 to 1."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


class Nearest:
    """For each row of ``x`` the nearest adversarial point shown so far, the clean input where there is none.

    ``best`` (n, c, h, w) holds the points, ``distance`` (n,) how far they are, infinite where there is none.
    """

    def __init__(self, x: Tensor, norm: Norm) -> None:
        self.x, self.norm = x, norm
        self.best = x.clone()
        self.distance = x.new_full((len(x),), torch.inf)

    @property
    def found(self) -> Tensor:
        """Which rows have an adversarial point, bool (n,)."""
        return self.distance.isfinite()

    def see(self, point: Tensor, adversarial: Tensor) -> None:
        """Keep each ``point`` that is ``adversarial`` (bool (n,), from the pass made on this very point) and nearer."""
        distance = length(point - self.x, self.norm)
        nearer = adversarial & (distance < self.distance)
        self.best = choose(nearer, point, self.best)
        self.distance = torch.where(nearer, distance, self.distance)
