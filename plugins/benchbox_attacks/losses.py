"""Losses of the margin family that do not change when all logits are shifted and scaled alike.

Croce & Hein, ICML 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", §4: the cross entropy of a model with large logits has no gradient left; these have. Logits (n, k), classes
int64 (n,), losses (n,); an attacker maximises them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchbox.api import adversarial_loss
from benchbox.domain import Threat

_TINY = 1e-12  # keeps constant logits from dividing by zero


def dlr(logits: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Difference of logits ratio (eq. 6): the margin max over others of z - z_y over z_π1 - z_π3, π by size.

    Targeted threats turn the sign. With two classes there is no third logit, and this is the margin itself.
    """
    margin = adversarial_loss(logits, y, threat, "margin")
    if logits.shape[1] < 3:
        return margin
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin / (first - third + _TINY)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio (eq. 7): z_target - z_y over z_π1 - (z_π3 + z_π4) / 2, π by size.

    With fewer than four classes there is no fourth logit, and this is the difference z_target - z_y itself.
    """
    difference = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return difference
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
    return difference / (first - (third + fourth) / 2 + _TINY)


def runner_up(logits: Tensor, y: Tensor, rank: Tensor) -> Tensor:
    """The class that is ``rank`` (int64 (n,), 0 = the strongest) places down among the classes other than ``y``.

    Ranks beyond the last class give the last one; where ``y`` is the only class, it is returned itself.
    """
    own = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    order = logits.masked_fill(own, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.gather(1, rank.clamp_max(logits.shape[1] - 2).clamp_min(0)[:, None])[:, 0]
