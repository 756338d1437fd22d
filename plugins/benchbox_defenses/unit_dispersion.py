"""The features of ML-LOO: how widely the leave-one-out attributions of each unit of a model are spread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchbox import api
from benchbox_attributions.dispersion import Statistic, dispersion
from benchbox_attributions.leave_one_out import LeaveOneOut


class UnitDispersion:
    """``features(x)`` gives (n, statistics · units): all units in the first statistic, then all in the second, …

    A constant attribution has dispersion 0, one with a value that is not finite has NaN. Parts of an image
    that differ from the reference by no more than ``skip_below`` (whose attribution is about 0 by construction) are not
    counted; where it is None all are.
    """

    def __init__(
        self, loo: LeaveOneOut, statistics: Sequence[Statistic], skip_below: float | None, samples: int
    ) -> None:
        """``samples``: how many of an image's features :meth:`sampled` looks at."""
        self.loo, self.statistics = loo, tuple(statistics)
        self.skip_below, self.samples = skip_below, samples

    def __call__(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        """Without a graph, from all features, in as much memory as the options of leave-one-out allow."""
        counted = iter(self._counted(x))

        def reduce(differences: Float[Tensor, "m units features"]) -> Tensor:
            return self._spread(differences, [next(counted) for _ in differences])

        return self.loo.reduced(x, reduce)

    def sampled(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        """The same estimated from ``samples`` features of each image, with a graph back to ``x``.

        Which ones is drawn anew for each image and depends on nothing but its values: an attacker, whose image moves
        with every step, averages over draws, and nobody's result depends on neighbours.
        """
        counted = self._counted(x.detach())
        priority = _uniform(x.detach(), counted.shape[1]) + counted
        chosen = priority.topk(min(self.samples, counted.shape[1])).indices
        return self._spread(self.loo.sampled(x, chosen), list(counted.gather(1, chosen)))

    def _counted(self, x: Tensor) -> Bool[Tensor, "n features"]:
        changed = self.loo.changed(x, self.skip_below or 0.0)
        return torch.ones_like(changed) if self.skip_below is None else changed

    def _spread(
        self, differences: Float[Tensor, "n units k"], counted: Sequence[Bool[Tensor, " k"]]
    ) -> Float[Tensor, "n f"]:
        if self.skip_below is None or not len(differences):
            return self._dispersions(differences)
        rows = zip(differences[:, None], counted, strict=True)  # each has another number of parts that count
        return torch.cat([self._dispersions(row[:, :, keep]) for row, keep in rows])

    def _dispersions(self, differences: Float[Tensor, "n units k"]) -> Float[Tensor, "n f"]:
        count, units, features = differences.shape
        if not features:  # an image that is the reference all over
            return differences.new_zeros(count, units * len(self.statistics)) + differences.sum()
        rows = differences.flatten(0, 1)
        known = rows.isfinite().all(1)
        columns = [dispersion(rows, statistic).where(known, torch.nan) for statistic in self.statistics]
        return torch.stack(columns).view(len(columns), count, units).transpose(0, 1).flatten(1)


def _uniform(x: Float[Tensor, "n c h w"], count: int) -> Float[Tensor, "n count"]:
    """Numbers in [0, 1) of each image's own stream, which is named by a digest of its values."""
    values = x.flatten(1).double().nan_to_num().view(torch.int64)
    weights = 2 * torch.arange(values.shape[1], device=x.device) + 1
    keys: Int[Tensor, " n"] = ((values ^ (values >> 29)) * weights).sum(1)
    return api.RowRandom(keys).uniform((count,))
