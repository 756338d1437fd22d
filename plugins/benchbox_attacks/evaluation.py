"""What a gradient attack sees at its current points, and how it keeps some rows of one tensor and some of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchbox.api import AttackTarget, Rows, fooled
from benchbox.domain import Threat


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Nothing here carries a gradient any more; the rows are those of ``point``."""

    point: Tensor  # (n, c, h, w): where the model was looked at
    logits: Tensor  # (n, k)
    loss: Tensor  # (n,)
    gradient: Tensor  # of the loss, (n, c, h, w)
    broken: Tensor  # bool (n,): whether the logits are what the attacker wants


def evaluate(
    model: AttackTarget, rows: Rows, threat: Threat, loss: Callable[[Tensor], Tensor], samples: int = 1
) -> Evaluation:
    """One look at ``rows.state["point"]``; ``loss`` maps logits (n, k) to what each row maximises (n,).

    With more ``samples`` everything is the mean over that many passes, the estimate of an expectation over a random
    defense (Athalye, Carlini & Wagner, ICML 2018, "Obfuscated gradients give a false sense of security", §5.2).
    AutoAttack's version "rand" takes the mean of gradients, too, but the loss and the prediction of the last pass. It
    can afford to, since it goes on after a success; rows that leave at the first one would leave at the first lucky
    draw, so here the mean logits decide.
    """
    point = rows.state["point"].detach().requires_grad_()
    logits, losses, gradient = _look(model, point, rows.y, threat, loss)
    for _ in range(samples - 1):
        more = _look(model, point, rows.y, threat, loss)
        logits, losses, gradient = logits + more[0], losses + more[1], gradient + more[2]
    if samples > 1:
        logits, losses, gradient = logits / samples, losses / samples, gradient / samples
    return Evaluation(point.detach(), logits, losses, gradient, fooled(logits, rows.y, threat))


def _look(
    model: AttackTarget, point: Tensor, y: Tensor, threat: Threat, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    logits = model.logits(point, y, threat.targeted)
    losses = loss(logits)
    (gradient,) = torch.autograd.grad(losses.sum(), point)
    return logits.detach(), losses.detach(), gradient


def choose(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Rows of ``one`` where ``condition`` (bool (n,)) holds, else of ``other``.

    Where all rows come from one of them it is returned itself: never write to the result.
    """
    chosen = condition.nonzero()[:, 0]
    if len(chosen) in (0, len(condition)):
        return one if len(chosen) else other
    return other.index_copy(0, chosen, one[chosen])
