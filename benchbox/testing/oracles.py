"""Models whose nearest adversarial inputs are known exactly, in every norm and with the image range respected.

An attack's own test takes ten lines::

    model = LinearModel.random(classes=3, shape=(1, 4, 4), seed=0)
    x = torch.full((1, 1, 4, 4), 0.5)
    y = model(x).argmax(1)
    exact = model.distance(x, y, "linf")
    # the attack must fail with a budget of 0.99 * exact and should succeed with 1.01 * exact
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchbox.domain import Norm


class LinearModel(nn.Module):
    """Logits ``weight @ flatten(x) + bias``: the boundary between two classes is a hyperplane."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Float[Tensor, "k d"], bias: Float[Tensor, " k"] | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.zeros(len(weight)) if bias is None else bias)

    @classmethod
    def random(cls, classes: int, shape: tuple[int, int, int], seed: int) -> LinearModel:
        """Normal weights and biases that leave no class ahead on a grey image."""
        rng = torch.Generator().manual_seed(seed)
        weight = torch.randn(classes, math.prod(shape), generator=rng)
        return cls(weight, -weight.sum(1) / 2 + 0.1 * torch.randn(classes, generator=rng))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return x.flatten(1) @ self.weight.T + self.bias

    def distance(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], norm: Norm) -> Float[Tensor, " n"]:
        """Exact distance, float64, to the nearest input in [0, 1] that is not classified ``y``.

        0 where ``x`` already is not, infinite where no such input exists; a point on the boundary counts as reached.
        With two classes it is also the distance of an attack targeted at the other one.
        """
        changes = (self.nearest(x, y, norm) - x.double()).flatten(1)
        return _length(changes, norm).nan_to_num(nan=math.inf)

    def nearest(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], norm: Norm) -> Float[Tensor, "n c h w"]:
        """The nearest such input, float64, on the boundary to another class; NaN where there is none."""
        points, weight = x.double().flatten(1), self.weight.double()
        logits = points @ weight.T + self.bias.double()
        lead = logits.gather(1, y[:, None]) - logits  # (n, k): what each class must gain on y
        slope = weight[None] - weight[y][:, None]  # (n, k, d): what it gains per unit of each value
        room = torch.where(slope > 0, 1 - points[:, None], points[:, None])
        moves = _smallest_moves(slope.abs(), room, lead, norm)
        sizes = _length(moves, norm).nan_to_num(nan=math.inf).scatter(1, y[:, None], math.inf)
        row, chosen = torch.arange(len(x)), sizes.argmin(1)
        nearest = points + moves[row, chosen] * slope[row, chosen].sign()
        nearest[sizes[row, chosen].isinf()] = math.nan
        return nearest.reshape(x.shape)


def _length(change: Tensor, norm: Norm) -> Tensor:
    """The ``norm`` over the last axis; NaN where the change is."""
    if norm == "l0":
        return torch.where(change.isnan().any(-1), math.nan, (change != 0).sum(-1).double())
    return torch.linalg.vector_norm(change, ord={"linf": math.inf, "l2": 2.0, "l1": 1.0}[norm], dim=-1)


def _smallest_moves(slope: Tensor, room: Tensor, need: Tensor, norm: Norm) -> Tensor:
    """Moves m, 0 <= m <= ``room``, of least norm with sum(slope * m) = ``need``; NaN where there are none.

    By the optimality conditions every value moves equally far in L-infinity and in proportion to its slope in L2,
    until it meets its bound; in L1 the steepest values, in L0 those with the most to gain, move to their bounds.
    """
    need = need.clamp_min(0.0)[..., None]
    if norm == "linf":
        moves = torch.minimum(_level(slope, room, need), room) * (slope > 0)
    elif norm == "l2":
        ratio = torch.where(slope > 0, room / slope, 0.0)
        moves = torch.minimum(_level(slope**2, ratio, need), ratio) * slope
    else:
        order = (slope if norm == "l1" else slope * room).argsort(dim=-1, descending=True, stable=True)
        gain = (slope * room).gather(-1, order)
        missing = (need - (gain.cumsum(-1) - gain)).clamp_min(0.0)
        steep = slope.gather(-1, order)
        ordered = torch.minimum(torch.where(steep > 0, missing / steep, 0.0), room.gather(-1, order))
        moves = torch.zeros_like(ordered).scatter(-1, order, ordered)
    reachable = (slope * room).sum(-1, keepdim=True) >= need
    return torch.where(reachable, moves, math.nan)


def _level(weight: Tensor, cap: Tensor, need: Tensor) -> Tensor:
    """The level t, (..., 1), with sum(weight * min(t, cap)) = ``need``; any where there is none."""
    cap, order = cap.sort(dim=-1)
    weight = weight.gather(-1, order)
    full = weight * cap
    before = full.cumsum(-1) - full  # reached by those whose cap is lower
    above = weight.flip(-1).cumsum(-1).flip(-1)  # weight of those whose cap is not
    first = (before + above * cap < need).sum(-1, keepdim=True).clamp_max(cap.shape[-1] - 1)
    return ((need - before.gather(-1, first)) / above.gather(-1, first)).nan_to_num(nan=0.0)
